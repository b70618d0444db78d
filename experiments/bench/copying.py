"""The bytes a second that this machine copies: the bound of a decoding step, which reads all weights."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def copy_bandwidth(seconds: float = 0.5, size: int = 128 << 20) -> float:
    """Measure the bytes that copying moves per second, reads plus writes, the best of several runs.

    On the CPU each core copies a separate array; elsewhere the device adds 1 to one array.

    Args: seconds: how long to repeat it. size: bytes of an array, which must be far more than the caches hold.
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
