"""Trials: each changes one thing around a command, in one of three ways; and how it must end."""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from dsv3_jax.runs.checksums import LATE, write_manifest
from tests.campaign import grammar
from tests.campaign.commands import Command
from tests.campaign.running import LIMIT_S, Answer, Home

TRACES = r"Traceback \(most recent|Exception ignored|Fatal Python error|terminate called"
BOX = re.compile("╭─|^ -{40}", re.M)  # tyro's, of minus signs without a terminal


class Trial(NamedTuple):
    """A command, what disturbs it, and how it must end."""

    name: str  # in the table
    command: Command
    argv: list[str]
    path: Path | None = None  # the changed file, which a sentence names
    same: bool = False  # if it ends well, its result is the usual one
    kills: Sequence[float] = ()  # seconds: it ends as usual after these


def files(made: Home, rng: Random, command: Command) -> Trial:
    """Change the content of a file that a command reads."""
    inputs = made.inputs(command)
    suffix = rng.choice(sorted({path.suffix for path in inputs}))
    path = rng.choice([path for path in inputs if path.suffix == suffix])
    file = made.folder / path
    how, content = grammar.change(file.read_bytes(), rng)
    file.write_bytes(content)
    same = "shards" in path.parts
    if "checkpoints" in path.parts:
        # two files have no checksum, and nothing reads them; strangers can write agreeing checksums
        same = path.name not in LATE[1:] and rng.random() < 0.5
        if not same:
            how += ", sealed"
            write_manifest(next(x for x in file.parents if x.parent.name == "checkpoints"))
    return Trial(f"files: {how}", command, command.argv, path, same)


def options(made: Home, rng: Random, command: Command) -> Trial:
    """Give options that the command's help names other values: near limits, of other types."""
    all_words = "--help-verbose" if command.argv[0] in ("train", "plan", "info") else "--help"
    said = made.run([*command.argv[:2], all_words], LIMIT_S).out
    parts = re.split(r" (?=--[a-z])", re.sub(r"[\s│╭╮╰╯─]+", " ", said))[1:]
    argv = command.argv
    for part in rng.sample(parts, rng.choice([1, 1, 2])):
        choices = re.search(r"\{([\w,.-]+)\}|$", part)[1] or ""
        usual = re.search(r"\(default: (.*?)\)|$", part)[1] or ""
        with contextlib.suppress(ValueError):
            usual = json.loads(usual)
        near = str(grammar.value_near(usual, rng))[:100_000].replace("\0", "\1")
        value = rng.choice([near, "nowhere", "", *choices.split(",")])
        argv = [*argv, re.match(r"[\w.-]+", part)[0], *rng.choice([[value], [value], []])]
    return Trial("options", command, argv)


def kills(made: Home, rng: Random, command: Command) -> Trial:
    """Kill a command once or more, mostly after Python's imports, then run it again."""
    often = rng.choice([1, 1, 2, 3]) if command.resumes else 1
    seconds = [rng.uniform(0.3, 1) * made.usual(command)[0] for _ in range(often)]
    return Trial("kills", command, command.argv, kills=seconds)


# In turns: what they do, and which commands they suit.
FILES = files, Home.inputs
OPTIONS = options, lambda made, command: command.often > 1
KILLS = kills, lambda made, command: command.out in command.argv
ROOMS: list[tuple[Callable, Callable]] = [FILES, OPTIONS, KILLS, FILES, FILES, KILLS, FILES]


def attempt(made: Home, trial: Trial) -> tuple[Answer, set[str]]:
    """Run a trial; after kills run the command to its end. Returns: (its end, what fell short)."""
    command, out = trial.command, made.folder / trial.command.out
    limit = LIMIT_S + made.usual(command)[0]
    files = [path for path in made.folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files if not path.is_relative_to(out)}
    faults = set[str]()
    for seconds in trial.kills:
        faults |= faults_of(made, trial, answer := made.run(trial.argv, limit, seconds))
    if not trial.kills or command.resumes or not out.exists():
        answer = made.run(trial.argv, limit)
        faults |= faults_of(made, trial, answer)
        if trial.kills and answer.code:
            faults.add("not resumed")

    # What checksums guard is the usual, or said to be damaged.
    named = re.escape(trial.path.name) if trial.same else ""
    guarded = trial.same and not re.search(f"{named}|is damaged|is left out", answer.err)
    if (trial.kills or (guarded and not answer.code)) and unlike(made, trial):
        faults.add("silent")
    if any(path.is_file() and path.read_bytes() != was for path, was in before.items()):
        faults.add("changed")
    return answer, faults


def faults_of(made: Home, trial: Trial, answer: Answer) -> set[str]:
    """Name what fell short in how a command ended, and in what it left."""
    command, code, path = trial.command, answer.code, trial.path
    sentences = re.findall(r"^dsv3: .*", answer.err, re.MULTILINE)
    # A sentence names the file, or what it belongs to, or name=value.
    named = (*path.parts, path.stem, "=", "chat template") if path else ("",)
    refuses = code == 2 and not BOX.search(answer.err)
    # A killed command leaves parts of files, and a request resumes from its own.
    parts = [x for x in made.folder.rglob("*") if re.search(r"\.part|-checkpoint-tmp", x.name)]
    parts += made.temporary.iterdir()
    if "--prompts" in command.argv:
        parts = [x for x in parts if not x.name.startswith(command.out)]
    failed = code and not command.resumes and (made.folder / "out").exists()
    faults = {
        "memory": answer.memory > 2 << 20,
        "traceback": bool(re.search(TRACES, answer.err)),
        f"exit code {code}": code not in ((0, 2, -9) if trial.kills else (0, 2)),
        "sentences": refuses and (len(sentences) != 1 or len(sentences[0]) > 500),
        "unnamed": refuses and not any(name in "".join(sentences) for name in named),
        "half-written": (parts and not trial.kills) or (failed and unlike(made, trial)),
    }
    return {name for name, there in faults.items() if there}


def unlike(made: Home, trial: Trial) -> bool:
    """Whether a result is not the usual one; print the files."""
    found, (_, wanted) = made.result(trial.command), made.usual(trial.command)
    other = sorted(path for path, content in wanted.items() if found.get(path) != content)
    print(*(f"  unlike the usual result: {path}\n" for path in other), sep="", end="")
    return bool(other)
