"""A task: rows of tokens drawn at random that isolate one mechanism, as a `Source` of batches.

A task is a small frozen dataclass. Its fields are its difficulty, `sample` draws rows, and
`best_bits` is the least expected loss that any model can reach. Token ids are bytes' ids, so a
model needs a vocabulary of 260.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import Batch, Batches, Source, alternate

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

    def sample_at(self, batch: int, rng: np.random.Generator, count: int) -> Rows:
        """Draw the rows of a training batch, which counts from 0. Default: all are alike."""
        return self.sample(rng, count)

    def held_out(self, count: int) -> Rows:
        """Return rows to measure on, the same in each call."""
        return self.sample(np.random.default_rng(HELD_OUT), count)

    def to_dict(self) -> dict[str, Any]:
        """Return the task as JSON; `from_dict` reads it."""
        return {"task": self.name} | dataclasses.asdict(self)  # type: ignore[call-overload]  # each task is a dataclass

    @property
    def fingerprint(self) -> str:
        """A hash of the task's name, its fields, and a few rows, which change with its code."""
        rows = self.sample(np.random.default_rng(0), 4)
        text = json.dumps(
            [self.to_dict(), rows.tokens.tolist(), rows.answers.tolist()], sort_keys=True
        )
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def rows_of(tokens: np.ndarray, answers: np.ndarray, domains: np.ndarray | None = None) -> Rows:
    """Return rows with the dtypes of `Rows`; without `domains` all rows are of the first.

    Raises: ValueError for ids that are not in 0 … VOCAB − 1.
    """
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < VOCAB:
        raise ValueError(
            f"tokens={tokens.min()}…{tokens.max()} are not all ids from 0 to {VOCAB - 1}"
        )
    where = np.zeros(tokens.shape) if domains is None else np.broadcast_to(domains, tokens.shape)
    return Rows(tokens.astype(np.int32), answers.astype(bool), where.astype(np.int32))


def require_alphabet(**counts: int) -> None:
    """Check that the tokens of a task fit into the ids that it may use.

    Raises: ValueError with the counts.
    """
    if (total := sum(counts.values())) > VOCAB or min(counts.values()) < 1:
        parts = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise ValueError(f"{parts}: {total} tokens are not 1 … {VOCAB}; make the task smaller")


class TaskSource(Source):
    """A task as a `Source`. Batch i of seed s depends on (s, i) alone, so a position is one number.

    Example:
        >>> from experiments.lab.tasks import Facts
        >>> task = Facts(firsts=4, seconds=4, bits=2)
        >>> source = TaskSource(task, DataConfig(seq_len=3, batch_size=2))
        >>> next(source.train_batches())["tokens"].shape
        (2, 3)
    """

    def __init__(self, task: Any, cfg: DataConfig):
        if cfg.seq_len != task.length:
            raise ValueError(
                f"seq_len={cfg.seq_len} is not the length of the rows of {task.name}, {task.length}"
            )
        fields = ", ".join(f"{k}={v}" for k, v in task.to_dict().items() if k != "task")
        bits = f"{task.chance_bits:.2f} bits by chance, {task.best_bits:.2f} at best"
        summary = f"task {task.name}: {fields}; {bits}"
        self.task: Any
        super().__init__(cfg, task.domains, task.fingerprint, summary, train=list, held_out=list)
        object.__setattr__(self, "task", task)  # the base is frozen

    def train_batches(self, rows: Sequence[int] | np.ndarray | None = None) -> Batches:
        """Iterate over endless batches, which are drawn in their order."""
        return TaskBatches(self.task, self.cfg, rows, f"{self.fingerprint}-{self.cfg.seed}")

    def val_batches(self, num_batches: int) -> list[Batch]:
        """Return held-out batches."""
        size = self.cfg.batch_size
        drawn = self.task.held_out(num_batches * size)
        every = np.arange(len(drawn.tokens))
        whole = _batch(drawn, every, size)
        rows: list[Any] = [{key: array[i] for key, array in whole.items()} for i in every]  # type: ignore[index]
        return alternate([rows], size, num_batches)


class TaskBatches(Batches):
    """Endless batches of a task. Each is drawn whole, from the run's seed and its number.

    Rows that were made one by one and then stacked took an eighth of a run of facts.
    """

    def __init__(
        self, task: Any, cfg: DataConfig, mine: Sequence[int] | np.ndarray | None, fingerprint: str
    ):
        super().__init__((), cfg.batch_size, mine, fingerprint)
        self._task, self._cfg = task, cfg

    def __next__(self) -> Batch:
        number = self._row // self._batch_size
        self._row += self._batch_size
        rng = np.random.default_rng([self._cfg.seed, number])
        rows = self._task.sample_at(number, rng, self._batch_size)
        return _batch(rows, self._mine, self._batch_size)


def _batch(rows: Rows, mine: np.ndarray, size: int) -> Batch:
    """Return some of the rows as a batch, each a document that its place in a batch numbers."""
    tokens = rows.tokens[mine]
    document, position = np.meshgrid(mine % size, np.arange(tokens.shape[1]), indexing="ij")
    return Batch(
        tokens=tokens,
        segment_ids=np.ones_like(tokens),
        positions=position.astype(np.int32),
        domains=rows.domains[mine],
        documents=document.astype(np.int32),
        loss_mask=rows.answers[mine],
    )


def bits_of(count: int) -> float:
    """Return log2 of a count, the bits of an even choice."""
    return math.log2(count)
