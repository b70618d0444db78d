"""New trials: each command on files, names, options, streams and moments that nobody chose.

Trial number n of a seed is the same in every run. It makes one change, so what it prints needs no shrinking.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaign import grammar
from tests.campaign.commands import COMMANDS, LIMIT_S, Answer, Command, Server, Trial, make_home, result

ERRORS = re.compile(r"Traceback \(most recent|Exception ignored|Fatal Python error|terminate called")
# Codes that a terminal obeys; colours, the cursor's place in a line and the erasing of a line are the program's own.
ESCAPES = re.compile("\x1b(?!\\[[0-9;?]*[AKhlm])|[\x00-\x07\x0e-\x1a\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
WITH_CHECKSUMS = {"checkpoints", "shards", "half"}  # no change there may be read as something else
TERMINALS = ({}, {"out": "terminal", "err": "terminal"})
TWINS = {"stopped": "run", "half": "shards"}  # folders that hold the same kinds of files
MAY_LEAVE, BOX = ("train", "data"), re.compile("╭─|^ -{40}", re.M)  # commands that go on where they stopped; tyro's box


class Usual(NamedTuple):
    """The usual result of a command, which nothing disturbs."""

    answer: Answer
    result: dict[str, str]  # as far as it does not depend on the time
    touched: list[str]  # paths, in the order of Python's calls
    options: list[str]  # as the server lists them


Done = tuple[str, Sequence[str], str, Iterable[str], Answer]  # name in the table, words, what was changed, faults


class Draws(random.Random):
    """The random numbers of one trial, and its turns: choices that come again only after all others."""

    def __init__(self, seed: int, kind: str, count: int):
        super().__init__(f"{seed} {kind} {count}")
        self._place, self._count = f"{seed} {kind}", count

    def turn(self, items: Iterable) -> Any:
        """Choose an item. The next turn walks through its own items as often as this one chooses the same."""
        items = list(items)
        around, at = divmod(self._count, len(items))
        order = random.Random(self._place).sample(items, len(items))
        equal = [i for i, item in enumerate(order) if item == order[at]]  # an item may be there more than once
        self._count, self._place = around * len(equal) + equal.index(at), f"{self._place} {order[at]}"
        return order[at]


class Home:
    """The good files, the server, and a folder for each trial."""

    def __init__(self, root: Path, beginnings: Sequence[str]):
        self.home, self.folder, self._log = root / "home", root / "trial", root / "log"
        self.commands = [x for x in COMMANDS if x.words.startswith(tuple(beginnings))]
        self.weighted = [x for x in self.commands for _ in range(x.often)]
        self.server, self._usual = Server(root / "scratch"), dict[Command, Usual]()
        root.chmod(0o755)  # also for a user who may not write
        self.folder.mkdir()
        make_home(self.folder, self.server, str(self._log))  # where the copies are: a run knows the place of its text
        self.folder.rename(self.home)
        made, self.readers = self._log.read_text().splitlines(), dict[str, list[tuple[Path, Command]]]()  # by kind
        for command in self.commands:
            opened, inputs = set(self.usual(command).touched), self.inputs(command)
            tops = {path.parts[0]: TWINS.get(path.parts[0]) for path in inputs}
            paths = [Path(x).parts for x in (*opened, *made)]  # what this command, or one of `MAKE`, looks for
            looked = {Path(top, *below) for first, *below in paths for top in tops if first in (top, tops[top])}
            for path in sorted({*inputs, *looked}):
                kind = kind_of(path) if (self.home / path).exists() else f"absent {kind_of(path)}"
                often = command.often * (5 if str(path) in opened else 1)
                if not kind.startswith("absent") or not re.search(r"\d{3}|checkpoints/", str(path)):  # names of one run
                    self.readers.setdefault(kind, []).extend([(path, command)] * often)

    def usual(self, command: Command) -> Usual:
        """Run a command twice undisturbed: the second finds its compiled programs."""
        results: list[dict[str, str]] = []
        while command not in self._usual:
            self._log.write_bytes(b"")
            answer = self.server.run(self.trial(command, request={"log": str(self._log), "options": True}, limit=600))
            results.append(result(self.folder, command, answer.out))
            assert answer.code == command.code, (command, answer)
            if len(results) == 2:
                lines, steady = self._log.read_text().splitlines(), dict(results[0].items() & results[1].items())
                options = [line for line in lines if line.startswith('["-')]
                self._usual[command] = Usual(answer, steady, [x for x in lines if x not in options], options)
        return self._usual[command]

    def trial(self, command: Command, **words: Any) -> Trial:
        """A trial of a command in a new copy of the good files."""
        limit = {} if "limit" in words else {"limit": LIMIT_S + self.usual(command).answer.cpu}
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.home, self.folder, symlinks=True)
        return Trial(self.folder, command.argv, command.stdin, **limit | words)

    def inputs(self, command: Command) -> list[Path]:
        """Files and folders that a command reads, as far as its words tell."""
        words = set(command.argv) | ({"run"} if "list" in command.argv else set())
        words |= {"text", "tokenizer.json"} if words & {"run", "stopped"} and "list" not in words else set()
        tops = [self.home / word for word in sorted(words) if (self.home / word).exists() and word != "."]
        return [path.relative_to(self.home) for top in tops for path in [top, *sorted(top.rglob("*"))]]


def kind_of(path: Path) -> str:
    """Paths in one folder whose names differ by digits alone are of one kind, and so are those in its twin."""
    top, *below = path.parts
    return re.sub(r"[0-9a-f]{16,}|\d+", "#", "/".join([TWINS.get(top, top) if below else top, *below[-1:]]))


def judge(made: Home, command: Command, trial: Trial, answer: Answer, names: Sequence = (), also: int = 0) -> set[str]:
    """Name what fell short in an answer. Args: names: a sentence has one of them; also: another good exit code."""
    faults, code = {answer.fault} if answer.fault else set(), answer.code
    hidden = trial.streams.get("err", "terminal") != "terminal"
    plain = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", answer.err)
    if ERRORS.search("" if hidden else plain) or code not in (None, 0, 2, also):
        faults.add("tracebacks")
    elif code == 2 and not hidden and not BOX.search(plain):  # tyro draws a box, of minus signs without a terminal
        sentences = re.findall(r"^dsv3: .*", plain, re.MULTILINE)
        if len(sentences) != 1 or len(sentences[0]) > 500:
            faults.add("sentences")
        elif names and not any(x in sentences[0] for x in [*names, "=", "chat template"]):  # or name=value
            faults.add("unnamed")
    shown = (getattr(answer, name) for name, path in trial.streams.items() if path == "terminal")
    if not BOX.search(plain) and any(map(ESCAPES.search, shown)):  # tyro's box holds the user's own words
        faults.add("escapes")
    parts = (x for x in trial.folder.rglob("*") if re.search(r"\.part|-checkpoint-tmp", x.name))
    kept = "out.part" if "--prompts" in command.argv else None  # the same command resumes from it; a link is ours
    left = [x.name for x in parts if not x.is_symlink() and x.name != kept] + made.server.leftovers()
    if code and command.argv[0] not in MAY_LEAVE and (trial.folder / "out").exists():
        left += other_result(made, command, trial, None)
    faults |= {"followed"} & set(left) | ({"half-written"} if left and code not in (None, -9) else set())
    try:  # a command that ended well writes no NaN, infinity or half a document
        for path in (trial.folder / "out").rglob("*.json") if code == 0 else ():
            json.loads(path.read_text(), parse_constant=lambda text: 1 / 0)
    except (ValueError, ZeroDivisionError):
        faults.add("silent")
    return faults | ({"processes"} if answer.left else set())


def judge_changed(made: Home, command: Command, trial: Trial, path: Path) -> tuple[Answer, set[str]]:
    """Run a command whose input at a path was changed, and compare what it says and what is left."""
    files = [x for x in trial.folder.rglob("*") if x.is_file() and x.relative_to(trial.folder).parts[0] != command.out]
    before = {file: file.read_bytes() for file in files if file.stat().st_size < 1e7}
    answer = made.server.run(trial)
    known = [path.parts[0], path.name, path.parent.name or path.name, path.stem.replace("_", " "), command.out]
    faults = judge(made, command, trial, answer, known)
    faults |= {"changed" for file, was in before.items() if file.is_file() and file.read_bytes() != was}
    said = answer.err + "_CHECKPOINT_METADATA, commit_success.txt"  # these two nothing reads
    quiet = path.name not in said and not re.search("is damaged|is left out", said)
    if quiet and WITH_CHECKSUMS & set(path.parts) and answer.code == command.code == 0:
        faults |= other_result(made, command, trial, None if "out" in trial.streams else answer.out)
    return answer, faults


def other_result(made: Home, command: Command, trial: Trial, out: str | None) -> set[str]:
    """Name the fault if a result is unlike the usual one. Without `out`, only what was written is compared."""
    found, lines = result(trial.folder, command, out or ""), out is not None and command.argv[0] not in MAY_LEAVE
    wanted = {key: x for key, x in made.usual(command).result.items() if lines or not key.startswith("line ")}
    other = sorted(key for key, value in wanted.items() if found.get(key) != value)
    print(*(f"  unlike the usual result: {key}" for key in other[:3]), sep="\n", end="\n" if other else "")
    return {"silent"} if other else set()


def disturbed(made: Home, command: Command, trials: Sequence[Trial], also: int = 0):
    """Run disturbed trials in one folder. Undisturbed, the same command must then end as usual, or be done already."""
    faults: set[str] = set()
    for trial in trials if command.argv[0] in MAY_LEAVE else trials[:1]:
        answer = made.server.run(trial)
        faults |= judge(made, command, trial, answer, also=also)
    if trial.request.get("action") in ("delete", "link"):
        return answer, faults
    if not faults and (command.argv[0] in MAY_LEAVE or not (trial.folder / "out").exists()):
        answer = made.server.run(Trial(trial.folder, command.argv, command.stdin, limit=trial.limit))
        faults |= {"not resumed"} if answer.code != command.code else set()
    noted = "is left out" in answer.err  # an earlier checkpoint that could not be read is named, and nothing more
    return answer, faults or (set() if noted else other_result(made, command, trial, None))


def files(made: Home, rng: Draws) -> Done:
    """Change a file's content."""
    kinds = [kind for kind, found in made.readers.items() if (made.home / found[0][0]).is_file()]
    path, command = rng.choice(made.readers[rng.turn(kinds + [kind for kind in kinds if ".j" in kind])])  # JSON, jinja
    trial = made.trial(command, streams=rng.choice(TERMINALS))
    before = (trial.folder / path).read_bytes()
    how, after = grammar.change(before, rng)
    (trial.folder / path).write_bytes(after)
    trial.limit += len(after) * 2e-6  # a core splits and tokenizes 0.9 MB/s
    answer, faults = judge_changed(made, command, trial, path)
    at = len(os.path.commonprefix([before[:10_000], after[:10_000]]))
    what = f"{path}, byte {at}: {before[at : at + 60]!r} -> {after[at : at + 60]!r}, {len(after):,} bytes"
    return (f"files: {how}", command.argv, what, faults, answer)


