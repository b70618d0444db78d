"""Shared by campaigns against runs: a small finished run, and commands of a worker that load and resume copies of it.

The run saves after steps 4, 8 and 12. Its copy without the last checkpoint is `Base.stopped`.
"""

import atexit
import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax
import numpy as np
import runs

from dsv3_jax.config import RunConfig
from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import Checkpoints, find_damage, load_run, steps_of
from tests.campaign.trials import watch
from tests.campaign.watch import LIMIT_S, Worker

LAST = 8  # step of the last checkpoint of `Base.stopped`


def make_run(text: str, **changes) -> RunConfig:
    return runs.make_run(text, **{"keep": 3} | changes)


# Commands of a worker: each prints one line of JSON.


def _hash(tree: object) -> str:
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def load(folder: str) -> int:
    """Print a hash of a run's last weights, as readers load them."""
    found = load_run(folder)
    print(json.dumps({"step": found.step, "weights": _hash(jax.tree.leaves(found.model))}))
    return 0


def digest(folder: str, text: str) -> int:
    """Print hashes of all that a run has come to."""
    with Checkpoints(folder, make_run(text), read_only=True) as checkpoints:
        state, place = checkpoints.restore()
    rows = [json.dumps(row) for row in runs.rows_of(Path(folder))]
    loads = Path(folder, "load.jsonl").read_text().splitlines()
    print(json.dumps({"state": _hash(state), "place": place, "rows": rows, "loads": loads}))
    return 0


def resume(folder: str, text: str) -> int:
    """Train a run to its end, without what only takes time, and print its digest."""
    runs.spend_no_seconds()
    loop.fit(make_run(text), folder)
    return digest(folder, text)


COMMANDS = {"load": load, "digest": digest, "resume": resume}


# The run


@dataclass(frozen=True, eq=False)
class Base:
    """A finished run, and what it came to."""

    root: Path
    text: str
    whole: Path
    stopped: Path  # a copy without the last checkpoint
    loaded: dict  # what `load` prints of it
    digest: dict  # of `whole`
    seconds: float  # that a process takes to train it, without compiling
    ready: Worker  # with the commands above

    def train(self, folder: Path, **changes) -> list[str]:
        """The arguments of `dsv3` that train the run, or one with changes, in a folder."""
        run = make_run(self.text, **changes)
        return ["train", "tiny", "--out", str(folder), *runs.flags(run)]


@cache
def base() -> Base:
    """Train the run, once in this process."""
    root = Path(tempfile.mkdtemp(prefix="campaign-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    text = runs.write_text(root / "text")
    run, whole, stopped = make_run(text), root / "whole", root / "stopped"
    ready = Worker(__name__, environment=runs.environment(root))
    atexit.register(ready.stop)
    compiled = ready.run(["resume", str(root / "first"), text], 600)  # so that no process after it compiles
    assert compiled.code == 0, compiled.err
    ended = watch(runs.start(["train", "tiny", "--out", str(whole), *runs.flags(run)], root), 600)
    assert ended.code == 0, ended.err
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "12")
    loaded, wanted = ready.run(["load", str(stopped)]), ready.run(["digest", str(whole), text])
    assert loaded.code == wanted.code == 0, loaded.err + wanted.err
    return Base(root, text, whole, stopped, last_json(loaded.out), last_json(wanted.out), ended.seconds, ready)


def last_json(out: str) -> dict:
    """The last line of a command's output."""
    return json.loads(out.splitlines()[-1])


def half_written(folder: Path) -> list[str]:
    """Name the fault if a checkpoint at its place is not whole."""
    folders = (folder / "checkpoints" / str(step) for step in steps_of(folder / "checkpoints"))
    damage = [text for path in folders if (text := find_damage(path))]
    print(*damage, sep="\n", end="\n" if damage else "", file=sys.stderr)
    return ["half-written"] if damage else []


def ends_the_same(made: Base, folder: Path) -> list[str]:
    """Compare a finished run with the undisturbed one, bit for bit."""
    answer = made.ready.run(["digest", str(folder), made.text])
    if answer.code != 0:
        return [answer.fault or "not resumed"]
    return [] if last_json(answer.out) == made.digest else ["silent"]


def limit_of(made: Base) -> float:
    """Seconds after which a process of the run hangs: the machine's other work may slow it down, too."""
    return LIMIT_S + 6 * made.seconds
