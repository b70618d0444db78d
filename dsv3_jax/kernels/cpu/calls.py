"""The CPU's own kernels, in C++, where a compiler is at hand.

For decoding (few_rows.cc): XLA's products on the CPU read a buffer of their own: an expert out of the stack, or a part
of the cache, is copied before it is multiplied, by one thread, and with more rows it is copied once more, into the
product's own order. The kernels read weights and the cache once, as they lie, on all threads.

For training and prefill (experts.cc, attention.cc): XLA cuts each product for all threads, however small it is, and
pads an expert's last block. The kernels give a thread an expert, or a head, of its own, and multiply what rows it has.

They are compiled for this machine when they are first asked for, in some seconds, into the user's cache folder; JAX
calls them by its foreign function interface. Without a compiler, on accelerators, on a mesh and with DSV3_NATIVE=0 XLA
does the same.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

HERE = Path(__file__).parent
SOURCES = tuple(HERE / f"{name}.cc" for name in ("few_rows", "experts", "attention", "adamw"))
HEADERS = (HERE / "common.h", HERE / "gemm.h")
TARGETS = {
    "dsv3_few_rows_product": "Dsv3FewRowsProduct",
    "dsv3_few_rows_swiglu": "Dsv3FewRowsSwiglu",
    "dsv3_few_rows_by_heads": "Dsv3FewRowsByHeads",
    "dsv3_few_tokens_swiglu": "Dsv3FewTokensSwiglu",
    "dsv3_cached_attention": "Dsv3CachedAttention",
    "dsv3_experts_swiglu": "Dsv3ExpertsSwiglu",
    "dsv3_experts_swiglu_gradients": "Dsv3ExpertsSwigluGradients",
    "dsv3_room": "Dsv3Room",
    "dsv3_causal_attention": "Dsv3CausalAttention",
    "dsv3_causal_attention_gradients": "Dsv3CausalAttentionGradients",
    "dsv3_adamw": "Dsv3Adamw",
}
CACHE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")  # whose rows `cached_attention` reads
# Where the compiler chose what to fuse, a token's result would hang on how many stand beside it: the source says it.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
COMPILERS = ("c++", "g++", "clang++")


@cache
def why_not() -> str:
    """Why the kernels are not in use in this process, in words; empty where they are. The first call compiles them."""
    if os.environ.get("DSV3_NATIVE") == "0":
        return "DSV3_NATIVE is 0"
    if jax.default_backend() != "cpu":
        return f"the backend is {jax.default_backend()}, not cpu"
    compiler = os.environ.get("CXX") or next((c for c in COMPILERS if shutil.which(c)), None)
    if compiler is None:
        return f"there is no C++ compiler: {', '.join(COMPILERS)}"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except subprocess.CalledProcessError as error:
        said = next((line for line in error.stderr.splitlines() if "error" in line), f"exit code {error.returncode}")
        return f"{compiler} does not compile the kernels: {said.strip()}"
    except OSError as error:
        return f"the kernels cannot be compiled or loaded: {error}"
    for name, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return ""


def serves(*dtypes) -> bool:
    """Whether the kernels are there for arrays of these dtypes, here: float32, and no mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(d == jnp.float32 for d in dtypes) and (mesh.empty or mesh.size == 1) and not why_not()


def few_rows_product(x: Float[Array, "n D"], w: Float[Array, "D N"]) -> Float[Array, "n N"]:
    """x w in float32; a row's result does not hang on the other rows. Takes no gradient. Where `serves` says so."""
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return jax.ffi.ffi_call("dsv3_few_rows_product", shape)(x, w)


def few_rows_swiglu(
    x: Float[Array, "n D"], w_gate: Float[Array, "D F"], w_up: Float[Array, "D F"], w_down: Float[Array, "F D"]
) -> Float[Array, "n D"]:
    """(silu(x w_gate) ⊙ (x w_up)) w_down, likewise."""
    call = jax.ffi.ffi_call("dsv3_few_rows_swiglu", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, w_gate, w_up, w_down)


