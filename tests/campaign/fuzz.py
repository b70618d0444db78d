"""New trials: each command on files, names, options, streams and moments that nobody chose.

Trial number n of a seed is the same in every run. It makes one change, so what it prints needs no shrinking.
"""

import contextlib
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
from tests.campaign.commands import COMMANDS, LIMIT_S, TRAINING, Answer, Command, Server, Trial, make_home, result

ERRORS = re.compile(r"Traceback \(most recent|Exception ignored|Fatal Python error|terminate called")
# Codes that a terminal obeys; colours, the cursor's place in a line and the erasing of a line are the program's own.
ESCAPES = re.compile("\x1b(?!\\[[0-9;?]*[AKhlm])|[\x00-\x07\x0e-\x1a\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
WITH_CHECKSUMS = {"checkpoints", "shards", "half"}  # no change there may be read as something else
TERMINALS = ({}, {}, {}, {"out": "terminal"}, {"err": "terminal"})
MAY_LEAVE = ("train", "data")  # commands that go on where they were stopped


class Usual(NamedTuple):
    """The usual result of a command, which nothing disturbs."""

    answer: Answer
    seconds: float
    result: dict[str, str]  # as far as it does not depend on the time
    touched: list[str]  # paths, in the order of Python's calls
    options: list[str]  # as the server prints them


Done = tuple[str, Sequence[str], str, Iterable[str], Answer]  # name in the table, words, what was changed, faults


class Home:
    """The good files, the server, and a folder for each trial."""

    def __init__(self, root: Path):
        self.home, self.folder, self._log = root / "home", root / "trial", root / "log"
        self.server, self._usual = Server(root / "scratch"), dict[Command, Usual]()
        root.chmod(0o755)  # also for a user who may not write
        self.folder.mkdir()
        make_home(self.folder, self.server)  # where the copies are: a run knows the place of its text
        self.folder.rename(self.home)

    def choose(self, rng: random.Random, fits: Callable[[Command], Any] = bool) -> Command:
        found = [command for command in COMMANDS if fits(command)]
        return rng.choices(found, [command.often for command in found])[0]

    def usual(self, command: Command) -> Usual:
        """Run a command twice undisturbed: the second finds its compiled programs."""
        results: list[dict[str, str]] = []
        while command not in self._usual:
            self._log.write_bytes(b"")
            trial, begin = self.trial(command, request={"log": str(self._log)}, limit=600), time.monotonic()
            answer = self.server.run(trial)
            results.append(result(self.folder, command, answer.out))
            assert answer.code == command.code, (command, answer)
            if len(results) == 2:
                seconds, steady = time.monotonic() - begin, dict(results[0].items() & results[1].items())
                touched = [os.path.relpath(json.loads(x), self.folder) for x in self._log.read_text().splitlines()]
                options = self.server.run(replace(trial, request={"walk": True})).out.splitlines()
                self._usual[command] = Usual(answer, seconds, steady, touched, options)
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
        words |= {"text", "tokenizer.json"} if words & {"run", "stopped"} else set()
        tops = [self.home / word for word in sorted(words) if (self.home / word).exists() and word != "."]
        return [path.relative_to(self.home) for top in tops for path in [top, *sorted(top.rglob("*"))]]


def judge(made: Home, command: Command, trial: Trial, answer: Answer, names: Sequence = (), also: int = 0) -> set[str]:
    """Name what fell short in an answer. Args: names: a sentence has one of them; also: another good exit code."""
    faults, code = {answer.fault} if answer.fault else set(), answer.code
    hidden = trial.streams.get("err", "terminal") != "terminal"
    plain = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", answer.err)
    if ERRORS.search("" if hidden else plain) or code not in (None, 0, 2, also):
        faults.add("tracebacks")
    elif code == 2 and not hidden and "╭─" not in plain:  # tyro draws a box
        sentences = re.findall(r"^dsv3: .*", plain, re.MULTILINE)
        if len(sentences) != 1 or len(sentences[0]) > 500:
            faults.add("sentences")
        elif names and not any(name in sentences[0] for name in [*names, "="]):  # a file, or name=value
            faults.add("unnamed")
    if any(ESCAPES.search(getattr(answer, name)) for name, path in trial.streams.items() if path == "terminal"):
        faults.add("escapes")
    left = [path.name for path in trial.folder.rglob("*") if re.search(r"\.part|-checkpoint-tmp", path.name)]
    left += made.server.leftovers()
    left += ["out"] if code and command.argv[0] not in MAY_LEAVE and (trial.folder / "out").exists() else []
    faults |= {"half-written"} if "canary" in left or (left and code not in (None, -9)) else set()
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
    quiet = path.name not in answer.err + "_CHECKPOINT_METADATA, commit_success.txt"  # no note; nothing reads these two
    if quiet and WITH_CHECKSUMS & set(path.parts) and answer.code == command.code == 0 and "out" not in trial.streams:
        faults |= other_result(made, command, trial, answer.out)
    return answer, faults


def other_result(made: Home, command: Command, trial: Trial, out: str | None) -> set[str]:
    """Name the fault if a result is unlike the usual one. Without `out`, only what was written is compared."""
    found, lines = result(trial.folder, command, out or ""), out is not None and command.argv[0] not in MAY_LEAVE
    wanted = {key: x for key, x in made.usual(command).result.items() if lines or not key.startswith("line ")}
    other = sorted(key for key, value in wanted.items() if found.get(key) != value)
    print(*(f"  unlike the usual result: {key}" for key in other[:3]), sep="\n", end="\n" if other else "")
    return {"silent"} if other else set()


def disturbed(made: Home, command: Command, trials: Sequence[Trial], also: int = 0, then: Callable = lambda: None):
    """Run disturbed trials in one folder. Undisturbed, the same command must then end as usual, or be done already."""
    faults: set[str] = set()
    for trial in trials if command.argv[0] in MAY_LEAVE else trials[:1]:
        answer = made.server.run(trial)
        faults |= judge(made, command, trial, answer, also=also)
    then()
    if trial.request.get("action") in ("delete", "link"):
        return answer, faults
    if not faults and (command.argv[0] in MAY_LEAVE or not (trial.folder / "out").exists()):
        answer = made.server.run(Trial(trial.folder, command.argv, command.stdin, limit=trial.limit))
        faults |= {"not resumed"} if answer.code != command.code else set()
    return answer, faults or other_result(made, command, trial, None)


def files(made: Home, rng: random.Random) -> Done:
    """Change a file's content. Files whose names differ by digits alone are drawn as one."""
    command = made.choose(rng, lambda c: any((made.home / path).is_file() for path in made.inputs(c)))
    kinds: dict[str, list[Path]] = {}
    for path in made.inputs(command):
        if (made.home / path).is_file():
            kinds.setdefault(re.sub(r"[0-9a-f]{2,}", "", path.name), []).append(path)
    path = rng.choice(kinds[rng.choice(sorted(kinds))])
    trial = made.trial(command, streams=rng.choice(TERMINALS))
    before = (trial.folder / path).read_bytes()
    how, after = grammar.change(before, rng)
    (trial.folder / path).write_bytes(after)
    answer, faults = judge_changed(made, command, trial, path)
    at = len(os.path.commonprefix([before[:10_000], after[:10_000]]))
    what = f"{path}, byte {at}: {before[at : at + 60]!r} -> {after[at : at + 60]!r}, {len(after):,} bytes"
    return (f"files: {how}", command.argv, what, faults, answer)


def names(made: Home, rng: random.Random) -> Done:
    """Put something else in the place of a file or folder, also of one that the command only looks for."""
    command = made.choose(rng, made.inputs)
    found, usual = set(made.inputs(command)), made.usual(command)
    tops = {path.parts[0] for path in found}
    absent = {Path(x) for x in usual.touched if x.split("/")[0] in tops and not re.search(r"\d{3}", x)} - found
    found = absent if absent and rng.random() < 0.3 else found
    depth = rng.choice([1, *sorted({len(path.parts) for path in found})])
    path = rng.choice(sorted(path for path in found if len(path.parts) == depth) or sorted(found))
    kind = rng.choice(PLACES)
    trial = made.trial(command, streams=rng.choice(TERMINALS))
    trial.request = put(trial.folder, trial.folder / path, kind, rng)
    answer, faults = judge_changed(made, command, trial, path)
    return (f"names: {kind}", command.argv, str(path), faults, answer)


PLACES = ("pipe", "pipe", "many", "many", "empty", "folder", "nowhere", "/dev/zero", "/dev/full", ".", "hole", "absent",
          "unreadable", "renamed", "moved")  # fmt: skip


def put(folder: Path, path: Path, kind: str, rng: random.Random) -> dict[str, Any]:
    """Put something in a path's place. Returns: more words for the server."""
    if kind == "unreadable":
        subprocess.run(["chmod", "-R", "a+rwX", folder], check=True)
        rng.choice([folder, path if path.exists() else folder]).chmod(rng.choice([0o000, 0o444, 0o555]))
        return {"nobody": os.getuid() == 0}
    if kind in ("many", "renamed", "moved") and not path.exists():
        return {}
    if kind == "many":
        for i in range(300):
            copy = path.with_name(f"{path.stem}-{i}{path.suffix}")
            os.link(path, copy) if path.is_file() else shutil.copytree(path, copy, copy_function=os.link)
    elif kind in ("renamed", "moved"):
        new = folder / "elsewhere" if kind == "moved" else path.with_name(path.name[:1] + rng.choice(grammar.NAMES))
        path.rename(new)
        path.symlink_to(new) if kind == "moved" else None
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make = {"pipe": os.mkfifo, "empty": Path.touch, "folder": Path.mkdir, "absent": bool, "hole": Path.touch}
        make.get(kind, lambda path: path.symlink_to(kind))(path)
        os.truncate(path, 20 << 30) if kind == "hole" else None
    return {}


def options(made: Home, rng: random.Random) -> Done:
    """Give options other values: near limits, of other types, hostile texts."""
    command = made.choose(rng, lambda c: c.often > 1)
    words, found = command.argv, made.usual(command).options
    for line in rng.sample(found, min(rng.choice([1, 1, 2]), len(found))):
        name, choices, usual = json.loads(line)
        with contextlib.suppress(ValueError):
            usual = json.loads(usual or "")
        value = rng.choice([*choices, str(grammar.value_near(usual, rng))[:100_000], "nowhere", "run", ""])
        words += [name] if usual is None and rng.random() < 0.5 else [name, value]
    if rng.random() < 0.2:
        at = rng.randrange(1, len(words))
        words = [*words[:at], rng.choice(["-", "--", "nowhere", *grammar.TEXTS]), *words[at + rng.randrange(2) :]]
    words = [word.replace("\0", "\1").encode(errors="replace").decode() for word in words]
    trial = replace(made.trial(command, streams=rng.choice(TERMINALS)), argv=words, limit=3 * LIMIT_S)
    answer = made.server.run(trial)
    return ("options", [repr(word) for word in words], "", judge(made, command, trial, answer), answer)


def streams(made: Home, rng: random.Random) -> Done:
    """Close or fill stdin, stdout, stderr; half of the commands are to print an error."""
    command, wrong = made.choose(rng), rng.random() < 0.5
    given: dict[str, str | None] = {}
    for name in rng.sample(["out", "err"], rng.choice([1, 1, 2])):
        given[name] = rng.choice([None, "/dev/full", *([] if given else ["head", "terminal"])])
    trial = made.trial(command, streams=given)
    if wrong:
        trial.argv = ["nowhere" if (made.home / word).exists() else word for word in command.argv]
    trial.stdin = None if rng.random() < 0.3 else command.stdin
    answer = made.server.run(trial)
    faults = judge(made, command, trial, answer, also=141)
    if given.get("out") == "/dev/full" and made.usual(command).answer.out and not wrong and answer.code == 0:
        faults.add("silent")
    return ("streams", trial.argv, f"{given}, stdin {'closed' if trial.stdin is None else 'open'}", faults, answer)


ACTIONS = ("EIO", "EACCES", "ENOSPC", "EMFILE", "EROFS", "delete", "link", "link", "SIGINT", "SIGTERM", "SIGKILL")


def moments(made: Home, rng: random.Random) -> Done:
    """Disturb a command when it touches a path: an error, a signal, a file that is gone, a link in a file's place."""
    command, action = made.choose(rng), rng.choice(ACTIONS)
    at = rng.randrange(1, len(made.usual(command).touched) + 2)
    what = f"at touch {at} ({[*made.usual(command).touched, ''][at - 1]})"
    trial = made.trial(command, request={"at": at, "action": action})
    answer, faults = disturbed(made, command, [trial], {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}.get(action, 0))
    return (f"moments: {action}", command.argv, what, faults, answer)


def kills(made: Home, rng: random.Random) -> Done:
    """Kill a command once or more at any time, and run it again."""
    command = made.choose(rng, lambda c: "out" in c.argv or c.argv[0] in MAY_LEAVE)
    times = [rng.random() * made.usual(command).seconds for _ in range(rng.choice([1, 1, 2, 3]))]
    trial = made.trial(command)
    answer, faults = disturbed(made, command, [replace(trial, kill_after=after) for after in times], -9)
    return ("kills", command.argv, f"after {[round(after, 2) for after in times]} s", faults, answer)


def disks(made: Home, rng: random.Random) -> Done:
    """Let no file grow beyond some bytes, or fill the disk (only root can mount one); then give room."""
    command = made.choose(rng, lambda c: "out" in c.argv or c.argv[0] in MAY_LEAVE)
    size, trial = int(10 ** rng.uniform(2, 5.3)), made.trial(command)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(trial.folder)]
    if rng.random() < 0.5 or subprocess.run(mount, capture_output=True).returncode:
        answer, faults = disturbed(made, command, [replace(trial, request={"file_size": size})])
        return ("disks: file size", command.argv, f"{size} bytes", faults, answer)

    def resize(room: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={room}", "tmpfs", trial.folder], check=True)

    try:
        shutil.copytree(made.home, trial.folder, symlinks=True, dirs_exist_ok=True)
        resize(str(shutil.disk_usage(trial.folder).used + size))
        answer, faults = disturbed(made, command, [trial], then=lambda: resize("256m"))
    finally:
        subprocess.run(["umount", "--lazy", trial.folder], check=True)
    return ("disks: full", command.argv, f"{size} bytes of room", faults, answer)


def pairs(made: Home, rng: random.Random) -> Done:
    """Let two commands work on one folder: both write it, or one trains the run that the other reads."""
    second = made.choose(rng, lambda c: "run" in c.argv or (c.argv[0] in MAY_LEAVE and c.code == 0))
    reads, trial = "run" in second.argv, made.trial(second)
    first = TRAINING if reads else second
    if reads:
        shutil.rmtree(trial.folder / "run")
    pid, faults, pauses = made.server.start(Trial(trial.folder, first.argv), bytearray()), set(), 1000 if reads else 0
    while pauses and not list(trial.folder.glob("run/checkpoints/[0-9]*")):
        time.sleep(0.1)
        pauses -= 1
    time.sleep(rng.random() * (1 if reads else made.usual(second).seconds))
    for _ in range(3 if reads else 1):
        answer = made.server.run(trial)
        wrong = answer.fault or ERRORS.search(answer.err) or answer.code not in (0, 2)
        faults |= {answer.fault or "tracebacks"} if wrong else {"refused"} if reads and answer.code else set()
        shutil.rmtree(trial.folder / "out", ignore_errors=True) if reads else None
    while (ended := made.server.ask({"poll": pid})) is None:
        os.killpg(pid, 9) if reads else time.sleep(0.05)
    if not reads and {ended[0], answer.code} not in ({0}, {0, 2}):
        faults.add("tracebacks")
    return ("pairs", second.argv, f"beside {' '.join(first.argv)[:60]}", faults, answer)


KINDS: dict[str, tuple[int, Callable[[Home, random.Random], Done]]] = {  # how many of a round, and what
    "files": (8, files), "names": (4, names), "options": (3, options), "streams": (2, streams), "moments": (4, moments),
    "kills": (2, kills), "disks": (1, disks), "pairs": (2, pairs),
}  # fmt: skip


def run(kinds: Sequence[str], seconds: float, seed: int, table: Counter, least: int, first: int) -> None:
    """Run trials for so long, not counting the making of good files; print each new fault and what repeats it."""
    with tempfile.TemporaryDirectory(prefix="campaign-") as root:
        made, seen = Home(Path(root).resolve()), set()
        order, begin, number = [name for name in KINDS for _ in range(KINDS[name][0])], time.monotonic(), first
        random.Random(0).shuffle(order)
        while number - first < least or time.monotonic() < begin + seconds:
            kind, number = order[number % len(order)], number + 1
            if kind not in kinds:
                continue
            name, words, what, faults, answer = KINDS[kind][1](made, random.Random(f"{seed} {number - 1}"))
            table.update([(name, "trials"), *((name, fault) for fault in faults)])
            said = answer.err.strip()[-1500:]
            key = (kind, *faults, re.sub(r"\d+|'.*?'", "#", said[-200:]))
            if faults and key not in seen:
                seen.add(key)
                after = f"{answer.cpu:.1f} CPU s, {time.monotonic() - begin:.0f} s after the start"
                print(f"{', '.join(faults)}: {name}: dsv3 {' '.join(words)[:300]} | {what}")
                print(
                    f"  exit code {answer.code}, {after}; again: --seed {seed} --trial {number - 1}\n  {said}",
                    flush=True,
                )
        print(f"next trial: {number}", flush=True)
