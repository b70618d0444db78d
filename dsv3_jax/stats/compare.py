"""The choices of two checkpoints on the same text: of one run over its training, or of two runs, experts matched."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import linear_sum_assignment

from dsv3_jax.stats.token_rows import TokenRows

SHUFFLES = 5  # of the tokens, which estimate what a match of unrelated experts shares


class Match(NamedTuple):
    """Experts of another model matched to those of this one, layer by layer, one to one."""

    match: Int64[np.ndarray, "L E"]  # this model's expert → the other's
    shared: Float64[np.ndarray, " L"]  # share of this model's choices whose token the other sends to the matched expert
    by_chance: Float64[np.ndarray, " L"]  # the same where the other's tokens are shuffled, and matched again


def agreement(rows: TokenRows, earlier: TokenRows) -> Float64[np.ndarray, " L"]:
    """Share of choices that an earlier checkpoint made already, for the same tokens and the same experts.

    Example:
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> agreement(rows_of(np.array([[[0, 1], [2, 3]]])), rows_of(np.array([[[1, 2], [0, 1]]])))
        array([0.25])
    """
    layers = zip(rows.counted, rows.expert_ids, earlier.expert_ids, strict=True)
    return np.array([_share((ids[c][:, :, None] == other[c][:, None]).any(-1)) for c, ids, other in layers])


def match_experts(rows: TokenRows, others: TokenRows, num_experts: int, *, seed: int = 0) -> Match:
    """Match experts by the tokens they share: the matching with the most shared choices, found exactly.

    Args: others: the rows of another model with as many layers and experts, of the same tokens; seed: of the shuffles.

    Example:
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> found = match_experts(rows_of(np.array([[[0], [0], [1]]])), rows_of(np.array([[[1], [1], [0]]])), 2)
        >>> found.match.tolist(), found.shared.tolist()
        ([[1, 0]], [1.0])
    """
    rng, found = np.random.default_rng(seed), []
    for counted, ids, other in zip(rows.counted, rows.expert_ids, others.expert_ids, strict=True):
        here, there = ids[counted].astype(np.int64), other[counted].astype(np.int64)
        match, shared = _matched(here, there, num_experts)
        chance = [_matched(here, rng.permutation(there), num_experts)[1] for _ in range(SHUFFLES)]
        found.append((match, shared, np.mean(chance)))
    match, shared, chance = zip(*found, strict=True)
    return Match(np.stack(match), np.array(shared), np.array(chance))


def _matched(here: np.ndarray, there: np.ndarray, num_experts: int) -> tuple[np.ndarray, float]:
    """(The best matching, its share of the choices [n, K] of `here`)."""
    cells = (here[:, :, None] * num_experts + there[:, None]).ravel()
    tokens = np.bincount(cells, minlength=num_experts**2).reshape(num_experts, num_experts)
    experts, match = linear_sum_assignment(tokens, maximize=True)
    return match, float(tokens[experts, match].sum() / max(here.size, 1))


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if hits.size else float("nan")
