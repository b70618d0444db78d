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
from dsv3_jax.kernels.gpu import hopper_products, tokamax_library
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


@pytest.mark.parametrize("size", [1, 3, 16, 64])
def test_blocks_cover_each_row_once(rng, size):
    """Whatever the counts, the number of blocks that is known beforehand is enough."""
    for counts in [*COUNTS.values(), *rng.multinomial(50, rng.dirichlet(np.ones(6), 20)).tolist()]:
        for c in (counts, *([[x] for x in counts] if size == 3 else [])):
            blocks = ops.row_blocks(jnp.asarray(c, jnp.int32), 50, size)
            seen = [[] for _ in c]
            for group, start, left in zip(*(np.asarray(a) for a in blocks), strict=True):
                seen[group] += range(start, start + max(min(left, size), 0))
            ends = np.cumsum(c)
            assert seen == [list(range(e - n, e)) for e, n in zip(ends, c, strict=True)]


def test_blocks_do_little_in_vain():
    for rows, groups in ((65536, 256), (49152, 64), (256, 64), (8, 256)):
        size = ops.block_size(rows, groups)
        blocks = ops.row_blocks(jnp.zeros(groups, jnp.int32), rows, size)
        assert blocks.group.size * size <= max(3 * rows, 16 * (min(rows, groups) + rows // 16))


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
    "hopper": (gpu.HOPPER_PRODUCTS, gpu_interpreter),
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
def test_kernels_equal_a_loop_over_groups(rng, monkeypatch, name, counts):
    """bfloat16's unit roundoff is 0.004: dy is rounded, and each result is."""
    monkeypatch.setattr(hopper_products, "CORES", 2)  # each takes several tiles, one after the other
    backend, interpreter = KERNELS[name]
    with interpreter():
        check(backend, *draw(rng, 192, 128, 128, 4, jnp.bfloat16), counts, 0.01)


@pytest.mark.long
def test_the_hopper_kernel_keeps_float32(rng, monkeypatch):
    """With few rows a block has 64, and several steps are in flight; dw leaves the kernel without a rounding."""
    monkeypatch.setattr(hopper_products, "CORES", 3)
    x, w = draw(rng, 128, 384, 128, 4, jnp.bfloat16)
    counts = jnp.asarray([0, 9, 1, 110], jnp.int32)
    dy = jnp.asarray(rng.standard_normal((128, 128)), jnp.bfloat16)
    with gpu_interpreter():
        y = jax.jit(gpu.hopper)(x, w, counts)
        dx = jax.jit(gpu.hopper_dx)(dy, w, counts)
        dw = jax.jit(partial(gpu.hopper_dw, dtype=jnp.float32))(x, dy, counts)
    wide = [np.asarray(a, np.float64) for a in (x, w, dy)]
    own = np.repeat(np.arange(4), counts)
    for i, g in enumerate(own):
        np.testing.assert_allclose(np.asarray(y[i], np.float64), wide[0][i] @ wide[1][g], atol=0.02)
        np.testing.assert_allclose(np.asarray(dx[i], np.float64), wide[1][g] @ wide[2][i], atol=0.02)
    for g in range(4):
        expected = wide[0][:120][own == g].T @ wide[2][:120][own == g]
        np.testing.assert_allclose(dw[g], expected, atol=1e-4)  # sums of up to 110 products in float32


@pytest.mark.parametrize("size", [64, 128])
def test_blocks_of_the_hopper_kernel_cover_each_row_once(rng, size):
    for counts in [[70, 0, 3, 100], [0, 256, 0, 0], [0] * 4, *rng.multinomial(256, np.ones(4) / 4, 20).tolist()]:
        blocks = hopper_products.blocks_of(jnp.asarray(counts, jnp.int32), 256, size, jnp.int32(8))
        used = int(blocks.used[0])
        assert used <= blocks.group.size
        seen = [[] for _ in counts]
        for group, start, low, high in zip(*(np.asarray(a)[:used] for a in blocks[:4]), strict=True):
            assert start % hopper_products.ALIGNED == 0 and 0 <= start <= 256 - size and 0 <= low < high <= size
            seen[group - 8] += range(start + low, start + high)
        ends = np.cumsum(counts)
        assert seen == [list(range(e - n, e)) for e, n in zip(ends, counts, strict=True)]


@pytest.mark.long
def test_tokamax_equals_a_loop_over_groups(rng):
    if why := tokamax_library.why_not(Target("cuda", chip="9.0")):
        pytest.skip(why)
    x, w = draw(rng, 192, 128, 128, 4, jnp.bfloat16)
    counts = SMALL_COUNTS["uneven"]
    with gpu_interpreter():
        y = jax.jit(gpu.TOKAMAX.forward)(x, w, jnp.asarray(counts, jnp.int32))
    np.testing.assert_allclose(np.asarray(y, np.float64)[:173], by_loop(x, w, np.asarray(counts))[0][:173], atol=0.05)


@pytest.mark.parametrize(
    "chip, sentence",
    [
        ("9.0", ""),
        ("9.0a", ""),
        ("10.0", "its grouped products need compute capability 9.0 (H100, H200), and the chip has 10.0"),
        ("", "its grouped products need compute capability 9.0 (H100, H200), and the chip is not known"),
    ],
)
def test_mosaic_says_where_it_cannot_run(chip, sentence):
    assert gpu.why_not(Target("cuda", chip=chip)) == sentence


def test_a_jax_without_the_kernels_is_said(monkeypatch):
    monkeypatch.setattr(gpu, "_kernels", lambda: 1 / 0)
    sentence = gpu.why_not(Target("cuda", chip="9.0"))
    assert sentence == "this JAX does not have its grouped products (ZeroDivisionError: division by zero)"


def test_tiles_fit_in_vmem():
    """Two buffers of x, w and y, and a sum in float32."""
    for k, n in ((7168, 4096), (2048, 7168), (2048, 2816), (1408, 2048), (128, 256), (16384, 7168)):
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
@pytest.mark.parametrize("product", [gpu.MOSAIC, gpu.HOPPER_PRODUCTS], ids=lambda p: p.name)
def test_training_on_an_h100_is_six_kernels(product):
    text, _ = compiled_for("gpu:h100", trained(product))
    assert kernels_in(text) == 6 and " while(" not in text and " dot(" not in text
    assert not re.search(rf" = bf16\[(1,)?{EXPERTS},\S* (copy|transpose)\(", text)  # of a layer's experts


@pytest.mark.long
def test_decoding_on_an_h100_copies_no_weights():
    text, temporary = compiled_for("gpu:h100", dispatch.decode_by_row, few=True)
    assert kernels_in(text) == 0 and " while(" not in text
    assert temporary < DIM * WIDTH * 2  # bytes of one matrix of one expert
    one_launch = partial(dispatch.grouped_swiglu, product=gpu.HOPPER_PRODUCTS)
    text, _ = compiled_for("gpu:h100", one_launch, few=True)
    assert kernels_in(text) == 3 and " while(" not in text and not re.search(A_LAYER, text)


@pytest.mark.long
@pytest.mark.parametrize("target", ["tpu:v5p:1x1x1", "tpu:v6e:1x1"])
def test_decoding_on_a_tpu_copies_no_weights(target):
    text, _ = compiled_for(target, partial(dispatch.grouped_swiglu, product=tpu.RAGGED_DOT), few=True)
    assert kernels_in(text) >= 3 and " while(" not in text and not re.search(A_LAYER, text)


@pytest.mark.long
@pytest.mark.parametrize("target", ["tpu:v5p:1x1x1", "tpu:v6e:1x1"])
def test_training_on_a_tpu_writes_no_expert_transposed(target):
    experts = rf" = bf16\[(1,)?{EXPERTS},\S*\{{(2,)?[123],[123],\S* copy\("
    text, _ = compiled_for(target, trained(tpu.RAGGED_DOT))
    with_copies = len(re.findall(experts, text))
    text, _ = compiled_for(target, trained(tpu.MEGABLOX))
    assert len(re.findall(experts, text)) < with_copies and kernels_in(text) >= 9
