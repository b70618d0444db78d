"""The rule of verdicts by code of its own: it recomputes every claim, and how often it would err.

What a study claims, of which numbers, and which run continues which, are the study's. Everything
else is computed here, from the numbers in results.json alone. The same code then judges drawn runs
that have the noise of the stored ones, and no true difference.
"""

import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from runs import HERE
from scipy import optimize, stats

from experiments.lab import overview
from experiments.lab.study import load

FOLDERS = overview.with_results(HERE / "experiments")
LIKE = {"loss": 40, "other": 5}  # degrees of freedom: how alike the variances of pairs are
DRAWS = 4_000
ALPHA = 0.05


@cache
def stored(folder):
    """Return (study, variant → seed → record, variant → parent)."""
    study = load(folder)
    runs = json.loads((folder / "results.json").read_text())["runs"]
    return study, runs, study.begun()


def read(numbers, key):
    if callable(key):
        return key(numbers)
    for part in key.split("/"):
        numbers = numbers[int(part) if isinstance(numbers, list) else part]
    return numbers


def grid_of(runs, key):
    """Return (variants that have the number, seeds, [variant, seed] with NaN for no run)."""
    values = defaultdict(dict)
    for variant, seeds in runs.items():
        for seed, record in seeds.items():
            with suppress(KeyError, IndexError, TypeError):  # some variants lack some numbers
                values[variant][int(seed)] = float(read(record["numbers"], key))
    seeds = sorted({seed for row in values.values() for seed in row})
    return list(values), np.array([[row.get(s, np.nan) for s in seeds] for row in values.values()])


def root(variant, begun):
    while variant in begun:
        variant = begun[variant]
    return variant


def of_its_kind(claim, names, grid, begun):
    """Return the rows whose differences are of the claim's kind, the compared ones first."""
    own = [names.index(v) for v in (claim.variant, claim.against) if isinstance(v, str)]
    families = [root(name, begun) for name in names]
    if len(own) == 2 and families[own[0]] == families[own[1]]:
        parents = [begun.get(name) for name in names]
        if parents[own[0]] != parents[own[1]] or parents[own[0]] is None:
            return own
        rows = [i for i in range(len(names)) if parents[i] == parents[own[0]]]
    else:
        rows = [i for i in range(len(names)) if families.index(families[i]) == i]
        rows = [i for i in rows if families[i] not in [families[j] for j in own]]
    new, seen = [], [tuple(grid[i]) for i in own]
    for i in rows:
        same = any(np.array_equal(grid[i], one, equal_nan=True) for one in seen)
        if i not in own and not same:
            new.append(i)
            seen.append(tuple(grid[i]))
    return own + new


def left_over(there):
    """Return the projection of runs on what neither variant nor seed explains."""
    variants, seeds = np.nonzero(there)
    design = np.concatenate([np.eye(len(there))[variants], np.eye(there.shape[1])[seeds]], 1)
    return np.eye(len(design)) - design @ np.linalg.pinv(design, rcond=1e-9)


def spread(grids):
    """Return (sum of squares, degrees of freedom) of runs [..., variant, seed] around means."""
    there = ~np.isnan(grids.reshape(-1, *grids.shape[-2:])[0])
    project = left_over(there)
    return ((grids[..., there] @ project) ** 2).sum(-1), round(np.trace(project))


def around_mean(x):
    """Return (sum of squares, degrees of freedom) of numbers [..., seed] around their mean."""
    there = ~np.isnan(x)
    dof = max(there.sum(-1).flat[0] - 1, 0)
    return np.nansum((x - np.nanmean(x, -1, keepdims=True)) ** 2, -1), dof


def rule(claim, kind, grids, loss=None):
    """Judge runs [..., variant of the kind, seed]: (difference, standard error, dof).

    Args: loss: (variance of a run, degrees of freedom) of other runs of the recipe.
    """
    if isinstance(claim.against, str):
        d = grids[..., 0, :] - grids[..., 1, :]
    else:
        d = grids[..., 0, :] - claim.against
    d = d[..., ~np.isnan(d.reshape(-1, d.shape[-1])[0])]
    n, own = d.shape[-1], around_mean(d)[0]
    if not isinstance(claim.against, str):
        parts = [around_mean(grids[..., i, :]) for i in range(1, len(kind))]
        squares, dof = sum(part[0] for part in parts), sum(part[1] for part in parts)
    elif loss is not None:
        squares, dof = 2 * loss[0] * loss[1], loss[1]
    else:
        squares, dof = spread(grids)
        squares, dof = 2 * squares - own, dof - (n - 1)
    weight = 0.0
    if n < 8 and dof > 0:
        like = LIKE["loss" if claim.key == "val_loss" else "other"]
        weight = like * dof / (like + dof)
    total = weight + n - 1
    variance = (own + (weight * squares / dof if weight else 0.0)) / total
    error = np.sqrt(np.maximum(variance, 0.0) / n)
    if claim.questions:
        bound = 100 * (1 - 0.05 ** (1 / (claim.questions * n)))
        error = np.maximum(error, bound / stats.t.ppf(0.975, total))
    return d.mean(-1), error, total


