"""Sending tokens to their experts and bringing the results back: y_t = Σ_k g_tk FFN_{e_tk}(x_t).

Assignments (token, choice) are sorted by expert, so that each expert's rows stand together; every expert runs one
SwiGLU over its rows; the results go back by the inverse permutation and are summed over a token's choices. No
token is dropped. Backends:

    blocks      loops over experts and, inside, over blocks of rows, in plain XLA; the CPU's (dispatch_blocks.py)
    ragged_dot  `jax.lax.ragged_dot`; the GPU's and TPU's
    dense       every expert on every token, masked by the gates; the oracle, and the field's starting point
    capacity    GShard's and Switch's, which drops what overflows; for comparison

The matrices of all layers stand in one stack [L, E, D, F], and a layer is a number, so that a loop over layers
copies no expert. See `Experts`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.kernels.cpu.blocks import blocks_swiglu
from dsv3_jax.ops.sort_by_expert import Plan, plan
from dsv3_jax.ops.varying import zeros


class Experts(NamedTuple):
    """Every routed expert's matrices, all layers in one stack. L layers, E experts, D width, F hidden width."""

    w_gate: Array  # [L, E, D, F]
    w_up: Array  # [L, E, D, F]
    w_down: Array  # [L, E, F, D]


def routed_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    *,
    backend: str,
) -> Float[Array, "n D"]:
    """Σ_k gates_k · (silu(x w_gate) ⊙ (x w_up)) w_down over the chosen experts; differentiable in all but the ids.

    Args:
        x: tokens. expert_ids, gates: the router's choice; gates are cast to x's dtype.
        w_gate, w_up, w_down: one layer's experts.
        backend: "blocks", "ragged_dot" or "dense".
    Raises: ValueError for another backend.
    """
    stack = Experts(w_gate[None], w_up[None], w_down[None])
    layer = jnp.zeros((), jnp.int32)
    return routed_swiglu_in_stack(x, expert_ids, gates, stack, stack, layer, backend=backend)[0]


def routed_swiglu_in_stack(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    thread: Experts,
    layer: Int[Array, ""],
    *,
    backend: str,
    once: bool = False,
) -> tuple[Float[Array, "n D"], Experts]:
    """`routed_swiglu` with one layer's experts out of a stack.

    The gradient of a stack that a loop over layers closes over would be a whole stack from every layer, added up.
    So the stack also rides through the loop as `thread`, in and out of every layer: its cotangent rides backward
    through the same places, and each layer writes its own part into it.

    Args:
        experts: what is read; takes no gradient here.
        thread: the same arrays; never read, takes the gradient.
        layer: which layer of the stack.
        once: the loop passes through every layer of the stack once, and `end_thread` follows it.
    Returns: (y [n, D], thread, to be handed to the next layer).
    """
    gates = gates.astype(x.dtype)
    if backend == "blocks":
        p = plan(expert_ids, experts.w_gate.shape[1])
        y, thread = blocks_swiglu(x, gates, jax.lax.stop_gradient(tuple(experts)), tuple(thread), p, layer, once)
        return y, Experts(*thread)
    if backend not in ("ragged_dot", "dense"):
        raise ValueError(f"dispatch backend={backend!r} is not one of 'blocks', 'ragged_dot', 'dense'")
    one, thread = take_layer(experts, thread, layer)
    one = Experts(*(w.astype(x.dtype) for w in one))
    if backend == "dense":
        return _dense(x, expert_ids, gates, one), thread
    return _ragged_dot(x, gates, one, plan(expert_ids, one.w_gate.shape[0])), thread


def end_thread(x: Float[Array, "*n D"], thread: Experts, *, backend: str) -> Float[Array, "*n D"]:
    """x as it is, where a loop over all layers of a stack, each `once`, has ended: the stack's gradient begins here.

    Without this it begins as zeros. The native kernel writes over whatever a layer's part holds: gigabytes of zeros
    need not be written and read.
    """
    served = backend == "blocks" and calls.serves(x.dtype, thread.w_gate.dtype)
    return _begin_gradient(x, thread) if served else x


