"""A study: its question, its variants as diffs of a base recipe, and what is made of their runs.

`python experiments/NN_name/run.py` trains and measures what results.json does not have yet, a process for each variant
and seed, and writes the picture and README.md's table. Runs lie in runs/lab/, named by the fingerprint of their
configuration: studies that ask for the same run share it.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from dsv3_jax.config import RunConfig, from_dict, replace, to_dict
from dsv3_jax.presets import recipe
from experiments.lab import drawing, overview, work
from experiments.lab.results import Column, Results, fingerprint, put_between, table
from experiments.lab.runner import run_all
from experiments.lab.work import Job, Trained

RUNS = "runs/lab"  # below the repository


@dataclass(frozen=True)
class After:
    """A variant that is made of other variants' runs of the same seed, which are trained before it."""

    needs: tuple[str, ...]
    run: Callable[..., RunConfig]  # is given the run folders of `needs`, as strings, in their order


Variants = Mapping[str, RunConfig | After]


@dataclass(frozen=True)
class Asked:
    """One run that a study asks for."""

    run: RunConfig
    folder: str
    others: dict[str, str]
    mark: str


@dataclass(frozen=True)
class Study:
    """A study of `experiments/`; `main` is its command line."""

    script: str  # the run.py, `__file__`
    question: str
    published: str  # the papers' figure or direction, in a line
    variants: Callable[[RunConfig], Variants]  # diffs of a base; the first is what others are held against
    columns: Sequence[Column] = (Column("validation loss", "val_loss", 4, paired=True),)
    prepare: Callable[[RunConfig, Path], None] | None = None  # makes files that runs read: (base, the repository)
    measure: Callable[[Trained], dict] | None = None  # more numbers of a run, in its process: name → number, list, dict
    measure_alone: Callable[[Trained], dict] | None = None  # the same where time counts: one run at a time, all cores
    table: Callable[[Results], str] | None = None  # Markdown in the place of the table of `columns`
    draw: Callable[[Results, Path], None] = drawing.differences
    ours: Callable[[Results], str] | None = None  # our finding in a line, for experiments/README.md

    @property
    def folder(self) -> Path:
        """experiments/NN_name."""
        return Path(self.script).resolve().parent

    @property
    def root(self) -> Path:
        """The repository, where runs/ lies."""
        return self.folder.parent.parent

    def asked(self, base: RunConfig, seeds: Sequence[int], runs: str = RUNS) -> dict[tuple[str, int], Asked]:
        """All runs by (variant, seed), seed by seed, so that a variant compiles once and early results are whole.

        A seed stands for parameters and for the order of the data; it gives all variants the same data.

        Raises: ConfigError for a variant that cannot be.
        """
        variants = self.variants(base)
        found: dict[tuple[str, int], Asked] = {}
        for seed in seeds:
            for name, variant in variants.items():
                others: dict[str, str] = {}
                if isinstance(variant, After):
                    for other in variant.needs:
                        if (other, seed) not in found:
                            raise ValueError(f"{name} needs {other!r}, which is not a variant before it")
                    others = {other: found[other, seed].folder for other in variant.needs}
                    variant = variant.run(*others.values())
                run = replace(variant, seed=seed, data=replace(variant.data, seed=seed))
                mark = fingerprint(run)
                found[name, seed] = Asked(run, f"{runs}/{mark}", others, mark)
        return found

    def main(self, words: Sequence[str] | None = None) -> int:
        """The command line of a study. Returns the exit code."""
        words = list(sys.argv[1:] if words is None else words)
        if words[:1] == ["--work"]:
            return work.main(words[1], self.measure, self.measure_alone)
        try:
            return self._main(_options().parse_args(words))
        except (ValueError, OSError) as error:
            print(f"{self.folder.name}: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            return 130

    def _main(self, options: argparse.Namespace) -> int:
        print(self.question)
        with tempfile.TemporaryDirectory(prefix="lab-") as temporary:
            runs = temporary if options.short else RUNS
            base = short_run() if options.short else base_run(options.base, options.set, runs)
            seeds = options.seeds or ((0,) if options.short else (0, 1, 2))
            out = self._out(options, Path(temporary))
            results = Results(out / "results.json", self._about(options))
            asked = self.asked(base, sorted({*seeds, *results.seeds()}), runs)
            marks = {key: a.mark for key, a in asked.items()}
            results.keep(marks)
            names = list(dict.fromkeys(name for name, _ in asked))
            if unknown := set(options.only) - set(names):
                raise ValueError(f"--only {min(unknown)!r} is not one of {', '.join(names)}")
            wanted = {(name, seed) for name in options.only or names for seed in seeds}
            if options.fresh or options.remeasure:
                results.forget(wanted)
            missing = {key for key in wanted if not results.has(*key, marks[key])}
            if options.list:
                for key, a in asked.items():
                    print(f"{key[0]}, seed {key[1]}: {'to run' if key in missing else 'there'}, {a.folder}")
                return 0
            if options.fresh:
                for key in sorted(missing):
                    shutil.rmtree(self.root / asked[key].folder, ignore_errors=True)
            failures = []
            if missing and not options.redraw:
                _make_tokenizer(base, self.root)
                if self.prepare is not None:
                    self.prepare(base, self.root)
                failures = self._run(asked, missing, results, options.workers)
                results.keep(marks)
            if results.runs:
                self._show(results, out)
            else:
                print("there is no result yet")
            for sentence in failures:
                print(sentence, file=sys.stderr)
            return 1 if failures else 0

    def _run(self, asked, missing: set, results: Results, workers: int | None) -> list[str]:
        """Train and measure what is missing, and what that needs and is not there any more."""
        wanted = set(missing)
        for key in reversed(asked):  # what is needed comes before what needs it
            if key in wanted:
                needs = ((name, key[1]) for name in asked[key].others)
                wanted |= {need for need in needs if not _is_finished(self.root / asked[need].folder, asked[need].run)}
        on_cpu = _backend() == "cpu"
        cores = _cores()
        workers = workers or (len(cores) if on_cpu else 1)
        each = max(len(cores) // workers, 1)
        places = [tuple(cores[i * each : (i + 1) * each]) if on_cpu else () for i in range(workers)]
        jobs = [_job(key, asked[key]) for key in asked if key in wanted]
        made = _made(self.root)
        pending: dict[tuple[str, int], dict] = {}

        def finished(job: Job, found: dict) -> None:
            key = job.variant, job.seed
            found = {"fingerprint": asked[key].mark} | found | made
            if self.measure_alone is None:
                results.add(*key, found)
            else:
                pending[key] = found

        def measured(job: Job, found: dict) -> None:
            results.add(job.variant, job.seed, pending[job.variant, job.seed] | found)

        env = {
            "JAX_COMPILATION_CACHE_DIR": str(self.root / RUNS / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        script = Path(self.script).resolve()
        failures = run_all(script, jobs, workers, places, env, self.root, finished)
        if pending:
            print("now what must have the machine to itself, one run at a time")
            jobs = [_job(key, asked[key], alone=True) for key in pending]
            failures += run_all(script, jobs, 1, [()], env, self.root, measured)
        return failures

    def _out(self, options: argparse.Namespace, temporary: Path) -> Path:
        """Where results go: the study's own folder is for the base recipe alone."""
        if options.short:
            return temporary
        changed = "".join(f"-{word.replace('/', '_')}" for word in options.set)
        if options.base == "lab" and not changed:
            return self.folder
        return self.root / RUNS / f"{self.folder.name}-{options.base}{changed}"

    def _about(self, options: argparse.Namespace) -> dict:
        return {"question": self.question, "published": self.published, "base": " ".join([options.base, *options.set])}

    def _show(self, results: Results, out: Path) -> None:
        """Print the table, draw the picture, and put both where they are read."""
        if self.ours is not None:
            results.about["ours"] = self.ours(results)
        results.write()
        text = self.table(results) if self.table else table(results, self.columns)
        picture = out / f"{self.folder.name.partition('_')[2]}.png"
        self.draw(results, picture)
        how = f"Seeds {', '.join(map(str, results.seeds()))}; mean ± sample standard deviation over them"
        how += "; differences in bold are told apart from 0 at 95 % (Student's t). " if "**" in text else ". "
        how += f"{results.told('date')}, commit {results.told('commit')}, {results.told('machine')}."
        print(f"\n{text}\n\n{how}\n{picture}")
        if out == self.folder:
            put_between(self.folder / "README.md", f"{text}\n\n{how}")
            overview.write(self.folder.parent)


def base_run(name: str, changes: Sequence[str], runs: str = RUNS) -> RunConfig:
    """The base recipe, with changes as `model.dim=128`; a vocabulary larger than bytes' has a tokenizer in `runs`.

    Raises: ConfigError for a recipe, a key or a value that there is not.
    """
    values = to_dict(recipe(name))
    for change in changes:
        key, _, value = change.partition("=")
        *path, last = key.split(".")
        inner = values
        for part in path:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last not in inner:
            raise ValueError(f"--set {change!r}: {key!r} is not a key of a run, as model.dim is")
        try:
            inner[last] = json.loads(value)
        except json.JSONDecodeError:
            inner[last] = value
    run = from_dict(RunConfig, values)
    if run.data.tokenizer == "bytes" and run.model.vocab_size > 512:
        run = replace(run, data=replace(run.data, tokenizer=f"{runs}/tokenizer-{run.model.vocab_size}.json"))
    return run


def short_run() -> RunConfig:
    """The base recipe cut to seconds: does everything run?"""
    run = recipe("lab")
    return replace(
        run,
        data=replace(run.data, seq_len=64, batch_size=4, max_documents=60, val_fraction=0.2),
        optim=replace(run.optim, warmup_steps=2),
        steps=4, eval_every=2, eval_batches=2, save_every=4, log_every=1,
    )  # fmt: skip


def _make_tokenizer(run: RunConfig, root: Path) -> None:
    """The vocabulary that all runs share, made once: from every fourth document, which is enough for so few merges."""
    path = root / run.data.tokenizer
    if run.data.tokenizer == "bytes" or path.exists():
        return
    from dsv3_jax.data import tokenizer
    from dsv3_jax.data.corpus import load_corpus

    print(f"training a vocabulary of {run.model.vocab_size} byte-level tokens")
    documents = load_corpus(replace(run.data, tokenizer="bytes", seed=0)).train[::4]
    tokenizer.train_bpe((d.text for d in documents), run.model.vocab_size, str(path))


def _job(key: tuple[str, int], asked: Asked, *, alone: bool = False) -> Job:
    record = f"{asked.folder}.json"
    return Job(*key, to_dict(asked.run), asked.folder, asked.others, record, (), alone)


def _is_finished(folder: Path, run: RunConfig) -> bool:
    return (folder / "checkpoints" / str(run.steps)).is_dir()


def _cores() -> list[int]:
    """Those that we may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _backend() -> str:
    """What the workers will run on, asked in a process of its own: ours must not take the accelerator's memory."""
    look = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    return done.stdout.strip() or "cpu"


def _made(root: Path) -> dict:
    """When, from what, and on what; in short."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    machine = f"{os.cpu_count()} × {platform.machine()}, Python {platform.python_version()}, JAX {version('jax')}"
    return {"date": date.today().isoformat(), "commit": told.stdout.strip() or "unknown", "machine": machine}


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train and measure what is missing, then write table and picture.")
    parser.add_argument("--base", default="lab", help="the recipe whose diffs the variants are: lab, tiny, mini, …")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the base, as steps=5000")
    parser.add_argument("--seeds", nargs="+", type=int, help="default 0 1 2")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one a core, or 1 on an accelerator")
    parser.add_argument("--short", action="store_true", help="a few steps into a temporary folder: does it run?")
    parser.add_argument("--fresh", action="store_true", help="forget results and runs, and make all anew")
    parser.add_argument("--remeasure", action="store_true", help="forget results, but measure the runs that are there")
    parser.add_argument("--redraw", action="store_true", help="only the table and the picture of what is there")
    parser.add_argument("--list", action="store_true", help="what there is and what is missing; runs nothing")
    return parser