def names(made: Home, rng: Draws) -> Done:
    """Put something else in the place of a file or folder, also of one that the command only looks for."""
    where = rng.turn(["argument"] * 20 + ["below"] * 16 + ["absent"] * 2 + ["target"])
    if where == "argument":
        pairs = [(command, path) for command in made.commands for path in made.inputs(command)]
        command, path = rng.turn((c, p) for c, p in pairs if str(p) in c.argv or (str(p) == "run" and "list" in c.argv))
    elif where == "target":
        command = rng.turn(c for c in made.commands if c.out in c.argv)
        path = Path(command.out)
    else:
        kinds = [kind for kind in made.readers if "/" in kind and kind.startswith("absent ") == (where == "absent")]
        path, command = rng.choice(made.readers[rng.turn(kinds)])
    place = rng.turn({"absent": ["pipe", "other"], "target": ["unwritable"]}.get(where, PLACES))
    trial = made.trial(command, streams=rng.choice(TERMINALS[place == "renamed" :]))
    kind, trial.request = put(trial.folder, trial.folder / path, rng.choice(PLACES.get(place, [place])), rng)
    answer, faults = judge_changed(made, command, trial, path)
    usual = made.usual(command).answer.cpu
    faults |= {"late"} if place == "unwritable" and answer.code == 2 and answer.cpu > 2 + usual / 2 else set()
    return (f"names: {place}", command.argv, f"{path}: {kind}", faults, answer)


