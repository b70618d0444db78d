"""Our side of the training benchmark: a worker that compiles the step and then runs it."""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from process import draw_tokens, peak_rss, serve

import dsv3_jax as ds
from dsv3_jax.config import from_dict
from dsv3_jax.kernels import choose
from dsv3_jax.kernels.cpu.memory import keep_memory
from dsv3_jax.report.speed import gemm_flops
from dsv3_jax.training.state import Job, init_state
from dsv3_jax.training.step import make_step


def prepare(
    config: dict, batch: int = 4, length: int = 512, kernels: str = "auto"
) -> tuple[dict, Callable[..., dict]]:
    """Compile the training step.

    Args:
        config: a ModelConfig as `config.to_dict` returns it.
        batch, length: sequences and tokens of a step.
        kernels: as Execution.kernels; "xla" means no hand-written kernels.
    Returns: what is known of the program, and what answers `steps` (run so many) and `gemm` (the
        FLOP/s of a large float32 product).
    """
    keep_memory()
    run = ds.RunConfig(
        model=from_dict(ds.ModelConfig, config),
        execution=ds.Execution(kernels=kernels),
        data=ds.DataConfig(seq_len=length, batch_size=batch),
        # as the peer's: a constant learning rate without warm-up
        optim=ds.OptimConfig(warmup_steps=0, decay_start=1.0, decay_end=1.0),
    )
    tokens = jnp.asarray(draw_tokens(batch, length, run.model.vocab_size), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    rows = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}

    # This compiles the C++ kernels, which is not in compile_seconds.
    job = Job(run, kernels=choose.prepare(run.execution))
    state = jax.block_until_ready(init_state(job))
    start = time.perf_counter()
    step = make_step(job).lower(state, rows).compile()
    info = {
        "compile_seconds": time.perf_counter() - start,
        "temporary_bytes": step.memory_analysis().temp_size_in_bytes,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "jax": jax.__version__,
    }

    def handle(steps: int = 0, gemm: bool = False) -> dict:
        nonlocal state
        if gemm:
            return {"flops": gemm_flops(seconds=1.0)}
        seconds, losses = [], []
        for _ in range(steps):
            start = time.perf_counter()
            state, metrics = step(state, rows)
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
            # A step's memory is freed shortly after its results; the next step then reuses it.
            time.sleep(0.05)
        return {"seconds": seconds, "loss": losses, "peak_rss_bytes": peak_rss()}

    return info, handle


if __name__ == "__main__":
    sys.exit(serve(prepare))
