"""A study: its question, its variants as changes of a base recipe, and the results of their runs.

`python experiments/NN_name/run.py` trains and measures the runs that results.json lacks, one process per variant and
seed. Then it writes the picture and README.md's table. Run folders are runs/lab/MARK, where the mark is a hash of the
run's identity (see `fingerprints`). So studies that need the same run share it.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

from dsv3_jax.config import RunConfig, replace, to_dict
from experiments.lab import drawing, overview, work
from experiments.lab.bases import base_run, make_tokenizer, short_run
from experiments.lab.claims import Check, Claim, NoiseOf, Stake, Verdict, as_json, judge, verdict_table
from experiments.lab.fingerprints import RECIPE, Identity, changed, identify
from experiments.lab.options import make_parser
from experiments.lab.pooling import noise_for
from experiments.lab.results import MissingRuns, Results, replace_block
from experiments.lab.runner import run_all
from experiments.lab.tables import Column, moved, results_table
from experiments.lab.tasks import Task
from experiments.lab.work import EVALUATION, Job, TrainedRun

RUNS_FOLDER = "runs/lab"  # relative to the repository


@dataclass(frozen=True)
class FollowUp:
    """A variant that starts from other variants' runs of the same seed, which are trained first."""

    needs: tuple[str, ...]
    run: Callable[..., "RunConfig | OnTask"]  # called with the run folders of `needs`, as strings, in the same order


@dataclass(frozen=True)
class OnTask:
    """A variant that is trained and measured on a task in place of text."""

    task: Task
    run: RunConfig


Variants = Mapping[str, RunConfig | FollowUp | OnTask]


@dataclass(frozen=True)
class StudyRun:
    """One run that a study asks for: a variant with a seed."""

    run: RunConfig
    folder: str
    needed_folders: dict[str, str]  # run folders of the variants that it depends on
    identity: Identity
    task: Task | None = None


