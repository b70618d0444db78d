"""Which tokens go where in which round of an exchange: the arithmetic, without the sending.

A token goes to a device at most once, however many of its K experts are there. With node-limited
routing these are few devices; see `mean_reach`. A round has slots for so many tokens of each peer,
and rows for so many of their choices. Even load takes one round, uneven load further ones, which
are smaller, and no token is ever dropped.

Letters, beside those of reference.py: n tokens of a device, P peers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.config import Layout, ModelConfig
from dsv3_jax.ops.routing import ROUTERS
from dsv3_jax.ops.varying import zeros

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
    k = cfg.experts_per_token
    num_groups, groups = cfg.num_groups, cfg.groups_per_token
    if not ROUTERS[cfg.router].has_groups or max(peers, num_groups) % min(peers, num_groups):
        num_groups = groups = 1

    pool = groups * cfg.num_experts // num_groups  # experts in the chosen groups
    on_device = max(1, num_groups // peers)  # groups that a device has experts of
    each = cfg.num_experts // max(peers, num_groups)  # its experts of each of them

    # Choices that miss a device, with j of its groups among the chosen ones.
    missed = 0
    for j in range(min(on_device, groups) + 1):
        of_groups = math.comb(on_device, j) * math.comb(num_groups - on_device, groups - j)
        missed += of_groups * math.comb(pool - j * each, k)

    all_choices = math.comb(num_groups, groups) * math.comb(pool, k)
    return peers * (1 - missed / all_choices)


class RoundSize(NamedTuple):
    """Of a round: how many tokens a device may send to a peer, and how many choices of them."""

    tokens: int
    choices: int


def round_size(cfg: ModelConfig, layout: Layout, tokens: int, peers: int) -> RoundSize:
    """The first round's size: what even load needs times the slack, at most what a device can need.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> layout = Layout(capacity_slack=1.0)
        >>> round_size(preset("v3"), layout, tokens=1000, peers=8)  # 1000 · 3.63 / 8, 1000 · 8 / 8
        RoundSize(tokens=454, choices=1000)
    """
    share = layout.capacity_slack * tokens / peers
    most = most_choices(cfg.experts_per_token, cfg.num_experts // peers)

    slots = min(tokens, math.ceil(share * mean_reach(cfg, peers)))
    choices = min(slots * most, math.ceil(share * cfg.experts_per_token))
    return RoundSize(slots, max(most, choices))


def most_choices(num_choices: int, held: int) -> int:
    """The most choices that one token can have on a device of `held` experts."""
    return min(num_choices, held)


def later_size(size: RoundSize, most: int) -> RoundSize:
    """The size of each later round, for the little that is left: a quarter, or `most` choices.

    Example:
        >>> later_size(RoundSize(454, 1000), most=8)
        RoundSize(tokens=114, choices=250)
    """
    return RoundSize(-(-size.tokens // 4), max(-(-size.choices // 4), most))


def second_size(first: RoundSize, nodes: int, devices: int, spread: float, most: int) -> RoundSize:
    """The size of a second hop's first round, from that of the round that brings its tokens.

    That round has room for the slack already, which is not paid twice.

    Args:
        nodes, devices: number of nodes, and of devices in each of them.
        spread: devices that a token goes to, over the nodes that it goes to.
        most: choices of a token on a device, at most.

    Example:
        >>> second_size(RoundSize(500, 1000), nodes=2, devices=4, spread=2.0, most=8)
        RoundSize(tokens=500, choices=500)
    """
    slots = min(nodes * first.tokens, math.ceil(nodes * first.tokens * spread / devices))
    choices = min(slots * most, math.ceil(nodes * first.choices / devices))
    return RoundSize(slots, max(most, choices))


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


# Which device each choice is on


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
    peer_nK = expert_ids // held
    again_nK = jnp.tril(peer_nK[:, :, None] == peer_nK[:, None, :], -1).any(axis=-1)
    choices_nP = jax.nn.one_hot(peer_nK, peers, dtype=jnp.int32).sum(axis=1)
    tokens_so_far = jnp.cumsum(jnp.minimum(choices_nP, 1), axis=0, dtype=jnp.int32)
    choices_so_far = jnp.cumsum(choices_nP, axis=0, dtype=jnp.int32)
    return PeerTable(peer_nK, ~again_nK, choices_nP, tokens_so_far, choices_so_far)


# Round after round


class Sent(NamedTuple):
    """How many tokens, and choices of theirs, earlier rounds have sent to each device."""

    tokens: Array  # int32 [1, P]
    choices: Array  # int32 [1, P]


def in_round(table: PeerTable, sent: Sent, size: RoundSize) -> tuple[Array, Sent]:
    """(Which token a round sends where [n, P], what is sent then): the next that fit."""
    # Each token's place among those that are left, and the place of its last choice.
    token_nP = table.tokens_so_far - sent.tokens
    choice_nP = table.choices_so_far - sent.choices
    fits_nP = (token_nP <= size.tokens) & (choice_nP <= size.choices)
    now_nP = (table.choices > 0) & (token_nP > 0) & fits_nP

    def add(so_far: Array, numbers: Array | int) -> Array:
        new = jnp.where(now_nP, numbers, 0).sum(axis=0, dtype=jnp.int32, keepdims=True)
        return so_far + new

    return now_nP, Sent(add(sent.tokens, 1), add(sent.choices, table.choices))


def count_rounds(table: PeerTable, sent: Sent, size: RoundSize) -> Array:
    """How many further rounds this device needs."""

    def is_left(carry: tuple[Array, Sent]) -> Array:
        _, sent = carry
        return (sent.tokens < table.tokens_so_far[-1:]).any()

    def one(carry: tuple[Array, Sent]) -> tuple[Array, Sent]:
        rounds, sent = carry
        return rounds + 1, in_round(table, sent, size)[1]

    rounds, _ = jax.lax.while_loop(is_left, one, (zeros((), table.peer), sent))
    return rounds
