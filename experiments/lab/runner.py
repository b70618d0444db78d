"""Run many jobs in worker processes, each on its own cores, and show a live progress line for each job."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dsv3_jax.signals import handled
from experiments.lab.work import STOPPED, Job

POLL_SECONDS = 0.1  # between two looks at the workers
STOP_TIMEOUT = 60.0  # seconds that a worker gets to save after a stop request, or to end when it is idle


class _Worker:
    """A process that does jobs on some cores, one after the other. Its first job starts it.

    A job after the first one imports nothing, and traces nothing if the process has done its variant.
    """

    def __init__(self, command: list[str], cores: tuple[int, ...], env: dict[str, str], root: Path):
        self.command, self.cores, self.env, self.root = command, cores, env, root
        self.process: subprocess.Popen | None = None
        self.job: Job | None = None
        self.start = 0.0  # of the job
        self.variants: set[str] = set()  # that the process has done

    def give(self, job: Job) -> None:
        """Start a job."""
        log = self.root / job.log
        log.parent.mkdir(parents=True, exist_ok=True)
        if self.process is not None and self.process.poll() is not None:  # killed while it was idle
            self.end()
        if self.process is None:
            with log.open("w") as file:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,  # of the imports; the process itself opens each job's log
                    bufsize=0,
                    cwd=self.root,
                    env=os.environ | self.env,
                    start_new_session=True,  # only this process receives Ctrl-C; it then asks each worker to stop
                )
        self.job, self.start = replace(job, cores=self.cores), time.monotonic()
        self.variants.add(job.variant)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # its end is the answer
            self.process.stdin.write(f"{self.job.to_json()}\n".encode())

    def answer(self) -> int | None:
        """Return the exit code of the job, or None while it runs."""
        assert self.process is not None and self.process.stdout is not None and self.job is not None
        if not select.select([self.process.stdout], [], [], 0)[0]:
            return None
        line = self.process.stdout.readline()
        if line and not self.job.alone:
            return int(line)
        process = self.process
        self.end()  # without an answer it ends now, and a job that is timed has a process of its own
        return int(line) if line else process.returncode or 1

    def end(self) -> None:
        """End the process, which is idle or ends now. One that hangs is killed."""
        if self.process is not None:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            try:
                self.process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()
        self.process, self.variants = None, set()


def run_all(
    script: Path,
    jobs: Sequence[Job],
    workers: int,
    cores: Sequence[tuple[int, ...]],
    env: dict[str, str],
    root: Path,
    on_finish: Callable[[Job, dict], None],
) -> list[str]:
    """Run jobs seed by seed; a job starts only after the jobs that it depends on.

    A worker begins with the variants that it has done, and with those that last took longest.

    Args:
        script: the study's run.py, which does jobs when called with `--work`.
        workers: the number of jobs at a time.
        cores: the CPU cores of each worker; () means all.
        env: added to this process's environment.
        root: the working directory of the workers.
        on_finish: called with each finished job and the record that its worker wrote.
    Returns: a sentence for each job that failed.
    Raises: KeyboardInterrupt, after the workers have saved and ended.
    """
    console = Console(highlight=False, soft_wrap=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[line]}"),
        console=console,
        disable=not console.is_terminal,
    )
    pool = [_Worker([sys.executable, str(script), "--work"], cores[i], env, root) for i in range(workers)]
    waiting, failures = list(jobs), list[str]()
    failed_folders: set[str] = set()
    seconds: list[float] = []
    latest: dict[str, float] = {}  # variant → seconds of its last run
    lines: dict[_Worker, TaskID] = {}
    with _sigterm_as_interrupt(), bar:
        total = bar.add_task("runs", total=len(jobs), line="")
        try:
            while waiting or any(worker.job for worker in pool):
                unfinished = {job.folder for job in (*waiting, *(worker.job for worker in pool if worker.job))}
                for worker in pool:
                    ready = partial(_next_ready, waiting, unfinished, failed_folders, latest, worker.variants)
                    while worker.job is None and (job := ready()):
                        waiting.remove(job)
                        if failed := [name for name, folder in job.needed_folders.items() if folder in failed_folders]:
                            failures.append(
                                f"{_name(job)} was not run: it depends on {', '.join(failed)}, which failed"
                            )
                            failed_folders.add(job.folder)
                            continue
                        worker.give(job)
                        lines[worker] = bar.add_task(f"  {_name(job)}", total=job.run["steps"], line="starting")
                time.sleep(POLL_SECONDS)
                for worker in pool:
                    if (job := worker.job) is None:
                        continue
                    _show_progress(job, lines[worker], root, bar)
                    code = worker.answer()
                    if code is None:
                        continue
                    worker.job = None
                    bar.remove_task(lines.pop(worker))
                    bar.advance(total)
                    if code == 0:
                        seconds.append(time.monotonic() - worker.start)
                        latest[job.variant] = seconds[-1]
                        on_finish(job, json.loads(Path(root / job.record).read_text()))
                        console.print(f"{_name(job)}: done in {seconds[-1]:.0f} s", markup=False)
                    else:
                        failed_folders.add(job.folder)
                        failures.append(_failure(job, root, code))
                        console.print(failures[-1], markup=False)
                left = len(waiting) + sum(worker.job is not None for worker in pool)
                bar.update(total, line=_time_left(seconds, left, workers))
        finally:
            _stop(pool)
    return failures


def _next_ready(
    waiting: list[Job], unfinished: set[str], failed: set[str], seconds: Mapping[str, float], done: Collection[str]
) -> Job | None:
    """Return a job whose dependencies have finished or failed, of the first such seed.

    Variants that the worker has done come first, and of these the one that took longest.
    """
    ready = [j for j in waiting if all(f in failed or f not in unfinished for f in j.needed_folders.values())]
    of_seed = (job for job in ready if job.seed == ready[0].seed)
    return max(of_seed, key=lambda job: (job.variant in done, seconds.get(job.variant, 0.0)), default=None)


def _name(job: Job) -> str:
    return f"{job.variant}, seed {job.seed}"


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
            phase = ", measuring" if row["step"] == job.run["steps"] else ""
            bar.update(task, completed=row["step"], line=f"loss {row['loss']:.3f}{phase}")
            return


def _failure(job: Job, root: Path, code: int) -> str:
    log = root / job.log
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = "it was stopped" if code == STOPPED else lines[-1] if lines else f"exit code {code}"
    return f"{_name(job)} failed: {reason} (full log: {log})"


def _time_left(seconds: list[float], jobs: int, workers: int) -> str:
    if not seconds or not jobs:
        return ""
    return f"about {-(-jobs // workers) * sum(seconds) / len(seconds) / 60:.0f} min left"


def _stop(pool: Sequence[_Worker]) -> None:
    """End idle workers, and ask the others to save and stop. A second interrupt kills them."""
    busy = [worker.process for worker in pool if worker.process is not None and worker.job is not None]
    for process in busy:
        process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT
    try:
        for process in busy:
            process.wait(timeout=max(deadline - time.monotonic(), 0.1))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for process in busy:
            process.kill()
    for worker in pool:
        worker.end()


@contextmanager
def _sigterm_as_interrupt():
    """Turn SIGTERM into KeyboardInterrupt, so that the workers are asked to stop first."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    with handled(interrupt, signal.SIGTERM):
        yield
