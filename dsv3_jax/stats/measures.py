"""Measures of routing counts: co-activation against chance, what an expert says of the domain, its favourite tokens."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, Num

from dsv3_jax.stats.collect import RoutingStats, by_domain


def lift(together: Num[np.ndarray, "L E E"]) -> Float64[np.ndarray, "L E E"]:
    """How often two experts are chosen for the same token, over chance; NaN on the diagonal, and without chance.

    Chance keeps each expert's load and the number of pairs: c_ef = c · p_e p_f for e ≠ f, with c such that Σ c_ef is
    the number of pairs counted. (p_e p_f · n alone would put all-even routing below 1, for no token chooses an expert
    twice.)
    """
    off = ~np.eye(together.shape[-1], dtype=bool)[None]
    load = np.diagonal(together, axis1=1, axis2=2).astype(np.float64)
    chance = np.where(off, load[:, :, None] * load[:, None, :], 0.0)
    pairs = np.where(off, together, 0).sum((1, 2), keepdims=True)
    chance = chance * pairs / np.maximum(chance.sum((1, 2), keepdims=True), 1e-300)
    return np.divide(together, chance, out=np.full(chance.shape, np.nan), where=off & (chance > 0))


def mutual_information(load_by_domain: Num[np.ndarray, "N *l E"]) -> Float64[np.ndarray, " *l"]:
    """I(expert; domain) of an assignment, in bits: Σ_de p_de log2 p_de / (p_d p_e); 0 without load."""
    joint = load_by_domain / np.maximum(load_by_domain.sum((0, -1), keepdims=True), 1)
    return _bits(joint.sum(-1), 0) + _bits(joint.sum(0), -1) - _bits(joint, (0, -1))


def domain_entropy(load_by_domain: Num[np.ndarray, "N *l E"]) -> Float64[np.ndarray, " *l"]:
    """H(domain) of an assignment, in bits: what I(expert; domain) can be at most."""
    loads = load_by_domain.sum(-1)
    return _bits(loads / np.maximum(loads.sum(0, keepdims=True), 1), 0)


def _bits(p: np.ndarray, axis) -> np.ndarray:
    """−Σ p log2 p over axes, 0 log 0 being 0."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis)


def permuted_information(
    document_load: Int64[np.ndarray, "S L E"],
    document_domains: Int64[np.ndarray, " S"],
    num_domains: int,
    *,
    draws: int = 200,
    seed: int = 0,
) -> Float64[np.ndarray, "draws L"]:
    """I(expert; domain) after the documents' domains were shuffled among them: what chance gives this many documents.

    Documents move whole: tokens of one are alike whatever their domain, and to shuffle tokens would call that
    specialisation.
    """
    rng = np.random.default_rng(seed)
    shuffled = (rng.permutation(document_domains) for _ in range(draws))
    return np.stack([mutual_information(by_domain(document_load, domains, num_domains)) for domains in shuffled])


class Specialisation(NamedTuple):
    """I(expert; domain) of each layer, and what a shuffle of the documents' domains gives."""

    bits: Float64[np.ndarray, " L"]
    share: Float64[np.ndarray, " L"]  # of H(domain): 1 is an expert that gives the domain away
    shuffled_mean: Float64[np.ndarray, " L"]  # bits
    shuffled_95: Float64[np.ndarray, " L"]  # bits; their 95 % quantile
    p_value: Float64[np.ndarray, " L"]  # share of shuffles, this one counted in, with as many bits
    draws: int  # shuffles
    seed: int  # of theirs


def specialisation(stats: RoutingStats, *, draws: int = 200, seed: int = 0) -> Specialisation:
    """How much the experts tell domains apart, layer by layer, beside chance.

    Raises: ValueError for draws below 1.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} is below 1")
    loads = stats.load_by_domain
    bits, most = mutual_information(loads), domain_entropy(loads)
    chance = permuted_information(
        stats.document_load, stats.document_domains, len(stats.domains), draws=draws, seed=seed
    )
    share = np.divide(bits, most, out=np.zeros_like(bits), where=most > 0)
    as_many = (chance >= bits[None] - 1e-12).sum(0)  # the same documents in another order: rounding
    return Specialisation(
        bits,
        share,
        shuffled_mean=chance.mean(0),
        shuffled_95=np.quantile(chance, 0.95, axis=0),
        p_value=(1 + as_many) / (1.0 + draws),
        draws=draws,
        seed=seed,
    )


class Favourite(NamedTuple):
    """A token that an expert gets more often than chance has it."""

    token: int
    times: int  # how often this expert got it
    lift: float  # p(expert | token) / p(expert)


def favourites(stats: RoutingStats, layer: int, *, top: int = 12, min_count: int = 20) -> list[list[Favourite]]:
    """The tokens that each expert of a layer likes best, by lift over 1; of equal lifts the more frequent first.

    lift = p(expert | token) / p(expert) = (n_et / n_t) / (n_e / n), with n counting tokens; 1 is chance, and it is at
    most n / n_e: an expert of mean load that gets every one of a token's occurrences has E/K.

    Args: min_count: tokens that occur less often are left out, for their lifts are chance's.
    """
    counts, load = stats.token_counts, stats.load[layer]
    here = slice(*np.searchsorted(counts.layer, [layer, layer + 1]))
    expert, token, times = counts.expert[here], counts.token[here], counts.times[here]
    occurred = np.bincount(token, times) / stats.experts_per_token  # n_t
    lift = (times / occurred[token]) / (load[expert] / stats.tokens[layer])
    order = np.lexsort((token, -times, -lift, expert))
    order = order[((occurred[token] >= min_count) & (lift > 1))[order]]
    borders = np.searchsorted(expert[order], np.arange(len(load) + 1))
    return [
        [Favourite(int(token[i]), int(times[i]), float(lift[i])) for i in order[start : min(start + top, stop)]]
        for start, stop in zip(borders[:-1], borders[1:], strict=True)
    ]
