"""A process that has imported the package, and forks a child for each command: a trial costs no import.

Requests and answers are lines of JSON. {"argv": …} starts a child, and answers its process id. {"poll": id} answers
[exit code or -signal, CPU seconds], or null while the child runs.
"""

import contextlib
import dataclasses
import errno
import gc
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import typing
from collections.abc import Iterator

KEPT = sys.stdin, sys.stdout, sys.stderr  # if these objects ended, they would close a child's streams
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")


def serve() -> dict:
    """Import all, without a device's threads, which a fork would not have; answer requests; return one in its child."""
    for module in pkgutil.walk_packages(importlib.import_module("dsv3_jax").__path__, "dsv3_jax."):
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name) if not module.name.endswith("__main__") else None
    exec(sys.argv[1], {})
    gc.freeze()  # children neither look at nor copy what was imported
    answer: object = None
    while print(json.dumps(answer), flush=True) or (line := sys.stdin.readline()):
        request = json.loads(line)
        if "poll" in request:
            pid, status, usage = os.wait4(request["poll"], os.WNOHANG)
            answer = [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime] if pid else None
        elif (answer := os.fork()) == 0:
            return request
    os._exit(0)


def become(request: dict) -> None:
    """Make this child what the command's own process would be: session, streams, limits, user."""
    os.setsid()
    os.chdir(request["folder"])
    for number, name in ((2, "stderr"), (1, "stdout"), (0, "stdin")):
        os.close(number)
        stream = None
        if request["streams"][number] is not None:
            os.open(request["streams"][number], os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY)  # is `number`
            errors = "backslashreplace" if number == 2 else "strict"
            stream = open(number, "rww"[number], -1 if number < 2 else 1, "utf-8", errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if "file_size" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"], resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if request.get("nobody"):
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    sys.argv = ["dsv3", *request["argv"]]


def watch(request: dict) -> None:
    """List the command's options and the paths that Python touches, and disturb the command at one of them."""
    log = os.open(request.get("log", os.devnull), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in WATCHED and args and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(request["folder"] + os.sep):
                seen += 1
                os.write(log, os.fsencode(os.path.relpath(path, request["folder"]) + "\n"))
                if seen == request.get("at"):
                    with contextlib.suppress(FileExistsError, FileNotFoundError, NotADirectoryError):
                        act(request["action"], path)

    def act(action: str, path: str) -> None:
        if action.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, action))
        elif action == "link":
            os.symlink(os.environ["CANARY"], path if "-checkpoint-tmp/" not in path else "")  # its own folder
        elif action == "delete":
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        else:
            raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)), path)

    def cli(kind: type, **words) -> object:
        for option in options(kind, words.get("default"), ""):
            os.write(log, json.dumps(option).encode() + b"\n")
        return parse(kind, **words)

    if "options" in request:
        tyro = importlib.import_module("tyro")
        parse, tyro.cli = tyro.cli, cli
    sys.addaudithook(hook)


def options(kind: type, default: object, prefix: str) -> Iterator[tuple[str, list[str], str | None]]:
    """Yield (name, choices, default) of each option of a dataclass; a switch has no default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for item in dataclasses.fields(kind):
        hint, marks = hints[item.name], getattr(hints[item.name], "__metadata__", ())
        hint = typing.get_args(hint)[0] if marks else hint
        value, name = getattr(default, item.name, item.default), item.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from options(hint, value, prefix if unnamed else f"{prefix}{name}.")
        elif hint is bool:
            yield from ((f"--{prefix}{word}", [], None) for word in (name, f"no-{name}"))
        elif "Positional" not in repr(marks):
            inner = [x for part in (hint, *typing.get_args(hint)) for x in typing.get_args(part)]
            yield f"--{prefix}{name}", [x for x in inner if isinstance(x, str)], str(value)


if __name__ == "__main__":
    request = serve()
    become(request)
    watch(request)
    from dsv3_jax.cli.main import main

    sys.exit(main())
