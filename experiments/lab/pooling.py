"""Noise of a recipe's validation loss, pooled over the variants of all studies that use it."""

from collections.abc import Collection, Sequence
from pathlib import Path

from experiments.lab.claims import LOSS, NoiseOf, independent, noise_within, related, table_of
from experiments.lab.results import Key, Results
from experiments.lab.statistics import Noise, Table, pool


def recipe_noise(
    all_results: Sequence[Results],
    base: str | None,
    steps: Collection[int],
    without: Sequence[str] = (),
) -> Noise:
    """Pool the validation loss's noise over studies with one base and one of these step counts.

    Runs that studies share count once: runs of one seed with equal losses are one run, whatever
    settings a later version has added. Each version of the recipe, and each number of steps, has
    its own seed effects. Variants of one family (`Results.begun`) count as one.

    Args: without: the compared variants of the first of these studies, see `pool`.
    """
    tables: dict[tuple[int, int], dict[str, dict[int, float]]] = {}
    seen: set[tuple[str, float]] = set()
    for results in all_results:
        if results.about.get("base") != base:
            continue
        own = results is all_results[0]
        kept = independent(table_of(results, LOSS), results.begun, without if own else ())
        for variant in kept:
            for seed, record in results.runs[variant].items():
                loss = record["numbers"].get(LOSS)
                if record["steps"] not in steps or loss is None or (seed, loss) in seen:
                    continue
                seen.add((seed, loss))
                table = tables.setdefault((record.get("recipe", 1), record["steps"]), {})
                losses = table.setdefault(f"{results.path.parent.name}: {variant}", {})
                losses[int(seed)] = float(loss)
    of_steps: list[Table] = list(tables.values())
    return pool(of_steps, [f"{all_results[0].path.parent.name}: {name}" for name in without])


def siblings(experiments: Path) -> list[Results]:
    """Return the results of all studies in a folder."""
    return [Results(path) for path in sorted(experiments.glob("[0-9][0-9]_*/results.json"))]


def noise_for(results: Results, experiments: Path) -> NoiseOf:
    """Return each number's noise: of the validation loss over the recipe, else over this study.

    Of variants of one family the noise is always this study's.
    """
    within = noise_within(results)
    others = [r for r in siblings(experiments) if r.path != results.path]

    def noise(key: Key, compared: Sequence[str] = ()) -> Noise:
        if key != LOSS or related(results.begun, compared):
            return within(key, compared)
        steps = {r["steps"] for name in results.variants for r in results.records(name)}
        return recipe_noise([results, *others], results.about.get("base"), steps, compared)

    return noise