def few_rows_by_heads(x: Float[Array, "n H K"], w: Float[Array, "H _ _"], *, turned: bool) -> Float[Array, "n H N"]:
    """x[:, h] w[h] for each head h, w [H, K, N]; or x[:, h] w[h]ᵀ where it is `turned`, [H, N, K]; likewise."""
    shape = jax.ShapeDtypeStruct((*x.shape[:2], w.shape[1 if turned else 2]), x.dtype)
    return jax.ffi.ffi_call("dsv3_few_rows_by_heads", shape)(x, w, turned=turned)


def few_tokens_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "L E D F"],
    w_up: Float[Array, "L E D F"],
    w_down: Float[Array, "L E F D"],
    layer: Int[Array, ""],
) -> Float[Array, "n D"]:
    """Σ_k gates_k · (silu(x w_gate) ⊙ (x w_up)) w_down over the chosen experts of one layer, all in float32.

    A row's result does not hang on the other rows: it is the same to the last bit with one token or many, on one thread
    or many. Takes no gradient. To be called where `serves` says so.
    """
    call = jax.ffi.ffi_call("dsv3_few_tokens_swiglu", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, expert_ids, gates, w_gate, w_up, w_down, layer)


def cached_attention(
    q: Float[Array, "B G Q K"],
    rows: Shaped[Array, "L B G S X"],
    scales: Float[Array, "L B G S 2"] | None,
    layer: Int[Array, ""],
    last: Int[Array, "B Q"],
    *,
    values: tuple[int, int],
    first_part: int,
) -> Float[Array, "B G Q V"]:
    """softmax(q · keys) values over rows 0 … last of a cache, in float32; see `ops.cached_attention`.

    A query's result does not hang on the others. Takes no gradient.
    Args:
        q: scaled already. A row's key is its first K numbers.
        rows: of a dtype in CACHE_DTYPES. scales: of 8-bit rows, for the first `first_part` numbers and for the others.
        values: where in a row the value begins, and its width.
    """
    shape = jax.ShapeDtypeStruct((*q.shape[:3], values[1]), q.dtype)
    call = jax.ffi.ffi_call("dsv3_cached_attention", shape)
    scales = jnp.zeros((0,), jnp.float32) if scales is None else scales
    return call(q, rows, scales, layer, last, value_at=np.int64(values[0]), first_part=np.int64(first_part))


def experts_swiglu(
    x: Float[Array, "n D"],
    gates: Float[Array, "n K"],
    order: Int[Array, " rows"],
    place: Int[Array, "n K"],
    counts: Int[Array, " E"],
    experts: tuple[Array, Array, Array],
    layer: Int[Array, ""],
    *,
    keep: bool,
) -> tuple[Float[Array, "n D"], Float[Array, "kept F"], Float[Array, "kept F"]]:
    """Σ_k gates_k · (silu(x w_gate) ⊙ (x w_up)) w_down over the chosen experts of one layer, all in float32.

    Args:
        order, place, counts: the assignments in order of expert, see `ops.dispatch_plan.Plan`.
        experts: w_gate, w_up [L, E, D, F] and w_down [L, E, F, D].
        keep: x w_gate and x w_up of the sorted rows are wanted, for the gradient; if not they are empty.
    Takes no gradient of its own; see `experts_swiglu_gradients`. To be called where `serves` says so.
    """
    rows, (dim, width) = gates.size, experts[0].shape[2:]
    kept = jax.ShapeDtypeStruct((rows if keep else 0, width), x.dtype)
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype), kept, kept, jax.ShapeDtypeStruct((rows, dim), x.dtype))
    call = jax.ffi.ffi_call("dsv3_experts_swiglu", shapes)
    y, a, b, _ = call(x, gates, order, place, counts, *experts, layer)
    return y, a, b


