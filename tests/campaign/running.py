"""Processes of commands, the copies of the good files that they read, and their usual results."""

import contextlib
import os
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import runs

from tests.campaign.commands import COMMANDS, Command, make_files

LIMIT_S = 60.0  # CPU seconds of a command above its usual time


class Answer(NamedTuple):
    """The end of a command."""

    code: int  # or -signal
    out: str
    err: str
    seconds: float
    memory: int  # KiB


class Home:
    """The good files, a copy of them for each trial, and the usual end of each command."""

    def __init__(self, root: Path, beginnings: tuple[str, ...]):
        # the good files are made where the copies will be: a run knows the place of its text
        self.root, self.home, self.folder = root, root / "home", root / "trial"
        self.temporary = root / "tmp"
        self.commands = [x for x in COMMANDS if x.words.startswith(beginnings)]
        make_files(self.folder, self.commands, self.run)
        self.folder.rename(self.home)
        self._usual = dict[Command, tuple[float, dict[Path, str | bytes]]]()

    def copy(self) -> None:
        """Make a new copy of the good files."""
        for folder in (self.folder, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.home, self.folder)
        self.temporary.mkdir()

    def inputs(self, command: Command) -> list[Path]:
        """Files that the words of a command name, or that are below a folder that they name."""
        tops = [self.home / word for word in dict.fromkeys(command.argv)]
        found = [path for top in tops for path in (top, *sorted(top.rglob("*")))]
        return [path.relative_to(self.home) for path in found if path.is_file()]

    def usual(self, command: Command) -> tuple[float, dict[Path, str | bytes]]:
        """Seconds of a command that finds compiled programs, and its result but for what varies."""
        if command not in self._usual:
            results = []
            for _ in range(2):
                self.copy()
                answer = self.run(command.argv)
                assert answer.code == 0, (command, answer)
                results.append(self.result(command).items())
            self._usual[command] = answer.seconds, dict(results[0] & results[1])
        return self._usual[command]

    def result(self, command: Command) -> dict[Path, str | bytes]:
        """What a command wrote, but for checkpoints."""
        top = self.folder / command.out
        found: dict[Path, str | bytes] = {}
        for path in (top, *sorted(top.rglob("*"))):
            if path.is_file() and "checkpoints" not in path.parts:
                found[path] = path.read_bytes()
            if path.name == "metrics.jsonl":
                with contextlib.suppress(ValueError):  # it may be damaged
                    found[path] = str(runs.rows_of(path.parent))  # without the clock
        return found

    def run(self, argv: list[str], limit: float = 600, kill: float = float("inf")) -> Answer:
        """Run a command to its end, or kill it after some seconds, or beyond some CPU seconds."""
        begin = time.monotonic()
        more = {"TMPDIR": str(self.temporary), "COLUMNS": "120", "PYTHONWARNINGS": "ignore"}
        how = {"cwd": self.folder, "env": runs.environment(self.root) | more}
        with (self.root / "out").open("w+") as out, (self.root / "err").open("w+") as err:
            process = runs.start(argv, self.root, stdout=out, stderr=err, **how)
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (int(limit), -1))
            end = threading.Timer(min(kill, 100 + 3 * limit), process.kill)
            end.start()
            _, status, used = os.wait4(process.pid, 0)
            end.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = ((self.root / name).read_text(errors="replace") for name in ("out", "err"))
        return Answer(process.returncode, *texts, time.monotonic() - begin, used.ru_maxrss)
