"""Which tokens an expert gets, and where: counts of both, the places of its largest gates, and text for the eye.

Counts of expert by token are kept sparse, as pairs that occur: there are never more of them than assignments, where a
table of a large vocabulary would be mostly zeros. A byte says little by itself, so for each expert the places with the
largest gates are kept as well, with what stands around them.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from dsv3_jax.data.tokenizer import Tokenizer

BEFORE, AFTER = 32, 12  # tokens of a context
NEAR = 8  # contexts that agree in so many last tokens count as one: boilerplate would fill the list
TOP = 12  # contexts kept for each expert


class TokenCounts(NamedTuple):
    """Pairs that occurred, in order of (layer, expert, token)."""

    layer: Int64[np.ndarray, " n"]
    expert: Int64[np.ndarray, " n"]
    token: Int64[np.ndarray, " n"]
    times: Int64[np.ndarray, " n"]  # how often, at least 1


class Contexts(NamedTuple):
    """Places with the largest gates, in order of (layer, expert), the largest first."""

    layer: Int64[np.ndarray, " n"]
    expert: Int64[np.ndarray, " n"]
    gate: Float32[np.ndarray, " n"]
    tokens: Int32[np.ndarray, "n window"]  # BEFORE tokens, the routed one, AFTER; -1 where the document has none


class TokenTally:
    """Adds up expert by token, and keeps the best contexts, over batches."""

    def __init__(self, num_experts: int, vocab_size: int):
        self._num_experts, self._vocab_size = num_experts, vocab_size
        self._keys, self._counts = np.zeros((2, 0), np.int64)
        self._groups, self._gates = np.zeros(0, np.int64), np.zeros(0, np.float32)  # of contexts; group: layer, expert
        self._windows = np.zeros((0, BEFORE + 1 + AFTER), np.int32)

    def add(
        self,
        tokens: Int32[np.ndarray, "B T"],
        segment_ids: Int32[np.ndarray, "B T"],
        expert_ids: Int32[np.ndarray, "L B T K"],
        gates: Float32[np.ndarray, "L B T K"],
        counts: Bool[np.ndarray, "L B T"],
    ) -> None:
        """A batch; `counts` says which positions count."""
        layer, b, t = np.nonzero(counts)
        groups = layer[:, None] * self._num_experts + expert_ids[counts]  # [n, K]
        keys, found = np.unique(groups * self._vocab_size + tokens[b, t][:, None], return_counts=True)
        self._keys, where = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        self._counts = np.bincount(where, np.concatenate([self._counts, found])).astype(np.int64)

        flat, flat_gates = groups.ravel(), gates[counts].ravel()
        few = _largest(flat, flat_gates, 8 * TOP)  # a context is cut out for these alone
        place = few // groups.shape[1]
        self._keep(flat[few], flat_gates[few], _windows(tokens, segment_ids, b[place], t[place]))

    def counts(self) -> TokenCounts:
        group, token = np.divmod(self._keys, self._vocab_size)
        return TokenCounts(*np.divmod(group, self._num_experts), token, self._counts)

    def contexts(self) -> Contexts:
        return Contexts(*np.divmod(self._groups, self._num_experts), self._gates, self._windows)

    def _keep(self, groups: np.ndarray, gates: np.ndarray, windows: np.ndarray) -> None:
        """Of these and those before, the best TOP of each group; of like contexts the best alone."""
        groups, gates = np.concatenate([self._groups, groups]), np.concatenate([self._gates, gates])
        windows = np.concatenate([self._windows, windows])
        near = np.concatenate([groups[:, None], windows[:, BEFORE + 1 - NEAR : BEFORE + 1]], axis=1)
        _, alike = np.unique(near, axis=0, return_inverse=True)
        best = _largest(alike.ravel(), gates, 1)
        best = best[_largest(groups[best], gates[best], TOP)]
        self._groups, self._gates, self._windows = groups[best], gates[best], windows[best]


def _largest(groups: np.ndarray, values: np.ndarray, top: int) -> np.ndarray:
    """Indices of the `top` largest values of each group, by group, the largest first; of equals the earliest."""
    order = np.lexsort((-values, groups))
    ordered = groups[order]
    starts = np.searchsorted(ordered, ordered)  # where each one's group begins
    return order[np.arange(len(order)) - starts < top]


def _windows(tokens: np.ndarray, segment_ids: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Tokens around places [n], of the same segment: [n, BEFORE + 1 + AFTER], -1 elsewhere."""
    around = columns[:, None] + np.arange(-BEFORE, AFTER + 1)[None]
    inside = (around >= 0) & (around < tokens.shape[1])
    around, rows = np.where(inside, around, 0), rows[:, None]
    same = segment_ids[rows, around] == segment_ids[rows, columns[:, None]]
    return np.where(inside & same, tokens[rows, around], np.int32(-1))


VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


def readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of ids for the eye: line ends and tabs as signs, what is not text as \\x.., the end of a document as <eos>.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> readable(ByteTokenizer(), [0x61, 0x0A, 0xC3, 0xA9, 0xC3, 0x00, 256])
        'a↵é\\\\xc3\\\\x00<eos>'
    """
    parts, text = [], b""
    for i in [*ids, None]:
        piece = b"" if i is None else tokenizer.bytes_of([i])
        text += piece
        if not piece:  # a special, or the end: characters of several ids are whole by now
            parts.append("".join(map(_sign, text.decode("utf-8", "backslashreplace"))))
            text = b""
            if i is not None:
                parts.append("<eos>" if i == tokenizer.eos_id else f"<{i}>")
    return "".join(parts)


def _sign(character: str) -> str:
    shown = character.translate(VISIBLE)
    return shown if shown.isprintable() else character.encode("unicode_escape").decode("ascii")


def context(tokenizer: Tokenizer, window: Int32[np.ndarray, " window"]) -> tuple[str, str, str]:
    """(before, the routed token, after) of a row of `Contexts.tokens`, readable."""
    before, token, after = window[:BEFORE], window[BEFORE : BEFORE + 1], window[BEFORE + 1 :]
    texts = [readable(tokenizer, part[part >= 0].tolist()) for part in (before, token, after)]
    return texts[0], texts[1], texts[2]
