"""Tokens to the devices that hold their experts, and sums back: a token goes only where it must.

P devices along the mesh axis "expert" hold E/P experts each, and n tokens each. A device adds its
experts' weighted outputs for each token that it was sent, and one sum returns. `all_to_all` has
static shapes, so it sends tokens in rounds of a fixed size, until all are sent: see rounds.py.

This file and expert_parallel.py are the only ones with hand-written collectives.

Letters, beside those of reference.py: n tokens of a device, P peers, s slots of a round.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.mesh.rounds import (
    PeerTable,
    RoundSize,
    Sent,
    count_rounds,
    in_round,
    later_size,
    most_choices,
    peer_table,
)
from dsv3_jax.ops.varying import varying, zeros

# Tokens in slots


class SendBuffer(NamedTuple):
    """Which token is in each of S slots, and which slot each choice of a token has."""

    token: Array  # int32 [S]: n if the slot is empty
    # int32 [n, K]: S for a choice without one: an earlier choice's serves it, or another round's
    slot: Array


def _send_buffer(slot: Array, size: int) -> SendBuffer:
    n = slot.shape[0]
    tokens = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], slot.shape)
    empty = zeros((size,), slot) + n
    return SendBuffer(empty.at[slot.reshape(-1)].set(tokens.reshape(-1), mode="drop"), slot)


def _fetch(x: Array, rows: Array) -> Array:
    """Rows of x; zeros for rows past its end."""
    return x.at[rows].get(mode="fill", fill_value=0)


# The two ways between tokens and slots are each other's transpose: no gradient scatters rows.


@jax.custom_vjp
def to_slots(x: Array, buffer: SendBuffer) -> Array:
    """[n, …] to [S, …]: each slot's token, zeros if it is empty.

    Example:
        >>> token = jnp.array([1, 0, 2])  # 2: an empty slot
        >>> buffer = SendBuffer(token, slot=jnp.array([[1], [0]]))
        >>> to_slots(jnp.array([5.0, 6.0]), buffer)
        Array([6., 5., 0.], dtype=float32)
    """
    return _fetch(x, buffer.token)


@jax.custom_vjp
def from_slots(rows: Array, buffer: SendBuffer) -> Array:
    """[S, …] to [n, …]: the sum over a token's slots.

    Example:
        >>> slot = jnp.array([[0, 2], [1, 3]])  # 3: without a slot
        >>> buffer = SendBuffer(token=jnp.array([0, 1, 0]), slot=slot)
        >>> from_slots(jnp.array([7.0, 8.0, 9.0]), buffer)
        Array([16.,  8.], dtype=float32)
    """
    slot = buffer.slot
    others = sum(_fetch(rows, slot[:, k]) for k in range(1, slot.shape[1]))
    return others + _fetch(rows, slot[:, 0])


def _to_slots_fwd(x: Array, buffer: SendBuffer) -> tuple[Array, SendBuffer]:
    return to_slots(x, buffer), buffer


def _to_slots_bwd(buffer: SendBuffer, d: Array) -> tuple[Array, None]:
    return from_slots(d, buffer), None


def _from_slots_fwd(rows: Array, buffer: SendBuffer) -> tuple[Array, SendBuffer]:
    return from_slots(rows, buffer), buffer


def _from_slots_bwd(buffer: SendBuffer, d: Array) -> tuple[Array, None]:
    return to_slots(d, buffer), None


to_slots.defvjp(_to_slots_fwd, _to_slots_bwd)
from_slots.defvjp(_from_slots_fwd, _from_slots_bwd)


def to_local_ids(ids: Array, gates: Array, held: int) -> tuple[Array, Array]:
    """Choices among this device's experts, from 0; others get the id after the last, and gate 0."""
    ids = ids - jax.lax.axis_index("expert").astype(ids.dtype) * held
    here = (ids >= 0) & (ids < held)
    return jnp.where(here, ids, held), jnp.where(here, gates, 0)


# w_gate, w_up, w_down
Experts = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


# All to all, in rounds


def all_to_all(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    *,
    kernels: Kernels,
    size: RoundSize,
) -> tuple[Float[Array, "n D"], Float[Array, ""]]:
    """Run `Kernels.grouped_swiglu` on this device's tokens and all experts, inside `shard_map`.

    A device receives at most `size.choices` choices of each peer, so its arrays have P times as
    many rows, and not K for each token. All devices go through as many rounds as the one that needs
    most, along other mesh axes too: a round may hold other collectives. The gradient computes the
    later rounds again, a loop of unknown length.

    Args:
        x, gates: vary along every axis along which the experts do, and the experts along theirs.
        size: of the first round.
    Returns: (y, copies of a token sent, empty slots included, mean over tokens).
    """
    n = x.shape[0]
    peers = jax.lax.axis_size("expert")
    held = experts[0].shape[0]
    table = peer_table(expert_ids, held, peers)

    # The first round, and how many more the device needs that needs most.
    later = later_size(size, most_choices(expert_ids.shape[1], held))
    none = Sent(zeros((1, peers), table.peer), zeros((1, peers), table.peer))
    _, first = in_round(table, none, size)
    rounds = count_rounds(table, first, later)
    rounds = jax.lax.pmax(rounds, tuple(varying(rounds)))

    plan = Plan(expert_ids, table, none, first, rounds)
    y = _rounds(kernels, (size, later), x, gates, experts, plan)
    slots = size.tokens + rounds * later.tokens
    return y, slots.astype(jnp.float32) * ((peers - 1) / n)


