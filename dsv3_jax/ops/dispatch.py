"""Tokens to their experts and back: y_t = Σ_k g_tk FFN_{e_tk}(x_t).

Assignments (token, choice) are sorted by expert, so each expert's rows are contiguous. Every expert
runs one SwiGLU over its rows. The results return by the inverse permutation and are summed over a
token's choices. No token is dropped, except by `capacity_swiglu`, which is there to compare.

    grouped_swiglu sorted rows, two grouped products (see grouped_product.py), any number of tokens
    dense_swiglu   every expert on every token, weighted by the gates: the oracle, and the field's
                   starting point
    decode_experts a loop over the chosen experts alone, for a few tokens on a CPU
    decode_by_row  no loop: each assignment's sums read its expert's weights; a few tokens on a GPU
    capacity       GShard's and Switch's, which drops what overflows

Tokens are fetched by their rows and rows by their tokens, forward and backward. Nothing is
scattered, so no two additions meet in an order that changes from run to run.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.grouped_product import RAGGED_DOT, GroupedProduct, wide
from dsv3_jax.ops.sort_by_expert import SortedRows, count_by_expert, sort_by_expert
from dsv3_jax.ops.varying import zeros

# assignments for each expert up to which `decode_experts` is faster: reading weights is the cost
FEW_CHOICES = 32


def dense_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    **settings: Any,
) -> Float[Array, "n D"]:
    """Run every expert on every token, weighted by the gates.

    Args: as `grouped_swiglu`; its settings change nothing here. Returns: likewise.

    Example:
        >>> one = jnp.ones((2, 1, 1))  # two experts, D = F = 1
        >>> weights = 9 * one, one / 9, jnp.array([[[2.0]], [[5.0]]])  # of 1: 2, 5; silu(9) is 9
        >>> x, ids, gates = jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]])
        >>> dense_swiglu(x, ids, gates, *weights).round(2)
        Array([[4.7]], dtype=float32)
    """
    w_gate, w_up, w_down = (w.astype(x.dtype) for w in (w_gate, w_up, w_down))
    hot = jax.nn.one_hot(expert_ids, w_gate.shape[0], dtype=x.dtype)
    weight = jnp.einsum("nke,nk->ne", hot, gates.astype(x.dtype))
    h = jax.nn.silu(jnp.einsum("nd,edf->nef", x, w_gate)) * jnp.einsum("nd,edf->nef", x, w_up)
    return jnp.einsum("nef,efd,ne->nd", h, w_down, weight)


def grouped_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    *,
    product: GroupedProduct = RAGGED_DOT,
    rows: int | None = None,
    turned: tuple[Array, Array, Array] | None = None,
    complete: bool = False,
) -> Float[Array, "n D"]:
    """Compute Σ_k gates_k · (silu(x w_gate) ⊙ (x w_up)) w_down over the chosen experts.

    Sums over D, F and K are accumulated in float32. The gradient keeps a = x w_gate and b = x w_up,
    and nothing else of the rows' size. The experts' gradients have the dtype of the experts.

    Args:
        x: tokens.
        expert_ids, gates: the router's choice; gates are cast to x's dtype. An id of E counts as no
            expert.
        w_gate, w_up, w_down: the experts' matrices, cast to x's dtype for use.
        product: the backend of the grouped products.
        rows: choices that name an expert, at most: the arrays have so many rows. None means all,
            n·K.
        turned: the three transposed in x's dtype, for a backend whose `dx` would transpose them;
            they take no gradient.
        complete: every id names an expert, so that no row must be masked.

    Example:
        >>> one = jnp.ones((2, 1, 1))  # two experts, D = F = 1
        >>> weights = 9 * one, one / 9, jnp.array([[[2.0]], [[5.0]]])  # of 1: 2, 5; silu(9) is 9
        >>> x, ids, gates = jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]])
        >>> grouped_swiglu(x, ids, gates, *weights).round(2)
        Array([[4.7]], dtype=float32)
    """
    p = product.sort(expert_ids, w_gate.shape[0])
    p = p._replace(order=p.order[:rows])  # choices of no expert come last
    complete = complete and rows is None and p.order.size % product.row_multiple == 0
    return _grouped(product, complete, x, gates.astype(x.dtype), (w_gate, w_up, w_down), turned, p)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(product, complete, x, gates, weights, turned, p: SortedRows):
    return _forward(product, complete, x, gates, weights, p)[0]


def _grouped_fwd(product, complete, x, gates, weights, turned, p):
    y, inner = _forward(product, complete, x, gates, weights, p)
    return y, (x, gates, weights, turned, p, inner)


class _Rows(NamedTuple):
    """The sorted rows of a call, padded to what the backend wants."""

    token: Array  # int32 [m]
    gate: Array  # float32 [m, 1]
    # bool [m, 1]: not padding, and of an expert that is here; None: all are
    in_expert: Array | None


def _sorted_rows(product: GroupedProduct, complete: bool, gates: Array, p: SortedRows) -> _Rows:
    pad = -p.order.size % product.row_multiple
    order = jnp.pad(p.order, (0, pad))
    in_expert = None if complete else (jnp.arange(order.size, dtype=jnp.int32) < p.total)[:, None]
    gate = _take(gates.reshape(-1), order).astype(wide(gates.dtype))
    return _Rows(order // gates.shape[1], gate[:, None], in_expert)


def _forward(
    product, complete, x, gates, weights, p: SortedRows
) -> tuple[Array, tuple[Array, ...]]:
    """(y, what the products before silu gave)."""
    w_gate, w_up, w_down = _matrices(product, weights, x.dtype)
    rows = _sorted_rows(product, complete, gates, p)
    x_rows = _take(x, rows.token)
    inner = tuple(product.forward(x_rows, w, p.counts) for w in (w_gate, w_up))
    a, b = (part.astype(wide(part.dtype)) for part in inner)
    h = _rounded(jax.nn.silu(a) * b * rows.gate, rows, x.dtype)
    return _sum_choices((product.forward(h, w_down, p.counts),), p, complete), inner


def _grouped_bwd(product, complete, saved, dy):
    x, gates, weights, turned, p, inner = saved
    back = product.dx if turned is None else product.forward
    w_gate, w_up, w_down = _matrices(product, weights, x.dtype) if turned is None else turned
    rows = _sorted_rows(product, complete, gates, p)
    x_rows, dy_rows = _take(x, rows.token), _take(dy, rows.token)
    a, b = (part.astype(wide(part.dtype)) for part in inner)
    sig = jax.nn.sigmoid(a)
    silu = a * sig
    h = _rounded(silu * b * rows.gate, rows, x.dtype)
    d_h = back(dy_rows, w_down, p.counts).astype(a.dtype)
    # Else XLA sums again what it has, in the fusion that adds these to the router's gradient.
    d_gates = jax.lax.optimization_barrier((d_h * silu * b).sum(-1))
    d_h = d_h * rows.gate
    d_inner = [_rounded(d, rows, x.dtype) for d in (d_h * b * (sig + silu * (1 - sig)), d_h * silu)]
    dx = tuple(back(d, w, p.counts) for d, w in zip(d_inner, (w_gate, w_up), strict=True))
    dw = (
        *(product.dw(x_rows, d, p.counts, weights[0].dtype) for d in d_inner),
        product.dw(h, dy_rows, p.counts, weights[2].dtype),
    )
    d_gates = _or_zero(
        None if complete else p.row < p.total, _take(d_gates, jnp.minimum(p.row, d_gates.size - 1))
    )
    return _sum_choices(dx, p, complete), d_gates.astype(gates.dtype), dw, None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _matrices(product: GroupedProduct, weights: tuple[Array, ...], dtype: Any) -> tuple[Array, ...]:
    """w_gate, w_up and w_down as the backend takes them."""
    return tuple(w.astype(dtype) for w in weights) if product.casts else weights


def _rounded(values: Array, rows: _Rows, dtype) -> Array:
    """Rows in the compute dtype; zeros in rows of no expert, whose products are undefined."""
    return _or_zero(rows.in_expert, values).astype(dtype)


def _sum_choices(parts: tuple[Array, ...], p: SortedRows, complete: bool) -> Array:
    """y_t = Σ_k of row (t, k), in float32: each token fetches its rows. [n, K, D] never exists."""
    total = p.total
    y = jnp.zeros((), wide(parts[0].dtype))
    for k in range(p.row.shape[1]):
        row = p.row[:, k]
        fetched = sum(
            _take(part, jnp.minimum(row, part.shape[0] - 1)).astype(y.dtype) for part in parts
        )
        y = y + _or_zero(None if complete else (row < total)[:, None], fetched)
    return y.astype(parts[0].dtype)


def _or_zero(mask: Array | None, values: Any) -> Array:
    """Values where the mask is true, else 0; without a mask, all.

    The zeros depend on the mask: before a scan over layers JAX would write others out as an array,
    which each layer then reads.
    """
    return values if mask is None else jnp.where(mask, values, (mask ^ mask).astype(values.dtype))


def _take(x: Array, rows: Array) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")


def _product_by_expert(x: Float[Array, "E m K"], w: Float[Array, "E K N"]) -> Float[Array, "E m N"]:
    return jnp.einsum("ecd,edf->ecf", x, w)


def capacity_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    *,
    factor: float,
    product: Callable[[Array, Array], Array] = _product_by_expert,
) -> tuple[Float[Array, "n D"], Float[Array, ""]]:
    """Drop tokens: each expert takes at most ceil(factor·n·K/E) assignments, earlier tokens first.

    A dropped assignment contributes nothing, so its token passes by the residual alone.

    Args:
        factor: capacity of an expert, over its even share.
        product: of each expert's rows with its matrix.
    Returns: (y, share of assignments dropped).
    Source: GShard (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961).

    Example:
        >>> one = jnp.ones((2, 1, 1))  # two experts, D = F = 1
        >>> weights = 9 * one, one / 9, 2 * one  # on 1 they give 2
        >>> x, ids, gates = jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))
        >>> y, dropped = jax.jit(partial(capacity_swiglu, factor=1.0))(x, ids, gates, *weights)
        >>> y.round(2), dropped  # both tokens choose expert 0, which takes one of them
        (Array([[2.],
               [0.]], dtype=float32), Array(0.5, dtype=float32))
    """
    w_gate, w_up, w_down = (w.astype(x.dtype) for w in (w_gate, w_up, w_down))
    n, num_choices = expert_ids.shape
    num_experts = w_gate.shape[0]
    capacity = min(-int(-factor * n * num_choices // num_experts), n)
    p = sort_by_expert(expert_ids, num_experts)
    slot = p.row - p.starts[expert_ids]  # a choice's rank at its expert
    kept = slot < capacity
    rows = p.starts[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
    tokens = p.order[jnp.minimum(rows, p.order.size - 1)] // num_choices  # [E, capacity]
    x_rows = x[tokens]
    out = product(jax.nn.silu(product(x_rows, w_gate)) * product(x_rows, w_up), w_down)
    picked = out[expert_ids, jnp.minimum(slot, capacity - 1)]  # [n, K, D]
    y = (picked * jnp.where(kept, gates.astype(x.dtype), 0)[..., None]).sum(axis=1)
    return y, (~kept).mean(dtype=jnp.float32)


def decode_experts(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    *,
    rows: int | None = None,
) -> Float[Array, "n D"]:
    """Compute the same for a few tokens: a loop over the chosen experts, which reads no others.

    A visit reads one expert's matrices and multiplies them with `rows` rows. If the expert has
    fewer, rows of the next one go along: a product of a few rows costs little more than one of a
    single row. An expert with more is visited again. Takes no gradient.

    Args:
        expert_ids: an id of E marks an expert of another device; its gate must be 0.
        rows: rows of a visit. None means 4, or 8 if experts have that many.

    Example:
        >>> one = jnp.ones((2, 1, 1))  # two experts, D = F = 1
        >>> weights = 9 * one, one / 9, jnp.array([[[2.0]], [[5.0]]])  # of 1: 2, 5; silu(9) is 9
        >>> x, ids, gates = jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]])
        >>> decode_experts(x, ids, gates, *weights).round(2)
        Array([[4.7]], dtype=float32)
    """
    n, num_choices = expert_ids.shape
    num_experts = w_gate.shape[0]
    zero = jnp.zeros((), jnp.int32)

    def visit(expert: Array, local_rows: Array) -> Array:
        gate, up, down = (
            jax.lax.dynamic_index_in_dim(w, expert, 0, keepdims=False).astype(x.dtype)
            for w in (w_gate, w_up, w_down)
        )
        return (jax.nn.silu(local_rows @ gate) * (local_rows @ up)) @ down

    gates = gates.astype(x.dtype)
    if n == 1:  # nothing to sort; an id of E reads the last expert
        return jax.lax.fori_loop(
            0,
            num_choices,
            lambda k, y: y + gates[0, k] * visit(expert_ids[0, k], x),
            zeros(x.shape, x, w_gate),
        )
    rows = rows or (4 if n * num_choices < 8 * num_experts else 8)
    p = sort_by_expert(expert_ids, num_experts)
    visits = -(-p.counts // rows)
    ends = jnp.cumsum(visits, dtype=jnp.int32)
    turn = jnp.arange(n * num_choices, dtype=jnp.int32)
    # The expert of each visit: how many experts have had all of theirs. A search would loop.
    expert = jnp.minimum(
        (ends[None] <= turn[:, None]).sum(axis=1, dtype=jnp.int32), num_experts - 1
    )
    first = p.starts[expert] + (turn - (ends - visits)[expert]) * rows
    tokens = jnp.pad(p.order // num_choices, (0, rows))

    def add_visit(i, out):
        local_rows = x[jax.lax.dynamic_slice(tokens, (first[i],), (rows,))]
        # A visit also writes rows of the next expert; the next visit overwrites them.
        return jax.lax.dynamic_update_slice(out, visit(expert[i], local_rows), (first[i], zero))

    out = zeros((n * num_choices + rows, x.shape[1]), x, w_gate)
    out = jax.lax.fori_loop(0, ends[-1], add_visit, out)
    return (out[p.row] * gates[..., None]).sum(axis=1)


def decode_by_row(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
) -> Float[Array, "n D"]:
    """Compute the same without a loop: three float32 sums for each assignment. Takes no gradient.

    Each sum reads the weights of its expert in place. On a GPU XLA fuses the look-up of the expert
    into the sum, so no weight is copied, and eight kernels do it all. Rows are sorted by expert, so
    one expert's rows run side by side and find its weights in the cache. The cost grows with the
    number of assignments, not of experts.

    Args: as `decode_experts`.
    """
    n, num_choices = expert_ids.shape
    group = jnp.minimum(expert_ids.reshape(-1), w_gate.shape[0] - 1)  # elsewhere: the gate is 0
    rows = jnp.repeat(x, num_choices, axis=0)
    row = None
    if n > 1:
        p = count_by_expert(expert_ids, w_gate.shape[0])
        group = _take(group, p.order)
        rows = _take(x, p.order // num_choices)
        row = p.row

    def product(rows: Array, w: Array) -> Array:
        one = _take(w, group)
        return (rows.astype(wide(x.dtype))[:, :, None] * one.astype(wide(x.dtype))).sum(axis=1)

    h = (jax.nn.silu(product(rows, w_gate)) * product(rows, w_up)).astype(x.dtype)
    out = product(h, w_down)
    out = out.reshape(n, num_choices, -1) if row is None else _take(out, row)
    return (out * gates.astype(x.dtype).astype(out.dtype)[..., None]).sum(axis=1).astype(x.dtype)
