"""Tokens to the devices that hold their experts, and sums back: a token goes only where it must.

P devices along the mesh axis "expert" hold E/P experts each, and n tokens each. A token goes to a device at most once,
however many of its K experts are there: that device adds its experts' weighted outputs, and one sum returns. With
node-limited routing these are few devices; see `mean_reach`.

`all_to_all` has static shapes: it sends tokens in rounds, each with the same number of slots for every peer, until all
are sent. Even load takes one round, uneven load further ones, which are smaller, and no token is ever dropped. `ragged`
sends exactly the tokens that there are, by the hardware's own collective.

This file and expert_parallel.py are the only ones with hand-written collectives.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Layout, ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.ops.routing import ROUTERS
from dsv3_jax.ops.varying import varying, zeros

# How many devices a token goes to


def mean_reach(cfg: ModelConfig, peers: int) -> float:
    """Devices among `peers` that hold a token's experts, on average over all choices that the router can make.

    A token chooses g of G groups, and K of the experts in these. A device holds E/P experts, or E/G of each of several
    groups. If devices and groups do not divide one another, groups are ignored.

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
        math.comb(on_device, j) * math.comb(num_groups - on_device, groups - j) * math.comb(pool - j * each, k)
        for j in range(min(on_device, groups) + 1)
    )
    return peers * (1 - missed / (math.comb(num_groups, groups) * math.comb(pool, k)))


def send_capacity(cfg: ModelConfig, layout: Layout, tokens: int, peers: int) -> int:
    """Slots that `all_to_all` has for each peer in the first round: what even load needs times the slack, at most n.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> send_capacity(preset("v3"), Layout(capacity_slack=1.0), tokens=1000, peers=8)  # 1000 · 3.63 / 8
        454
    """
    return min(tokens, math.ceil(layout.capacity_slack * tokens * mean_reach(cfg, peers) / peers))


def later_slots(slots: int) -> int:
    """Slots for each peer in each round after the first, for the little that is left: a quarter.

    Example:
        >>> later_slots(454)
        114
    """
    return -(-slots // 4)


def wire_bytes(tokens_sent: float, cfg: ModelConfig, itemsize: int) -> float:
    """Bytes a token that one layer's forward pass sends, there and back.

    Args:
        tokens_sent: copies of a token that go to other devices: a row there, with ids and gates, and a row back.
        itemsize: bytes of a number of the compute dtype.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> wire_bytes(3.0, preset("v3"), itemsize=2)  # 3 · (2 · 7168 · 2 + 8 · 8)
        86208.0
    """
    return tokens_sent * (2 * cfg.dim * itemsize + cfg.experts_per_token * (4 + 4))


# Lists of tokens


class PeerTable(NamedTuple):
    """Which device each choice of a token is on, and the token's rank among all that go there."""

    peer: Array  # int32 [n, K]
    rank: Array  # int32 [n, K]
    first: Array  # bool [n, K]: no earlier choice of the token is on the same device
    counts: Array  # int32 [P]: tokens that go to each device


def peer_table(expert_ids: Int[Array, "n K"], held: int, peers: int) -> PeerTable:
    """List where this device's tokens go, if each device holds `held` experts.

    Example:
        >>> table = peer_table(jnp.array([[0, 1], [0, 2]]), held=2, peers=2)  # the first device has experts 0 and 1
        >>> table.counts.tolist(), table.first.tolist()
        ([2, 1], [[True, False], [True, True]])
    """
    peer = expert_ids // held
    goes = jax.nn.one_hot(peer, peers, dtype=jnp.int32).max(axis=1)  # [n, P]
    rank = jnp.take_along_axis(jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1, peer, axis=1)
    again = jnp.tril(peer[:, :, None] == peer[:, None, :], -1).any(axis=-1)
    return PeerTable(peer, rank, ~again, goes.sum(axis=0, dtype=jnp.int32))


class SendBuffer(NamedTuple):
    """Which token is in each of S slots, and which slot each choice of a token has."""

    token: Array  # int32 [S]: n if the slot is empty
    slot: Array  # int32 [n, K]: S for a choice without one: an earlier choice's serves it, or another round's


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
        >>> buffer = SendBuffer(token=jnp.array([1, 0, 2]), slot=jnp.array([[1], [0]]))  # 2: an empty slot
        >>> to_slots(jnp.array([5.0, 6.0]), buffer)
        Array([6., 5., 0.], dtype=float32)
    """
    return _fetch(x, buffer.token)


@jax.custom_vjp
def from_slots(rows: Array, buffer: SendBuffer) -> Array:
    """[S, …] to [n, …]: the sum over a token's slots.

    Example:
        >>> buffer = SendBuffer(token=jnp.array([0, 1, 0]), slot=jnp.array([[0, 2], [1, 3]]))  # 3: without a slot
        >>> from_slots(jnp.array([7.0, 8.0, 9.0]), buffer)
        Array([16.,  8.], dtype=float32)
    """
    slot = buffer.slot
    return sum(_fetch(rows, slot[:, k]) for k in range(1, slot.shape[1])) + _fetch(rows, slot[:, 0])


to_slots.defvjp(lambda x, buffer: (to_slots(x, buffer), buffer), lambda buffer, d: (from_slots(d, buffer), None))
from_slots.defvjp(
    lambda rows, buffer: (from_slots(rows, buffer), buffer), lambda buffer, d: (to_slots(d, buffer), None)
)


def to_local_ids(ids: Array, gates: Array, held: int) -> tuple[Array, Array]:
    """Choices among this device's experts, counted from 0; others get the id after the last, and gate 0."""
    ids = ids - jax.lax.axis_index("expert").astype(ids.dtype) * held
    here = (ids >= 0) & (ids < held)
    return jnp.where(here, ids, held), jnp.where(here, gates, 0)


Experts = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]  # w_gate, w_up, w_down
Args = tuple[Array, Array, Array, Experts]  # x, expert_ids, gates and this device's experts


