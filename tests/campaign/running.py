"""One command on a copy of the good files: what disturbs it, its process, its end, its result."""

import contextlib
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import runs

from tests.campaign.commands import Command

LIMIT_S = 30.0  # CPU seconds above a command's usual ones


@dataclass
class Trial:
    """A command in a folder, what disturbs it, and how it must end."""

    folder: Path
    command: Command
    argv: list[str]
    stdin: bytes | None = b""
    # "out", "err" → a path, "head" (a reader that leaves), "terminal", or None (closed)
    streams: dict[str, str | None] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)  # more words for the server
    limit: float = LIMIT_S
    kills: Sequence[float] = (float("inf"),)  # seconds: it runs again after each
    out: str = "out"  # what it writes
    name: str = ""  # in the table
    what: str = ""  # what was changed
    path: Path | None = None  # the changed path, which a sentence names
    codes: Sequence[int] = (0, 2)  # exit codes that are good. Empty means all of them
    same: bool = False  # if it ends well, its result is the usual one
    again: bool = False  # undisturbed, it then ends well, or refuses what was changed
    early: bool = False  # what is refused is refused before much work
    changed: dict[Path, bytes] = field(default_factory=dict)  # may lead to another result
    # what is done before it runs again; returns what fell short
    between: Callable[[], set[str]] = set


class Answer(NamedTuple):
    """The end of a command."""

    code: int  # or -signal
    out: str
    err: str
    cpu: float  # seconds
    faults: set[str]


class Server:
    """The process of server.py, and the watch over the children that it forks."""

    def __init__(self, scratch: Path):
        self.scratch, self.canary = scratch, scratch / "canary"
        (scratch / "tmp").mkdir(parents=True)
        (scratch / "tmp").chmod(0o777)  # also for a user who may not write elsewhere
        self.canary.write_text("sings")
        environment = runs.environment(scratch) | {
            "TMPDIR": str(scratch / "tmp"),
            "CANARY": str(self.canary),
            "TERM": "xterm",
            "COLUMNS": "120",
            "PYTHONWARNINGS": "ignore",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        program = [sys.executable, str(Path(__file__).with_name("server.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        command = [*program, runs.SPEND_NO_SECONDS]
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.process.stdout.readline()  # it is ready

    def run(self, trial: Trial, kill_after: float = float("inf")) -> Answer:
        """Run a command to its end, or kill it after some seconds."""
        (self.scratch / "in").write_bytes(trial.stdin or b"")
        streams = [None if trial.stdin is None else str(self.scratch / "in")]
        with contextlib.ExitStack() as ends:
            seen = {}
            for name in ("out", "err"):
                path = trial.streams.get(name, str(self.scratch / name))
                (self.scratch / name).write_bytes(b"")
                if path in ("head", "terminal"):
                    path, seen[name] = ends.enter_context(reader(path))
                streams.append(path)
            request = {
                "argv": trial.argv,
                "folder": str(trial.folder),
                "streams": streams,
                "limit": trial.limit,
                "kill": kill_after,
            }
            self.process.stdin.write(json.dumps(request | trial.request) + "\n")
            self.process.stdin.flush()
            code, cpu, memory, hangs, left = json.loads(self.process.stdout.readline())
        texts = (seen.get(name, (self.scratch / name).read_bytes()) for name in ("out", "err"))
        out, err = (bytes(text).decode(errors="replace") for text in texts)
        faults = {"hangs": hangs or code == -signal.SIGXCPU, "memory": memory > 2 << 30}
        faults["processes"] = left > 0
        return Answer(code, out, err, cpu, {name for name, is_so in faults.items() if is_so})

    def leftovers(self) -> list[str]:
        """Names of deleted temporary files outside the folder; "followed" if a link was."""
        found = [path.name for path in (self.scratch / "tmp").iterdir()]
        for path in (self.scratch / "tmp").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        found += ["followed"] if self.canary.read_text(errors="replace") != "sings" else []
        self.canary.write_text("sings")
        return found


@contextlib.contextmanager
def reader(kind: str):
    """A terminal, or a pipe whose reader leaves after one piece: (its path, what it was sent)."""
    here, end = pty.openpty() if kind == "terminal" else os.pipe()
    seen = bytearray()

    def collect() -> None:
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while piece := os.read(here, 1 << 16):
                seen.extend(piece if kind == "terminal" else b"")
                if kind == "head":
                    break
        os.close(here)

    (thread := threading.Thread(target=collect, daemon=True)).start()
    yield f"/proc/{os.getpid()}/fd/{end}", seen
    os.close(end)
    thread.join(10)


def result(folder: Path, top: str, out: str) -> dict[str, str]:
    """A command's result: lines of its output, hashes of what it wrote but for checkpoints."""
    # Times differ. A run notes where its text lies.
    here = json.dumps(str(folder))[1:-1]
    lines = re.sub(r"[\d.,]+ ?(s|ms|tokens/s|(second|minute|hour)s?)\b", "#", out).splitlines()
    found = {f"line {i}": " ".join(line.split()) for i, line in enumerate(lines)}
    for path in sorted((folder / top).rglob("*")) if (folder / top).is_dir() else [folder / top]:
        if path.is_file() and "checkpoints" not in path.relative_to(folder).parts:
            content = path.read_bytes()
            with contextlib.suppress(ValueError, RecursionError, AttributeError):
                is_log = path.name == "metrics.jsonl"
                values = runs.rows_of(path.parent) if is_log else json.loads(content)
                content = json.dumps(values, sort_keys=True).replace(here, ".").encode()
            found[f"out/{path.relative_to(folder / top)}"] = hashlib.sha256(content).hexdigest()
    return found
