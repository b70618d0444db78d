"""The kernel of index scores that waits for a chip chooses as the op, by Pallas' interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grouped_product import gpu_interpreter

from dsv3_jax.kernels.choose import Target
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.indexer import index_choose
from experiments.accel.kernels import gpu_sparse_attention as gpu

pytestmark = pytest.mark.rare


def test_the_gpu_kernel_chooses_as_the_op():
    """Whole numbers and scales of powers of two, so rounding changes no choice; many ties."""
    if why := gpu.why_not(Target("cuda")):
        pytest.skip(why)
    rng = np.random.default_rng(0)
    q, w, rows = (
        jnp.asarray(rng.integers(-2, 3, shape), jnp.bfloat16)
        for shape in ((2, 1, 16, 64), (2, 1, 16), (2, 1, 512, 64))
    )
    args = q, w, Stored(rows, None), jnp.array([[511], [90]])
    assert gpu.fits(*args)
    want = jax.jit(partial(index_choose, k=100))(*args)
    with gpu_interpreter():
        np.testing.assert_array_equal(
            jax.jit(partial(index_choose, k=100, score=gpu.index_scores))(*args), want
        )
