"""The C++ kernels as a shared library: compiled once on each machine, then loaded and registered with JAX."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
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
    "dsv3_experts_swiglu": "Dsv3ExpertsSwiglu",
    "dsv3_experts_swiglu_gradients": "Dsv3ExpertsSwigluGradients",
    "dsv3_uninitialized": "Dsv3Uninitialized",
    "dsv3_zero_unwritten": "Dsv3ZeroUnwritten",
    "dsv3_causal_attention": "Dsv3CausalAttention",
    "dsv3_causal_attention_gradients": "Dsv3CausalAttentionGradients",
    "dsv3_adamw": "Dsv3Adamw",
}
# -ffp-contract=off: the compiler would fuse some products and sums and not others, by tile size. A token's result would
# then depend on the number of tokens.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")


@cache
def why_not() -> str:
    """Load the kernels, and compile them first if this machine has no compiled library yet.

    Compiling takes some seconds and is reported on stderr. The library is kept in the user's cache folder. Call this
    before the first program is traced.

    Returns: an empty string if the kernels can be used in this process; otherwise the reason, without a full stop.
    """
    compiler = os.environ.get("CXX") or next((c for c in COMPILERS if shutil.which(c)), None)
    if compiler is None:
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        line = next((line for line in error.stderr.splitlines() if "error" in line), f"exit code {error.returncode}")
        return f"{compiler} does not compile the kernels: {line.strip()}"
    except OSError as error:
        return f"the kernels cannot be compiled or loaded: {error}"
    for name, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return ""


def _compiled(compiler: str) -> Path:
    """Return the library's path, and compile it if it is missing.

    The file name is a hash of the sources, compiler, flags, jaxlib version and processor.
    Raises: OSError, or CalledProcessError if the compiler fails.
    """
    sources = (path.read_text() for path in (*SOURCES, *HEADERS))
    depends_on = (*sources, jaxlib.version.__version__, compiler, _processor(), *FLAGS)
    digest = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax"
    path = folder / f"kernels-{digest}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    start = time.perf_counter()
    print(f"compiling the CPU kernels with {compiler} (once for this machine) …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / path.name
        command = [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), *map(str, SOURCES), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.replace(path)  # atomic, because another process may compile at the same time
    print(f"compiled in {time.perf_counter() - start:.0f} s, kept in {path}", file=sys.stderr, flush=True)
    return path


def _processor() -> str:
    """Describe the processor. -march=native depends on it, and machines may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname())
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
