"""The vocabulary: chunked cross-entropy against the log-softmax of all logits, and embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import scratch_bytes, value_and_gradients

from dsv3_jax import reference
from dsv3_jax.kernels.xla.by_memory import log_sums_in_one_pass
from dsv3_jax.kernels.xla.in_order import look_up_in_order
from dsv3_jax.mesh import sharding
from dsv3_jax.ops import embedding
from dsv3_jax.ops.cross_entropy import chunked_cross_entropy, token_scores


@pytest.mark.parametrize("n, chunk, log_sums", [(23, 8, None), (5, 8, log_sums_in_one_pass)])
def test_value_and_gradients_equal_log_softmax(x64, rng, n, chunk, log_sums):
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
    probs = reference.softmax(logits, np)

    how = dict(temperature=0.7, chunk=8)
    nats, best = token_scores(h, w, targets, **how)
    score = lambda h: token_scores(h, w, targets, **how)[0]  # noqa: E731
    (grad,) = value_and_gradients(score, 1.0, h)[1]
    np.testing.assert_allclose(nats, -np.log(probs[np.arange(23), targets]), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(best, logits.argmax(axis=1))
    slope = (probs - np.eye(11)[targets]) / 0.7 @ np.asarray(w, np.float64).T
    # of bfloat16
    np.testing.assert_allclose(np.asarray(grad, np.float64), slope, atol=1e-2 * np.abs(slope).max())


# Rows of the embedding table, and the gradient that adds them in one order


@pytest.mark.parametrize("shape", [(1, 1), (64, 8), (100, 9)], ids=str)
def test_rows_and_gradient_are_those_of_a_sum_by_token(x64, rng, shape):
    """Tokens that fill blocks, come once, or never; ids out of range are clipped, as usual."""
    table = rng.standard_normal((11, 4))
    tokens = rng.integers(0, 7, shape)
    tokens.flat[0], tokens.flat[-1] = 10, 12
    d_rows = rng.standard_normal((*shape, 4))
    want = np.zeros_like(table)
    for token, row in zip(np.minimum(tokens, 10).ravel(), d_rows.reshape(-1, 4), strict=True):
        want[token] += row
    args = jnp.asarray(table), jnp.asarray(tokens, jnp.int32)
    for look_up in (embedding.look_up, look_up_in_order):
        rows, (gradient,) = value_and_gradients(look_up, d_rows, *args)
        np.testing.assert_array_equal(rows, table[np.minimum(tokens, 10)])
        np.testing.assert_allclose(gradient, want, atol=1e-13)  # at most 900 rows of a token


def test_devices_add_up_their_rows(x64, rng):
    table = jnp.asarray(rng.standard_normal((11, 4)))
    tokens = jnp.asarray(rng.integers(0, 11, (8, 5)), jnp.int32)
    d_rows = rng.standard_normal((8, 5, 4))

    def spread(table, tokens):
        look_up = lambda *a: ((), look_up_in_order(*a))  # noqa: E731
        return sharding.shard_map_over_batch(look_up, tokens)(table, tokens)[1]

    want = value_and_gradients(embedding.look_up, d_rows, table, tokens)
    with sharding.use_mesh(sharding.make_mesh(data=4)):
        got = value_and_gradients(spread, d_rows, table, tokens)
    np.testing.assert_allclose(got[1][0], want[1][0], atol=1e-13)
