"""Run a study: train and measure the runs that results.json lacks, then write picture and table."""

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path

from dsv3_jax.config import RunConfig
from experiments import apart
from experiments.lab import overview
from experiments.lab.bases import RUNS_FOLDER, base_run, make_tokenizer, short_run
from experiments.lab.claims import as_json, verdict_table
from experiments.lab.results import MissingRuns, Results, lookup, replace_block, rounded
from experiments.lab.runner import run_all
from experiments.lab.study import Study, StudyRun
from experiments.lab.trained import EVALUATION
from experiments.lab.work import Job

Key = tuple[str, int]  # variant, seed


def run(study: Study, options: argparse.Namespace) -> int:
    """Run a study. Returns the exit code: 1 if a run failed. Raises: ValueError for bad options."""
    print(study.question)
    with _asked(study, options) as (results, runs, wanted):
        missing = {key for key in wanted if not results.has(*key, runs[key].identity)}
        if options.list:
            for (name, seed), one in runs.items():
                state = "missing" if (name, seed) in missing else "done"
                if state == "missing" or results.has(name, seed, one.identity):
                    print(f"{name}, seed {seed}: {state}, {one.folder}")
            return 0
        failures = []
        if missing and not options.redraw:
            failures = run_missing(study, runs, missing, results, options.workers)
            results.select({key: run.identity for key, run in runs.items()})
        if results.runs:
            _publish(study, results, kept=not options.short)
        else:
            print("no results yet")
        for failure in failures:
            print(failure, file=sys.stderr)
        return 1 if failures else 0


def check(study: Study, options: argparse.Namespace) -> None:
    """Raise ValueError for options that the study cannot have, or claims that name nothing."""
    names = list(study.variants(_base(study, options)))
    if unknown := set(options.only) - set(names):
        raise ValueError(f"--only={min(unknown)!r} is not one of {', '.join(names)}")
    study.check_claims(names)


def forget(study: Study, options: argparse.Namespace) -> None:
    """Delete named results; with --fresh their runs too, with --remeasure their evaluations."""
    with _asked(study, options) as (results, runs, wanted):
        results.forget({key for key in wanted if results.has(*key, runs[key].identity)})
        for key in wanted:
            folder = study.root / runs[key].folder
            if options.fresh:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                (folder / EVALUATION).unlink(missing_ok=True)


def _base(study: Study, options: argparse.Namespace) -> RunConfig:
    if options.short:
        if options.base or options.set:
            raise ValueError("--short has a base of its own; leave out --base and --set")
        return short_run(study.base)
    for change in options.set:
        if change.partition("=")[0] in ("seed", "data.seed"):
            raise ValueError(f"--set={change!r} would have no effect; use --seeds")
    return base_run(options.base or study.base, options.set)


@contextmanager
def _asked(study: Study, options: argparse.Namespace):
    """Yield (results, all runs by key, the asked keys); --short has a temporary folder for all."""
    with tempfile.TemporaryDirectory(prefix="lab-") as temporary:
        name, base = options.base or study.base, _base(study, options)
        runs_folder, out = temporary, Path(temporary)
        if not options.short:
            runs_folder, out = RUNS_FOLDER, study.folder
            # the study's folder has results of the study's base alone
            if name != study.base or options.set:
                changes = "".join(f"-{change.replace('/', '_')}" for change in options.set)
                out = study.root / RUNS_FOLDER / f"{study.folder.name}-{name}{changes}"
        about = {
            "question": study.question,
            "published": study.published,
            "base": " ".join([name, *options.set]),
        }
        results = Results(out / "results.json", about)
        if not (options.list or options.redraw):  # identities hash these files
            make_tokenizer(base, study.root)
            if study.prepare is not None:
                study.prepare(base, study.root)
        names = list(study.variants(base))
        seeds = options.seeds or ((0,) if options.short else None)  # None: the study's own
        wanted = {(n, s) for n in options.only or names for s in seeds or study.own_seeds(n)}
        runs = study.list_runs(
            base, sorted({*results.seeds()} | {seed for _, seed in wanted}), runs_folder
        )
        results.select({key: run.identity for key, run in runs.items()})
        yield results, runs, wanted


