"""The C++ kernels as a shared library: compiled once a machine, then loaded and registered.

A library is code that runs with the user's rights. So it is kept in a folder that others may not
write to.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import jax
import jaxlib.version

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / f"{name}.cc" for name in ("small_batch", "experts", "attention", "adamw"))
HEADERS = (FOLDER / "common.h", FOLDER / "gemm.h")
TARGETS = {
    "dsv3_small_batch_matmul": "Dsv3SmallBatchMatmul",
    "dsv3_small_batch_swiglu": "Dsv3SmallBatchSwiglu",
    "dsv3_small_batch_by_head": "Dsv3SmallBatchByHead",
    "dsv3_decode_experts": "Dsv3DecodeExperts",
    "dsv3_cached_attention": "Dsv3CachedAttention",
    "dsv3_write_rows": "Dsv3WriteRows",
    "dsv3_experts_swiglu": "Dsv3ExpertsSwiglu",
    "dsv3_experts_swiglu_gradients": "Dsv3ExpertsSwigluGradients",
    "dsv3_causal_attention": "Dsv3CausalAttention",
    "dsv3_causal_attention_gradients": "Dsv3CausalAttentionGradients",
    "dsv3_adamw": "Dsv3Adamw",
}
# -ffp-contract=off: the compiler would fuse some products and sums and not others, by tile size. A
# token's result would then depend on the number of tokens.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
)
TIMEOUT = 600  # seconds that a compiler may take
COMPILERS = ("c++", "g++", "clang++")


@cache
def why_not() -> str:
    """Load the kernels; compile them first if this user has no library on this machine yet.

    Compiling takes some seconds and is reported on stderr. Call this before the first program is
    traced.

    Returns: an empty string if the kernels can be used in this process; otherwise the reason,
        without a full stop.
    """
    here = (name for name in COMPILERS if shutil.which(name))
    words = os.environ.get("CXX", "").strip() or next(here, None)
    if words is None:
        return (
            f"there is no C++ compiler ({', '.join(COMPILERS)}): install one, as by apt install g++"
        )

    # The library's functions, as XLA's custom calls.
    try:
        library = load(shlex.split(words))
        symbols = {name: getattr(library, symbol) for name, symbol in TARGETS.items()}
    except subprocess.CalledProcessError as error:
        line = next(
            (line for line in error.stderr.splitlines() if "error" in line),
            f"exit code {error.returncode}",
        )
        return f"{words} does not compile the kernels: {line.strip()}"
    except (OSError, RuntimeError, ValueError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"the kernels cannot be compiled or loaded: {error}"

    for name, symbol in symbols.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(symbol), platform="cpu")
    return ""


def load(compiler: list[str]) -> ctypes.CDLL:
    """Load the library of the cache folder. If it is absent, one process compiles it.

    Args: compiler: the words of its command, as in ["ccache", "g++"].
    Raises: as `private_folder`, or CalledProcessError if the compiler fails.
    """
    folder = private_folder()
    with (folder / "build.lock").open("a+") as lock:
        # a file system without locks: two processes may compile the same
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / _name(compiler)
        if not path.is_file():
            start = time.perf_counter()
            print(
                f"compiling the CPU kernels with {shlex.join(compiler)}, once …",
                file=sys.stderr,
                flush=True,
            )
            _compile(compiler, path)
            print(
                f"compiled in {time.perf_counter() - start:.0f} s: {path}",
                file=sys.stderr,
                flush=True,
            )
        return ctypes.CDLL(str(path))


def private_folder() -> Path:
    """The user's cache folder, created if it is absent.

    Raises: OSError if it cannot be created, or others own it or may write to it; RuntimeError if
        the user has no home.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax"
    if not folder.is_absolute():  # a compiler would run again in each current folder
        raise OSError(
            f"folder={folder} is relative; set HOME or XDG_CACHE_HOME to an absolute path"
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise OSError(
            f"folder={folder} is not private; "
            "set XDG_CACHE_HOME to a folder that only you may write to"
        )
    return folder


def _name(compiler: list[str]) -> str:
    """A library's name: a hash of all that its content depends on."""
    sources = (path.read_text() for path in (*SOURCES, *HEADERS))
    facts = "\0".join([*sources, *compiler, *FLAGS, jaxlib.version.__version__, _processor()])
    return f"kernels-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.so"


def _compile(compiler: list[str], path: Path) -> None:
    """Compile each source on its own core, and link them to the library, which appears complete."""

    def run(*words: str) -> None:
        command = [*compiler, *words]
        subprocess.run(
            command, check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
        )

    flags = [
        *(flag for flag in FLAGS if flag != "-shared"),
        "-isystem",
        jax.ffi.include_dir(),
        "-c",
    ]
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as build:
        library = Path(build) / "kernels.so"
        objects = [f"{build}/{source.stem}.o" for source in SOURCES]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source, to: run(*flags, str(source), "-o", to), SOURCES, objects))
        run(*FLAGS, *objects, "-o", str(library))
        library.chmod(0o600)
        library.replace(path)


def _processor() -> str:
    """Describe the processor: -march=native depends on it, and machines may share a folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname())
    return "\n".join(
        sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    )
