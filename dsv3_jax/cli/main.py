"""`dsv3 COMMAND …`: the table of commands, and the entry point.

Exit codes:
    0    done
    1    an error in the program, with a stack trace
    2    bad input, with one sentence on stderr
    75   another process of the run was lost (`dsv3 train --cluster`), or 134 where JAX ends this
         one; start all again
    130  interrupted by Ctrl-C
    141  the reader of the output has closed it
    143  stopped by SIGTERM
"""

import contextlib
import glob
import importlib
import importlib.util
import os
import signal
import sys
import traceback

from dsv3_jax.cli.common import guarded
from dsv3_jax.config import did_you_mean
from dsv3_jax.host.imports import import_program
from dsv3_jax.host.signals import handled, terminated
from dsv3_jax.presets import MODELS

# Command: its arguments, and what it does. Each is a file beside this one, with a function
# `run(argv) -> exit code`.
COMMANDS = {
    "demo": ("", "train a small model on the text that this Python carries, and let it write"),
    "train": ("PRESET", "train a model; the same command resumes a run that was stopped"),
    "eval": ("RUN", "measure a run's last checkpoint on held-out text"),
    "stats": (
        "RUN",
        "count which experts held-out text is routed to: numbers, a picture and a page",
    ),
    "generate": ("MODEL", "continue a prompt with a run's last checkpoint or a released folder"),
    "chat": ("MODEL", "talk with a model that has a chat template"),
    "serve": ("MODEL", "answer OpenAI's clients over HTTP, and show on a page what happens inside"),
    "convert": (
        "FOLDER OUT",
        "convert released weights (Hugging Face format) to a run and back, or a model to a mixture",
    ),
    "runs": (
        "[list FOLDER]",
        "list runs: state, loss, speed; or check RUN: compare checkpoints with their checksums",
    ),
    "data": (
        "tokenize PATHS",
        "write shards of token ids to train on, which no memory has to hold; check them",
    ),
    "plan": (
        "PRESET",
        "compute what each device of a mesh would hold, compute and send, without the devices",
    ),
    "info": (
        "PRESET",
        "list a model's parameters, FLOPs and cache bytes, without allocating it; and the kernels",
    ),
    "tokenizer": ("OUT", "train a byte-level BPE tokenizer"),
}


def usage() -> str:
    """The text of `dsv3 --help`."""
    lines = [
        f"  {name + ' ' + arguments:<20} {what}" for name, (arguments, what) in COMMANDS.items()
    ]
    return "\n".join([
        "usage: dsv3 COMMAND …", "", *lines, "",
        f"`dsv3 COMMAND --help` lists a command's options. Presets: {', '.join(MODELS)}.",
        "`--import NAME`, with any command, imports a Python file or module of yours that "
        "registers a router, rule or attention.",
        "`dsv3 train sft --start MODEL --data.paths chats.jsonl` fine-tunes a model on chats.",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command, by default the one of this process's arguments, and return its exit code."""
    given = sys.argv[1:] if argv is None else argv

    # Streams that can be written, whatever the shell gives.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # it may be ASCII, or print a name that is not UTF-8
            stream.reconfigure(errors="backslashreplace")

    # Settings that JAX and XLA read with the first device.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    leave_out_absent_devices()
    take_gpu_memory()
    keep_programs()

    with handled(_terminate, signal.SIGTERM):  # `dsv3 train` handles it itself while it trains
        try:
            code = guarded(lambda: dispatch(list(given)))
        except Exception:
            if not terminated.is_set():  # asyncio makes other errors of `_terminate`'s
                if argv is not None:
                    raise
                traceback.print_exc()
            code = 1

    # The exit code of a shell for a process that a signal ended.
    if terminated.is_set():
        terminated.clear()
        code = 128 + signal.SIGTERM
    if argv is None and code:
        end(code)
    return code


# Linux shows NVIDIA's GPUs (the second: in WSL) and TPUs by these files.
NODES = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvhost*", "/dev/accel*", "/dev/vfio/[0-9]*")


def leave_out_absent_devices() -> None:
    """Choose the CPU where the compilers of `dsv3 plan` are installed and their devices are absent.

    JAX would look for the devices at each start, and print pages about what it misses.
    JAX_PLATFORMS has the last word.
    """
    compilers = importlib.util.find_spec("libtpu") or importlib.util.find_spec("jax_cuda13_plugin")
    if compilers is None or sys.platform != "linux" or any(map(glob.glob, NODES)):
        return
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if jax := sys.modules.get("jax"):
            jax.config.update("jax_platforms", "cpu")


def take_gpu_memory() -> None:
    """Let JAX allocate 92 % of a GPU's memory, by default 75 %.

    JAX refuses both names of the variable at once.
    """
    if not (
        os.environ.get("XLA_CLIENT_MEM_FRACTION")
        or os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    ):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"


def keep_programs() -> None:
    """Keep compiled programs of GPUs and TPUs in the user's cache folder, for a quick restart."""
    import jax

    from dsv3_jax.kernels.cpu.library import private_folder

    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(glob.glob, NODES))
    if on_cpu or jax.config.jax_compilation_cache_dir:
        return
    # Without a private folder nothing is kept: others could put programs there.
    with contextlib.suppress(OSError, RuntimeError):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(private_folder() / "programs")
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def _terminate(number: int, frame: object) -> None:
    """End by an exception, so that temporary files and folders are deleted on the way."""
    terminated.set()
    raise SystemExit(128 + number)


def end(code: int) -> None:
    """End this process at once: threads of a failed save, or JAX's service, would wait."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def dispatch(argv: list[str]) -> int:
    """Run a command.

    Raises: ValueError for an unknown command, for a program that `--import` names and that cannot
        be imported, and for what the command refuses.
    """
    argv = _without_imports(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    name, *rest = argv
    if name == "--version":
        print(importlib.import_module("dsv3_jax").__version__)
        return 0
    if name not in COMMANDS:
        raise ValueError(
            f"command {name!r} is not one of {', '.join(COMMANDS)}{did_you_mean(name, COMMANDS)}"
        )
    return importlib.import_module(f"dsv3_jax.cli.{name}").run(rest)


def _without_imports(argv: list[str]) -> list[str]:
    """Import the program of each `--import NAME`, and return the other arguments."""
    rest = []
    words = iter(argv)
    for word in words:
        option, equals, name = word.partition("=")
        if option != "--import":
            rest.append(word)
            continue
        name = name if equals else next(words, "")
        if not name or name.startswith("-"):
            raise ValueError(
                f"import={name!r} is no name; give a Python file or a module, as in --import "
                "my_router.py"
            )
        import_program(name)
    return rest
