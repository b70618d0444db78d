"""One case in a process of its own: it may crash, hang, or set what a process sets only once.

`replies` and `result` start the process and read what it says, a line of JSON each. `answer` is the
side of the process.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

LONGEST = 300  # characters of an error


class Failed(RuntimeError):
    """A process did not do its case. The message is one sentence."""


def replies(command: Sequence[str], seconds: float = threading.TIMEOUT_MAX) -> Iterator[Any]:
    """Start a process, and yield what it says. It ends when the caller stops, or after `seconds`.

    Raises: Failed if the case raised, the process crashed, or the time was over.
    """
    late = threading.Event()
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2"} | os.environ
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    assert process.stdout
    try:
        for line in process.stdout:
            reply = json.loads(line)
            if isinstance(reply, dict) and reply.keys() == {"failed"}:
                raise Failed(reply["failed"])
            yield reply

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


def sentence(error: BaseException) -> str:
    """An error's message on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


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
