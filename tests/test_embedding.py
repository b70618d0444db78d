"""Rows of the embedding table, and the gradient that adds them in one order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.xla.in_order import look_up_in_order
from dsv3_jax.mesh import sharding
from dsv3_jax.ops import embedding


def gradient(look_up, table, tokens, d_rows):
    @jax.jit
    def run(table, tokens, d_rows):
        return jax.vjp(lambda table: look_up(table, tokens), table)[1](d_rows)[0]

    return run(table, tokens, d_rows)


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
    args = jnp.asarray(table), jnp.asarray(tokens, jnp.int32), jnp.asarray(d_rows)
    for look_up in (embedding.look_up, look_up_in_order):
        np.testing.assert_array_equal(look_up(*args[:2]), table[np.minimum(tokens, 10)])
        # at most 900 rows of a token
        np.testing.assert_allclose(gradient(look_up, *args), want, atol=1e-13)


def test_devices_add_up_their_rows(x64, rng):
    """On a mesh each device sums its tokens' rows, and the table's gradient is the sum of all."""
    table = jnp.asarray(rng.standard_normal((11, 4)))
    tokens = jnp.asarray(rng.integers(0, 11, (8, 5)), jnp.int32)
    d_rows = jnp.asarray(rng.standard_normal((8, 5, 4)))

    def spread(table, tokens):
        look_up = lambda *a: ((), look_up_in_order(*a))  # noqa: E731
        return sharding.shard_map_over_batch(look_up, (table,), tokens)[1]

    with sharding.use_mesh(sharding.make_mesh(data=4)):
        got = gradient(spread, table, tokens, d_rows)
    np.testing.assert_allclose(got, gradient(embedding.look_up, table, tokens, d_rows), atol=1e-13)
