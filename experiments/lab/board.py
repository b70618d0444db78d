"""The board: recipes that compete on tasks made by code, with some minutes of one core each.

    python -m experiments.lab board NAME      # trains experiments/board/NAME.py

A recipe is a file with a function for each track that it enters, `facts(run)`, `domains(run)` or
`induction(run)`, which changes the track's base run. It is trained beside the best of the track, on
three seeds that both share. The seeds follow from the commit, so nobody has chosen them. It enters
if it is better by more than what three seeds can see (`claims.judge`).
"""

import hashlib
import importlib.util
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError, RunConfig
from dsv3_jax.model.counting import size
from experiments.lab.bases import OF_TASKS, RUNS_FOLDER, short_run
from experiments.lab.claims import Claim, Verdict, judge, ln, noise_within
from experiments.lab.measuring import formed, unknown_bits
from experiments.lab.results import Number, Results, replace_block
from experiments.lab.running import run_missing
from experiments.lab.study import OnTask, Study
from experiments.lab.tables import format_number, markdown_table
from experiments.lab.tasks import Chains, Domains, Facts, Task

SEEDS = 3
# That the seeds of a recipe may take together, or as long as the best takes beside it.
SECONDS = 300
# Times the base's parameters, and the best's seconds, that are allowed: a router may grow.
MORE = 1.05


@dataclass(frozen=True)
class Track:
    """What recipes compete in.

    Attributes:
        score: of a run's numbers; lower is better.
        shown: from the score to what the table has.
        like: the study of the same task; differences are shrunk to its noise.
    """

    text: str
    task: Task
    base: str
    score: Number
    like: str
    shown: Callable[[float], float] = float


TRACKS = {
    "facts": Track(
        "bits of a fact unknown, of 6", Facts(), "facts", unknown_bits, "11_facts_ladder"
    ),
    "domains": Track(
        "bits of an answer unknown, of 7.8",
        Domains(count=16, words=224),
        "domains",
        unknown_bits,
        "20_known_domains",
    ),
    "induction": Track(
        "steps until half of what pairs are worth is learnt",
        Chains(),
        "chains",
        ln("formed", "steps"),
        "23_induction",
        shown=math.exp,
    ),
}


def measure(trained: Any) -> dict:
    """Measure a run's score where the loss is not it."""
    if not isinstance(trained.task, Chains):
        return {}
    step = formed(trained)
    if step == trained.run.steps:  # never: then fewer steps are no better score
        step = max(step, OF_TASKS["chains"].steps)
    return {"formed": step}


