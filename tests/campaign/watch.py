"""A process that runs commands of the command line one after another, watched for hangs and memory."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LIMIT_S = 30.0  # a command without an answer for so long hangs
LIMIT_BYTES = 2 << 30  # resident memory above that at the start

# Reads a JSON list of arguments a line, answers with [exit code or null, stdout, stderr] a line. A module
# adds commands by its `COMMANDS`: name → function of the arguments.
WORKER = """
import contextlib, importlib, io, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from dsv3_jax import hf
from dsv3_jax.cli import common, main

OWN = importlib.import_module(sys.argv[1]).COMMANDS
for line in sys.stdin:
    argv = json.loads(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if argv[0] in OWN:
                code = common.guarded(lambda: OWN[argv[0]](*argv[1:]))
            else:
                code = main.main(argv)
        except BaseException:
            code = None
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""


class Answer(NamedTuple):
    """The end of a command."""

    code: int | None  # None: an exception, a crash, or it was stopped
    out: str
    err: str
    fault: str | None  # "tracebacks", "hangs" or "memory", as in `trials.COLUMNS`
    seconds: float


class Worker:
    """Runs commands in another process, which is started again after a hang or a crash.

    Args: module: has more commands, in `COMMANDS`; environment: variables to add to this process's.
    """

    def __init__(self, module: str, environment: dict[str, str] | None = None) -> None:
        self._process: subprocess.Popen | None = None
        self._module, self._environment = module, environment or {}

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, argv: list[str], limit: float = LIMIT_S) -> Answer:
        """Run one command."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        begin = time.monotonic()
        process.stdin.write(json.dumps(argv).encode() + b"\n")
        process.stdin.flush()
        fault = None
        while not select.select([process.stdout], [], [], 0.05)[0]:
            if time.monotonic() - begin > limit:
                fault = "hangs"
            elif _resident(process.pid) > self._resident + LIMIT_BYTES:
                fault = "memory"
            if fault:
                self.stop()
                return Answer(None, "", "", fault, time.monotonic() - begin)
        line = process.stdout.readline()
        seconds = time.monotonic() - begin
        if not line.endswith(b"\n"):
            code = process.wait()
            self._process = None
            return Answer(None, "", f"the process ended with {code}", "tracebacks", seconds)
        code, out, err = json.loads(line)
        return Answer(code, out, err, "tracebacks" if code is None else None, seconds)

    def _start(self) -> subprocess.Popen:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"} | self._environment
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, self._module],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._process, self._resident = process, 1 << 40
        ready = self.run(["--version"], 10 * LIMIT_S)  # imports
        assert ready.code == 0, f"the worker does not start: {ready}"
        self._resident = _resident(process.pid)
        return process

    def stop(self) -> None:
        """Kill the process; the next command starts another one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _resident(pid: int) -> int:
    """Resident memory of a process in bytes; 0 where the system does not tell."""
    path = Path(f"/proc/{pid}/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else 0
