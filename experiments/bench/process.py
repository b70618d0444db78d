"""Worker processes that answer lines of JSON with lines of JSON, so that sides can take turns.

`Worker` is the benchmark's side, `serve` the worker's. This file imports only NumPy and the
standard library, because a worker's interpreter may have neither JAX nor torch.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Gives the peer our side's memory settings (dsv3_jax/kernels/cpu/memory.py): its best case.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def in_turns(sides: dict, rounds: int) -> dict[Any, list]:
    """Call each side once a round; a first round, which compiles, does not count.

    Args: sides: functions by name.
    Returns: what each returned, by name and round.
    """
    for side in sides.values():
        side()
    found: dict = {name: [] for name in sides}
    for turn in range(rounds):
        for name, side in sides.items():
            found[name].append(side())
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the rounds' own ratios."""
    return median(a / b for a, b in zip(times, others, strict=True))


class Worker:
    """A process for one side of a benchmark; a context manager.

    Args:
        script: the worker's file in this folder. It prints a line of JSON when it is ready
            (`info`), then one for each `ask`.
        options: arguments of the function that the script gives to `serve`.
        env: added to this process's environment.
        python: the interpreter; None means this one.
    Raises: RuntimeError with the worker's message if it cannot start or ends early.
    """

    def __init__(self, script: str, options: dict, env: dict[str, str], python: str | None = None):
        self._script = script
        self._process = subprocess.Popen(
            [python or sys.executable, str(HERE / script), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | env,
        )
        assert self._process.stdin and self._process.stdout  # both are pipes
        self._commands, self._replies = self._process.stdin, self._process.stdout
        self.info = self._reply()

    def ask(self, **command) -> dict:
        """Send one command and return the reply."""
        with contextlib.suppress(BrokenPipeError):  # the worker has ended; _reply reports how
            print(json.dumps(command), file=self._commands, flush=True)
        return self._reply()

    def _reply(self) -> dict:
        line = self._replies.readline()
        reply = json.loads(line) if line else {"error": "it printed no error"}
        if "error" in reply:
            self.close()
            code = self._process.returncode
            raise RuntimeError(f"{self._script} ended with code {code}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the worker, and wait until its memory is free."""
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()  # end of input ends the worker's loop
        self._process.wait()
        self._replies.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(prepare: Callable[..., tuple[dict, Callable[..., dict]]]) -> int:
    """Run a worker: prepare, then answer lines until the input ends. Returns the exit code.

    Args: prepare: takes the worker's options; returns (the first reply, a function from a command's
        fields to its reply).
    """
    # This keeps the output of libraries apart from the replies.
    replies, sys.stdout = sys.stdout, sys.stderr

    def send(reply: dict) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        info, handle = prepare(**json.loads(sys.argv[1]))
        send(info)
        for line in sys.stdin:
            send(handle(**json.loads(line)))
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        send({"error": " ".join(str(error).split()) or type(error).__name__})
        return 1
    return 0


def peak_rss() -> int:
    """Return the bytes of this process's largest resident set."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux reports KiB, macOS bytes


def draw_tokens(batch: int, length: int, vocab_size: int) -> np.ndarray:
    """Draw uniform random tokens int64 [B, T], the same for both sides of a benchmark."""
    return np.random.default_rng(0).integers(vocab_size, size=(batch, length))
