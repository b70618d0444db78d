"""One case in a process of its own: it may crash, hang, or set what a process sets only once.

`replies` and `result` start the process and read what it says, a line of JSON each. `answer` is the
side of the process. A `Worker` is a process that is asked, and `serve` its side. Processes may run
in interpreters without any package, so this file imports the standard library alone.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

LONGEST = 300  # characters of an error


class Failed(RuntimeError):
    """A process did not do its case. The message is one sentence."""


def _start(command: Sequence[str], env: Mapping[str, str], **pipes: Any) -> subprocess.Popen[str]:
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ, **env}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **pipes)


def _read(line: str) -> Any:
    reply = json.loads(line)
    if isinstance(reply, dict) and reply.keys() == {"failed"}:
        raise Failed(reply["failed"])
    return reply


def replies(command: Sequence[str], seconds: float = threading.TIMEOUT_MAX) -> Iterator[Any]:
    """Start a process, and yield what it says. It ends when the caller stops, or after `seconds`.

    Raises: Failed if the case raised, the process crashed, or the time was over.
    """
    late = threading.Event()
    process = _start(command, {})

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    assert process.stdout
    try:
        yield from map(_read, process.stdout)
        code = process.wait()
        if late.is_set():
            raise Failed(f"the time was over, after {seconds:.0f} s")
        if code:
            raise Failed(f"the process ended with code {code}; its last words are above")
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()


def result(process: Sequence[str], seconds: float = threading.TIMEOUT_MAX) -> Any:
    """Run a process, and return what it said last. Raises: Failed, as `replies`."""
    *_, last = replies(process, seconds)
    return last


def answer(said: Iterable[Any]) -> int:
    """Say each item on standard output, in the process of a case. Returns its exit code."""
    # Libraries print on descriptor 1 too: the replies get one of their own.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        for item in said:
            print(json.dumps(item), file=out)
    except Exception as error:  # of a compiler or a library: any type
        print(json.dumps({"failed": f"{type(error).__name__}: {sentence(error)}"}), file=out)
        return 1
    return 0


class Worker:
    """A process that says a line when it is ready (`info`), then one for each `ask`.

    A context manager, which ends the process and waits until its memory is free.

    Args: env: added to this process's environment.
    Raises: Failed if the process cannot start or ends early.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        self._process = _start(command, env, stdin=subprocess.PIPE)
        assert self._process.stdin and self._process.stdout  # both are pipes
        self._questions, self._replies = self._process.stdin, self._process.stdout
        self.info = self._reply()

    def ask(self, **question: Any) -> Any:
        """Send one question and return the reply."""
        with contextlib.suppress(BrokenPipeError):  # the process has ended; _reply reports how
            print(json.dumps(question), file=self._questions, flush=True)
        return self._reply()

    def _reply(self) -> Any:
        try:
            line = self._replies.readline()
            if not line:
                code = self._process.wait()
                raise Failed(f"the process ended with code {code}; its last words are above")
            return _read(line)
        except Failed:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._questions.close()  # end of input ends `serve`
        self._process.wait()
        self._replies.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(info: Any, handle: Callable[..., Any]) -> Iterator[Any]:
    """Yield what the process of a `Worker` says, for `answer`, until its input ends.

    Args: handle: takes a question's fields.
    """
    yield info
    for line in sys.stdin:
        yield handle(**json.loads(line))


def sentence(error: BaseException) -> str:
    """An error's message on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def peak_memory() -> int:
    """Return the bytes of this process's largest resident set."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux reports KiB, macOS bytes


def command(script: str, **case: Any) -> list[str]:
    """The process for one case of a script that ends in `main`."""
    return [sys.executable, script, "--case", json.dumps(case)]


def run_case(script: str, **case: Any) -> Any:
    """Run a case of a script. Returns its result, or {"failed": a sentence}."""
    try:
        return result(command(script, **case))
    except Failed as error:
        return {"failed": str(error)}


def main(case: Callable[..., Any], script: Callable[[], Any]) -> None:
    """End a script: run all of it, or in a process of `command` the one case."""
    if sys.argv[1:2] == ["--case"]:
        sys.exit(answer(case(**json.loads(text)) for text in sys.argv[2:]))
    sys.exit(script())
