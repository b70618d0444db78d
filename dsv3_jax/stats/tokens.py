"""Tokens that each expert receives: counts by token, contexts of the largest gates, and readable text.

Counts of expert by token are sparse: only pairs that occur are kept. A table of a large vocabulary would be mostly
zeros. A byte alone means little, so each expert also keeps the text around its largest gates.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from dsv3_jax.data.tokenizer import Tokenizer

BEFORE, AFTER = 32, 12  # tokens of a context
NEAR = 8  # contexts with the same last tokens, up to the routed one, are kept once: boilerplate would fill the list
TOP = 12  # contexts kept for each expert


class TokenCounts(NamedTuple):
    """Pairs of expert and token that occurred, in order of (layer, expert, token)."""

    layer: Int64[np.ndarray, " n"]
    expert: Int64[np.ndarray, " n"]
    token: Int64[np.ndarray, " n"]
    num_routed: Int64[np.ndarray, " n"]  # occurrences of the token that were routed to the expert, at least 1


class Contexts(NamedTuple):
    """Positions with the largest gates, in order of (layer, expert), the largest gate first."""

    layer: Int64[np.ndarray, " n"]
    expert: Int64[np.ndarray, " n"]
    gate: Float32[np.ndarray, " n"]
    tokens: Int32[np.ndarray, "n window"]  # BEFORE tokens, the routed token, AFTER tokens; -1 outside the document


class TokenTally:
    """Sums of expert by token and the best contexts, over the batches so far.

    Example:
        >>> tally = TokenTally(num_experts=2, vocab_size=10)
        >>> tokens, one = np.array([[7, 7]], np.int32), np.ones((1, 1, 2, 1), np.int32)  # both tokens go to expert 1
        >>> tally.add(tokens, one[0, ..., 0], one, one.astype(np.float32), one[..., 0] > 0)
        >>> counts = tally.counts()
        >>> counts.expert.tolist(), counts.token.tolist(), counts.num_routed.tolist()
        ([1], [7], [2])
    """

    def __init__(self, num_experts: int, vocab_size: int):
        self._num_experts, self._vocab_size = num_experts, vocab_size
        self._keys, self._counts = np.zeros((2, 0), np.int64)
        # The contexts; a group is layer * num_experts + expert.
        self._groups, self._gates = np.zeros(0, np.int64), np.zeros(0, np.float32)
        self._windows = np.zeros((0, BEFORE + 1 + AFTER), np.int32)

    def add(
        self,
        tokens: Int32[np.ndarray, "B T"],
        segment_ids: Int32[np.ndarray, "B T"],
        expert_ids: Int32[np.ndarray, "L B T K"],
        gates: Float32[np.ndarray, "L B T K"],
        mask: Bool[np.ndarray, "L B T"],
    ) -> None:
        """Add a batch; `mask` selects the positions that are counted."""
        layer, b, t = np.nonzero(mask)
        groups = layer[:, None] * self._num_experts + expert_ids[mask]  # [n, K]
        keys, counts = np.unique(groups * self._vocab_size + tokens[b, t][:, None], return_counts=True)
        self._keys, index = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        self._counts = np.bincount(index, np.concatenate([self._counts, counts])).astype(np.int64)

        flat_groups, flat_gates = groups.ravel(), gates[mask].ravel()
        candidates = _largest(flat_groups, flat_gates, 8 * TOP)  # only these need a window; 8: some are near-duplicates
        index = candidates // groups.shape[1]
        windows = _windows(tokens, segment_ids, b[index], t[index])
        self._keep(flat_groups[candidates], flat_gates[candidates], windows)

    def counts(self) -> TokenCounts:
        """Return the counts of all batches so far."""
        group, token = np.divmod(self._keys, self._vocab_size)
        return TokenCounts(*np.divmod(group, self._num_experts), token, self._counts)

    def contexts(self) -> Contexts:
        """Return the best contexts of all batches so far."""
        return Contexts(*np.divmod(self._groups, self._num_experts), self._gates, self._windows)

    def _keep(self, groups: np.ndarray, gates: np.ndarray, windows: np.ndarray) -> None:
        """Merge new contexts into the kept ones: the best of each set of near-duplicates, then TOP of each group."""
        groups, gates = np.concatenate([self._groups, groups]), np.concatenate([self._gates, gates])
        windows = np.concatenate([self._windows, windows])
        near = np.concatenate([groups[:, None], windows[:, BEFORE + 1 - NEAR : BEFORE + 1]], axis=1)
        _, duplicates = np.unique(near, axis=0, return_inverse=True)
        best = _largest(duplicates.ravel(), gates, 1)
        best = best[_largest(groups[best], gates[best], TOP)]
        self._groups, self._gates, self._windows = groups[best], gates[best], windows[best]


def _largest(groups: np.ndarray, values: np.ndarray, top: int) -> np.ndarray:
    """Return indices of the `top` largest values of each group, the largest first; equal values in their order."""
    order = np.lexsort((-values, groups))
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered)  # where the group of each value begins
    return order[np.arange(len(order)) - starts < top]


def _windows(tokens: np.ndarray, segment_ids: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Cut out the tokens around n positions: int32 [n, BEFORE + 1 + AFTER], -1 outside the position's segment."""
    window = columns[:, None] + np.arange(-BEFORE, AFTER + 1)[None]
    inside = (window >= 0) & (window < tokens.shape[1])
    window, rows = np.where(inside, window, 0), rows[:, None]
    same = segment_ids[rows, window] == segment_ids[rows, columns[:, None]]
    return np.where(inside & same, tokens[rows, window], np.int32(-1))


VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode ids to printable text: signs for line ends and tabs, \\x.. for broken UTF-8, <eos> and <id> for specials.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> readable(ByteTokenizer(), [0x61, 0x0A, 0xC3, 0xA9, 0xC3, 0x00, 256])
        'a↵é\\\\xc3\\\\x00<eos>'
    """
    parts, text = [], b""
    for i in [*ids, None]:
        piece = b"" if i is None else tokenizer.bytes_of([i])
        text += piece
        if not piece:  # a special or the end: a character of several ids is complete here
            parts.append("".join(map(_printable, text.decode("utf-8", "backslashreplace"))))
            text = b""
            if i is not None:
                parts.append("<eos>" if i == tokenizer.eos_id else f"<{i}>")
    return "".join(parts)


def _printable(character: str) -> str:
    sign = character.translate(VISIBLE)
    return sign if sign.isprintable() else character.encode("unicode_escape").decode("ascii")


def context(tokenizer: Tokenizer, window: Int32[np.ndarray, " window"]) -> tuple[str, str, str]:
    """Decode a row of `Contexts.tokens` to readable text: (before, the routed token, after).

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> window = np.full(BEFORE + 1 + AFTER, -1, np.int32)
        >>> window[BEFORE - 1 : BEFORE + 2] = [*b"x=1"]
        >>> context(ByteTokenizer(), window)
        ('x', '=', '1')
    """
    before, token, after = window[:BEFORE], window[BEFORE : BEFORE + 1], window[BEFORE + 1 :]
    texts = [readable(tokenizer, part[part >= 0].tolist()) for part in (before, token, after)]
    return texts[0], texts[1], texts[2]
