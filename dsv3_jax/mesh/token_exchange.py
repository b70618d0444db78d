"""Tokens to the devices that hold their experts, and sums back: a token goes only where it must.

P devices along the mesh axis "expert" hold E/P experts each, and n tokens each. A device adds its
experts' weighted outputs for each token that it was sent, and one sum returns. `all_to_all` has
static shapes, so it sends tokens in rounds of a fixed size, until all are sent: see rounds.py.
Where several nodes are along the axis, it is used twice: between nodes, and inside each of them.

Letters, beside those of reference.py: n tokens of a device, P peers, s slots of a round.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import Layout, ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.mesh.rounds import (
    PeerTable,
    RoundSize,
    Sent,
    count_rounds,
    in_round,
    later_size,
    mean_reach,
    most_choices,
    peer_table,
    round_size,
    second_size,
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


def _set_transpose(f: Any, transpose: Any) -> None:
    def forward(x: Array, buffer: SendBuffer) -> tuple[Array, SendBuffer]:
        return f(x, buffer), buffer

    def backward(buffer: SendBuffer, d: Array) -> tuple[Array, None]:
        return transpose(d, buffer), None

    f.defvjp(forward, backward)


_set_transpose(to_slots, from_slots)
_set_transpose(from_slots, to_slots)


class Hop(NamedTuple):
    """The groups of devices along "expert" that exchange tokens."""

    peers: int  # devices of a group, or nodes
    held: int  # experts of each
    stride: int = 1  # from one device of a group to the next, along the axis

    @property
    def groups(self) -> list[list[int]] | None:
        """The numbers of the devices by group; None for one group of all."""
        devices = jax.lax.axis_size("expert")
        if self.peers == devices:
            return None
        numbers = np.arange(devices).reshape(-1, self.peers, self.stride)
        return numbers.swapaxes(1, 2).reshape(-1, self.peers).tolist()

    def own_index(self) -> Array:
        """This device's number in its group."""
        number = jax.lax.axis_index("expert")
        return number if self.groups is None else number // self.stride % self.peers

    def across(self, x: Array) -> Array:
        """Send the i-th part of x to the i-th device of the group, and join what they send."""
        return jax.lax.all_to_all(x, "expert", 0, 0, axis_index_groups=self.groups, tiled=True)


def to_local_ids(
    ids: Array, gates: Array, held: int, index: Array | None = None
) -> tuple[Array, Array]:
    """Choices among this device's experts, from 0; others get the id after the last, and gate 0.

    Args: index: of the device, or its node, among those that hold as many. None: along "expert".
    """
    index = jax.lax.axis_index("expert") if index is None else index
    ids = ids - index.astype(ids.dtype) * held
    here = (ids >= 0) & (ids < held)
    return jnp.where(here, ids, held), jnp.where(here, gates, 0)


# w_gate, w_up, w_down
Experts = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]


# What runs on the tokens of a round: (x, ids, gates, experts, the round's size) → their sums, and
# what further hops have sent
Run = Callable[[Array, Array, Array, Experts, RoundSize], tuple[Array, tuple[Array, ...]]]


# All to all: in one hop, or by nodes


