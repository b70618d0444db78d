"""Our side of the training benchmark: a worker process that speaks the peer's protocol.

`python worker.py --config '{…}'` compiles the step, prints one line of JSON, then obeys one command a line:
`step N` (N steps, one line of JSON), `gemm` (the measured peak of a float32 product), `quit`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

from peer_transformers import draw_tokens


class Ours:
    """A worker that holds our side; the same interface as `Peer`, and `gemm`."""

    def __init__(self, cfg, *, batch_size=4, seq_len=512, seed=0, mesh=""):
        from dsv3_jax.config import to_dict

        command = [sys.executable, __file__, "--config", json.dumps(to_dict(cfg))]
        command += [f"--batch={batch_size}", f"--length={seq_len}", f"--seed={seed}", f"--mesh={mesh}"]
        self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.info = self._reply()

    def step(self, count: int = 1) -> dict:
        """Run `count` steps: {"seconds": [one each], "loss": [one each], "peak_rss_bytes": int}."""
        return self._ask(f"step {count}")

    def gemm(self) -> float:
        """FLOP/s of a large float32 product, now."""
        return self._ask("gemm")["flops"]

    def _ask(self, command: str) -> dict:
        assert self._worker.stdin
        print(command, file=self._worker.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict:
        assert self._worker.stdout
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError(f"the dsv3-jax worker ended with code {self._worker.wait()}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self._worker.stdin
        self._worker.stdin.close()
        self._worker.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="", help="data=N,expert=N; a single device if not given")
    args = parser.parse_args()

    from dsv3_jax.runtime import gemm_flops, keep_memory

    keep_memory()
    import jax
    import jax.numpy as jnp

    if args.mesh:
        jax.config.update("jax_num_cpu_devices", os.cpu_count())
    from dsv3_jax.config import DataConfig, ModelConfig, OptimConfig, RunConfig, from_dict
    from dsv3_jax.sharding import batch_sharding, check, in_force, make_mesh, parse_mesh
    from dsv3_jax.train_step import init_state, make_step

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
    say(
        compile_seconds=time.perf_counter() - start,
        temporary_bytes=memory.temp_size_in_bytes,
        state_bytes=sum(x.nbytes for x in jax.tree.leaves(state)),
        parameters=sum(x.size for x in jax.tree.leaves(state.params)),
        jax=jax.__version__,
        device=str(jax.devices()[0].device_kind),
    )
    for line in sys.stdin:
        command, *count = line.split()
        if command == "quit":
            return
        if command == "gemm":
            say(flops=gemm_flops(seconds=1.0))
            continue
        seconds, losses = [], []
        for _ in range(int(count[0])):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
        say(seconds=seconds, loss=losses, peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def say(**reply) -> None:
    print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
