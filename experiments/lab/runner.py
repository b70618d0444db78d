"""Many runs, a process each: so many at a time, each on cores of its own, and a live line for every one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from experiments.lab.work import STOPPED, Job

LOOK_EVERY = 0.5  # seconds between looks at the workers
PATIENCE = 60.0  # seconds that a worker has to save itself when it is asked to stop


@dataclass
class _Working:
    job: Job
    process: subprocess.Popen
    log: Path
    slot: int
    task: TaskID
    since: float = field(default_factory=time.monotonic)


def run_all(
    script: Path,
    jobs: Sequence[Job],
    workers: int,
    cores: Sequence[tuple[int, ...]],
    env: dict[str, str],
    root: Path,
    finished: Callable[[Job, dict], None],
) -> list[str]:
    """Run jobs, those first that come first, but none before the jobs whose folders it needs.

    Args:
        script: the study's, which does a job when it is called with `--work` and the job.
        workers: how many at a time; cores: what each of them stays on, () for all.
        env: added to this process's environment. root: the working directory of the workers.
        finished: is given each job and what its worker found.
    Returns: a sentence for each job that failed. Raises: KeyboardInterrupt, once the workers have saved and ended.
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
    waiting, working, failures = list(jobs), list[_Working](), list[str]()
    broken: set[str] = set()  # folders of runs that failed
    seconds: list[float] = []
    with _interruptible(), bar:
        whole = bar.add_task("runs", total=len(jobs), line="")
        try:
            while waiting or working:
                unfinished = {job.folder for job in (*waiting, *(w.job for w in working))}
                while len(working) < workers and (job := _next(waiting, unfinished, broken)):
                    waiting.remove(job)
                    if lost := [name for name, folder in job.others.items() if folder in broken]:
                        failures.append(f"{_name(job)} was not run, for it needs {', '.join(lost)}")
                        broken.add(job.folder)
                        continue
                    slot = min(set(range(workers)) - {w.slot for w in working})
                    working.append(_start(script, replace(job, cores=cores[slot]), slot, env, root, bar))
                time.sleep(LOOK_EVERY)
                for worker in list(working):
                    _show(worker, root, bar)
                    code = worker.process.poll()
                    if code is None:
                        continue
                    working.remove(worker)
                    bar.remove_task(worker.task)
                    bar.advance(whole)
                    if code == 0:
                        seconds.append(time.monotonic() - worker.since)
                        finished(worker.job, json.loads(Path(root / worker.job.record).read_text()))
                        console.print(f"{_name(worker.job)}: done in {seconds[-1]:.0f} s", markup=False)
                    else:
                        broken.add(worker.job.folder)
                        failures.append(_failure(worker, code))
                        console.print(failures[-1], markup=False)
                bar.update(whole, line=_time_left(seconds, len(waiting) + len(working), workers))
        finally:
            _end(working)
    return failures


def _next(waiting: list[Job], unfinished: set[str], broken: set[str]) -> Job | None:
    """The first job that nothing keeps waiting."""
    ready = (j for j in waiting if all(f in broken or f not in unfinished for f in j.others.values()))
    return next(ready, None)


def _name(job: Job) -> str:
    return f"{job.variant}, seed {job.seed}"


def _start(script: Path, job: Job, slot: int, env: dict[str, str], root: Path, bar: Progress) -> _Working:
    log = root / (job.folder + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(script), "--work", job.write()],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=os.environ | env,
            start_new_session=True,  # a Ctrl-C is for us alone, who then asks each worker to stop
        )
    task = bar.add_task(f"  {_name(job)}", total=job.run["steps"], line="starting")
    return _Working(job, process, log, slot, task)


def _show(worker: _Working, root: Path, bar: Progress) -> None:
    """Step and loss, from the end of the run's metrics."""
    path = root / worker.job.folder / "metrics.jsonl"
    if bar.disable or worker.job.alone or not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4096, 0))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    for line in reversed(lines):
        if line.startswith("{") and '"loss"' in line:
            row = json.loads(line)
            after = ", measuring" if row["step"] == worker.job.run["steps"] else ""
            bar.update(worker.task, completed=row["step"], line=f"loss {row['loss']:.3f}{after}")
            return


def _failure(worker: _Working, code: int) -> str:
    said = [line for line in worker.log.read_text(errors="replace").splitlines() if line.strip()]
    why = "it was stopped" if code == STOPPED else said[-1] if said else f"exit code {code}"
    return f"{_name(worker.job)} failed: {why} (all of it: {worker.log})"


def _time_left(seconds: list[float], jobs: int, workers: int) -> str:
    if not seconds or not jobs:
        return ""
    return f"about {-(-jobs // workers) * sum(seconds) / len(seconds) / 60:.0f} min left"


def _end(working: list[_Working]) -> None:
    """Ask all workers to save and stop, and wait for them; a second interrupt ends them at once."""
    for worker in working:
        worker.process.terminate()
    until = time.monotonic() + PATIENCE
    try:
        for worker in working:
            worker.process.wait(timeout=max(until - time.monotonic(), 0.1))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        for worker in working:
            worker.process.kill()
            worker.process.wait()


@contextmanager
def _interruptible():
    """SIGTERM ends us as Ctrl-C does: workers are asked to stop first."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
