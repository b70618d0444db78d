"""Routers equal the oracles: chosen sets exactly, gates and scores up to float32 rounding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.ops import routing

STATIC = ("k", "groups", "groups_kept", "group_score", "normalize", "scale")
sigmoid = jax.jit(routing.sigmoid, static_argnames=STATIC)
sqrtsoftplus = jax.jit(routing.sqrtsoftplus, static_argnames=STATIC)
softmax = jax.jit(routing.softmax, static_argnames=STATIC)

ALL_NEGATIVE, MIXED, NONE = (-0.9, -0.1), (-0.4, 0.4), (0.0, 0.0)
SETTINGS = [  # experts, k, groups, groups_kept, group_score
    (16, 4, 1, 1, "top2_sum"),
    (16, 4, 4, 2, "top2_sum"),
    (32, 6, 8, 4, "top2_sum"),
    (16, 4, 4, 1, "top2_sum"),  # one group has all k choices
    (12, 3, 4, 2, "max"),
]


def by_expert(expert_ids, gates, num_experts):
    """Return f64[n, E]: each expert's gate, NaN if it was not chosen. The order of the choices does not matter."""
    table = np.full((len(expert_ids), num_experts), np.nan)
    np.put_along_axis(table, np.asarray(expert_ids), np.asarray(gates, np.float64), axis=1)
    return table


def assert_same_choice(got, ids, gates, num_experts):
    assert got.expert_ids.dtype == jnp.int32
    assert got.expert_ids.shape == ids.shape
    np.testing.assert_array_equal(np.sort(got.expert_ids, axis=1), np.sort(ids, axis=1))
    table = by_expert(got.expert_ids, got.gates, num_experts), by_expert(ids, gates, num_experts)
    np.testing.assert_allclose(*table, rtol=2e-6)  # a few float32 roundings: exp, sum, quotient, scale


@pytest.mark.parametrize("biases", [ALL_NEGATIVE, MIXED, NONE])
@pytest.mark.parametrize("experts, k, groups, kept, group_score", SETTINGS)
def test_sigmoid_router(rng, experts, k, groups, kept, group_score, biases):
    logits = rng.normal(0, 1.5, (120, experts)).astype(np.float32)
    bias = rng.uniform(*biases, experts).astype(np.float32)
    for normalize, scale in ((True, 2.5), (False, 1.0)):
        keywords = dict(k=k, groups=groups, groups_kept=kept, group_score=group_score, normalize=normalize, scale=scale)
        ids, gates, scores = oracles.sigmoid_route(logits, bias, **keywords)
        got = sigmoid(jnp.asarray(logits), jnp.asarray(bias), **keywords)
        assert_same_choice(got, ids, gates, experts)
        np.testing.assert_allclose(got.scores, scores, rtol=1e-6)


@pytest.mark.parametrize("biases", [ALL_NEGATIVE, MIXED])
def test_sqrtsoftplus_router(rng, biases):
    logits = rng.normal(0, 4, (120, 16)).astype(np.float32)
    bias = rng.uniform(*biases, 16).astype(np.float32)
    keywords = dict(k=4, groups=4, groups_kept=2, normalize=True, scale=2.5)
    ids, gates, scores = oracles.sigmoid_route(logits, bias, **keywords, score=oracles.sqrtsoftplus_scores)
    got = sqrtsoftplus(jnp.asarray(logits), jnp.asarray(bias), **keywords)
    assert_same_choice(got, ids, gates, 16)
    assert scores.max() > 2
    np.testing.assert_allclose(got.scores, scores, rtol=1e-6)


