"""Balance losses and imbalance equal the page and the oracles; which rules a router may have."""

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


def test_a_rule_that_its_router_cannot_have_is_refused():
    cfg = replace(preset("tiny"), num_groups=1, groups_per_token=1)
    cfg = replace(cfg, balance=Balance(rule="quantile"))
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

    def of_sequences(s):
        return balance.sequence_loss(s, 2, given).sum(), page_loss(s, ids, mask, jnp).sum()

    def of_all(s):
        one = s.reshape(1, 27, 6), ids.reshape(1, 27, 2), whole
        return switch(s), page_loss(*one, jnp)[0]

    for both in (of_sequences, of_all):
        value, gradient = jax.jit(both)(scores), jax.jit(jax.jacrev(both))(scores)
        np.testing.assert_allclose(*value, rtol=1e-9)
        np.testing.assert_allclose(*gradient, rtol=1e-9, atol=1e-12)


def test_losses_and_gradients_are_finite_if_every_token_is_masked(rng):
    scores, ids = rng.uniform(0.05, 1.0, (2, 5, 4)).astype(np.float32), jnp.zeros((5, 2), jnp.int32)
    mask = jnp.array([[True] * 5, [False] * 5])

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def both(scores):
        of_sequences = balance.sequence_loss(scores, 2, mask).sum()
        of_all = balance.switch_loss(scores[1], ids, mask[1])
        return of_sequences + of_all, (of_sequences, of_all)

    grad, losses = both(scores)
    assert np.isfinite(losses).all() and losses[1] == 0
    assert np.isfinite(grad).all() and (grad[1] == 0).all()
    assert balance.z_loss(jnp.ones(5), mask[1]) == 0


def test_each_layer_moves_in_proportion_to_its_own_load_and_rests_without_one():
    load = jnp.array([[4.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    moved = balance.proportional_update(jnp.ones((2, 4)), load, 0.5)
    assert moved.tolist() == [[0.5, 1.0, 1.25, 1.25], [1.0, 1.0, 1.0, 1.0]]


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
