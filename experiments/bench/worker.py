"""Our side of the training benchmark: a worker process that speaks the peer's protocol.

`python worker.py --config '{…}'` compiles the step, prints one line of JSON, then obeys one command a line:
`step N` (N steps, one line of JSON), `gemm` (the measured peak of a float32 product), `quit`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

from peer_transformers import draw_tokens
from process import Worker, peak_rss, serve


class Ours(Worker):
    """A worker that holds our side; the same interface as `Peer`, and `gemm`."""

    def __init__(self, cfg, *, batch_size=4, seq_len=512, seed=0, mesh="", env: dict[str, str] | None = None):
        from dsv3_jax.config import to_dict

        command = [sys.executable, __file__, "--config", json.dumps(to_dict(cfg))]
        command += [f"--batch={batch_size}", f"--length={seq_len}", f"--seed={seed}", f"--mesh={mesh}"]
        super().__init__("dsv3-jax", command, env)

    def step(self, count: int = 1) -> dict:
        """Run `count` steps: {"seconds": [one each], "loss": [one each], "peak_rss_bytes": int}."""
        return self.ask(f"step {count}")

    def gemm(self) -> float:
        """FLOP/s of a large float32 product, now."""
        return self.ask("gemm")["flops"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="", help="data=N,expert=N; a single device if not given")
    args = parser.parse_args()
    return serve(lambda: _trainer(args))


def _trainer(args) -> tuple[dict, Callable[[str], dict]]:
    from dsv3_jax.kernels.cpu.memory import keep_memory
    from dsv3_jax.report.speed import gemm_flops

    keep_memory()
    import jax
    import jax.numpy as jnp

    if args.mesh:
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    from dsv3_jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, from_dict
    from dsv3_jax.mesh.sharding import batch_sharding, check, in_force, make_mesh, parse_mesh
    from dsv3_jax.training.step import init_state, make_step

    cfg = from_dict(ModelConfig, json.loads(args.config))
    run = RunConfig(
        cfg,
        DataConfig(seq_len=args.length, batch_size=args.batch),
        # The peer's recipe: a constant rate, no warm-up.
        OptimConfig(warmup_steps=0, decay_start=1.0, decay_end=1.0),
        seed=args.seed,
    )
    tokens = jnp.asarray(draw_tokens(args.seed, args.batch, args.length, cfg.vocab_size), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(args.length, dtype=jnp.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": places}
    mesh = None
    if args.mesh:
        mesh = make_mesh(**parse_mesh(args.mesh))
        check(mesh, run)
        batch = jax.device_put(batch, batch_sharding(mesh))
    state = jax.block_until_ready(init_state(run, mesh))
    start = time.perf_counter()
    with in_force(mesh):
        step = make_step(run).lower(state, batch).compile()
    memory = step.memory_analysis()
    info = {
        "compile_seconds": time.perf_counter() - start,
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "jax": jax.__version__,
        "device": str(jax.devices()[0].device_kind),
    }

    def obey(line: str) -> dict:
        nonlocal state
        command, *count = line.split()
        if command == "gemm":
            return {"flops": gemm_flops(seconds=1.0)}
        seconds, losses = [], []
        for _ in range(int(count[0])):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
            time.sleep(0.05)  # a step's memory is freed a moment after its results are there, for the next to take
        return {"seconds": seconds, "loss": losses, "peak_rss_bytes": peak_rss()}

    return info, obey


if __name__ == "__main__":
    sys.exit(main())
