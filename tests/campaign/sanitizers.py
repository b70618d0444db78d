"""Call every C++ kernel with random shapes, compiled with the compiler's sanitizers.

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
from pathlib import Path

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
# XLA's threads wait for one another in ways that a sanitizer does not see. Of XLA it sees calls of
# memcpy, free and so on, which are libtsan's own.
SUPPRESSIONS = "race_top:libtsan.so\n"
ENVIRONMENT = {
    # GCC does not align the stack that the second option makes to registers (its bug 110027).
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # they would take most of the time
}


# The largest size of each letter. Sizes are mostly small, sometimes around a multiple of a register
# or a tile.
MOST = {"n": 100, "D": 300, "F": 600, "H": 20, "K": 4, "E": 16, "X": 130, "Y": 130}
MOST |= {"L": 3, "B": 3, "G": 3, "Q": 12, "S": 700, "T": 200, "P": 200_000}


class Draw:
    """Random sizes by letter, and arrays. `wrong` says whether an index is outside its array."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)
        self.sizes = {letter: self.size(most) for letter, most in MOST.items()}
        self.wrong = False

    def one_in(self, count: int) -> bool:
        return self.rng.integers(count) == 0

    def size(self, most: int) -> int:
        near = (8 << self.rng.integers(5)) + self.rng.integers(-1, 2)
        sizes = self.rng.integers(1, 10), near, self.rng.integers(1, most + 1)
        return int(min(most, self.rng.choice(sizes, p=(0.5, 0.3, 0.2))))

    def __call__(self, shapes: str) -> list[np.ndarray]:
        """Arrays of these shapes, as in "nD DF". One of 100 numbers is 0, and one is large."""
        arrays = []
        for letters in shapes.split():
            shape = [self.sizes[letter] for letter in letters]
            factors = self.rng.choice([0, 30, 1], shape, p=(0.01, 0.01, 0.98))
            arrays.append((factors * self.rng.normal(0, 0.2, shape)).astype(np.float32))
        return arrays

    def ids(self, letters: str, below: int) -> np.ndarray:
        shape = [self.sizes[letter] for letter in letters]
        return self.damaged(self.rng.integers(0, below, shape, np.int32), below)

    def damaged(self, ids: np.ndarray, below: int) -> np.ndarray:
        """Sometimes put one index outside of 0 … below - 1."""
        if ids.size and self.one_in(10):
            ids.flat[self.rng.integers(ids.size)] = self.rng.choice([-1, below])
            self.wrong = True
        return ids


def products(draw: Draw):
    if draw.one_in(2):  # enough to read that threads share it
        draw.sizes |= {"D": 300, "F": 600}
    yield calls.small_batch_matmul(*draw("nD DF"))
    yield calls.small_batch_swiglu(*draw("nD DF DF FD"))
    yield calls.small_batch_by_head(*draw("nHX HXY"), transposed=False)
    yield calls.small_batch_by_head(*draw("nHX HYX"), transposed=True)


def decode_experts(draw: Draw):
    ids = draw.ids("nK", below=draw.sizes["E"])
    x, gates, *weights = draw("nX nK EXY EXY EYX")
    yield calls.decode_experts(x, ids, gates, *weights)


def cached_attention(draw: Draw):
    dtype = jax.numpy.dtype(draw.rng.choice(calls.CACHE_DTYPES))

    def stored(width: str) -> Stored:
        rows, scales = draw(f"BGS{width} BGSL")
        if dtype.itemsize > 1:
            return Stored(rows.astype(dtype), None)
        draw.wrong |= (no_scales := draw.one_in(10))
        return Stored(np.rint(5 * rows).astype(dtype), None if no_scales else scales[..., :1])

    values = jax.device_put(stored("X"))  # often the first keys, too: then in one buffer
    keys = [stored("Y") if draw.one_in(3) else values]
    keys += [stored(draw.rng.choice(["X", "Y"])) for _ in range(draw.rng.integers(0, 3))]
    q = [draw("BGQ" + "XY"[key.rows.shape[-1] != draw.sizes["X"]])[0] for key in keys]
    q = [array[..., : draw.rng.integers(1, array.shape[-1] + 1)] for array in q]
    last = draw.ids("BQ", below=draw.sizes["S"])
    yield jax.jit(partial(calls.cached_attention, scale=0.5))(q, keys, values, last)


def write_rows(draw: Draw):
    draw.sizes["S"] += draw.sizes["T"]
    first = draw.rng.integers(-2, draw.sizes["S"] + 2, draw.sizes["B"], np.int32)  # is clamped
    layer = draw.ids("", below=draw.sizes["L"])
    yield calls.write_rows(draw("LBGSX LBGSY"), draw("BGTX BGTY"), layer, first)


def experts(draw: Draw):
    tokens, choices, count = (draw.sizes[letter] for letter in "nKE")
    ids = draw.rng.integers(0, 1 if draw.one_in(4) else count, tokens * choices)
    order = np.argsort(ids, stable=True).astype(np.int32)
    row = np.argsort(order).astype(np.int32).reshape(tokens, choices)
    counts = np.bincount(ids, minlength=count).astype(np.int32)
    if draw.one_in(10):
        counts[0] += 1
        draw.wrong = True
    places = SortedRows(draw.damaged(order, ids.size), draw.damaged(row, ids.size), counts, counts)

    x, dy, gates, *weights = draw("nX nX nK EXY EXY EYX")
    kept = [draw("nY")[0].repeat(choices, axis=0) for _ in range(2)]
    yield calls.experts_swiglu(x, gates, places, weights, keep=draw.one_in(2))
    frozen = draw.one_in(4)
    yield calls.experts_swiglu_gradients(x, gates, places, weights, kept, dy, frozen=frozen)


def causal_attention(draw: Draw):
    q, k, v, d_out = draw("BTGX BTGX BTGY BTGY")
    segments = np.cumsum(draw.rng.integers(0, 16, q.shape[:2]) == 0, axis=1, dtype=np.int32)
    out, lse, largest = calls.causal_attention(q, k, v, segments)
    yield out, lse, largest
    yield calls.causal_attention_gradients(q, k, v, segments, out, lse, d_out)


def adamw(draw: Draw):
    p, mu, nu, g = draw("P P P P")
    numbers = np.array([0.5, 1.2, 1.1, 1e-3, not draw.one_in(5)], np.float32)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "decay": 0.1}
    yield calls.adamw(p, mu, abs(nu), g, numbers, **settings)


CASES = (
    products, decode_experts, cached_attention, write_rows, experts, causal_attention, adamw,
)  # fmt: skip


def outcome(case, *seed: int) -> str:
    """Call kernels; exit at a fault. Returns: the checksum of their results, or "refused"."""
    draw = Draw(*seed)
    if draw.one_in(10):
        draw.sizes |= dict.fromkeys("nBP", 0)
    try:
        results = [np.asarray(x) for x in jax.tree.leaves(list(case(draw)))]
    except jax.errors.JaxRuntimeError as error:
        return "refused" if draw.wrong else sys.exit(str(error))
    if draw.wrong and sum(x.size for x in results):  # XLA leaves out calls with empty results
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
            Path(folder, "suppressions").write_text(SUPPRESSIONS)
            environment["TSAN_OPTIONS"] = f"halt_on_error=1:suppressions={folder}/suppressions"
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
