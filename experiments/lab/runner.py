"""Run many jobs, each in its own process on its own cores, and show a live progress line for each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dsv3_jax.signals import handled
from experiments.lab.work import STOPPED, Job

POLL_SECONDS = 0.1  # between two looks at the workers
STOP_TIMEOUT = 60.0  # seconds that a worker gets to save after a stop request


@dataclass
class _RunningJob:
    job: Job
    process: subprocess.Popen
    log: Path
    slot: int
    task: TaskID
    start: float = field(default_factory=time.monotonic)


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

    The variants of a seed that last took longest start first, so that the workers end at nearly the same time.

    Args:
        script: the study's run.py, which does a job when called with `--work JOB`.
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
    waiting, running, failures = list(jobs), list[_RunningJob](), list[str]()
    failed_folders: set[str] = set()
    seconds: list[float] = []
    latest: dict[str, float] = {}  # variant → seconds of its last run
    with _sigterm_as_interrupt(), bar:
        total = bar.add_task("runs", total=len(jobs), line="")
        try:
            while waiting or running:
                unfinished = {job.folder for job in (*waiting, *(r.job for r in running))}
                while len(running) < workers and (job := _next_ready(waiting, unfinished, failed_folders, latest)):
                    waiting.remove(job)
                    if missing := [name for name, folder in job.needed_folders.items() if folder in failed_folders]:
                        failures.append(f"{_name(job)} was not run: it depends on {', '.join(missing)}, which failed")
                        failed_folders.add(job.folder)
                        continue
                    slot = min(set(range(workers)) - {r.slot for r in running})
                    running.append(_start(script, replace(job, cores=cores[slot]), slot, env, root, bar))
                time.sleep(POLL_SECONDS)
                for worker in list(running):
                    _show_progress(worker, root, bar)
                    code = worker.process.poll()
                    if code is None:
                        continue
                    running.remove(worker)
                    bar.remove_task(worker.task)
                    bar.advance(total)
                    if code == 0:
                        seconds.append(time.monotonic() - worker.start)
                        latest[worker.job.variant] = seconds[-1]
                        on_finish(worker.job, json.loads(Path(root / worker.job.record).read_text()))
                        console.print(f"{_name(worker.job)}: done in {seconds[-1]:.0f} s", markup=False)
                    else:
                        failed_folders.add(worker.job.folder)
                        failures.append(_failure(worker, code))
                        console.print(failures[-1], markup=False)
                bar.update(total, line=_time_left(seconds, len(waiting) + len(running), workers))
        finally:
            _stop(running)
    return failures


def _next_ready(waiting: list[Job], unfinished: set[str], failed: set[str], seconds: Mapping[str, float]) -> Job | None:
    """Return a job whose dependencies have finished or failed: of the first such seed, the one that took longest."""
    ready = [j for j in waiting if all(f in failed or f not in unfinished for f in j.needed_folders.values())]
    of_seed = (job for job in ready if job.seed == ready[0].seed)
    return max(of_seed, key=lambda job: seconds.get(job.variant, 0.0), default=None)


def _name(job: Job) -> str:
    return f"{job.variant}, seed {job.seed}"


def _start(script: Path, job: Job, slot: int, env: dict[str, str], root: Path, bar: Progress) -> _RunningJob:
    log = root / (job.folder + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(script), "--work", job.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=os.environ | env,
            start_new_session=True,  # only this process receives Ctrl-C; it then asks each worker to stop
        )
    task = bar.add_task(f"  {_name(job)}", total=job.run["steps"], line="starting")
    return _RunningJob(job, process, log, slot, task)


def _show_progress(worker: _RunningJob, root: Path, bar: Progress) -> None:
    """Show step and loss from the end of the run's metrics.jsonl."""
    path = root / worker.job.folder / "metrics.jsonl"
    if bar.disable or worker.job.alone or not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    for line in reversed(lines):
        if line.startswith("{") and '"loss"' in line:
            row = json.loads(line)
            phase = ", measuring" if row["step"] == worker.job.run["steps"] else ""
            bar.update(worker.task, completed=row["step"], line=f"loss {row['loss']:.3f}{phase}")
            return


def _failure(worker: _RunningJob, code: int) -> str:
    lines = [line for line in worker.log.read_text(errors="replace").splitlines() if line.strip()]
    reason = "it was stopped" if code == STOPPED else lines[-1] if lines else f"exit code {code}"
    return f"{_name(worker.job)} failed: {reason} (full log: {worker.log})"


def _time_left(seconds: list[float], jobs: int, workers: int) -> str:
    if not seconds or not jobs:
        return ""
    return f"about {-(-jobs // workers) * sum(seconds) / len(seconds) / 60:.0f} min left"


def _stop(running: list[_RunningJob]) -> None:
    """Ask all workers to save and stop, and wait for them. A second interrupt kills them."""
    for worker in running:
        worker.process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT
    try:
        for worker in running:
            worker.process.wait(timeout=max(deadline - time.monotonic(), 0.1))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for worker in running:
            worker.process.kill()
            worker.process.wait()


@contextmanager
def _sigterm_as_interrupt():
    """Turn SIGTERM into KeyboardInterrupt, so that the workers are asked to stop first."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    with handled(interrupt, signal.SIGTERM):
        yield
