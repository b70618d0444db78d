"""Worker processes that answer lines with lines of JSON, so that a benchmark's sides take turns.

`Worker` is the benchmark's side, `serve` the worker's. This file imports only the standard library,
because a worker's interpreter may have no other packages.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable

# Gives the peer our side's memory settings (dsv3_jax/kernels/cpu/memory.py): its best case.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


class OutOfMemory(RuntimeError):
    """A worker ran out of memory."""


class Worker:
    """A process for one side of a benchmark; a context manager.

    Args:
        name: of the worker in errors.
        command: its command line. The process prints one line of JSON when it is ready (`info`),
            then one per command.
        env: added to this process's environment.
    Raises: RuntimeError with the worker's message if it cannot start or ends early, OutOfMemory if
        memory is the cause.
    """

    def __init__(self, name: str, command: list[str], env: dict[str, str] | None = None):
        self._name = name
        self._worker = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (env or {}),
        )
        assert self._worker.stdin and self._worker.stdout  # both are pipes
        self._commands, self._replies = self._worker.stdin, self._worker.stdout
        self.info = self._reply()

    def ask(self, command: str) -> dict:
        """Send one command and return the reply."""
        with contextlib.suppress(BrokenPipeError):  # the worker has ended; _reply reports how
            print(command, file=self._commands, flush=True)
        return self._reply()

    def _reply(self) -> dict:
        line = self._replies.readline()
        reply = json.loads(line) if line else {"error": "it printed no error"}
        if "error" in reply:
            self.close()
            code = self._worker.returncode
            # -9: killed by the kernel, which chooses workers first (see `limit_memory`).
            kind = OutOfMemory if reply.get("memory") or code == -9 else RuntimeError
            raise kind(f"the {self._name} worker ended with code {code}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the worker, if it has not ended, and wait until its memory is free."""
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()  # end of input ends the worker's loop
        try:
            self._worker.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        self._replies.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def serve(prepare: Callable[[], tuple[dict, Callable[[str], dict]]]) -> int:
    """Run a worker: prepare, then answer lines until the end or `quit`. Returns the exit code.

    Args: prepare: returns (the first reply, a function from a line to its reply).
    """
    # This keeps the output of libraries apart from the replies.
    replies, sys.stdout = sys.stdout, sys.stderr

    def send(reply: dict) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        info, handle = prepare()
        send(info)
        for line in sys.stdin:
            if line.strip() == "quit":
                break
            send(handle(line.strip()))
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        phrases = ("allocate memory", "out of memory", "resource_exhausted")  # of torch and XLA
        memory = isinstance(error, MemoryError) or any(phrase in text.lower() for phrase in phrases)
        send({"error": text, "memory": memory})
        return 1
    return 0


def limit_memory(keep_free: int = 1 << 30) -> None:
    """Make this process fail, not another one, if it asks for more memory than is free (Linux)."""
    with contextlib.suppress(OSError):
        with open("/proc/meminfo") as lines:
            sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        free = sizes["MemAvailable"]
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        resource.setrlimit(resource.RLIMIT_DATA, (max(free - keep_free, keep_free),) * 2)


def peak_rss() -> int:
    """Return the bytes of this process's largest resident set."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux reports KiB, macOS bytes
