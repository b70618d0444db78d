"""A process that has imported the package forks a child for each command: a trial costs no import.

Requests and answers are lines of JSON. A request is a command's words, folder, streams and limits.
The answer comes at its end, see `watched`.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import time
from pathlib import Path

# if these objects ended, they would close a child's streams
KEPT = sys.stdin, sys.stdout, sys.stderr
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")


def serve() -> dict:
    """Import all, without threads, which a fork would lose; answer; return a request in a child."""
    for module in pkgutil.walk_packages(importlib.import_module("dsv3_jax").__path__, "dsv3_jax."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    exec(sys.argv[1], {})
    gc.freeze()  # children neither look at nor copy what was imported
    print(json.dumps("ready"), flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if (pid := os.fork()) == 0:
            return request
        print(json.dumps(watched(pid, request)), flush=True)
    os._exit(0)


def watched(pid: int, request: dict) -> list:
    """Wait for a command's end, or kill it after some seconds.

    Returns: [exit code or -signal, CPU seconds, bytes of memory, whether it waited for too long,
    the number of processes that outlive it by some seconds].
    """
    begin, hangs = time.monotonic(), False
    while not (ended := os.wait4(pid, os.WNOHANG))[0]:
        time.sleep(0.02)
        seconds = time.monotonic() - begin
        hangs = seconds > 100 + 3 * request["limit"]
        if hangs or seconds > request["kill"]:
            os.kill(pid, signal.SIGKILL)
    polls = 60
    while (left := living(pid)) and (polls := polls - 1):
        time.sleep(0.1)
    for one in left:
        os.kill(one, signal.SIGKILL)
    used = ended[2]
    cpu, memory = used.ru_utime + used.ru_stime, used.ru_maxrss << 10
    return [os.waitstatus_to_exitcode(ended[1]), cpu, memory, hangs, len(left)]


def living(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session, *_ = path.read_text().rpartition(")")[2].split()
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def become(request: dict) -> None:
    """Make this child what the command's own process would be: session, streams, limit."""
    os.setsid()
    os.chdir(request["folder"])
    for number, name in ((2, "stderr"), (1, "stdout"), (0, "stdin")):
        os.close(number)
        # the new descriptor is `number`
        os.open(request["streams"][number], os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)
        how = {"errors": "backslashreplace", "buffering": 1} if number == 2 else {}
        stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False, **how)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    resource.setrlimit(resource.RLIMIT_CPU, (int(request["limit"]) + 1, resource.RLIM_INFINITY))
    sys.argv = ["dsv3", *request["argv"]]


def note_touched(request: dict) -> None:
    """List the paths in the folder that Python touches."""
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def hook(event: str, args: tuple) -> None:
        if event in WATCHED and args and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(request["folder"] + os.sep):
                os.write(log, os.fsencode(os.path.relpath(path, request["folder"]) + "\n"))

    sys.addaudithook(hook)


if __name__ == "__main__":
    request = serve()
    become(request)
    note_touched(request)
    from dsv3_jax.cli.main import main

    sys.exit(main())
