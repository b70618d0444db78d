"""The part that comes first of all: which implementations compute what they should on this device.

The package's check does the work, see `dsv3_jax/kernels/check_apart.py`. The kernel of `kernels/`,
which runs only if it is named, is checked beside the others. What is wrong is kept, and no later
part takes it by "auto". As a program this file is the process that checks.
"""

import math
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from dsv3_jax.kernels import check_apart
from experiments.accel.kernels import gpu_latent_attention
from experiments.accel.measuring import BFLOAT16, Figure, Part
from experiments.accel.sizes import Sizes

NAMES = ("latent",)  # of the kernel's row
PRECISIONS = ("none", "fp8")  # other recipes round otherwise, and multiply by the same kernels


def right(sizes: Sizes) -> Part:
    """Each implementation's largest error over its bound, forward and in all gradients."""
    command = [sys.executable, str(Path(__file__).resolve())]
    for verdict in check_apart.check_and_keep(
        BFLOAT16, precisions=PRECISIONS, also=NAMES, command=command
    ):
        share = verdict.share if math.isfinite(verdict.share) else None
        why = "" if share is not None else f"WRONG: {verdict.wrong}"
        name = f"{verdict.name}, largest error over its bound"
        yield Figure(name, share, "times", bar="right", note=verdict.wrong, why=why)
        yield f"what comes after {verdict.name}"


if __name__ == "__main__":
    gpu_latent_attention.add()
    sys.exit(check_apart.main())
