"""Overlap of host and device: a step's time with and without look-ahead, on slow data pipelines.

python experiments/bench/overlap.py                # two minutes; writes overlap_results.json
python experiments/bench/overlap.py --steps 60 --rounds 10

Both sides are `fit` itself on one run. The side "in turn" starts a step and waits for it before the
next batch is made. The side "ahead" makes the next batch while a step runs, as on accelerators
(`runs.steps.AHEAD`). The sides take turns in one process. Each pipeline delays a batch by a
share of the step's own time. The one "waiting" sleeps, as for a disk or the network. The one
"working" computes on one core in Python, as for a slow tokenizer.

Metrics are written every fourth step only, because that work may overlap with steps, too. A side's
time is the median of the intervals between its rows, which one disturbance does not move. A
comparison is decided if all its rounds are on the same side of 1. Initial parameters are made once,
which saves nearly all the time of a run's start.
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from functools import cache
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

import dsv3_jax as ds
from dsv3_jax.config import RunConfig
from dsv3_jax.runs import loop, steps
from dsv3_jax.runs import start as starts
from dsv3_jax.training.state import Job, init_state

# The share of the step's time, and how it passes.
CELLS = ((0.0, "waiting"), (0.5, "waiting"), (1.0, "waiting"), (1.0, "working"))
EVERY = 4  # steps between rows of metrics
SIDES = {"in turn": 0, "ahead": 2}  # steps that are started before the oldest one is looked at


class Slow:
    """A source whose batches take longer: `seconds` each, waiting or working; and those batches."""

    def __init__(self, source, seconds: float, kind: str):
        self._source, self._seconds, self._kind = source, seconds, kind

    def __getattr__(self, name: str):
        return getattr(self._source, name)

    def train_batches(self, rows=None):
        return Slow(self._source.train_batches(rows), self._seconds, self._kind)

    def __next__(self):
        end = time.perf_counter() + self._seconds
        if self._kind == "waiting":
            time.sleep(self._seconds)
        while time.perf_counter() < end:
            sum(range(2000))
        return next(self._source)


class Clock(loop.Callback):
    """When each row was written."""

    def __init__(self):
        self.times: list[float] = []

    def on_step(self, row):
        self.times.append(time.perf_counter())

    def step_seconds(self) -> float:
        """Median time of a step, after the first rows."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[1:])) / EVERY


@cache
def first_state(run: RunConfig):
    """The initial state, on the host."""
    return jax.device_get(init_state(Job(run)))


def run_of(steps: int) -> RunConfig:
    """The tiny recipe with two layers and shorter rows; evaluated and saved at its end only."""
    recipe = ds.recipe("tiny")
    model = ds.replace(recipe.model, num_layers=2, mtp_depth=0)
    data = ds.replace(recipe.data, max_documents=400, seq_len=64, batch_size=4)
    often = dict(eval_every=10**6, save_every=10**6, log_every=EVERY, eval_batches=1)
    return ds.replace(recipe, model=model, data=data, steps=steps, **often)


def measure(run: RunConfig, side: str, seconds: float, kind: str) -> float:
    """Seconds a step of a new run of `fit`."""
    read, clock = loop.read_inputs, Clock()

    def slowed(*args, **kwargs):
        ready = read(*args, **kwargs)
        return ready._replace(source=Slow(ready.source, seconds, kind))

    ahead = {jax.default_backend(): SIDES[side]}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(steps, "AHEAD", ahead),
        mock.patch.object(loop, "read_inputs", slowed),
        mock.patch.object(
            starts, "init_state", lambda job: jax.tree.map(jnp.array, first_state(job.run))
        ),
    ):
        loop.fit(run, Path(folder, "run"), quiet=True, report=False, callbacks=[clock])
    return clock.step_seconds()


def table(cells: list[dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| a batch takes | in turn, ms | ahead, ms | in turn / ahead | at best | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        turn, ahead = (1000 * cell["seconds"][side] for side in SIDES)
        low, high = min(cell["ratios"]), max(cell["ratios"])
        share = (
            f"{cell['share']:.0%} of a step longer, {cell['kind']}"
            if cell["share"]
            else "no longer than usual"
        )
        verdict = "ahead is faster" if low > 1 else "ahead is slower" if high < 1 else "undecided"
        ratio = f"{statistics.median(cell['ratios']):.2f} ({low:.2f}–{high:.2f})"
        most = 1 + min(cell["share"], 1)
        lines.append(f"| {share} | {turn:.0f} | {ahead:.0f} | {ratio} | {most:.2f} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=24, help="of a turn; at least 16")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    if options.steps < 4 * EVERY or options.rounds < 1:
        parser.error(
            f"--steps={options.steps} is below {4 * EVERY}, or --rounds={options.rounds} below 1"
        )
    run = run_of(options.steps)
    for side in SIDES:
        measure(run, side, 0.0, "waiting")  # compiles
    step = statistics.median(measure(run, "in turn", 0.0, "waiting") for _ in range(3))
    cells: list[dict] = []
    for share, kind in CELLS:
        begin = time.perf_counter()
        found: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side, seconds in found.items():
                seconds.append(measure(run, side, share * step, kind))
        ratios = [a / b for a, b in zip(*found.values(), strict=True)]
        medians = {side: statistics.median(seconds) for side, seconds in found.items()}
        cells.append({"share": share, "kind": kind, "seconds": medians, "ratios": ratios})
        print(
            f"{table(cells[-1:]).splitlines()[-1]} measured in {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
        write(options, step, cells)
    print("\n" + table(cells))


def write(options: argparse.Namespace, step: float, cells: list[dict]) -> None:
    """Write what has been measured so far beside this file."""
    device = jax.devices()[0]
    results = {
        "device": device.device_kind, "platform": device.platform, "machine": platform.machine(),
        "jax": jax.__version__, "steps": options.steps, "rounds": options.rounds,
        "step_seconds": step, "cells": cells,
    }  # fmt: skip
    path = Path(__file__).with_name("overlap_results.json")
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