@cache
def losses(base):
    """Return [(study, variant, seed, loss, (recipe, steps))] of all runs of a base."""
    rows = []
    for folder in FOLDERS:
        about = json.loads((folder / "results.json").read_text())
        for variant, seeds in about["runs"].items() if about["base"] == base else ():
            for seed, r in seeds.items():
                loss, version = r["numbers"].get("val_loss"), (r["recipe"], r["steps"])
                if loss is not None:
                    rows.append((folder.name, variant, int(seed), loss, version))
    return rows


def recipe_s_noise(folder, claim):
    """Return (variance of a run, degrees of freedom) of a recipe's losses without a claim's own."""
    _, runs, _ = stored(folder)
    steps = {r["steps"] for seeds in runs.values() for r in seeds.values()}
    seen, tables = set(), defaultdict(dict)
    rows = losses(json.loads((folder / "results.json").read_text())["base"])
    for study, variant, seed, loss, version in sorted(rows, key=lambda row: row[0] != folder.name):
        if version[1] in steps and (seed, loss) not in seen:
            seen.add((seed, loss))
            tables[version].setdefault((study, variant), {})[seed] = loss
    squares = dof = 0
    for table in tables.values():
        seeds = sorted({seed for row in table.values() for seed in row})
        grid = np.array([[row.get(s, np.nan) for s in seeds] for row in table.values()])
        more, degrees = spread(grid)
        squares, dof = squares + more, dof + degrees
        own = [(folder.name, claim.variant), (folder.name, claim.against)]
        if all(name in table for name in own):
            both = table[own[0]].keys() & table[own[1]].keys()
            d = np.array([table[own[0]][s] - table[own[1]][s] for s in both])
            squares, dof = squares - around_mean(d)[0] / 2, dof - (len(d) - 1)
    return squares / dof, dof


def holm(p):
    order, worst, adjusted = np.argsort(p, kind="stable"), 0.0, np.zeros(len(p))
    for rank, i in enumerate(order):
        worst = adjusted[i] = max(worst, min(1.0, p[i] * (len(p) - rank)))
    return adjusted


def judged(folder):
    """Return for each claim (claim, kind, grid, the recipe's noise of the loss).

    Claims without runs are left out. test_statistics sees that a page names these variants.
    """
    study, runs, begun = stored(folder)
    found = []
    for claim in study.claims:
        if {name for name in (claim.variant, claim.against) if isinstance(name, str)} - set(runs):
            continue
        names, grid = grid_of(runs, claim.key)
        kind = of_its_kind(claim, names, grid, begun)
        loss = None
        if claim.key == "val_loss":
            loss = recipe_s_noise(folder, claim)
        found.append((claim, [names[i] for i in kind], grid[kind], loss))
    return found


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_claim_recomputed(folder):
    """Differences, intervals, Holm's p and answers are those that the lab has written."""
    study, runs, _ = stored(folder)
    kept = json.loads((folder / "results.json").read_text())["verdicts"]
    found = [(claim, *rule(claim, kind, grid, loss)) for claim, kind, grid, loss in judged(folder)]
    p = []
    for claim, d, error, dof in found:
        away = abs(abs(d) - claim.margin)
        p.append(2 * stats.t.sf(away / error, dof) if error else float(away == 0))
    for (claim, d, error, dof), adjusted, written in zip(
        found, holm(np.array(p)), kept, strict=True
    ):
        turned = d if claim.expect == "higher" else -d
        if claim.expect == "equal":
            turned = claim.margin - abs(d)
        half = error * stats.t.ppf(0.975, dof)
        assert written["claim"] == claim.text
        assert written["difference"] == pytest.approx(turned, rel=1e-5, abs=1e-9)
        assert written["half"] == pytest.approx(half, rel=1e-5, abs=1e-9)
        assert written["p"] == pytest.approx(adjusted, rel=1e-4, abs=1e-12)
        answer = "yes" if turned > 0 else "no"
        if adjusted >= ALPHA:
            answer = "too small to tell here"
        if claim.stake:
            cost = study.stakes[claim.stake].by_seed(_Shown(runs))
            if cost.mean() <= stats.sem(cost) * stats.t.ppf(0.975, len(cost) - 1):
                answer = "no verdict"
        assert written["answer"] == answer, claim.text


