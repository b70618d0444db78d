"""Speed: tokens a second of a run; of this machine now, FLOP/s of a matrix product."""

import time

import jax

from dsv3_jax.config import RunConfig
from dsv3_jax.model.counting import train_flops_per_token


class Speed:
    """Tokens a second and MFU of training between two rows of metrics.

    Args: devices: whose measured FLOP/s add up to the peak of MFU; 0 leaves MFU out.

    Example:
        >>> from dsv3_jax.presets import recipe
        >>> speed = Speed(recipe("tiny"), devices=0)
        >>> speed.since_last(10), list(speed.since_last(20))
        ({}, ['tokens_per_s'])
    """

    def __init__(self, run: RunConfig, devices: int):
        adapted = run.lora.on if run.lora.rank else ()
        self.flops = train_flops_per_token(
            run.model, frozen_trunk=run.trunk is not None, adapted=adapted
        )
        if run.indexer_stage == "warm":  # forward alone, but for the indexers
            self.flops //= 3
        self.tokens = run.data.batch_size * run.data.seq_len
        self.peak = devices * gemm_flops(run.execution.compute_dtype) if devices else None
        self.last: tuple[int, float] | None = None  # step and time of the last row
        self.away = 0.0  # seconds in which no step ran

    def since_last(self, step: int) -> dict[str, float]:
        """The measures since the last row; none at the first, which holds the compilation."""
        before = self.last
        now = time.perf_counter() - self.away
        self.last = step, now
        if before is None:
            return {}
        rate = (step - before[0]) * self.tokens / max(now - before[1], 1e-9)
        measures = {"tokens_per_s": rate}
        if self.peak:
            measures["mfu"] = rate * self.flops / self.peak
        return measures


def gemm_flops(dtype="float32", size: int | None = None, seconds: float = 0.5) -> float:
    """Measure the FLOP/s of a square matrix product, the best of several runs: MFU's peak.

    Args: size: rows of the matrix; None means 2,048 on the CPU and 8,192 elsewhere. seconds: how
        long to repeat it.

    Example:
        >>> gemm_flops(size=64, seconds=0.01) > 0
        True
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    # Random numbers: on a GPU equal ones need less power, so they are multiplied faster than a
    # model's.
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    jax.block_until_ready(product(a))  # compiles
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
