"""Tokens to the devices that hold their experts, and sums back: a token goes only where it must.

P devices along the mesh axis "expert" hold E/P experts each, and n tokens each. A token goes to a
device at most once, however many of its K experts are there: that device adds its experts' weighted
outputs, and one sum returns. With node-limited routing these are few devices; see `mean_reach`.

`all_to_all` has static shapes: it sends tokens in rounds, until all are sent. A round has slots for
so many tokens of each peer, and rows for so many of their choices. Even load takes one round,
uneven load further ones, which are smaller, and no token is ever dropped.

This file and expert_parallel.py are the only ones with hand-written collectives.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Layout, ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.ops.routing import ROUTERS
from dsv3_jax.ops.varying import varying, zeros

# How many devices a token goes to


def mean_reach(cfg: ModelConfig, peers: int) -> float:
    """Devices among `peers` that hold a token's experts, on average over all possible choices.

    A token chooses g of G groups, and K of the experts in these. A device holds E/P experts, or E/G
    of each of several groups. If devices and groups do not divide one another, groups are ignored.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cfg = preset("v3")  # a token's 8 experts are in 4 of 8 groups
        >>> [round(mean_reach(cfg, peers), 2) for peers in (1, 8, 256)]
        [1.0, 3.63, 8.0]
    """
    num_groups, groups, k = cfg.num_groups, cfg.groups_per_token, cfg.experts_per_token
    if not ROUTERS[cfg.router].has_groups or max(peers, num_groups) % min(peers, num_groups):
        num_groups = groups = 1
    pool = groups * cfg.num_experts // num_groups
    on_device = max(1, num_groups // peers)
    each = cfg.num_experts // max(peers, num_groups)
    # Choices that miss a device, with j of its groups among the chosen ones.
    missed = sum(
        math.comb(on_device, j)
        * math.comb(num_groups - on_device, groups - j)
        * math.comb(pool - j * each, k)
        for j in range(min(on_device, groups) + 1)
    )
    return peers * (1 - missed / (math.comb(num_groups, groups) * math.comb(pool, k)))


class Size(NamedTuple):
    """Of a round: how many tokens a device may send to a peer, and how many choices of them."""

    tokens: int
    choices: int


def round_size(cfg: ModelConfig, layout: Layout, tokens: int, peers: int) -> Size:
    """The first round's size: what even load needs times the slack, at most what a device can need.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> layout = Layout(capacity_slack=1.0)
        >>> round_size(preset("v3"), layout, tokens=1000, peers=8)  # 1000 · 3.63 / 8, 1000 · 8 / 8
        Size(tokens=454, choices=1000)
    """
    share = layout.capacity_slack * tokens / peers
    most = most_choices(cfg.experts_per_token, cfg.num_experts // peers)
    slots = min(tokens, math.ceil(share * mean_reach(cfg, peers)))
    return Size(slots, max(most, min(slots * most, math.ceil(share * cfg.experts_per_token))))


def most_choices(num_choices: int, held: int) -> int:
    """The most choices that one token can have on a device of `held` experts."""
    return min(num_choices, held)


def later_size(size: Size, most: int) -> Size:
    """The size of each later round, for the little that is left: a quarter, or `most` choices.

    Example:
        >>> later_size(Size(454, 1000), most=8)
        Size(tokens=114, choices=250)
    """
    return Size(-(-size.tokens // 4), max(-(-size.choices // 4), most))


def wire_bytes(tokens_sent: float, cfg: ModelConfig, itemsize: int) -> float:
    """Bytes a token that one layer's forward pass sends, there and back.

    Args:
        tokens_sent: copies of a token that go to other devices: a row there, with ids and gates,
            and a row back.
        itemsize: bytes of a number of the compute dtype.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> wire_bytes(3.0, preset("v3"), itemsize=2)  # 3 · (2 · 7168 · 2 + 8 · 8)
        86208.0
    """
    return tokens_sent * (2 * cfg.dim * itemsize + cfg.experts_per_token * (4 + 4))


# Lists of tokens


class PeerTable(NamedTuple):
    """Which device each choice is on, and how many tokens and choices go to each so far."""

    peer: Array  # int32 [n, K]
    first: Array  # bool [n, K]: no earlier choice of the token is on the same device
    choices: Array  # int32 [n, P]: of each token on each device
    tokens_so_far: Array  # int32 [n, P]: tokens that go to each device, this one included
    choices_so_far: Array  # int32 [n, P]


def peer_table(expert_ids: Int[Array, "n K"], held: int, peers: int) -> PeerTable:
    """List where this device's tokens go, if each device holds `held` experts.

    Example:
        >>> expert_ids = jnp.array([[0, 1], [0, 2]])  # the first device has experts 0 and 1
        >>> table = peer_table(expert_ids, held=2, peers=2)
        >>> table.choices_so_far.tolist(), table.first.tolist()
        ([[2, 0], [3, 1]], [[True, False], [True, True]])
    """
    peer = expert_ids // held
    choices = jax.nn.one_hot(peer, peers, dtype=jnp.int32).sum(axis=1)
    again = jnp.tril(peer[:, :, None] == peer[:, None, :], -1).any(axis=-1)
    tokens_so_far, choices_so_far = (
        jnp.cumsum(a, axis=0, dtype=jnp.int32) for a in (jnp.minimum(choices, 1), choices)
    )
    return PeerTable(peer, ~again, choices, tokens_so_far, choices_so_far)


# How many tokens, and choices of theirs, earlier rounds have sent to each device: int32 [1, P].
Start = tuple[Array, Array]


def _in_round(table: PeerTable, start: Start, size: Size) -> tuple[Array, Start]:
    """(Which token a round sends where [n, P], the next round's start): the next that fit."""
    token, choice = table.tokens_so_far - start[0], table.choices_so_far - start[1]
    now = (table.choices > 0) & (token > 0) & (token <= size.tokens) & (choice <= size.choices)
    sent = (
        jnp.where(now, a, 0).sum(axis=0, dtype=jnp.int32, keepdims=True) for a in (1, table.choices)
    )
    return now, jax.tree.map(jnp.add, start, tuple(sent))


def _count_rounds(table: PeerTable, start: Start, size: Size) -> Array:
    """How many rounds this device needs after a start."""

    def left(carry):
        return (carry[1][0] < table.tokens_so_far[-1:]).any()

    def one(carry):
        return carry[0] + 1, _in_round(table, carry[1], size)[1]

    return jax.lax.while_loop(left, one, (zeros((), table.peer), start))[0]


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
    return sum(_fetch(rows, slot[:, k]) for k in range(1, slot.shape[1])) + _fetch(rows, slot[:, 0])


to_slots.defvjp(
    lambda x, buffer: (to_slots(x, buffer), buffer), lambda buffer, d: (from_slots(d, buffer), None)
)
from_slots.defvjp(
    lambda rows, buffer: (from_slots(rows, buffer), buffer),
    lambda buffer, d: (to_slots(d, buffer), None),
)


def to_local_ids(ids: Array, gates: Array, held: int) -> tuple[Array, Array]:
    """Choices among this device's experts, from 0; others get the id after the last, and gate 0."""
    ids = ids - jax.lax.axis_index("expert").astype(ids.dtype) * held
    here = (ids >= 0) & (ids < held)
    return jnp.where(here, ids, held), jnp.where(here, gates, 0)


# w_gate, w_up, w_down
Experts = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]
Args = tuple[Array, Array, Array, Experts]  # x, expert_ids, gates and this device's experts


