"""The best learning rate of a model, and what a rate far from it costs, from a grid of runs.

Near its minimum the loss is a parabola in the logarithm of the rate,

    L(x) ≈ c + a (x − v)²,   x = ln rate,

and exp(v) is the best rate. Far above it training breaks, and the loss is no parabola. So the fit
is by least squares with the weight exp(−(L − min L) / 0.1 nats): a rate that costs much hardly
counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NEAR = 0.1  # nats above the lowest loss, at which a rate counts 1 / e


@dataclass(frozen=True)
class Best:
    """The vertex of a parabola.

    Attributes:
        log_rate: v. Where it is not between the smallest and the largest rate, the nearer of these.
        curvature: a, nats per ln².
        inside: whether the vertex is between the smallest and the largest rate.
    """

    log_rate: float
    curvature: float
    inside: bool

    def cost(self, factor: float) -> float:
        """Return the nats that a rate of `factor` times the best costs, by the parabola."""
        return self.curvature * math.log(factor) ** 2


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> Best:
    """Fit the parabola of a grid of runs. A loss that is not finite does not count.

    Raises: ValueError if fewer than three rates have a finite loss.

    >>> best = best_rate([1e-3, 2e-3, 4e-3, 8e-3], [3.2, 3.1, 3.1, 3.2])
    >>> round(math.exp(best.log_rate), 5), best.inside  # by symmetry √(2 · 4) e-3
    (0.00283, True)
    """
    x, y = np.log(np.array(rates, np.float64)), np.array(losses, np.float64)
    there = np.isfinite(y)
    if there.sum() < 3:
        raise ValueError(f"losses={list(losses)} have {there.sum()} numbers; a parabola needs 3")
    x, y = x[there], y[there]
    centre, lowest = x.mean(), y.min()
    roots = np.exp((lowest - y) / (2 * NEAR))  # of the weights
    a, b, _ = np.polyfit(x - centre, y - lowest, 2, w=roots)
    if a <= 0:  # no minimum: the lowest loss is at an end
        return Best(float(x[y.argmin()]), float(a), False)
    vertex = centre - b / (2 * a)
    inside = bool(x.min() <= vertex <= x.max())
    return Best(float(np.clip(vertex, x.min(), x.max())), float(a), inside)
