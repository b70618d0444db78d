"""One run of a study in a process of its own: train it from wherever it stands, measure it, and say what came out."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dsv3_jax.config import RunConfig, from_dict
from experiments.lab.results import thinned, write_whole

STOPPED = 75  # exit code of a run that was asked to stop, and will go on when called again
CURVES = ("loss", "max_vio", "dropped", "val_loss")


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    variant: str
    seed: int
    run: dict  # the configuration, as `to_dict` has it
    folder: str  # of the run
    others: dict[str, str]  # folders of the variants that it needs, same seed
    record: str  # the file to write what was found into
    cores: tuple[int, ...]  # to stay on; none: all
    alone: bool = False  # measure what must have the machine to itself, of a run that is finished

    def write(self) -> str:
        """As a word of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, word: str) -> "Job":
        values = json.loads(word)
        return cls(**values | {"cores": tuple(values["cores"])})


@dataclass(frozen=True)
class Trained:
    """A finished run, as a study's measure is given it."""

    folder: Path
    run: RunConfig
    others: dict[str, Path]  # run folders of the variants named in `After.needs`, same seed
    numbers: dict  # what `evaluate` found, as lists: with its "load" [L, E] for `measure`, else as it was recorded

    @cached_property
    def model(self):
        """The model of the last checkpoint."""
        from dsv3_jax.training.checkpoint import load_model

        return load_model(self.folder)[0]

    @cached_property
    def tokenizer(self):
        """Text to ids and back."""
        from dsv3_jax.data import tokenizer

        return tokenizer.load(self.run.data.tokenizer)

    @cached_property
    def corpus(self):
        """All documents, of both sides."""
        from dsv3_jax.data.batches import load_corpus

        return load_corpus(self.run.data)

    def held_out(self, batches: int | None = None) -> list:
        """Validation batches, the same for every variant with the same data; None is as many as the run evaluates."""
        from dsv3_jax.data.batches import val_batches

        return val_batches(self.corpus, self.tokenizer, self.run.data, batches or self.run.eval_batches)

    def metrics(self) -> list[dict]:
        """The rows of the run's metrics.jsonl."""
        return rows_of(self.folder)


def rows_of(folder: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line that is still being written is left out."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def work(job: Job, measure: Callable[[Trained], dict] | None) -> int:
    """Do a job; `measure` is the study's. Returns the exit code."""
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)  # before XLA counts the cores for its threads
    from dsv3_jax.kernels.cpu.memory import keep_memory

    keep_memory()
    run, folder = from_dict(RunConfig, job.run), Path(job.folder)
    others = {name: Path(path) for name, path in job.others.items()}
    if job.alone:
        assert measure is not None
        numbers = json.loads(Path(job.record).read_text())["numbers"]
        found = {"numbers": numbers | measure(Trained(folder, run, others, numbers))}
    else:
        with _one_at_a_time(folder):
            trained = _train(run, folder)
        if trained is None:
            return STOPPED
        numbers, seconds = trained
        measured = measure(Trained(folder, run, others, numbers)) if measure else {}
        numbers.pop("load")
        found = {
            "numbers": numbers | measured,
            "curves": thinned(rows_of(folder), CURVES),
            "parameters": _parameters(run),
            "steps": run.steps,
            "seconds": round(seconds, 1),
        }
    write_whole(Path(job.record), json.dumps(_plain(found)).encode())
    return 0


def _train(run: RunConfig, folder: Path) -> tuple[dict, float] | None:
    """(what the evaluation found, seconds), or None where the run was asked to stop."""
    from dsv3_jax.training.loop import fit

    start = time.perf_counter()
    fitted = fit(run, folder)
    if not fitted.finished:
        return None
    assert fitted.evaluation is not None
    numbers = _plain(fitted.evaluation) | {"order2_bits_per_byte": fitted.order2_bits_per_byte}
    return numbers, time.perf_counter() - start


def _parameters(run: RunConfig) -> dict:
    from dsv3_jax.model.cache import bytes_per_token, pick_dtype, pick_kind
    from dsv3_jax.model.counting import size

    counted, cfg = size(run.model), run.model
    cache = bytes_per_token(cfg, pick_kind(cfg, None), pick_dtype(cfg, None))
    return {"total": counted.total, "active": counted.active, "cache_bytes": cache}


def _plain(value):
    """As JSON has it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) or hasattr(value, "tolist") else value


@contextmanager
def _one_at_a_time(folder: Path):
    """Studies share runs of the same configuration: who comes second waits, and finds it finished."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(word: str, measure: Callable[[Trained], dict] | None, alone: Callable[[Trained], dict] | None) -> int:
    """A worker's whole life; what is wrong with a run is one sentence on stderr, its last line."""
    job = Job.read(word)
    try:
        return work(job, alone if job.alone else measure)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
