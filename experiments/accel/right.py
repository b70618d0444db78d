"""The part that comes first of all: which implementations compute what they should on this device.

The package's check does the work, see `dsv3_jax/kernels/check_apart.py`. Kernels that run only if
they are named are checked beside the others: those of `kernels/` here. What is wrong is kept, and
no later part takes it by "auto". As a program this file is the process that checks.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dsv3_jax.config import Execution
from dsv3_jax.kernels import check_apart
from experiments.accel.kernels import gpu_latent_attention
from experiments.accel.measuring import Figure

# Each enters the table by `add`.
OWN = (gpu_latent_attention,)
NAMES = ("latent",)  # of their rows
PRECISIONS = ("none", "fp8")  # other recipes round otherwise, and multiply by the same kernels


def right() -> Iterator[Figure]:
    """Each implementation's largest error over its bound, forward and in all gradients."""
    command = [sys.executable, str(Path(__file__).resolve())]
    execution = Execution(compute_dtype="bfloat16")
    for verdict in check_apart.check_and_keep(
        execution, precisions=PRECISIONS, also=NAMES, command=command
    ):
        share = verdict.share if math.isfinite(verdict.share) else None
        why = "" if share is not None else f"WRONG: {verdict.wrong}"
        name = f"{verdict.name}, largest error over its bound"
        yield Figure(name, share, "times", bar="right", note=verdict.wrong, why=why)


if __name__ == "__main__":
    for kernel in OWN:
        kernel.add()
    sys.exit(check_apart.main())