PLACES = {
    "pipe": ["pipe"], "many": ["many"], "renamed": ["renamed"],
    "other": ["empty", "folder", "nowhere", ".", "absent", "unreadable"], "endless": ["/dev/zero", "/dev/full", "hole"],
}  # fmt: skip


def put(folder: Path, path: Path, kind: str, rng: Draws) -> tuple[str, dict[str, Any]]:
    """Put something in a path's place. Returns: (what, more words for the server)."""
    if kind == "unwritable" or (kind == "unreadable" and path.exists()):
        subprocess.run(["chmod", "-R", "a+rwX", folder], check=True)
        path.chmod(rng.choice([0o000, 0o444])) if kind == "unreadable" else folder.chmod(0o555)
        return kind, {"nobody": os.getuid() == 0}
    if kind == "many":
        for i in range(500):
            copy = path.with_name(f"{path.stem}-{i}{path.suffix}")
            os.link(path, copy) if path.is_file() else shutil.copytree(path, copy, copy_function=os.link)
    elif kind == "renamed":
        new = path.with_name(path.name[:1] + rng.choice([*grammar.NAMES, *2 * grammar.ESCAPES]))
        path.rename(new)
        kind = f"renamed {new.name!r}"
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make = {"pipe": os.mkfifo, "empty": Path.touch, "folder": Path.mkdir, "absent": bool, "hole": Path.touch}
        make.get(kind, lambda path: path.symlink_to(kind))(path)
        os.truncate(path, 20 << 30) if kind == "hole" else None
    return kind, {}


