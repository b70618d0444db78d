"""Grouped products: every backend equals the loop over groups, forward and in both gradients.

Kernels for accelerators run in Pallas' interpret modes, which are slow: one small shape each.
"""

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
COUNTS = {
    "uneven": [13, 0, 29, 1, 0, 7],
    "one has all": [0, 0, 50, 0, 0, 0],
    "first and last": [1, 0, 0, 0, 0, 49],
    "rows of no group": [5, 0, 11, 0, 2, 0],
    "no rows at all": [0, 0, 0, 0, 0, 0],
}


def by_loop(x, w, counts):
    """(y, dx and dw for dy = sin(y)) in float64, one group after the other."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros_like(x), np.zeros_like(w)
    for g, end in enumerate(np.cumsum(counts)):
        rows = slice(end - counts[g], end)
        y[rows] = x[rows] @ w[g]
        dy = np.sin(y[rows])
        dx[rows], dw[g] = dy @ w[g].T, x[rows].T @ dy
    return y, dx, dw


def draw(rng, m, k, n, groups, dtype=jnp.float32):
    """x and w, of which the results are about 1."""
    x, w = rng.standard_normal((m, k)), rng.standard_normal((groups, k, n)) / np.sqrt(k)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def check(backend, x, w, counts, tolerance):
    """Compare a backend's three products, by the largest; rows of no group are undefined."""
    y, dx, dw = by_loop(x, w, np.asarray(counts))
    rows, counts = sum(counts), jnp.asarray(counts, jnp.int32)
    x = jnp.pad(x, ((0, -len(x) % backend.row_multiple), (0, 0)))
    own_y = jax.jit(backend.forward)(x, w, counts)
    dy = jnp.where((jnp.arange(len(x)) < rows)[:, None], jnp.sin(own_y), 0)
    own_dx = jax.jit(backend.dx)(dy, w, counts)
    own_dw = jax.jit(backend.dw, static_argnums=3)(x, dy, counts, w.dtype)
    found = ("y", own_y[:rows], y[:rows]), ("dx", own_dx[:rows], dx[:rows]), ("dw", own_dw, dw)
    for name, got, expected in found:
        assert got.dtype == x.dtype
        atol = tolerance * max(1, np.abs(expected).max(initial=0))
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=atol, err_msg=name)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("backend", XLA)
def test_backends_of_xla_equal_a_loop_over_groups(x64, rng, backend, counts):
    check(XLA[backend], *draw(rng, 50, 5, 7, 6, jnp.float64), counts, 1e-12)


@pytest.mark.parametrize("size", [3, 64])
def test_blocks_cover_each_row_once(rng, size):
    """Whatever the counts, the number of blocks that is known beforehand is enough."""
    for counts in [*COUNTS.values(), *rng.multinomial(50, rng.dirichlet(np.ones(6), 5)).tolist()]:
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


@contextmanager
def tpu_interpreter():
    """Pallas kernels for TPUs run on the CPU, copies as late as they may. A race raises."""
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


@pytest.mark.long
def test_megablox_equals_a_loop_over_groups(rng):
    """bfloat16's unit roundoff is 0.004: dy and results are rounded. 19 rows are of no group."""
    with tpu_interpreter():
        check(tpu.MEGABLOX, *draw(rng, 192, 128, 128, 4, jnp.bfloat16), [70, 0, 3, 100], 0.01)


def test_mosaic_says_where_it_cannot_run(monkeypatch):
    with_a, h100, newer = (Target("cuda", chip=chip) for chip in ("9.0a", "9.0", "10.0"))
    assert gpu.why_not(with_a) == ""
    assert gpu.why_not(newer).endswith("9.0 (H100, H200), and the chip has 10.0")
    monkeypatch.setattr(gpu, "_kernels", lambda: 1 / 0)
    assert gpu.why_not(h100).startswith("this JAX does not have its grouped products (ZeroDiv")


def test_tiles_fit_in_vmem():
    """Two buffers of x, w and y, and a sum in float32."""
    for k, n in ((7168, 4096), (1408, 2048), (128, 256), (16384, 7168)):
        rows, contracted, columns = tpu.tiles(k, n)
        assert k % contracted == 0 and n % columns == 0
        tiles = rows * contracted + contracted * columns + rows * columns
        assert 4 * tiles + 4 * rows * columns <= tpu.VMEM


def test_rows_are_padded_to_what_a_backend_wants(rng):
    wanted = []

    def forward(x, w, counts):
        wanted.append(x.shape[0])
        return ops.ragged_dot(x, w, counts)

    product = replace(ops.RAGGED_DOT, forward=forward, row_multiple=32)
    jax.eval_shape(partial(dispatch.grouped_swiglu, product=product), *case(rng, "any", n=25))
    assert set(wanted) == {64}
