"""Every token that was read, with its experts, gates and margins: arrays, and a Parquet file of them.

Measures that need neighbours, documents or layers together are functions of these rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from dsv3_jax.data.batches import Batch
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.files import write_atomic
from dsv3_jax.stats.decisions import Choices
from dsv3_jax.stats.text import readable

MOST_CHOICES = 2**26  # L · n · K that are kept: some 700 MB; tokens beyond are counted, and have no row


class TokenRows(NamedTuple):
    """Choices of n tokens in L layers, in the order of reading."""

    token: Int32[np.ndarray, " n"]
    segment: Int32[np.ndarray, " n"]  # running number of the piece of text: neighbours of one piece are adjacent rows
    position: Int32[np.ndarray, " n"]  # in its piece
    document: Int32[np.ndarray, " n"]
    domain: Int32[np.ndarray, " n"]
    nll: Float32[np.ndarray, " n"]  # nats of the token, given those before it in its piece; NaN of the first
    counted: Bool[np.ndarray, "L n"]  # a multi-token head has no choice where its target is elsewhere
    expert_ids: Int[np.ndarray, "L n K"]  # int16 or int32
    gates: Float32[np.ndarray, "L n K"]
    margin: Float32[np.ndarray, "L n K"]  # as `Choices.margin`

    @property
    def loss(self) -> float:
        """Mean nats a token over tokens that have one; NaN without."""
        known = ~np.isnan(self.nll)
        return float(self.nll[known].astype(np.float64).mean()) if known.any() else float("nan")


def rows_of(expert_ids: Int[np.ndarray, "L n K"], document: Int[np.ndarray, " n"] | None = None) -> TokenRows:
    """Build rows from choices alone, for tests and examples: one piece a document, gates 1/K, no losses or margins.

    Example:
        >>> rows_of(np.zeros((1, 3, 2), int)).position
        array([0, 1, 2], dtype=int32)
    """
    num_layers, n, k = expert_ids.shape
    zeros, where = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    document = zeros if document is None else document.astype(np.int32)
    segment = np.cumsum(np.diff(document, prepend=document[:1]) != 0).astype(np.int32)
    position = where - np.searchsorted(segment, segment).astype(np.int32)
    gates, none = np.full(expert_ids.shape, 1 / k, np.float32), np.full(expert_ids.shape, np.nan, np.float32)
    nll, counted = np.full(n, np.nan, np.float32), np.ones((num_layers, n), bool)
    return TokenRows(zeros, segment, position, document, zeros, nll, counted, expert_ids, gates, none)


def first_rows(rows: TokenRows, count: int) -> TokenRows:
    """Return the first rows alone.

    Example:
        >>> first_rows(rows_of(np.zeros((1, 3, 2), int)), 2).counted.shape
        (1, 2)
    """
    return TokenRows(*(column[..., :count] if column.ndim < 3 else column[:, :count] for column in rows))


def join_rows(parts: Sequence[TokenRows]) -> TokenRows:
    """Concatenate rows, without changing what they hold.

    Example:
        >>> one = rows_of(np.zeros((1, 3, 2), int))
        >>> join_rows([one, one]).counted.shape
        (1, 6)
    """
    columns = zip(*parts, strict=True)
    return TokenRows(*(np.concatenate(column, axis=0 if column[0].ndim < 2 else 1) for column in columns))


class RowsTally:
    """The rows of the batches so far, up to MOST_CHOICES.

    Example:
        >>> RowsTally(num_experts=8).rows() is None
        True
    """

    def __init__(self, num_experts: int):
        self._dtype = np.int16 if num_experts < 2**15 else np.int32
        self._parts: list[TokenRows] = []
        self._segments, self._choices = 0, 0

    def add(self, batch: Batch, choices: Choices) -> None:
        """Add the tokens of a batch, row by row; padding is left out."""
        real = np.asarray(batch["segment_ids"]) != 0
        room = (MOST_CHOICES - self._choices) // max(int(np.prod(choices.expert_ids.shape)) // real.size, 1)
        chosen = np.flatnonzero(real)[: max(room, 0)]
        if not len(chosen):
            return

        def pick(values: Any) -> np.ndarray:  # [B, T]
            return np.asarray(values).reshape(-1)[chosen]

        def pick_layers(values: Any) -> np.ndarray:  # [L, B, T, …]
            return np.asarray(values).reshape(len(values), real.size, *np.shape(values)[3:])[:, chosen]

        length = real.shape[1]
        piece = (np.arange(real.size).reshape(real.shape) // length) * (length + 1) + batch["segment_ids"]
        segment = np.unique(pick(piece), return_inverse=True)[1].reshape(-1) + self._segments
        part = TokenRows(
            pick(batch["tokens"]),
            segment.astype(np.int32),
            pick(batch["positions"]),
            pick(batch["documents"]),
            pick(batch["domains"]),
            pick(choices.nll),
            pick_layers(choices.mask),
            pick_layers(choices.expert_ids).astype(self._dtype),
            pick_layers(choices.gates).astype(np.float32),
            pick_layers(choices.margin).astype(np.float32),
        )
        self._parts.append(part)
        self._segments = int(segment[-1]) + 1
        self._choices += part.expert_ids.size

    def rows(self) -> TokenRows | None:
        """Return the rows of all batches so far; None without any."""
        return join_rows(self._parts) if self._parts else None


def write_parquet(
    path: str | Path, rows: TokenRows, layers: Sequence[str], domains: Sequence[str], tokenizer: Tokenizer
) -> int:
    """Write a row for each token and layer: document, piece, position, domain, token, text, nll, layer, expert, gate,
    margin.

    `expert`, `gate` and `margin` are lists of K. `nll` is null for the first token of a piece, and `margin` where no
    expert is left over.

    Returns: the number of rows.
    Raises: ValueError without pyarrow; OSError.

    Example:
        >>> import tempfile
        >>> import pyarrow.parquet
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> one, choice = np.zeros(1, np.int32), np.ones((1, 1, 1), np.float32)
        >>> rows = TokenRows(one + 65, one, one, one, one, choice[0, 0], choice[0] > 0, choice.astype(np.int16), choice,
        ...                  choice)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_parquet(f"{folder}/tokens.parquet", rows, ["layer 0"], ["text"], ByteTokenizer())
        ...     pyarrow.parquet.read_table(f"{folder}/tokens.parquet").select(["text", "layer", "expert"]).to_pylist()
        [{'text': 'A', 'layer': 'layer 0', 'expert': [1]}]
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path} needs pyarrow, which is not installed; run pip install 'dsv3-jax[parquet]'"
        ) from error
    ids, inverse = np.unique(rows.token, return_inverse=True)
    texts = [readable(tokenizer, [int(i)]) for i in ids]
    layer, index = np.nonzero(rows.counted)
    size = rows.expert_ids.shape[-1]

    def lists(values: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), from_pandas=True), size)

    def words(values: Sequence[str], where: np.ndarray) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(where.astype(np.int32)), pa.array(list(values), pa.string()))

    table = pa.table(
        {
            "document": rows.document[index],
            "piece": rows.segment[index],
            "position": rows.position[index],
            "domain": words(domains, rows.domain[index]),
            "token": rows.token[index],
            "text": words(texts, inverse.reshape(-1)[index]),
            "nll": pa.array(rows.nll[index], from_pandas=True),
            "layer": words(layers, layer),
            "expert": lists(rows.expert_ids[layer, index]),
            "gate": lists(rows.gates[layer, index]),
            "margin": lists(rows.margin[layer, index]),
        }
    )
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    write_atomic(path, sink.getvalue().to_pybytes())
    return table.num_rows