def run_missing(
    study: Study,
    runs: dict[Key, StudyRun],
    missing: set[Key],
    results: Results,
    workers: int | None,
) -> list[str]:
    """Train and measure the missing runs, and the unfinished runs that they depend on."""
    wanted = set(missing)
    for key in reversed(runs):  # dependencies come before the runs that need them
        if key in wanted:
            for name in runs[key].needed_folders:
                needed = runs[name, key[1]]
                checkpoints = study.root / needed.folder / "checkpoints"
                if not (checkpoints / str(needed.run.steps)).is_dir():
                    wanted.add((name, key[1]))
    on_cpu = _backend() == "cpu"
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    workers = workers or (len(cores) if on_cpu else 1)
    count = max(len(cores) // workers, 1)
    cores_by_worker = [
        tuple(cores[i * count : (i + 1) * count]) if on_cpu else () for i in range(workers)
    ]
    provenance = {"date": date.today().isoformat(), "machine": machine()}
    pending: dict[Key, dict] = {}

    def add_trained(job: Job, record: dict) -> None:
        key = job.variant, job.seed
        record = runs[key].identity.stored() | record | provenance
        results.remember(runs[key].identity)
        if study.measure_alone is None:
            results.add(*key, record)
        else:
            pending[key] = record

    def add_timed(job: Job, record: dict) -> None:
        results.add(job.variant, job.seed, pending[job.variant, job.seed] | record)

    jobs = [_job(key, runs[key]) for key in runs if key in wanted]
    failures = run_all(study.folder, jobs, cores_by_worker, add_trained)
    if pending:
        print("timing, one run at a time: leave the machine idle")
        alone = [_job(key, runs[key], alone=True) for key in pending]
        failures += run_all(study.folder, alone, [()], add_timed)
    return failures


def machine() -> str:
    """Return this machine in words, as results name it."""
    return (
        f"{os.cpu_count()} × {platform.machine()}, "
        f"Python {platform.python_version()}, JAX {version('jax')}"
    )


def _job(key: Key, run: StudyRun, *, alone: bool = False) -> Job:
    return Job(*key, run.run, run.folder, run.needed_folders, run.task, alone)


def _backend() -> str:
    """Return the workers' JAX backend. A subprocess looks: this one takes no accelerator memory."""
    look_up = "import jax, json; print(json.dumps(jax.default_backend()))"
    with suppress(apart.Failed):
        return apart.result([sys.executable, "-c", look_up])
    return "cpu"


def _publish(study: Study, results: Results, *, kept: bool) -> None:
    """Print the tables, draw the picture, and update the README.md files."""
    verdicts, checks = study.judge(results)
    results.about["verdicts"] = rounded([as_json(verdict) for verdict in verdicts])
    results.write()
    text = study.make_table(results)
    is_own = results.path.parent == study.folder
    if is_own:
        results.title = overview.headline(study.folder)
    if verdicts:
        text = f"{verdict_table(verdicts, checks, results.begun)}\n\n{text}"
    picture = results.path.with_name(f"{study.folder.name.partition('_')[2]}.png")
    try:
        study.draw(results, picture)
        drawn = str(picture) if kept else "The picture was drawn; --short does not keep it."
    except MissingRuns as missing:
        drawn = f"No picture: {missing}."
    caption = (
        f"Seeds {', '.join(map(str, results.seeds()))}: mean ± sample standard deviation."
        f" Run on {results.provenance('date')}, trained at commit {results.provenance('commit')}."
        f" Machine: {results.provenance('machine')}. Recipe {results.recipe}."
    )
    found = [verdict.claim for verdict in verdicts]
    if left := [f'"{claim.text}"' for claim in study.claims if claim not in found]:
        caption += f" Without runs, numbers or seeds for a verdict: {', '.join(left)}."
    if not results.is_current:
        caption += (
            " These are not of the present configuration, text and recipe; run the study again."
        )
    elif results.not_run:
        caption += " Not run yet: " + ", ".join(f'"{name}"' for name in results.not_run) + "."
    if is_own:
        replace_block(study.folder / "README.md", f"{text}\n\n{caption}")
    for key, there in _unknown_numbers(study, results):
        print(f"key={key!r} is no number of these runs; they have {', '.join(there)}")
    print(f"\n{text}\n\n{caption}\n{drawn}")  # last: a reader that closes the pipe stops nothing


def _unknown_numbers(study: Study, results: Results) -> Iterator[tuple[str, list[str]]]:
    """Yield keys of columns and claims that no run has, with the names that there are."""
    records = [record["numbers"] for name in results.runs for record in results.records(name)]
    asked = [column.key for column in study.columns] + [claim.key for claim in study.claims]
    for key in dict.fromkeys(key for key in asked if isinstance(key, str)):
        if not any(_has_number(numbers, key) for numbers in records):
            yield key, sorted({name for numbers in records for name in numbers})


def _has_number(numbers: dict, key: str) -> bool:
    try:
        lookup(numbers, key)
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    return True
