"""tokamax, a library of kernels for accelerators: its only import, and why it is not in use.

tokamax is optional. Its ops ask the process for its default device while they are traced. Programs
here are compiled for a target instead, which may not be present, so the kernels below the ops are
called, which ask nothing.
"""

from importlib import metadata
from typing import Any

# for Python 3.12 and newer; the kernels' names are private and move between versions
VERSION = "0.0.17"
INSTALL = f"pip install tokamax=={VERSION}"
HOPPER = "9.0"  # compute capability


def why_not(target: Any) -> str:
    """Why tokamax's kernels for Hopper cannot run on a target; "" if they can.

    Args: target: a `kernels.choose.Target`, of which the chip is read.
    """
    if target.chip != HOPPER:
        chip = f"the chip has {target.chip}" if target.chip else "the chip is not known"
        return f"its kernels need compute capability {HOPPER} (H100, H200), and {chip}"
    try:
        version = metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        return f"it is not installed: {INSTALL}"
    if version != VERSION:
        return f"tokamax {version} is not supported: {INSTALL}"
    try:
        flash_attention()
    except Exception as error:  # of a package that it needs: any type
        return f"it cannot be imported ({type(error).__name__}: {error}): {INSTALL}"
    return ""


def flash_attention() -> tuple[Any, Any]:
    """(The module of flash attention's forward kernel on Hopper, that of its backward kernels)."""
    from tokamax._src.ops.attention import pallas_mosaic_gpu_kernel_sm90 as forward
    from tokamax._src.ops.attention import pallas_mosaic_gpu_vjp_kernel_sm90 as backward

    return forward, backward
