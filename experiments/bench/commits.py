"""This tree against other commits, in turns: a training step, and a step of decoding."""

import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import median

from dsv3_jax.config import replace, to_dict
from dsv3_jax.presets import preset
from experiments.bench import harness
from experiments.bench.harness import ROOT, Rows, in_turns, ratio, shape_of

NEW_TOKENS = 129  # prefill makes the first
MINI = replace(preset("mini"), max_positions=16384 + NEW_TOKENS)
CELLS = ("step", *harness.CELLS)


def commits(
    against: Sequence[str] = ("HEAD~1",), cells: Sequence[str] = CELLS, rounds: int = 5
) -> Rows:
    """How long does a step take by this tree, over other commits' time, in turns?

    The cell "step" trains with 4 x 512 tokens, the others decode. Each commit's package has a
    folder of its own. No prompt is read: a decoding step's time does not depend on the cache's
    rows, and reading takes minutes. The ratio is the median of the turns' own.
    """
    for cell in cells:
        with ExitStack() as running:
            trees = {"this tree": ROOT}
            for commit in against:
                trees[commit] = Path(running.enter_context(tempfile.TemporaryDirectory()))
                unpack(commit, trees[commit])
            sides = {}
            for name, tree in trees.items():
                side, request = asked(cell)
                worker = running.enter_context(harness.start(side, {"config": config()}, tree=tree))
                sides[name] = partial(worker.ask, **request)
            replies = in_turns(sides, rounds)
        steps = {name: [reply["step_seconds"] for reply in some] for name, some in replies.items()}
        for name, seconds in steps.items():
            over = ratio(steps["this tree"], seconds)
            yield f"{cell}, {name}", {"step_ms": 1e3 * median(seconds), "step_over": over}


def asked(cell: str) -> tuple[str, dict]:
    """Return the side of worker.py for a cell, and the question to it."""
    if cell == "step":
        return "train", {"steps": 3}
    context, batch = shape_of(cell)
    return "decode", dict(batch=batch, context=context, new_tokens=NEW_TOKENS, filled=True)


def config() -> dict:
    """Return the model's fields that differ from their defaults: commits lack others."""
    values = to_dict(MINI)
    return {f.name: values[f.name] for f in fields(MINI) if getattr(MINI, f.name) != f.default}


def unpack(commit: str, folder: Path) -> None:
    """Put a commit's package into a folder."""
    package = ["git", "archive", commit, "dsv3_jax"]
    archive = subprocess.run(package, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
