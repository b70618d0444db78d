"""Sampling has exact supports and frequencies; accepted and rejected drafts follow the target."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.ops import sampling
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.ops.verify_drafts import accept, probabilities

FILTERS = [
    dict(temperature=1.0),
    dict(temperature=1.7, top_k=3),
    dict(temperature=1.0, top_p=0.6),
    dict(temperature=0.7, top_k=5, top_p=0.8),
    dict(temperature=1.0, top_k=1),
    dict(temperature=1.0, top_k=1000),  # more than the vocabulary has
    dict(temperature=1.0, top_p=1e-6),  # less than the probability of any token: still one
]


@pytest.mark.parametrize("filters", FILTERS)
def test_support_and_probabilities_are_exact(rng, filters):
    logits = rng.normal(0, 2, (40, 11)).astype(np.float32)
    got = jax.jit(partial(sampling.processed_logits, **filters))(jnp.asarray(logits))
    for row, processed in zip(logits, np.asarray(got), strict=True):
        assert set(np.flatnonzero(processed > -np.inf)) == oracles.support(row, **filters)
        probs = oracles.softmax_probs(processed.astype(np.float64))
        np.testing.assert_allclose(probs, oracles.sampling_probs(row, **filters), atol=1e-6)


@pytest.mark.parametrize("filters", [dict(top_k=2), dict(top_p=0.6)])
def test_tokens_that_equal_the_last_one_kept_are_kept(filters):
    """Two of these three would do; no order among equal ones is made up."""
    logits = jnp.log(jnp.array([0.1, 0.25, 0.4, 0.25]))
    kept = sampling.processed_logits(logits, temperature=1.0, **filters)
    np.testing.assert_array_equal(kept > -jnp.inf, [False, True, True, True])


# Each bound on a share of draws fails by chance with probability under 1e-9.
FALSE_ALARM = 1e-9
DRAWS = 40_000


def within(shares, law, draws=DRAWS):
    """Whether chance allows the distance between shares and law, half the sum of differences.

    By Jensen its mean is under half the sum of sqrt(p (1 - p) / n). A draw moves it by 1 / n at
    most, so McDiarmid's inequality bounds how far it is over its mean.
    """
    mean = np.sqrt(law * (1 - law) / draws).sum() / 2
    bound = mean + math.sqrt(math.log(1 / FALSE_ALARM) / (2 * draws))
    assert bound < 0.12  # wrong laws are farther away
    return np.abs(shares - law).sum() / 2 < bound and (shares[law == 0] == 0).all()


@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[3]])
def test_frequencies_follow_the_probabilities(filters):
    """A batch's rows are the draws."""
    row = np.array([1.0, 0.2, -0.5, 2.0, 0.0, -2.0, 1.5], np.float32)
    draw = jax.jit(partial(sampling.sample, **filters))
    drawn = draw(jnp.tile(row, (DRAWS, 1)), jax.random.key(3))
    shares = np.bincount(np.asarray(drawn), minlength=len(row)) / DRAWS
    assert within(shares, oracles.sampling_probs(row, **filters))


# acceptance of drafts

W = 6


@partial(jax.jit, static_argnames=("sampling", "certain"))
def drawn(p_logits, q, key, sampling, certain=False):
    """DRAWS rounds of two drafts, as in decoding: (drafts, how many are accepted, tokens)."""
    draw, decide = jax.random.split(key)
    drafts = jax.random.categorical(draw, jnp.log(q), axis=-1, shape=(DRAWS, 2)).astype(jnp.int32)
    rows, logits = (jnp.broadcast_to(x, (DRAWS, *x.shape)) for x in (q, p_logits))
    keys = jax.random.split(decide, (DRAWS, 3))
    return drafts, *accept(drafts, None if certain else rows, logits, keys, sampling)


CASES = {
    "other": Sampling(1.0),
    "certain": Sampling(0.7, top_k=4),
    "same": Sampling(1.3, top_p=0.8),
}


@pytest.mark.parametrize("case, sampling", CASES.items(), ids=CASES)
def test_sampled_tokens_follow_the_target(case, sampling):
    logits, others = np.random.default_rng(7).normal(0, 1.5, (2, 3, W)).astype(np.float32)
    p, q = (
        np.array([oracles.sampling_probs(row, **sampling._asdict()) for row in rows])
        for rows in (logits, others[:2])
    )
    q = {"other": q, "certain": np.eye(W)[[2, 5]], "same": p[:2]}[case]
    args = jnp.asarray(q, jnp.float32), jax.random.key(5), sampling, case == "certain"
    drafts, count, tokens = map(np.asarray, drawn(jnp.asarray(logits), *args))
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
