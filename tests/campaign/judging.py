"""Good files, a trial in a copy of them, and the judgement of how it ended."""

import json
import random
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaign.commands import COMMANDS, READS, Command, make_home
from tests.campaign.running import LIMIT_S, Answer, Server, Trial, result

TRACES = r"Traceback \(most recent|Exception ignored|Fatal Python error|terminate called"
BOX = re.compile("╭─|^ -{40}", re.M)  # tyro's, of minus signs without a terminal
WITH_CHECKSUMS = {"checkpoints", "shards", "half"}  # no change there may be read as something else
RESUME = ("train", "data")  # commands that resume from what they leave


class Usual(NamedTuple):
    """The usual result of a command, which nothing disturbs."""

    answer: Answer
    result: dict[str, str]  # as far as it does not depend on the time
    touched: list[str]  # paths, in the order of Python's calls


class Draws(random.Random):
    """The random numbers of one trial, and its turns: a choice comes again after all others."""

    def __init__(self, seed: int, room: str, count: int):
        super().__init__(f"{seed} {room} {count}")
        self._order, self._count = f"{seed} {room}", count

    def turn(self, items: Iterable) -> Any:
        items = list(items)
        self._count, at = divmod(self._count, len(items))
        item = random.Random(self._order).sample(items, len(items))[at]
        self._order += f" {item!a}"
        return item


class Home:
    """The good files, the server, and a folder for each trial."""

    def __init__(self, root: Path, beginnings: Sequence[str]):
        self.home, self.folder, self.log = root / "home", root / "trial" / "trial", root / "log"
        self.commands = [x for x in COMMANDS if x.words.startswith(tuple(beginnings))]
        self.weighted = [x for x in self.commands for _ in range(x.often)]
        self.server, self._usual = Server(root / "scratch"), dict[Command, Usual]()
        self.folder.mkdir(parents=True)
        # where the copies are: a run knows the place of its text
        make_home(self.folder, self.commands, self._make)
        self.folder.rename(self.home)

    def _make(self, command: Command) -> None:
        done = self.server.run(Trial(self.folder, command, command.argv, limit=600))
        assert done.code == 0, done

    def usual(self, command: Command) -> Usual:
        """Run a command twice undisturbed: the second finds its compiled programs."""
        results: list[dict[str, str]] = []
        while command not in self._usual:
            self.log.write_bytes(b"")
            answer = self.server.run(self.trial(command, log=str(self.log), limit=600))
            results.append(result(self.folder, command.out, answer.out))
            assert answer.code == command.code, (command, answer)
            if len(results) == 2:
                steady = dict(results[0].items() & results[1].items())
                self._usual[command] = Usual(answer, steady, self.log.read_text().splitlines())
        return self._usual[command]

    def trial(self, command: Command, **words: Any) -> Trial:
        """A trial of a command in a new copy of the good files."""
        words.setdefault("stdin", command.stdin)
        if "limit" not in words:
            words["limit"] = LIMIT_S + self.usual(command).answer.cpu
        shutil.rmtree(self.folder.parent)
        shutil.copytree(self.home, self.folder, symlinks=True)
        return Trial(self.folder, command, command.argv, **words)

    def inputs(self, command: Command) -> list[Path]:
        """Files and folders that a command reads, as far as its words tell."""
        words = {*command.argv, *(name for word in command.argv for name in READS.get(word, ()))}
        tops = [self.home / x for x in sorted(words - {"."}) if (self.home / x).exists()]
        found = [path for top in tops for path in (top, *sorted(top.rglob("*")))]
        return [path.relative_to(self.home) for path in found]

    @cached_property
    def readers(self) -> dict[str, list[tuple[Path, Command]]]:
        """Which commands read a path, or look for it where nothing is, by its kind."""
        found = dict[str, list[tuple[Path, Command]]]()
        for command in self.commands:
            inputs = self.inputs(command)
            tops, touched = {path.parts[0] for path in inputs}, self.usual(command).touched
            looked = {Path(x) for x in touched if x.split("/")[0] in tops}
            # names of one run are no places to look for
            looked = {x for x in looked if not re.search(r"\d{3}|checkpoints/", str(x))}
            for path in sorted({*inputs, *looked}):
                kind = kind_of(path) if (self.home / path).exists() else f"absent {kind_of(path)}"
                often = command.often * (5 if str(path) in touched else 1)
                found.setdefault(kind, []).extend([(path, command)] * often)
        return found

    def options(self, command: Command) -> list[tuple[str, list[str], str | None]]:
        """(Name, choices, default) of each option that the help of a command lists."""
        words = "--help-verbose" if command.argv[0] in ("train", "plan", "info") else "--help"
        asked = self.trial(command)
        asked.argv = [*command.argv[:2], words]
        text = re.sub(r"[\s│╭╮╰╯─]+", " ", self.server.run(asked).out)
        found = []
        for part in re.split(r" (?=--[a-z])", text)[1:]:
            choices = re.search(r"\{([\w,.-]+)\}", part)
            usual = re.search(r"\(default: (.*?)\)", part)
            name = part.split()[0].strip(",")
            found.append((name, choices[1].split(",") if choices else [], usual and usual[1]))
        return found


