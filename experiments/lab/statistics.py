"""The lab's statistics: shrunk variances, intervals, Holm's correction, and what could be seen.

A claim rests on n differences d_s, one a seed: of two variants, or of one and a constant. Seeds'
effects on both variants cancel. Their own variance s² has n − 1 degrees of freedom, and three seeds
say little of it. So it is shrunk to σ², that of a difference of other pairs of the same kind:

    v = (w σ² + (n − 1) s²) / (w + n − 1),   dof = w + n − 1
    1 / w = 1 / d0 + 1 / ν,   ν the degrees of freedom of σ²;   w = 0 from eight seeds on
    interval   d ± t(1 − α/2, dof) · √(v / n)

d0 says how alike the variances of pairs are. An infinite d0 would take one noise for all, and 0
each pair's own. The stored claims have 40 for the validation loss, and 5 for other numbers.

Source: G. Smyth, Linear models and empirical Bayes methods for microarrays, 2004, who has ν = ∞.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
POWER = 0.80
ENOUGH_SEEDS = 8  # from these on, a claim's own variance is taken as it is

Table = Mapping[str, Mapping[int, float]]  # variant → seed → number


@dataclass(frozen=True)
class Noise:
    """Standard deviations of numbers, with their degrees of freedom; NaN where these are 0.

    Attributes:
        sd, dof: of a run after its variant's mean and its seed's effect.
        within_sd, within_dof: of a variant over its seeds, with their effects.
        variants, runs: how many were pooled.
    """

    sd: float
    dof: int
    within_sd: float
    within_dof: int
    variants: int
    runs: int


def pool(tables: Sequence[Table], without: Sequence[str] = ()) -> Noise:
    """Estimate the noise from several tables, whose seeds' effects need not be the same.

    Each table is fitted by least squares to variant + seed, so seeds may be missing. Their
    residuals are pooled.

    Args: without: the compared variants. What their own differences say is left out: of two, the
        spread of their differences, which is a part of the residuals.

    >>> noise = pool([{"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.1}}])
    >>> round(noise.sd, 3), noise.dof, noise.variants
    (0.2, 1, 2)
    """
    squares = within = 0.0
    dof = within_dof = variants = runs = 0
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

        if len(without) == 2 and all(name in table for name in without):
            own = paired(*(table[name] for name in without))
            squares -= squares_of(own) / 2
            dof -= max(len(own) - 1, 0)
        for name, of_variant in table.items():
            if name not in without:
                within += squares_of(list(of_variant.values()))
                within_dof += max(len(of_variant) - 1, 0)
        variants, runs = variants + len(names), runs + len(cells)
    return Noise(
        _root(max(squares, 0.0), dof), dof, _root(within, within_dof), within_dof, variants, runs
    )


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """Return first − second for each seed that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def squares_of(numbers: Sequence[float]) -> float:
    """Return the sum of squares around the mean."""
    values = np.array(numbers, np.float64)
    return float(((values - values.mean()) ** 2).sum()) if len(values) else 0.0


def _root(squares: float, dof: int) -> float:
    return float(np.sqrt(squares / dof)) if dof > 0 else float("nan")


class TooFewSeeds(ValueError):
    """Differences that leave no degree of freedom."""


@dataclass(frozen=True)
class Difference:
    """A difference with its 95 % interval."""

    mean: float
    half: float  # of the interval
    seeds: int
    error: float  # standard error
    dof: float

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the 95 % interval."""
        return self.mean - self.half, self.mean + self.half

    def p(self, margin: float = 0.0) -> float:
        """Return the two-sided p of a size of `margin`, before any correction.

        It is below 0.05 where the 95 % interval lies within the margins, or beyond one of them.

        >>> found = Difference(mean=0.01, half=0.02, seeds=3, error=0.01, dof=1e6)
        >>> round(found.p(), 3), round(found.p(margin=0.03), 3)
        (0.317, 0.046)
        """
        from scipy import stats

        away = abs(abs(self.mean) - margin)
        if self.error == 0:
            return float(away == 0)
        return float(2 * stats.t.sf(away / self.error, self.dof))


def estimate(
    differences: Sequence[float],
    variance: float = float("nan"),
    dof: float = 0,
    prior: float = 0,
    least: float = 0.0,
) -> Difference:
    """Return the mean of a claim's differences, with an interval by their shrunk variance.

    Args:
        variance, dof: σ² of a difference of other such pairs, and its degrees of freedom.
        prior: d0.
        least: half of the interval at least, as of a share that rests on few questions.

    Raises: TooFewSeeds without a difference or a degree of freedom.

    >>> alone, shrunk = estimate([0.1, 0.2, 0.4]), estimate([0.1, 0.2, 0.4], 0.01, 100, 40)
    >>> round(alone.half, 2), round(shrunk.half, 2), alone.dof, round(shrunk.dof, 1)
    (0.38, 0.12, 2.0, 30.6)
    """
    count = len(differences)
    weight = 0.0
    if prior and dof > 0 and count < ENOUGH_SEEDS:
        weight = 1 / (1 / prior + 1 / dof)
    total = weight + count - 1
    if count == 0 or total <= 0:
        raise TooFewSeeds(
            f"differences={count} leave no degree of freedom; a claim needs two seeds"
        )
    squares = squares_of(differences) + (weight * variance if weight else 0.0)
    error = float(np.sqrt(squares / total / count))
    factor = interval_factor(total)
    error = max(error, least / factor)
    return Difference(float(np.mean(differences)), factor * error, count, error, total)


def share_bound(questions: int) -> float:
    """Return the share of wrong answers that none of some questions leaves possible, at 95 %.

    >>> round(100 * share_bound(768), 1)  # %
    0.4
    """
    return 1 - (1 - LEVEL) ** (1 / questions)


def interval_factor(dof: float) -> float:
    """Return half of a 95 % interval by Student's t, in standard errors.

    >>> round(interval_factor(2), 2), round(interval_factor(119), 2)
    (4.3, 1.98)
    """
    from scipy import stats  # takes a second to import, and the lab's workers do not need it

    return float(stats.t.ppf((1 + LEVEL) / 2, dof))


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


def smallest_visible(error: float, dof: float, comparisons: int = 1) -> float:
    """Return the difference that a two-sided test finds with a power of 80 %.

    The test's level is 0.05 / comparisons, that of Holm's first step: the strictest.

    Args: error: standard error of the difference; dof: its degrees of freedom.

    >>> round(smallest_visible(1.0, dof=10**6), 2)  # 1.96 + 0.84
    2.8
    """
    from scipy import optimize, stats

    critical = stats.t.ppf(1 - (1 - LEVEL) / comparisons / 2, dof)

    def missing(shift: float) -> float:
        wrong_side = stats.nct.cdf(-critical, dof, shift)  # NaN where it is below 1e-300
        return float(stats.nct.sf(critical, dof, shift) + np.nan_to_num(wrong_side)) - POWER

    return error * float(optimize.brentq(missing, 0.0, 2 * critical + 4))
