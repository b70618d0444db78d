"""Run jobs in worker processes, each on its own cores, with a live line of progress each."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from dsv3_jax.host.signals import handled
from experiments.lab import work
from experiments.lab.work import STOPPED, Job

POLL_SECONDS = 0.5  # between two looks at the workers' progress
# seconds that a worker gets to save after a stop request, or to end when it is idle
STOP_TIMEOUT = 60.0
ENVIRONMENT = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2", "TF_CPP_MIN_LOG_LEVEL": "2"}


class _Worker:
    """A process that does jobs on some cores, one after the other.

    Later jobs import nothing, and trace nothing if the process has done their variant.
    """

    def __init__(self, folder: Path, cores: tuple[int, ...]):
        self.folder, self.cores = folder, cores
        self.process: BaseProcess | None = None
        self.pipe: Connection
        self.job: Job | None = None
        self.task: TaskID
        self.start = 0.0  # of the job
        self.variants: set[str] = set()  # that the process has done

    def give(self, job: Job) -> None:
        """Start a job, and the process if there is none."""
        if self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(
                target=work.serve, args=(other, self.folder, self.cores), daemon=True
            )
            self.process.start()
            other.close()
            self.variants = set()
        self.job, self.start = job, time.monotonic()
        self.variants.add(job.variant)
        self.pipe.send(job)

    def answer(self) -> int:
        """Return the job's exit code. A process that ended, or timed a job, is left behind."""
        assert self.job is not None and self.process is not None
        try:
            code = self.pipe.recv()
        except (EOFError, ConnectionResetError):  # reset: it was killed before it read the job
            self.process.join()
            code = self.process.exitcode or 1
        if self.job.alone or code == STOPPED:
            self.end()
        self.job = None
        return code

    def end(self) -> None:
        """End the process, which is idle or ends now. One that hangs is killed."""
        if self.process is not None:
            self.pipe.close()
            self.process.join(STOP_TIMEOUT)
            self.process.kill()
            self.process.join()
        self.process = None


def run_all(
    folder: Path,
    jobs: Sequence[Job],
    cores: Sequence[tuple[int, ...]],
    on_finish: Callable[[Job, dict], None],
) -> list[str]:
    """Run jobs seed by seed; a job starts only after the jobs that it depends on.

    Args:
        folder: the study's. Workers run in the repository.
        cores: the CPU cores of each worker; () means all.
        on_finish: called with each finished job and the record that its worker wrote.
    Returns: a sentence for each job that failed.
    Raises: KeyboardInterrupt, after the workers have saved and ended.
    """
    root, console = folder.parent.parent, Console(highlight=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(
        *columns,
        TextColumn("{task.fields[line]}"),
        console=console,
        disable=not console.is_terminal,
    )
    # The workers inherit these.
    os.environ |= ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(root / "runs/lab/cache")}
    pool = [_Worker(folder, mine) for mine in cores]
    waiting, failed, failures, seconds = list(jobs), set[str](), list[str](), list[float]()
    with _sigterm_as_interrupt(), bar:
        total = bar.add_task("runs", total=len(jobs), line="")
        try:
            while waiting or any(worker.job for worker in pool):
                for worker in pool:
                    while worker.job is None and (job := _next_ready(waiting, pool, worker)):
                        waiting.remove(job)
                        needed = [name for name, f in job.needed_folders.items() if f in failed]
                        if needed:
                            failures.append(
                                f"{job.name} was not run: it depends on {', '.join(needed)}, "
                                "which failed"
                            )
                            failed.add(job.folder)
                            continue
                        worker.give(job)
                        worker.task = bar.add_task(
                            f"  {job.name}", total=job.run.steps, line="starting"
                        )
                busy = [worker for worker in pool if worker.job]
                ready = wait([worker.pipe for worker in busy], POLL_SECONDS)
                for worker in busy:
                    job = worker.job
                    assert job is not None
                    _show_progress(job, worker.task, root, bar)
                    if worker.pipe not in ready:
                        continue
                    code = worker.answer()
                    bar.remove_task(worker.task)
                    bar.advance(total)
                    if code == 0:
                        seconds.append(time.monotonic() - worker.start)
                        on_finish(job, json.loads((root / job.record).read_text()))
                        console.print(f"{job.name}: done in {seconds[-1]:.0f} s", markup=False)
                    else:
                        failed.add(job.folder)
                        failures.append(_failure(job, root, code))
                        console.print(failures[-1], markup=False)
                left = len(waiting) + sum(worker.job is not None for worker in pool)
                if seconds and left:
                    minutes = -(-left // len(pool)) * sum(seconds) / len(seconds) / 60
                    bar.update(total, line=f"about {minutes:.0f} min left")
        finally:
            _stop(pool)
    return failures


def _next_ready(waiting: Sequence[Job], pool: Sequence[_Worker], worker: _Worker) -> Job | None:
    """Return a job of the first seed whose dependencies have ended; variants done here first."""
    unfinished = {job.folder for job in (*waiting, *(other.job for other in pool if other.job))}
    ready = [job for job in waiting if not unfinished & set(job.needed_folders.values())]
    of_seed = (job for job in ready if job.seed == ready[0].seed)
    return max(of_seed, key=lambda job: job.variant in worker.variants, default=None)


def _show_progress(job: Job, task: TaskID, root: Path, bar: Progress) -> None:
    """Show step and loss from the end of the run's metrics.jsonl."""
    path = root / job.folder / "metrics.jsonl"
    if bar.disable or job.alone or not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    for line in reversed(lines):
        if line.startswith("{") and '"loss"' in line:
            row = json.loads(line)
            phase = ", measuring" if row["step"] == job.run.steps else ""
            bar.update(task, completed=row["step"], line=f"loss {row['loss']:.3f}{phase}")
            return


def _failure(job: Job, root: Path, code: int) -> str:
    log = root / job.log
    if code < 0:
        return f"{job.name} failed: signal {-code} killed it (full log: {log})"
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    reason = "it was stopped" if code == STOPPED else lines[-1] if lines else f"exit code {code}"
    return f"{job.name} failed: {reason} (full log: {log})"


def _stop(pool: Sequence[_Worker]) -> None:
    """End idle workers, and ask the others to save and stop. A second interrupt kills them."""
    try:
        for worker in pool:
            if worker.job is not None and worker.process is not None:
                worker.process.terminate()
        for worker in pool:
            worker.end()
    except KeyboardInterrupt:
        for worker in pool:
            if worker.process is not None:
                worker.process.kill()
        raise


@contextmanager
def _sigterm_as_interrupt():
    """Turn SIGTERM into KeyboardInterrupt, so that the workers are asked to stop first."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    with handled(interrupt, signal.SIGTERM):
        yield
