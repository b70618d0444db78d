"""Call every C++ kernel on random shapes, compiled with the compiler's sanitizers.

    python -m tests.campaign.sanitizers SECONDS SEED

Half of the time is for addresses and undefined behaviour, half for threads. Each report is a fault.
So are results that are not finite or that depend on the threads, and an index outside an array that
is not refused. JAX allocates each argument and result apart and by its exact size, so a sanitizer
sees an access outside it.
"""

import itertools
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial

import jax
import numpy as np

from dsv3_jax.kernels.cpu import calls, library
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.sort_by_expert import SortedRows

COMPILER = os.environ.get("CXX", "c++")
# -fsanitize → its library, and how many threads XLA has
KINDS = {"address,undefined": ("libasan.so", "2"), "thread": ("libtsan.so", "3")}
# -O1 compiles three times as long
FLAGS = ("-O0", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
ENVIRONMENT = {
    # GCC does not align the stack that the second option makes to registers (its bug 110027).
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "halt_on_error=1",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # they would take most of the time
}


class Draw:
    """Random sizes and arrays. `wrong` says whether an index is outside its array."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)
        self.wrong = False

    def one_in(self, count: int) -> bool:
        return self.rng.integers(count) == 0

    def size(self, most: int) -> int:
        """Mostly small, sometimes around a multiple of a register or a tile, seldom large."""
        near = (8 << self.rng.integers(5)) + self.rng.integers(-1, 2)
        sizes = self.rng.integers(1, 10), near, self.rng.integers(1, most + 1)
        return int(min(most, self.rng.choice(sizes, p=(0.5, 0.3, 0.2))))

    def rows(self) -> int:
        return 0 if self.one_in(10) else self.size(40)

    def floats(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """One of a hundred numbers is 0, and one is large."""
        factors = self.rng.choice([0, 30, 1], shape, p=(0.01, 0.01, 0.98))
        return (factors * self.rng.normal(0, scale, shape)).astype(np.float32)

    def ids(self, *shape: int, below: int) -> np.ndarray:
        return self.damaged(self.rng.integers(0, below, shape, np.int32), below)

    def damaged(self, ids: np.ndarray, below: int) -> np.ndarray:
        """Sometimes put one index outside of 0 … below - 1."""
        if ids.size and self.one_in(10):
            ids.flat[self.rng.integers(ids.size)] = self.rng.choice([-1, below])
            self.wrong = True
        return ids

    def experts(self, count: int, dim: int) -> list[np.ndarray]:
        width = self.size(100)
        shapes = (count, dim, width), (count, dim, width), (count, width, dim)
        return [self.floats(*shape, scale=0.1) for shape in shapes]


def matmul(draw: Draw):
    rows, dim, width = draw.rows(), draw.size(600), draw.size(700)
    return calls.small_batch_matmul(draw.floats(rows, dim), draw.floats(dim, width))


def swiglu(draw: Draw):
    rows, dim, width = draw.rows(), draw.size(300), draw.size(600)
    weights = (draw.floats(*x, scale=0.1) for x in ((dim, width), (dim, width), (width, dim)))
    return calls.small_batch_swiglu(draw.floats(rows, dim), *weights)


def by_head(draw: Draw):
    rows, heads, dim, width = draw.rows(), draw.size(20), draw.size(130), draw.size(130)
    transposed = draw.one_in(2)
    matrix = draw.floats(heads, *((width, dim) if transposed else (dim, width)))
    return calls.small_batch_by_head(draw.floats(rows, heads, dim), matrix, transposed=transposed)


def decode_experts(draw: Draw):
    rows, count, dim = draw.rows(), draw.size(16), draw.size(100)
    shape = rows, int(draw.rng.integers(1, min(count, 4) + 1))
    ids, gates = draw.ids(*shape, below=count), draw.floats(*shape)
    return calls.decode_experts(draw.floats(rows, dim), ids, gates, *draw.experts(count, dim))


def cached_attention(draw: Draw):
    batch, groups = draw.rng.integers(1, 4, 2)
    queries, slots = draw.size(12), draw.size(700)
    dtype = jax.numpy.dtype(draw.rng.choice(calls.CACHE_DTYPES))

    def stored() -> Stored:
        rows = draw.floats(batch, groups, slots, draw.size(80))
        if dtype.itemsize > 1:
            return Stored(rows.astype(dtype), None)
        draw.wrong |= (no_scales := draw.one_in(10))
        scales = None if no_scales else draw.floats(batch, groups, slots, 1, scale=0.1)
        return Stored(np.clip(rows, -100, 100).astype(dtype), scales)

    values = jax.device_put(stored())  # often the first keys, too: then in one buffer
    others = [stored() for _ in range(draw.rng.integers(0, 3))]
    keys = [stored() if draw.one_in(3) else values, *others]
    widths = [draw.rng.integers(1, key.rows.shape[-1] + 1) for key in keys]
    q = [draw.floats(batch, groups, queries, width, scale=0.3) for width in widths]
    last = draw.ids(batch, queries, below=slots)
    return jax.jit(partial(calls.cached_attention, scale=0.5))(q, keys, values, last)


def write_rows(draw: Draw):
    layers, batch, groups, arrays = draw.rng.integers(1, 4, 4)
    tokens = draw.size(9)
    slots = tokens + draw.size(90)
    widths = [draw.size(80) for _ in range(arrays)]
    old = [draw.floats(layers, batch, groups, slots, width) for width in widths]
    new = [draw.floats(batch, groups, tokens, width) for width in widths]
    first = draw.rng.integers(-2, slots + 2, batch, np.int32)  # is clamped, as XLA's are
    return calls.write_rows(old, new, draw.ids(below=layers), first)


def experts(draw: Draw):
    rows = 0 if draw.one_in(10) else draw.size(700 if draw.one_in(20) else 90)
    count, dim = draw.size(12), draw.size(100)
    choices = int(draw.rng.integers(1, min(count, 4) + 1))
    ids = draw.rng.integers(0, 1 if draw.one_in(4) else count, rows * choices)
    order = np.argsort(ids, stable=True).astype(np.int32)
    row = np.argsort(order).astype(np.int32).reshape(rows, choices)
    counts = np.bincount(ids, minlength=count).astype(np.int32)
    counts[0] += (one_more := draw.one_in(10))
    draw.wrong |= one_more
    places = SortedRows(draw.damaged(order, ids.size), draw.damaged(row, ids.size), counts, counts)

    x, gates, weights = draw.floats(rows, dim), draw.floats(rows, choices), draw.experts(count, dim)
    keep, frozen = draw.one_in(2), draw.one_in(4)
    y, *kept = calls.experts_swiglu(x, gates, places, weights, keep=keep)
    if not keep:
        kept = [draw.floats(ids.size, weights[0].shape[2]) for _ in range(2)]
    dy = draw.floats(rows, dim)
    return y, calls.experts_swiglu_gradients(x, gates, places, weights, kept, dy, frozen=frozen)


def causal_attention(draw: Draw):
    batch, heads = draw.rng.integers(0, 3), draw.rng.integers(1, 4)
    length, width, of_values = (
        draw.size(400 if draw.one_in(10) else 80),
        draw.size(70),
        draw.size(70),
    )
    q, k = draw.floats(2, batch, length, heads, width, scale=0.5)
    v, d_out = draw.floats(2, batch, length, heads, of_values)
    segments = np.cumsum(draw.rng.integers(0, 16, (batch, length)) == 0, axis=1, dtype=np.int32)
    out, lse, largest = calls.causal_attention(q, k, v, segments)
    gradients = calls.causal_attention_gradients(q, k, v, segments, out, lse, d_out)
    return out, lse, largest, gradients


def adamw(draw: Draw):
    size = 0 if draw.one_in(10) else draw.size(200_000 if draw.one_in(5) else 3000)
    p, mu, nu, g = draw.floats(4, size)
    numbers = np.array([0.5, 1.2, 1.1, 1e-3, not draw.one_in(5)], np.float32)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1}
    return calls.adamw(p, mu, abs(nu), g, numbers, **settings)


CASES = (
    matmul, swiglu, by_head, decode_experts, cached_attention, write_rows, experts,
    causal_attention, adamw,
)  # fmt: skip


def outcome(case, *seed: int) -> str:
    """Call a kernel; exit at a fault. Returns: the checksum of its results, or "refused"."""
    draw = Draw(*seed)
    try:
        results = [np.asarray(x) for x in jax.tree.leaves(case(draw))]
    except jax.errors.JaxRuntimeError as error:
        return "refused" if draw.wrong else sys.exit(str(error))
    if draw.wrong:
        sys.exit("an index outside an array is not refused")
    if not all(np.isfinite(x).all() for x in results):
        sys.exit("a result is not finite")
    return str(zlib.crc32(b"".join(x.tobytes() for x in results)))


def call_kernels(kind: str, seconds: float, seed: int) -> None:
    """What a process under a sanitizer does: it prints a line for each call."""
    flags = (flag for flag in library.FLAGS if flag != "-O3")
    library.FLAGS = (*flags, *FLAGS, f"-fsanitize={kind}")
    if reason := library.why_not():
        sys.exit(reason)
    end = time.monotonic() + seconds
    for number in itertools.count():
        if time.monotonic() > end:
            break
        case = CASES[number % len(CASES)]
        print(number, case.__name__, end=" ", flush=True)
        print(outcome(case, seed, number), flush=True)


def main(seconds: float, seed: int) -> None:
    said = []
    for kind, (name, threads) in KINDS.items():
        paths = [
            subprocess.check_output([*shlex.split(COMPILER), f"-print-file-name={x}"], text=True)
            for x in (name, "libstdc++.so")
        ]
        preload = {"LD_PRELOAD": " ".join(map(str.strip, paths)), "NPROC": threads}
        environment = os.environ | ENVIRONMENT | preload
        starts = subprocess.run([sys.executable, "-c", ""], env=environment).returncode == 0
        if not (starts and os.path.isabs(paths[0])):
            print(f"sanitizers: {kind} is left out: this machine's compiler does not have it")
            continue

        words = [sys.executable, "-m", __spec__.name, str(seconds / len(KINDS)), str(seed), kind]
        with tempfile.TemporaryDirectory() as folder:  # for the library
            environment["XDG_CACHE_HOME"] = folder
            ended = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
        said.append(ended.stdout.splitlines())
        if ended.returncode:
            sys.exit(f"sanitizers: {kind}: a fault in call {said[-1][-1:]} of seed {seed}")
        print(f"sanitizers: {kind}: {len(said[-1])} calls, no fault")
    if other := [lines for lines in zip(*said, strict=False) if len(set(lines)) > 1]:
        sys.exit(f"sanitizers: results depend on the number of threads: {other[0]}, seed {seed}")


if __name__ == "__main__":
    seconds, seed, *kind = sys.argv[1:]
    if kind:
        call_kernels(*kind, float(seconds), int(seed))
    else:
        main(float(seconds), int(seed))