def experts_swiglu_gradients(
    x: Float[Array, "n D"],
    gates: Float[Array, "n K"],
    order: Int[Array, " rows"],
    place: Int[Array, "n K"],
    counts: Int[Array, " E"],
    experts: tuple[Array, Array, Array],
    layer: Int[Array, ""],
    kept: tuple[Array, Array],
    dy: Float[Array, "n D"],
    so_far: tuple[Array, Array, Array],
    *,
    once: bool,
) -> tuple[Float[Array, "n D"], Float[Array, "n K"], tuple[Array, Array, Array]]:
    """The gradients of `experts_swiglu` for a result's gradient `dy`: in x, in the gates, and in the three stacks.

    Args:
        kept: what the forward pass kept.
        so_far: the stacks' gradient, to which the layer's is added in place.
        once: the layer's part of it is written over instead, whatever it holds.
    """
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, gates, *so_far)]
    shapes.append(jax.ShapeDtypeStruct((gates.size, x.shape[1]), x.dtype))
    call = jax.ffi.ffi_call("dsv3_experts_swiglu_gradients", shapes, input_output_aliases={12: 2, 13: 3, 14: 4})
    given = (x, gates, order, place, counts, *experts, layer, dy, *kept, *so_far)
    dx, d_gates, d_gate, d_up, d_down, _ = call(*given, once=once)
    return dx, d_gates, (d_gate, d_up, d_down)


def room(*like: Array) -> Sequence[Array]:
    """Arrays of those shapes and dtypes that hold anything: for what will be written over, in place of zeros."""
    return jax.ffi.ffi_call("dsv3_room", [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in like])()


def causal_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B T H K"], v: Float[Array, "B T H V"], segment_ids: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]:
    """softmax(q kᵀ, over earlier tokens of the same segment) v, and each query's log Σ exp, all in float32.

    Args: q, scaled already. Takes no gradient of its own; see `causal_attention_gradients`.
    """
    batch, length, heads, _ = q.shape
    shapes = (jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct((batch, heads, length), q.dtype))
    out, lse = jax.ffi.ffi_call("dsv3_causal_attention", shapes)(q, k, v, segment_ids)
    return out, lse


def causal_attention_gradients(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"],
    out: Float[Array, "B T H V"],
    lse: Float[Array, "B H T"],
    d_out: Float[Array, "B T H V"],
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H V"]]:
    """The gradients in q, k and v for `d_out`, that of `out`."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v)]
    call = jax.ffi.ffi_call("dsv3_causal_attention_gradients", shapes)
    dq, dk, dv = call(q, k, v, segment_ids, out, lse, d_out)
    return dq, dk, dv


def adamw(
    p: Float[Array, "*n"],
    mu: Float[Array, "*n"],
    nu: Float[Array, "*n"],
    g: Float[Array, "*n"],
    numbers: Float[Array, "5"],
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"], Float[Array, "*n"]]:
    """AdamW's step on one float32 array: (p, mu, nu), in their places where they are donated.

    Args: numbers, what g is multiplied by, 1 / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ), the learning rate, and 0 to change nothing.
    """
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (p, mu, nu)]
    call = jax.ffi.ffi_call("dsv3_adamw", shapes, input_output_aliases={0: 0, 1: 1, 2: 2})
    given = {"beta1": beta1, "beta2": beta2, "eps": eps, "decay": decay}
    p, mu, nu = call(p, mu, nu, g, numbers, **{name: np.float32(x) for name, x in given.items()})
    return p, mu, nu


def _compiled(compiler: str) -> Path:
    """The shared library for this source, JAX and processor. Raises: OSError or CalledProcessError."""
    include = jax.ffi.include_dir()
    sources = (path.read_text() for path in (*SOURCES, *HEADERS))
    said = (*sources, jaxlib.version.__version__, compiler, _processor(), *FLAGS)
    mark = hashlib.sha256("\0".join(said).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax"
    path = folder / f"kernels-{mark}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / path.name
        command = [compiler, *FLAGS, "-isystem", include, *map(str, SOURCES), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(path)  # whole or not at all, whoever else compiles it at the same time
    return path


def _processor() -> str:
    """What -march=native hangs on: a home folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return " ".join(os.uname())
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
