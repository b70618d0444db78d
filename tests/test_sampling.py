"""Sampling: exact supports, and frequencies within a bound that follows from the draws."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.ops import sampling

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
        np.testing.assert_allclose(
            oracles.softmax_probs(processed.astype(np.float64)),
            oracles.sampling_probs(row, **filters),
            atol=1e-6,
        )


@pytest.mark.parametrize("filters", [dict(top_k=2), dict(top_p=0.6)])
def test_tokens_that_equal_the_last_one_kept_are_kept(filters):
    """Two of these three would do; no order among equal ones is made up."""
    logits = jnp.log(jnp.array([0.1, 0.25, 0.4, 0.25]))
    kept = sampling.processed_logits(logits, temperature=1.0, **filters)
    np.testing.assert_array_equal(kept > -jnp.inf, [False, True, True, True])


@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[3]])
def test_frequencies_follow_the_probabilities(filters):
    """A batch's rows are the draws. By Hoeffding a right sampler fails with probability < 1e-9."""
    row, draws = np.array([1.0, 0.2, -0.5, 2.0, 0.0, -2.0, 1.5], np.float32), 20_000
    bound = math.sqrt(math.log(2 * len(row) / 1e-9) / (2 * draws))
    drawn = jax.jit(partial(sampling.sample, **filters))(
        jnp.tile(row, (draws, 1)), jax.random.key(3)
    )
    frequencies = np.bincount(np.asarray(drawn), minlength=len(row)) / draws
    expected = oracles.sampling_probs(row, **filters)
    assert np.abs(frequencies - expected).max() < bound
    assert (frequencies[expected == 0] == 0).all()
