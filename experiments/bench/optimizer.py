"""The cost of an optimizer: a step by AdamW, Muon, an optax chain, and Muon with QK-clip, in turns.

python experiments/bench/optimizer.py    # prints a table; some minutes, mostly compilation
python experiments/bench/optimizer.py --preset mini --rounds 9
"""

import argparse
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsv3_jax.config import RunConfig, replace
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.presets import recipe
from dsv3_jax.training import optim
from dsv3_jax.training.state import Job, init_state, split_trainable
from dsv3_jax.training.step import make_step

CHAIN = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(2.2e-4, 0.9, 0.95, weight_decay=0.1)
)
SIDES: dict[str, tuple[dict, optax.GradientTransformation | None]] = {
    "adamw": ({}, None),
    "muon": ({"name": "muon"}, None),
    "optax chain of adamw": ({}, CHAIN),
    "muon, qk_clip 100": ({"name": "muon", "qk_clip": 100.0}, None),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def seconds(call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


class Side:
    """One optimizer: a complete step, and its update alone on gradients that are there."""

    def __init__(self, run: RunConfig, tx: optax.GradientTransformation | None, batch: dict):
        kernels = prepare(run.execution)
        job = Job(run, kernels=kernels, optimizer=tx)
        self.state, self.batch = init_state(job), batch
        self.step_fn = make_step(job)
        update = optim.make(run.optim, run.steps, kernels, tx).update
        self.update_fn = jax.jit(update, donate_argnums=(1, 2))
        self.params = jax.tree.map(jnp.copy, split_trainable(run, self.state.params)[0])
        self.opt = jax.tree.map(jnp.copy, self.state.opt)
        self.grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), self.params)

    def step(self):
        self.state, metrics = self.step_fn(self.state, self.batch)
        return metrics

    def update(self):
        # A step that QK-clip adds to is in `step`: it needs the forward pass.
        args = self.state.step, self.params, self.opt, self.grads, jnp.float32(1), jnp.bool_(True)
        self.params, self.opt = self.update_fn(*args)
        return self.params


def measure(run: RunConfig, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each side's step and update, in turns, after one uncounted call of each."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(
        rng.integers(run.model.vocab_size, size=(run.data.batch_size, run.data.seq_len)), jnp.int32
    )
    positions = jnp.broadcast_to(jnp.arange(run.data.seq_len, dtype=jnp.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}
    sides = {}
    for name, (changes, tx) in SIDES.items():
        sides[name] = Side(replace(run, optim=replace(run.optim, **changes)), tx, batch)
        taken = seconds(sides[name].step), seconds(sides[name].update)
        say(f"{name}: compiled and run once, {taken[0]:.1f} s and {taken[1]:.1f} s")
    found: dict = {name: {"step": [], "update": []} for name in SIDES}
    for i in range(rounds):
        for name, side in sides.items():
            found[name]["step"].append(seconds(side.step))
            found[name]["update"].append(seconds(side.update))
        say(
            f"round {i + 1} of {rounds}: "
            + ", ".join(f"{n} {found[n]['step'][-1]:.2f} s" for n in SIDES)
        )
    return found


def table(found: dict) -> str:
    """Medians, and each round's ratio to AdamW's time in that round."""
    rows = [
        "| optimizer | step, s | step, over adamw's | update alone, ms | update, over adamw's |",
        "|---|---|---|---|---|",
    ]
    first = found["adamw"]
    for name, times in found.items():
        ratio = {
            kind: statistics.median(a / b for a, b in zip(times[kind], first[kind], strict=True))
            for kind in times
        }
        step, update = (statistics.median(times[kind]) for kind in ("step", "update"))
        rows.append(
            f"| {name} | {step:.2f} | {ratio['step']:.2f} "
            f"| {1e3 * update:.1f} | {ratio['update']:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="tiny", help="a recipe's name")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    run = recipe(args.preset)
    print(table(measure(run, args.rounds)))


if __name__ == "__main__":
    main()
