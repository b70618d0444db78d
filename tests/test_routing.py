"""Routers equal the reference page: chosen sets exactly, gates up to rounding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import small

from dsv3_jax import reference
from dsv3_jax.ops import routing

NO_GROUPS = dict(num_groups=1, groups_per_token=1)
ROUTERS = {
    "V3": dict(num_experts=32, experts_per_token=6, num_groups=8, groups_per_token=4),
    "V3, one group by its maximum, gates not normalised": dict(
        group_score="max", normalize_gates=False, groups_per_token=1
    ),
    "V2": dict(router="softmax", group_score="max", normalize_gates=False, routed_scale=16.0),
    "V4": dict(router="sqrtsoftplus"),
    "topk": dict(router="topk", normalize_gates=False),
    "dense": dict(router="dense", experts_per_token=16, **NO_GROUPS),
}


@partial(jax.jit, static_argnums=2)
def route(logits, bias, cfg, tokens=None):
    inputs = routing.Inputs(logits, bias, tokens or routing.Tokens())
    return routing.ROUTERS[cfg.router].route(inputs, cfg)


def config(**changes):
    return small(**{"num_experts": 16, "experts_per_token": 4, **changes})


def by_the_page(logits, bias, cfg):
    """(expert_ids, gates, scores) of the reference for rows of logits, in float64."""
    experts, counted = cfg.num_experts, np.ones((1, len(logits)), int)
    params = {"w_router": np.eye(experts), "bias": np.float64(bias)}
    ctx = reference.Context(cfg, counted, counted)
    found = reference.route(ctx, params, np.float64(logits)[None])
    return found.expert_ids[0], found.gates[0], found.scores[0]


def by_expert(ids, gates):
    """Ids and gates [n, K] in the order of the ids, for the choices' own order is free."""
    order = np.argsort(ids, axis=1)
    return [np.take_along_axis(np.asarray(x), order, axis=1) for x in (ids, gates)]


def assert_same_choice(got, ids, gates):
    """Up to a few float32 roundings: exp, sum, quotient, scale."""
    (found, weights), (wanted, want) = by_expert(got.expert_ids, got.gates), by_expert(ids, gates)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(weights, want, rtol=2e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_routers_equal_the_page(rng, router):
    """Biases are mixed, and all negative: a group left out may not win with a score of 0."""
    cfg = config(**ROUTERS[router])
    for low, high in ((-0.4, 0.4), (-0.9, -0.1)):
        logits = np.float32(rng.normal(0, 1.5, (120, cfg.num_experts)))
        bias = np.float32(rng.uniform(low, high, cfg.num_experts))
        ids, gates, scores = by_the_page(logits, bias, cfg)
        got = route(logits, bias, cfg)
        assert_same_choice(got, ids, gates)
        np.testing.assert_allclose(got.scores, scores, rtol=2e-6)


def test_hash_router(rng):
    """Experts depend on the token alone, gates on the logits; every expert gets its share."""
    tokens, logits = rng.integers(0, 130_000, 90), rng.normal(0, 1.5, (90, 16)).astype(np.float32)
    ids = oracles.hash_route(tokens, 16, 4)
    s = 1 / (1 + np.exp(-np.take_along_axis(logits.astype(np.float64), ids, axis=1)))
    none, of_tokens = np.zeros(16, np.float32), routing.Tokens(ids=tokens.astype(np.int32))
    got = route(logits, none, config(router="hash"), of_tokens)
    assert_same_choice(got, ids, 2.5 * s / s.sum(axis=1, keepdims=True))
    # An expert has 22 of 90 tokens with 4 of 16 experts each, with a standard deviation of 4.
    assert np.abs(np.bincount(ids.ravel(), minlength=16) - 22).max() < 5 * 4


@pytest.mark.parametrize("router", ["sigmoid", "sqrtsoftplus"])
def test_gates_and_gradients_are_finite_if_all_scores_underflow(router):
    """sigmoid(-200) and 1e-20 squared are 0 in float32; neither gates nor gradients divide by them.

    So is softplus(-200), at which a square root has an infinite gradient.
    """
    cfg = config(router=router)
    weight = np.array([1.0, -1.0, 0.5, 1.0], np.float32)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(logits):
        gates = route(logits, jnp.zeros(16), cfg).gates
        return (gates * weight[None]).sum(), gates

    for logit in (-200.0, -88.0, -46.0, -40.0):
        logits = np.full((2, 16), logit, np.float32) + np.eye(16, dtype=np.float32)[1]
        grad, gates = gradient(logits)
        assert np.isfinite(gates).all() and np.isfinite(grad).all()
        assert np.abs(grad).max() <= 2.5  # the derivative of a gate is at most its scale
        want = by_the_page(logits, np.zeros(16), cfg)[1]
        np.testing.assert_allclose(gates, want, rtol=1e-5, atol=1e-15)


def test_the_gradient_is_finite_if_softmax_gives_replayed_experts_no_probability():
    given = jnp.array([[1, 2]], jnp.int32)
    grad = jax.grad(lambda z: routing.softmax(z, k=2, normalize=True, given=given).gates[0, 0])
    assert np.isfinite(grad(jnp.array([[100.0, -60.0, -61.0, 0.0]]))).all()
