"""Chunked cross-entropy against the log-softmax of all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import scratch_bytes, value_and_gradients

from dsv3_jax.kernels.xla.by_memory import log_sums_in_one_pass
from dsv3_jax.ops.cross_entropy import chunked_cross_entropy, token_scores


@pytest.mark.parametrize("n, chunk, log_sums", [(23, 8, None), (5, 8, log_sums_in_one_pass)])
def test_value_and_gradients_equal_log_softmax(x64, rng, n, chunk, log_sums):
    """Chunks that do not divide n, and one longer than n. Masked rows may hold huge values."""
    h, w = rng.standard_normal((n, 6)), rng.standard_normal((6, 11))
    mask = np.arange(n) % 3 > 0
    h[~mask] *= 1e20
    best = np.argmax(h @ w, axis=1)
    targets = np.argsort(h @ w, axis=1)[:, -2].astype(np.int32)  # near misses ...
    targets[::2] = best[::2]  # ... and right answers
    num_correct = (mask & (best == targets)).sum()

    def ours(h, w, mask):
        how = dict(chunk=chunk, log_sums=log_sums)
        return chunked_cross_entropy(h, w, jnp.asarray(targets), mask, **how)

    def theirs(h, w):
        logp = jax.nn.log_softmax(jnp.where(mask[:, None], h, 0) @ w, axis=-1)
        of_targets = jnp.take_along_axis(logp, jnp.asarray(targets)[:, None], axis=-1)[:, 0]
        return jnp.where(mask, -of_targets, 0.0).sum()

    correct = jax.jit(ours)(h, w, mask)[1]
    got = value_and_gradients(lambda *arrays: ours(*arrays)[0], 3.0, h, w, mask)
    want = value_and_gradients(theirs, 3.0, h, w)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12)
    for of_ours, of_theirs in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(of_ours, of_theirs, atol=1e-12)
    assert int(correct) == num_correct > 0
    assert jax.jit(ours)(h, w, np.zeros_like(mask)) == (0, 0)


def test_the_logits_never_exist_at_once():
    """Compiled, not run: scratch memory of value and gradients stays far below [n,W] float32."""
    n, d, w = 8192, 16, 4096
    targets, mask = jnp.zeros(n, jnp.int32), jnp.ones(n, bool)
    loss = lambda h, w: chunked_cross_entropy(h, w, targets, mask, chunk=256)[0]  # noqa: E731
    both = jax.value_and_grad(loss, argnums=(0, 1))
    assert scratch_bytes(both, (n, d), (d, w), dtype=jnp.bfloat16) < n * w * 4 / 4


def test_a_temperature_divides_the_logits_and_not_what_they_are_made_of(rng):
    """In bfloat16, to float32 rounding: rounding h / 0.7 again would be 1e-2 nats away."""
    shapes = (23, 6), (6, 11)
    h, w = (jnp.asarray(4 * rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    targets = jnp.asarray(rng.integers(0, 11, 23), jnp.int32)
    logits = np.asarray(h, np.float64) @ np.asarray(w, np.float64) / 0.7
    probs = np.array([oracles.softmax_probs(row) for row in logits])

    how = dict(temperature=0.7, chunk=8)
    nats, best = token_scores(h, w, targets, **how)
    score = lambda h: token_scores(h, w, targets, **how)[0]  # noqa: E731
    (grad,) = value_and_gradients(score, 1.0, h)[1]
    np.testing.assert_allclose(nats, -np.log(probs[np.arange(23), targets]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(best, logits.argmax(axis=1))
    slope = (probs - np.eye(11)[targets]) / 0.7 @ np.asarray(w, np.float64).T
    # of bfloat16
    np.testing.assert_allclose(np.asarray(grad, np.float64), slope, atol=1e-2 * np.abs(slope).max())
