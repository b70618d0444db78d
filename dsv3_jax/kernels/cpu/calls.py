"""The C++ kernels as Python functions, one for each, through JAX's foreign function interface.

Decoding (small_batch.cc). XLA's products on the CPU need contiguous operands. One thread copies a
slice of a stack or of the cache before it is multiplied, and for more than one row copies it again
in another layout. The kernels read weights and cache once, in place, on all threads.

Training and prefill (experts.cc, attention.cc). XLA splits every product over all threads, however
small it is, and pads an expert's last block. The kernels give each thread an expert or a head, and
multiply only rows that exist.

Optimizer (adamw.cc). The kernel updates a parameter and its two means in one pass, in place.

All arrays are float32 on one device but the cache's, indices int32. Call `library.why_not()` first;
it must return "".
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import check_shapes
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.sort_by_expert import SortedRows

# dtypes of the rows that the kernels read and write
CACHE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")


def small_batch_matmul(x: Float[Array, "n D"], w: Float[Array, "D N"]) -> Float[Array, "n N"]:
    """Compute x w. A row's result does not depend on the other rows.

    Takes no gradient.
    """
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return jax.ffi.ffi_call("dsv3_small_batch_matmul", shape)(x, w)


def small_batch_swiglu(
    x: Float[Array, "n D"],
    w_gate: Float[Array, "D F"],
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
) -> Float[Array, "n D"]:
    """Compute (silu(x w_gate) ⊙ (x w_up)) w_down. A row's result does not depend on the other rows.

    Takes no gradient.
    """
    call = jax.ffi.ffi_call("dsv3_small_batch_swiglu", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, w_gate, w_up, w_down)


def small_batch_by_head(
    x: Float[Array, "n H K"], w: Float[Array, "H _ _"], *, transposed: bool
) -> Float[Array, "n H N"]:
    """Compute x[:, h] w[h] for each head h, with w [H, K, N].

    If `transposed`, compute x[:, h] w[h]ᵀ with w [H, N, K]. Takes no gradient.
    """
    shape = jax.ShapeDtypeStruct((*x.shape[:2], w.shape[1 if transposed else 2]), x.dtype)
    return jax.ffi.ffi_call("dsv3_small_batch_by_head", shape)(x, w, transposed=transposed)


def decode_experts(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
) -> Float[Array, "n D"]:
    """Compute Σ_k gates_k · (silu(x w_gate) ⊙ (x w_up)) w_down over the chosen experts.

    A row's result does not depend on the other rows or on the number of threads, to the last bit.
    Takes no gradient.

    Args:
        x: tokens.
        expert_ids: the chosen experts, each in 0 … E - 1.
        gates: their weights.
    """
    call = jax.ffi.ffi_call("dsv3_decode_experts", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, expert_ids, gates, w_gate, w_up, w_down)


def cached_attention(
    queries: Sequence[Float[Array, "B G Q _"]],
    keys: Sequence[Stored],
    values: Stored,
    last: Int[Array, "B Q"],
    *,
    scale: float,
) -> Float[Array, "B G Q V"]:
    """Compute `ops.cached_attention.cached_attention` with float32 queries.

    A query's result does not depend on the other queries. Takes no gradient.

    Args:
        queries: for each array of keys; a row's key is its first numbers.
        keys, values: in dtypes from CACHE_DTYPES. An array that has both is read once.
        last: in 0 … S - 1.
    """

    def arrays(stored: Stored) -> tuple[Array, Array]:
        # As the cache has them, with an axis of layers: to take it away XLA copies 8-bit floats.
        if stored.scales is None:
            return stored.rows[None], jnp.zeros((0,), jnp.float32)
        return stored.rows[None], stored.scales[None]

    # Values, the last rows, then queries and keys of each array in turn.
    given = [*arrays(values), last]
    for q, key in zip(queries, keys, strict=True):
        if q.shape[-1] > key.rows.shape[-1]:
            raise ValueError(f"queries of shape {q.shape} are wider than rows {key.rows.shape}")
        given += [q, *arrays(key)]

    width = values.rows.shape[-1]
    shape = jax.ShapeDtypeStruct((*queries[0].shape[:3], width), queries[0].dtype)
    call = jax.ffi.ffi_call("dsv3_cached_attention", shape)
    return call(*given, scale=np.float32(scale))


def write_rows(stored: Any, new: Any, layer: Int[Array, ""], first: Int[Array, " B"]) -> Any:
    """Compute `ops.cached_attention.write_rows`, in place if arrays are donated or a loop's.

    XLA would fuse the update of a single row with each of its readers, and copy all slots for each
    of them. It would update 8-bit floats by way of float16, all slots of them.
    """
    arrays, tree = jax.tree.flatten(stored)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    in_place = {2 + i: i for i in range(len(arrays))}
    call = jax.ffi.ffi_call("dsv3_write_rows", shapes, input_output_aliases=in_place)
    written = call(jnp.asarray(layer, jnp.int32), first, *arrays, *jax.tree.leaves(new))
    return jax.tree.unflatten(tree, written)


def experts_swiglu(
    x: Float[Array, "n D"],
    gates: Float[Array, "n K"],
    p: SortedRows,
    experts: tuple[Array, Array, Array],
    *,
    keep: bool,
) -> tuple[Float[Array, "n D"], Float[Array, "kept F"], Float[Array, "kept F"]]:
    """Compute Σ_k gates_k · (silu(x w_gate) ⊙ (x w_up)) w_down over the chosen experts.

    Takes no gradient; see `experts_swiglu_gradients`.

    Args:
        x: tokens.
        gates: weight of each assignment.
        p: the assignments sorted by expert.
        experts: w_gate [E, D, F], w_up [E, D, F] and w_down [E, F, D].
        keep: return x w_gate and x w_up of the sorted rows, which the gradient needs. Otherwise
            these two are [0, F].
    Returns: (y, x w_gate, x w_up).
    """
    rows = gates.size
    _, dim, width = experts[0].shape
    y = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kept = jax.ShapeDtypeStruct((rows if keep else 0, width), x.dtype)
    scratch = jax.ShapeDtypeStruct((rows, dim), x.dtype)

    call = jax.ffi.ffi_call("dsv3_experts_swiglu", (y, kept, kept, scratch))
    y, a, b, _ = call(x, gates, p.order, p.row, p.counts, *experts)
    return y, a, b


def experts_swiglu_gradients(
    x: Float[Array, "n D"],
    gates: Float[Array, "n K"],
    p: SortedRows,
    experts: tuple[Array, Array, Array],
    kept: tuple[Array, Array],
    dy: Float[Array, "n D"],
    *,
    frozen: bool,
) -> tuple[Float[Array, "n D"], Float[Array, "n K"], tuple[Array, Array, Array]]:
    """Compute the gradients of `experts_swiglu` with respect to x, the gates and the experts.

    Args:
        x, gates, p, experts: as in `experts_swiglu`.
        kept: x w_gate and x w_up from the forward pass, [n K, F] each.
        dy: gradient of the result y.
        frozen: the experts' gradients are not computed, and are returned empty, [0, …].
    Returns: (dx, d_gates, the gradients of the experts).
    """
    of_tokens = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, gates)]
    of_experts = [
        jax.ShapeDtypeStruct((0 if frozen else w.shape[0], *w.shape[1:]), w.dtype) for w in experts
    ]
    scratch = jax.ShapeDtypeStruct((gates.size, x.shape[1]), x.dtype)

    shapes = [*of_tokens, *of_experts, scratch]
    call = jax.ffi.ffi_call("dsv3_experts_swiglu_gradients", shapes)
    dx, d_gates, d_gate, d_up, d_down, _ = call(
        x, gates, p.order, p.row, p.counts, *experts, dy, *kept
    )
    return dx, d_gates, (d_gate, d_up, d_down)


def causal_attention(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T H X"],
    v: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"], Float[Array, "B H T"]]:
    """Compute softmax(q kᵀ) v over the tokens of the same segment up to each query.

    Takes no gradient; see `causal_attention_gradients`.

    Args: q: scaled queries; k, v: keys and values; segment_ids: int32.
    Returns: (the output, log Σ exp of each query's scores, each query's largest score).
    """
    check_shapes("attention", {"k": k, "v": v}, {"k": q.shape, "v": (*q.shape[:3], v.shape[-1])})
    batch, length, heads, _ = q.shape
    by_query = jax.ShapeDtypeStruct((batch, heads, length), q.dtype)
    call = jax.ffi.ffi_call(
        "dsv3_causal_attention", (jax.ShapeDtypeStruct(v.shape, v.dtype), by_query, by_query)
    )
    out, lse, largest = call(q, k, v, segment_ids)
    return out, lse, largest


def causal_attention_gradients(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T H X"],
    v: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"],
    out: Float[Array, "B T H V"],
    lse: Float[Array, "B H T"],
    d_out: Float[Array, "B T H V"],
) -> tuple[Float[Array, "B T H X"], Float[Array, "B T H X"], Float[Array, "B T H V"]]:
    """Compute the gradients of `causal_attention` with respect to q, k and v.

    Args: q, k, v, segment_ids: its arguments; out, lse: its results; d_out: gradient of `out`.
    Returns: (dq, dk, dv).
    """
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
    betas: tuple[float, float],
    eps: float,
    decay: float,
) -> tuple[Float[Array, "*n"], Float[Array, "*n"], Float[Array, "*n"]]:
    """Take one step of AdamW on one array, in place if the arrays are donated; see `ops.adamw`.

    Args:
        p, mu, nu, g: parameter, running means of the gradient and of its square, gradient.
        numbers: factor of g, 1 / (1 − β₁ᵗ), 1 / (1 − β₂ᵗ), the learning rate, and a flag: 0 changes
            nothing.
        betas, eps, decay: AdamW's settings.
    Returns: (p, mu, nu).
    """
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (p, mu, nu)]
    call = jax.ffi.ffi_call("dsv3_adamw", shapes, input_output_aliases={0: 0, 1: 1, 2: 2})
    settings = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "decay": decay}
    p, mu, nu = call(p, mu, nu, g, numbers, **{name: np.float32(x) for name, x in settings.items()})
    return p, mu, nu
