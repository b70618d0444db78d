"""tokamax, a library of kernels for accelerators: the only file that imports it, and why it is not in use.

tokamax is optional. It asks the process for its default device while a program is traced. Programs here are compiled
for a target instead, which may not be present. Inside `tracing_for_hopper`, tokamax sees an H100 whatever there is.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import SimpleNamespace
from typing import Any
from unittest import mock

MIN_PYTHON = (3, 12)
OLDEST, TOO_NEW = (0, 0, 17), (0, 1)  # versions whose names and results were checked
INSTALL = "pip install 'tokamax>=0.0.17,<0.1'"
HOPPER = "9.0"  # compute capability
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability=HOPPER)


def why_not(target: Any) -> str:
    """Why tokamax's kernels for Hopper cannot run on a target, in words; "" if they can.

    Args: target: a `kernels.choose.Target`, of which the chip is read.
    """
    if target.chip != HOPPER:
        chip = f"the chip has {target.chip}" if target.chip else "the chip is not known"
        return f"its kernels need compute capability {HOPPER} (H100, H200), and {chip}"
    if sys.version_info < MIN_PYTHON:
        return f"it needs Python {'.'.join(map(str, MIN_PYTHON))} or newer"
    try:
        version = metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        return f"it is not installed: {INSTALL}"
    numbers = tuple(int(n) for n in version.split(".")[:3] if n.isdigit())
    if not OLDEST <= numbers < TOO_NEW:
        return f"tokamax {version} is not supported: {INSTALL}"
    return ""


@contextmanager
def tracing_for_hopper() -> Iterator[None]:
    """Let tokamax trace its kernels for an H100, whatever devices the process has. Its calls belong inside."""
    from jax.extend import backend
    from tokamax import config

    h100 = mock.patch.object(backend, "get_default_device", lambda: H100)
    # tokamax ships timings of some shapes and logs a warning for all others; its rules choose the same blocks.
    with config.cross_compile(True), config.ignore_autotuning_cache(True), h100:
        yield


def flash_attention() -> tuple[Any, Any]:
    """(The op of flash attention on Hopper, the class of its masks)."""
    # Not from tokamax.ops.gpu, which also imports jax_triton.
    from tokamax._src.ops.attention.base import Mask
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    return PallasMosaicGpuFlashAttention(), Mask
