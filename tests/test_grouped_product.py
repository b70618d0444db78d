"""Grouped products: every backend equals the obvious loop over groups, forward and in both gradients.

Kernels for accelerators run in Pallas' interpret modes, which are slow: a few small shapes each.
"""

import re
import warnings
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.kernels.choose import Target
from dsv3_jax.kernels.gpu import grouped_product as gpu
from dsv3_jax.kernels.tpu import grouped_product as tpu
from dsv3_jax.ops import dispatch
from dsv3_jax.ops import grouped_product as ops
from dsv3_jax.ops.grouped_product import GroupedProduct
from dsv3_jax.planning import devices

XLA = {b.name: b for b in (ops.RAGGED_DOT, ops.ROW_BLOCKS)}
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
    ends = np.cumsum(counts)
    for g, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
        y[start:end] = x[start:end] @ w[g]
    dy = np.sin(y)
    for g, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
        dx[start:end] = dy[start:end] @ w[g].T
        dw[g] = x[start:end].T @ dy[start:end]
    return y, dx, dw


def draw(rng, m, k, n, groups, dtype=jnp.float32):
    """x and w, of which the results are about 1."""
    x, w = rng.standard_normal((m, k)), rng.standard_normal((groups, k, n)) / np.sqrt(k)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype)


def check(backend, x, w, counts, tolerance):
    """Compare a backend's three products, to a part of the largest value of each. Rows of no group are undefined."""
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


@pytest.mark.parametrize("size", [1, 3, 64])
def test_blocks_cover_each_row_once(rng, size):
    """Whatever the counts, the number of blocks that is known beforehand is enough."""
    for counts in [*COUNTS.values(), *rng.multinomial(50, rng.dirichlet(np.ones(6), 5)).tolist()]:
        blocks, seen = ops.row_blocks(jnp.asarray(counts, jnp.int32), 50, size), [[] for _ in counts]
        for group, start, left in zip(*(np.asarray(a) for a in blocks), strict=True):
            seen[group] += range(start, start + max(min(left, size), 0))
        assert seen == [list(range(e - n, e)) for e, n in zip(np.cumsum(counts), counts, strict=True)]


@pytest.mark.parametrize("backend", XLA)
def test_sums_of_bfloat16_are_accumulated_in_float32(rng, backend):
    """4,096 products of ones: a sum in bfloat16 would stop at 256. The gradient reaches float32 without rounding."""
    backend, counts = XLA[backend], jnp.asarray([4099, 0], jnp.int32)
    ones = lambda *shape: jnp.ones(shape, jnp.bfloat16)  # noqa: E731
    y = backend.forward(ones(32, 4096), ones(2, 4096, 8), jnp.asarray([30, 2], jnp.int32))
    assert y.dtype == jnp.bfloat16 and (y == 4096).all()
    dw = backend.dw(ones(4099, 8), ones(4099, 8), counts, jnp.float32)
    assert dw.dtype == jnp.float32 and (dw[0] == 4099).all() and (dw[1] == 0).all()


# Kernels of accelerators


@contextmanager
def gpu_interpreter():
    """Mosaic GPU kernels run on the CPU."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("this JAX has no interpret mode for kernels of GPUs")
    with plgpu.force_gpu_interpret_mode():
        yield


@contextmanager
def tpu_interpreter():
    """Pallas kernels for TPUs run on the CPU."""
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode():
        yield


KERNELS = {
    "mosaic": (gpu.MOSAIC, gpu_interpreter),
    "megablox": (tpu.MEGABLOX, tpu_interpreter),
}
SMALL_COUNTS = {
    "uneven": [70, 0, 3, 100],
    "one has all": [0, 192, 0, 0],
    "rows of no group": [1, 0, 128, 0],
}


@pytest.mark.long
@pytest.mark.parametrize("counts", SMALL_COUNTS.values(), ids=SMALL_COUNTS)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_a_loop_over_groups(rng, name, counts):
    """bfloat16's unit roundoff is 0.004: dy is rounded, and each result is."""
    backend, interpreter = KERNELS[name]
    with interpreter():
        check(backend, *draw(rng, 192, 128, 128, 4, jnp.bfloat16), counts, 0.01)


def test_mosaic_says_where_it_cannot_run(monkeypatch):
    assert gpu.why_not(Target("cuda", chip="9.0a")) == ""
    assert gpu.why_not(Target("cuda", chip="10.0")).endswith("9.0 (H100, H200), and the chip has 10.0")
    monkeypatch.setattr(gpu, "_kernels", lambda: 1 / 0)
    assert gpu.why_not(Target("cuda", chip="9.0")).startswith("this JAX does not have its grouped products (ZeroDiv")


