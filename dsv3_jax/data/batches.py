"""Rows of T tokens in, batches out: one iterator for documents, chats and shards.

A process of a multi-host run reads only its own rows of each batch.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, Float32, Int32

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import Corpus


class Batch(TypedDict):
    """Arrays of one shape, int32 [B, T]; loss_mask is bool. A `Row` has the same arrays as [T].

    tokens: The tokenizer's eos follows each document.
    segment_ids: A row's documents are 1, 2, …; 0 is padding.
    positions: They count from 0 in each document of a row. Without `separate_documents` they are
        0 … T-1, and all segment_ids are 1.
    domains: index into `Source.domains`.
    documents: number of the document in its corpus or shards.
    loss_mask: tokens that count as targets of the losses. Without it all do.
    expert_ids: experts in place of the routers' choices, int32 [B, L, T, K], see
        `training.loss.compute_loss`.
    routed_tokens: the tokens that these were recorded for, −1 where there was none; they must be
        the row's.
    advantages, old_logprobs, start_logprobs: of answers, float32 [B, T], see `training.policy`.
    """

    tokens: Int32[np.ndarray, "*B T"]
    segment_ids: Int32[np.ndarray, "*B T"]
    positions: Int32[np.ndarray, "*B T"]
    domains: Int32[np.ndarray, "*B T"]
    documents: Int32[np.ndarray, "*B T"]
    loss_mask: NotRequired[Bool[np.ndarray, "*B T"]]
    expert_ids: NotRequired[Int32[np.ndarray, "*B L T K"]]
    routed_tokens: NotRequired[Int32[np.ndarray, "*B T"]]
    advantages: NotRequired[Float32[np.ndarray, "*B T"]]
    old_logprobs: NotRequired[Float32[np.ndarray, "*B T"]]
    start_logprobs: NotRequired[Float32[np.ndarray, "*B T"]]


Row = Batch


@runtime_checkable  # tests check signatures when functions are called
class RowSequence(Protocol):
    """Random access to rows: `PackedRows` in memory, `ShardRows` on disk, or what Grain makes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """Return a `Row`."""
        ...


def stack(rows: Sequence[Row]) -> Batch:
    """Join rows [T] to a batch [B, T].

    Raises: ValueError if a row's experts were recorded for other tokens than its own.

    Example:
        >>> a = np.ones(2, np.int32)
        >>> row = Row(tokens=a, segment_ids=a, positions=a, domains=a, documents=a)
        >>> stack([row, row])["tokens"].shape
        (2, 2)
    """
    for row in rows:
        if "expert_ids" in row:
            _check_alignment(row)
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}  # type: ignore[literal-required, return-value]


def _check_alignment(row: Row) -> None:
    if "routed_tokens" not in row:
        raise ValueError(
            "a row has expert_ids without routed_tokens, the tokens that they were recorded for"
        )

    # Experts belong to the token that they were recorded for; −1 fits any.
    tokens, routed = row["tokens"], row["routed_tokens"]
    wrong = np.flatnonzero((routed >= 0) & (routed != tokens))
    if not len(wrong):
        return

    # The usual fault is an offset of one: say so where it explains all tokens.
    fits = [n for n in (1, -1) if (np.roll(tokens, -n) == routed)[routed >= 0].all()]
    what = f"shifted by {fits[0]}" if fits else "of another text"
    raise ValueError(
        f"expert_ids were recorded at place {wrong[0]} for token {routed[wrong[0]]}, and the row "
        f"has {tokens[wrong[0]]} there: they are {what}"
    )


def model_inputs(batch: Batch) -> dict[str, np.ndarray]:
    """Return the arrays of a batch that the model and its losses read.

    Example:
        >>> list(model_inputs(one_row(b"x = 1")))
        ['tokens', 'segment_ids', 'positions']
    """
    unread = "domains", "documents", "routed_tokens"
    return {key: array for key, array in batch.items() if key not in unread}  # type: ignore[misc]


def one_row(tokens: Sequence[int], domain: int = 0) -> Batch:
    """Return a batch of one row that holds one document, as the measures of a model take it.

    Example:
        >>> batch = one_row(b"x = 1")
        >>> batch["tokens"].tolist(), batch["positions"].tolist()
        ([[120, 32, 61, 32, 49]], [[0, 1, 2, 3, 4]])
    """
    ids = np.array([list(tokens)], np.int32)
    zeros = np.zeros_like(ids)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    return Batch(
        tokens=ids,
        segment_ids=zeros + 1,
        positions=positions,
        domains=zeros + domain,
        documents=zeros,
    )