def _at_their_experts(
    args: Args,
    buffer: SendBuffer,
    there: Callable,
    back: Callable,
    kernels: Kernels,
    **settings: Any,
) -> Array:
    """Send tokens with a slot to their experts, and sums back; settings: of `grouped_swiglu`."""
    x, ids, gates, experts = args
    rows, row_gates = there(to_slots(x, buffer)), there(to_slots(gates, buffer))
    # an empty slot has the expert -1, which no device holds
    row_ids = there(_fetch(ids + 1, buffer.token)) - 1
    row_ids, row_gates = to_local_ids(row_ids, row_gates, experts[0].shape[0])
    y = kernels("grouped_swiglu", rows, row_ids, row_gates, *experts, **settings)
    return from_slots(back(y), buffer)


# All to all, in rounds


def all_to_all(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    *,
    kernels: Kernels,
    size: Size,
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
    later = later_size(size, most_choices(expert_ids.shape[1], held))
    none = zeros((1, peers), table.peer)
    starts = (none, none), _in_round(table, (none, none), size)[1]
    rounds = _count_rounds(table, starts[1], later)
    rounds = jax.lax.pmax(rounds, tuple(varying(rounds)))
    y = _rounds(kernels, (size, later), x, gates, experts, (expert_ids, table, starts, rounds))
    return y, (size.tokens + rounds * later.tokens).astype(jnp.float32) * ((peers - 1) / n)


def _round(args: Args, table: PeerTable, start: Start, kernels: Kernels, size: Size) -> Array:
    """Send the tokens of a round, and add up what returns."""
    now, _ = _in_round(table, start, size)
    now, rank = (
        jnp.take_along_axis(a, table.peer, axis=1)
        for a in (now, table.tokens_so_far - start[0] - 1)
    )
    slots = start[0].size * size.tokens
    slot = jnp.where(now & table.first, table.peer * size.tokens + rank, slots)
    buffer = _send_buffer(slot, slots)
    across = partial(
        jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True
    )
    rows = start[0].size * size.choices
    return _at_their_experts(args, buffer, across, across, kernels, rows=rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounds(kernels, sizes, x, gates, experts, which):
    return _rounds_fwd(kernels, sizes, x, gates, experts, which)[0]


def _rounds_fwd(kernels, sizes, x, gates, experts, which):
    ids, table, (none, start), rounds = which

    def first(x, gates, experts):
        return _round((x, ids, gates, experts), table, none, kernels, sizes[0])

    def later(y, start):
        return y + _round((x, ids, gates, experts), table, start, kernels, sizes[1])

    y, pull_back = jax.vjp(first, x, gates, experts)
    y = _later_rounds(later, y, table, start, rounds, sizes[1])
    return y, (pull_back, x, gates, experts, which)


def _rounds_bwd(kernels, sizes, saved, dy):
    pull_back, x, gates, experts, (ids, table, (_, start), rounds) = saved

    def later(total, start):
        def one(x, gates, experts):
            return _round((x, ids, gates, experts), table, start, kernels, sizes[1])

        return jax.tree.map(jnp.add, total, jax.vjp(one, x, gates, experts)[1](dy))

    return *_later_rounds(later, pull_back(dy), table, start, rounds, sizes[1]), None


_rounds.defvjp(_rounds_fwd, _rounds_bwd)


def _later_rounds(
    add: Callable, total: Any, table: PeerTable, start: Start, rounds: Array, size: Size
) -> Any:
    """Call `total = add(total, start)` in each round after the first.

    Experts of another dtype are cast in each round: kept casts would be half of the program's
    temporary memory.
    """

    def one(_, carry):
        total, start = carry
        return add(total, start), _in_round(table, start, size)[1]

    return jax.lax.fori_loop(0, rounds, one, (total, start))[0]
