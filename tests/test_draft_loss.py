"""Losses of heads on a frozen trunk, KL and total variation, against NumPy; what they measure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import DENSE, LIGHT, forward, random_model, tokens_of
from oracles import softmax_probs

from dsv3_jax.config import replace
from dsv3_jax.ops.draft_loss import distance, summed_distance
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.ops.verify_drafts import accept
from dsv3_jax.training.loss import compute_loss


def by_hand(kind, target, drafter):
    """(distances, gradients by the drafter's logits), in float64, token by token."""
    values, gradients = [], []
    for p, q in zip(map(softmax_probs, target), map(softmax_probs, drafter), strict=True):
        if kind == "kl":
            values.append((p * np.log(p / q)).sum())
            gradients.append(q - p)
        else:
            values.append(np.abs(p - q).sum() / 2)
            s = np.where(p > q, -1.0, 0.0)
            gradients.append(q * (s - (q * s).sum()))
    return np.array(values), np.array(gradients)


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_the_sum_in_chunks_is_the_masked_sum_and_leaves_the_target_alone(x64, rng, kind):
    h, own, w = (jnp.asarray(rng.normal(size=shape)) for shape in ((10, 4), (10, 4), (4, 9)))
    mask = jnp.asarray(rng.integers(2, size=10) == 1)
    total = jax.jit(lambda h, own: summed_distance(h, own, w, mask, kind, chunk=3))
    values, gradients = by_hand(kind, np.asarray(own @ w), np.asarray(h @ w))
    assert float(total(h, own)) == pytest.approx(values[np.asarray(mask)].sum(), rel=1e-12)
    of_h, of_own = jax.grad(total, argnums=(0, 1))(h, own)
    gradients *= np.asarray(mask)[:, None]
    np.testing.assert_allclose(of_h, gradients @ np.asarray(w).T, atol=1e-13)
    assert not of_own.any()
    # the minimum is p itself
    assert abs(total(own, own)) < 1e-14 and abs(jax.grad(total)(own, own)).max() < 1e-14


def test_one_less_tv_is_the_acceptance_of_speculative_sampling(rng):
    """Over independent drafts; a share of n deviates by at most 1 / (2 √n), and 6 of them pass."""
    draws = 40_000
    p, q = map(softmax_probs, rng.normal(0, 1.5, (2, 6)))
    drafts = jnp.asarray(rng.choice(6, size=(draws, 1), p=q), jnp.int32)
    law = jnp.broadcast_to(jnp.asarray(q, jnp.float32), (draws, 1, 6))
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (draws, 2, 6))
    keys = jax.random.split(jax.random.key(0), (draws, 2))
    share = float(jax.jit(lambda: accept(drafts, law, logits, keys, Sampling(1.0))[0].mean())())
    logs = jnp.log(jnp.asarray(p)), jnp.log(jnp.asarray(q))
    kl, tv = (float(distance(*logs, kind)) for kind in ("kl", "tv"))
    assert abs(share - (1 - tv)) < 6 / (2 * draws**0.5) < 0.03 and 0.2 < tv < 0.8
    assert tv**2 <= kl / 2  # Pinsker's inequality


@pytest.mark.long
def test_heads_are_compared_with_the_trunk_at_the_position_before_their_token():
    """By the complete model's logits: head k's at i, the trunk's at i + k, of one document."""
    model = random_model(replace(LIGHT, mtp_depth=2), execution=DENSE)
    tokens = tokens_of(LIGHT, 2, 9)
    segment_ids = jnp.asarray([[1] * 9, [1] * 5 + [2] * 4], jnp.int32)
    positions = jnp.asarray([[*range(9)], [*range(5), *range(4)]], jnp.int32)
    out = forward(model, tokens, segment_ids, positions)
    batch = {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}
    for kind in ("kl", "tv"):
        found = jax.jit(lambda kind=kind: compute_loss(model, batch, None, head_loss=kind).mtp)()
        for k in (1, 2):
            same = segment_ids[:, : 8 - k] == segment_ids[:, k + 1 :]
            target, drafter = out.logits[:, k:8][same], out.mtp_logits[k - 1][:, : 8 - k][same]
            values, _ = by_hand(kind, np.float64(target), np.float64(drafter))
            assert float(found[k - 1]) == pytest.approx(np.mean(values), rel=2e-5)  # float32
