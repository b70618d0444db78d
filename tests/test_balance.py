"""Loads, the rules that move a bias, balance losses and measures of imbalance equal the page and the oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax import reference
from dsv3_jax.config import Balance, ConfigError, replace
from dsv3_jax.ops import balance
from dsv3_jax.presets import preset


def test_load_counts_every_assignment(rng):
    ids = rng.integers(0, 6, (3, 5, 2)).astype(np.int32)
    got = balance.load(jnp.asarray(ids), 7)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.bincount(ids.ravel(), minlength=7))
    mask = np.array([[True] * 5, [False] * 5, [True, False, True, False, True]])
    want = np.bincount(ids[mask].ravel(), minlength=7)
    np.testing.assert_array_equal(balance.load(jnp.asarray(ids), 7, jnp.asarray(mask)), want)


def test_bias_moves_towards_the_mean(rng):
    """It rises for an idle expert, falls for a busy one, and does not change at the mean; each layer by itself."""
    counts = np.array([[3.0, 0.0, 7.0, 2.0, 3.0], [1.0, 9.0, 5.0, 5.0, 5.0]])  # means 3 and 5
    bias = rng.normal(0, 1, (2, 5)).astype(np.float32)
    got = balance.bias_update(jnp.asarray(bias), jnp.asarray(counts, jnp.float32), 0.125)
    want = [reference.updated_bias(b, c, 0.125) for b, c in zip(bias.astype(np.float64), counts, strict=True)]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)
    assert got.dtype == jnp.float32 and np.sign(got - bias).tolist() == [[0, 1, -1, 1, 0], [1, -1, 0, 0, 0]]
    got = balance.proportional_update(jnp.asarray(bias), jnp.asarray(counts, jnp.float32), 0.125)
    mean = counts.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(got, bias + 0.125 * (mean - counts) / mean, rtol=0, atol=1e-7)
    idle = balance.proportional_update(jnp.asarray(bias), jnp.zeros((2, 5)), 0.125)
    np.testing.assert_array_equal(idle, bias)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(router="softmoe"), "router='softmoe' .*softmax"),
        (dict(balance=Balance(rule="sing")), "rule='sing' .*did you mean 'sign'"),
        (dict(router="softmax"), "^rule='quantile' .*router='softmax'"),
        (dict(num_groups=4, groups_per_token=2), "^rule='quantile' .*groups_per_token=2 of num_groups=4"),
    ],
)
def test_a_rule_that_its_router_cannot_have_is_refused(changes, words):
    cfg = replace(preset("tiny"), num_groups=1, groups_per_token=1, balance=Balance(rule="quantile"))
    assert balance.rule_of(cfg) is balance.RULES["quantile"]
    with pytest.raises(ConfigError, match=words):
        balance.rule_of(replace(cfg, **changes))


@jax.jit
def quantile_target(scores, mask, bias):
    flat = balance.quantile_margins(scores.reshape(-1, scores.shape[-1]), bias, 2)
    return balance.quantile_target(flat.reshape(scores.shape), mask, bias, 2)


@pytest.mark.parametrize("biases", [(0.0, 0.0), (-0.4, 0.4), (-3.0, 3.0)])
def test_quantile_target(rng, biases):
    """The order statistic is exact: the oracle sorts float32 margins."""
    scores = rng.uniform(0, 1, (4, 19, 8)).astype(np.float32) + np.linspace(-1, 1, 8, dtype=np.float32)
    mask, bias = rng.uniform(0, 1, (4, 19)) < 0.8, rng.uniform(*biases, 8).astype(np.float32)
    target = quantile_target(jnp.asarray(scores), jnp.asarray(mask), jnp.asarray(bias))
    np.testing.assert_array_equal(target, oracles.quantile_target(scores[mask], bias, 2))
    assert (quantile_target(jnp.asarray(scores), jnp.zeros((4, 19), bool), jnp.asarray(bias)) == bias).all()


def test_quantile_steps_make_the_load_even(rng):
    """From a load that is far from even. The bias has mean 0, and does not move at rate 0, whatever the target."""
    scores = jnp.asarray(rng.uniform(0, 1, (8, 50, 8)) + np.linspace(-0.5, 0.5, 8), jnp.float32)
    mask, bias, worst = jnp.ones((8, 50), bool), jnp.zeros(8), []
    for _ in range(20):
        choice = jax.lax.top_k(scores + bias[None, None], 2)[1]
        worst.append(float(balance.max_vio(balance.load(choice, 8))))
        bias = balance.quantile_update(bias, quantile_target(scores, mask, bias), jnp.float32(0.5))
    assert worst[0] > 1 and worst[-1] < 0.05
    assert abs(float(bias.mean())) < 1e-6
    stays = balance.quantile_update(bias, jnp.full(8, jnp.nan), jnp.float32(0))
    np.testing.assert_array_equal(stays, bias)


def test_z_loss(rng):
    logits, mask = rng.normal(0, 3, (5, 9, 6)), rng.uniform(0, 1, (5, 9)) < 0.6
    log_sums = np.log(np.exp(logits).sum(-1))
    got = balance.z_loss(jnp.asarray(log_sums, jnp.float32), jnp.asarray(mask))
    assert got == pytest.approx(np.mean(log_sums[mask] ** 2), rel=1e-6)
    assert balance.z_loss(jnp.ones(3), jnp.zeros(3, bool)) == 0


def page_loss(scores, ids, mask, xp=np):
    counted = np.ones(ids.shape[:2], bool) if mask is None else mask
    return reference.balance_loss(reference.Routing(ids, None, scores, None, counted), xp)


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_and_switch_loss(x64, rng, masked):
    """Values, and gradients, which come from the shares alone: the counts of the page are constants."""
    scores = jnp.asarray(rng.uniform(0.05, 1.0, (3, 9, 6)))  # like sigmoids, they do not sum to 1
    mask = rng.uniform(0, 1, (3, 9)) < 0.6 if masked else None
    ids = np.array([[oracles.best(row, 2) for row in sequence] for sequence in np.asarray(scores)], np.int32)
    given, flat = None if mask is None else jnp.asarray(mask), None if mask is None else jnp.asarray(mask.ravel())

    def switch(s, ids=ids):
        return balance.switch_loss(s.reshape(27, 6), jnp.asarray(ids.reshape(27, 2)), flat)

    whole = None if mask is None else mask.reshape(1, 27)
    for ours, theirs in (
        (lambda s: balance.sequence_loss(s, 2, given).sum(), lambda s: page_loss(s, ids, mask, jnp).sum()),
        (switch, lambda s: page_loss(s.reshape(1, 27, 6), ids.reshape(1, 27, 2), whole, jnp)[0]),
    ):
        got, want = (jax.jit(jax.value_and_grad(f))(scores) for f in (ours, theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)


def test_losses_and_gradients_are_finite_if_every_token_is_masked(rng):
    scores = jnp.asarray(rng.uniform(0.05, 1.0, (2, 5, 4)), jnp.float32)
    mask, ids = jnp.array([[True] * 5, [False] * 5]), jnp.zeros((5, 2), jnp.int32)
    value, grad = jax.jit(jax.value_and_grad(lambda s: balance.sequence_loss(s, 2, mask).sum()))(scores)
    assert np.isfinite(value) and np.isfinite(grad).all() and (grad[1] == 0).all()
    value, grad = jax.jit(jax.value_and_grad(lambda s: balance.switch_loss(s, ids, mask[1])))(scores[1])
    assert np.isfinite(value) and (grad == 0).all()


def slow_gini(counts):
    """Half the mean absolute difference of two experts' loads, over the mean load."""
    return np.abs(counts[:, None] - counts[None]).mean() / (2 * counts.mean())


@pytest.mark.parametrize("counts", [[3, 0, 7, 2], [1, 2, 3, 4], [5, 5, 5, 5], [0, 9, 0, 0]])
def test_measures_of_imbalance(counts):
    x = np.array(counts, np.float64)
    shares = x[x > 0] / x.sum()
    want = {
        "max_vio": (x.max() - x.mean()) / x.mean(), "entropy": -(shares * np.log(shares)).sum() / np.log(4),
        "gini": slow_gini(x), "min_max": (x.min() / x.mean(), x.max() / x.mean()),
    }  # fmt: skip
    for name, value in want.items():
        got = getattr(balance, name)(jnp.asarray([counts, counts], jnp.float32))  # along the last axis
        np.testing.assert_allclose(np.transpose(got), [value, value], atol=1e-6, err_msg=name)
