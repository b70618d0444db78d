"""Contexts: the text around the largest gates of each expert, each from another token and another document."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, Int64

from dsv3_jax.stats.text import AFTER, BEFORE
from dsv3_jax.stats.token_rows import TokenRows

TOP = 8  # contexts kept for each expert


class Contexts(NamedTuple):
    """Positions with the largest gates, in order of (layer, expert), the largest gate first."""

    layer: Int64[np.ndarray, " n"]
    expert: Int64[np.ndarray, " n"]
    gate: Float32[np.ndarray, " n"]
    tokens: Int32[np.ndarray, "n window"]  # BEFORE tokens, the routed token, AFTER tokens; -1 outside the piece
    margin: Float32[np.ndarray, " n"]  # as `Choices.margin`
    document: Int32[np.ndarray, " n"]


def no_contexts() -> Contexts:
    """Return contexts of no text.

    Example:
        >>> no_contexts().tokens.shape
        (0, 45)
    """
    none, zeros = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return Contexts(none, none, zeros, np.zeros((0, BEFORE + 1 + AFTER), np.int32), zeros, none.astype(np.int32))


def find_contexts(rows: TokenRows, num_experts: int, *, top: int = TOP) -> Contexts:
    """Find the positions of each expert's largest gates; at most one of a token and of a document.

    The largest gate is taken, then the largest one of another token in another document, and so on. If gates are
    equal, the one that was read first is taken.

    Args: top: contexts for each expert, at most.
    """
    parts = [np.zeros((0, 4), np.int64)]
    gates, margins = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    size = rows.expert_ids.shape[-1]
    for layer, counted in enumerate(rows.counted):
        position = np.repeat(np.flatnonzero(counted), size)
        expert, gate = rows.expert_ids[layer, counted].ravel().astype(np.int64), rows.gates[layer, counted].ravel()
        slot = np.tile(np.arange(size), int(counted.sum()))
        alive = np.lexsort((-gate, expert))
        for rank in range(top):
            if not len(alive):
                break
            # np.unique gives the first of each expert, which has the largest gate.
            experts, first = np.unique(expert[alive], return_index=True)
            best = alive[first]
            where = np.full(num_experts, -1)
            where[experts] = position[best]
            parts.append(
                np.stack([np.full(len(best), layer), experts, np.full(len(best), rank), position[best]], axis=1)
            )
            gates.append(gate[best])
            margins.append(rows.margin[layer, position[best], slot[best]])
            of_best, here = where[expert[alive]], position[alive]
            other = (rows.token[of_best] != rows.token[here]) & (rows.document[of_best] != rows.document[here])
            alive = alive[other]
    found = np.concatenate(parts)
    order = np.lexsort((found[:, 2], found[:, 1], found[:, 0]))
    layers, experts, _, positions = found[order].T
    return Contexts(
        layers,
        experts,
        np.concatenate(gates)[order],
        _windows(rows, positions),
        np.concatenate(margins)[order],
        rows.document[positions],
    )


def _windows(rows: TokenRows, positions: np.ndarray) -> np.ndarray:
    """Cut out the tokens around n rows: int32 [n, BEFORE + 1 + AFTER], -1 outside the row's piece."""
    window = positions[:, None] + np.arange(-BEFORE, AFTER + 1)[None]
    inside = (window >= 0) & (window < len(rows.token))
    window = np.where(inside, window, 0)
    same = rows.segment[window] == rows.segment[positions][:, None]
    return np.where(inside & same, rows.token[window], np.int32(-1))