@jax.custom_vjp
def _begin_gradient(x, thread):
    return x


_begin_gradient.defvjp(lambda x, thread: (x, thread), lambda thread, dx: (dx, Experts(*calls.room(*thread))))


def take_layer(experts: Experts, thread: Experts, layer: Int[Array, ""]) -> tuple[Experts, Experts]:
    """One layer's matrices [E, …] out of the stack, with the gradient written into the thread's cotangent."""
    return _take_layer(jax.lax.stop_gradient(experts), thread, layer)


@jax.custom_vjp
def _take_layer(experts, thread, layer):
    one = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, 0, keepdims=False), experts)
    return one, thread


def _take_layer_fwd(experts, thread, layer):
    return _take_layer(experts, thread, layer), layer


def _take_layer_bwd(layer, cotangents):
    d_one, d_thread = cotangents

    def add(total, part):
        part = part + jax.lax.dynamic_index_in_dim(total, layer, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, part, layer, 0)

    return None, jax.tree.map(add, d_thread, d_one), None


_take_layer.defvjp(_take_layer_fwd, _take_layer_bwd)


def _dense(x, expert_ids, gates, w: Experts):
    hot = jax.nn.one_hot(expert_ids, w.w_gate.shape[0], dtype=x.dtype)
    weight = jnp.einsum("nke,nk->ne", hot, gates)
    h = jax.nn.silu(jnp.einsum("nd,edf->nef", x, w.w_gate)) * jnp.einsum("nd,edf->nef", x, w.w_up)
    return jnp.einsum("nef,efd,ne->nd", h, w.w_down, weight)


def _ragged_dot(x, gates, w: Experts, p: Plan):
    tokens = p.order // gates.shape[1]
    rows = x[tokens]
    h = jax.nn.silu(jax.lax.ragged_dot(rows, w.w_gate, p.counts)) * jax.lax.ragged_dot(rows, w.w_up, p.counts)
    h = h * gates.reshape(-1)[p.order][:, None]
    out = jax.lax.ragged_dot(h, w.w_down, p.counts)
    return jax.ops.segment_sum(out, tokens, num_segments=x.shape[0])