class _Shown:
    """What a manipulation check reads of results: numbers by variant, over ascending seeds."""

    def __init__(self, runs):
        self.runs = runs

    def by_seed(self, variant, key):
        return {int(s): read(record["numbers"], key) for s, record in self.runs[variant].items()}

    def values(self, variant, key):
        row = self.by_seed(variant, key)
        return np.array([row[seed] for seed in sorted(row)], float)

    def paired(self, variant, other, key):
        if not isinstance(variant, str):
            return variant - self.values(other, key)
        if not isinstance(other, str):
            return self.values(variant, key) - other
        a, b = self.by_seed(variant, key), self.by_seed(other, key)
        return np.array([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])


def covariance(grid, like, related, loss=None):
    """Return the covariance of variants over seeds: the stored one, shrunk to one of few numbers.

    These are the mean variance, and the mean covariance of related and of other variants. Of the
    loss, the recipe's noise comes on top of the mean covariance.

    Args: like: degrees of freedom of these few numbers; none of the stored one's if infinite.
    """
    complete = grid[:, ~np.isnan(grid).any(0)]
    n = complete.shape[1]
    stored = np.cov(complete, ddof=1).reshape(len(grid), len(grid))
    same = np.eye(len(grid), dtype=bool)
    simple = np.zeros_like(stored)
    for cells in (same, related & ~same, ~related & ~same):
        if cells.any():
            simple[cells] = stored[cells].mean()
    if loss is not None:
        simple[same] = simple[~same].mean() + loss[0]
    shrunk = (like * simple + (n - 1) * stored) / (like + n - 1) if np.isfinite(like) else simple
    values, vectors = np.linalg.eigh(shrunk)
    return vectors * np.sqrt(np.maximum(values, 0))


def errors_of(folder, rng, like=None):
    """Return (share of drawn studies with a false verdict, power of each claim at "visible here").

    Claims of one number share its draws. Equal ones are drawn at their margins.
    """
    _, runs, begun = stored(folder)
    claims = judged(folder)
    draws, wrong, powers = {}, np.zeros(DRAWS, bool), []
    for claim, kind, _, loss in claims:
        names, grid = grid_of(runs, claim.key)
        if claim.key not in draws:
            roots = np.array([root(name, begun) for name in names])
            of_key = LIKE["loss" if claim.key == "val_loss" else "other"] if like is None else like
            half = covariance(grid, of_key, roots[:, None] == roots, loss)
            drawn = rng.normal(size=(DRAWS, grid.shape[1], len(names))) @ half.T
            draws[claim.key] = np.where(np.isnan(grid), np.nan, drawn.swapaxes(1, 2))
        drawn = draws[claim.key]
        rows = [names.index(name) for name in kind]
        if loss is not None:
            loss = loss[0] * rng.chisquare(loss[1], DRAWS) / loss[1], loss[1]
        free = claim if isinstance(claim.against, str) else replace(claim, against=0.0)
        d, error, dof = rule(free, kind, drawn[:, rows], loss)
        critical = stats.t.ppf(1 - ALPHA / len(claims) / 2, dof)
        wrong |= np.abs(d) > critical * error
        if np.any(error > 0) and not claim.questions:
            shift = np.sqrt(np.mean(error**2)) * visible(dof, len(claims))
            powers.append(np.mean(np.abs(d + shift) > critical * error))
    return wrong.mean(), powers


@cache
def visible(dof, count):
    """Return the shift in standard errors that is seen in 4 of 5 cases."""
    critical = stats.t.ppf(1 - ALPHA / count / 2, dof)
    return optimize.brentq(lambda shift: stats.nct.sf(critical, dof, shift) - 0.8, 0.1, 60)


@pytest.mark.long
def test_false_verdicts_and_power_at_the_stored_noise():
    """Without a true difference at most 6 % of studies have a yes or a no; "visible here" is seen.

    The noise is the stored one as far as few seeds show it, and alike for all pairs of a kind.
    Measured: 2.6 % on average, 5.2 % at most; a power of 0.80 to 0.84 in the mean of a study.
    Were three seeds' own covariance the truth, it would be more, but they
    cannot tell that.
    """
    rng, by_study = np.random.default_rng(0), []
    for like in (None, np.inf):
        for folder in FOLDERS:
            wrong, powers = errors_of(folder, rng, like)
            print(f"{folder.name}: {100 * wrong:.1f} % wrong, power {np.mean(powers):.2f}")
            assert wrong <= 0.06, folder.name
            by_study.append(np.mean(powers))
            # Where a pair's own noise is below its kind's, its power is a little smaller.
            assert np.mean(powers) >= 0.79, folder.name
            assert min(powers) >= 0.75, folder.name
    assert np.mean(by_study) >= 0.8
