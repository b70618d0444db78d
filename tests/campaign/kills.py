"""Processes killed at random moments by SIGKILL: training, `stats`, `convert`, `tokenizer` and `data tokenize`.

Training that is killed one to three times and then resumed must end bit for bit as the undisturbed run. The others must
leave their whole result or nothing at its place, and the same command must then succeed. `data tokenize` may leave some
of its shards; no reader takes them for all, because the manifest is written last.
"""

import hashlib
import random
import shutil
import time
from functools import cache
from pathlib import Path

import runs

from dsv3_jax.data.shards import MANIFEST
from tests.campaign import inputs
from tests.campaign.small_runs import Base, base, ends_the_same, half_written, limit_of
from tests.campaign.trials import Ended, Table, faults_of, report, trials, watch

CASES = ("train", "convert", "tokenizer", "stats", "data tokenize")


def killed(made: Base, argv: list[str], seconds: float, rng: random.Random) -> Ended:
    """Start a command, and kill it before `seconds` have passed; most kills come when its work has begun."""
    process = runs.start(argv, made.root)
    time.sleep(seconds * (rng.uniform(0.0, 1.0) if rng.random() < 0.3 else rng.uniform(0.4, 1.0)))
    process.kill()
    return watch(process, 30)


def kill_training(made: Base, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Kill training, and resume it to its end."""
    faults = []
    for _ in range(rng.randrange(1, 4)):
        killed(made, made.train(folder), made.seconds, rng)
        faults += half_written(folder)
    ended = watch(runs.start(made.train(folder), made.root), limit_of(made))
    faults += faults_of(ended) or [*half_written(folder), *ends_the_same(made, folder)]
    return faults, ended.err


@cache
def command(made: Base, case: str) -> tuple[tuple[str, ...], float, dict[str, str]]:
    """(The arguments of a command, whose result is "{out}"; the seconds that it takes; its files)."""
    released = made.root / "released"
    if case == "convert":
        inputs.make_base(made.root / "inputs")
        (made.root / "inputs" / "released").rename(released)
    argv = {
        "stats": ("stats", str(made.whole), "--out", "{out}", "--draws", "20"),
        "convert": ("convert", str(released), "{out}"),
        "tokenizer": ("tokenizer", "{out}", "--vocab-size", "300", "--paths", made.text),
        "data tokenize": (
            *("data", "tokenize", made.text, "--out", "{out}", "--row-tokens", "16", "--val-fraction", "0.3"),
            *("--shard-mb", "0.0003", "--workers", "1"),  # a few documents a shard
        ),
    }[case]
    out = made.root / f"{case} of nothing disturbed" / "out"
    for _ in range(2):  # the second finds compiled programs
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        ended = watch(runs.start(with_out(argv, out), made.root), 600)
        assert ended.code == 0, ended.err
    return argv, ended.seconds, files_of(out)


def with_out(argv: tuple[str, ...], out: Path) -> list[str]:
    return [str(out) if word == "{out}" else word for word in argv]


def files_of(out: Path) -> dict[str, str]:
    """Hashes of a file or of a folder's files; of those that hold times, only the names."""
    found = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.is_file())
    steady = (".json", ".html", ".png", ".jsonl", ".array_record")
    return {
        "" if path == out else path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
        if "checkpoints" not in path.parts and path.suffix in steady or path == out
    } | ({"checkpoints": ",".join(half_written(out))} if (out / "checkpoints").exists() else {})


def kill_command(made: Base, case: str, folder: Path, rng: random.Random) -> tuple[list[str], str]:
    """Kill a command, look at the place of its result, and let it run to its end."""
    argv, seconds, whole = command(made, case)
    out = folder / "out"
    killed(made, with_out(argv, out), seconds, rng)
    present = (out / MANIFEST).exists() if case == "data tokenize" else out.exists()
    faults = ["half-written"] if present and files_of(out) != whole else []
    if out.exists() and case not in ("stats", "data tokenize"):
        return faults, ""
    ended = watch(runs.start(with_out(argv, out), made.root), limit_of(made))
    faults += faults_of(ended) or ([] if files_of(out) == whole else ["silent"])
    return faults, ended.err


def run(until: float, seed: int, table: Table, least: int) -> None:
    """Kill processes until a time."""
    made = base()
    for number, rng in trials("kills", until, seed, least):
        folder, case = made.root / "killed", CASES[number % len(CASES)]
        folder.mkdir()
        if case == "train":
            faults, said = kill_training(made, folder / "run", rng)
        else:
            faults, said = kill_command(made, case, folder, rng)
        table.add(f"killed: {case}", faults)
        report("kills", seed, number, case, faults, said)
        shutil.rmtree(folder)
