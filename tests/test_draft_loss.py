"""Losses of heads on a frozen trunk: KL and total variation, against NumPy; and what they measure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import DENSE, LIGHT, forward, random_model, tokens_of

from dsv3_jax.config import ConfigError, RunConfig, replace
from dsv3_jax.ops.draft_loss import distance, summed_distance
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.ops.verify_drafts import accept
from dsv3_jax.presets import recipe
from dsv3_jax.training.loss import Objective, compute_loss


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(kind, target, drafter):
    """(distances, gradients by the drafter's logits), in float64, token by token."""
    values, gradients = [], []
    for p, q in zip(softmax(target), softmax(drafter), strict=True):
        if kind == "kl":
            values.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
            gradients.append(q - p)
        else:
            values.append(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2)
            s = np.where(p > q, -1.0, 0.0)
            gradients.append(np.array([q[w] * (s[w] - (q * s).sum()) for w in range(len(q))]))
    return np.array(values), np.array(gradients)


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_distances_and_gradients_are_those_of_numpy(x64, rng, kind):
    target, drafter = rng.normal(0, 2, (2, 7, 9))
    value = lambda x: distance(jax.nn.log_softmax(jnp.asarray(target)), jax.nn.log_softmax(x), kind)  # noqa: E731
    values, gradients = by_hand(kind, target, drafter)
    np.testing.assert_allclose(value(jnp.asarray(drafter)), values, rtol=1e-12)
    np.testing.assert_allclose(jax.grad(lambda x: value(x).sum())(jnp.asarray(drafter)), gradients, atol=1e-14)
    # Pinsker's inequality, and the minimum: at p itself, where the gradient is 0.
    kl, tv = (by_hand(k, target, drafter)[0] for k in ("kl", "tv"))
    assert (tv**2 <= kl / 2).all()
    assert abs(value(jnp.asarray(target))).max() < 1e-15
    assert abs(jax.grad(lambda x: value(x).sum())(jnp.asarray(target))).max() < 1e-15


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_the_sum_in_chunks_is_the_masked_sum_and_leaves_the_target_alone(x64, rng, kind):
    h, own, w = (jnp.asarray(rng.normal(size=shape)) for shape in ((10, 4), (10, 4), (4, 9)))
    mask = jnp.asarray(rng.integers(2, size=10) == 1)
    total = jax.jit(lambda h, own: summed_distance(h, own, w, mask, kind, chunk=3))
    values, gradients = by_hand(kind, np.asarray(own @ w), np.asarray(h @ w))
    assert float(total(h, own)) == pytest.approx(values[np.asarray(mask)].sum(), rel=1e-12)
    of_h, of_own = jax.grad(total, argnums=(0, 1))(h, own)
    np.testing.assert_allclose(of_h, (gradients * np.asarray(mask)[:, None]) @ np.asarray(w).T, atol=1e-13)
    assert not of_own.any()


def test_one_less_tv_is_the_acceptance_of_speculative_sampling(rng):
    """Over independent drafts; a share of n has a standard deviation of at most 1 / (2 √n), and 6 of them pass."""
    draws = 40_000
    p, q = softmax(rng.normal(0, 1.5, (2, 6)))
    drafts = jnp.asarray(rng.choice(6, size=(draws, 1), p=q), jnp.int32)
    law = jnp.broadcast_to(jnp.asarray(q, jnp.float32), (draws, 1, 6))
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (draws, 2, 6))
    share = float(accept(drafts, law, logits, jax.random.split(jax.random.key(0), (draws, 2)), Sampling(1.0))[0].mean())
    tv = float(distance(jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q)), "tv"))
    assert abs(share - (1 - tv)) < 6 / (2 * draws**0.5) < 0.03 and 0.2 < tv < 0.8


@pytest.mark.long
def test_heads_are_compared_with_the_trunk_at_the_position_before_their_token(light_compiles):
    """By the logits of the complete model: head k's at i, and the trunk's own at i + k, of one document alone."""
    model = random_model(replace(LIGHT, mtp_depth=2), execution=DENSE)
    tokens = tokens_of(LIGHT, 2, 9)
    segment_ids = jnp.asarray([[1] * 9, [1] * 5 + [2] * 4], jnp.int32)
    positions = jnp.asarray([[*range(9)], [*range(5), *range(4)]], jnp.int32)
    out = forward(model, tokens, segment_ids, positions)
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    for kind in ("kl", "tv"):
        found = jax.jit(lambda kind=kind: compute_loss(model, batch, 0.3, Objective(True, kind)).mtp)()
        for k in (1, 2):
            values = []
            for row in range(2):
                for i in range(9 - k - 1):
                    if segment_ids[row, i] == segment_ids[row, i + k + 1]:
                        pair = out.logits[row, i + k][None], out.mtp_logits[k - 1][row, i][None]
                        values.append(by_hand(kind, *(x.astype(np.float64) for x in pair))[0][0])
            assert float(found[k - 1]) == pytest.approx(np.mean(values), rel=2e-5)  # float32


def test_other_losses_need_a_frozen_trunk():
    run = recipe("tiny")
    assert isinstance(replace(run, trunk="there", head_loss="tv"), RunConfig)
    with pytest.raises(ConfigError, match="^head_loss='kl' compares heads with a frozen trunk"):
        replace(run, head_loss="kl")
