"""Tokens to their experts and back: y_t = Σ_k g_tk FFN_{e_tk}(x_t).

Assignments (token, choice) are sorted by expert, so each expert's rows are contiguous. Every expert runs one SwiGLU
over its rows. The results return by the inverse permutation and are summed over a token's choices. No token is dropped,
except by `capacity_swiglu`, which is there to compare.

    ragged_dot     sorted rows, `jax.lax.ragged_dot`
    dense          every expert on every token, weighted by the gates: the oracle, and the field's starting point
    decode_experts a loop over the chosen experts alone, for a few tokens
    capacity       GShard's and Switch's, which drops what overflows
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.expert_stack import Experts, ExpertStack, take_layer
from dsv3_jax.ops.sort_by_expert import sort_by_expert
from dsv3_jax.ops.varying import zeros

FEW_CHOICES = 32  # assignments for each expert up to which `decode_experts` is the faster: reading weights is the cost


def dense_swiglu(
    x: Float[Array, "n D"], expert_ids: Int[Array, "n K"], gates: Float[Array, "n K"], stack: ExpertStack
) -> tuple[Float[Array, "n D"], ExpertStack]:
    """Run every expert of the stack's layer on every token, weighted by the gates.

    Args: as `ragged_dot_swiglu`. Returns: likewise.

    Example:
        >>> one = jnp.ones((1, 2, 1, 1))  # one layer, two experts, D = F = 1
        >>> weights = Experts(9 * one, one / 9, jnp.array([[[[2.0]], [[5.0]]]]))  # on 1 they give 2 and 5: silu(9) is 9
        >>> stack = ExpertStack(weights, None, jnp.int32(0))
        >>> y, _ = dense_swiglu(jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]]), stack)
        >>> y.round(2)  # 0.9 · 5 + 0.1 · 2
        Array([[4.7]], dtype=float32)
    """
    w, stack = _layer_in(x, stack)
    hot = jax.nn.one_hot(expert_ids, w.w_gate.shape[0], dtype=x.dtype)
    weight = jnp.einsum("nke,nk->ne", hot, gates.astype(x.dtype))
    h = jax.nn.silu(jnp.einsum("nd,edf->nef", x, w.w_gate)) * jnp.einsum("nd,edf->nef", x, w.w_up)
    return jnp.einsum("nef,efd,ne->nd", h, w.w_down, weight), stack


def ragged_dot_swiglu(
    x: Float[Array, "n D"], expert_ids: Int[Array, "n K"], gates: Float[Array, "n K"], stack: ExpertStack
) -> tuple[Float[Array, "n D"], ExpertStack]:
    """Compute Σ_k gates_k · (silu(x w_gate) ⊙ (x w_up)) w_down over the chosen experts of the stack's layer.

    Args:
        x: tokens.
        expert_ids, gates: the router's choice; gates are cast to x's dtype. An id of E counts as no expert.
        stack: weights and gradient carry, at the layer to use.
    Returns: (y [n, D], the stack for the next use).

    Example:
        >>> one = jnp.ones((1, 2, 1, 1))  # one layer, two experts, D = F = 1
        >>> weights = Experts(9 * one, one / 9, jnp.array([[[[2.0]], [[5.0]]]]))  # on 1 they give 2 and 5: silu(9) is 9
        >>> stack = ExpertStack(weights, None, jnp.int32(0))
        >>> y, _ = ragged_dot_swiglu(jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]]), stack)
        >>> y.round(2)  # 0.9 · 5 + 0.1 · 2
        Array([[4.7]], dtype=float32)
    """
    w, stack = _layer_in(x, stack)
    p = sort_by_expert(expert_ids, w.w_gate.shape[0])
    tokens = p.order // gates.shape[1]
    rows = x[tokens]
    h = jax.nn.silu(jax.lax.ragged_dot(rows, w.w_gate, p.counts)) * jax.lax.ragged_dot(rows, w.w_up, p.counts)
    h = h * gates.astype(x.dtype).reshape(-1)[p.order][:, None]
    out = jax.lax.ragged_dot(h, w.w_down, p.counts)
    return jax.ops.segment_sum(out, tokens, num_segments=x.shape[0]), stack


def _layer_in(x: Array, stack: ExpertStack) -> tuple[Experts, ExpertStack]:
    one, stack = take_layer(stack)
    return Experts(*(w.astype(x.dtype) for w in one)), stack


def capacity_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    stack: ExpertStack,
    *,
    factor: float,
) -> tuple[Float[Array, "n D"], ExpertStack, Float[Array, ""]]:
    """Drop tokens: each expert takes at most ceil(factor·n·K/E) assignments, earlier tokens first.

    A dropped assignment contributes nothing, so its token passes by the residual alone.
    Returns: (y [n, D], the stack for the next use, share of assignments dropped, float32).
    Source: GShard (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961).

    Example:
        >>> one = jnp.ones((1, 2, 1, 1))  # one layer, two experts, D = F = 1
        >>> stack = ExpertStack(Experts(9 * one, one / 9, 2 * one), None, jnp.int32(0))  # on 1 they give 2
        >>> x, ids, gates = jnp.ones((2, 1)), jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1))
        >>> y, _, dropped = capacity_swiglu(x, ids, gates, stack, factor=1.0)
        >>> y.round(2), dropped  # both tokens choose expert 0, which takes one of them
        (Array([[2.],
               [0.]], dtype=float32), Array(0.5, dtype=float32))
    """
    w, stack = _layer_in(x, stack)
    n, num_choices = expert_ids.shape
    num_experts = w.w_gate.shape[0]
    capacity = min(-int(-factor * n * num_choices // num_experts), n)
    p = sort_by_expert(expert_ids, num_experts)
    slot = p.row - p.starts[expert_ids]  # a choice's rank at its expert
    kept = slot < capacity
    rows = p.starts[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
    tokens = p.order[jnp.minimum(rows, p.order.size - 1)] // num_choices  # [E, capacity]
    x_rows = x[tokens]
    h = jax.nn.silu(jnp.einsum("ecd,edf->ecf", x_rows, w.w_gate)) * jnp.einsum("ecd,edf->ecf", x_rows, w.w_up)
    out = jnp.einsum("ecf,efd->ecd", h, w.w_down)
    picked = out[expert_ids, jnp.minimum(slot, capacity - 1)]  # [n, K, D]
    y = (picked * jnp.where(kept, gates.astype(x.dtype), 0)[..., None]).sum(axis=1)
    return y, stack, (~kept).mean(dtype=jnp.float32)


def decode_experts(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    stack: ExpertStack,
    *,
    rows: int | None = None,
    local: bool = True,
) -> Float[Array, "n D"]:
    """Compute the same for a few tokens, whose time goes into reading weights: a loop over the chosen experts alone.

    A visit reads one expert from the stack and multiplies it with `rows` rows. If the expert has fewer, rows of the
    next one go along: a product of a few rows costs little more than one of a single row. An expert with more is
    visited again. Takes no gradient.

    Args:
        rows: rows of a visit. None means 4, or 8 if experts have that many.
        local: every expert is on this device. Otherwise id E marks an expert elsewhere: its gate must be 0.

    Example:
        >>> one = jnp.ones((1, 2, 1, 1))  # one layer, two experts, D = F = 1
        >>> weights = Experts(9 * one, one / 9, jnp.array([[[[2.0]], [[5.0]]]]))  # on 1 they give 2 and 5: silu(9) is 9
        >>> stack = ExpertStack(weights, None, jnp.int32(0))
        >>> decode_experts(jnp.ones((1, 1)), jnp.array([[1, 0]]), jnp.array([[0.9, 0.1]]), stack).round(2)
        Array([[4.7]], dtype=float32)
    """
    n, num_choices = expert_ids.shape
    experts, layer = stack.weights, stack.layer
    num_experts = stack.num_experts
    zero = jnp.zeros((), jnp.int32)

    def visit(expert: Array, local_rows: Array) -> Array:
        w_gate, w_up, w_down = (
            jax.lax.dynamic_slice(w, (layer, expert, zero, zero), (1, 1, *w.shape[2:]))
            .reshape(w.shape[2:])
            .astype(x.dtype)
            for w in experts
        )
        return (jax.nn.silu(local_rows @ w_gate) * (local_rows @ w_up)) @ w_down

    gates = gates.astype(x.dtype)
    if n == 1 and local:  # nothing to sort
        return jax.lax.fori_loop(
            0, num_choices, lambda k, y: y + gates[0, k] * visit(expert_ids[0, k], x), zeros(x.shape, x, experts.w_gate)
        )
    rows = rows or (4 if n * num_choices < 8 * num_experts else 8)
    p = sort_by_expert(expert_ids, num_experts)
    visits = -(-p.counts // rows)
    ends = jnp.cumsum(visits, dtype=jnp.int32)
    turn = jnp.arange(n * num_choices, dtype=jnp.int32)
    # The expert of each visit: how many experts have had all of theirs. One comparison of all; a search would loop.
    expert = jnp.minimum((ends[None] <= turn[:, None]).sum(axis=1, dtype=jnp.int32), num_experts - 1)
    first = p.starts[expert] + (turn - (ends - visits)[expert]) * rows
    tokens = jnp.pad(p.order // num_choices, (0, rows))

    def add_visit(i, out):
        local_rows = x[jax.lax.dynamic_slice(tokens, (first[i],), (rows,))]
        # A visit also writes rows of the next expert; the next visit overwrites them.
        return jax.lax.dynamic_update_slice(out, visit(expert[i], local_rows), (first[i], zero))

    out = zeros((n * num_choices + rows, x.shape[1]), x, experts.w_gate)
    out = jax.lax.fori_loop(0, ends[-1], add_visit, out)
    return (out[p.row] * gates[..., None]).sum(axis=1)