def options(made: Home, rng: Draws) -> Done:
    """Give options other values: near limits, of other types, hostile texts."""
    command = rng.turn(c for c in made.weighted if c.often > 1)
    words, found = command.argv, made.usual(command).options
    for line in [rng.turn(found), *rng.sample(found, rng.choice([0, 0, 1]))] if found else ():
        name, choices, usual = json.loads(line)
        with contextlib.suppress(ValueError):
            usual = json.loads(usual or "")
        value = rng.choice([*choices, str(grammar.value_near(usual, rng))[:100_000], "nowhere", "run", ""])
        words += [name] if usual is None and rng.random() < 0.5 else [name, value]
    words = [word.replace("\0", "\1").encode(errors="replace").decode() for word in words]
    trial = replace(made.trial(command, streams=rng.choice(TERMINALS)), argv=words, limit=3 * LIMIT_S)
    answer = made.server.run(trial)
    return ("options", [repr(word) for word in words], "", judge(made, command, trial, answer), answer)


def streams(made: Home, rng: Draws) -> Done:
    """Close or fill stdin, stdout, stderr; half of the commands are to print an error."""
    command, wrong = rng.turn(made.weighted), rng.random() < 0.5
    which = rng.sample(["out", "err"], rng.choice([1, 1, 2]))
    given = {name: rng.choice([None, "/dev/full", "head", "terminal"]) for name in which}
    trial = made.trial(command, streams=given)
    if wrong:
        trial.argv = ["nowhere" if (made.home / word).exists() else word for word in command.argv]
    trial.stdin = None if rng.random() < 0.3 else command.stdin
    answer = made.server.run(trial)
    faults = judge(made, command, trial, answer, also=141)
    if given.get("out") == "/dev/full" and made.usual(command).answer.out and not wrong and answer.code == 0:
        faults.add("silent")
    return ("streams", trial.argv, f"{given}, stdin {'closed' if trial.stdin is None else 'open'}", faults, answer)


