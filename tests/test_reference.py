"""The reference page's losses against loops, in float64.

test_routing has its routers. test_model and test_loss compare the whole page with the models of the package, and
tests/golden compares those with transformers.
"""

import numpy as np
import oracles
import pytest
from models import parameters, random_model, small, tokens_of

from dsv3_jax import reference
from dsv3_jax.config import Balance

BATCH, LENGTH = 2, 9
# Row 0: documents of 4 and 3 tokens, then padding. Row 1: one of 9.
SEGMENTS = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9])
POSITIONS = np.array([[*range(4), *range(3), *range(2)], [*range(9)]])


def context_of(cfg, xp=np):
    return reference.Context(cfg, POSITIONS, SEGMENTS, xp)


def test_underflowing_sigmoids_stay_finite():
    """sigmoid(-800) is 0 in float64."""
    p = dict(w_router=np.full((1, 8), -800.0), bias=np.linspace(-0.3, 0.2, 8))
    with np.errstate(over="ignore"):  # of e^800
        got = reference.route(context_of(small()), p, np.ones((BATCH, LENGTH, 1)))
    assert not got.scores.any() and not got.gates.any()
    assert not reference.balance_loss(got, np).any()


def share_loss(ids, scores, counted):
    """E Σ_e f_e P_e, expert by expert: its share of the assignments, times its mean share of a token's scores."""
    ids, shares, num_experts = ids[counted], (scores / scores.sum(-1, keepdims=True))[counted], scores.shape[-1]
    return num_experts * sum((ids == e).mean() * shares[:, e].mean() for e in range(num_experts))


def best_of(scores):
    return np.array([oracles.best(row, 3) for row in scores])


def smooth_l1(a, b):
    d = np.abs(a - b)
    return np.mean([x * x / 2 if x < 1 else x - 0.5 for x in d])


@pytest.mark.parametrize("kind, depth", [("deepseek", 2), ("eagle", 1)])
def test_total_loss(kind, depth):
    """Every part from the outputs, position by position; targets stay within their document."""
    balance = Balance(sequence_alpha=0.02, switch_alpha=0.03, z_alpha=0.05)
    cfg = small(num_layers=2, mtp_kind=kind, mtp_depth=depth, balance=balance)
    params, tokens = parameters(random_model(cfg)), np.asarray(tokens_of(cfg, BATCH, LENGTH))
    ctx = context_of(cfg)
    out, got = reference.transformer(ctx, params, tokens), reference.losses(ctx, params, tokens, 0.3)

    def positions(ahead):
        return [(b, i) for b, i in np.ndindex(BATCH, LENGTH - ahead) if 0 < SEGMENTS[b, i] == SEGMENTS[b, i + ahead]]

    means = []
    for ahead, logits in enumerate([out.logits, *out.mtp_logits], start=1):
        probs = [oracles.softmax_probs(logits[b, i])[tokens[b, i + ahead]] for b, i in positions(ahead)]
        means.append(-np.mean(np.log(probs)))
    np.testing.assert_allclose([got.main, *got.mtp], means, rtol=1e-12)

    want = 0.0
    for k, (ids, _, scores, log_sums, counted) in enumerate(out.routing):  # the trunk's router, then those of the heads
        reads = [[0 < SEGMENTS[b, i] == SEGMENTS[b, i + k] for i in range(LENGTH - k)] for b in range(BATCH)]
        np.testing.assert_array_equal(counted, reads)
        want += 0.02 * np.mean(
            [share_loss(best_of(row), *rest) for row, *rest in zip(scores, scores, counted, strict=True)]
        )
        want += 0.03 * share_loss(ids.reshape(-1, 3), scores.reshape(-1, 8), counted.reshape(-1))
        # A sigmoid's logit is ln s / (1 - s).
        logits = np.log(scores) - np.log1p(-scores)
        np.testing.assert_allclose(log_sums, np.log(np.exp(logits).sum(-1)), rtol=1e-9)
        want += 0.05 * (log_sums[counted] ** 2).mean()
    assert got.balance == pytest.approx(want, rel=1e-12)

    heads = np.mean(means[1:])
    if kind == "eagle":
        h, made = out.hidden, out.mtp_hidden[0]
        feature = np.mean([smooth_l1(made[b, i], h[b, i + 1]) for b, i in positions(2)])
        assert got.feature == pytest.approx(feature, rel=1e-12)
        heads = feature + 0.1 * heads
    assert got.total == pytest.approx(means[0] + 0.3 * heads + want, rel=1e-12)