class Batches(Iterator[Batch]):
    """Endless training batches. Their position is the number of the next row of an endless order.

    All processes share one position. It is also valid for another number of processes, and for
    another batch size.

    Args:
        order: rows of the global order, see `endless`.
        batch_size: rows of a global batch (B).
        mine: the rows of each global batch that this process reads, from 0 to B-1. None means all.
        fingerprint: identifies the data in a position.

    Example:
        >>> order = [{"tokens": np.array([i], np.int32)} for i in range(8)]
        >>> batches = Batches(order, batch_size=2)
        >>> next(batches)["tokens"].tolist(), batches.get_state()
        ([[0], [1]], {'corpus': '', 'row': 2})
        >>> batches.set_state({"corpus": "", "row": 5})
        >>> next(batches)["tokens"].tolist()
        [[5], [6]]
    """

    metrics: Mapping[str, float] = {}  # of the last batch, to be logged with its step

    def __init__(
        self,
        order: RowSequence,
        batch_size: int,
        mine: Sequence[int] | np.ndarray | None = None,
        fingerprint: str = "",
    ):
        mine = np.arange(batch_size) if mine is None else np.asarray(mine)
        self._order = order
        self._batch_size = batch_size
        self._mine = mine
        self._fingerprint = fingerprint
        self._row = 0

    def __next__(self) -> Batch:
        # The position moves by the global batch, however many rows of it this process reads.
        batch = stack([self._order[int(self._row + i)] for i in self._mine])
        self._row += self._batch_size
        return batch

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as plain JSON."""
        return {"corpus": self._fingerprint, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a position, in constant time.

        Raises: ValueError when it is no position, or belongs to other data.
        """
        saved, row = state.get("corpus"), state.get("row")
        if type(row) is not int or row < 0:
            raise ValueError(f"row={row!r:.80} is no position in the data")
        if saved != self._fingerprint:
            raise ValueError(
                f"corpus={self._fingerprint!r} is not the saved one, {saved!r}; resume with the "
                "same data"
            )
        self._row = row


def endless(
    parts: Sequence[RowSequence], seed: int, weights: Sequence[float] = (1.0,)
) -> RowSequence:
    """Order rows without end: each pass over a part has another order, and parts mix by weight.

    Row i of the order is found in constant time.

    Example:
        >>> order = endless([range(10), range(10, 20)], seed=0, weights=[0.75, 0.25])
        >>> sorted(order[i] for i in range(12))  # of the second part a third as many
        [0, 1, 2, 4, 5, 6, 7, 8, 9, 15, 16, 17]
    """
    # Each part has its own seed, so parts of one length are not shuffled alike.
    orders = [
        grain.MapDataset.source(part).seed((seed + i) % 2**32).shuffle().repeat()
        for i, part in enumerate(parts)
    ]
    return orders[0] if len(orders) == 1 else grain.MapDataset.mix(orders, weights)


def alternate(domains: Sequence[RowSequence], batch_size: int, num_batches: int) -> list[Batch]:
    """Return held-out batches whose rows alternate between domains: a few have all in equal parts.

    Args: num_batches: the most to return. Fewer rows give fewer batches, and the last one may end
        in rows of padding.
    """
    # Row 0 of each domain, then row 1 of each; a domain that is at its end is left out.
    rounds = range(max(map(len, domains), default=0))
    found = (rows[i] for i in rounds for rows in domains if i < len(rows))
    rows = list(itertools.islice(found, num_batches * batch_size))

    # Padding has segment 0, which no loss and no statistic counts.
    if rows:
        padding = {key: np.zeros_like(array) for key, array in rows[0].items()}
        rows += [padding] * (-len(rows) % batch_size)
    return [stack(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


@dataclass(frozen=True)
class Source:
    """Data to train and to measure on.

    Attributes:
        domains: names that `Batch.domains` indexes.
        fingerprint: a hash of what is trained on.
        summary: one line on what there is.
        train: returns the training rows, in parts that `weights` mix.
        held_out: returns the held-out rows of each domain.
        corpus: the documents. None for chats and shards.
        training_bytes: bytes of the training text by domain. None where only the source knows its
            mix.
        examples: of chats, how many are trained on.
    """

    cfg: DataConfig
    domains: tuple[str, ...]
    fingerprint: str
    summary: str
    train: Callable[[], Sequence[RowSequence]]
    held_out: Callable[[], Sequence[RowSequence]]
    weights: tuple[float, ...] = (1.0,)
    corpus: Corpus | None = None
    training_bytes: dict[str, float] | None = None
    examples: int = 0

    def train_batches(self, rows: Sequence[int] | np.ndarray | None = None) -> Batches:
        """Iterate over endless training batches.

        Args: rows: of each global batch that this process reads.
        """
        order = endless(self.train(), self.cfg.seed, self.weights)
        return Batches(order, self.cfg.batch_size, rows, self.fingerprint)

    def rows_per_epoch(self) -> int:
        """Return the number of training rows in a pass over all of them."""
        return sum(map(len, self.train()))

    def val_batches(self, num_batches: int) -> list[Batch]:
        """Return held-out batches, at most `num_batches`. Their rows alternate between domains."""
        return alternate(self.held_out(), self.cfg.batch_size, num_batches)
