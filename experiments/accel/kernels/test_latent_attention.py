"""The kernel of attention to latents equals the op, by Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dispatch import gpu_interpreter

from dsv3_jax.kernels.choose import Target
from dsv3_jax.ops.cached_attention import Stored, cached_attention
from experiments.accel.kernels.gpu_latent_attention import latent_attention, why_not

PARTS, TOKENS, HEADS, SLOTS = (32, 16), 2, 4, 96


@pytest.mark.rare
def test_the_kernel_equals_the_op():
    """Queries, weights, shares and output are rounded to bfloat16, 2^-9 of values of about 2.

    The cache has garbage in free slots.
    """
    if why := why_not(Target("cuda")):
        pytest.skip(why)
    rng = np.random.default_rng(0)
    lengths = np.array([SLOTS - TOKENS, 1, 50])
    last = np.repeat(lengths[:, None] + np.arange(TOKENS), HEADS, axis=1).astype(np.int32)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal((3, 1, *shape)), jnp.bfloat16)

    rows = [Stored(draw(SLOTS, width), None) for width in PARTS]
    queries = [draw(TOKENS * HEADS, width) for width in PARTS]
    with gpu_interpreter():
        got = jax.jit(partial(latent_attention, scale=0.1, splits=2))(queries, rows, rows[0], last)

    queries, rows = jax.tree.map(lambda x: x.astype(jnp.float32), (queries, rows))
    want = jax.jit(partial(cached_attention, scale=0.1))(queries, rows, rows[0], last)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=6 * 2.0**-8)
