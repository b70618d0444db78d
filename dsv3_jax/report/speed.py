"""Speed of this machine, measured now: FLOP/s of a matrix product, and bytes/s of copying."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def gemm_flops(dtype="float32", size: int | None = None, seconds: float = 0.5) -> float:
    """Measure the FLOP/s of a square matrix product, the best of several runs: the peak that MFU is relative to.

    Args: size: rows of the matrix; None means 2,048 on the CPU and 8,192 elsewhere. seconds: how long to repeat it.

    Example:
        >>> gemm_flops(size=64, seconds=0.01) > 0
        True
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / _best_time(lambda: jax.block_until_ready(product(a)), seconds)


def copy_bandwidth(seconds: float = 0.5, size: int = 128 << 20) -> float:
    """Measure the bytes that copying moves per second, reads plus writes, the best of several runs.

    On the CPU each core copies a separate array; elsewhere the device adds 1 to one array.

    Args: seconds: how long to repeat it. size: bytes of an array, which must be far more than the caches hold.

    Example:
        >>> copy_bandwidth(seconds=0.01, size=1 << 16) > 0
        True
    """
    if jax.default_backend() == "cpu":
        cores = os.cpu_count() or 1
        sources = [np.ones(size // 8) for _ in range(cores)]
        targets = [np.zeros_like(x) for x in sources]
        with ThreadPoolExecutor(cores) as pool:
            best = _best_time(lambda: list(pool.map(np.copyto, targets, sources)), seconds)
        return 2 * cores * sources[0].nbytes / best
    x = jnp.ones((size // 4,), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _best_time(lambda: jax.block_until_ready(add(x)), seconds)


def _best_time(work: Callable[[], Any], seconds: float) -> float:
    """Repeat `work` for so many seconds, after one call to warm up; return the shortest time of a call."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
