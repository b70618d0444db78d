"""A finished run, as a study's measure functions get it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dsv3_jax.config import RunConfig
from experiments.lab.tasks import Task, TaskSource

# in a run's folder: the numbers of its last evaluation, and the seconds of its training
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, the argument of a study's measure functions."""

    folder: Path
    run: RunConfig
    # run folders of the variants that it starts from or is measured with, same seed
    needed_folders: dict[str, Path]
    numbers: dict  # the evaluation's numbers, arrays as lists; `measure` also gets "load" [L, E]
    task: Task | None = None

    def needed_numbers(self) -> dict[str, dict]:
        """Return the evaluations' numbers of the runs in `needed_folders`, by variant."""
        return {
            name: json.loads((folder / EVALUATION).read_text())[0]
            for name, folder in self.needed_folders.items()
        }

    @cached_property
    def model(self):
        """The model of the last checkpoint."""
        from dsv3_jax.runs.checkpoint import load_run

        return load_run(self.folder).model

    @cached_property
    def tokenizer(self):
        """The run's tokenizer."""
        from dsv3_jax.data import tokenizer

        return tokenizer.load(self.run.data.tokenizer)

    @cached_property
    def corpus(self):
        """The documents for training and validation."""
        from dsv3_jax.data.corpus import load_corpus

        return load_corpus(self.run.data)

    def held_out(self, batches: int | None = None) -> list:
        """Return validation batches, the same for all variants with the same data.

        Args: batches: how many; None means the run's `eval_batches`.
        """
        from dsv3_jax.data.source import from_corpus

        count = batches or self.run.eval_batches
        if self.task is not None:
            return TaskSource(self.task, self.run.data).val_batches(count)
        return from_corpus(self.corpus, self.tokenizer, self.run.data).val_batches(count)

    def metrics(self) -> list[dict]:
        """Return the rows of the run's metrics.jsonl."""
        return read_metrics(self.folder)

    def loads(self) -> np.ndarray:
        """Return each expert's load in the steps of load.jsonl, [steps, L, E]."""
        from dsv3_jax.report.metrics_files import LOAD_FILE, read_rows

        return np.array([row["load"] for row in read_rows(self.folder / LOAD_FILE)])


Measure = Callable[[TrainedRun], dict]


def read_metrics(folder: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl, without a last line that is not complete yet."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
