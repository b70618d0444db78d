"""Our side of the training benchmark: a worker process with the peer's protocol.

`python worker.py --config '{…}'` compiles the step and prints one line of JSON. Then it handles one
command per line: `step N` (N steps, one line of JSON), `gemm` (the measured peak of a float32
product), `quit`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

from peer_transformers import draw_tokens
from process import Worker, peak_rss, serve


class TrainWorker(Worker):
    """A worker that trains with dsv3-jax. It has the interface of `PeerTrainWorker`, and `gemm`."""

    def __init__(self, cfg, *, batch_size=4, seq_len=512, seed=0, mesh="", kernels="auto"):
        from dsv3_jax.config import to_dict

        command = [sys.executable, __file__, "--config", json.dumps(to_dict(cfg))]
        command += [
            f"--batch={batch_size}",
            f"--length={seq_len}",
            f"--seed={seed}",
            f"--mesh={mesh}",
        ]
        command += [f"--kernels={kernels}"]
        super().__init__("dsv3-jax", command)

    def step(self, count: int = 1) -> dict:
        """Run `count` steps; return {"seconds": […], "loss": […], "peak_rss_bytes": int}."""
        return self.ask(f"step {count}")

    def gemm(self) -> float:
        """Measure the FLOP/s of a large float32 product."""
        return self.ask("gemm")["flops"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="", help="data=N,expert=N; default: a single device")
    parser.add_argument(
        "--kernels", default="auto", help="as Execution.kernels; xla: no hand-written kernels"
    )
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
    from dsv3_jax.config import (
        DataConfig,
        Execution,
        ModelConfig,
        OptimConfig,
        RunConfig,
        from_dict,
    )
    from dsv3_jax.kernels.choose import prepare
    from dsv3_jax.mesh.shape import parse_mesh
    from dsv3_jax.mesh.sharding import batch_sharding, check_run, make_mesh, use_mesh
    from dsv3_jax.training.state import Job, init_state
    from dsv3_jax.training.step import make_step

    cfg = from_dict(ModelConfig, json.loads(args.config))
    run = RunConfig(
        model=cfg,
        execution=Execution(kernels=args.kernels),
        data=DataConfig(seq_len=args.length, batch_size=args.batch),
        # as the peer's: a constant learning rate without warm-up
        optim=OptimConfig(warmup_steps=0, decay_start=1.0, decay_end=1.0),
        seed=args.seed,
    )
    tokens = jnp.asarray(draw_tokens(args.seed, args.batch, args.length, cfg.vocab_size), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(args.length, dtype=jnp.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    mesh = None
    if args.mesh:
        mesh = make_mesh(**parse_mesh(args.mesh))
        check_run(mesh, run)
        batch = jax.device_put(batch, batch_sharding(mesh))
    # This compiles the C++ kernels, which is not in compile_seconds.
    job = Job(run, mesh, prepare(run.execution, mesh=mesh))
    state = jax.block_until_ready(init_state(job))
    start = time.perf_counter()
    with use_mesh(mesh):
        step = make_step(job).lower(state, batch).compile()
    memory = step.memory_analysis()
    info = {
        "compile_seconds": time.perf_counter() - start,
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "jax": jax.__version__,
        "device": str(jax.devices()[0].device_kind),
    }

    def handle(line: str) -> dict:
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
            # A step's memory is freed shortly after its results; the next step then reuses it.
            time.sleep(0.05)
        return {"seconds": seconds, "loss": losses, "peak_rss_bytes": peak_rss()}

    return info, handle


if __name__ == "__main__":
    sys.exit(main())
