"""Grouped SwiGLU in plain XLA loops for the CPU: over experts, and inside over blocks of rows, with its own gradient.

XLA's CPU backend multiplies every row with every expert in `ragged_dot`, and a batched product needs experts of equal
load. A loop does exactly the work there is. It copies one expert's three matrices out of the stack, then multiplies
blocks of that expert's rows, which stay in cache through the three products.

A loop writes whole blocks, even if an expert's last block reaches into the next expert's rows. Experts come in order,
so the next expert overwrites those rows. Arrays of sorted rows end in padding for the last expert.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.expert_stack import Experts, ExpertStack, GradCarry, mark_written, so_far
from dsv3_jax.ops.sort_by_expert import SortedRows, sort_by_expert
from dsv3_jax.ops.varying import varying, zeros


def blocks_swiglu(
    x: Float[Array, "n D"], expert_ids: Int[Array, "n K"], gates: Float[Array, "n K"], stack: ExpertStack
) -> tuple[Float[Array, "n D"], ExpertStack]:
    """Compute `ops.dispatch.grouped_swiglu` block by block. Arguments and results as there.

    Example:
        >>> one = jnp.ones((1, 2, 1, 1))  # one layer, two experts, D = F = 1
        >>> weights = Experts(9 * one, one / 9, jnp.array([[[[2.0]], [[5.0]]]]))  # on 1 they give 2 and 5: silu(9) is 9
        >>> stack = ExpertStack(weights, None, jnp.int32(0))
        >>> y, _ = blocks_swiglu(jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]]), stack)
        >>> round(float(y[0, 0]), 2)  # 0.9 · 5 + 0.1 · 2
        4.7
    """
    p = sort_by_expert(expert_ids, stack.num_experts)
    gates = gates.astype(x.dtype)
    if stack.grad is None:
        return _forward(x, gates, stack.weights, p, stack.layer, keep=False)[0], stack
    grad = stack.grad.consume()
    y, carry, written = _blocks(x, gates, stack.weights, grad.carry, grad.written, p, stack.layer)
    return y, ExpertStack(stack.weights, GradCarry(carry, written), stack.layer)


def block_sizes(rows: int, num_experts: int, dim: int, width: int) -> tuple[int, ...]:
    """Rows multiplied at a time: an expert's rows are cut into blocks of the first size, the rest into the last.

    Large blocks run near the GEMM peak, small ones waste fewer rows at an expert's end. A block should cost at least
    2^24 multiplications, or the loop's overhead shows, and hold at most half of an expert's mean rows.

    Example:
        >>> block_sizes(rows=8192, num_experts=16, dim=128, width=64)  # half of an expert's mean, and a quarter of it
        (256, 64)
    """
    mean = max(rows // num_experts, 1)
    first = min(2**24 // (dim * width), mean // 2)
    first = min(max(1 << max(first, 1).bit_length() - 1, 32), 1024)
    return (first, max(first // 4, 32)) if first > 32 else (32,)


@jax.custom_vjp
def _blocks(x, gates, weights, carry, written, p: SortedRows, layer):
    return _forward(x, gates, weights, p, layer, keep=False)[0], carry, written


def _fwd(x, gates, weights, carry, written, p, layer):
    y, kept = _forward(x, gates, weights, p, layer, keep=True)
    return (y, carry, written), (x, gates, weights, p, layer, kept)


def _forward(x, gates, weights: Experts, p: SortedRows, layer, keep: bool):
    num_experts, _, width = weights.w_gate.shape[1:]
    sizes = block_sizes(gates.size, num_experts, x.shape[1], width)
    tokens, row_gates = _sorted_rows(p, gates, sizes[0])
    out = zeros((tokens.shape[0], x.shape[1]), x)
    kept = tuple(zeros((tokens.shape[0], width), x) for _ in range(2)) if keep else ()

    def expert(e, carry):
        w_gate, w_up, w_down = (_expert(w, layer, e, x.dtype) for w in weights)

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
    return _gather_sum(out, p.row), kept


def _bwd(saved, cotangents):
    x, gates, weights, p, layer, (kept_a, kept_b) = saved
    dy, d_carry, d_written = cotangents
    layer = jnp.asarray(layer)  # under jax.checkpoint a constant comes back as a bare literal
    num_experts, dim, width = weights.w_gate.shape[1:]
    sizes = block_sizes(gates.size, num_experts, dim, width)
    tokens, row_gates = _sorted_rows(p, gates, sizes[0])
    # On a mesh that shards the batch further than the experts, each device has a part of this layer's gradient.
    summed_over = varying(x) - varying(d_carry.w_gate)
    frozen = d_carry.w_gate.shape[0] == 0  # see `expert_stack.open_stack`; the compiler drops what is not returned
    stack, index = d_carry, layer
    if apart := bool(summed_over) or frozen:
        stack = Experts(*(zeros((1, *d.shape[1:]), d, x) for d in d_carry))
        index = jnp.zeros_like(layer)

    def expert(e, carry):
        dx_rows, d_gates, stack = carry
        w_gate, w_up, w_down = (_expert(w, layer, e, x.dtype) for w in weights)

        def block(carry, row, left, size):
            dx_rows, d_gates, (dw_gate, dw_up, dw_down) = carry
            x_b, dy_b = (_take(r, _slice(tokens, row, size)) for r in (x, dy))
            a, b = _slice(kept_a, row, size), _slice(kept_b, row, size)
            # Rows of the next expert have weight 0 in this one's matrices.
            in_expert = jnp.arange(size, dtype=jnp.int32) < left
            g = jnp.where(in_expert, _slice(row_gates, row, size), 0)[:, None]
            sig = jax.nn.sigmoid(a)
            silu = a * sig
            d_h = dy_b @ w_down.T
            d_gates = _put(d_gates, (d_h * silu * b).sum(-1), row)
            d_h = d_h * g
            d_a, d_b = d_h * b * (sig + silu * (1 - sig)), d_h * silu
            x_t, h_t = _transposed(x_b), _transposed(silu * b * g)
            dw = (_add(dw_gate, x_t, d_a), _add(dw_up, x_t, d_b), _add(dw_down, h_t, dy_b))
            return _put(dx_rows, d_a @ w_gate.T + d_b @ w_up.T, row), d_gates, dw

        dw = tuple(_expert(d, index, e, d.dtype) for d in stack)
        if not apart:
            dw = tuple(so_far(d, d_written, layer) for d in dw)
        dx_rows, d_gates, dw = _for_blocks(p.starts[e], p.counts[e], sizes, block, (dx_rows, d_gates, dw))
        corner = _corner(index, e)
        stack = Experts(
            *(jax.lax.dynamic_update_slice(d, w[None, None], corner) for d, w in zip(stack, dw, strict=True))
        )
        return dx_rows, d_gates, stack

    start = (zeros((tokens.size, dim), x), zeros(row_gates.shape, x), stack)
    dx_rows, d_gates, stack = jax.lax.fori_loop(0, num_experts, expert, start)
    if frozen:
        stack = d_carry
    elif summed_over:
        stack = Experts(
            *(_add_layer(d, part, d_written, layer, summed_over) for d, part in zip(d_carry, stack, strict=True))
        )
    dx, d_gates = _gather_sum(dx_rows, p.row), _take(d_gates, p.row)
    return dx, d_gates, None, stack, mark_written(d_written, layer), None, None


_blocks.defvjp(_fwd, _bwd)


def _add_layer(stack, part, d_written, layer, axes):
    corner = _corner(layer, jnp.zeros_like(layer))
    before = so_far(jax.lax.dynamic_slice(stack, corner, part.shape), d_written, layer)
    return jax.lax.dynamic_update_slice(stack, jax.lax.psum(part, tuple(axes)) + before, corner)


def _sorted_rows(p: SortedRows, gates: Array, pad: int) -> tuple[Array, Array]:
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


def _gather_sum(rows: Array, row: Array) -> Array:
    """Σ_k rows[row[:, k]], added up as they are fetched, so that [n, K, D] never exists."""
    return sum(_take(rows, row[:, k]) for k in range(1, row.shape[1])) + _take(rows, row[:, 0])


def _transposed(x: Array) -> Array:
    """x.T, written out: XLA's CPU products are slower if a left side's summed axis is its first."""
    return jax.lax.optimization_barrier(x.T)


def _slice(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, 0)


def _put(x: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _add(total: Array, a: Array, b: Array) -> Array:
    return total + jnp.dot(a, b, preferred_element_type=total.dtype)


def _corner(layer: Array, e: Array) -> tuple[Array, ...]:
    return tuple(jnp.asarray(i, jnp.int32) for i in (layer, e, 0, 0))  # all of one type, with 64-bit types on too


def _expert(w: Array, layer: Array, e: Array, dtype) -> Array:
    one = jax.lax.dynamic_slice(w, _corner(layer, e), (1, 1, *w.shape[2:]))
    return one.reshape(w.shape[2:]).astype(dtype)
