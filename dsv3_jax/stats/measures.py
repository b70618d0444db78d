"""Measures of routing counts: co-activation, preferred domains, information, favourite tokens."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Num

from dsv3_jax.stats.routing_stats import RoutingStats, sum_by_domain


def lift(coactivation: Num[np.ndarray, "L E E"]) -> Float64[np.ndarray, "L E E"]:
    """Divide how often two experts are chosen for the same token by chance.

    lift_ef = c_ef / (c · p_e p_f) for e ≠ f

    Chance keeps each expert's load p, and c keeps the number of pairs: Σ c · p_e p_f = Σ c_ef.
    Plain n · p_e p_f would put even routing below 1, because no token chooses an expert twice.

    Args: coactivation: tokens that chose both experts; the diagonal is the load.
    Returns: 1 is chance; NaN on the diagonal and where chance is 0.

    Example:
        >>> # two tokens chose experts 0 and 1, one 1 and 2
        >>> together = np.array([[[2, 2, 0], [2, 3, 1], [0, 1, 1]]])
        >>> lift(together).round(2)
        array([[[ nan, 1.22, 0.  ],
                [1.22,  nan, 1.22],
                [0.  , 1.22,  nan]]])
    """
    # p_e p_f of each pair, by the loads on the diagonal.
    off_diagonal = ~np.eye(coactivation.shape[-1], dtype=bool)[None]
    load = np.diagonal(coactivation, axis1=1, axis2=2).astype(np.float64)
    chance = np.where(off_diagonal, load[:, :, None] * load[:, None, :], 0.0)

    # c makes the pairs by chance as many as there are.
    pairs = np.where(off_diagonal, coactivation, 0).sum((1, 2), keepdims=True)
    chance = chance * pairs / np.maximum(chance.sum((1, 2), keepdims=True), 1e-300)

    unknown = np.full(chance.shape, np.nan)
    return np.divide(coactivation, chance, out=unknown, where=off_diagonal & (chance > 0))


def domain_preference(load_by_domain: Num[np.ndarray, "N L E"]) -> Float[np.ndarray, "N L E"]:
    """Compute p(expert | domain) / p(expert); NaN without load or without tokens.

    Example:
        >>> domain_preference(np.array([[[3, 1]], [[1, 3]]]))
        array([[[1.5, 0.5]],
        <BLANKLINE>
               [[0.5, 1.5]]])
    """

    def shares(load: np.ndarray) -> np.ndarray:
        total = load.sum(-1, keepdims=True)
        return np.divide(load, total, out=np.full(load.shape, np.nan), where=total > 0)

    overall = np.broadcast_to(shares(load_by_domain.sum(0))[None], load_by_domain.shape)
    unknown = np.full(overall.shape, np.nan)
    return np.divide(shares(load_by_domain), overall, out=unknown, where=overall > 0)


def mutual_information(load_by_domain: Num[np.ndarray, "N *l E"]) -> Float64[np.ndarray, " *l"]:
    """Compute I(expert; domain) of an assignment in bits; 0 without load.

    I = Σ_de p_de log2 p_de / (p_d p_e)

    Example:
        >>> load = np.array([[[4, 0], [2, 2]], [[0, 4], [2, 2]]])  # 2 domains, 2 layers, 2 experts
        >>> mutual_information(load)
        array([1., 0.])
    """
    joint = load_by_domain / np.maximum(load_by_domain.sum((0, -1), keepdims=True), 1)
    return _bits(joint.sum(-1), 0) + _bits(joint.sum(0), -1) - _bits(joint, (0, -1))


def domain_entropy(load_by_domain: Num[np.ndarray, "N *l E"]) -> Float64[np.ndarray, " *l"]:
    """Compute H(domain) of an assignment in bits, the upper bound of I(expert; domain).

    Example:
        >>> domain_entropy(np.array([[[3, 1]], [[0, 4]]]))
        array([1.])
    """
    loads = load_by_domain.sum(-1)
    return _bits(loads / np.maximum(loads.sum(0, keepdims=True), 1), 0)


def _bits(p: np.ndarray, axis) -> np.ndarray:
    """Compute −Σ p log2 p over axes, with 0 log 0 = 0."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis)


class Specialisation(NamedTuple):
    """I(expert; domain) of each layer, beside I after shuffles of the documents' domains."""

    bits: Float64[np.ndarray, " L"]
    share: Float64[np.ndarray, " L"]  # I / H(domain): 1 means that the expert determines the domain
    shuffled_mean: Float64[np.ndarray, " L"]  # bits
    shuffled_95: Float64[np.ndarray, " L"]  # bits, the 95 % quantile of the shuffles
    # share of orders with at least as many bits; the real order counts as one
    p_value: Float64[np.ndarray, " L"]
    draws: int  # number of shuffles
    seed: int  # of the shuffles


