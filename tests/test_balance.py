"""Loads, rules that move a bias, balance losses and imbalance equal the page and the oracles."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax import reference
from dsv3_jax.config import Balance, ConfigError, replace
from dsv3_jax.ops import balance, quantile_balance
from dsv3_jax.presets import preset


def test_load_counts_every_assignment(rng):
    ids = rng.integers(0, 6, (3, 5, 2)).astype(np.int32)
    mask = np.array([[True] * 5, [False] * 5, [True, False, True, False, True]])
    both = jax.jit(lambda ids, mask: (balance.load(ids, 7), balance.load(ids, 7, mask)))
    whole, masked = both(ids, mask)
    assert whole.dtype == jnp.float32
    np.testing.assert_array_equal(whole, np.bincount(ids.ravel(), minlength=7))
    np.testing.assert_array_equal(masked, np.bincount(ids[mask].ravel(), minlength=7))


def test_bias_moves_towards_the_mean(rng):
    """It rises for idle experts, falls for busy ones, rests at the mean; each layer by itself."""
    # means 3 and 5
    counts = np.array([[3.0, 0.0, 7.0, 2.0, 3.0], [1.0, 9.0, 5.0, 5.0, 5.0]], np.float32)
    bias = rng.normal(0, 1, (2, 5)).astype(np.float32)
    got = np.asarray(jax.jit(balance.bias_update)(bias, counts, 0.125))
    want = [
        reference.updated_bias(b, c, 0.125)
        for b, c in zip(bias.astype(np.float64), counts, strict=True)
    ]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)
    assert got.dtype == np.float32
    assert np.sign(got - bias).tolist() == [
        [0, 1, -1, 1, 0],
        [1, -1, 0, 0, 0],
    ]
    proportional, mean = jax.jit(balance.proportional_update), counts.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        proportional(bias, counts, 0.125), bias + 0.125 * (mean - counts) / mean, atol=1e-7
    )
    np.testing.assert_array_equal(proportional(bias, 0 * counts, 0.125), bias)


def test_a_rule_that_its_router_cannot_have_is_refused():
    cfg = replace(
        preset("tiny"), num_groups=1, groups_per_token=1, balance=Balance(rule="quantile")
    )
    assert balance.rule_of(cfg) is balance.RULES["quantile"]
    with pytest.raises(ConfigError, match="rule='sing' .*did you mean 'sign'"):
        balance.rule_of(replace(cfg, balance=Balance(rule="sing")))
    with pytest.raises(ConfigError, match="^rule='quantile' .*groups_per_token=2 of num_groups=4"):
        balance.rule_of(replace(cfg, num_groups=4, groups_per_token=2))


@jax.jit
def quantile_target(scores, mask, bias):
    flat = quantile_balance.quantile_margins(scores.reshape(-1, scores.shape[-1]), bias, 2)
    return quantile_balance.quantile_target(flat.reshape(scores.shape), mask, bias, 2)


@pytest.mark.parametrize("reach", [0.0, 3.0])
def test_quantile_target(rng, reach):
    """The order statistic is exact: the oracle sorts float32 margins."""
    scores = rng.uniform(0, 1, (4, 19, 8)).astype(np.float32)
    scores += np.linspace(-1, 1, 8, dtype=np.float32)
    mask, bias = rng.uniform(0, 1, (4, 19)) < 0.8, rng.uniform(-reach, reach, 8).astype(np.float32)
    target = quantile_target(scores, mask, bias)
    np.testing.assert_array_equal(target, oracles.quantile_target(scores[mask], bias, 2))
    np.testing.assert_array_equal(quantile_target(scores, 1 * mask < 0, bias), bias)


def test_z_loss(rng):
    logits, mask = rng.normal(0, 3, (5, 9, 6)), rng.uniform(0, 1, (5, 9)) < 0.6
    log_sums = np.log(np.exp(logits).sum(-1))
    z_loss = jax.jit(balance.z_loss)
    assert z_loss(log_sums.astype(np.float32), mask) == pytest.approx(
        np.mean(log_sums[mask] ** 2), rel=1e-6
    )
    assert z_loss(log_sums.astype(np.float32), np.zeros_like(mask)) == 0


def page_loss(scores, ids, mask, xp=np):
    counted = np.ones(ids.shape[:2], bool) if mask is None else mask
    return reference.balance_loss(reference.Routing(ids, None, scores, None, counted), xp)


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_and_switch_loss(x64, rng, masked):
    """Values, and gradients from the shares alone: the page's counts are constants."""
    scores = rng.uniform(0.05, 1.0, (3, 9, 6))  # like sigmoids, they do not sum to 1
    mask = rng.uniform(0, 1, (3, 9)) < 0.6 if masked else None
    ids = np.array([[oracles.best(row, 2) for row in sequence] for sequence in scores], np.int32)
    given, flat = (None, None) if mask is None else (jnp.asarray(mask), jnp.asarray(mask.ravel()))

    def switch(s, ids=ids):
        return balance.switch_loss(s.reshape(27, 6), jnp.asarray(ids.reshape(27, 2)), flat)

    whole = None if mask is None else mask.reshape(1, 27)
    for ours, theirs in (
        (
            lambda s: balance.sequence_loss(s, 2, given).sum(),
            lambda s: page_loss(s, ids, mask, jnp).sum(),
        ),
        (switch, lambda s: page_loss(s.reshape(1, 27, 6), ids.reshape(1, 27, 2), whole, jnp)[0]),
    ):
        got, want = (jax.jit(jax.value_and_grad(f))(scores) for f in (ours, theirs))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want
        )


def test_losses_and_gradients_are_finite_if_every_token_is_masked(rng):
    scores, ids = rng.uniform(0.05, 1.0, (2, 5, 4)).astype(np.float32), jnp.zeros((5, 2), jnp.int32)
    mask = jnp.array([[True] * 5, [False] * 5])

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def both(scores):
        losses = (
            balance.sequence_loss(scores, 2, mask).sum(),
            balance.switch_loss(scores[1], ids, mask[1]),
        )
        return sum(losses), losses

    grad, losses = both(scores)
    assert np.isfinite(losses).all()
    assert losses[1] == 0
    assert np.isfinite(grad).all()
    assert (grad[1] == 0).all()


def test_measures_of_imbalance():
    counts = np.array([[3, 0, 7, 2], [1, 2, 3, 4], [5, 5, 5, 5], [0, 9, 0, 0]], np.float32)
    names = ("max_vio", "entropy", "gini", "min_max")
    got = jax.jit(lambda x: [jnp.array(getattr(balance, name)(x)) for name in names])(counts)
    for row, x in enumerate(counts.astype(np.float64)):
        mean, shares = x.mean(), x[x > 0] / x.sum()
        entropy = -(shares * np.log(shares)).sum() / np.log(4)
        # half the mean difference of two experts
        gini = np.abs(x[:, None] - x[None]).mean() / (2 * mean)
        want = x.max() / mean - 1, entropy, gini, (x.min() / mean, x.max() / mean)
        for name, found, value in zip(names, got, want, strict=True):
            np.testing.assert_allclose(found[..., row], value, atol=1e-6, err_msg=name)
