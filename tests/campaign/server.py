"""A process that has imported the package forks a child for each command: a trial costs no import.

Requests and answers are lines of JSON. {"argv": …} starts a child, and answers its process id.
{"poll": id} answers [exit code or -signal, CPU seconds], or null while the child runs.
"""

import contextlib
import errno
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import termios
import time

# if these objects ended, they would close a child's streams
KEPT = sys.stdin, sys.stdout, sys.stderr
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")


def serve() -> dict:
    """Import all, without threads, which a fork would lose; answer; return one in its child."""
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
            answer = (
                [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]
                if pid
                else None
            )
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
            # the new descriptor is `number`
            os.open(
                request["streams"][number], os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY
            )
            errors = "backslashreplace" if number == 2 else "strict"
            stream = open(
                number, "rww"[number], -1 if number < 2 else 1, "utf-8", errors, closefd=False
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    for name, value in request.get("ulimits", {}).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if request.get("nobody"):
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if request.get("action") == "suspend":
        wait_as_a_shell()
    sys.argv = ["dsv3", *request["argv"]]


def wait_as_a_shell() -> None:
    """Return in a child, the terminal's foreground job; continue it soon after it is stopped."""
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    if job := os.fork():
        while os.WIFSTOPPED(status := os.waitpid(job, os.WUNTRACED)[1]):
            os.tcsetpgrp(1, os.getpgrp())
            time.sleep(0.2)
            os.tcsetpgrp(1, job)
            os.killpg(job, signal.SIGCONT)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    os.setpgid(0, 0)
    os.tcsetpgrp(1, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)


def watch(request: dict) -> None:  # noqa: C901 - one hook in another
    """List the paths that Python touches and the files it syncs; disturb the command at one."""
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
                    with contextlib.suppress(
                        FileExistsError, FileNotFoundError, NotADirectoryError
                    ):
                        act(request["action"], path)

    def act(action: str, path: str) -> None:
        top = os.path.join(
            request["folder"], os.path.relpath(path, request["folder"]).split(os.sep)[0]
        )
        if action.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, action))
        elif action == "suspend":
            os.killpg(0, signal.SIGTSTP)  # what a terminal does for Ctrl-Z
        elif action == "clock":
            now = time.time
            time.time = lambda: now() + request["jump"]
        elif action == "move":
            os.rename(top, request["folder"] + "/moved")
        elif action == "write":
            shutil.copyfile(request["written"], path)  # while the command reads it
        elif action == "link":
            # not in the command's own folder
            os.symlink(os.environ["CANARY"], path if "-checkpoint-tmp/" not in path else "")
        elif action == "delete":
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        else:
            raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)), path)

    def sync(number: int) -> None:
        really(number)
        status = os.fstat(number)
        os.write(log, b"synced %d %d\n" % (status.st_ino, status.st_size))

    if "synced" in request:
        really, os.fsync, os.fdatasync = os.fsync, sync, sync
    sys.addaudithook(hook)


if __name__ == "__main__":
    request = serve()
    become(request)
    watch(request)
    from dsv3_jax.cli.main import main

    sys.exit(main())
