"""What the process asks of the machine it runs on: the allocator on CPU, and the measured speed of a GEMM."""

import ctypes
import platform
import time

import jax
import jax.numpy as jnp

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # glibc's malloc.h


def keep_memory() -> bool:
    """Have glibc keep freed memory instead of handing it back. True where that was done.

    XLA's CPU client allocates a program's temporary memory anew in each call. glibc maps such large blocks from the
    kernel and unmaps them again, so every step faults in every page: a quarter of a training step on some machines.
    Call it before the first array is made, in a process of your own (the command line does).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all(libc.mallopt(name, value) for name, value in settings)


def gemm_flops(dtype="float32", size: int | None = None, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product here and now, the best of several: the peak that MFU is measured against."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
