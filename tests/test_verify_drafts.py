"""Acceptance of drafts: greedy by hand; sampled tokens follow the target's distribution."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.ops.verify_drafts import accept, probabilities

W = 6
DRAWS = 40_000
# Each bound on a share of DRAWS independent draws fails by chance with probability under 1e-9.
FALSE_ALARM = 1e-9


def within(shares, law, draws=DRAWS):
    """Whether chance allows the distance between shares and law, half the sum of differences.

    By Jensen its mean is under half the sum of sqrt(p (1 - p) / n). A draw moves it by 1 / n at
    most, so McDiarmid's inequality bounds how far it is over its mean.
    """
    mean = np.sqrt(law * (1 - law) / draws).sum() / 2
    bound = mean + math.sqrt(math.log(1 / FALSE_ALARM) / (2 * draws))
    assert bound < 0.12  # wrong laws are farther away
    return np.abs(shares - law).sum() / 2 < bound


@partial(jax.jit, static_argnames=("sampling", "certain"))
def drawn(p_logits, q, key, sampling, certain=False):
    """DRAWS rounds of two drafts, as in decoding: (drafts, how many are accepted, tokens)."""
    draw, decide = jax.random.split(key)
    drafts = jax.random.categorical(draw, jnp.log(q), axis=-1, shape=(DRAWS, 2)).astype(jnp.int32)
    rows, logits = (jnp.broadcast_to(x, (DRAWS, *x.shape)) for x in (q, p_logits))
    return drafts, *accept(
        drafts, None if certain else rows, logits, jax.random.split(decide, (DRAWS, 3)), sampling
    )


def laws(case, sampling):
    """(logits [3, W] of the target, p [3, W], q [2, W])."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 1.5, (3, W)).astype(np.float32)
    p = np.array([oracles.sampling_probs(row, **sampling._asdict()) for row in logits])
    if case == "other":
        others = rng.normal(0, 1.5, (2, W))
        q = np.array([oracles.sampling_probs(row, **sampling._asdict()) for row in others])
    elif case == "certain":
        q = np.eye(W)[[2, 5]]
    else:
        q = p[:2]
    return logits, p, q


@pytest.mark.parametrize(
    "case, sampling",
    [
        ("other", Sampling(1.0)),
        ("certain", Sampling(0.7, top_k=4)),
        ("same", Sampling(1.3, top_p=0.8)),
    ],
)
def test_sampled_tokens_follow_the_target(case, sampling):
    logits, p, q = laws(case, sampling)
    args = (
        jnp.asarray(logits),
        jnp.asarray(q, jnp.float32),
        jax.random.key(5),
        sampling,
        case == "certain",
    )
    drafts, count, tokens = map(np.asarray, drawn(*args))
    np.testing.assert_allclose(probabilities(jnp.asarray(logits), sampling), p, atol=1e-6)

    # Accepted with probability min(1, p / q): sum of min(p, q); the second only after the first.
    first, second = np.minimum(p[:2], q).sum(-1)
    wanted = np.array([1 - first, first * (1 - second), first * second])
    shares = np.bincount(count, minlength=3) / DRAWS
    assert within(shares, wanted)
    assert case != "same" or (count == 2).all()

    # Accepted drafts are in the text.
    accepted = np.arange(2)[None] < count[:, None]
    np.testing.assert_array_equal(tokens[:, :2][accepted], drafts[accepted])

    # The first token follows p, and so does each later one if the drafts before it were accepted.
    for position in range(3):
        chosen = tokens[count >= position, position]
        if len(chosen) > DRAWS / 20:
            shares = np.bincount(chosen, minlength=W) / len(chosen)
            assert within(shares, p[position], len(chosen))
            assert (shares[p[position] == 0] == 0).all()
