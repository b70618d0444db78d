"""Trials: each changes one thing around a command, in one of three ways; and how it must end."""

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from dsv3_jax.runs.checksums import LATE, write_manifest
from tests.campaign import grammar
from tests.campaign.home import LIMIT_S, Answer, Command, Home

TRACES = r"Traceback \(most recent|Exception ignored|Fatal Python error|terminate called"
BOX = re.compile("╭─|^ -{40}", re.M)  # tyro's, of minus signs without a terminal


class Trial(NamedTuple):
    """A command, what disturbs it, and how it must end."""

    name: str  # in the table
    argv: list[str]
    path: Path | None = None  # the changed file, which a sentence names
    same: bool = False  # if it ends well, its result is the usual one
    kills: Sequence[float] = ()  # seconds: it ends as usual after these


def kind_of(path: Path) -> str:
    """A file's name without the digits, decimal or hexadecimal, that tell it from others."""
    return re.sub(r"[0-9a-f]{8,}|[0-9]+", "", path.name)


def files(home: Home, rng: Random, command: Command) -> Trial | None:
    """Change the content of a file that a command reads."""
    inputs = home.inputs(command)
    # One kind is often many files, as checkpoints' arrays and shards: their names differ in digits.
    kind = rng.choice(sorted({kind_of(path) for path in inputs}))
    path = rng.choice([path for path in inputs if kind_of(path) == kind])
    file = home.folder / path
    how, content = grammar.change(file.read_bytes(), rng)
    file.write_bytes(content)
    same = "shards" in path.parts
    if "checkpoints" in path.parts:
        # two files have no checksum, and nothing reads them; strangers can write agreeing checksums
        same = path.name not in LATE[1:] and rng.random() < 0.5
        if not same:
            how += ", sealed"
            write_manifest(next(x for x in file.parents if x.parent.name == "checkpoints"))
    return Trial(f"files: {how}", command.argv, path, same)


def options(home: Home, rng: Random, command: Command) -> Trial | None:
    """Give options that the command's help names other values: near limits, of other types."""
    if command.weight == 1:
        return None
    said = home.run([*command.argv[:2], "--help"], LIMIT_S).out
    parts = re.split(r" (?=--[a-z])", re.sub(r"[\s│╭╮╰╯─]+", " ", said))[1:]
    argv = command.argv
    for part in rng.sample(parts, min(rng.choice([1, 1, 2]), len(parts))):
        choices = re.search(r"\{([\w,.-]+)\}|$", part)[1] or ""
        usual = re.search(r"\(default: (.*?)\)|$", part)[1] or ""
        with contextlib.suppress(ValueError):
            usual = json.loads(usual)
        near = str(grammar.value_near(usual, rng))[:100_000].replace("\0", "\1")
        value = rng.choice([near, "nowhere", "", *choices.split(",")])
        argv = [*argv, re.match(r"[\w.-]+", part)[0], *rng.choice([[value], [value], []])]
    return Trial("options", argv)


def kills(home: Home, rng: Random, command: Command) -> Trial | None:
    """Kill a command once or more, mostly after Python's imports, then run it again."""
    if command.out not in command.argv:
        return None
    times = rng.choice([1, 1, 2, 3]) if command.resumes else 1
    seconds = [rng.uniform(0.3, 1) * home.usual(command)[0] for _ in range(times)]
    return Trial("kills", command.argv, kills=seconds)


KINDS = files, options, kills, files, files, kills, files  # in turns


def attempt(home: Home, trial: Trial, command: Command) -> tuple[Answer, set[str]]:
    """Run a trial; after kills run the command to its end. Returns: (its end, what fell short)."""
    out = home.folder / command.out
    limit = LIMIT_S + home.usual(command)[0]
    files = [path for path in home.folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files if not path.is_relative_to(out)}
    faults = set[str]()
    for seconds in trial.kills:
        faults |= faults_of(home, trial, command, answer := home.run(trial.argv, limit, seconds))
    if not trial.kills or command.resumes or not out.exists():
        faults |= faults_of(home, trial, command, answer := home.run(trial.argv, limit))
        if trial.kills and answer.code:
            faults.add("not resumed")

    # What checksums guard is the usual, or said to be damaged.
    named = re.escape(trial.path.name) if trial.same else ""
    guarded = trial.same and not re.search(f"{named}|is damaged|is left out", answer.err)
    if (trial.kills or (guarded and not answer.code)) and home.unlike(command):
        faults.add("silent")
    if any(path.is_file() and path.read_bytes() != was for path, was in before.items()):
        faults.add("changed")
    return answer, faults


def faults_of(home: Home, trial: Trial, command: Command, answer: Answer) -> set[str]:
    """Name what fell short in how a command ended, and in what it left."""
    code, path = answer.code, trial.path
    sentences = re.findall(r"^dsv3: .*", answer.err, re.MULTILINE)
    # A sentence names the file, or what it belongs to, or name=value.
    names = (*path.parts, path.stem, "=", "chat template") if path else ("",)
    refuses = code == 2 and not BOX.search(answer.err)
    failed = code and not command.resumes and (home.folder / "out").exists()
    faults = {
        "memory": answer.memory > 2 << 20,
        "traceback": re.search(TRACES, answer.err),
        f"exit code {code}": code not in ((0, 2, -9) if trial.kills else (0, 2)),
        "sentences": refuses and (len(sentences) != 1 or len(sentences[0]) > 500),
        "unnamed": refuses and not any(name in "".join(sentences) for name in names),
        "half-written": (not trial.kills and home.parts(command))
        or (failed and home.unlike(command)),
    }
    return {name for name, there in faults.items() if there}