@dataclass(frozen=True)
class Study:
    """A study of `experiments/`; `main` is its command line."""

    script: str  # the study's run.py, `__file__`
    question: str
    published: str  # the papers' figure or direction, in one line
    variants: Callable[[RunConfig], Variants]  # changes of a base recipe; differences refer to the first variant
    base: str = "lab"  # name of the base recipe
    seeds: int = 3  # each variant is trained from the seeds 0 … seeds − 1
    seeds_of: Mapping[str, int] = field(default_factory=dict)  # the same for variants that need other numbers
    columns: Sequence[Column] = (Column("validation loss", "val_loss", 4, paired=True),)
    prepare: Callable[[RunConfig, Path], None] | None = None  # (base, repository) → None: writes files that runs read
    measure: Callable[[TrainedRun], dict] | None = None  # more numbers of a run: name → number, list or dict
    measure_alone: Callable[[TrainedRun], dict] | None = None  # the same for timings: one run at a time, on all cores
    table: Callable[[Results], str] | None = None  # Markdown that replaces the table of `columns`
    draw: Callable[[Results, Path], None] = drawing.draw_differences
    claims: tuple[Claim, ...] = ()  # what the papers claim, judged by `claims.judge`
    noise: Callable[[Results], NoiseOf] | None = None  # pools noise otherwise than over variants, see `claims.judge`
    stakes: Mapping[str, Stake] = field(default_factory=dict)  # manipulation checks that claims refer to by name

    @property
    def folder(self) -> Path:
        """The folder experiments/NN_name."""
        return Path(self.script).resolve().parent

    @property
    def root(self) -> Path:
        """The repository, which contains runs/."""
        return self.folder.parent.parent

    def list_runs(
        self, base: RunConfig, seeds: Sequence[int], runs_folder: str = RUNS_FOLDER
    ) -> dict[tuple[str, int], StudyRun]:
        """Return all runs by (variant, seed), one seed after the other, so that early results cover all variants.

        The seed sets the initial parameters and the order of the data. All variants see the same data.

        Raises: ConfigError for a variant with an invalid configuration.
        """
        variants = self.variants(base)
        runs: dict[tuple[str, int], StudyRun] = {}
        for seed in seeds:
            for name, variant in variants.items():
                needed: dict[str, str] = {}
                if isinstance(variant, FollowUp):
                    for other in variant.needs:
                        if (other, seed) not in runs:
                            raise ValueError(f"variant {name!r} needs={other!r}, which is not an earlier variant")
                    needed = {other: runs[other, seed].folder for other in variant.needs}
                    variant = variant.run(*needed.values())
                task, run = (variant.task, variant.run) if isinstance(variant, OnTask) else (None, variant)
                run = replace(run, seed=seed, data=replace(run.data, seed=seed))
                names = {folder: changed(runs[other, seed].run) for other, folder in needed.items()}
                identity = identify(run, self.root, task, names)
                runs[name, seed] = StudyRun(run, f"{runs_folder}/{identity.mark}", needed, identity, task)
        return runs

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the study's command line. Returns the exit code."""
        argv = list(sys.argv[1:] if argv is None else argv)
        if argv[:1] == ["--work"]:
            return work.main(self.measure, self.measure_alone)
        try:
            return self._main(make_parser(None, self.question).parse_args(argv))
        except (ValueError, OSError) as error:
            print(f"{self.folder.name}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped; run the same command again to resume", file=sys.stderr)
            return 130

    def _main(self, options: argparse.Namespace) -> int:
        print(self.question)
        with tempfile.TemporaryDirectory(prefix="lab-") as temporary:
            runs_folder = temporary if options.short else RUNS_FOLDER
            name = options.base or self.base
            base = short_run(self.base) if options.short else base_run(name, options.set, runs_folder)
            out = self._output_folder(options, Path(temporary))
            results = Results(out / "results.json", self._about(options))
            if not (options.list or options.redraw):
                self._make_files(base)  # also to forget: identities hash them
            names = list(self.variants(base))
            if unknown := set(options.only) - set(names):
                raise ValueError(f"--only={min(unknown)!r} is not one of {', '.join(names)}")
            seeds = options.seeds or ((0,) if options.short else None)  # None: the study's own
            wanted = {(n, s) for n in options.only or names for s in seeds or range(self.seeds_of.get(n, self.seeds))}
            runs = self.list_runs(base, sorted({*results.seeds()} | {seed for _, seed in wanted}), runs_folder)
            results.select({key: run.identity for key, run in runs.items()})
            if options.check:
                return self._check(runs, sorted(wanted, key=list(runs).index), results, options.workers)
            delete = options.fresh or options.forget
            if delete or options.remeasure:
                results.forget({key for key in wanted if results.has(*key, runs[key].identity)})
            missing = {key for key in wanted if not results.has(*key, runs[key].identity)}
            if options.list:
                for (name, seed), run in runs.items():
                    if results.has(name, seed, run.identity):
                        print(f"{name}, seed {seed}: done, {run.folder}")
                    elif (name, seed) in wanted:
                        print(f"{name}, seed {seed}: missing, {run.folder}")
                print(results.describe_others())
                return 0
            if delete:
                for key in sorted(missing):
                    shutil.rmtree(self.root / runs[key].folder, ignore_errors=True)
            if options.remeasure:
                for key in missing:
                    (self.root / runs[key].folder / EVALUATION).unlink(missing_ok=True)
            if options.forget:
                results.write()
                return 0
            failures = []
            if missing and not options.redraw:
                failures = self._run_missing(runs, missing, results, options.workers)
                results.select({key: run.identity for key, run in runs.items()})
            if results.runs:
                self._publish(results, out)
            else:
                print("no results yet")
            for failure in failures:
                print(failure, file=sys.stderr)
            return 1 if failures else 0

    def _make_files(self, base: RunConfig) -> None:
        """Make the tokenizer and the study's own files, if they are missing. Identities hash them."""
        make_tokenizer(base, self.root)
        if self.prepare is not None:
            self.prepare(base, self.root)

    def _check(self, runs: dict[tuple[str, int], StudyRun], wanted: list, results: Results, workers: int | None) -> int:
        """Train and measure one finished run again, in a folder of its own, and print by how much its numbers moved."""
        key = next(
            (k for k in wanted if results.has(k[0], k[1], runs[k].identity) and not runs[k].needed_folders), None
        )
        if key is None:
            raise ValueError(
                "--check has no finished run of this recipe to repeat; run the study first, or choose --only"
            )
        again = replace(runs[key], folder=f"{runs[key].folder}-check")
        shutil.rmtree(self.root / again.folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="lab-") as temporary:
            second = Results(Path(temporary) / "results.json")
            failures = self._run_missing({key: again}, {key}, second, workers)
            for failure in failures:
                print(failure, file=sys.stderr)
            if failures:
                return 1
            print("\n".join(moved(results.runs[key[0]][str(key[1])], second.runs[key[0]][str(key[1])], key)))
        shutil.rmtree(self.root / again.folder, ignore_errors=True)
        return 0

    def _run_missing(
        self, runs: dict[tuple[str, int], StudyRun], missing: set, results: Results, workers: int | None
    ) -> list[str]:
        """Train and measure the missing runs, and the runs that they depend on if those are not finished."""
        wanted = set(missing)
        for key in reversed(runs):  # dependencies come before the runs that need them
            if key in wanted:
                needed = ((name, key[1]) for name in runs[key].needed_folders)
                wanted |= {need for need in needed if not _is_finished(self.root / runs[need].folder, runs[need].run)}
        on_cpu = _backend() == "cpu"
        cores = _available_cores()
        workers = workers or (len(cores) if on_cpu else 1)
        count = max(len(cores) // workers, 1)
        cores_by_worker = [tuple(cores[i * count : (i + 1) * count]) if on_cpu else () for i in range(workers)]
        jobs = [_job(key, runs[key]) for key in runs if key in wanted]
        provenance = _provenance()
        pending: dict[tuple[str, int], dict] = {}

        def add_trained(job: Job, record: dict) -> None:
            key = job.variant, job.seed
            record = runs[key].identity.stored() | record | provenance
            results.remember(runs[key].identity)
            if self.measure_alone is None:
                results.add(*key, record)
            else:
                pending[key] = record

        def add_timed(job: Job, record: dict) -> None:
            results.add(job.variant, job.seed, pending[job.variant, job.seed] | record)

        env = {
            "JAX_COMPILATION_CACHE_DIR": str(self.root / RUNS_FOLDER / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        script = Path(self.script).resolve()
        failures = run_all(script, jobs, workers, cores_by_worker, env, self.root, add_trained)
        if pending:
            print("timing, one run at a time: leave the machine idle")
            jobs = [_job(key, runs[key], alone=True) for key in pending]
            failures += run_all(script, jobs, 1, [()], env, self.root, add_timed)
        return failures

    def _output_folder(self, options: argparse.Namespace, temporary: Path) -> Path:
        """Return the folder for results; only the study's unchanged base recipe writes to its own folder."""
        if options.short:
            return temporary
        changes = "".join(f"-{change.replace('/', '_')}" for change in options.set)
        name = options.base or self.base
        if name == self.base and not changes:
            return self.folder
        return self.root / RUNS_FOLDER / f"{self.folder.name}-{name}{changes}"

    def _about(self, options: argparse.Namespace) -> dict:
        return {
            "question": self.question,
            "published": self.published,
            "base": " ".join([options.base or self.base, *options.set]),
        }

    def judge(self, results: Results) -> tuple[list[Verdict], list[Check]]:
        """Judge the study's claims on its results."""
        noise = self.noise(results) if self.noise else noise_for(results, self.folder.parent)
        return judge(results, self.claims, self.stakes, noise)

    def make_table(self, results: Results) -> str:
        """Return the study's table, or that of its columns if runs that its own table needs are missing."""
        if self.table is not None:
            with suppress(MissingRuns):
                return self.table(results)
        return results_table(results, self.columns)

    def _publish(self, results: Results, out: Path) -> None:
        """Print the tables, draw the picture, and update the README.md files."""
        verdicts, checks = self.judge(results)
        results.about["verdicts"] = [as_json(verdict) for verdict in verdicts]
        results.write()
        text = self.make_table(results)
        if verdicts:
            text = f"{verdict_table(verdicts, checks)}\n\n{text}"
        picture = out / f"{self.folder.name.partition('_')[2]}.png"
        try:
            self.draw(results, picture)
            drawn = str(picture)
        except MissingRuns as missing:
            drawn = f"No picture: {missing}."
        caption = f"Seeds {', '.join(map(str, results.seeds()))}: mean ± sample standard deviation."
        what = "trained" if results.recipe and results.recipe > 1 else "measured"
        caption += f" Run on {results.provenance('date')}, {what} at commit {results.provenance('commit')}."
        caption += f" Machine: {results.provenance('machine')}. Recipe {results.recipe}."
        if not results.is_current:
            caption += (
                f" These are not of the present configuration and text (recipe {RECIPE}), and are shown until the"
            )
            caption += " study runs again."
        caption += f" {results.describe_others()}".rstrip()
        if out == self.folder:
            replace_block(self.folder / "README.md", f"{text}\n\n{caption}")
            overview.write(self.folder.parent)
        print(f"\n{text}\n\n{caption}\n{drawn}")  # last: a reader that closes the pipe stops nothing


def _job(key: tuple[str, int], run: StudyRun, *, alone: bool = False) -> Job:
    record = f"{run.folder}.json"
    task = None if run.task is None else run.task.to_dict()
    return Job(*key, to_dict(run.run), run.folder, run.needed_folders, record, (), task, alone)


def _is_finished(folder: Path, run: RunConfig) -> bool:
    return (folder / "checkpoints" / str(run.steps)).is_dir()


def _available_cores() -> list[int]:
    """Return the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _backend() -> str:
    """Return the workers' JAX backend. A subprocess looks it up, so that this process takes no accelerator memory."""
    look_up = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", look_up], capture_output=True, text=True)
    return done.stdout.strip() or "cpu"


def _provenance() -> dict:
    """Return date and machine of the runs that are measured now. Their commit is that of their training."""
    machine = f"{os.cpu_count()} × {platform.machine()}, Python {platform.python_version()}, JAX {version('jax')}"
    return {"date": date.today().isoformat(), "machine": machine}
