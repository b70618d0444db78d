"""Tokens to their experts and back: y_t = Σ_k g_tk FFN_{e_tk}(x_t).

Assignments (token, choice) are sorted by expert, so each expert's rows are contiguous. Every expert
runs one SwiGLU over its rows. The results return by the inverse permutation and are summed over a
token's choices. No token is dropped, except by `capacity_swiglu`, which is there to compare.

    grouped_swiglu   sorted rows, three grouped products (see grouped_product.py)
    dense_swiglu     every expert on every token, weighted by the gates: the oracle
    decode_experts   a loop over the chosen experts alone, for a few tokens
    capacity_swiglu  GShard's and Switch's, which drops what overflows

Tokens are fetched by their rows and rows by their tokens, forward and backward. Nothing is
scattered, so no two additions meet in an order that changes from run to run.

Letters, beside those of reference.py: n tokens, m = n K assignments (sorted, in rows), c slots.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.ops.dtypes import sum_dtype
from dsv3_jax.ops.grouped_product import RAGGED_DOT, GroupedProduct
from dsv3_jax.ops.sort_by_expert import SortedRows, sort_by_expert
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
    hot_nKE = jax.nn.one_hot(expert_ids, w_gate.shape[0], dtype=x.dtype)
    weight_nE = jnp.einsum("nke,nk->ne", hot_nKE, gates.astype(x.dtype))

    a_nEF = jnp.einsum("nd,edf->nef", x, w_gate)
    b_nEF = jnp.einsum("nd,edf->nef", x, w_up)
    return jnp.einsum("nef,efd,ne->nd", jax.nn.silu(a_nEF) * b_nEF, w_down, weight_nE)


def grouped_swiglu(  # noqa: PLR0913 - six arrays, and how
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
        rows: the most choices that may name an expert: the arrays have so many rows. None means
            all, n·K.
        turned: w_gate, w_up and w_down transposed, in x's dtype, for a backend whose `dx` would
            transpose them; they take no gradient.
        complete: every id names an expert, so no row needs a mask.

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
def _grouped(
    product: GroupedProduct,
    complete: bool,
    x: Array,
    gates: Array,
    weights: tuple[Array, ...],
    turned: tuple[Array, ...] | None,
    p: SortedRows,
) -> Array:
    return _forward(product, complete, x, gates, weights, p)[0]


def _grouped_fwd(
    product: GroupedProduct,
    complete: bool,
    x: Array,
    gates: Array,
    weights: tuple[Array, ...],
    turned: tuple[Array, ...] | None,
    p: SortedRows,
) -> tuple[Array, tuple]:
    y, inner = _forward(product, complete, x, gates, weights, p)
    return y, (x, gates, weights, turned, p, inner)


class _Rows(NamedTuple):
    """The sorted rows of a call, padded to what the backend wants."""

    token: Array  # int32 [m]
    gate: Array  # float32 [m, 1]
    # bool [m, 1]: not padding, and of an expert that is here; None: all are
    in_expert: Array | None


def _sorted_rows(product: GroupedProduct, complete: bool, gates: Array, p: SortedRows) -> _Rows:
    order = jnp.pad(p.order, (0, -p.order.size % product.row_multiple))
    gate = take(gates.reshape(-1), order).astype(sum_dtype(gates.dtype))
    in_expert = None
    if not complete:
        in_expert = (jnp.arange(order.size, dtype=jnp.int32) < p.total)[:, None]
    return _Rows(order // gates.shape[1], gate[:, None], in_expert)


def _forward(
    product: GroupedProduct,
    complete: bool,
    x: Array,
    gates: Array,
    weights: tuple[Array, ...],
    p: SortedRows,
) -> tuple[Array, tuple[Array, ...]]:
    """(y, what the products before silu gave)."""
    w_gate, w_up, w_down = _matrices(product, weights, x.dtype)

    # Each token goes to the rows of its experts.
    rows = _sorted_rows(product, complete, gates, p)
    x_mD = take(x, rows.token)

    # One SwiGLU an expert. The gate weights the hidden units, which are fewer than the outputs.
    inner = tuple(product.forward(x_mD, w, p.counts) for w in (w_gate, w_up))
    a_mF, b_mF = (part.astype(sum_dtype(part.dtype)) for part in inner)
    h_mF = _rounded(jax.nn.silu(a_mF) * b_mF * rows.gate, rows, x.dtype)
    y_mD = product.forward(h_mF, w_down, p.counts)

    # Each token adds up its rows.
    return _sum_choices((y_mD,), p, complete), inner


def _grouped_bwd(
    product: GroupedProduct, complete: bool, saved: tuple, dy: Array
) -> tuple[Array, Array, tuple[Array, ...], None, None]:
    x, gates, weights, turned, p, inner = saved
    back = product.dx if turned is None else product.forward
    w_gate, w_up, w_down = _matrices(product, weights, x.dtype) if turned is None else turned
    rows = _sorted_rows(product, complete, gates, p)
    x_mD = take(x, rows.token)
    dy_mD = take(dy, rows.token)

    # The hidden units again, from the two products that were kept.
    a_mF, b_mF = (part.astype(sum_dtype(part.dtype)) for part in inner)
    sig_mF = jax.nn.sigmoid(a_mF)
    silu_mF = a_mF * sig_mF
    h_mF = _rounded(silu_mF * b_mF * rows.gate, rows, x.dtype)

    # A gate's gradient is the product of its row's hidden units with their gradient. Without the
    # barrier XLA adds it up again, in the fusion that adds these to the router's gradient.
    dh_mF = back(dy_mD, w_down, p.counts).astype(a_mF.dtype)
    d_gate_m = jax.lax.optimization_barrier((dh_mF * silu_mF * b_mF).sum(-1))

    # Back through silu(a) ⊙ b.
    dh_mF = dh_mF * rows.gate
    da_mF = _rounded(dh_mF * b_mF * (sig_mF + silu_mF * (1 - sig_mF)), rows, x.dtype)
    db_mF = _rounded(dh_mF * silu_mF, rows, x.dtype)

    # Back to the tokens, and to the experts' matrices.
    dx_parts = (back(da_mF, w_gate, p.counts), back(db_mF, w_up, p.counts))
    d_weights = (
        product.dw(x_mD, da_mF, p.counts, weights[0].dtype),
        product.dw(x_mD, db_mF, p.counts, weights[0].dtype),
        product.dw(h_mF, dy_mD, p.counts, weights[2].dtype),
    )

    # Each choice fetches the gradient of its gate; a choice of no expert has none.
    here_nK = None if complete else p.row < p.total
    d_gates = _or_zero(here_nK, take(d_gate_m, jnp.minimum(p.row, d_gate_m.size - 1)))
    dx = _sum_choices(dx_parts, p, complete)
    return dx, d_gates.astype(gates.dtype), d_weights, None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _matrices(product: GroupedProduct, weights: tuple[Array, ...], dtype: Any) -> tuple[Array, ...]:
    """w_gate, w_up and w_down as the backend takes them."""
    return tuple(w.astype(dtype) for w in weights) if product.casts else weights


def _rounded(values: Array, rows: _Rows, dtype: Any) -> Array:
    """Rows in the compute dtype; zeros in rows of no expert, whose products are undefined."""
    return _or_zero(rows.in_expert, values).astype(dtype)


def _sum_choices(parts: tuple[Array, ...], p: SortedRows, complete: bool) -> Array:
    """y_t = Σ_k of row (t, k), in float32: each token fetches its rows. [n, K, D] never exists."""
    total = p.total
    y_nD = jnp.zeros((), sum_dtype(parts[0].dtype))
    for k in range(p.row.shape[1]):
        row = p.row[:, k]
        # A choice of no expert may have no row: it fetches another one, which does not count.
        fetched = sum(
            take(part, jnp.minimum(row, part.shape[0] - 1)).astype(y_nD.dtype) for part in parts
        )
        y_nD = y_nD + _or_zero(None if complete else (row < total)[:, None], fetched)
    return y_nD.astype(parts[0].dtype)


def _or_zero(mask: Array | None, values: Any) -> Array:
    """Values where the mask is true, else 0; without a mask, all.

    The zeros depend on the mask: others JAX would write out before a scan, for each layer to read.
    """
    return values if mask is None else jnp.where(mask, values, (mask ^ mask).astype(values.dtype))


def take(x: Array, rows: Array) -> Array:
    """Fetch rows of x; all of them must be in it."""
    return x.at[rows].get(mode="promise_in_bounds")


# With a capacity


def _product_by_expert(x: Float[Array, "E m K"], w: Float[Array, "E K N"]) -> Float[Array, "E m N"]:
    return jnp.einsum("ecd,edf->ecf", x, w)


def capacity_swiglu(  # noqa: PLR0913 - six arrays, and how
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    *,
    factor: float,
    mask: Bool[Array, " n"] | None = None,
    product: Callable[[Array, Array], Array] = _product_by_expert,
) -> tuple[Float[Array, "n D"], Float[Array, ""]]:
    """Drop tokens: each expert takes at most ceil(factor·n·K/E) assignments, earlier tokens first.

    A dropped assignment contributes nothing, so its token passes by the residual alone.

    Args:
        factor: capacity of an expert, over its even share.
        mask: tokens that count. Others, as padding, get what these leave. None means all count.
        product: of each expert's rows with its matrix.
    Returns: (y, share of assignments dropped, of the tokens that count).
    Source: GShard (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961).
    Departs from the paper: GShard's algorithm 1 serves a group's first choices before its second
        ones, sent with probability 2 g_2 / (g_1 + g_2). Here a token's K choices come in its turn.

    Example:
        >>> one = jnp.ones((2, 1, 1))  # two experts, D = F = 1
        >>> weights = 9 * one, one / 9, 2 * one  # on 1 they give 2
        >>> x, ids, gates = jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))
        >>> y, dropped = jax.jit(partial(capacity_swiglu, factor=1.0))(x, ids, gates, *weights)
        >>> y.round(2), dropped  # both tokens choose expert 0, which takes one of them
        (Array([[2.],
               [0.]], dtype=float32), Array(0.5, dtype=float32))
    """
    n, num_choices = expert_ids.shape
    num_experts = w_gate.shape[0]
    # As a fraction: in floating point 1.1 × 100 is above 110.
    capacity = min(-(-Fraction(str(factor)) * n * num_choices // num_experts), n)
    w_gate, w_up, w_down = (w.astype(x.dtype) for w in (w_gate, w_up, w_down))

    # A choice's slot is its rank at its expert, where tokens that do not count come last. Those
    # beyond the capacity c are dropped.
    counts_nK = jnp.ones(expert_ids.shape, jnp.bool_)
    if mask is not None:
        counts_nK = jnp.broadcast_to(mask[:, None], expert_ids.shape)
    p = sort_by_expert(2 * expert_ids + (~counts_nK).astype(expert_ids.dtype), 2 * num_experts)
    starts_E = p.starts[::2]
    slot_nK = p.row - starts_E[expert_ids]
    kept_nK = slot_nK < capacity

    # Each expert's slots, filled with its tokens; a slot that stays empty holds any token.
    rows_Ec = starts_E[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
    tokens_Ec = p.order[jnp.minimum(rows_Ec, p.order.size - 1)] // num_choices
    x_EcD = x[tokens_Ec]
    h_EcF = jax.nn.silu(product(x_EcD, w_gate)) * product(x_EcD, w_up)
    y_EcD = product(h_EcF, w_down)

    # Each token fetches what its kept choices gave.
    picked_nKD = y_EcD[expert_ids, jnp.minimum(slot_nK, capacity - 1)]
    weight_nK = jnp.where(kept_nK, gates.astype(x.dtype), 0)
    y_nD = (picked_nKD * weight_nK[..., None]).sum(axis=1)
    dropped = (counts_nK & ~kept_nK).sum(dtype=jnp.float32)
    return y_nD, dropped / jnp.maximum(counts_nK.sum(dtype=jnp.float32), 1)


# A few tokens


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
        rows: rows of a visit. None means 4, or 8 if experts have 8 or more rows on average.

    Example:
        >>> one = jnp.ones((2, 1, 1))  # two experts, D = F = 1
        >>> weights = 9 * one, one / 9, jnp.array([[[2.0]], [[5.0]]])  # of 1: 2, 5; silu(9) is 9
        >>> x, ids, gates = jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]])
        >>> decode_experts(x, ids, gates, *weights).round(2)
        Array([[4.7]], dtype=float32)
    """
    n, num_choices = expert_ids.shape
    num_experts = w_gate.shape[0]
    gates = gates.astype(x.dtype)

    def swiglu_of(expert: Array, rows: Array) -> Array:
        gate, up, down = (
            jax.lax.dynamic_index_in_dim(w, expert, 0, keepdims=False).astype(x.dtype)
            for w in (w_gate, w_up, w_down)
        )
        return (jax.nn.silu(rows @ gate) * (rows @ up)) @ down

    # One token: there is nothing to sort. An id of E reads the last expert.
    if n == 1:

        def add_choice(k: Array, y: Array) -> Array:
            return y + gates[0, k] * swiglu_of(expert_ids[0, k], x)

        return jax.lax.fori_loop(0, num_choices, add_choice, zeros(x.shape, x, w_gate))

    # The visits of each expert, and the first row of each visit. Its expert is the number of
    # experts that have had all of theirs. A search would loop.
    rows = rows or (4 if n * num_choices < 8 * num_experts else 8)
    p = sort_by_expert(expert_ids, num_experts)
    visits_E = -(-p.counts // rows)
    ends_E = jnp.cumsum(visits_E, dtype=jnp.int32)
    turn = jnp.arange(n * num_choices, dtype=jnp.int32)
    done = (ends_E[None] <= turn[:, None]).sum(axis=1, dtype=jnp.int32)
    expert = jnp.minimum(done, num_experts - 1)
    first = p.starts[expert] + (turn - (ends_E - visits_E)[expert]) * rows

    tokens = jnp.pad(p.order // num_choices, (0, rows))
    zero = jnp.zeros((), jnp.int32)

    def visit(i: Array, out: Array) -> Array:
        some = x[jax.lax.dynamic_slice(tokens, (first[i],), (rows,))]
        # A visit also writes rows of the next expert; the next visit overwrites them.
        return jax.lax.dynamic_update_slice(out, swiglu_of(expert[i], some), (first[i], zero))

    out_mD = zeros((n * num_choices + rows, x.shape[1]), x, w_gate)
    out_mD = jax.lax.fori_loop(0, ends_E[-1], visit, out_mD)
    return (out_mD[p.row] * gates[..., None]).sum(axis=1)
