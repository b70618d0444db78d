"""The best rate: a parabola's vertex, its spread by simulation, and the slow way to fit it."""

import numpy as np
import pytest
from scipy import optimize

from experiments.lab.rates import NEAR, best_rate

RATES = 6e-3 * 2.0 ** np.arange(-2, 3)
X = np.log(RATES)


def parabola(v, a=0.1, c=3.6):
    return c + a * (X - v) ** 2


@pytest.mark.parametrize("away", [-1.2, -0.3, 0.0, 0.7])
def test_the_vertex_of_a_parabola_is_exact(away):
    """Whatever the weights are, for a parabola fits all points."""
    v = X.mean() + away
    best = best_rate(RATES, parabola(v))
    assert best.inside and best.log_rate == pytest.approx(v)
    assert best.curvature == pytest.approx(0.1)
    at = best.log_rate + np.log([4, 0.25])
    assert 0.1 * (at - v) ** 2 == pytest.approx([best.cost(4), best.cost(0.25)])


def test_the_fit_is_the_minimum_of_weighted_squares():
    """By a search over (v, a, c), of a curve that is no parabola and a run that broke."""
    losses = parabola(X[1]) + 0.05 * np.exp(X - X[2])
    losses[4] = np.nan
    x, y = X[:4], losses[:4]
    weights = np.exp(-(y - y.min()) / NEAR)

    def squares(of):
        v, a, c = of
        return float((weights * (c + a * (x - v) ** 2 - y) ** 2).sum())

    exact = dict(xatol=1e-10, fatol=1e-18, maxiter=20_000, maxfev=20_000)
    found = optimize.minimize(squares, (X[1], 0.1, 3.6), method="Nelder-Mead", options=exact)
    best = best_rate(RATES, losses)
    assert (best.log_rate, best.curvature) == pytest.approx(tuple(found.x[:2]), abs=1e-5)


def test_noise_moves_the_vertex_as_its_derivative_says():
    """Drawn runs around a known parabola: no bias, and the spread of first order.

    The weights are drawn with the losses, which only adds to the spread.
    """
    rng, noise, v = np.random.default_rng(0), 0.002, X.mean() + 0.2
    exact = parabola(v)
    steps = 1e-6 * np.eye(len(X))
    derivative = [(best_rate(RATES, exact + step).log_rate - v) / 1e-6 for step in steps]
    drawn = [
        best_rate(RATES, exact + noise * rng.standard_normal(len(X))).log_rate for _ in range(2000)
    ]
    first_order = noise * np.linalg.norm(derivative)
    # 2,000 draws know a mean to 1/45 of the spread, and the spread to 1/63 of itself.
    assert abs(np.mean(drawn) - v) < 4 * first_order / 45
    assert np.std(drawn) == pytest.approx(first_order, rel=4 / 63)


def test_a_vertex_outside_the_grid_is_its_end():
    hill = -parabola(X[2] + 0.1)
    for losses, end in ((X, 0), (-X, -1), (hill, 0), (parabola(X[-1] + 0.5), -1)):
        best = best_rate(RATES, losses)
        assert not best.inside and best.log_rate == X[end]
    with pytest.raises(ValueError, match="have 2 numbers"):
        best_rate(RATES, [3.0, 3.1, np.nan, np.inf, np.nan])