def load_recipe(path: Path) -> dict[str, Callable[[RunConfig], RunConfig]]:
    """Return the functions of a recipe's file, by track.

    Raises: ValueError for a name that is no recipe, or a file without a track.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", path.stem) or path.stem == "study":
        raise ValueError(f"recipe={path.stem!r} is not a name of a to z, 0 to 9 and _")
    if not path.is_file():
        there = ", ".join(p.stem for p in sorted(path.parent.glob("*.py")) if p.stem != "study")
        raise ValueError(f"recipe={path.stem!r} is not in {path.parent.name}/, which has {there}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: getattr(module, name) for name in TRACKS if hasattr(module, name)}
    if not found:
        raise ValueError(f"{path.name} has no function of a track; they are {', '.join(TRACKS)}")
    return found


def commit_of(path: Path) -> str:
    """Return the commit of the checkout, in which a recipe's file must be as it is on disk.

    Raises: ValueError if it is not.
    """
    git = partial(subprocess.run, cwd=path.parent, capture_output=True, text=True)
    head = git(["git", "rev-parse", "HEAD"])
    same = git(["git", "diff", "--quiet", "HEAD", "--", path.name])
    known = git(["git", "ls-files", "--error-unmatch", path.name])
    if head.returncode or same.returncode or known.returncode:
        raise ValueError(f"{path.name} is not committed; the seeds follow from its commit")
    return head.stdout.strip()


def draw_seeds(commit: str) -> tuple[int, ...]:
    """Return the seeds of a commit.

    >>> draw_seeds("0123"), draw_seeds("0124")
    ((47606, 47127, 59673), (45770, 32250, 40085))
    """
    digest = hashlib.blake2b(commit.encode(), digest_size=2 * SEEDS).digest()
    return tuple(1000 + int.from_bytes(digest[2 * i : 2 * i + 2]) for i in range(SEEDS))


def changed_run(
    recipe: Callable[[RunConfig], RunConfig], base: RunConfig, name: str, track: str
) -> OnTask:
    """Return a recipe's run of a track.

    Raises: ValueError if it changes the data or how scores are measured, has more parameters than
        the base, or is no run.
    """
    try:
        run = recipe(base)
    except ConfigError as error:
        raise ValueError(f"{track} of {name}: {error}") from None
    if not isinstance(run, RunConfig):
        raise ValueError(f"{track} of {name} returns {run!r}; return the changed run")
    if run.data != base.data or run.start or run.trunk:
        raise ValueError(f"{track} of {name} changes data, start or trunk, which all recipes share")
    if (run.log_every, run.eval_batches) != (base.log_every, base.eval_batches):
        raise ValueError(f"{track} of {name} changes log_every or eval_batches, which scores have")
    parameters, most = size(run.model).total, MORE * size(base.model).total
    if parameters > most:
        raise ValueError(
            f"{track} of {name} has {parameters:,} parameters; a recipe has {most:,.0f} at most"
        )
    return OnTask(TRACKS[track].task, run)


def compete(name: str, experiments: Path, *, short: bool, workers: int | None = None) -> int:
    """Train a recipe on its tracks, and enter it where it is better.

    Returns: the exit code: 1 if it enters nowhere, or a run failed. Raises: ValueError.
    """
    folder = experiments / "board"
    recipe = load_recipe(folder / f"{name}.py")
    commit = "" if short else commit_of(folder / f"{name}.py")
    seeds = (0,) if short else draw_seeds(commit)
    with tempfile.TemporaryDirectory(prefix="lab-") as temporary:
        path = Path(temporary, "board.json") if short else folder / "board.json"
        results = Results(path)
        rows: list[dict] = results.about.setdefault("rows", [])
        entered = False
        for track in recipe:
            best = next((row for row in reversed(rows) if row["track"] == track), None)
            if best is not None and best["recipe"] == name:
                print(f"{track}: {name} is the best already")
                continue
            names = [name] if best is None else [best["recipe"], name]
            runs_folder = temporary if short else RUNS_FOLDER
            if failures := _train(folder, track, names, seeds, results, runs_folder, workers):
                print("\n".join(failures))
                return 1
            row = enter(track, name, best, results, experiments, seeds)
            if row is None:
                continue
            entered = True
            rows.append(row | {"commit": commit[:7], "date": date.today().isoformat()})
            results.write()
            if not short:
                replace_block(folder / "README.md", table(rows))
    return 0 if entered else 1


def _train(
    folder: Path,
    track: str,
    names: Sequence[str],
    seeds: Sequence[int],
    results: Results,
    runs_folder: str,
    workers: int | None,
) -> list[str]:
    """Train the runs that the board lacks, and show those of this track alone."""
    recipes = {name: load_recipe(folder / f"{name}.py")[track] for name in names}

    def variants(base: RunConfig):
        return {
            f"{track}: {name}": changed_run(recipe, base, name, track)
            for name, recipe in recipes.items()
        }

    of_track = TRACKS[track]
    base = OF_TASKS[of_track.base] if runs_folder == RUNS_FOLDER else short_run(of_track.base)
    study = Study(variants, base=of_track.base, measure=measure, folder=folder.resolve())
    runs = study.list_runs(base, seeds, runs_folder)
    missing = {key for key in runs if not results.has(*key, runs[key].identity)}
    failures = run_missing(study, runs, missing, results, workers) if missing else []
    results.select({key: run.identity for key, run in runs.items()})
    return failures


def enter(
    track: str,
    name: str,
    best: dict | None,
    results: Results,
    experiments: Path,
    seeds: Sequence[int],
) -> dict | None:
    """Return a recipe's row for the board, or None if it does not enter; say why."""
    of_track, own = TRACKS[track], f"{track}: {name}"
    score = float(results.values(own, of_track.score).mean())
    seconds = sum(record["seconds"] for record in results.records(own))
    row: dict[str, Any] = {"track": track, "recipe": name, "score": score, "seconds": seconds}
    row |= {"seeds": list(seeds), "gain": None, "visible": None}
    shown = f"{format_number(of_track.shown(score), of_track.score.digits)} {of_track.text}"
    if best is None:
        print(f"{track}: {shown}; the first row")
        return row

    # A machine that is slow today is slow for both.
    other = f"{track}: {best['recipe']}"
    allowed = max(SECONDS, MORE * sum(record["seconds"] for record in results.records(other)))
    if seconds > allowed:
        print(f"{track}: {shown}; not entered: {seconds:.0f} s, more than {allowed:.0f}")
        return None
    verdict = compare(of_track, own, other, results, experiments)
    if verdict is None:
        print(f"{track}: {shown}; not entered: one seed tells nothing")
        return None
    gain, visible = verdict.difference.mean, verdict.visible
    said = f"{format_number(gain, of_track.score.digits, sign=True)} {of_track.score.unit}"
    bound = f"{format_number(visible, of_track.score.digits)} is visible here"
    if verdict.answer != "yes" or -gain <= visible:
        print(f"{track}: {shown}; not entered: {said} against {best['recipe']}, {bound}")
        return None
    print(f"{track}: {shown}; entered: {said} against {best['recipe']}, {bound}")
    return row | {"gain": gain, "visible": visible}


def compare(
    of_track: Track, own: str, other: str, results: Results, experiments: Path
) -> Verdict | None:
    """Judge that a recipe is better, by the noise of the track's study; None for one seed."""
    like = Results(experiments / of_track.like / "results.json")
    noise = noise_within(like)
    claim = Claim("better", own, other, of_track.score)
    verdicts, _ = judge(results, [claim], {}, lambda key, compared=(): noise(key))
    return verdicts[0] if verdicts else None


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the board as Markdown, the best of each track first."""
    header = ["track", "recipe", "score", "against the best before it (visible)", "seconds"]
    lines = []
    for track, of_track in TRACKS.items():
        number = of_track.score
        for row in reversed([row for row in rows if row["track"] == track]):
            against = ""
            if row["gain"] is not None:
                gain = format_number(row["gain"], number.digits, sign=True)
                against = f"{gain} ({format_number(row['visible'], number.digits)}) {number.unit}"
            score = format_number(of_track.shown(row["score"]), number.digits)
            recipe = f"[{row['recipe']}]({row['recipe']}.py)"
            words = f"{score} {of_track.text}"
            seconds = f"{row['seconds']:.0f}"
            lines.append([track, recipe, words, against, seconds, row["commit"], row["date"]])
    return markdown_table([*header, "commit", "date"], lines)
