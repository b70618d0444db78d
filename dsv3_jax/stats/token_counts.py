"""How often each expert received each token.

Counts are sparse: only pairs that occur are kept. A table of a large vocabulary would be mostly zeros.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int32, Int64


class TokenCounts(NamedTuple):
    """Pairs of expert and token that occurred, in order of (layer, expert, token)."""

    layer: Int64[np.ndarray, " n"]
    expert: Int64[np.ndarray, " n"]
    token: Int64[np.ndarray, " n"]
    num_routed: Int64[np.ndarray, " n"]  # occurrences of the token that were routed to the expert, at least 1
    margin: Float64[np.ndarray, " n"] | None = None  # mean of `Choices.margin` over them; NaN where there is none


class TokenTally:
    """Sums of expert by token over the batches so far.

    Example:
        >>> tally = TokenTally(num_experts=2, vocab_size=10)
        >>> tokens, one = np.array([[7, 7]], np.int32), np.ones((1, 1, 2, 1), np.int32)  # both tokens go to expert 1
        >>> tally.add(tokens, one, one.astype(np.float32), one[..., 0] > 0)
        >>> counts = tally.counts()
        >>> counts.expert.tolist(), counts.token.tolist(), counts.num_routed.tolist(), counts.margin.tolist()
        ([1], [7], [2], [1.0])
    """

    def __init__(self, num_experts: int, vocab_size: int):
        self._num_experts, self._vocab_size = num_experts, vocab_size
        self._keys, self._counts = np.zeros((2, 0), np.int64)
        self._margins = np.zeros(0)

    def add(
        self,
        tokens: Int32[np.ndarray, "B T"],
        expert_ids: Int32[np.ndarray, "L B T K"],
        margin: Float[np.ndarray, "L B T K"],
        mask: Bool[np.ndarray, "L B T"],
    ) -> None:
        """Add a batch; `mask` selects the positions that are counted."""
        layer, b, t = np.nonzero(mask)
        groups = layer[:, None] * self._num_experts + expert_ids[mask]  # [n, K]
        cells = groups * self._vocab_size + tokens[b, t][:, None]
        keys, inverse, counts = np.unique(cells, return_inverse=True, return_counts=True)
        margins = np.bincount(inverse.ravel(), margin[mask].ravel(), len(keys))
        self._keys, index = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        self._counts = np.bincount(index, np.concatenate([self._counts, counts])).astype(np.int64)
        self._margins = np.bincount(index, np.concatenate([self._margins, margins]))

    def counts(self) -> TokenCounts:
        """Return the counts of all batches so far."""
        group, token = np.divmod(self._keys, self._vocab_size)
        layer, expert = np.divmod(group, self._num_experts)
        return TokenCounts(layer, expert, token, self._counts, self._margins / np.maximum(self._counts, 1))
