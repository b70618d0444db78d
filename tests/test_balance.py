"""Loads, the loss-free bias, both balance losses and the measures of imbalance equal the page and the oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax import reference
from dsv3_jax.config import Balance, ConfigError, replace
from dsv3_jax.ops import balance
from dsv3_jax.presets import preset

sequence_loss = jax.jit(balance.sequence_loss, static_argnums=1)
UNEVEN = [3.0, 0.0, 7.0, 2.0]


def test_load_counts_every_assignment(rng):
    ids = rng.integers(0, 6, (3, 5, 2)).astype(np.int32)
    got = balance.load(jnp.asarray(ids), 7)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, oracles.load(ids, 7))
    assert got[6] == 0
    mask = np.array([[True] * 5, [False] * 5, [True, False, True, False, True]])
    np.testing.assert_array_equal(balance.load(jnp.asarray(ids), 7, jnp.asarray(mask)), oracles.load(ids[mask], 7))


def test_bias_moves_towards_the_mean():
    """It rises for an idle expert, falls for a busy one, and does not change at the mean."""
    counts = np.array([3.0, 0.0, 7.0, 2.0, 3.0])  # mean 3
    bias = np.array([0.5, -0.5, 0.0, 0.25, -1.0], np.float32)
    got = balance.bias_update(jnp.asarray(bias), jnp.asarray(counts, jnp.float32), 0.125)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, reference.updated_bias(bias, counts, 0.125))
    np.testing.assert_array_equal(got, [0.5, -0.375, -0.125, 0.375, -1.0])
    np.testing.assert_array_equal(balance.bias_update(jnp.asarray(bias), jnp.asarray(counts, jnp.float32), 0.0), bias)


def test_bias_update_of_stacked_layers(rng):
    bias = rng.normal(0, 1, (3, 6)).astype(np.float32)
    counts = rng.integers(0, 9, (3, 6)).astype(np.float32)
    got = balance.bias_update(jnp.asarray(bias), jnp.asarray(counts), 1e-3)
    expected = [reference.updated_bias(b, c, 1e-3) for b, c in zip(bias, counts, strict=True)]
    np.testing.assert_allclose(got, expected, atol=1e-7)


def test_names_that_no_table_has_are_refused():
    for changes in (dict(router="softmoe"), dict(balance=Balance(rule="sing"))):
        with pytest.raises(ConfigError, match="(router='softmoe' .*softmax|rule='sing' .*did you mean 'sign')"):
            balance.rule_of(replace(preset("tiny"), **changes))


@pytest.mark.parametrize("changes", [dict(router="softmax"), dict(num_groups=4, groups_per_token=2)])
def test_a_rule_that_its_router_cannot_have_is_refused(changes):
    cfg = replace(preset("tiny"), num_groups=1, groups_per_token=1, balance=Balance(rule="quantile"))
    assert balance.rule_of(cfg) is balance.RULES["quantile"]
    with pytest.raises(ConfigError, match=r"^rule='quantile' .*(router='softmax'|groups_per_token=2 of num_groups=4)"):
        balance.rule_of(replace(cfg, **changes))


def test_bias_moves_in_proportion(rng):
    counts = np.array([3.0, 0.0, 7.0, 2.0, 3.0])
    bias = rng.normal(0, 1, 5).astype(np.float32)
    got = balance.proportional_update(jnp.asarray(bias), jnp.asarray(counts, jnp.float32), 0.125)
    np.testing.assert_allclose(got, oracles.proportional_update(bias, counts, 0.125), rtol=0, atol=1e-7)
    np.testing.assert_array_equal(balance.proportional_update(jnp.asarray(bias), jnp.zeros(5), 0.125), bias)


@jax.jit
def quantile_target(scores, mask, bias):
    flat = balance.quantile_margins(scores.reshape(-1, scores.shape[-1]), bias, 2)
    return balance.quantile_target(flat.reshape(scores.shape), mask, bias, 2)


@pytest.mark.parametrize("biases", [(0.0, 0.0), (-0.4, 0.4), (-3.0, 3.0)])
def test_quantile_target(rng, biases):
    """The order statistic is exact: the oracle sorts float32 margins. With it each expert has its share of tokens.

    An expert that is itself the cut of several tokens has equal margins there.
    """
    scores = rng.uniform(0, 1, (4, 19, 8)).astype(np.float32) + np.linspace(-1, 1, 8, dtype=np.float32)
    mask, bias = rng.uniform(0, 1, (4, 19)) < 0.8, rng.uniform(*biases, 8).astype(np.float32)
    target = quantile_target(jnp.asarray(scores), jnp.asarray(mask), jnp.asarray(bias))
    counted = scores[mask]
    np.testing.assert_array_equal(target, oracles.quantile_target(counted, bias, 2))
    cuts = np.sort(counted + bias, axis=1)[:, -3:-2]
    share = len(counted) * 2 // 8
    over = counted - cuts + np.asarray(target)[None]
    assert ((over > 0).sum(axis=0) <= share).all() and ((over >= 0).sum(axis=0) > share).all()
    assert ((over > 0).sum(axis=0) == share).sum() >= 6
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


def by_the_page(scores, ids, mask):
    counted = np.ones(ids.shape[:2], bool) if mask is None else mask
    return reference.balance_loss(reference.Routing(ids, None, scores.astype(np.float64), None, counted), np)


@pytest.mark.parametrize("masked", [False, True])
def test_sequence_loss(rng, masked):
    scores = rng.uniform(0.05, 1.0, (3, 9, 6)).astype(np.float32)  # like sigmoids, they do not sum to 1
    mask = rng.uniform(0, 1, (3, 9)) < 0.6 if masked else None
    got = sequence_loss(jnp.asarray(scores), 2, None if mask is None else jnp.asarray(mask))
    top = np.array([[oracles.best(row, 2) for row in sequence] for sequence in scores])
    np.testing.assert_allclose(got, by_the_page(scores, top, mask), rtol=1e-5)


def test_sequence_loss_of_even_routing_is_one():
    """Each expert is once in the top 1 and has the same mean share: sum_e 1 * 1/E = 1."""
    scores = jnp.asarray(0.1 + 0.8 * np.eye(6)[None], jnp.float32)
    np.testing.assert_allclose(sequence_loss(scores, 1), [1.0], rtol=1e-6)


def test_sequence_loss_gradient_comes_from_the_shares_alone(rng):
    """f is a count, so d loss = sum_e f_e dP_e."""
    scores = jnp.asarray(rng.uniform(0.05, 1.0, (2, 7, 5)), jnp.float32)
    f = np.zeros((2, 5))
    for b in range(2):
        for t in range(7):
            f[b, oracles.best(np.asarray(scores)[b, t], 2)] += 5 / (2 * 7)

    def by_hand(scores):
        shares = scores / scores.sum(axis=-1, keepdims=True)
        return (jnp.asarray(f, jnp.float32) * shares.mean(axis=1)).sum()

    got = jax.jit(jax.grad(lambda s: balance.sequence_loss(s, 2).sum()))(scores)
    np.testing.assert_allclose(got, jax.jit(jax.grad(by_hand))(scores), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("masked", [False, True])
def test_switch_loss(rng, masked):
    scores = rng.uniform(0.05, 1.0, (17, 6)).astype(np.float32)
    ids = np.array([oracles.best(row, 2) for row in scores], np.int32)
    mask = rng.uniform(0, 1, 17) < 0.6 if masked else None
    got = jax.jit(balance.switch_loss)(
        jnp.asarray(scores), jnp.asarray(ids), None if mask is None else jnp.asarray(mask)
    )
    assert got.shape == ()
    assert got == pytest.approx(by_the_page(scores[None], ids[None], None if mask is None else mask[None])[0], rel=1e-5)


def test_switch_loss_extremes():
    """The loss is 1 if load and scores are even, and E if one expert has all of both."""
    ids = jnp.arange(8, dtype=jnp.int32).reshape(4, 2)
    assert balance.switch_loss(jnp.full((4, 8), 0.3), ids) == pytest.approx(1.0, rel=1e-6)
    scores = jnp.asarray(np.tile(np.eye(8)[5], (4, 1)), jnp.float32)
    assert balance.switch_loss(scores, jnp.full((4, 1), 5, jnp.int32)) == pytest.approx(8.0, rel=1e-6)


def test_losses_and_gradients_are_finite_if_every_token_is_masked(rng):
    scores = jnp.asarray(rng.uniform(0.05, 1.0, (2, 5, 4)), jnp.float32)
    mask = jnp.array([[True] * 5, [False] * 5])
    value, grad = jax.jit(jax.value_and_grad(lambda s: balance.sequence_loss(s, 2, mask).sum()))(scores)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert (grad[1] == 0).all()
    ids = jnp.zeros((5, 2), jnp.int32)
    value, grad = jax.jit(jax.value_and_grad(lambda s: balance.switch_loss(s, ids, mask[1])))(scores[1])
    assert np.isfinite(value)
    assert (grad == 0).all()


@pytest.mark.parametrize("name", ["max_vio", "entropy", "gini"])
@pytest.mark.parametrize("counts", [UNEVEN, [1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0], [0.0, 9.0, 0.0, 0.0]])
def test_measures_of_imbalance(name, counts):
    got = jax.jit(getattr(balance, name))(jnp.array(counts, jnp.float32))
    assert got == pytest.approx(getattr(oracles, name)(counts), abs=1e-6)


@pytest.mark.parametrize("name, even, one_hot", [("max_vio", 0, 7), ("entropy", 1, 0), ("gini", 0, 7 / 8)])
def test_extremes_of_imbalance(name, even, one_hot):
    measure = jax.jit(getattr(balance, name))
    counts = jnp.array([[6.0] * 8, [48.0] + [0.0] * 7], jnp.float32)
    np.testing.assert_allclose(measure(counts), [even, one_hot], atol=1e-6)  # along the last axis


def test_min_max_is_relative_to_the_mean():
    low, high = balance.min_max(jnp.array([UNEVEN, [2.0, 2.0, 2.0, 2.0]], jnp.float32))
    np.testing.assert_allclose(low, [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(high, [7 / 3, 1.0], rtol=1e-6)
