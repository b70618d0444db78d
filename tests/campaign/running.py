"""One command on a copy of the good files: what disturbs it, its process, its end, its result."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import runs

from tests.campaign.commands import Command

LIMIT_S = 30.0  # CPU seconds above a command's usual ones


@dataclass
class Trial:
    """A command in a folder, what disturbs it, and how it must end."""

    folder: Path
    command: Command
    argv: list[str]
    stdin: bytes = b""
    log: str = os.devnull  # where the paths that it touches are listed
    limit: float = LIMIT_S
    kills: Sequence[float] = (float("inf"),)  # seconds: it runs again after each
    name: str = ""  # in the table
    what: str = ""  # what was changed
    path: Path | None = None  # the changed path, which a sentence names
    codes: Sequence[int] = (0, 2)  # exit codes that are good
    same: bool = False  # if it ends well, its result is the usual one
    again: bool = False  # undisturbed, it then ends well


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
        self.scratch = scratch
        (scratch / "tmp").mkdir(parents=True)
        environment = runs.environment(scratch) | {
            "TMPDIR": str(scratch / "tmp"),
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
        streams = [self.scratch / name for name in ("in", "out", "err")]
        for path, content in zip(streams, (trial.stdin, b"", b""), strict=True):
            path.write_bytes(content)
        request = {
            "argv": trial.argv,
            "folder": str(trial.folder),
            "streams": list(map(str, streams)),
            "log": trial.log,
            "limit": trial.limit,
            "kill": kill_after,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code, cpu, memory, hangs, left = json.loads(self.process.stdout.readline())
        out, err = (path.read_text(errors="replace") for path in streams[1:])
        faults = {"hangs": hangs or code == -signal.SIGXCPU, "memory": memory > 2 << 30}
        faults["processes"] = left > 0
        return Answer(code, out, err, cpu, {name for name, is_so in faults.items() if is_so})

    def leftovers(self) -> list[str]:
        """Names of deleted temporary files outside the folder."""
        found = list((self.scratch / "tmp").iterdir())
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [path.name for path in found]


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
