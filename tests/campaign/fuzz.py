"""Good files, a trial in a copy of them, and the judgement of how it ended."""

import json
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaign.commands import (
    COMMANDS,
    LIMIT_S,
    Answer,
    Command,
    Server,
    Trial,
    make_home,
    result,
)

ERRORS = re.compile(
    r"Traceback \(most recent|Exception ignored|Fatal Python error|terminate called"
)
# Codes that a terminal obeys, but for the program's own: colours, the cursor's place, erasing.
ESCAPES = re.compile(
    "\x1b(?!\\[[0-9;?]*[AKhlm])|[\x00-\x07\x0e-\x1a\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)
WITH_CHECKSUMS = {"checkpoints", "shards", "half"}  # no change there may be read as something else
TWINS = {"stopped": "run", "half": "shards"}  # folders that hold the same kinds of files
# commands that go on where they stopped; tyro's box
MAY_LEAVE, BOX = ("train", "data"), re.compile("╭─|^ -{40}", re.M)


class Usual(NamedTuple):
    """The usual result of a command, which nothing disturbs."""

    answer: Answer
    result: dict[str, str]  # as far as it does not depend on the time
    touched: list[str]  # paths, in the order of Python's calls


class Draws(random.Random):
    """The random numbers of one trial, and its turns: a choice comes again after all others."""

    def __init__(self, seed: int, kind: str, count: int):
        super().__init__(f"{seed} {kind} {count}")
        self._place, self._count = f"{seed} {kind}", count

    def turn(self, items: Iterable) -> Any:
        """Choose an item; the next turn walks its items as often as this one chooses the same."""
        items = list(items)
        around, at = divmod(self._count, len(items))
        order = random.Random(self._place).sample(items, len(items))
        # an item may be there more than once
        equal = [i for i, item in enumerate(order) if item == order[at]]
        self._count = around * len(equal) + equal.index(at)
        self._place = f"{self._place} {order[at]!a}"
        return order[at]


class Home:
    """The good files, the server, and a folder for each trial."""

    def __init__(self, root: Path, beginnings: Sequence[str]):
        self.home, self.folder, self.log = root / "home", root / "trial" / "trial", root / "log"
        self.commands = [x for x in COMMANDS if x.words.startswith(tuple(beginnings))]
        self.weighted = [x for x in self.commands for _ in range(x.often)]
        self.server, self._usual = Server(root / "scratch"), dict[Command, Usual]()
        root.chmod(0o755)  # also for a user who may not write
        self.folder.mkdir(parents=True)
        # where the copies are: a run knows the place of its text
        make_home(self.folder, self.server, str(self.log))
        self.folder.rename(self.home)
        self._made = self.log.read_text().splitlines()

    @cached_property
    def readers(self) -> dict[str, list[tuple[Path, Command]]]:
        """Which commands read or look for a path, by its kind."""
        found = dict[str, list[tuple[Path, Command]]]()
        for command in self.commands:
            opened, inputs = set(self.usual(command).touched), self.inputs(command)
            tops = {path.parts[0]: TWINS.get(path.parts[0]) for path in inputs}
            # what this command, or one of `MAKE`, looks for
            paths = [Path(x).parts for x in (*opened, *self._made)]
            looked = {
                Path(top, *below)
                for first, *below in paths
                for top in tops
                if first in (top, tops[top])
            }
            for path in sorted({*inputs, *looked}):
                kind = kind_of(path) if (self.home / path).exists() else f"absent {kind_of(path)}"
                often = command.often * (5 if str(path) in opened else 1)
                # names of one run
                if not kind.startswith("absent") or not re.search(r"\d{3}|checkpoints/", str(path)):
                    found.setdefault(kind, []).extend([(path, command)] * often)
        return found

    def usual(self, command: Command) -> Usual:
        """Run a command twice undisturbed: the second finds its compiled programs."""
        results: list[dict[str, str]] = []
        while command not in self._usual:
            self.log.write_bytes(b"")
            answer = self.server.run(self.trial(command, request={"log": str(self.log)}, limit=600))
            results.append(result(self.folder, command.out, answer.out))
            assert answer.code == command.code, (command, answer)
            if len(results) == 2:
                steady = dict(results[0].items() & results[1].items())
                self._usual[command] = Usual(answer, steady, self.log.read_text().splitlines())
        return self._usual[command]

    def trial(self, command: Command, **words: Any) -> Trial:
        """A trial of a command in a new copy of the good files."""
        limit = {} if "limit" in words else {"limit": LIMIT_S + self.usual(command).answer.cpu}
        shutil.rmtree(self.folder.parent)
        shutil.copytree(self.home, self.folder, symlinks=True)
        return Trial(
            self.folder, command, command.argv, command.stdin, out=command.out, **limit | words
        )

    def options(self, command: Command) -> list[tuple[str, list[str], str | None]]:
        """(Name, choices, default) of each option that the help of a command lists."""
        asked = self.trial(command)
        asked.argv = [
            *command.argv[:2],
            "--help-verbose" if command.argv[0] in ("train", "plan", "info") else "--help",
        ]
        text = re.sub(r"[\s│╭╮╰╯─]+", " ", self.server.run(asked).out)
        found = []
        for part in re.split(r" (?=--[a-z])", text)[1:]:
            choices = re.search(r"\{([\w,.-]+)\}", part)
            usual = re.search(r"\(default: (.*?)\)", part)
            name = part.split()[0].strip(",")
            found.append((name, choices[1].split(",") if choices else [], usual and usual[1]))
        return found

    def inputs(self, command: Command) -> list[Path]:
        """Files and folders that a command reads, as far as its words tell."""
        words = set(command.argv) | ({"run"} if "list" in command.argv else set())
        words |= (
            {"text", "tokenizer.json"}
            if words & {"run", "stopped"} and "list" not in words
            else set()
        )
        words |= {"judge.py", "mood.py"} if "judge:is_right" in words else set()
        tops = [
            self.home / word
            for word in sorted(words)
            if (self.home / word).exists() and word != "."
        ]
        return [
            path.relative_to(self.home) for top in tops for path in [top, *sorted(top.rglob("*"))]
        ]


def kind_of(path: Path) -> str:
    """A folder's paths whose names differ by digits are of one kind, as are those in its twin."""
    top, *below = path.parts
    return re.sub(
        r"[0-9a-f]{16,}|\d+", "#", "/".join([TWINS.get(top, top) if below else top, *below[-1:]])
    )


def attempt(made: Home, trial: Trial) -> tuple[Answer, set[str]]:
    """Run a trial, then the command undisturbed if it must go on: (its end, what fell short)."""
    command, faults = trial.command, set[str]()
    before = {path: path.read_bytes() for path in inputs_of(trial)}
    for after in trial.kills:
        answer = made.server.run(trial, after)
        faults |= faults_of(made, trial, answer)
    said = answer.err + "_CHECKPOINT_METADATA, commit_success.txt"  # these two nothing reads
    noted = bool(trial.path and trial.path.name in said) or bool(
        re.search("is damaged|is left out", said)
    )
    if trial.same and not noted and answer.code == command.code == 0:
        as_usual = not trial.streams and trial.argv == command.argv and trial.folder == made.folder
        faults |= unlike(made, trial, answer.out if as_usual else None)
    usual = made.usual(command).answer.cpu
    faults |= {"late"} if trial.early and answer.code == 2 and answer.cpu > 2 + usual / 2 else set()
    faults |= {
        "changed" for path, was in before.items() if path.is_file() and path.read_bytes() != was
    }
    faults |= trial.between() if not faults else set()
    refused = trial.early and answer.code == 2
    if trial.again and not faults and not refused:
        if command.argv[0] in MAY_LEAVE or not (trial.folder / trial.out).exists():
            once_more = replace(trial, streams={}, request={}, stdin=command.stdin, codes=(0, 2))
            answer = made.server.run(once_more)
            # which the stopped one left
            said = faults_of(made, once_more, answer) - {"half-written"}
            refused = answer.code == 2 and bool(trial.changed) and not said
            faults |= set() if answer.code == command.code or refused else {"not resumed"}
        if (
            not faults
            and not refused
            and not re.search("is left out|has changed since", answer.err)
        ):
            faults |= unlike(made, trial, None)
    return answer, faults


def inputs_of(trial: Trial) -> Iterator[Path]:
    """The files that a command may not change, unless the trial does while the command runs."""
    if trial.request.get("action") not in ("delete", "link", "move", "write"):
        for path in trial.folder.rglob("*"):
            if (
                path.is_file()
                and path.relative_to(trial.folder).parts[0] != trial.out
                and path.stat().st_size < 1e7
            ):
                yield path


def faults_of(made: Home, trial: Trial, answer: Answer) -> set[str]:
    """Name what fell short in how a command ended, and in what it left."""
    command, code, faults = trial.command, answer.code, {answer.fault} if answer.fault else set()
    hidden = trial.streams.get("err", "terminal") != "terminal"
    plain = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", answer.err)
    if trial.codes and (ERRORS.search("" if hidden else plain) or code not in (None, *trial.codes)):
        faults.add("tracebacks")
    # tyro draws a box, of minus signs without a terminal
    elif code == 2 and not hidden and not BOX.search(plain):
        sentences, path = re.findall(r"^dsv3: .*", plain, re.MULTILINE), trial.path
        named = (
            [path.parts[0], path.name, path.parent.name or path.name, path.stem.replace("_", " ")]
            if path
            else [""]
        )
        if len(sentences) != 1 or len(sentences[0]) > 500:
            faults.add("sentences")
        # or name=value
        elif not any(x in sentences[0] for x in [*named, command.out, "=", "chat template"]):
            faults.add("unnamed")
    shown = (getattr(answer, name) for name, path in trial.streams.items() if path == "terminal")
    # tyro's box holds the user's own words
    if not BOX.search(plain) and any(map(ESCAPES.search, shown)):
        faults.add("escapes")
    parts = [
        x
        for x in trial.folder.rglob("*")
        if re.search(r"\.part|-checkpoint-tmp", x.name) and "moved" not in x.parts  # none tidies it
    ]
    # it resumes from that; a link is ours
    kept = f"{trial.out}.part" if "--prompts" in command.argv else None
    left = [
        x.name for x in parts if not x.is_symlink() and x.name != kept and x.name not in trial.what
    ] + made.server.leftovers()
    if code and command.argv[0] not in MAY_LEAVE and (trial.folder / "out").exists():
        left += unlike(made, trial, None)
    faults |= {"followed"} & set(left)
    faults |= {"half-written"} if left and code not in (None, -9) else set()
    try:  # a command that ended well writes no NaN, infinity or half a document
        for path in (trial.folder / trial.out).rglob("*.json*") if code == 0 else ():
            for text in (
                path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            ):
                json.loads(text, parse_constant=lambda text: 1 / 0)
    except (ValueError, ZeroDivisionError):
        faults.add("silent")
    return faults | ({"processes"} if answer.left else set())


def unlike(made: Home, trial: Trial, out: str | None) -> set[str]:
    """Name the fault if a result is neither the usual one nor a new start's on what was changed.

    Without `out`, only what was written is compared.
    """
    found = result(trial.folder, trial.out, out or "")
    lines = out is not None and trial.command.argv[0] not in MAY_LEAVE
    wanted = {
        key: x
        for key, x in made.usual(trial.command).result.items()
        if lines or not key.startswith("line ")
    }
    other = sorted(key for key, value in wanted.items() if found.get(key) != value)
    if other and trial.changed:
        fresh = made.trial(trial.command)
        for path, new in trial.changed.items():
            (fresh.folder / path).write_bytes(new)
        if made.server.run(fresh).code == 0:
            wanted = result(fresh.folder, trial.out, "")
            other = [key for key in other if found.get(key) != wanted.get(key)]
    print(
        *(f"  unlike the usual result: {key}" for key in other[:3]),
        sep="\n",
        end="\n" if other else "",
    )
    return {"silent"} if other else set()