def capacity_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    *,
    factor: float,
) -> tuple[Float[Array, "n D"], Float[Array, ""]]:
    """The dropping variant: each expert takes at most ceil(factor·n·K/E) assignments, earlier tokens first.

    What overflows contributes nothing, so its token passes by the residual alone.
    Returns: (y [n, D], share of assignments dropped, float32).
    Source: GShard (arXiv 2006.16668), Switch Transformer (arXiv 2101.03961).
    """
    n, num_choices = expert_ids.shape
    num_experts = w_gate.shape[0]
    capacity = min(-int(-factor * n * num_choices // num_experts), n)
    p = plan(expert_ids, num_experts)
    slot = p.place - p.starts[expert_ids]  # a choice's turn at its expert
    kept = slot < capacity
    rows = p.starts[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
    tokens = p.order[jnp.minimum(rows, p.order.size - 1)] // num_choices  # [E, capacity]
    x_rows = x[tokens]
    h = jax.nn.silu(jnp.einsum("ecd,edf->ecf", x_rows, w_gate)) * jnp.einsum("ecd,edf->ecf", x_rows, w_up)
    out = jnp.einsum("ecf,efd->ecd", h, w_down)
    picked = out[expert_ids, jnp.minimum(slot, capacity - 1)]  # [n, K, D]
    y = (picked * jnp.where(kept, gates.astype(x.dtype), 0)[..., None]).sum(axis=1)
    return y, (~kept).mean(dtype=jnp.float32)


def few_tokens_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    layer: Int[Array, ""],
    rows: int | None = None,
    *,
    all_here: bool = True,
) -> Float[Array, "n D"]:
    """`routed_swiglu` for decoding, where the time goes into reading matrices: a loop over the chosen experts alone.

    A visit reads one expert from the stack and multiplies it with `rows` of its tokens, the next ones too where it has
    fewer: products of a few rows cost little more than of one. An expert with more tokens is visited again. None is the
    native kernel where it serves, else 4 rows, or 8 where experts have as many. Where not `all_here`, id E is an expert
    on another device, which is passed over: its gate must be 0. Takes no gradient.
    """
    n, num_choices = expert_ids.shape
    num_experts = experts.w_gate.shape[1]
    few = n * num_choices <= 32 * num_experts  # else products cost more than reading what they are with
    if rows is None and all_here and few and calls.serves(x.dtype, experts.w_gate.dtype):
        return calls.few_tokens_swiglu(x, expert_ids, gates, *experts, layer)
    zero = jnp.zeros((), jnp.int32)

    def visit(expert: Array, mine: Array) -> Array:
        w_gate, w_up, w_down = (
            jax.lax.dynamic_slice(w, (layer, expert, zero, zero), (1, 1, *w.shape[2:]))
            .reshape(w.shape[2:])
            .astype(x.dtype)
            for w in experts
        )
        return (jax.nn.silu(mine @ w_gate) * (mine @ w_up)) @ w_down

    gates = gates.astype(x.dtype)
    if n == 1 and all_here:  # nothing to sort
        return jax.lax.fori_loop(
            0, num_choices, lambda k, y: y + gates[0, k] * visit(expert_ids[0, k], x), zeros(x.shape, x, experts.w_gate)
        )
    rows = rows or (4 if n * num_choices < 8 * num_experts else 8)
    p = plan(expert_ids, num_experts)
    visits = -(-p.counts // rows)
    ends = jnp.cumsum(visits, dtype=jnp.int32)
    turn = jnp.arange(n * num_choices, dtype=jnp.int32)
    # The expert of each turn: how many have had all of theirs. A comparison of all, for a search would be a loop.
    expert = jnp.minimum((ends[None] <= turn[:, None]).sum(axis=1, dtype=jnp.int32), num_experts - 1)
    first = p.starts[expert] + (turn - (ends - visits)[expert]) * rows
    tokens = jnp.pad(p.order // num_choices, (0, rows))

    def add_visit(i, out):
        mine = x[jax.lax.dynamic_slice(tokens, (first[i],), (rows,))]
        # What a visit writes of the next expert's rows, the next visit writes over.
        return jax.lax.dynamic_update_slice(out, visit(expert[i], mine), (first[i], zero))

    out = zeros((n * num_choices + rows, x.shape[1]), x, experts.w_gate)
    out = jax.lax.fori_loop(0, ends[-1], add_visit, out)
    return (out[p.place] * gates[..., None]).sum(axis=1)


class WideExperts(NamedTuple):
    """One layer's experts side by side: a single SwiGLU of E·F hidden units, of which an expert owns F."""

    w_gate: Array  # [D, E·F]
    w_up: Array  # [D, E·F]
    w_down: Array  # [E·F, D]


def side_by_side(experts: Experts, layer: int) -> WideExperts:
    """One layer of a stack, laid out as a wide SwiGLU."""
    w_gate, w_up = (w[layer].swapaxes(0, 1).reshape(w.shape[2], -1) for w in (experts.w_gate, experts.w_up))
    return WideExperts(w_gate, w_up, experts.w_down[layer].reshape(-1, experts.w_down.shape[-1]))


def wide_swiglu(
    x: Float[Array, "n D"], expert_ids: Int[Array, "n K"], gates: Float[Array, "n K"], experts: WideExperts, num: int
) -> Float[Array, "n D"]:
    """`few_tokens_swiglu` where experts are so small that visiting them costs more than multiplying with all of them.

    The hidden units of experts that a token did not choose have gate 0. `num`: E. Takes no gradient.
    """
    n = x.shape[0]
    w_gate, w_up, w_down = (w.astype(x.dtype) for w in experts)
    rows = jnp.arange(n, dtype=jnp.int32)[:, None]
    weight = jnp.zeros((n, num), x.dtype).at[rows, expert_ids].add(gates.astype(x.dtype))
    h = jax.nn.silu(x @ w_gate) * (x @ w_up)
    return (h.reshape(n, num, -1) * weight[..., None]).reshape(n, -1) @ w_down