def _at_their_experts(args: Args, buffer: SendBuffer, there: Callable, back: Callable, kernels: Kernels) -> Array:
    """Send the tokens that have a slot to their experts, and the sums back."""
    x, ids, gates, experts = args
    rows, row_gates = there(to_slots(x, buffer)), there(to_slots(gates, buffer))
    row_ids = there(_fetch(ids + 1, buffer.token)) - 1  # an empty slot has the expert -1, which no device holds
    row_ids, row_gates = to_local_ids(row_ids, row_gates, experts[0].shape[0])
    return from_slots(back(kernels("grouped_swiglu", rows, row_ids, row_gates, *experts)), buffer)


# All to all, in rounds


def all_to_all(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    *,
    kernels: Kernels,
    slots: int,
) -> tuple[Float[Array, "n D"], Float[Array, ""]]:
    """Run `Kernels.grouped_swiglu` on this device's tokens with all peers' experts, inside `shard_map`.

    All devices go through as many rounds as the one that needs most, along other mesh axes too: a round may hold other
    collectives. The first round is differentiated as it is. The later ones, of `later_slots`, are a loop of unknown
    length: their gradient goes through them once more and recomputes each.

    Args:
        x, gates: vary along every axis along which the experts do, and the experts along theirs.
        slots: for each peer in the first round.
    Returns: (y, copies of a token sent, empty slots included, mean over tokens).
    """
    n, peers = x.shape[0], jax.lax.axis_size("expert")
    args, table = (x, expert_ids, gates, experts), peer_table(expert_ids, experts[0].shape[0], peers)
    y = _round(jnp.zeros((), jnp.int32), args, table, kernels, slots)
    size, most = later_slots(slots), jax.lax.pmax(table.counts.max(), tuple(varying(table.counts)))
    later = -(-jnp.maximum(most - slots, 0) // size)  # rounds
    if slots < n:
        y = y + _later_rounds(kernels, slots, args, table, later)
    return y, (slots + later * size).astype(jnp.float32) * ((peers - 1) / n)


def _round(start: Array, args: Args, table: PeerTable, kernels: Kernels, slots: int) -> Array:
    """Send each peer's tokens of the ranks start … start + slots − 1."""
    size, rank = table.counts.size * slots, table.rank - start
    now = table.first & (rank >= 0) & (rank < slots)
    buffer = _send_buffer(jnp.where(now, table.peer * slots + rank, size), size)
    across = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
    return _at_their_experts(args, buffer, across, across, kernels)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _later_rounds(kernels, first, args, table, rounds):
    """The sum that the rounds after one of `first` slots add to y."""
    slots = later_slots(first)

    def add(number, y):
        return y + _round(first + number * slots, args, table, kernels, slots)

    return jax.lax.fori_loop(0, rounds, add, jnp.zeros_like(args[0]))


def _later_rounds_fwd(kernels, first, *args):
    return _later_rounds(kernels, first, *args), args


def _later_rounds_bwd(kernels, first, saved, dy):
    slots = later_slots(first)
    (x, ids, *rest), table, rounds = saved

    def add(number, total):
        def one(x, *rest):
            return _round(first + number * slots, (x, ids, *rest), table, kernels, slots)

        return jax.tree.map(jnp.add, total, jax.vjp(one, x, *rest)[1](dy))

    zero = jax.tree.map(lambda a: zeros(a.shape, a), (x, *rest))
    d_x, *d_rest = jax.lax.fori_loop(0, rounds, add, zero)
    return (d_x, None, *d_rest), None, None


_later_rounds.defvjp(_later_rounds_fwd, _later_rounds_bwd)


# Ragged


# One way, int32 [P] each: where the rows for a peer start here, how many they are, where they land there, and how many
# rows come from it. See `jax.lax.ragged_all_to_all`.
Way = tuple[Array, Array, Array, Array]


def ragged(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    *,
    kernels: Kernels,
) -> tuple[Float[Array, "n D"], Float[Array, ""]]:
    """`all_to_all` without empty slots on the wire. JAX has it for GPU and TPU.

    A device has slots for every token of all its peers, as with `gather`.
    Returns: as there; exactly the copies that had to be sent.
    """
    n, me, peers = x.shape[0], jax.lax.axis_index("expert"), jax.lax.axis_size("expert")
    table = peer_table(expert_ids, experts[0].shape[0], peers)
    counts = jax.lax.all_gather(table.counts, "expert")  # [from, to]
    starts = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts  # in the sender's buffer
    lands = jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts  # in the receiver's
    out = starts[me], counts[me], lands[me], counts[:, me]
    home = lands[:, me], counts[:, me], starts[:, me], counts[me]
    size, received = n * min(expert_ids.shape[1], peers), n * peers  # whatever the router does
    buffer = _send_buffer(jnp.where(table.first, starts[me][table.peer] + table.rank, size), size)

    def there(rows):
        return _exchange(received, size, rows, out, home)

    def back(rows):
        return _exchange(size, received, rows, home, out)

    y = _at_their_experts((x, expert_ids, gates, experts), buffer, there, back, kernels)
    sent = (table.counts.sum(dtype=jnp.int32) - table.counts[me]).astype(jnp.float32) / n
    return y, jax.lax.pmean(sent, tuple(varying(sent)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(received: int, size: int, rows: Array, there: Way, home: Way) -> Array:
    """[size, …] here to [received, …] there, zeros where nothing lands; `home` is the way back, and the gradient's."""
    return jax.lax.ragged_all_to_all(rows, zeros((received, *rows.shape[1:]), rows), *there, axis_name="expert")


_exchange.defvjp(
    lambda received, size, rows, there, home: (_exchange(received, size, rows, there, home), (there, home)),
    lambda received, size, ways, d: (_exchange(size, received, d, ways[1], ways[0]), None, None),
)
