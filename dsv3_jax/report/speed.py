"""How fast the machine multiplies and copies, measured here and now."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def gemm_flops(dtype="float32", size: int | None = None, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product here and now, the best of several: the peak that MFU is measured against."""
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / _best_time(lambda: jax.block_until_ready(product(a)), seconds)


def copy_bandwidth(seconds: float = 0.5, size: int = 128 << 20) -> float:
    """Bytes a second that copying moves here and now, the best of several; what is read and what is written both count.

    On the CPU each core copies an array of its own; elsewhere the device adds 1 to one. `size` is an array's bytes, to
    be far more than caches hold.
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
    """The least time that `work` took, once it had run once, within so many seconds."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
