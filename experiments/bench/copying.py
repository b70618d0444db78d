"""The bound of a decoding step: the bytes that it must read, and those that this machine copies."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import distinct_experts, share_read, size


def decode_bytes(
    cfg: ModelConfig, batch: int, context: int, cache_bytes_per_token: int, *, weight_bytes: int = 4
) -> float:
    """Bytes that one plain decoding step must read, an expectation for `distinct_experts`.

    All weights of layers and head once, of the routed experts those that the batch reaches, and
    what the cache holds. Left out, as some kilobytes: embedding rows, activations, and the rows
    that the step writes.

    Args:
        batch: sequences, which advance a token each.
        context: tokens that each has in the cache.
        cache_bytes_per_token: over all layers, as `Generated` has it.
        weight_bytes: bytes a parameter.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("tiny")
        >>> read = decode_bytes(cfg, batch=1, context=100, cache_bytes_per_token=10)
        >>> read == 4 * size(cfg).active + 1000  # the active parameters, and 100 cached tokens
        True
    """
    counted = size(cfg)
    routed = counted.parts.get("routed experts", 0)
    # `active` counts K of E routed experts.
    always = counted.active - routed * cfg.experts_per_token / cfg.num_experts
    reached = routed * distinct_experts(cfg, batch) / cfg.num_experts
    read = context * share_read(cfg, context, pick_kind(cfg, None))
    return (always + reached) * weight_bytes + batch * read * cache_bytes_per_token


def copy_bandwidth(seconds: float = 0.5, nbytes: int = 128 << 20) -> float:
    """Measure the bytes that copying moves per second, reads plus writes, the best of several runs.

    Each core copies a separate array.

    Args:
        seconds: how long to repeat it.
        nbytes: bytes of an array, which must be far more than the caches hold.
    """
    cores = os.cpu_count() or 1
    sources = [np.ones(nbytes // 8) for _ in range(cores)]
    targets = [np.zeros_like(x) for x in sources]
    best, end = float("inf"), time.perf_counter() + seconds
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(np.copyto, targets, sources))  # to warm up
        while time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = min(best, time.perf_counter() - start)
    return 2 * cores * sources[0].nbytes / best
