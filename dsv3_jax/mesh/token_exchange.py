"""Tokens to the devices that hold their experts, and the sums back: exchanges in which a token goes only where it must.

P devices along the mesh axis "expert" hold E/P experts each, and n tokens each. A token goes to a device at most once,
however many of its K experts live there: that device adds up what its experts say, weighed, and one sum comes back.
With node-limited routing these are few devices; see `mean_reach`.

`all_to_all` knows shapes alone beforehand: it sends tokens in rounds, each with the same number of places for every
peer, until all are sent. Even load takes one round, uneven load more of them, and no token is ever dropped.
`ragged` sends just the tokens that there are, where the hardware's own collective can.

This file and expert_parallel.py are the only ones with collectives written by hand.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.ops import dispatch
from dsv3_jax.ops.varying import varying, zeros

# How many devices a token goes to


def mean_reach(cfg: ModelConfig, peers: int) -> float:
    """Devices among `peers` that hold a token's experts, on average over all choices that the router can make.

    A token chooses g of G groups, and K of the experts in these. A device holds E/P experts, or E/G of each of several
    groups. Where devices and groups do not divide one another, the groups are left out of account.
    """
    num_groups, groups, k = cfg.num_groups, cfg.groups_per_token, cfg.experts_per_token
    if cfg.router not in ("sigmoid", "softmax") or max(peers, num_groups) % min(peers, num_groups):
        num_groups = groups = 1
    pool = groups * cfg.num_experts // num_groups
    on_device = max(1, num_groups // peers)
    each = cfg.num_experts // max(peers, num_groups)
    # Ways to choose that pass a device by, j of its groups being among the chosen ones.
    missed = sum(
        math.comb(on_device, j) * math.comb(num_groups - on_device, groups - j) * math.comb(pool - j * each, k)
        for j in range(min(on_device, groups) + 1)
    )
    return peers * (1 - missed / (math.comb(num_groups, groups) * math.comb(pool, k)))


def places_a_round(cfg: ModelConfig, tokens: int, peers: int) -> int:
    """Places that `all_to_all` has for each peer in a round: what even load needs times the slack, at most all n."""
    return min(tokens, math.ceil(cfg.layout.slack * tokens * mean_reach(cfg, peers) / peers))


def wire_bytes(crossed: float, cfg: ModelConfig, itemsize: int) -> float:
    """Bytes a token that one layer's forward pass puts on the wire, there and back.

    Args:
        crossed: copies of a token that go to other devices: a row there, with ids and gates, and a row back.
        itemsize: bytes of a number of the computing dtype.
    """
    return crossed * (2 * cfg.dim * itemsize + cfg.experts_per_token * (4 + 4))


# Lists of tokens


class Roll(NamedTuple):
    """Which device each choice of a token lies on, and the token's turn among all that go there."""

    peer: Array  # int32 [n, K]
    turn: Array  # int32 [n, K]
    first: Array  # bool [n, K]: no earlier choice of the token lies on the same device
    counts: Array  # int32 [P]: tokens that go to each device


def roll(expert_ids: Int[Array, "n K"], held: int, peers: int) -> Roll:
    """The lists of this device's tokens, each device holding `held` experts."""
    peer = expert_ids // held
    goes = jax.nn.one_hot(peer, peers, dtype=jnp.int32).max(axis=1)  # [n, P]
    turn = jnp.take_along_axis(jnp.cumsum(goes, axis=0, dtype=jnp.int32) - 1, peer, axis=1)
    again = jnp.tril(peer[:, :, None] == peer[:, None, :], -1).any(axis=-1)
    return Roll(peer, turn, ~again, goes.sum(axis=0, dtype=jnp.int32))


class Places(NamedTuple):
    """How tokens stand in a buffer of S places."""

    token: Array  # int32 [S]: n where the place is empty
    place: Array  # int32 [n, K]: S for a choice that has none, as an earlier choice's serves, or another round's


def _places(place: Array, size: int) -> Places:
    n = place.shape[0]
    tokens = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], place.shape)
    empty = zeros((size,), place) + n
    return Places(empty.at[place.reshape(-1)].set(tokens.reshape(-1), mode="drop"), place)


