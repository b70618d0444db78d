"""Token against domain: how many bits the token tells about its expert, and the domain beyond it.

All three measures are of one assignment: a token's occurrence and one of its K experts, drawn at
random.

    I(expert; token), I(expert; domain),
    I(expert; domain | token) = Σ_t p_t I(expert; domain | token = t)

Counts of a finite text show information where there is none. Chance is measured by shuffles, not by
a formula: Miller and Madow's correction needs many occurrences of each token, and most tokens of a
large vocabulary are rare. For the token, the occurrences' expert sets are shuffled among all
positions. For the domain, the domains are shuffled among the documents, because the tokens of one
document are alike whatever its domain. The mean of the shuffles is taken off.

Given the token, that alone would take off too much where domains have words of their own: shuffled
domains divide each token's occurrences into more parts than the real ones do, and more parts show
more. So experts are shuffled within tokens, too, which leaves no information beyond the token.
Each division's own chance, real or shuffled, is taken off first. With I the plug-in measure and ~
such experts:

    bits = (I(real) − I~(real)) − (I(shuffled) − I~(shuffled))

Chance is what independence gives, so an estimate of a strong dependence is a little too low: 0.098
of 0.107 bits on documents from a known process. There, shuffled domains alone left −0.16 of 0.

Intervals resample documents: tokens of one document are not independent. A resample repeats
documents, and so its own plug-in information is too high. The interval is therefore the estimate ±
1.96 standard deviations of the resamples.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy import sparse

from dsv3_jax.stats.token_rows import TokenRows

NAMES = ("token", "domain", "domain_given_token")
WIDE = 1.96  # standard deviations of a 95 % interval
WITHIN = 4  # shuffles of experts within tokens: each averages over many tokens
CELLS = 2**24  # numbers in memory at once


class Measured(NamedTuple):
    """One measure of L layers, in bits."""

    bits: Float64[np.ndarray, " L"]  # less chance; may be a little below 0
    chance: Float64[np.ndarray, " L"]  # mean of the shuffles
    low: Float64[np.ndarray, " L"]
    high: Float64[np.ndarray, " L"]


class Information(NamedTuple):
    """Information about the expert in the token and in the domain, layer by layer."""

    token: Measured
    domain: Measured
    domain_given_token: Measured
    entropy: Float64[np.ndarray, " L"]  # bits of the expert itself
    tokens: int
    documents: int
    draws: int  # shuffles
    resamples: int  # of the documents


def information(
    rows: TokenRows,
    num_experts: int,
    num_domains: int,
    *,
    draws: int = 20,
    resamples: int = 100,
    seed: int = 0,
) -> Information:
    """Measure what token and domain tell about the expert, by layer, corrected for chance.

    Args:
        draws: shuffles that estimate chance, at least 1.
        resamples: of the documents, for the intervals; at least 2.
        seed: of both.

    Example:
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> experts = np.arange(4000) % 4
        >>> rows = rows_of(experts[None, :, None], document=np.arange(4000) // 100)
        >>> rows = rows._replace(token=(experts // 2).astype(np.int32))  # it tells one of two bits
        >>> found = information(rows, num_experts=4, num_domains=1)
        >>> found.entropy.round(2), found.token.bits.round(2), abs(found.domain.bits).round(2)
        (array([2.]), array([1.]), array([0.]))
    """
    # Documents and tokens by running numbers.
    rng = np.random.default_rng(seed)
    documents, document = np.unique(rows.document, return_inverse=True)
    domain_of = np.zeros(len(documents), np.int64)
    domain_of[document] = rows.domain
    token = np.unique(rows.token, return_inverse=True)[1]

    # The same documents and shuffles in every layer: weights [S, R].
    even = np.full(len(documents), 1 / len(documents))
    weights = rng.multinomial(len(documents), even, resamples).T
    shuffled = np.stack([rng.permutation(domain_of) for _ in range(draws)], axis=1)  # [S, draws]

    estimates = []
    for counted, ids in zip(rows.counted, rows.expert_ids, strict=True):
        # The plug-in measures of the text as it is.
        counts = _Counts(
            token[counted], ids[counted], document[counted], num_experts, len(documents)
        )
        plain = counts.measure(np.ones((len(documents), 1)), domain_of[:, None], num_domains)[:, 0]

        # Chance: for the token by shuffled occurrences, for the domain by shuffled documents.
        by_shuffle = np.mean([counts.shuffled_tokens(rng) for _ in range(draws)])
        once = np.ones((len(documents), draws + 1))
        all_domains = np.concatenate([domain_of[:, None], shuffled], axis=1)
        by_domain, given = counts.measure(once, all_domains, num_domains)[1:, 1:].mean(-1)

        # What each division of a token's occurrences shows where only the token tells.
        within = [
            counts.within_tokens(rng).measure(once, all_domains, num_domains)[2]
            for _ in range(min(WITHIN, draws))
        ]
        real, *of_shuffled = np.mean(within, axis=0)
        chance = np.array([by_shuffle, by_domain, given + real - np.mean(of_shuffled)])

        # The interval: how far the measures of resampled documents lie apart.
        repeated = np.repeat(domain_of[:, None], resamples, 1)
        spread = counts.measure(weights, repeated, num_domains).std(-1, ddof=1)
        bits = plain - chance
        low, high = bits - WIDE * spread, bits + WIDE * spread
        estimates.append(np.stack([bits, chance, low, high], axis=1))

    per_measure = np.moveaxis(np.array(estimates), 0, -1)  # [measure, 4, L]
    of_token, of_domain, given_token = (Measured(*of) for of in per_measure)
    layers = zip(rows.counted, rows.expert_ids, strict=True)
    loads = [np.bincount(ids[c].ravel(), minlength=num_experts) for c, ids in layers]
    return Information(
        token=of_token,
        domain=of_domain,
        domain_given_token=given_token,
        entropy=_entropy(np.stack(loads, axis=1).astype(np.float64)),
        tokens=len(rows.token),
        documents=len(documents),
        draws=draws,
        resamples=resamples,
    )


class _Counts:
    """Assignments of one layer by (token, expert) and document, as a sparse matrix [cells, S]."""

    def __init__(
        self,
        token: np.ndarray,
        ids: np.ndarray,
        document: np.ndarray,
        num_experts: int,
        num_documents: int,
    ):
        self._token = token
        self._ids = ids
        self._document = document
        self._num_experts = num_experts

        # A cell is a pair (token, expert) that occurs: one row of the matrix.
        k = ids.shape[1]
        cells = (token[:, None] * num_experts + ids).ravel()
        self._cells, cell = np.unique(cells, return_inverse=True)
        column = np.repeat(document, k)
        self._by_document = _ones(cell.ravel(), column, (len(self._cells), num_documents))

        # Two matrices add up the cells of a token, or of an expert.
        tokens, of_token = np.unique(self._cells // num_experts, return_inverse=True)
        where = np.arange(len(self._cells))
        self._to_token = _ones(of_token.ravel(), where, (len(tokens), len(where)))
        self._to_expert = _ones(self._cells % num_experts, where, (num_experts, len(where)))

    def measure(self, weights: np.ndarray, domains: np.ndarray, num_domains: int) -> np.ndarray:
        """The three measures [3, R] of R samples: each document's weight and domain, [S, R]."""
        step = max(1, CELLS // (max(len(self._cells), 1) * (num_domains + 1)))
        parts = [
            self._measure(weights[:, i : i + step], domains[:, i : i + step], num_domains)
            for i in range(0, weights.shape[1], step)
        ]
        return np.concatenate(parts, axis=1)

    def _measure(self, weights: np.ndarray, domains: np.ndarray, num_domains: int) -> np.ndarray:
        # Counts of (token, expert) in each domain, and in all: [cells, R].
        by_domain = [self._by_document @ (weights * (domains == d)) for d in range(num_domains)]
        both = sum(by_domain)

        # Entropies of the three, of their pairs, and of all together.
        h_token = _entropy(self._to_token @ both)
        h_expert = _entropy(self._to_expert @ both)
        h_domain = _entropy(np.stack([part.sum(0) for part in by_domain]))
        h_token_expert = _entropy(both)
        h_domain_token = _entropy(np.concatenate([self._to_token @ part for part in by_domain]))
        h_domain_expert = _entropy(np.concatenate([self._to_expert @ part for part in by_domain]))
        h_all = _entropy(np.concatenate(by_domain))

        # I(x; y) = H(x) + H(y) − H(x, y); given z: H(x, z) + H(y, z) − H(x, y, z) − H(z).
        return np.stack(
            [
                h_expert + h_token - h_token_expert,
                h_expert + h_domain - h_domain_expert,
                h_token_expert + h_domain_token - h_all - h_token,
            ]
        )

    def within_tokens(self, rng: np.random.Generator) -> "_Counts":
        """The counts after the expert sets of each token's occurrences were shuffled."""
        drawn = rng.permutation(len(self._token))
        sources = drawn[np.argsort(self._token[drawn], kind="stable")]  # random within a token
        ids = np.empty_like(self._ids)
        ids[np.argsort(self._token, kind="stable")] = self._ids[sources]
        documents = self._by_document.shape[1]
        return _Counts(self._token, ids, self._document, self._num_experts, documents)

    def shuffled_tokens(self, rng: np.random.Generator) -> float:
        """I(expert; token) after the occurrences' expert sets were shuffled."""
        ids = self._ids[rng.permutation(len(self._ids))]
        size = (int(self._token.max(initial=0)) + 1) * self._num_experts
        cells = (self._token[:, None] * self._num_experts + ids).ravel()
        counts = (
            np.bincount(cells, minlength=size).reshape(-1, self._num_experts).astype(np.float64)
        )
        return float(_entropy(counts.sum(0)) + _entropy(counts.sum(1)) - _entropy(counts.ravel()))


def _ones(row: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> sparse.csr_matrix:
    """A sparse matrix that counts pairs (row, column)."""
    return sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=shape)


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Bits of counts along the first axis; 0 without any."""
    total = np.maximum(counts.sum(0), 1e-300)
    logs = np.log2(np.where(counts > 0, counts, 1.0))
    return np.where(counts.sum(0) > 0, np.log2(total) - (counts * logs).sum(0) / total, 0.0)