def test_tiles_fit_in_vmem():
    """Two buffers of x, w and y, and a sum in float32."""
    for k, n in ((7168, 4096), (1408, 2048), (128, 256), (16384, 7168)):
        rows, contracted, columns = tpu.tiles(k, n)
        assert k % contracted == 0 and n % columns == 0
        assert 4 * (rows * contracted + contracted * columns + rows * columns) + 4 * rows * columns <= tpu.VMEM


def test_rows_are_padded_to_what_a_backend_wants(x64, rng):
    wanted = []

    def forward(x, w, counts):
        wanted.append(x.shape[0])
        return ops.ragged_dot(x, w, counts)

    backend = GroupedProduct("padded", forward, ops.ragged_dot_dx, ops.ragged_dot_dw, row_multiple=32)
    x, ids = jnp.asarray(rng.standard_normal((25, 5))), jnp.asarray(rng.integers(0, 3, (25, 2)), jnp.int32)
    weights = [jnp.asarray(rng.standard_normal((3, *shape))) for shape in ((5, 4), (5, 4), (4, 5))]
    args = x, ids, jnp.ones((25, 2)), *weights
    got, expected = (dispatch.grouped_swiglu(*args, product=p) for p in (backend, ops.RAGGED_DOT))
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert set(wanted) == {64}


# Programs compiled for chips that are not here

TOKENS, DIM, WIDTH, EXPERTS = 512, 256, 128, 8
# An instruction that writes one matrix of all of a layer's experts.
A_LAYER = rf" = bf16\[(1,)?{EXPERTS},({DIM},{WIDTH}|{WIDTH},{DIM})\]\S* (copy|transpose|slice|dynamic-slice|fusion)\("


def compiled_for(target, function, few=False):
    """The program of a function of (x, ids, gates, *weights), and its temporary bytes."""
    if not hasattr(devices, "target_mesh"):
        pytest.skip("this version does not compile for GPUs that are not here")
    try:
        mesh = devices.target_mesh(target, {"data": 1})
    except ConfigError as error:
        pytest.skip(str(error))
    n, dtype = (8, jnp.bfloat16) if few else (TOKENS, jnp.float32)
    shapes = [((n, DIM), jnp.bfloat16), ((n, 2), jnp.int32), ((n, 2), jnp.bfloat16)]
    shapes += [((EXPERTS, *s), dtype) for s in ((DIM, WIDTH), (DIM, WIDTH), (WIDTH, DIM))]
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
    # Libraries' kernels promote, and warn, as they like.
    promote = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with warnings.catch_warnings(), promote[0], promote[1]:
        warnings.simplefilter("ignore")
        program = jax.jit(function).lower(*arrays).compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes


def trained(product):
    def gradient(x, ids, gates, *weights):
        def loss(x, gates, weights):
            return dispatch.grouped_swiglu(x, ids, gates, *weights, product=product).astype(jnp.float32).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(x, gates, weights)

    return gradient


def kernels_in(text):
    return text.count('custom_call_target="mosaic_gpu') + text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.long
def test_training_on_an_h100_is_six_kernels():
    text, _ = compiled_for("gpu:h100", trained(gpu.MOSAIC))
    assert kernels_in(text) == 6 and " while(" not in text and " dot(" not in text
    assert not re.search(rf" = bf16\[(1,)?{EXPERTS},\S* (copy|transpose)\(", text)  # of a layer's experts


@pytest.mark.long
def test_decoding_on_an_h100_copies_no_weights():
    text, temporary = compiled_for("gpu:h100", dispatch.decode_by_row, few=True)
    assert kernels_in(text) == 0 and " while(" not in text
    assert temporary < DIM * WIDTH * 2  # bytes of one matrix of one expert


@pytest.mark.long
@pytest.mark.parametrize("target", ["tpu:v5p:1x1x1", "tpu:v6e:1x1"])
def test_a_tpu_copies_no_weights_to_decode_and_transposes_fewer_to_train(target):
    text, _ = compiled_for(target, partial(dispatch.grouped_swiglu, product=tpu.RAGGED_DOT), few=True)
    assert kernels_in(text) >= 3 and " while(" not in text and not re.search(A_LAYER, text)
    experts = rf" = bf16\[(1,)?{EXPERTS},\S*\{{(2,)?[123],[123],\S* copy\("
    by_xla, by_megablox = (compiled_for(target, trained(product))[0] for product in (tpu.RAGGED_DOT, tpu.MEGABLOX))
    assert len(re.findall(experts, by_megablox)) < len(re.findall(experts, by_xla)) and kernels_in(by_megablox) >= 9
