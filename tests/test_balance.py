"""Balance losses and imbalance equal the page and the oracles; which rules a router may have."""

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
    with pytest.raises(ConfigError, match="^rule='quantile' .*groups_per_token=2 of num_groups=4"):
        balance.rule_of(replace(cfg, num_groups=4, groups_per_token=2))


@jax.jit
def quantile_target(scores, mask, bias):
    flat = quantile_balance.quantile_margins(scores.reshape(-1, scores.shape[-1]), bias, 2)
    return quantile_balance.quantile_target(flat.reshape(scores.shape), mask, bias, 2)


@pytest.mark.parametrize("reach", [0.0, 3.0])
def test_quantile_target(rng, reach):
    """The order statistic is exact: the oracle sorts float32 margins."""
    scores = np.float32(rng.uniform(0, 1, (4, 19, 8)) + np.linspace(-1, 1, 8))
    mask, bias = rng.uniform(0, 1, (4, 19)) < 0.8, rng.uniform(-reach, reach, 8).astype(np.float32)
    target = quantile_target(scores, mask, bias)
    np.testing.assert_array_equal(target, oracles.quantile_target(scores[mask], bias, 2))
    np.testing.assert_array_equal(quantile_target(scores, 1 * mask < 0, bias), bias)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
def test_sequence_and_switch_loss(x64, rng, share):
    """Values, and gradients from the scores' shares alone: the page's counts are constants.

    Of all tokens, of some in two of three sequences, and of none. Given ids replace the best ones.
    """
    scores = rng.uniform(0.05, 1.0, (3, 9, 6))  # like sigmoids, they do not sum to 1
    ids = np.array([[oracles.best(row, 2) for row in sequence] for sequence in scores], np.int32)
    given = np.where(rng.uniform(0, 1, (3, 9, 1)) < 0.5, (ids + 1) % 6, -1)
    counted = (rng.uniform(0, 1, (3, 9)) < share) & [[True], [True], [share == 1]]
    mask = None if share == 1 else jnp.asarray(counted)

    def page_loss(scores, ids, counted):
        return reference.balance_loss(reference.Routing(ids, None, scores, None, counted), jnp)

    def of_sequences(s):
        return balance.sequence_loss(s, 2, mask), page_loss(s, ids, counted)

    def of_given(s):
        chosen = np.where(given < 0, ids, given)
        return balance.sequence_loss(s, 2, mask, jnp.asarray(given)), page_loss(s, chosen, counted)

    def of_all(s):
        one_row = (x.reshape(1, 27, *x.shape[2:]) for x in (s, ids, counted))
        return balance.switch_loss(s, jnp.asarray(ids), mask)[None], page_loss(*one_row)

    for both in (of_sequences, of_given, of_all):
        value, gradient = jax.jit(both)(scores), jax.jit(jax.jacrev(both))(scores)
        np.testing.assert_allclose(*value, rtol=1e-9)
        np.testing.assert_allclose(*gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("logit", [-200.0, -88.0, -46.0, -40.0])
def test_gradients_of_balance_losses_are_finite_if_all_scores_underflow(logit):
    """The router's gates have this guard too; a quotient's gradient squares the sum of scores."""
    logits = jnp.full((1, 3, 6), logit) + jnp.eye(3, 6)[None]
    ids = jnp.array([[[0], [1], [2]]])

    @jax.jit
    @jax.grad
    def gradient(logits):
        scores = jax.nn.sigmoid(logits)
        return balance.sequence_loss(scores, 1).sum() + balance.switch_loss(scores, ids)

    grad = gradient(logits)
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() <= 4  # 2 losses · f_e = 2 · the derivative of a share, at most 1


def test_the_z_loss_of_no_tokens_is_0():
    assert balance.z_loss(jnp.ones(5), jnp.zeros(5, bool)) == 0


def test_each_layer_moves_in_proportion_to_its_own_load_and_rests_without_one():
    load = jnp.array([[4.0, 2.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    moved = balance.proportional_update(jnp.ones((2, 4)), load, 0.5)
    assert moved.tolist() == [[0.5, 1.0, 1.25, 1.25], [1.0, 1.0, 1.0, 1.0]]


def test_measures_of_imbalance():
    counts = np.array([[3, 0, 7, 2], [1, 2, 3, 4], [5, 5, 5, 5], [0, 9, 0, 0]], np.float32)
    names = ("max_vio", "entropy", "gini", "min_max")
    got = [getattr(balance, name)(jnp.asarray(counts)) for name in names]
    for row, x in enumerate(counts.astype(np.float64)):
        mean, shares = x.mean(), x[x > 0] / x.sum()
        entropy = -(shares * np.log(shares)).sum() / np.log(4)
        # half the mean difference of two experts
        gini = np.abs(x[:, None] - x[None]).mean() / (2 * mean)
        want = x.max() / mean - 1, entropy, gini, (x.min() / mean, x.max() / mean)
        for name, found, value in zip(names, got, want, strict=True):
            np.testing.assert_allclose(jnp.array(found)[..., row], value, atol=1e-6, err_msg=name)
