"""Chunked cross-entropy against the log-softmax of all logits at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

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
        nats, correct = chunked_cross_entropy(
            h, w, jnp.asarray(targets), mask, chunk=chunk, log_sums=log_sums
        )
        return 3.0 * nats, correct

    def theirs(h, w):
        logp = jax.nn.log_softmax(jnp.where(mask[:, None], h, 0) @ w, axis=-1)
        of_targets = jnp.take_along_axis(logp, jnp.asarray(targets)[:, None], axis=-1)[:, 0]
        return 3.0 * jnp.where(mask, -of_targets, 0.0).sum()

    run = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))
    (value, correct), grads = run(h, w, mask)
    expected, expected_grads = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1)))(h, w)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    assert int(correct) == num_correct > 0
    assert run(h, w, np.zeros_like(mask))[0] == (0, 0)


def test_the_logits_never_exist_at_once():
    """Compiled, not run: scratch memory of value and gradients stays far below [n,W] float32."""
    n, d, w = 8192, 16, 4096

    def loss(h, w, targets, mask):
        return chunked_cross_entropy(h, w, targets, mask, chunk=256)[0]

    shapes = ((n, d), jnp.bfloat16), ((d, w), jnp.bfloat16), ((n,), jnp.int32), ((n,), jnp.bool_)
    args = [jax.ShapeDtypeStruct(*of) for of in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * w * 4 / 4


def test_a_temperature_divides_the_logits_and_not_what_they_are_made_of(rng):
    """In bfloat16, to float32 rounding: rounding h / 0.7 again would be 1e-2 nats away."""
    h, w = (
        jnp.asarray(4 * rng.standard_normal(shape), jnp.bfloat16) for shape in ((23, 6), (6, 11))
    )
    targets = jnp.asarray(rng.integers(0, 11, 23), jnp.int32)
    logits = np.asarray(h, np.float64) @ np.asarray(w, np.float64) / 0.7
    probs = np.array([oracles.softmax_probs(row) for row in logits])

    def ours(h):
        nats = token_scores(h, w, targets, temperature=0.7, chunk=8)[0]
        return nats.sum(), nats

    grad, nats = jax.jit(jax.grad(ours, has_aux=True))(h)
    np.testing.assert_allclose(nats, -np.log(probs[np.arange(23), targets]), rtol=1e-5, atol=1e-5)
    slope = (probs - np.eye(11)[targets]) / 0.7 @ np.asarray(w, np.float64).T
    # of bfloat16
    np.testing.assert_allclose(np.asarray(grad, np.float64), slope, atol=1e-2 * np.abs(slope).max())


def test_token_scores_keep_the_order_of_tokens(x64, rng):
    h = rng.standard_normal((23, 6))
    w = rng.standard_normal((6, 11))
    targets = rng.integers(0, 11, 23, np.int32)
    nats, best = jax.jit(partial(token_scores, chunk=8))(h, w, targets)
    expected = [
        -np.log(oracles.softmax_probs(row)[t]) for row, t in zip(h @ w, targets, strict=True)
    ]
    np.testing.assert_allclose(nats, expected, rtol=1e-12)
    np.testing.assert_array_equal(best, np.argmax(h @ w, axis=1))
