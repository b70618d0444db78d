"""Workers: processes that answer each line with one line of JSON, so that the sides of a benchmark can take turns.

`Worker` is the benchmark's end, `serve` the worker's. Needs nothing that a worker's interpreter might lack.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable

# Our side's memory settings (dsv3_jax/kernels/cpu/memory.py), given to the peer from outside: its best case.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}  # fmt: skip


class OutOfMemory(RuntimeError):
    """A worker that ended for want of memory."""


class Worker:
    """A process that holds one side; a context manager.

    Args:
        name: for errors.
        command: its words; it prints one line of JSON when it is ready (`info`), then one a command.
        env: added to this process's environment.
    Raises: RuntimeError with the worker's own sentence if it cannot start or ends early; OutOfMemory where that is why.
    """

    def __init__(self, name: str, command: list[str], env: dict[str, str] | None = None):
        self._name = name
        self._worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {})
        )
        assert self._worker.stdin and self._worker.stdout  # both are pipes
        self._commands, self._replies = self._worker.stdin, self._worker.stdout
        self.info = self._reply()

    def ask(self, command: str) -> dict:
        """The answer to one command."""
        with contextlib.suppress(BrokenPipeError):  # the worker is gone: _reply tells how it ended
            print(command, file=self._commands, flush=True)
        return self._reply()

    def _reply(self) -> dict:
        line = self._replies.readline()
        reply = json.loads(line) if line else {"error": "it said nothing"}
        if "error" in reply:
            self.close()
            code = self._worker.returncode
            # -9: by the kernel, which takes workers first (see `limit_memory`).
            kind = OutOfMemory if reply.get("memory") or code == -9 else RuntimeError
            raise kind(f"the {self._name} worker ended with code {code}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the worker; its memory is free again when this returns. Harmless if it has ended already."""
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()  # the worker's loop ends with its input
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
    """A worker's life: get ready, then answer standard input until it ends or says `quit`. Returns the exit code.

    Args: prepare: returns (what to say when ready, the function that obeys one line).
    """
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints must not mix with the replies

    def say(reply: dict) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        info, obey = prepare()
        say(info)
        for line in sys.stdin:
            if line.strip() == "quit":
                break
            say(obey(line.strip()))
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        # What torch and XLA call it.
        words = ("allocate memory", "out of memory", "resource_exhausted")
        memory = isinstance(error, MemoryError) or any(word in text.lower() for word in words)
        say({"error": text, "memory": memory})
        return 1
    return 0


def limit_memory(keep_free: int = 1 << 30) -> None:
    """Have this process fail, rather than another one die, when it asks for more memory than is free (Linux)."""
    with contextlib.suppress(OSError):
        with open("/proc/meminfo") as lines:
            free = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}["MemAvailable"]
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
        resource.setrlimit(resource.RLIMIT_DATA, (max(free - keep_free, keep_free),) * 2)


def peak_rss() -> int:
    """Bytes of this process's largest resident set."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kibibytes
