"""A task: rows of tokens that are drawn at random and isolate one mechanism, as a `Source` of batches.

A task is a small frozen dataclass. Its fields are its difficulty, `sample` draws rows, and `best_bits` is the least
expected loss that any model can reach. Token ids are bytes' ids, so a model needs a vocabulary of 260.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import Batch, check_position, check_rows
from dsv3_jax.data.tokenizer import ByteTokenizer, Tokenizer

VOCAB = 256  # ids that a task may use: those of bytes
HELD_OUT = 10**6  # seed of held-out rows; seeds of runs are far below


class Rows(NamedTuple):
    """Rows of a task."""

    tokens: Int32[np.ndarray, "n T"]
    answers: Bool[np.ndarray, "n T"]  # tokens that the model is asked for: the targets of the loss
    domains: Int32[np.ndarray, "n T"]  # index into `Task.domains`


class Task:
    """Base of all tasks."""

    name: ClassVar[str]

    @property
    def length(self) -> int:
        """Tokens of a row, T."""
        raise NotImplementedError

    @property
    def domains(self) -> tuple[str, ...]:
        """Names that `Rows.domains` indexes."""
        return (self.name,)

    @property
    def chance_bits(self) -> float:
        """Expected bits of an answer for a model that knows its alphabet alone."""
        raise NotImplementedError

    @property
    def best_bits(self) -> float:
        """Least expected bits of an answer that any model can reach."""
        return 0.0

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        """Draw rows."""
        raise NotImplementedError

    def held_out(self, count: int) -> Rows:
        """Return rows to measure on, the same in each call."""
        return self.sample(np.random.default_rng(HELD_OUT), count)

    def to_dict(self) -> dict[str, Any]:
        """Return the task as JSON; `from_dict` reads it."""
        return {"task": self.name} | dataclasses.asdict(self)  # type: ignore[call-overload]  # each task is a dataclass

    @property
    def fingerprint(self) -> str:
        """A hash of the task's name and fields, and of a few of its rows, which change with its code."""
        rows = self.sample(np.random.default_rng(0), 4)
        text = json.dumps([self.to_dict(), rows.tokens.tolist(), rows.answers.tolist()], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def rows_of(tokens: np.ndarray, answers: np.ndarray, domains: np.ndarray | None = None) -> Rows:
    """Return rows with the dtypes of `Rows`; without `domains` all rows are of the first.

    Raises: ValueError for ids that are not in 0 … VOCAB − 1.
    """
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < VOCAB:
        raise ValueError(f"tokens={tokens.min()}…{tokens.max()} are not all ids from 0 to {VOCAB - 1}")
    where = np.zeros(tokens.shape) if domains is None else np.broadcast_to(domains, tokens.shape)
    return Rows(tokens.astype(np.int32), answers.astype(bool), where.astype(np.int32))


def require_alphabet(**counts: int) -> None:
    """Check that the tokens of a task fit into the ids that it may use.

    Raises: ValueError with the counts.
    """
    if (total := sum(counts.values())) > VOCAB or min(counts.values()) < 1:
        parts = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise ValueError(f"{parts}: {total} tokens are not 1 … {VOCAB}; make the task smaller")


@dataclass(frozen=True)
class TaskSource:
    """A task as a `Source`. Batch i of seed s depends on (s, i) alone, so a position is one number.

    Example:
        >>> from experiments.lab.tasks import Facts
        >>> source = TaskSource(Facts(firsts=4, seconds=4, bits=2), DataConfig(seq_len=3, batch_size=2))
        >>> next(source.train_batches())["tokens"].shape
        (2, 3)
    """

    task: Any  # a Task
    cfg: DataConfig

    def __post_init__(self):
        if self.cfg.seq_len != self.task.length:
            raise ValueError(
                f"seq_len={self.cfg.seq_len} is not the length of the rows of {self.task.name}, {self.task.length}"
            )

    @property
    def domains(self) -> tuple[str, ...]:
        return self.task.domains

    @property
    def fingerprint(self) -> str:
        return self.task.fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the ids belong to."""
        return ByteTokenizer()

    def describe(self) -> str:
        """Return one line on the task."""
        fields = ", ".join(f"{k}={v}" for k, v in self.task.to_dict().items() if k != "task")
        bits = f"{self.task.chance_bits:.2f} bits by chance, {self.task.best_bits:.2f} at best"
        return f"task {self.task.name}: {fields}; {bits}"

    def train_batches(self, rows: Sequence[int] | np.ndarray | None = None) -> "TaskBatches":
        """Iterate over endless batches."""
        return TaskBatches(self, np.arange(self.cfg.batch_size) if rows is None else np.asarray(rows))

    def val_batches(self, num_batches: int) -> list[Batch]:
        """Return held-out batches."""
        size = self.cfg.batch_size
        rows = self.task.held_out(num_batches * size)
        starts = range(0, len(rows.tokens) - size + 1, size)
        return [_batch(Rows(*(part[i : i + size] for part in rows))) for i in starts]


class TaskBatches(Iterator[Batch]):
    """Training batches of a task."""

    def __init__(self, source: TaskSource, rows: np.ndarray):
        check_rows(rows, source.cfg)
        self._task, self._cfg, self._rows, self._next = source.task, source.cfg, rows, 0
        self._source = {"task": source.fingerprint, "seed": source.cfg.seed, "batch_size": source.cfg.batch_size}

    def __next__(self) -> Batch:
        rng = np.random.default_rng([self._cfg.seed, self._next])
        self._next += 1
        drawn = self._task.sample(rng, self._cfg.batch_size)
        return _batch(Rows(*(part[self._rows] for part in drawn)))

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch."""
        return {**self._source, "batch": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a position. Raises: ValueError when it belongs to another task or seed."""
        check_position(self._source, state)
        self._next = state["batch"]


def _batch(rows: Rows) -> Batch:
    count, length = rows.tokens.shape
    return Batch(
        tokens=rows.tokens,
        segment_ids=np.ones((count, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (count, 1)),
        domains=rows.domains,
        documents=np.tile(np.arange(count, dtype=np.int32)[:, None], (1, length)),
        loss_mask=rows.answers,
    )


def bits_of(count: int) -> float:
    """Return log2 of a count, the bits of an even choice."""
    return math.log2(count)