def _fetch(x: Array, rows: Array) -> Array:
    """Rows of x; zeros for what lies past its end."""
    return x.at[rows].get(mode="fill", fill_value=0)


# The two ways between tokens and places are each other's transpose: no gradient scatters rows.


@jax.custom_vjp
def to_places(x: Array, at: Places) -> Array:
    """[n, …] to [S, …]: each place's token, zeros where it is empty."""
    return _fetch(x, at.token)


@jax.custom_vjp
def from_places(rows: Array, at: Places) -> Array:
    """[S, …] to [n, …]: the sum over a token's places."""
    return sum(_fetch(rows, at.place[:, k]) for k in range(1, at.place.shape[1])) + _fetch(rows, at.place[:, 0])


to_places.defvjp(lambda x, at: (to_places(x, at), at), lambda at, d: (from_places(d, at), None))
from_places.defvjp(lambda rows, at: (from_places(rows, at), at), lambda at, d: (to_places(d, at), None))


def of_mine(ids: Array, gates: Array, held: int) -> tuple[Array, Array]:
    """Choices among this device's experts, counted from 0; others go to one expert too many and weigh nothing."""
    ids = ids - jax.lax.axis_index("expert").astype(ids.dtype) * held
    here = (ids >= 0) & (ids < held)
    return jnp.where(here, ids, held), jnp.where(here, gates, 0)


class Call(NamedTuple):
    """What a round computes with, beside what it is differentiated in."""

    ids: Array  # int32 [n, K]
    roll: Roll
    experts: dispatch.Experts  # those of this device
    layer: Array


Travel = Callable[[Array], Array]


def _at_their_experts(
    x: Array, gates: Array, thread: dispatch.Experts, call: Call, at: Places, there: Travel, back: Travel, backend: str
) -> tuple[Array, dispatch.Experts]:
    """The tokens that have a place go to their experts, and the sums come back to them. Returns (y [n, D], thread)."""
    rows, row_gates = there(to_places(x, at)), there(to_places(gates, at))
    row_ids = there(_fetch(call.ids + 1, at.token)) - 1  # an empty place has the expert -1, who is nobody's
    row_ids, row_gates = of_mine(row_ids, row_gates, call.experts.w_gate.shape[1])
    sums, thread = dispatch.routed_swiglu_in_stack(
        rows, row_ids, row_gates, call.experts, thread, call.layer, backend=backend
    )
    return from_places(back(sums), at), thread


# All to all, in rounds