def kind_of(path: Path) -> str:
    """A folder's paths whose names differ by digits are of one kind."""
    return re.sub(r"[0-9a-f]{16,}|\d+", "#", "/".join([path.parts[0], *path.parts[1:][-1:]]))


def attempt(made: Home, trial: Trial) -> tuple[Answer, set[str]]:
    """Run a trial, then the command undisturbed if it must resume: (its end, what fell short)."""
    command, faults, before = trial.command, set[str](), inputs_of(trial)
    for after in trial.kills:
        answer = made.server.run(trial, after)
        faults |= faults_of(made, trial, answer)
    # nothing reads the last two
    said = f"{answer.err} _CHECKPOINT_METADATA, commit_success.txt"
    noted = "is damaged" in said or "is left out" in said
    if trial.path and trial.path.name in said:
        noted = True
    if trial.same and not noted and answer.code == command.code == 0:
        faults |= unlike(made, trial, answer.out)
    if any(path.is_file() and path.read_bytes() != was for path, was in before.items()):
        faults.add("changed")
    if not trial.again or faults:
        return answer, faults

    if command.argv[0] in RESUME or not (trial.folder / command.out).exists():
        once_more = replace(trial, codes=(0, 2))
        answer = made.server.run(once_more)
        # the stopped one may have left parts
        fell_short = faults_of(made, once_more, answer) - {"half-written"}
        if answer.code != command.code or fell_short:
            faults.add("not resumed")
    return answer, faults or unlike(made, trial, None)


def inputs_of(trial: Trial) -> dict[Path, bytes]:
    """Files that a command may not change."""
    files = [path for path in trial.folder.rglob("*") if path.is_file()]
    files = [x for x in files if x.relative_to(trial.folder).parts[0] != trial.command.out]
    return {path: path.read_bytes() for path in files if path.stat().st_size < 1e7}


def faults_of(made: Home, trial: Trial, answer: Answer) -> set[str]:
    """Name what fell short in how a command ended, and in what it left."""
    command, code, faults = trial.command, answer.code, set(answer.faults)
    if not faults and (re.search(TRACES, answer.err) or code not in trial.codes):
        faults.add("tracebacks")
    elif code == 2 and not BOX.search(answer.err):
        sentences = re.findall(r"^dsv3: .*", answer.err, re.MULTILINE)
        named, path = [command.out, "=", "chat template"], trial.path  # or name=value
        if path:
            named += [path.parts[0], path.name, path.stem.replace("_", " ")]
            named += [path.parent.name] if path.parent.name else []
        if len(sentences) != 1 or len(sentences[0]) > 500:
            faults.add("sentences")
        elif path and not any(x in sentences[0] for x in named):
            faults.add("unnamed")

    # Parts of files. A request resumes from its own.
    left = made.server.leftovers()
    kept = f"{command.out}.part" if "--prompts" in command.argv else ""
    for path in trial.folder.rglob("*"):
        if re.search(r"\.part|-checkpoint-tmp", path.name) and path.name not in kept:
            left.append(path.name)
    if code and command.argv[0] not in RESUME and (trial.folder / "out").exists():
        left += unlike(made, trial, None)
    if left and code != -9:
        faults.add("half-written")
    # A damaged checkpoint is kept as it is, under such a name.
    written = [
        path
        for path in (trial.folder / command.out).rglob("*.json*")
        if path.is_file() and ".damaged" not in str(path)
    ]
    if code == 0 and not all(map(is_json, written)):
        faults.add("silent")
    return faults


def is_json(path: Path) -> bool:
    """Whether a written file is a document, or lines of them, without NaN and infinity."""
    text = path.read_text()
    try:
        for one in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(one, parse_constant=lambda name: 1 / 0)
    except (ValueError, ZeroDivisionError, RecursionError):
        return False
    return True


def unlike(made: Home, trial: Trial, out: str | None) -> set[str]:
    """Name the fault if a result is not the usual one; without `out` only what was written."""
    found = result(trial.folder, trial.command.out, out or "")
    wanted = made.usual(trial.command).result
    if out is None or trial.command.argv[0] in RESUME:
        wanted = {key: value for key, value in wanted.items() if not key.startswith("line ")}
    other = sorted(key for key, value in wanted.items() if found.get(key) != value)
    for key in other[:3]:
        print(f"  unlike the usual result: {key}")
    return {"silent"} if other else set()
