"""Grouped SwiGLU in XLA loops for the CPU: over experts and their blocks of rows; its own gradient.

XLA's CPU backend multiplies every row with every expert in `ragged_dot`, and a batched product
needs experts of equal load. A loop does exactly the work there is. It copies one expert's three
matrices, then multiplies blocks of that expert's rows, which stay in cache through the three
products.

A loop writes whole blocks, even if an expert's last block reaches into the next expert's rows.
Experts come in order, so the next expert overwrites those rows. Arrays of sorted rows end in
padding for the last expert.

Letters, beside those of reference.py: n tokens, r rows of a block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.dispatch import take
from dsv3_jax.ops.sort_by_expert import SortedRows, sort_by_expert
from dsv3_jax.ops.varying import zeros


def grouped_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    **settings: Any,
) -> Float[Array, "n D"]:
    """Compute `ops.dispatch.grouped_swiglu` block by block; its settings change nothing here.

    Example:
        >>> one = jnp.ones((2, 1, 1))  # two experts, D = F = 1
        >>> weights = 9 * one, one / 9, jnp.array([[[2.0]], [[5.0]]])  # of 1: 2, 5; silu(9) is 9
        >>> x, ids, gates = jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]])
        >>> y = jax.jit(grouped_swiglu)(x, ids, gates, *weights)
        >>> round(float(y[0, 0]), 2)  # 0.9 · 5 + 0.1 · 2
        4.7
    """
    p = sort_by_expert(expert_ids, w_gate.shape[0])
    return _blocks(x, gates.astype(x.dtype), (w_gate, w_up, w_down), p)


def block_sizes(rows: int, num_experts: int, dim: int, width: int) -> tuple[int, ...]:
    """Rows multiplied at a time: an expert's blocks have the first size, its rest the last.

    Large blocks run near the GEMM peak, small ones waste fewer rows at an expert's end. A block
    should cost at least 2^24 multiplications, or the loop's overhead shows, and hold at most half
    of an expert's mean rows.

    Example:
        >>> block_sizes(rows=8192, num_experts=16, dim=128, width=64)  # 512 an expert, in the mean
        (256, 64)
    """
    mean = max(rows // num_experts, 1)
    first = min(2**24 // (dim * width), mean // 2)
    first = min(max(1 << max(first, 1).bit_length() - 1, 32), 1024)
    return (first, max(first // 4, 32)) if first > 32 else (32,)


@jax.custom_vjp
def _blocks(x, gates, weights, p: SortedRows):
    return _forward(x, gates, weights, p, keep=False)[0]


def _fwd(x, gates, weights, p):
    y, kept = _forward(x, gates, weights, p, keep=True)
    return y, (x, gates, weights, p, kept)


def _forward(x, gates, weights, p: SortedRows, keep: bool):
    num_experts, dim, width = weights[0].shape
    sizes = block_sizes(gates.size, num_experts, dim, width)
    tokens, row_gates = _sorted_rows(p, gates, sizes[0])
    rows = tokens.size

    def expert(e, carry):
        w_gate, w_up, w_down = (_expert(w, e, x.dtype) for w in weights)

        # One SwiGLU of r rows.
        def block(carry, row, left, size):
            out, kept = carry
            x_rD = take(x, _slice(tokens, row, size))
            a_rF = x_rD @ w_gate
            b_rF = x_rD @ w_up
            h_rF = jax.nn.silu(a_rF) * b_rF * _slice(row_gates, row, size)[:, None]
            if keep:
                kept = (_put(kept[0], a_rF, row), _put(kept[1], b_rF, row))
            return _put(out, h_rF @ w_down, row), kept

        return _for_blocks(p.starts[e], p.counts[e], sizes, block, carry)

    out = zeros((rows, dim), x)
    kept = tuple(zeros((rows, width), x) for _ in range(2)) if keep else ()
    out, kept = jax.lax.fori_loop(0, num_experts, expert, (out, kept))
    return _gather_sum(out, p.row), kept


def _bwd(saved, dy):
    x, gates, weights, p, (kept_a, kept_b) = saved
    num_experts, dim, width = weights[0].shape
    sizes = block_sizes(gates.size, num_experts, dim, width)
    tokens, row_gates = _sorted_rows(p, gates, sizes[0])

    def expert(e, carry):
        dx_rows, d_gates, d_weights = carry
        w_gate, w_up, w_down = (_expert(w, e, x.dtype) for w in weights)

        def block(carry, row, left, size):
            dx_rows, d_gates, (dw_gate, dw_up, dw_down) = carry
            x_rD, dy_rD = (take(r, _slice(tokens, row, size)) for r in (x, dy))
            a_rF, b_rF = (_slice(kept, row, size) for kept in (kept_a, kept_b))

            # Rows of the next expert have weight 0 in this one's matrices.
            in_expert = jnp.arange(size, dtype=jnp.int32) < left
            gate_r1 = jnp.where(in_expert, _slice(row_gates, row, size), 0)[:, None]

            # The gates' gradient, before the gate weights that of the hidden units.
            sig_rF = jax.nn.sigmoid(a_rF)
            silu_rF = a_rF * sig_rF
            dh_rF = dy_rD @ w_down.T
            d_gates = _put(d_gates, (dh_rF * silu_rF * b_rF).sum(-1), row)

            # Back through silu(a) ⊙ b, to the rows.
            dh_rF = dh_rF * gate_r1
            da_rF = dh_rF * b_rF * (sig_rF + silu_rF * (1 - sig_rF))
            db_rF = dh_rF * silu_rF
            dx_rows = _put(dx_rows, da_rF @ w_gate.T + db_rF @ w_up.T, row)

            # To the expert's matrices, which add up over its blocks.
            x_Dr = _transposed(x_rD)
            h_Fr = _transposed(silu_rF * b_rF * gate_r1)
            dw_gate = _add(dw_gate, x_Dr, da_rF)
            dw_up = _add(dw_up, x_Dr, db_rF)
            dw_down = _add(dw_down, h_Fr, dy_rD)
            return dx_rows, d_gates, (dw_gate, dw_up, dw_down)

        dw = tuple(zeros(d.shape[1:], d, x) for d in d_weights)
        dx_rows, d_gates, dw = _for_blocks(
            p.starts[e], p.counts[e], sizes, block, (dx_rows, d_gates, dw)
        )
        d_weights = tuple(_put(d, w[None], e) for d, w in zip(d_weights, dw, strict=True))
        return dx_rows, d_gates, d_weights

    start = (
        zeros((tokens.size, dim), x),
        zeros(row_gates.shape, x),
        tuple(zeros(w.shape, w, x) for w in weights),
    )
    dx_rows, d_gates, d_weights = jax.lax.fori_loop(0, num_experts, expert, start)
    return _gather_sum(dx_rows, p.row), take(d_gates, p.row), d_weights, None


_blocks.defvjp(_fwd, _bwd)


def _sorted_rows(p: SortedRows, gates: Array, pad: int) -> tuple[Array, Array]:
    """Token and gate of each sorted row, with `pad` more at the end."""
    tokens = jnp.pad(p.order // gates.shape[1], (0, pad))
    return tokens, jnp.pad(take(gates.reshape(-1), p.order), (0, pad))


def _for_blocks(start, count, sizes, body, carry):
    """body(carry, first row, rows left, size) over the blocks of one expert."""
    for size in sizes:
        times = count // size if size != sizes[-1] else (count + size - 1) // size

        def visit(i, carry, start=start, count=count, size=size):
            return body(carry, start + i * size, count - i * size, size)

        carry = jax.lax.fori_loop(0, times, visit, carry)
        start = start + times * size
        count = count - times * size
    return carry


def _gather_sum(rows: Array, row: Array) -> Array:
    """Σ_k rows[row[:, k]], added up as they are fetched, so that [n, K, D] never exists."""
    others = sum(take(rows, row[:, k]) for k in range(1, row.shape[1]))
    return others + take(rows, row[:, 0])


def _transposed(x: Array) -> Array:
    """x.T, written out: XLA's CPU products are slower if a left side's summed axis is its first."""
    return jax.lax.optimization_barrier(x.T)


def _slice(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, 0)


def _put(x: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _add(total: Array, a: Array, b: Array) -> Array:
    return total + jnp.dot(a, b, preferred_element_type=total.dtype)


def _expert(w: Array, e: Array, dtype) -> Array:
    return jax.lax.dynamic_index_in_dim(w, e, 0, keepdims=False).astype(dtype)
