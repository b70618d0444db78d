"""The CPU's grouped SwiGLU: a loop over experts, and inside it over blocks of rows, with its own gradient.

XLA's CPU backend multiplies every row with every expert in `ragged_dot`, and a batched product wants experts of
equal load. A loop does exactly the work there is: it copies one expert's three matrices out of the stack, then
multiplies blocks of that expert's rows, which stay in cache through the three products. In float32, where a compiler
is at hand, the native kernel does the same without the copies and the padding of blocks.

The loops write whole blocks, also where an expert's last block reaches into the next expert's rows: experts come
in order, so those rows are written again, rightly. Arrays of sorted rows end in padding for the last expert's.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.ops.sort_by_expert import Plan
from dsv3_jax.ops.varying import varying, zeros


def block_sizes(rows: int, num_experts: int, dim: int, width: int) -> tuple[int, ...]:
    """Rows multiplied at a time: an expert's rows are cut into blocks of the first size, the rest into the last.

    Large blocks run nearest the GEMM peak, small ones waste fewer rows at an expert's end. A block is to be worth
    some 2^24 multiplications, or a loop's own cost shows, and no longer than half an expert's mean rows.
    """
    mean = max(rows // num_experts, 1)
    first = min(2**24 // (dim * width), mean // 2)
    first = min(max(1 << max(first, 1).bit_length() - 1, 32), 1024)
    return (first, max(first // 4, 32)) if first > 32 else (32,)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def blocks_swiglu(x, gates, experts, thread, p: Plan, layer, once):
    """Σ_k gates_k FFN_k(x) with experts `[layer, e]` of a stack.

    Args:
        x: [n, D]. gates: [n, K] of x's dtype.
        experts: (w_gate, w_up [L, E, D, F], w_down [L, E, F, D]), read only.
        thread: the same, never read: its cotangent takes the experts' gradient (see dispatch.py).
        p: the sorted assignments. layer: int32 []. once: see dispatch.py.
    Returns: (y [n, D], thread).
    """
    return _forward(x, gates, experts, p, layer, keep=False)[0], thread


def _fwd(x, gates, experts, thread, p, layer, once):
    y, kept = _forward(x, gates, experts, p, layer, keep=True)
    return (y, thread), (x, gates, experts, p, layer, kept)


def _forward(x, gates, experts, p: Plan, layer, keep: bool):
    if calls.serves(x.dtype, gates.dtype, experts[0].dtype):
        y, *kept = calls.experts_swiglu(x, gates, p.order, p.place, p.counts, experts, layer, keep=keep)
        return y, tuple(kept)
    num_experts, _, width = experts[0].shape[1:]
    sizes = block_sizes(gates.size, num_experts, x.shape[1], width)
    tokens, row_gates = _sorted_rows(p, gates, sizes[0])
    out = zeros((tokens.shape[0], x.shape[1]), x)
    kept = tuple(zeros((tokens.shape[0], width), x) for _ in range(2)) if keep else ()

    def expert(e, carry):
        w_gate, w_up, w_down = (_expert(w, layer, e, x.dtype) for w in experts)

        def block(carry, row, left, size):
            out, kept = carry
            x_b = _take(x, _slice(tokens, row, size))
            a, b = x_b @ w_gate, x_b @ w_up
            h = jax.nn.silu(a) * b * _slice(row_gates, row, size)[:, None]
            if keep:
                kept = (_put(kept[0], a, row), _put(kept[1], b, row))
            return _put(out, h @ w_down, row), kept

        return _for_blocks(p.starts[e], p.counts[e], sizes, block, carry)

    out, kept = jax.lax.fori_loop(0, num_experts, expert, (out, kept))
    return _gather_sum(out, p.place), kept


def _bwd(once, saved, cotangents):
    x, gates, experts, p, layer, (kept_a, kept_b) = saved
    dy, d_thread = cotangents
    layer = jnp.asarray(layer)  # under jax.checkpoint a constant comes back as a bare literal
    if calls.serves(x.dtype, gates.dtype, experts[0].dtype):
        dx, d_gates, d_thread = calls.experts_swiglu_gradients(
            x, gates, p.order, p.place, p.counts, experts, layer, (kept_a, kept_b), dy, d_thread, once=once
        )
        return dx, d_gates, None, d_thread, None, None
    num_experts, dim, width = experts[0].shape[1:]
    sizes = block_sizes(gates.size, num_experts, dim, width)
    tokens, row_gates = _sorted_rows(p, gates, sizes[0])

    def expert(e, carry):
        dx_rows, d_gates, d_stack = carry
        w_gate, w_up, w_down = (_expert(w, layer, e, x.dtype) for w in experts)

        def block(carry, row, left, size):
            dx_rows, d_gates, (dw_gate, dw_up, dw_down) = carry
            x_b, dy_b = (_take(r, _slice(tokens, row, size)) for r in (x, dy))
            a, b = _slice(kept_a, row, size), _slice(kept_b, row, size)
            # Rows of the next expert weigh nothing in this one's matrices.
            mine = jnp.arange(size, dtype=jnp.int32) < left
            g = jnp.where(mine, _slice(row_gates, row, size), 0)[:, None]
            sig = jax.nn.sigmoid(a)
            silu = a * sig
            d_h = dy_b @ w_down.T
            d_gates = _put(d_gates, (d_h * silu * b).sum(-1), row)
            d_h = d_h * g
            d_a, d_b = d_h * b * (sig + silu * (1 - sig)), d_h * silu
            x_t, h_t = _transposed(x_b), _transposed(silu * b * g)
            dw = (_add(dw_gate, x_t, d_a), _add(dw_up, x_t, d_b), _add(dw_down, h_t, dy_b))
            return _put(dx_rows, d_a @ w_gate.T + d_b @ w_up.T, row), d_gates, dw

        dw = tuple(_expert(d, place, e, d.dtype) for d in d_stack)
        dx_rows, d_gates, dw = _for_blocks(p.starts[e], p.counts[e], sizes, block, (dx_rows, d_gates, dw))
        at = _place(place, e)
        d_stack = tuple(jax.lax.dynamic_update_slice(d, w[None, None], at) for d, w in zip(d_stack, dw, strict=True))
        return dx_rows, d_gates, d_stack

    # On a mesh that cuts the batch further than the experts, each device has a part of this layer's gradient.
    summed_over = varying(x) - varying(d_thread[0])
    whole, place = d_thread, layer
    if summed_over:
        d_thread, place = tuple(zeros((1, *d.shape[1:]), d, x) for d in whole), jnp.zeros_like(layer)
    start = (zeros((tokens.size, dim), x), zeros(row_gates.shape, x), d_thread)
    dx_rows, d_gates, d_thread = jax.lax.fori_loop(0, num_experts, expert, start)
    if summed_over:
        d_thread = tuple(_add_layer(d, part, layer, summed_over) for d, part in zip(whole, d_thread, strict=True))
    return _gather_sum(dx_rows, p.place), _take(d_gates, p.place), None, d_thread, None, None


blocks_swiglu.defvjp(_fwd, _bwd)


def _add_layer(stack, part, layer, axes):
    at = _place(layer, jnp.zeros_like(layer))
    part = jax.lax.psum(part, tuple(axes)) + jax.lax.dynamic_slice(stack, at, part.shape)
    return jax.lax.dynamic_update_slice(stack, part, at)


def _sorted_rows(p: Plan, gates: Array, pad: int) -> tuple[Array, Array]:
    """Token and gate of each sorted row, with `pad` more at the end."""
    tokens = jnp.pad(p.order // gates.shape[1], (0, pad))
    return tokens, jnp.pad(_take(gates.reshape(-1), p.order), (0, pad))


def _for_blocks(start, count, sizes, body, carry):
    """body(carry, first row, rows left, size) over the blocks of one expert."""
    for size in sizes:
        times = count // size if size != sizes[-1] else (count + size - 1) // size
        carry = jax.lax.fori_loop(
            0, times, lambda i, c, s=start, n=count, b=size: body(c, s + i * b, n - i * b, b), carry
        )
        start, count = start + times * size, count - times * size
    return carry


def _take(x: Array, rows: Array) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")


def _gather_sum(rows: Array, place: Array) -> Array:
    """Σ_k rows[place[:, k]]: added up as they are fetched, so that [n, K, D] never exists."""
    return sum(_take(rows, place[:, k]) for k in range(1, place.shape[1])) + _take(rows, place[:, 0])


def _transposed(x: Array) -> Array:
    """x.T, written out: XLA's CPU products are slower when a left side's summed axis is its first."""
    return jax.lax.optimization_barrier(x.T)


def _slice(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, 0)


def _put(x: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _add(total: Array, a: Array, b: Array) -> Array:
    return total + jnp.dot(a, b, preferred_element_type=total.dtype)


def _place(layer: Array, e: Array) -> tuple[Array, ...]:
    return tuple(jnp.asarray(i, jnp.int32) for i in (layer, e, 0, 0))  # all of one type, with 64-bit types on too


def _expert(w: Array, layer: Array, e: Array, dtype) -> Array:
    one = jax.lax.dynamic_slice(w, _place(layer, e), (1, 1, *w.shape[2:]))
    return one.reshape(w.shape[2:]).astype(dtype)
