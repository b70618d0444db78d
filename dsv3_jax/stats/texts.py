"""The texts of stats.json: pieces of documents with each token's experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.stats.token_rows import TokenRows, readable

TEXTS, TEXT_TOKENS = 12, 512  # complete texts, and tokens of each, at most
MOST_SHOWN = 60_000  # choices of experts, of all layers and texts together


def texts(rows: TokenRows, domains: Sequence[str], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """List pieces of text with each token's experts: the longest of each domain in turn.

    Each is of another document.


    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> from dsv3_jax.stats.token_rows import rows_of
        >>> [text] = texts(rows_of(np.array([[[3], [1]]])), ["code"], ByteTokenizer())
        >>> text["domain"], text["experts"]
        ('code', [[[3], [1]]])
    """
    # The first row of each piece, and how many of its tokens are shown.
    count, length = text_size(rows)
    starts = np.flatnonzero(np.diff(rows.segment, prepend=-1))
    sizes = np.minimum(np.append(starts[1:], len(rows.segment)) - starts, length)

    # Each domain's pieces by falling size, one of a document.
    queues: dict[int, list[int]] = {}
    seen: set[int] = set()
    for piece in np.argsort(-sizes, kind="stable").tolist():
        document = int(rows.document[starts[piece]])
        if document not in seen:
            seen.add(document)
            queues.setdefault(int(rows.domain[starts[piece]]), []).append(piece)

    # The longest of every domain, then the second ones, and so on.
    turns = sorted(
        (turn, domain, piece)
        for domain, queue in queues.items()
        for turn, piece in enumerate(queue)
    )
    return [
        text_of(rows, domains, tokenizer, int(starts[i]), int(starts[i] + sizes[i]))
        for *_, i in turns[:count]
    ]


def text_size(rows: TokenRows) -> tuple[int, int]:
    """(number of texts, tokens of each): fewer and shorter ones of many layers."""
    most = MOST_SHOWN // (len(rows.counted) * rows.expert_ids.shape[-1])
    count = int(np.clip(most // 128, 2, TEXTS))
    return count, min(TEXT_TOKENS, max(32, most // count))


def text_of(
    rows: TokenRows, domains: Sequence[str], tokenizer: Tokenizer, start: int, stop: int
) -> dict[str, Any]:
    """One of `texts`: the rows from `start` to `stop`.

    A position of a head without a choice has no experts.
    """
    # Each token's experts by falling gate: [L, n, K].
    here = slice(start, stop)
    order = np.argsort(-rows.gates[:, here], axis=-1, kind="stable")
    experts = np.take_along_axis(rows.expert_ids[:, here], order, -1)
    gates = np.take_along_axis(rows.gates[:, here], order, -1)
    gates = np.round(gates.astype(float), 2)

    counted = rows.counted[:, here].tolist()
    return {
        "domain": domains[rows.domain[start]],
        "document": int(rows.document[start]),
        "tokens": [readable(tokenizer, [int(i)]) for i in rows.token[here]],
        "nll": [None if np.isnan(x) else round(float(x), 3) for x in rows.nll[here]],
        "experts": _where(counted, experts.tolist()),
        "gates": _where(counted, gates.tolist()),
    }


def _where(counted: list[list[bool]], values: list[list[list]]) -> list[list[list]]:
    """Return the values [L, n, K] of positions that are counted, and no values of the others."""
    return [
        [value if known else [] for known, value in zip(*of_layer, strict=True)]
        for of_layer in zip(counted, values, strict=True)
    ]