class Plan(NamedTuple):
    """What goes where, in all rounds of a call. It takes no gradient."""

    expert_ids: Array  # int32 [n, K]
    table: PeerTable
    none: Sent  # before the first round
    first: Sent  # after it
    rounds: Array  # int32: further rounds


def _round(
    plan: Plan,
    sent: Sent,
    size: RoundSize,
    kernels: Kernels,
    x: Array,
    gates: Array,
    experts: Experts,
) -> Array:
    """Send the tokens of a round to their experts, and add up what returns."""
    table = plan.table
    peers = sent.tokens.size

    # The slot of each token's first choice on a device; other choices there share it.
    now_nP, _ = in_round(table, sent, size)
    now_nK = jnp.take_along_axis(now_nP, table.peer, axis=1)
    rank_nK = jnp.take_along_axis(table.tokens_so_far - sent.tokens - 1, table.peer, axis=1)
    slots = peers * size.tokens
    slot_nK = jnp.where(now_nK & table.first, table.peer * size.tokens + rank_nK, slots)
    buffer = _send_buffer(slot_nK, slots)

    # There: rows, gates and ids. An empty slot has the expert -1, which no device holds.
    across = partial(
        jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True
    )
    x_sD = across(to_slots(x, buffer))
    gates_sK = across(to_slots(gates, buffer))
    ids_sK = across(_fetch(plan.expert_ids + 1, buffer.token)) - 1
    ids_sK, gates_sK = to_local_ids(ids_sK, gates_sK, experts[0].shape[0])

    # This device's experts, and the sums back.
    y_sD = kernels("grouped_swiglu", x_sD, ids_sK, gates_sK, *experts, rows=peers * size.choices)
    return from_slots(across(y_sD), buffer)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounds(
    kernels: Kernels,
    sizes: tuple[RoundSize, RoundSize],
    x: Array,
    gates: Array,
    experts: Experts,
    plan: Plan,
) -> Array:
    return _rounds_fwd(kernels, sizes, x, gates, experts, plan)[0]


def _rounds_fwd(
    kernels: Kernels,
    sizes: tuple[RoundSize, RoundSize],
    x: Array,
    gates: Array,
    experts: Experts,
    plan: Plan,
) -> tuple[Array, tuple]:
    # The first round keeps what its gradient needs.
    first = partial(_round, plan, plan.none, sizes[0], kernels)
    y, pull_back = jax.vjp(first, x, gates, experts)

    def add_later(y: Array, sent: Sent) -> Array:
        return y + _round(plan, sent, sizes[1], kernels, x, gates, experts)

    y = _later_rounds(add_later, y, plan, sizes[1])
    return y, (pull_back, x, gates, experts, plan)


def _rounds_bwd(
    kernels: Kernels, sizes: tuple[RoundSize, RoundSize], saved: tuple, dy: Array
) -> tuple[Array, Array, Experts, None]:
    pull_back, x, gates, experts, plan = saved

    # The later rounds are computed again, each with its gradient.
    def add_later(total: tuple, sent: Sent) -> tuple:
        later = partial(_round, plan, sent, sizes[1], kernels)
        _, pull_back = jax.vjp(later, x, gates, experts)
        return jax.tree.map(jnp.add, total, pull_back(dy))

    dx, d_gates, d_experts = _later_rounds(add_later, pull_back(dy), plan, sizes[1])
    return dx, d_gates, d_experts, None


_rounds.defvjp(_rounds_fwd, _rounds_bwd)


def _later_rounds(add: Callable, total: Any, plan: Plan, size: RoundSize) -> Any:
    """Call `total = add(total, sent)` in each round after the first.

    Experts of another dtype are cast in each round: kept casts would be half of the program's
    temporary memory.
    """

    def one(_: Array, carry: tuple[Any, Sent]) -> tuple[Any, Sent]:
        total, sent = carry
        return add(total, sent), in_round(plan.table, sent, size)[1]

    total, _ = jax.lax.fori_loop(0, plan.rounds, one, (total, plan.first))
    return total