def specialisation(stats: RoutingStats, *, draws: int = 200, seed: int = 0) -> Specialisation:
    """Measure how much the experts of each layer tell about the domain of the text, beside chance.

    Args: draws: number of shuffles that estimate chance; seed: of the shuffles.
    Raises: ValueError for draws below 1.

    Example:
        >>> load = np.array([[[9, 1]], [[8, 2]], [[1, 9]], [[0, 10]]])  # 4 documents, 2 experts
        >>> stats = RoutingStats.from_loads(load, np.array([0, 0, 1, 1]), ["code", "prose"])
        >>> result = specialisation(stats, draws=100)
        >>> result.bits.round(2), result.shuffled_mean.round(2)
        (array([0.54]), array([0.2]))
    """
    if draws < 1:
        raise ValueError(f"draws={draws} is below 1")
    bits = mutual_information(stats.load_by_domain)
    upper_bound = domain_entropy(stats.load_by_domain)

    # All tokens of a document move together: they are alike whatever its domain, and a shuffle of
    # single tokens would count that as specialisation.
    rng = np.random.default_rng(seed)
    shuffled = (rng.permutation(stats.document_domains) for _ in range(draws))
    num_domains = len(stats.domains)
    loads = (sum_by_domain(stats.document_load, domains, num_domains) for domains in shuffled)
    chance = np.stack([mutual_information(load) for load in loads])  # [draws, L]

    share = np.divide(bits, upper_bound, out=np.zeros_like(bits), where=upper_bound > 0)
    # 1e-12: another order of the same sum rounds differently.
    at_least = (chance >= bits[None] - 1e-12).sum(0)
    return Specialisation(
        bits,
        share,
        shuffled_mean=chance.mean(0),
        shuffled_95=np.quantile(chance, 0.95, axis=0),
        p_value=(1 + at_least) / (1.0 + draws),
        draws=draws,
        seed=seed,
    )


class Favourite(NamedTuple):
    """A token that an expert receives more often than chance predicts."""

    token: int
    num_routed: int  # occurrences that were routed to the expert
    lift: float  # p(expert | token) / p(expert)
    bits: float  # its part of I(expert; token)
    margin: float  # mean of `Choices.margin` over these occurrences; NaN where unknown


def favourites(
    stats: RoutingStats, layer: int, *, top: int = 12, min_count: int = 20
) -> list[list[Favourite]]:
    """List the tokens that tell most about each expert of a layer, of those with a lift above 1.

    lift = p(expert | token) / p(expert) = (n_et / n_t) / (n_e / n)
    bits = n_et / (n K) · log2 lift

    n counts tokens. The sum of all bits, of lifts below 1 too, is I(expert; token). The largest
    lift alone says little. Every token that always goes to the expert has a lift of n / n_e, which
    is E/K for an expert of mean load.

    Args:
        layer: index into `stats.layers`.
        top: tokens for each expert, at most.
        min_count: rarer tokens are left out, because their lift is mostly chance.
    Returns: a list for each expert, by falling bits; one entry a token.

    Example:
        >>> from dataclasses import replace
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> stats = RoutingStats.from_loads(np.array([[[3, 5]]]), np.array([0]), ["code"])
        >>> rows = rows_of(np.array([[[0], [0], [0], [1], [1], [1], [1], [1]]], np.int16))
        >>> token = np.array([7, 7, 7, 7, 8, 8, 8, 8], np.int32)
        >>> stats = replace(stats, rows=rows._replace(token=token))
        >>> found = favourites(stats, 0, min_count=4)
        >>> [(f.token, f.num_routed, f.lift, round(f.bits, 3)) for [f] in found]
        [(7, 3, 2.0, 0.375), (8, 4, 1.6, 0.339)]
    """
    # Pairs (expert, token) that occur, how often, and their mean margin.
    counted = stats.rows.counted[layer]
    k = stats.experts_per_token
    size = int(stats.rows.token.max(initial=0)) + 1
    expert = stats.rows.expert_ids[layer, counted].astype(np.int64)
    pairs = (expert * size + stats.rows.token[counted][:, None]).ravel()
    pair, inverse, num_routed = np.unique(pairs, return_inverse=True, return_counts=True)
    margins = stats.rows.margin[layer, counted].ravel()
    margin = np.bincount(inverse, margins, len(pair)) / num_routed
    expert, token = np.divmod(pair, size)

    load = np.bincount(expert, num_routed, stats.load.shape[1])
    occurrences = np.bincount(token, num_routed) / k  # n_t
    lift = (num_routed / occurrences[token]) / (load[expert] / counted.sum())
    bits = num_routed / max(len(pairs), 1) * np.log2(lift)

    # Expert by expert, the most bits first; rare tokens and those below chance are left out.
    order = np.lexsort((token, -num_routed, -bits, expert))
    is_listed = (occurrences[token] >= min_count) & (lift > 1)
    order = order[is_listed[order]]
    borders = np.searchsorted(expert[order], np.arange(len(load) + 1))

    def favourite(i: np.integer) -> Favourite:
        columns = token, num_routed, lift, bits, margin
        return Favourite(*(column[i].item() for column in columns))

    return [
        [favourite(i) for i in order[start : min(start + top, stop)]]
        for start, stop in itertools.pairwise(borders)
    ]
