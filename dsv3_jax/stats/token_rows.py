"""Every token that was read, with experts, gates and margins; what these rows say of an expert.

`TokenRows` holds the choices. `find_contexts` finds the text around an expert's largest gates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from dsv3_jax.data.batches import Batch
from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.stats.decisions import Choices

# L · n · K that are kept: some 700 MB; tokens beyond are counted, and have no row
MOST_CHOICES = 2**26
TOP = 8  # contexts kept for each expert
BEFORE, AFTER = 32, 12  # tokens of a context
VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥", "\r": "␍"})


class TokenRows(NamedTuple):
    """Choices of n tokens in L layers, in the order of reading."""

    token: Int32[np.ndarray, " n"]
    # running number of the piece of text: neighbours of one piece are adjacent rows
    segment: Int32[np.ndarray, " n"]
    position: Int32[np.ndarray, " n"]  # in its piece
    document: Int32[np.ndarray, " n"]
    domain: Int32[np.ndarray, " n"]
    # nats of the token, given those before it in its piece; NaN of the first
    nll: Float32[np.ndarray, " n"]
    # a multi-token head has no choice where its target is elsewhere
    counted: Bool[np.ndarray, "L n"]
    expert_ids: Int[np.ndarray, "L n K"]  # int16 or int32
    gates: Float32[np.ndarray, "L n K"]
    margin: Float32[np.ndarray, "L n K"]  # as `Choices.margin`

    @property
    def loss(self) -> float:
        """Mean nats a token over tokens that have one; NaN without."""
        known = ~np.isnan(self.nll)
        return float(self.nll[known].astype(np.float64).mean()) if known.any() else float("nan")


def rows_of(
    expert_ids: Int[np.ndarray, "L n K"], document: Int[np.ndarray, " n"] | None = None
) -> TokenRows:
    """Build rows from choices alone, for tests: one piece a document, gates 1/K, no other numbers.

    Example:
        >>> rows_of(np.zeros((1, 3, 2), int)).position
        array([0, 1, 2], dtype=int32)
    """
    num_layers, n, k = expert_ids.shape
    zeros = np.zeros(n, np.int32)

    # A new document begins a new piece, at position 0.
    where = np.arange(n, dtype=np.int32)
    document = zeros if document is None else document.astype(np.int32)
    segment = np.cumsum(np.diff(document, prepend=document[:1]) != 0).astype(np.int32)
    position = where - np.searchsorted(segment, segment).astype(np.int32)

    return TokenRows(
        token=zeros,
        segment=segment,
        position=position,
        document=document,
        domain=zeros,
        nll=np.full(n, np.nan, np.float32),
        counted=np.ones((num_layers, n), bool),
        expert_ids=expert_ids,
        gates=np.full(expert_ids.shape, 1 / k, np.float32),
        margin=np.full(expert_ids.shape, np.nan, np.float32),
    )


def first_rows(rows: TokenRows, count: int) -> TokenRows:
    """Return the first rows alone.

    Example:
        >>> first_rows(rows_of(np.zeros((1, 3, 2), int)), 2).counted.shape
        (1, 2)
    """
    return TokenRows(
        *(column[..., :count] if column.ndim < 3 else column[:, :count] for column in rows)
    )


def join_rows(parts: Sequence[TokenRows]) -> TokenRows:
    """Concatenate rows; the pieces of one part are not those of another.

    Example:
        >>> one = rows_of(np.zeros((1, 3, 2), int))
        >>> join_rows([one, one]).segment.tolist()
        [0, 0, 0, 1, 1, 1]
    """
    first = np.cumsum([0, *(part.segment.max(initial=-1) + 1 for part in parts)])
    parts = [
        part._replace(segment=part.segment + np.int32(i))
        for part, i in zip(parts, first, strict=False)
    ]
    columns = zip(*parts, strict=True)
    return TokenRows(
        *(np.concatenate(column, axis=0 if column[0].ndim < 2 else 1) for column in columns)
    )


def rows_of_batch(batch: Batch, choices: Choices, most: int = MOST_CHOICES) -> TokenRows:
    """The tokens of a batch, row by row, without padding: the first ones with so many choices."""
    real = np.asarray(batch["segment_ids"]) != 0
    choices_a_token = int(np.prod(choices.expert_ids.shape)) // real.size
    chosen = np.flatnonzero(real)[: most // max(choices_a_token, 1)]

    def pick(values: Any) -> np.ndarray:  # [B, T]
        return np.asarray(values).reshape(-1)[chosen]

    def pick_layers(values: Any) -> np.ndarray:  # [L, B, T, …]
        return np.asarray(values).reshape(len(values), real.size, *np.shape(values)[3:])[:, chosen]

    # A piece is a segment of a row. Pieces of the batch are numbered in the order of reading.
    row = np.arange(len(real))[:, None]
    pieces = pick(row * (real.shape[1] + 1) + batch["segment_ids"])
    piece = np.unique(pieces, return_inverse=True)[1]
    small = np.int16 if choices.coactivation.shape[-1] < 2**15 else np.int32
    return TokenRows(
        token=pick(batch["tokens"]),
        segment=piece.reshape(-1).astype(np.int32),
        position=pick(batch["positions"]),
        document=pick(batch["documents"]),
        domain=pick(batch["domains"]),
        nll=pick(choices.nll),
        # by layer
        counted=pick_layers(choices.mask),
        expert_ids=pick_layers(choices.expert_ids).astype(small),
        gates=pick_layers(choices.gates).astype(np.float32),
        margin=pick_layers(choices.margin).astype(np.float32),
    )


class Contexts(NamedTuple):
    """Positions with the largest gates, in order of (layer, expert), the largest gate first."""

    layer: Int64[np.ndarray, " n"]
    expert: Int64[np.ndarray, " n"]
    gate: Float32[np.ndarray, " n"]
    # BEFORE tokens, the routed token, AFTER tokens; -1 outside the piece
    tokens: Int32[np.ndarray, "n window"]
    margin: Float32[np.ndarray, " n"]  # as `Choices.margin`
    document: Int32[np.ndarray, " n"]


def find_contexts(rows: TokenRows, num_experts: int, *, top: int = TOP) -> Contexts:
    """Find the positions of each expert's largest gates; at most one of a token and of a document.

    The largest gate is taken, then the largest one of another token in another document, and so on.
    If gates are equal, the one that was read first is taken.

    Args: top: contexts for each expert, at most.
    """
    parts = [np.zeros((0, 4), np.int64)]  # layer, expert, rank, position
    gates = [np.zeros(0, np.float32)]
    margins = [np.zeros(0, np.float32)]
    size = rows.expert_ids.shape[-1]
    for layer, counted in enumerate(rows.counted):
        # One candidate for each choice, expert by expert, the largest gate first.
        position = np.repeat(np.flatnonzero(counted), size)
        expert = rows.expert_ids[layer, counted].ravel().astype(np.int64)
        gate = rows.gates[layer, counted].ravel()
        slot = np.tile(np.arange(size), int(counted.sum()))
        alive = np.lexsort((-gate, expert))

        for rank in range(top):
            if not len(alive):
                break
            # The best candidate of every expert that has one left.
            # np.unique gives the first of each expert, which has the largest gate.
            experts, first = np.unique(expert[alive], return_index=True)
            best = alive[first]
            where = np.full(num_experts, -1)
            where[experts] = position[best]
            same = np.ones(len(best), np.int64)
            columns = [layer * same, experts, rank * same, position[best]]
            parts.append(np.stack(columns, axis=1))
            gates.append(gate[best])
            margins.append(rows.margin[layer, position[best], slot[best]])

            # Candidates with the token or the document of their expert's best one are out.
            of_best = where[expert[alive]]
            here = position[alive]
            other_token = rows.token[of_best] != rows.token[here]
            other_document = rows.document[of_best] != rows.document[here]
            alive = alive[other_token & other_document]

    found = np.concatenate(parts)
    order = np.lexsort((found[:, 2], found[:, 1], found[:, 0]))
    layers, experts, _, positions = found[order].T
    return Contexts(
        layer=layers,
        expert=experts,
        gate=np.concatenate(gates)[order],
        tokens=_windows(rows, positions),
        margin=np.concatenate(margins)[order],
        document=rows.document[positions],
    )


def _windows(rows: TokenRows, positions: np.ndarray) -> np.ndarray:
    """Cut out the tokens around n rows: int32 [n, BEFORE + 1 + AFTER], -1 outside the piece."""
    window = positions[:, None] + np.arange(-BEFORE, AFTER + 1)[None]
    inside = (window >= 0) & (window < len(rows.token))
    window = np.where(inside, window, 0)
    same = rows.segment[window] == rows.segment[positions][:, None]
    return np.where(inside & same, rows.token[window], np.int32(-1))


def readable(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode ids to printable text: signs for line ends and tabs, \\x.. for broken UTF-8, <eos>.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> readable(ByteTokenizer(), [0x61, 0x0A, 0xC3, 0xA9, 0xC3, 0x00, 256])
        'a↵é\\\\xc3\\\\x00<eos>'
    """
    specials = [at for at, length in enumerate(tokenizer.byte_lengths[ids].tolist()) if not length]
    parts = []
    start = 0
    for at in [*specials, len(ids)]:
        # A character may have several ids: text is decoded up to the next special, or the end.
        if at > start:
            text = tokenizer.bytes_of(ids[start:at]).decode("utf-8", "backslashreplace")
            parts.append(_printable(text))
        if at < len(ids):
            parts.append("<eos>" if ids[at] == tokenizer.eos_id else f"<{ids[at]}>")
        start = at + 1
    return "".join(parts)


def _printable(text: str) -> str:
    text = text.translate(VISIBLE)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


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
