"""A study: its question, its variants as changes of a base recipe, and its claims.

Run folders are runs/lab/MARK, where the mark is a hash of the run's identity (see `fingerprints`).
So studies that need the same run share it.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dsv3_jax.config import ModelConfig, RunConfig, replace
from experiments.lab import drawing
from experiments.lab.bases import RUNS_FOLDER, base_run
from experiments.lab.claims import Check, Claim, Stake, Verdict, judge
from experiments.lab.fingerprints import Identity, changed, identify, of_needed
from experiments.lab.pooling import noise_for
from experiments.lab.results import MissingRuns, Results
from experiments.lab.statistics import TooFewSeeds
from experiments.lab.tables import Column, results_table
from experiments.lab.tasks import Task
from experiments.lab.trained import TrainedRun


@dataclass(frozen=True)
class OnTask:
    """A variant that is trained and measured on a task of its own; None means text."""

    task: Task | None
    run: RunConfig | ModelConfig


# A model stands for the base recipe with it. A run's `start` or `trunk` may be an earlier variant,
# or a folder inside one, "VARIANT/folder": that is its run of the same seed.
Variant = RunConfig | ModelConfig | OnTask


@dataclass(frozen=True)
class MeasuredWith:
    """A variant that is measured with the runs of earlier variants, of the same seed."""

    needs: tuple[str, ...]
    run: Variant


Variants = Mapping[str, Variant | MeasuredWith]


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
    """A study of `experiments/`: the `STUDY` of a study.py, whose docstring has its question."""

    # changes of a base recipe; differences refer to the first variant
    variants: Callable[[RunConfig], Variants]
    question: str = ""  # the docstring's first paragraph, set by `load`
    published: str = ""  # its second one, the papers' figure or direction
    base: str = "lab"  # name of the base recipe
    task: Task | None = None  # of the variants that are no `OnTask`; None means text
    seeds: int = 3  # each variant is trained from so many seeds …
    first_seed: int = 0  # … from this one on: claims are not judged on the seeds of trials
    # the same for variants that need other numbers
    seeds_of: Mapping[str, int] = field(default_factory=dict)
    columns: Sequence[Column] = (Column("validation loss", "val_loss", 4, paired=True),)
    # (base, repository) → None: writes files that runs read
    prepare: Callable[[RunConfig, Path], None] | None = None
    # (run) → None: makes the folder that the run's `start` names, in its worker. It is inside the
    # run folder of another variant, and its name says all that it is made with
    make_start: Callable[[RunConfig], None] | None = None
    # more numbers of a run: name → number, list or dict
    measure: Callable[[TrainedRun], dict] | None = None
    # the same for timings: one run at a time, on all cores
    measure_alone: Callable[[TrainedRun], dict] | None = None
    rows: Sequence[str] = ()  # the variants that the table has; default: all
    below: Callable[[Results], str] | None = None  # Markdown below the table
    table: Callable[[Results], str] | None = None  # Markdown in place of both
    draw: Callable[[Results, Path], None] = drawing.claims_and_variants()
    claims: tuple[Claim, ...] = ()  # what the papers claim, judged by `claims.judge`
    # manipulation checks that claims refer to by name
    stakes: Mapping[str, Stake] = field(default_factory=dict)
    # Numbers of README.md that its tables lack → an expression of numbers that they have, a
    # function, or the source.
    facts: Mapping[str, str | Callable[[Results], float]] = field(default_factory=dict)
    folder: Path = Path()  # experiments/NN_name, set by `load`

    @property
    def root(self) -> Path:
        """The repository, which contains runs/."""
        return self.folder.parent.parent

    def own_seeds(self, variant: str) -> range:
        """Return the seeds that a variant is trained from, if a command names no others."""
        return range(self.first_seed, self.first_seed + self.seeds_of.get(variant, self.seeds))

    def list_runs(
        self, base: RunConfig, seeds: Sequence[int], runs_folder: str = RUNS_FOLDER
    ) -> dict[tuple[str, int], StudyRun]:
        """Return all runs by (variant, seed), seed by seed: early results then cover all variants.

        The seed sets the initial parameters and the data's order. All variants see the same data.

        Raises: ConfigError for a variant with an invalid configuration.
        """
        variants = self.variants(base)
        runs: dict[tuple[str, int], StudyRun] = {}
        # run folder → a hash of what it is, which newer settings leave as it is. It is without
        # its task, which counts too where a run that begins with it has another one.
        named: dict[str, str] = {}
        for seed in seeds:
            for name, variant in variants.items():
                task, run = self.task_and_run(variant, base)
                needs = _parents(run, variants)
                if isinstance(variant, MeasuredWith):
                    needs += variant.needs
                for other in needs:
                    if (other, seed) not in runs:
                        raise ValueError(
                            f"variant {name!r} needs={other!r}, which is not an earlier variant"
                        )
                needed = {other: runs[other, seed].folder for other in needs}
                for place in ("start", "trunk"):
                    run = replace(run, **{place: of_needed(getattr(run, place), needed)})
                run = replace(run, seed=seed, data=replace(run.data, seed=seed))
                begun = dict(named)
                for before in (runs[other, seed] for other in needed):
                    if before.task is not None and before.task != task:
                        begun[before.folder] += f"-{before.task.fingerprint}"
                identity = identify(run, self.root, task, begun)
                folder = f"{runs_folder}/{identity.mark}"
                named[folder] = changed(run, begun)
                runs[name, seed] = StudyRun(run, folder, needed, identity, task)
        return runs

    def task_and_run(
        self, variant: Variant | MeasuredWith, base: RunConfig
    ) -> tuple[Task | None, RunConfig]:
        """Return the task and the run of a variant, before its seed."""
        if isinstance(variant, MeasuredWith):
            variant = variant.run
        found = variant if isinstance(variant, OnTask) else OnTask(self.task, variant)
        run = replace(base, model=found.run) if isinstance(found.run, ModelConfig) else found.run
        return found.task, run

    def check_claims(self, names: Sequence[str]) -> None:
        """Raise ValueError for claims without a check, or on what the study lacks.

        Args: names: of the variants.
        """
        if self.claims and not self.stakes:
            raise ValueError(
                f"{self.folder.name}/study.py has claims and no manipulation check: give it "
                'stakes={"name": Stake("what is taken away", variant, against)}'
            )
        for claim in self.claims:
            for name in claim.compared:
                if name not in names:
                    raise ValueError(
                        f"claim={claim.text!r} compares {name!r}, which is not one of the variants "
                        f"{', '.join(names)}"
                    )
            if claim.stake and claim.stake not in self.stakes:
                raise ValueError(
                    f"stake={claim.stake!r} of claim={claim.text!r} is not one of the study's "
                    f"stakes: {', '.join(self.stakes)}"
                )

    def begun(self) -> dict[str, str]:
        """Return variant → the one whose run it continues, or whose frozen trunk it has."""
        base = base_run(self.base)
        variants = self.variants(base)
        found: dict[str, str] = {}
        for name, variant in variants.items():
            for parent in _parents(self.task_and_run(variant, base)[1], variants):
                found[name] = parent
        return found

    def judge(self, results: Results) -> tuple[list[Verdict], list[Check]]:
        """Judge the study's claims on its results, which keep noise and verdicts for pictures."""
        results.begun = self.begun()
        results.noise = noise_for(results, self.folder.parent)
        results.verdicts, checks = judge(results, self.claims, self.stakes, results.noise)
        return results.verdicts, checks

    def make_table(self, results: Results) -> str:
        """Return the study's table and what is below it, without what lacks runs."""
        if self.table is not None:
            with suppress(MissingRuns):
                return self.table(results)
        parts = [results_table(results, self.columns, self.rows)]
        if self.below is not None:
            with suppress(MissingRuns, TooFewSeeds):
                parts.append(self.below(results))
        return "\n\n".join(parts)


def _parents(run: RunConfig, variants: Iterable[str]) -> tuple[str, ...]:
    """Return the variants that a run's `start` or `trunk` names."""
    places = [f"{place}/" for place in (run.start, run.trunk)]
    return tuple(v for v in variants if any(place.startswith(f"{v}/") for place in places))


def load(folder: Path) -> Study:
    """Return the study of a folder's study.py, which may import modules beside it."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location(f"study_{folder.name}", folder / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # workers are sent tasks that it defines
    spec.loader.exec_module(module)
    question, published = read_docstring(module.__doc__ or "")
    return replace(module.STUDY, question=question, published=published, folder=folder.resolve())


def read_docstring(text: str) -> tuple[str, str]:
    """Return the question and what is published, from the docstring of a study.py.

    >>> read_docstring("Is it\\nso?\\n\\nPublished: yes.\\n\\nL is a length.")
    ('Is it so?', 'yes')
    """
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    found = [part for part in paragraphs if part.startswith("Published: ")]
    return paragraphs[0], "".join(found).removeprefix("Published: ").removesuffix(".")