def test_sqrtsoftplus_and_its_gradient_far_below_zero():
    """softplus(-200) is 0 in float32, and the gradient of a square root is infinite there."""
    logits = np.array([-200.0, -60.0, -16.0, -15.9, -10.0, 0.0, 30.0])

    def total(row):
        scores = routing.sqrtsoftplus(row[None], jnp.zeros(7), k=1).scores
        return scores.sum(), scores[0]

    grad, scores = jax.jit(jax.grad(total, has_aux=True))(jnp.asarray(logits, jnp.float32))
    s = np.sqrt(np.logaddexp(0, logits))
    np.testing.assert_allclose(scores, s, rtol=1e-6, atol=1e-38)
    np.testing.assert_allclose(grad, 1 / (1 + np.exp(-logits)) / (2 * s), rtol=1e-6, atol=1e-38)


def test_noisy_topk_router(rng):
    """Gates are the softmax over the K largest of h = logits + ε softplus(spread); without noise it is topk."""
    logits, spread, normal = (rng.normal(0, 1.5, (120, 16)).astype(np.float32) for _ in range(3))
    h = logits + normal.astype(np.float64) * np.logaddexp(0, spread)
    ids, gates = oracles.topk_route(h, k=3)
    got = jax.jit(partial(routing.noisy_topk, k=3))(*map(jnp.asarray, (logits, spread, normal)))
    assert_same_choice(got, ids, gates, 16)
    np.testing.assert_allclose(got.scores, [oracles.softmax_probs(row) for row in h], rtol=1e-5)
    plain = oracles.topk_route(logits, k=3)
    assert (np.sort(plain[0]) != np.sort(ids)).any(axis=1).mean() > 0.5
    assert_same_choice(routing.noisy_topk(jnp.asarray(logits), None, None, k=3), *plain, 16)


def test_noise_is_standard_normal_and_differs_by_row_and_layer():
    keys = jax.random.split(jax.random.key(3), 8)
    one, two = (np.asarray(routing.noise(keys, layer, 64, 16), np.float64) for layer in (1, 2))
    # 8,192 draws: the mean's standard deviation is 0.011, the variance's 0.016; the bounds are 5 of them
    assert abs(one.mean()) < 0.055 and abs(one.var() - 1) < 0.08
    both = np.concatenate([one, two]).reshape(16, -1)
    assert np.abs(np.corrcoef(both) - np.eye(16)).max() < 5 / np.sqrt(64 * 16)  # of 1,024 draws each


def test_hash_router(rng):
    """Experts depend on the token alone, gates on the logits; every expert gets its share of the ids."""
    tokens, logits = rng.integers(0, 130_000, 90), rng.normal(0, 1.5, (90, 16)).astype(np.float32)
    ids = oracles.hash_route(tokens, 16, 3)
    s = 1 / (1 + np.exp(-np.take_along_axis(logits.astype(np.float64), ids, axis=1)))
    got = routing.hash_tokens(jnp.asarray(logits), jnp.asarray(tokens, jnp.int32), k=3, scale=2.5)
    assert_same_choice(got, ids, 2.5 * s / s.sum(axis=1, keepdims=True), 16)
    of_all = routing.hash_tokens(jnp.zeros((8192, 16)), jnp.arange(8192, dtype=jnp.int32), k=3).expert_ids
    # An expert's count has mean 1,536 and standard deviation 35.
    assert np.abs(np.bincount(np.asarray(of_all).ravel(), minlength=16) - 1536).max() < 5 * 35