def all_to_all(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: dispatch.Experts,
    thread: dispatch.Experts,
    layer: Int[Array, ""],
    *,
    backend: str,
    peers: int,
    places: int,
) -> tuple[Float[Array, "n D"], dispatch.Experts, Float[Array, ""]]:
    """`dispatch.routed_swiglu_in_stack` of this device's tokens with all peers' experts, inside `shard_map`.

    All devices go through as many rounds as the one that needs most, along other mesh axes, too: so whatever else
    they do together in a round, they all do. The first round is differentiated as it stands. The later ones are a
    loop of unknown length: their gradient goes through them once more, each computed anew.

    Args: as there; x and gates differ along every axis along which the experts do.
        places: for each peer in a round.
    Returns: (y, the thread, copies of a token put on the wire, empty places counted in, mean over tokens).
    """
    n = x.shape[0]
    lists = roll(expert_ids, experts.w_gate.shape[1], peers)
    call = Call(expert_ids, lists, experts, layer)
    rounds = jax.lax.pmax(-(-lists.counts.max() // places), tuple(varying(lists.counts)))
    y, thread = _round(jnp.zeros((), jnp.int32), x, gates, thread, call, backend, places)
    if places < n:
        more, thread = _later_rounds(backend, places, x, gates, thread, call, rounds)
        y = y + more
    return y, thread, rounds.astype(jnp.float32) * (places * (peers - 1) / n)


def _round(
    number: Array, x: Array, gates: Array, thread: dispatch.Experts, call: Call, backend: str, places: int
) -> tuple[Array, dispatch.Experts]:
    lists, size = call.roll, call.roll.counts.size * places
    turn = lists.turn - number * places
    now = lists.first & (turn >= 0) & (turn < places)
    at = _places(jnp.where(now, lists.peer * places + turn, size), size)
    across = partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
    return _at_their_experts(x, gates, thread, call, at, across, across, backend)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _later_rounds(backend, places, x, gates, thread, call, rounds):
    """(what the rounds after the first add to y, thread)."""

    def add(number, y):
        return y + _round(number, x, gates, thread, call, backend, places)[0]

    return jax.lax.fori_loop(1, rounds, add, jnp.zeros_like(x)), thread


def _later_rounds_fwd(backend, places, *args):
    return _later_rounds(backend, places, *args), args


def _later_rounds_bwd(backend, places, args, cotangents):
    x, gates, thread, call, rounds = args
    call = call._replace(layer=jnp.asarray(call.layer))  # under jax.checkpoint a constant comes back as a bare literal
    dy, d_thread = cotangents

    def add(number, carry):
        dx, d_gates, d_thread = carry
        _, transposed = jax.vjp(lambda *args: _round(number, *args, call, backend, places), x, gates, thread)
        more_x, more_gates, d_thread = transposed((dy, d_thread))  # the thread's takes the experts' gradient along
        return dx + more_x, d_gates + more_gates, d_thread

    start = (jnp.zeros_like(x), jnp.zeros_like(gates), d_thread)
    return *jax.lax.fori_loop(1, rounds, add, start), None, None


_later_rounds.defvjp(_later_rounds_fwd, _later_rounds_bwd)


# Ragged


class Leg(NamedTuple):
    """One way of a ragged exchange; int32 [P], one number a peer. See `jax.lax.ragged_all_to_all`."""

    starts: Array  # where the rows for a peer start here
    sends: Array  # how many they are
    lands: Array  # where they land there
    receives: Array  # how many rows come from it


def ragged(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    experts: dispatch.Experts,
    thread: dispatch.Experts,
    layer: Int[Array, ""],
    *,
    backend: str,
    peers: int,
) -> tuple[Float[Array, "n D"], dispatch.Experts, Float[Array, ""]]:
    """`all_to_all` with no empty places on the wire. JAX has it for GPU and TPU.

    A device keeps room for every token of all its peers, as with `gather`.
    Returns: as there; what crossed is just what had to.
    """
    n, me = x.shape[0], jax.lax.axis_index("expert")
    lists = roll(expert_ids, experts.w_gate.shape[1], peers)
    counts = jax.lax.all_gather(lists.counts, "expert")  # [from, to]
    starts = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts  # in the sender's buffer
    lands = jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts  # in the receiver's
    out = Leg(starts[me], counts[me], lands[me], counts[:, me])
    home = Leg(lands[:, me], counts[:, me], starts[:, me], counts[me])
    size, room = n * min(expert_ids.shape[1], peers), n * peers  # whatever the router does
    at = _places(jnp.where(lists.first, starts[me][lists.peer] + lists.turn, size), size)
    there, back = (
        (lambda rows: _travel(room, size, rows, out, home)),
        (lambda rows: _travel(size, room, rows, home, out)),
    )
    call = Call(expert_ids, lists, experts, layer)
    y, thread = _at_their_experts(x, gates, thread, call, at, there, back, backend)
    crossed = (lists.counts.sum(dtype=jnp.int32) - lists.counts[me]).astype(jnp.float32) / n
    return y, thread, jax.lax.pmean(crossed, tuple(varying(crossed)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _travel(room: int, size: int, rows: Array, leg: Leg, home: Leg) -> Array:
    """[size, …] here to [room, …] there, zeros where nothing lands; `home` is the way back, and the gradient's."""
    return jax.lax.ragged_all_to_all(rows, zeros((room, *rows.shape[1:]), rows), *leg, axis_name="expert")


_travel.defvjp(
    lambda room, size, rows, leg, home: (_travel(room, size, rows, leg, home), (leg, home)),
    lambda room, size, legs, d: (_travel(size, room, d, legs[1], legs[0]), None, None),
)
