"""How choices follow one another: by layer, by token, from the trunk to its multi-token heads."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Num

from dsv3_jax.stats.token_rows import TokenRows


class Repeats(NamedTuple):
    """How often a token has the experts of the token before it."""

    # of a token's choices that the previous token of its piece made too
    share: Float64[np.ndarray, " L"]
    # the same for two tokens that choose apart, with the layer's load
    by_chance: Float64[np.ndarray, " L"]


class HeadsAgainstTrunk(NamedTuple):
    """Choices of M multi-token heads and of the trunk's last layer, for the same position."""

    load_correlation: Float64[np.ndarray, " M"]  # of the experts' loads, by number
    # share of a head's choices whose number the trunk chose too
    same_expert_number: Float64[np.ndarray, " M"]
    by_chance: Float64[np.ndarray, " M"]  # the same for choices that are apart, with both loads


def transitions(rows: TokenRows, num_experts: int) -> Int64[np.ndarray, "M E E"]:
    """Count tokens that chose expert i in one layer and j in the next of `RoutingStats.layers`.

    Returns: M = L - 1 tables. A token has K · K pairs, or none if it is counted in one of the two
        layers alone.

    Example:
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> transitions(rows_of(np.array([[[0], [1]], [[2], [2]]])), 3)[0]
        array([[0, 0, 1],
               [0, 0, 1],
               [0, 0, 0]])
    """
    pairs = []
    for layer in range(len(rows.counted) - 1):
        both = rows.counted[layer] & rows.counted[layer + 1]
        here = rows.expert_ids[layer, both].astype(np.int64)
        there = rows.expert_ids[layer + 1, both].astype(np.int64)

        # Each of a token's K experts here with each of its K experts there.
        cells = (here[:, :, None] * num_experts + there[:, None]).ravel()
        pairs.append(np.bincount(cells, minlength=num_experts**2).reshape(num_experts, num_experts))
    return np.array(pairs, np.int64).reshape(-1, num_experts, num_experts)


def transition_lift(pairs: Num[np.ndarray, "*l E E"]) -> Float64[np.ndarray, "*l E E"]:
    """Divide counts of pairs by chance: c_ij · c / (c_i c_j), each sum over the other side.

    Returns: 1 is chance; NaN where chance is 0.

    Example:
        >>> transition_lift(np.array([[2, 0], [1, 1]]))
        array([[1.33333333, 0.        ],
               [0.66666667, 2.        ]])
    """
    total = pairs.sum((-2, -1), keepdims=True)
    chance = pairs.sum(-1, keepdims=True) * pairs.sum(-2, keepdims=True) / np.maximum(total, 1)
    return np.divide(pairs, chance, out=np.full(pairs.shape, np.nan), where=chance > 0)


def repeats(rows: TokenRows, num_experts: int) -> Repeats:
    """Measure how often a token has the experts of the token before it in its piece of text.

    by chance = K Σ_e p_e², with the shares p of the load

    Example:
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> found = repeats(rows_of(np.array([[[0], [0], [1], [1]]])), 2)
        >>> found.share.round(2), found.by_chance
        (array([0.67]), array([0.5]))
    """
    # A piece may hold the end of one document and the beginning of the next.
    same_piece = rows.segment[1:] == rows.segment[:-1]
    neighbours = same_piece & (rows.document[1:] == rows.document[:-1])

    share = []
    chance = []
    for ids, counted in zip(rows.expert_ids, rows.counted, strict=True):
        both = neighbours & counted[1:] & counted[:-1]
        share.append(shared(ids[1:][both], ids[:-1][both]))

        # Two tokens that choose apart, each K experts by the load.
        load = _load(ids[counted], num_experts)
        chance.append(_shared_by_chance(load, load, ids.shape[-1]))
    return Repeats(np.array(share), np.array(chance))


def heads_against_trunk(
    rows: TokenRows, num_experts: int, num_heads: int
) -> HeadsAgainstTrunk | None:
    """Compare each head's choices with the trunk's last layer's; None without heads or trunk.

    Args: num_heads: M, layers at the end of the rows.

    Example:
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> rows = rows_of(np.array([[[0], [1], [1]], [[0], [0], [1]]]))
        >>> heads_against_trunk(rows, 2, 1).same_expert_number.round(2)
        array([0.67])
    """
    last = len(rows.counted) - num_heads - 1
    if not num_heads or last < 0:
        return None
    correlation = []
    same = []
    chance = []
    for head in range(last + 1, len(rows.counted)):
        both = rows.counted[head] & rows.counted[last]
        of_head = rows.expert_ids[head, both]
        of_trunk = rows.expert_ids[last, both]
        load_head = _load(of_head, num_experts)
        load_trunk = _load(of_trunk, num_experts)

        # An even load has no correlation with any other.
        even = np.ptp(load_head) == 0 or np.ptp(load_trunk) == 0
        correlation.append(np.nan if even else np.corrcoef(load_head, load_trunk)[0, 1])
        same.append(shared(of_head, of_trunk))
        chance.append(_shared_by_chance(load_head, load_trunk, rows.expert_ids.shape[-1]))
    return HeadsAgainstTrunk(np.array(correlation), np.array(same), np.array(chance))


def load_by_parts(load: Num[np.ndarray, "L E"], parts: int) -> Num[np.ndarray, "L parts"]:
    """Add up the load of consecutive experts: groups of the router, or the devices that hold them.

    Raises: ValueError if the parts do not divide the experts.

    Example:
        >>> load_by_parts(np.array([[1, 2, 3, 4]]), 2)
        array([[3, 7]])
    """
    if parts < 1 or load.shape[1] % parts:
        raise ValueError(f"devices={parts} does not divide the {load.shape[1]} experts")
    return load.reshape(len(load), parts, -1).sum(-1)


def shared(ids: np.ndarray, others: np.ndarray) -> float:
    """Share of choices [n, K] that are among the other choices of their row; NaN without rows."""
    if not len(ids):
        return np.nan
    return float((ids[:, :, None] == others[:, None]).any(-1).mean())


def _load(ids: np.ndarray, num_experts: int) -> np.ndarray:
    return np.bincount(ids.ravel(), minlength=num_experts)


def _shared_by_chance(load: np.ndarray, other: np.ndarray, k: int) -> float:
    """The expectation of `shared` for rows that choose apart: Σ_e p_e · K q_e."""
    p = load / max(load.sum(), 1)
    q = other / max(other.sum(), 1)
    return float(k * (p * q).sum())
