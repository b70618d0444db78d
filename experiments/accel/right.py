"""The part that comes first of all: which implementations compute what they should on this device.

The package's check does the work, see `dsv3_jax/kernels/check.py`. Kernels that run only if they are named are checked
beside the others: those of `kernels/` here. What is wrong is kept, and no later part takes it by "auto".
"""

import math

from dsv3_jax.config import Execution
from dsv3_jax.kernels import choose
from dsv3_jax.kernels.check import check_and_keep
from experiments.accel.kernels import (
    gpu_latent_attention,
    gpu_sparse_attention,
    hopper_fp8,
    hopper_products,
    tpu_latent_attention,
)
from experiments.accel.measuring import Figure, Part
from experiments.accel.sizes import Sizes

# Each enters the table by `add`.
OWN = (hopper_products, hopper_fp8, gpu_latent_attention, gpu_sparse_attention, tpu_latent_attention)
NAMES = ("hopper", "latent")  # of their rows
PRECISIONS = ("none", "fp8")  # other recipes round otherwise, and multiply by the same kernels


def right(sizes: Sizes) -> Part:
    """Each implementation's largest error over its bound, forward and in all gradients."""
    kernels = choose.prepare(Execution(compute_dtype="bfloat16"))
    yield "all implementations"
    found = check_and_keep(kernels, large=sizes.large, precisions=PRECISIONS, also=NAMES)
    for name, verdict in found.items():
        share = verdict.share if math.isfinite(verdict.share) else None
        why = "" if share is not None else f"WRONG: {verdict.wrong}"
        yield Figure(f"{name}, largest error over its bound", share, "times", bar="right", note=verdict.wrong, why=why)