ACTIONS = ["EIO", "EACCES", "ENOSPC", "EMFILE", "EROFS", "delete", "link", "link", "SIGINT", "SIGTERM", "SIGKILL"]


def moments(made: Home, rng: Draws) -> Done:
    """Disturb a command when it touches a path: an error, a signal, a file that is gone, a link in a file's place."""
    action, command = rng.turn(ACTIONS), rng.turn(made.weighted)
    kinds, touched = dict[str, list[int]](), made.usual(command).touched
    for i, path in enumerate(touched):
        if action != "link" or not ((made.home / path).exists() or ".part/" in path):  # nor in the command's own folder
            kinds.setdefault(kind_of(Path(path)), []).append(i + 1)
    at = rng.choice(kinds[rng.choice(sorted(kinds))]) if kinds else 1
    trial = made.trial(command, request={"at": at, "action": action})
    answer, faults = disturbed(made, command, [trial], {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}.get(action, 0))
    return (f"moments: {action}", command.argv, f"at touch {at} ({[*touched, ''][at - 1]})", faults, answer)


def kills(made: Home, rng: Draws) -> Done:
    """Kill a command at any time, once or more, or let no file grow beyond some bytes; then run it again."""
    how, command = rng.turn(["killed", "full"]), rng.turn(c for c in made.weighted if c.out in c.argv)
    times = [rng.random() * made.usual(command).answer.cpu for _ in range(rng.choice([1, 1, 2, 3]))]
    size, trial = int(10 ** rng.uniform(2, 5.3)), made.trial(command)
    full = replace(trial, request={"file_size": size})
    trials = [full] if how == "full" else [replace(trial, kill_after=after) for after in times]
    answer, faults = disturbed(made, command, trials, 0 if how == "full" else -9)
    return (f"kills: {how}", command.argv, f"after {times} s, or {size} bytes of a file", faults, answer)


KINDS: dict[str, tuple[int, Callable[[Home, Draws], Done]]] = {  # how many of a round, and what
    "files": (10, files), "names": (9, names), "options": (3, options), "streams": (2, streams),
    "moments": (4, moments), "kills": (2, kills),
}  # fmt: skip


def run(args: argparse.Namespace) -> Counter[tuple[str, str]]:
    """Make good files, then run trials; print each fault and how to repeat it. Returns: how often what was seen."""
    table = Counter[tuple[str, str]]()
    order = [kind for i in range(10) for kind in KINDS if i < KINDS[kind][0]]  # each kind once, then the others
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        made, begin = Home(Path(root).resolve(), args.commands), time.monotonic()
        for number in range(args.trial[0], args.trial[-1] + 1) if args.trial else itertools.count():
            if not args.trial and time.monotonic() > begin + 60 * args.minutes:
                break
            around, at = divmod(number, len(order))
            kind = order[at]
            if kind not in args.only:
                continue
            rng = Draws(args.seed, kind, around * KINDS[kind][0] + order[:at].count(kind))
            name, words, what, faults, answer = KINDS[kind][1](made, rng)
            table.update([(name, "trials"), *((name, fault) for fault in faults)])
            said, when = answer.err.strip()[-1500:], f"{time.monotonic() - begin:.0f} s after the start"
            if faults:
                print(f"{', '.join(faults)}: {name}: dsv3 {' '.join(words)[:300]} | {what}")
                print(f"  exit code {answer.code}, {answer.cpu:.1f} CPU s, {when}; --seed {args.seed} --trial {number}")
                print(f"  {said}", flush=True)
    return table
