"""The kernels of attention to a latent cache that wait for a chip equal the op. Pallas interprets them on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.choose import Target
from dsv3_jax.ops.cached_attention import Stored, cached_attention
from dsv3_jax.ops.quantize import dequantize_rows, quantize_rows
from experiments.accel.kernels import gpu_latent_attention as gpu
from experiments.accel.kernels.packed import Packed
from experiments.accel.kernels.tpu_latent_attention import latent_attention as tpu_kernel

pytestmark = pytest.mark.rare

# sequences, tokens a step, heads, widths, width of a packed row, slots, rows of a block (TPU) or shares of a sequence's
# rows (GPU)
TPU_SHAPE = 3, 3, 4, (32, 16), 128, 80, 32
GPU_SHAPE = 2, 2, 4, (32, 16), 48, 96, 2
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8, "float8": jnp.float8_e4m3fn}


def drawn(rng, shape, dtype, q_dtype):
    """(q, the packed cache of two layers with garbage in free slots, last rows, the op's result in float32)."""
    batch, tokens, heads, parts, width, capacity, _ = shape
    rows = rng.standard_normal((2, batch, 1, capacity, sum(parts))).astype(np.float32)
    rows[..., : parts[0]] *= 2
    lengths = rng.integers(1, capacity - tokens, batch)
    lengths[0] = capacity - tokens
    last = jnp.asarray(np.repeat(lengths[:, None] + np.arange(tokens), heads, axis=1).astype(np.int32))
    arrays = [Stored(jnp.asarray(x).astype(dtype), None) for x in np.split(rows, [parts[0]], axis=-1)]
    if jnp.dtype(dtype).itemsize == 1:
        arrays = [Stored(*quantize_rows(jnp.asarray(x), dtype)) for x in np.split(rows, [parts[0]], axis=-1)]
    packed = jnp.concatenate([x.rows for x in arrays], axis=-1)
    packed = jnp.pad(packed, [(0, 0)] * 4 + [(0, width - sum(parts))])
    scales = None if arrays[0].scales is None else jnp.concatenate([x.scales for x in arrays], axis=-1)
    q = jnp.asarray(rng.standard_normal((batch, 1, tokens * heads, sum(parts))), q_dtype)
    keys, rounded, scale = [jax.tree.map(lambda y: y[1], x) for x in arrays], q, 0.1
    if q_dtype == jnp.bfloat16:  # a GPU's kernel rounds scaled queries, and rows of 8 bits
        rounded, scale = (q.astype(jnp.float32) * (0.1 * np.log2(np.e))).astype(q_dtype), float(np.log(2))
        wide = [x.rows if x.scales is None else dequantize_rows(*x, jnp.float32) for x in keys]
        keys = [Stored(x.astype(q_dtype).astype(jnp.float32), None) for x in wide]
    queries = jnp.split(rounded.astype(jnp.float32), [parts[0]], axis=-1)
    want = jax.jit(partial(cached_attention, scale=scale))(queries, keys, keys[0], last)
    return q, Packed(packed, scales), last, want


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tpu_kernel_equals_the_op(rng, dtype):
    """In float32: unit roundoff 6e-8, softmax weights that add up to 1, values of about 2, sums of 600 products."""
    parts, block = TPU_SHAPE[3], TPU_SHAPE[6]
    q, stored, last, want = drawn(rng, TPU_SHAPE, DTYPES[dtype], jnp.float32)
    run = partial(tpu_kernel, parts=parts, scale=0.1, block=block, interpret=True)
    np.testing.assert_allclose(jax.jit(run)(q, stored, jnp.ones((), jnp.int32), last), want, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8"])
def test_the_gpu_kernel_equals_the_op(rng, dtype):
    """Weights, shares and the output are rounded to bfloat16, 2^-9 of each; values are about 4."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if why := gpu.why_not(Target("cuda")):
        pytest.skip(why)
    parts, splits = GPU_SHAPE[3], GPU_SHAPE[6]
    q, stored, last, want = drawn(rng, GPU_SHAPE, DTYPES[dtype], jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        run = partial(gpu.latent_attention, parts=parts, scale=0.1, splits=splits)
        got = jax.jit(run)(q, stored, jnp.ones((), jnp.int32), last)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=6 * 2.0**-8, rtol=2.0**-7)