def test_a_token_uses_at_most_groups_kept_groups(rng):
    """The limit holds even if every biased score is negative."""
    logits = jnp.asarray(rng.normal(0, 1, (200, 32)), jnp.float32)
    for bias in (jnp.full(32, -5.0), jnp.zeros(32)):
        ids = sigmoid(logits, bias, k=6, groups=8, groups_kept=3).expert_ids
        assert max(len(set(row)) for row in (np.asarray(ids) // 4).tolist()) <= 3
        assert all(len(set(row)) == 6 for row in np.asarray(ids).tolist())
    ids = softmax(logits, k=6, groups=8, groups_kept=3).expert_ids
    assert max(len(set(row)) for row in (np.asarray(ids) // 4).tolist()) <= 3


def test_bias_changes_the_choice_but_not_the_gates():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]])
    bias = jnp.array([-1.0, 0.0, 0.0, 1.0])
    got = routing.sigmoid(logits, bias, k=2, normalize=False)
    s = 1 / (1 + np.exp(-np.array([2.0, 1.0, 0.0, -1.0])))
    np.testing.assert_allclose(by_expert(got.expert_ids, got.gates, 4), [[np.nan, s[1], np.nan, s[3]]], rtol=1e-6)


def test_logits_take_a_gradient_and_the_bias_does_not(rng):
    logits = jnp.asarray(rng.normal(0, 1, (20, 8)), jnp.float32)
    weight = jnp.asarray(rng.normal(0, 1, (20, 3)), jnp.float32)

    def loss(logits, bias):
        got = routing.sigmoid(logits, bias, k=3, groups=4, groups_kept=2)
        return (got.gates * weight).sum() + got.scores.sum()

    to_logits, to_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(logits, jnp.linspace(-0.3, 0.2, 8, dtype=jnp.float32))
    assert (to_bias == 0).all()
    assert (jnp.abs(to_logits) > 0).all()


def test_gate_gradients_equal_those_of_the_formula(x64, rng):
    """For a fixed chosen set, the gradient is that of scale * s / sum(s)."""
    logits, bias = rng.normal(0, 1, (10, 8)), rng.uniform(-0.5, 0.0, 8)
    weight = jnp.asarray(rng.normal(0, 1, (10, 8)))
    ids, _, _ = oracles.sigmoid_route(logits, bias, k=3, scale=2.5)
    chosen = np.zeros((10, 8), bool)
    np.put_along_axis(chosen, ids, True, axis=1)

    def ours(logits):
        got = routing.sigmoid(logits, jnp.asarray(bias), k=3, scale=2.5)
        return (got.gates * jnp.take_along_axis(weight, got.expert_ids, axis=1)).sum()

    def theirs(logits):
        s = jnp.where(chosen, 1 / (1 + jnp.exp(-logits)), 0.0)
        return (2.5 * s / s.sum(axis=1, keepdims=True) * weight).sum()

    logits = jnp.asarray(logits)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(logits), jax.jit(jax.grad(theirs))(logits), atol=1e-12)