def exchange(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    *,
    kernels: Kernels,
    cfg: ModelConfig,
    layout: Layout,
) -> tuple[Float[Array, "n D"], tuple[Float[Array, ""], ...]]:
    """Run the op "grouped_swiglu" on this device's tokens and all experts, inside `shard_map`.

    With `layout.expert_nodes` a token goes first to the device with this one's number in each node
    that has one of its experts. That device sends it to the devices of its node, and adds up what
    they return: the network between nodes carries a token once for each node.

    Args: x, gates: vary along every axis along which the experts do, and the experts along theirs.
    Returns: (y, copies of a token that each hop sends, empty slots included, mean over tokens).
    Source: DeepSeek-V3 report, section 3.2.2.
    """
    n = x.shape[0]
    peers = jax.lax.axis_size("expert")
    held = experts[0].shape[0]
    nodes = layout.expert_nodes

    def here(
        hop: Hop, x: Array, ids: Array, gates: Array, experts: Experts, size: RoundSize
    ) -> Any:
        """This device's experts."""
        rows = hop.peers * size.choices
        return kernels("grouped_swiglu", x, ids, gates, *experts, rows=rows), ()

    if nodes == 1:
        flat = Hop(peers, held)
        size = round_size(cfg, layout, n, peers)
        run = partial(here, flat)
        return all_to_all(x, expert_ids, gates, experts, hop=flat, size=size, run=run)

    # The second hop, on what a round of the first one brings.
    far = Hop(nodes, held * (peers // nodes), stride=peers // nodes)
    near = Hop(peers // nodes, held)
    spread = mean_reach(cfg, peers) / mean_reach(cfg, nodes)
    most = most_choices(cfg.experts_per_token, held)

    def inside(x: Array, ids: Array, gates: Array, experts: Experts, first: RoundSize) -> Any:
        size = second_size(first, far.peers, near.peers, spread, most)
        return all_to_all(x, ids, gates, experts, hop=near, size=size, run=partial(here, near))

    size = round_size(cfg, layout, n, nodes)
    return all_to_all(x, expert_ids, gates, experts, hop=far, size=size, run=inside)


def all_to_all(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: Experts,
    *,
    hop: Hop,
    size: RoundSize,
    run: Run,
) -> tuple[Float[Array, "n D"], tuple[Float[Array, ""], ...]]:
    """Send this device's tokens to the peers of a hop, run there, and add up what returns.

    A device receives at most `size.choices` choices of each peer, so its arrays have P times as
    many rows, and not K for each token. All devices go through as many rounds as the one that needs
    most, along other mesh axes too: a round may hold other collectives. The gradient computes the
    later rounds again, a loop of unknown length.

    Args:
        expert_ids: from 0 to P · held - 1; a larger one is a choice of another group.
        size: of the first round.
        run: on the tokens of a round.
    Returns: as `exchange`.
    """
    n = x.shape[0]
    table = peer_table(expert_ids, hop.held, hop.peers)
    later = later_size(size, most_choices(expert_ids.shape[1], hop.held))

    # The first round.
    zero = zeros((1, hop.peers), table.peer)
    none = Sent(zero, zero)
    _, first = in_round(table, none, size)

    # As many further rounds as the device needs that needs most.
    rounds = count_rounds(table, first, later)
    rounds = jax.lax.pmax(rounds, tuple(sorted(varying(rounds))))

    plan = Plan(expert_ids, table, none, first, rounds)
    y, further = _rounds((run, hop, size, later), x, gates, experts, plan)

    slots = size.tokens + rounds * later.tokens
    sent = slots.astype(jnp.float32) * ((hop.peers - 1) / n)
    return y, (sent, *further)


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
    run: Run,
    hop: Hop,
    x: Array,
    gates: Array,
    experts: Experts,
) -> tuple[Array, tuple[Array, ...]]:
    """Send the tokens of a round to their experts, and add up what returns."""
    table = plan.table

    # The slot of each token's first choice on a device; other choices there share it.
    now_nP, _ = in_round(table, sent, size)
    now_nK = jnp.take_along_axis(now_nP, table.peer, axis=1)
    rank_nK = jnp.take_along_axis(table.tokens_so_far - sent.tokens - 1, table.peer, axis=1)
    if hop.groups is not None:  # choices of other groups have no peer here
        now_nK &= table.peer < hop.peers
    slots = hop.peers * size.tokens
    slot_nK = jnp.where(now_nK & table.first, table.peer * size.tokens + rank_nK, slots)
    buffer = _send_buffer(slot_nK, slots)

    # There: rows, gates and ids. An empty slot has the expert -1, which no device holds.
    x_sD = hop.across(to_slots(x, buffer))
    gates_sK = hop.across(to_slots(gates, buffer))
    ids_sK = hop.across(_fetch(plan.expert_ids + 1, buffer.token)) - 1
    ids_sK, gates_sK = to_local_ids(ids_sK, gates_sK, hop.held, hop.own_index())

    # The experts there, and the sums back. What further hops send is of slots; here of own tokens.
    y_sD, further = run(x_sD, ids_sK, gates_sK, experts, size)
    further = tuple(copies * (slots / x.shape[0]) for copies in further)
    return from_slots(hop.across(y_sD), buffer), further


Static = tuple[Run, Hop, RoundSize, RoundSize]  # (run, hop, size of the first round, of later ones)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(
    static: Static, x: Array, gates: Array, experts: Experts, plan: Plan
) -> tuple[Array, tuple[Array, ...]]:
    return _rounds_fwd(static, x, gates, experts, plan)[0]


def _rounds_fwd(
    static: Static, x: Array, gates: Array, experts: Experts, plan: Plan
) -> tuple[Any, tuple]:
    run, hop, size, later = static

    # The first round keeps what its gradient needs.
    first = partial(_round, plan, plan.none, size, run, hop)
    y, pull_back, further = jax.vjp(first, x, gates, experts, has_aux=True)

    def add_later(total: Any, sent: Sent) -> Any:
        found = _round(plan, sent, later, run, hop, x, gates, experts)
        return jax.tree.map(jnp.add, total, found)

    found = _later_rounds(add_later, (y, further), plan, later)
    return found, (pull_back, x, gates, experts, plan)


def _rounds_bwd(static: Static, saved: tuple, d: tuple) -> tuple[Array, Array, Experts, None]:
    run, hop, _, later = static
    pull_back, x, gates, experts, plan = saved
    dy, _ = d

    # The later rounds are computed again, each with its gradient.
    def add_later(total: tuple, sent: Sent) -> tuple:
        again = partial(_round, plan, sent, later, run, hop)
        _, pull_back, _ = jax.vjp(again, x, gates, experts, has_aux=True)
        return jax.tree.map(jnp.add, total, pull_back(dy))

    dx, d_gates, d_experts = _later_rounds(add_later, pull_back(dy), plan, later)
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
