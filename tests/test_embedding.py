"""Rows of the embedding table, and the gradient that adds them in one order."""

import jax.numpy as jnp
import numpy as np
import pytest
from models import value_and_gradients

from dsv3_jax.kernels.xla.in_order import look_up_in_order
from dsv3_jax.mesh import sharding
from dsv3_jax.ops import embedding


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
    """On a mesh each device sums its tokens' rows, and the table's gradient is the sum of all."""
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
