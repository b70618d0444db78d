"""The lab's statistics: pooled noise, intervals, Holm's correction, and what could be seen.

A measured number of variant v with seed s is y_vs = μ_v + β_s + ε_vs. The seed's effect β is common
to all variants, because a seed sets the order of the data for all of them. The noise of one run is
ε, with standard deviation σ. It is pooled over all variants of a recipe, because three seeds of one
variant say little. With 2 degrees of freedom an interval reaches 4.3 standard errors to each side,
with 58 it reaches 2.0.

    difference of two variants over n common seeds   d = mean(y_v − y_w),   SE = σ √(2/n)
    one variant against a constant                   SE = τ / √n,   τ² the pooled variance of seeds
    interval                                         d ± t(1 − α/2, dof) · SE

σ is assumed to be the same for all variants. If one variant is noisier (a rate that is too high),
its intervals are too short.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
POWER = 0.80

Table = Mapping[str, Mapping[int, float]]  # variant → seed → number


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a recipe's numbers, with their degrees of freedom.

    Attributes:
        sd, dof: σ, of a run after its variant's mean and its seed's effect.
        seed_sd: standard deviation of the seeds' effects, an estimate that is 0 if none is visible.
        within_sd, within_dof: τ, of a variant over its seeds.
        variants, runs: how many were pooled.
    """

    sd: float
    dof: int
    seed_sd: float
    within_sd: float
    within_dof: int
    variants: int
    runs: int


def pool(tables: Sequence[Table]) -> Noise:
    """Estimate the noise from several tables, whose seeds' effects need not be the same.

    Each table is fitted by least squares to variant + seed, so seeds may be missing. Their
    residuals are pooled.

    With one variant only τ is known: `sd` is NaN and `dof` 0.

    Raises: ValueError without a variant that has two seeds.

    >>> noise = pool([{"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.1}}])
    >>> round(noise.sd, 3), noise.dof, noise.variants
    (0.2, 1, 2)
    """
    squares = within = effects = 0.0
    dof = within_dof = variants = runs = shared = 0
    for table in tables:
        cells = [(v, s, value) for v, seeds in table.items() for s, value in seeds.items()]
        if not cells:
            continue
        names, seeds = list(table), sorted({s for _, s, _ in cells})
        design = np.zeros((len(cells), len(names) + len(seeds)))
        for row, (v, s, _) in enumerate(cells):
            design[row, names.index(v)] = design[row, len(names) + seeds.index(s)] = 1
        values = np.array([value for *_, value in cells], np.float64)
        values = values - values.mean()
        fitted, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
        squares += float(((values - design @ fitted) ** 2).sum())
        dof += len(cells) - int(rank)
        for of_variant in table.values():
            numbers = np.array(list(of_variant.values()), np.float64)
            within += float(((numbers - numbers.mean()) ** 2).sum())
            within_dof += max(len(numbers) - 1, 0)
        if len(seeds) > 1:
            effects += float(np.var(fitted[len(names) :], ddof=1)) * (len(seeds) - 1)
            shared += len(seeds) - 1
        variants, runs = variants + len(names), runs + len(cells)
    if not within_dof:
        raise ValueError(
            f"variants={variants} with runs={runs} leave no degree of freedom; "
            "a variant needs two seeds"
        )
    sd = float(np.sqrt(squares / dof)) if dof else float("nan")
    # The mean of a seed over V variants has variance β² + σ²/V.
    seed_variance = effects / max(shared, 1) - sd**2 * max(len(tables), 1) / max(variants, 1)
    return Noise(
        sd,
        dof,
        float(np.sqrt(max(seed_variance, 0))) if dof else 0.0,
        float(np.sqrt(within / within_dof)),
        within_dof,
        variants,
        runs,
    )


@dataclass(frozen=True)
class Difference:
    """A difference with its 95 % interval; `p` is two-sided, before any correction."""

    mean: float
    half: float  # of the interval
    p: float
    seeds: int
    error: float  # standard error
    dof: int

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the 95 % interval."""
        return self.mean - self.half, self.mean + self.half


def compare(first: Mapping[int, float], second: Mapping[int, float], noise: Noise) -> Difference:
    """Return first − second over their common seeds.

    Raises: ValueError without a common seed or a degree of freedom.

    >>> within = dict(within_sd=0.019, within_dof=60)
    >>> noise = Noise(sd=0.0141, dof=58, seed_sd=0.013, variants=30, runs=90, **within)
    >>> found = compare({0: 3.64, 1: 3.65, 2: 3.66}, {0: 3.68, 1: 3.68, 2: 3.69}, noise)
    >>> round(found.mean, 4), round(found.half, 4)
    (-0.0333, 0.023)
    """
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError(f"seeds={sorted(first)} and {sorted(second)} have none in common")
    if not noise.dof:
        raise ValueError(
            f"variants={noise.variants} with runs={noise.runs} leave no degree of freedom "
            "for differences"
        )
    mean = float(np.mean([first[s] - second[s] for s in seeds]))
    return _difference(mean, noise.sd * np.sqrt(2 / len(seeds)), len(seeds), noise.dof)


def against_constant(values: Mapping[int, float], constant: float, noise: Noise) -> Difference:
    """Return the mean over seeds − a constant, as a chance level; seeds' effects count as noise."""
    mean = float(np.mean(list(values.values()))) - constant
    return _difference(mean, noise.within_sd / np.sqrt(len(values)), len(values), noise.within_dof)


def interval_factor(dof: int) -> float:
    """Return half of a 95 % interval by Student's t, in standard errors.

    >>> round(interval_factor(2), 2), round(interval_factor(119), 2)
    (4.3, 1.98)
    """
    from scipy import stats  # takes a second to import, and the lab's workers do not need it

    return float(stats.t.ppf((1 + LEVEL) / 2, dof))


def _difference(mean: float, error: float, seeds: int, dof: int) -> Difference:
    from scipy import stats

    error = float(error)
    half = interval_factor(dof) * error
    p = float(2 * stats.t.sf(abs(mean) / error, dof)) if error > 0 else float(mean == 0)
    return Difference(mean, half, p, seeds, error, dof)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm's step-down method, in the given order.

    Adjusted values below 0.05 keep the chance of any false positive among all of them below 5 %.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * float(p_values[i])))
        adjusted[int(i)] = largest
    return adjusted


def smallest_visible(error: float, dof: int, comparisons: int = 1, power: float = POWER) -> float:
    """Return the difference that a two-sided test finds with the given power.

    The test's level is 0.05 / comparisons, that of Holm's first step: the strictest.

    Args: error: standard error of the difference; dof: its degrees of freedom.

    >>> round(smallest_visible(1.0, dof=10**6), 2)  # 1.96 + 0.84
    2.8
    """
    from scipy import optimize, stats

    critical = stats.t.ppf(1 - (1 - LEVEL) / comparisons / 2, dof)

    def missing(shift: float) -> float:
        wrong_side = float(
            np.nan_to_num(stats.nct.cdf(-critical, dof, shift))
        )  # SciPy has NaN where it is below 1e-300
        return float(stats.nct.sf(critical, dof, shift)) + wrong_side - power

    return error * float(optimize.brentq(missing, 0.0, 2 * critical + 4))
