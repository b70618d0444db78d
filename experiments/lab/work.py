"""A worker process: it trains or resumes runs of a study, measures them, and writes records."""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from dsv3_jax.config import RunConfig
from dsv3_jax.host.files import write_atomic
from experiments.lab.results import thin_curves
from experiments.lab.sources import source_of
from experiments.lab.tasks import Task
from experiments.lab.trained import EVALUATION, Measure, TrainedRun, read_metrics

STOPPED = 75  # exit code of a run that saved after a stop request; the same job resumes it
CURVES = ("loss", "max_vio", "dropped", "val_loss")


@dataclass(frozen=True)
class Job:
    """The instructions for one run. Paths are relative to the repository."""

    variant: str
    seed: int
    run: RunConfig
    folder: str  # run folder
    # run folders of the variants that this one depends on, same seed
    needed_folders: dict[str, str]
    task: Task | None = None  # data in place of the text
    alone: bool = False  # run `measure_alone` on a finished run, with the machine to itself

    @property
    def name(self) -> str:
        """Variant and seed, as messages say them."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def log(self) -> str:
        """The file for what the job prints."""
        return self.folder + ".log"

    @property
    def record(self) -> str:
        """The JSON file that the worker writes."""
        return self.folder + ".json"


def run_job(
    job: Job, measure: Measure | None, make_start: Callable[[RunConfig], None] | None = None
) -> int:
    """Train and measure one run, and write its record. Returns the exit code.

    Args:
        measure: the study's `measure`, or its `measure_alone` for a job with `alone`.
        make_start: the study's.
    """
    run, folder, record = job.run, Path(job.folder), Path(job.record)
    needed = {name: Path(path) for name, path in job.needed_folders.items()}
    if job.alone:
        assert measure is not None
        numbers = json.loads(record.read_text())["numbers"]
        found = {"numbers": numbers | measure(TrainedRun(folder, run, needed, numbers, job.task))}
    else:
        with _locked(folder):
            finished = any(row.get("step") == run.steps for row in read_metrics(folder))
            if make_start is not None and run.start is not None and not finished:
                with _locked(Path(run.start)):  # other runs begin with the same one
                    make_start(run)
            trained = _train(run, folder, job.task)
        if trained is None:
            return STOPPED
        numbers, seconds = trained
        measured = measure(TrainedRun(folder, run, needed, numbers, job.task)) if measure else {}
        numbers.pop("load")
        found = {
            "numbers": numbers | measured,
            "curves": thin_curves(read_metrics(folder), CURVES),
            "parameters": _parameters(run),
            "steps": run.steps,
            "seconds": round(seconds, 1),
        } | _code(folder, finished)
    write_atomic(record, json.dumps(_jsonable(found)).encode())
    return 0


def _code(folder: Path, finished: bool) -> dict:
    """Return commit and dirty flag of the code that trained the run.

    Args: finished: the run was finished before; then those of its first start, which trained it.
    """
    from dsv3_jax.runs.folder import read_made

    starts = read_made(folder) or [{}]
    start = starts[0 if finished else -1]
    return {"commit": (start.get("commit") or "unknown")[:7], "dirty": bool(start.get("dirty"))}


def _train(run: RunConfig, folder: Path, task: Task | None) -> tuple[dict, float] | None:
    """Return (the evaluation's numbers, seconds), or None if the run received a stop request.

    Both are kept in the run's folder, for other studies that need the same run.
    """
    if (kept := folder / EVALUATION).exists():
        numbers, seconds = json.loads(kept.read_text())
        return numbers, seconds

    from dsv3_jax.runs.loop import fit

    start = time.perf_counter()
    result = fit(run, folder, report=False, source=source_of(run, task))
    if not result.finished:
        return None
    assert result.evaluation is not None
    numbers, seconds = _jsonable(result.evaluation), time.perf_counter() - start
    write_atomic(kept, json.dumps([numbers, seconds]).encode())
    return numbers, seconds


def _parameters(run: RunConfig) -> dict:
    from dsv3_jax.model.cache import pick_dtype, pick_kind
    from dsv3_jax.model.counting import bytes_per_token, size

    counted, cfg = size(run.model), run.model
    cache = bytes_per_token(
        cfg, pick_kind(cfg, None), pick_dtype(run.execution.compute_dtype, None)
    )
    return {"total": counted.total, "active": counted.active, "cache_bytes": cache}


def _jsonable(value):
    """Convert keys to strings, and tuples and arrays to lists."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


@contextmanager
def _locked(folder: Path):
    """Hold a lock on a run: a second worker waits, and then finds the shared run finished."""
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def serve(pipe: Connection, folder: Path, cores: tuple[int, ...]) -> None:
    """Do the jobs that come through a pipe, for a folder's study, until the other end is closed.

    Jobs of one process share its imports and what it has compiled. A job prints to its log, and its
    exit code goes through the pipe.

    Args: cores: the CPU cores to use; () means all.
    """
    from dsv3_jax.kernels.cpu.memory import keep_memory
    from experiments.lab.study import load

    # The parent gets Ctrl-C, and asks this process to save by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before XLA sizes its thread pool by the number of cores
    keep_memory()
    os.chdir(folder.parent.parent)
    study = load(folder)
    with suppress(EOFError):
        while True:
            job = pipe.recv()
            Path(job.log).parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "w") as log:
                os.dup2(log.fileno(), sys.stdout.fileno())
                os.dup2(log.fileno(), sys.stderr.fileno())
            measure = study.measure_alone if job.alone else study.measure
            code = do(job, measure, study.make_start)
            sys.stdout.flush()
            gc.collect()  # a model's parts refer to one another
            pipe.send(code)


def do(
    job: Job, measure: Measure | None, make_start: Callable[[RunConfig], None] | None = None
) -> int:
    """Do one job. Returns its exit code. An error is one sentence, the last line of stderr."""
    try:
        return run_job(job, measure, make_start)
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