@pytest.mark.parametrize("logit", [-200.0, -88.0, -46.0, -40.0])
def test_gates_and_gradients_are_finite_if_all_sigmoids_underflow(logit):
    """sigmoid(-200) and 1e-20 squared are 0 in float32; neither gates nor gradients may divide by them."""
    logits = jnp.full((2, 8), logit).at[:, 1].add(1.0)
    weight = jnp.array([1.0, -1.0, 0.5])

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def run(logits):
        got = routing.sigmoid(logits, jnp.zeros(8), k=3, scale=2.5).gates
        return (got * weight[None]).sum(), got

    grad, got = run(logits)
    assert np.isfinite(got).all()
    assert np.isfinite(grad).all()
    assert np.abs(grad).max() <= 2.5  # the derivative of a gate is at most its scale
    _, gates, _ = oracles.sigmoid_route(logits, np.zeros(8), k=3, scale=2.5)
    np.testing.assert_allclose(got, gates, rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize(
    "experts, k, groups, kept, group_score, normalize, scale",
    [
        (16, 4, 1, 1, "max", False, 1.0),  # V2-Lite: greedy
        (32, 6, 8, 3, "max", False, 16.0),  # V2: group-limited greedy
        (16, 4, 4, 2, "max", True, 1.0),
        (16, 4, 4, 2, "top2_sum", False, 1.0),
    ],
)
def test_softmax_router(rng, experts, k, groups, kept, group_score, normalize, scale):
    logits = rng.normal(0, 1.5, (120, experts)).astype(np.float32)
    keywords = dict(k=k, groups=groups, groups_kept=kept, group_score=group_score, normalize=normalize, scale=scale)
    ids, gates, scores = oracles.softmax_route(logits, **keywords)
    got = softmax(jnp.asarray(logits), **keywords)
    assert_same_choice(got, ids, gates, experts)
    np.testing.assert_allclose(got.scores, scores, rtol=2e-6)


def test_topk_router(rng):
    logits = rng.normal(0, 1.5, (120, 16)).astype(np.float32)
    ids, gates = oracles.topk_route(logits, k=3)
    got = routing.topk(jnp.asarray(logits), k=3)
    assert_same_choice(got, ids, gates, 16)
    np.testing.assert_allclose(got.scores, [oracles.softmax_probs(row) for row in logits.astype(float)], rtol=2e-6)


def test_dense_router(rng):
    logits = rng.normal(0, 1.5, (50, 8)).astype(np.float32)
    got = routing.dense(jnp.asarray(logits))
    probs = np.array([oracles.softmax_probs(row) for row in logits.astype(float)])
    assert_same_choice(got, np.tile(np.arange(8), (50, 1)), probs, 8)
    np.testing.assert_allclose(got.scores, probs, rtol=2e-6)


SPREAD, TOKENS = jnp.linspace(-2, 2, 320).reshape(40, 8), jnp.arange(40, dtype=jnp.int32)


def model_config(**changes):
    """Return a small ModelConfig with 8 experts in 4 groups, 3 for each token."""
    from dsv3_jax.config import ModelConfig

    base = dict(
        vocab_size=8, dim=8, num_layers=1, num_dense_layers=0, dense_dim=8, num_heads=1, q_latent_dim=None,
        kv_latent_dim=4, nope_head_dim=4, rope_head_dim=2, v_head_dim=4, num_experts=8, experts_per_token=3,
        num_shared_experts=0, expert_dim=4, num_groups=4, groups_per_token=2, routed_scale=2.5,
    )  # fmt: skip
    return ModelConfig(**(base | changes))


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            dict(router="sigmoid"),
            lambda x, b: routing.sigmoid(x, b, k=3, groups=4, groups_kept=2, normalize=True, scale=2.5),
        ),
        (
            dict(router="sigmoid", group_score="max", normalize_gates=False),
            lambda x, b: routing.sigmoid(
                x, b, k=3, groups=4, groups_kept=2, group_score="max", normalize=False, scale=2.5
            ),
        ),
        (
            dict(router="softmax", group_score="max", normalize_gates=False),
            lambda x, b: routing.softmax(x, k=3, groups=4, groups_kept=2, group_score="max", scale=2.5),
        ),
        (
            dict(router="softmax", group_score="top2_sum", normalize_gates=True),
            lambda x, b: routing.softmax(
                x, k=3, groups=4, groups_kept=2, group_score="top2_sum", normalize=True, scale=2.5
            ),
        ),
        (dict(router="topk", num_groups=1, groups_per_token=1, routed_scale=1.0), lambda x, b: routing.topk(x, k=3)),
        (
            dict(router="dense", num_groups=1, groups_per_token=1, experts_per_token=8, routed_scale=1.0),
            lambda x, b: routing.dense(x),
        ),
        (
            dict(router="sqrtsoftplus"),
            lambda x, b: routing.sqrtsoftplus(x, b, k=3, groups=4, groups_kept=2, normalize=True, scale=2.5),
        ),
        (dict(router="noisy_topk"), lambda x, b: routing.noisy_topk(x, SPREAD, 2 * SPREAD, k=3)),
        (dict(router="hash"), lambda x, b: routing.hash_tokens(x, TOKENS, k=3, scale=2.5)),
    ],
)
def test_route_uses_the_configured_router(rng, changes, expected):
    logits = jnp.asarray(rng.normal(0, 1, (40, 8)), jnp.float32)
    bias = jnp.asarray(rng.uniform(-0.5, 0.5, 8), jnp.float32)
    needs = {"noisy_topk": dict(spread=SPREAD, normal=2 * SPREAD), "hash": dict(tokens=TOKENS)}
    cfg = model_config(**changes)
    got, want = routing.route(logits, bias, cfg, **needs.get(cfg.router, {})), expected(logits, bias)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
