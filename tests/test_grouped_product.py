"""Grouped products: blocks, sums and tiles. test_dispatch compares the backends of XLA."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dispatch import case

from dsv3_jax.kernels.choose import Target
from dsv3_jax.kernels.gpu import grouped_product as gpu
from dsv3_jax.kernels.tpu import grouped_product as tpu
from dsv3_jax.kernels.xla.row_blocks import ROW_BLOCKS, row_blocks
from dsv3_jax.ops import dispatch
from dsv3_jax.ops import grouped_product as ops

XLA = {b.name: b for b in (ops.RAGGED_DOT, ROW_BLOCKS)}
COUNTS = [[13, 0, 29, 1, 0, 7], [0, 0, 50, 0, 0, 0], [1, 0, 0, 0, 0, 49], [0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("size", [3, 64])
def test_blocks_cover_each_row_once(rng, size):
    """Whatever the counts, the number of blocks that is known beforehand is enough."""
    for counts in [*COUNTS, *rng.multinomial(50, rng.dirichlet(np.ones(6), 5)).tolist()]:
        blocks = row_blocks(jnp.asarray(counts, jnp.int32), 50, size)
        seen = [[] for _ in counts]
        for group, start, left in zip(*(np.asarray(a) for a in blocks), strict=True):
            seen[group] += range(start, start + max(min(left, size), 0))
        ends = zip(np.cumsum(counts), counts, strict=True)
        assert seen == [list(range(end - n, end)) for end, n in ends]


@pytest.mark.parametrize("backend", XLA)
def test_sums_of_bfloat16_are_accumulated_in_float32(rng, backend):
    """4,096 ones: a sum in bfloat16 would stop at 256. The gradient reaches float32 unrounded."""
    backend, counts = XLA[backend], jnp.asarray([4099, 0], jnp.int32)
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)  # noqa: E731
    y = backend.forward(ones(32, 4096), ones(2, 4096, 8), jnp.asarray([30, 2], jnp.int32))
    assert y.dtype == jnp.bfloat16 and (y == 4096).all()
    dw = backend.dw(ones(4099, 8), ones(4099, 8), counts, jnp.float32)
    assert dw.dtype == jnp.float32 and (dw[0] == 4099).all() and (dw[1] == 0).all()


# Kernels of accelerators


@contextmanager
def gpu_interpreter():
    """Mosaic GPU kernels run on the CPU. A race of two threads raises."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("this JAX has no interpret mode for kernels of GPUs")
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.long
def test_megabloxs_gradient_equals_a_loop_over_groups(rng):
    """Interpreted, with copies as late as they may be; a race raises. Some rows are of no group.

    bfloat16's unit roundoff is 0.004: the results are rounded.
    """
    from jax.experimental.pallas import tpu as pltpu

    counts = np.array([70, 0, 3, 100], np.int32)
    dy = jnp.asarray(rng.standard_normal((256, 128)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((4, 128, 128)) / np.sqrt(128), jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        dx = jax.jit(tpu.MEGABLOX.dx)(dy, w, jnp.asarray(counts))
    assert dx.dtype == jnp.bfloat16
    group = np.repeat(np.arange(4), counts)
    want = [np.float64(row) @ np.float64(w[g]).T for row, g in zip(dy, group, strict=False)]
    np.testing.assert_allclose(np.float64(dx[: len(group)]), want, atol=0.01 * np.abs(want).max())


def test_mosaic_says_where_it_cannot_run(monkeypatch):
    with_a, h100, newer = (Target("cuda", chip=chip) for chip in ("9.0a", "9.0", "10.0"))
    assert gpu.why_not(with_a) == ""
    assert gpu.why_not(newer).endswith("9.0 (H100, H200), and the chip has 10.0")
    monkeypatch.setattr(gpu, "_kernels", lambda: 1 / 0)
    assert gpu.why_not(h100).startswith("this JAX does not have its grouped products (ZeroDiv")


def test_rows_are_padded_to_what_a_backend_wants(rng):
    wanted = []

    def forward(x, w, counts):
        wanted.append(x.shape[0])
        return ops.ragged_dot(x, w, counts)

    product = replace(ops.RAGGED_DOT, forward=forward, row_multiple=32)
    jax.eval_shape(partial(dispatch.grouped_swiglu, product=product), *case(rng, "any", n=25))
    assert set(wanted) == {64}
