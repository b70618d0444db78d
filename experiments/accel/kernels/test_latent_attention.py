"""The kernels of attention to a latent cache that wait for a chip equal the op. Pallas interprets them on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.choose import Target
from dsv3_jax.ops.cached_attention import Stored, cached_attention
from dsv3_jax.ops.quantize import quantize_rows
from experiments.accel.kernels import gpu_latent_attention as gpu
from experiments.accel.kernels.packed import Packed
from experiments.accel.kernels.tpu_latent_attention import latent_attention as tpu_kernel

pytestmark = pytest.mark.rare
PARTS, TOKENS, HEADS, SLOTS = (32, 16), 2, 4, 96


def assert_equals_the_op(kernel, width, dtype, q_dtype, atol):
    """`width`: of a packed row. The cache has two layers, and garbage in free slots."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 3, 1, SLOTS, sum(PARTS))).astype(np.float32)
    lengths = np.array([SLOTS - TOKENS, 1, 50])
    last = jnp.asarray(np.repeat(lengths[:, None] + np.arange(TOKENS), HEADS, axis=1).astype(np.int32))
    arrays = [jnp.asarray(x) for x in np.split(rows, [PARTS[0]], axis=-1)]
    if dtype == jnp.int8:
        arrays = [Stored(*quantize_rows(x, dtype)) for x in arrays]
        scales = jnp.concatenate([x.scales for x in arrays], axis=-1)
    else:
        arrays, scales = [Stored(x.astype(dtype), None) for x in arrays], None
    packed = jnp.concatenate([x.rows for x in arrays], axis=-1)
    packed = jnp.pad(packed, [(0, 0)] * 4 + [(0, width - sum(PARTS))])
    q = jnp.asarray(rng.standard_normal((3, 1, TOKENS * HEADS, sum(PARTS))), q_dtype)
    got = jax.jit(kernel)(q, Packed(packed, scales), jnp.ones((), jnp.int32), last)
    queries = jnp.split(q.astype(jnp.float32), [PARTS[0]], axis=-1)
    keys = [Stored(x.rows[1].astype(jnp.float32), None if scales is None else x.scales[1]) for x in arrays]
    want = jax.jit(partial(cached_attention, scale=0.1))(queries, keys, keys[0], last)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=atol)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_the_tpu_kernel_equals_the_op(dtype):
    """In float32: unit roundoff 6e-8, softmax weights that add up to 1, values of about 1, sums of 600 products."""
    kernel = partial(tpu_kernel, parts=PARTS, scale=0.1, block=32, interpret=True)
    assert_equals_the_op(kernel, 128, dtype, jnp.float32, atol=1e-5)


def test_the_gpu_kernel_equals_the_op():
    """Queries, weights, shares and the output are rounded to bfloat16, 2^-9 of each; values are about 2."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if why := gpu.why_not(Target("cuda")):
        pytest.skip(why)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        kernel = partial(gpu.latent_attention, parts=PARTS, scale=0.1, splits=2)
        assert_equals_the_op(kernel, sum(PARTS), jnp.bfloat16, jnp.bfloat16, atol=6 * 2.0**-8)
