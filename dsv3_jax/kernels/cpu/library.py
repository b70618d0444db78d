"""The C++ kernels as a shared library: compiled once on each machine, then loaded and registered with JAX."""

import ctypes
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import jax
import jaxlib.version

from dsv3_jax.kernels.cpu import private_cache

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / f"{name}.cc" for name in ("small_batch", "experts", "attention", "adamw"))
HEADERS = (FOLDER / "common.h", FOLDER / "gemm.h")
TARGETS = {
    "dsv3_small_batch_matmul": "Dsv3SmallBatchMatmul",
    "dsv3_small_batch_swiglu": "Dsv3SmallBatchSwiglu",
    "dsv3_small_batch_by_head": "Dsv3SmallBatchByHead",
    "dsv3_decode_experts": "Dsv3DecodeExperts",
    "dsv3_cached_attention": "Dsv3CachedAttention",
    "dsv3_experts_swiglu": "Dsv3ExpertsSwiglu",
    "dsv3_experts_swiglu_gradients": "Dsv3ExpertsSwigluGradients",
    "dsv3_causal_attention": "Dsv3CausalAttention",
    "dsv3_causal_attention_gradients": "Dsv3CausalAttentionGradients",
    "dsv3_adamw": "Dsv3Adamw",
}
# -ffp-contract=off: the compiler would fuse some products and sums and not others, by tile size. A token's result would
# then depend on the number of tokens.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
TIMEOUT = 600  # seconds that a compiler may take
COMPILERS = ("c++", "g++", "clang++")


@cache
def why_not() -> str:
    """Load the kernels, and compile them first if this machine has no whole compiled library of this user yet.

    Compiling takes some seconds and is reported on stderr. The library is kept in the user's cache folder; without a
    private one it is compiled in each process. Call this before the first program is traced.

    Returns: an empty string if the kernels can be used in this process; otherwise the reason, without a full stop.
    """
    words = os.environ.get("CXX", "").strip() or next((c for c in COMPILERS if shutil.which(c)), None)
    if words is None:
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    try:
        library = _load(shlex.split(words))
        symbols = {name: getattr(library, symbol) for name, symbol in TARGETS.items()}
    except subprocess.CalledProcessError as error:
        line = next((line for line in error.stderr.splitlines() if "error" in line), f"exit code {error.returncode}")
        return f"{words} does not compile the kernels: {line.strip()}"
    except (OSError, ValueError, AttributeError, subprocess.TimeoutExpired) as error:
        return f"the kernels cannot be compiled or loaded: {error}"
    for name, symbol in symbols.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(symbol), platform="cpu")
    return ""


def _load(compiler: list[str]) -> ctypes.CDLL:
    """Load the library from the cache folder, or from a folder of this process if there is no private one.

    Args: compiler: the words of its command, as in ["ccache", "g++"].
    Raises: OSError, or CalledProcessError if the compiler fails.
    """
    try:
        return ctypes.CDLL(str(_compiled(compiler, private_cache.cache_folder(), "once for this machine")))
    except private_cache.NotPrivate as error:
        reason = str(error)
    with tempfile.TemporaryDirectory(prefix="dsv3_jax-") as folder:  # the library stays loaded without its file
        return ctypes.CDLL(str(_compiled(compiler, Path(folder), f"for this process alone, because {reason}")))


def _compiled(compiler: list[str], folder: Path, why: str) -> Path:
    """Return the library's path in a private folder, and compile it if it is absent or not whole.

    The file name is a hash of the sources, compiler, flags, jaxlib version and processor.

    Args: why: it is compiled, to be printed.
    Raises: NotPrivate if the folder is read-only, OSError, or CalledProcessError if the compiler fails.
    """
    sources = "\0".join(path.read_text() for path in (*SOURCES, *HEADERS))
    facts = {
        "sources": hashlib.sha256(sources.encode()).hexdigest(),
        "processor": hashlib.sha256(_processor().encode()).hexdigest(),
        "compiler": shlex.join([*compiler, *FLAGS]),
        "jaxlib": jaxlib.version.__version__,
    }
    name = f"kernels-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.so"
    if found := private_cache.find_whole(folder, name):
        return found
    with private_cache.build_folder(folder) as temporary:
        if found := private_cache.find_whole(folder, name):  # another process has just compiled it
            return found
        start = time.perf_counter()
        words = shlex.join(compiler)
        print(f"compiling the CPU kernels with {words} ({why}) …", file=sys.stderr, flush=True)
        path = private_cache.keep(_compile(compiler, temporary / name), folder, name, facts)
    print(f"compiled in {time.perf_counter() - start:.0f} s: {path}", file=sys.stderr, flush=True)
    return path


def _compile(compiler: list[str], library: Path) -> Path:
    """Compile each source on a core of its own, and link them. Returns: `library`."""

    def run(*words: str) -> None:
        command = [*compiler, *words]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)

    flags = [*(flag for flag in FLAGS if flag != "-shared"), "-isystem", jax.ffi.include_dir(), "-c"]
    objects = [str(library.with_name(source.stem + ".o")) for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda source, to: run(*flags, str(source), "-o", to), SOURCES, objects))
    run(*FLAGS, *objects, "-o", str(library))
    return library


def _processor() -> str:
    """Describe the processor. -march=native depends on it, and machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname())
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
