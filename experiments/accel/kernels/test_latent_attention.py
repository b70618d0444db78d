"""The kernels of attention to latents that wait for a chip equal the op, by Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grouped_product import gpu_interpreter, tpu_interpreter

from dsv3_jax.kernels.choose import Target
from dsv3_jax.ops.cached_attention import Stored, cached_attention
from dsv3_jax.ops.quantize import quantize_rows
from experiments.accel.kernels import gpu_latent_attention as gpu
from experiments.accel.kernels.tpu_latent_attention import latent_attention as tpu_kernel

pytestmark = pytest.mark.rare
PARTS, TOKENS, HEADS, SLOTS = (32, 16), 2, 4, 96


def assert_equals_the_op(kernel, dtype, q_dtype, atol):
    """The cache has garbage in free slots."""
    rng = np.random.default_rng(0)
    lengths = np.array([SLOTS - TOKENS, 1, 50])
    last = jnp.asarray(
        np.repeat(lengths[:, None] + np.arange(TOKENS), HEADS, axis=1).astype(np.int32)
    )
    rows = [jnp.asarray(rng.standard_normal((3, 1, SLOTS, width)), jnp.float32) for width in PARTS]
    of_dtype = [
        Stored(*quantize_rows(x, dtype)) if dtype == jnp.int8 else Stored(x.astype(dtype), None)
        for x in rows
    ]
    queries = [
        jnp.asarray(rng.standard_normal((3, 1, TOKENS * HEADS, width)), q_dtype) for width in PARTS
    ]
    got = jax.jit(kernel)(queries, of_dtype, of_dtype[0], last)
    wide = [Stored(x.rows.astype(jnp.float32), x.scales) for x in of_dtype]
    want = jax.jit(partial(cached_attention, scale=0.1))(
        [q.astype(jnp.float32) for q in queries], wide, wide[0], last
    )
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=atol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_the_tpu_kernel_equals_the_op(dtype):
    """In float32: unit roundoff 6e-8, weights that add up to 1, values of about 1, sums of 600."""
    with tpu_interpreter():
        assert_equals_the_op(
            partial(tpu_kernel, scale=0.1, block=32), dtype, jnp.float32, atol=1e-5
        )


def test_the_gpu_kernel_equals_the_op():
    """Queries, weights, shares and output are rounded to bfloat16, 2^-9 of values of about 2."""
    if why := gpu.why_not(Target("cuda")):
        pytest.skip(why)
    with gpu_interpreter():
        kernel = partial(gpu.latent_attention, scale=0.1, splits=2)
        assert_equals_the_op(kernel, jnp.bfloat16, jnp.bfloat16, atol=6 * 2.0**-8)
