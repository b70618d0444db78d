"""Our own kernels of attention to a latent cache equal the op. Pallas interprets them on the CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import Execution
from dsv3_jax.kernels.choose import Target, prepare
from dsv3_jax.kernels.gpu import latent_attention as gpu
from dsv3_jax.kernels.tpu.latent_attention import latent_attention as tpu_kernel
from dsv3_jax.ops.cached_attention import Stored, cached_attention, scaled
from dsv3_jax.ops.quantize import dequantize_rows, quantize_rows

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("light_compiles")]

SHAPES = {  # sequences, tokens a step, heads, parts, width of a stored row, slots, rows of a block
    "tiny, drafts": (3, 3, 4, (32, 16), 128, 80, 32),  # the last block ends beyond the cache
    "V3": (2, 1, 16, (512, 64), 640, 320, 128),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8, "float8": jnp.float8_e4m3fn}


def make_cache(rng, shape, dtype):
    """(queries, the cache of two layers with garbage in free slots, the last row that each query sees)."""
    batch, tokens, heads, parts, width, capacity = (SHAPES | GPU_SHAPES)[shape][:6]
    rows = rng.standard_normal((2, batch, 1, capacity, sum(parts))).astype(np.float32)
    rows[..., : parts[0]] *= 2
    lengths = rng.integers(1, capacity - tokens, batch)
    lengths[0] = capacity - tokens
    stored = Stored(jnp.asarray(rows).astype(dtype), None)
    if jnp.dtype(dtype).itemsize == 1:
        stored = Stored(*quantize_rows(jnp.asarray(rows), parts, dtype))
    padded = jnp.pad(stored.rows, [(0, 0)] * 4 + [(0, width - sum(parts))])
    q = jnp.asarray(rng.standard_normal((batch, 1, tokens * heads, sum(parts))), jnp.float32)
    last = np.repeat(lengths[:, None] + np.arange(tokens), heads, axis=1).astype(np.int32)
    return q, stored._replace(rows=padded), jnp.asarray(last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tpu_kernel_equals_the_op(rng, shape, dtype):
    """In float32: unit roundoff 6e-8, softmax weights that add up to 1, values of about 2, sums of 600 products."""
    parts, block = SHAPES[shape][3], SHAPES[shape][6]
    q, stored, last = make_cache(rng, shape, DTYPES[dtype])
    layer, how = jnp.ones((), jnp.int32), dict(parts=parts, shared=True, scale=0.1)
    got = jax.jit(partial(tpu_kernel, block=block, interpret=True, **how))(q, stored, layer, last)
    want = cached_attention(q, stored, layer, last, **how)
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=1e-5)


GPU_SHAPES = {  # the same, and shares of each sequence's rows
    "tiny, drafts, on GPUs": (2, 2, 4, (32, 16), 48, 96, 2),  # the last block overlaps the one before
    "V3, two tiles of queries, on GPUs": (2, 1, 70, (512, 64), 576, 192, 3),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8"])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_the_gpu_kernel_equals_the_op(rng, shape, dtype):
    """With queries and rows rounded to bfloat16 beforehand, only weights, shares and the output are rounded.

    The unit roundoff is 2^-9, and values are about 4.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if why := gpu.why_not(Target("cuda")):
        pytest.skip(why)
    parts, splits = GPU_SHAPES[shape][3], GPU_SHAPES[shape][6]
    q, stored, last = make_cache(rng, shape, DTYPES[dtype])
    q, layer, how = q.astype(jnp.bfloat16), jnp.ones((), jnp.int32), dict(parts=parts, shared=True, scale=0.1)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.jit(partial(gpu.latent_attention, splits=splits, **how))(q, stored, layer, last)
    rounded = scaled(q, 0.1 * np.log2(np.e)).astype(jnp.float32)
    if stored.scales is not None:
        stored = Stored(dequantize_rows(*stored, parts, jnp.float32).astype(jnp.bfloat16), None)
    want = cached_attention(rounded, stored, layer, last, parts=parts, shared=True, scale=float(np.log(2)))
    assert got.shape == want.shape and got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=4 * 2.0**-8, rtol=2.0**-7)


def test_own_kernels_run_by_name_only():
    for platform, name in (("cuda", "pallas_gpu"), ("tpu", "pallas_tpu")):
        assert Target(platform).rows("cached_attention")[0].name == "xla"
        forced = Target(platform, f"cached_attention={name}")
        assert forced.rows("cached_attention")[0].name == name


def test_a_chip_that_is_no_hopper_is_refused_in_words():
    assert "Hopper" in gpu.why_not(Target("cuda", chip="8.0")) and "8.0" in gpu.why_not(Target("cuda", chip="8.0"))
    with pytest.raises(ValueError, match="cached_attention=pallas_gpu.*Hopper.*10.0"):
        prepare(Execution(kernels="cached_attention=pallas_gpu"), platform="cuda", chip="10.0")
