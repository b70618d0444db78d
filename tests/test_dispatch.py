"""Every dispatch backend equals the oracle, in which each expert computes each token."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import needs_cpp, value_and_gradients
from runs import assert_bitwise, assert_near

from dsv3_jax.kernels.choose import Target
from dsv3_jax.kernels.cpu import calls, expert_loops
from dsv3_jax.kernels.cpu.experts import grouped_swiglu
from dsv3_jax.kernels.gpu import grouped_product as gpu
from dsv3_jax.kernels.tpu import grouped_product as tpu
from dsv3_jax.kernels.xla.by_row import decode_by_row
from dsv3_jax.kernels.xla.count_by_expert import count_by_expert
from dsv3_jax.kernels.xla.row_blocks import ROW_BLOCKS, row_blocks
from dsv3_jax.ops import dispatch
from dsv3_jax.ops import grouped_product as ops
from dsv3_jax.ops.sort_by_expert import sort_by_expert

BACKENDS = {
    "blocks": expert_loops.grouped_swiglu,
    "ragged_dot": partial(dispatch.grouped_swiglu, complete=True),
    "row_blocks": partial(dispatch.grouped_swiglu, product=ROW_BLOCKS),
    "dense": dispatch.dense_swiglu,
}


def case(rng, choose, n=37, d=5, f=7, num_experts=6, k=2):
    """Return x, expert_ids, gates and the three weights; `choose` says which experts get tokens."""
    preference = {
        "any": [0.0] * num_experts,
        "two take all": [0.0, 99.0] + [0.0] * (num_experts - 3) + [99.0],
        "uneven": [0.5 * e for e in range(num_experts)],
    }[choose]
    ids = np.argsort(-rng.gumbel(preference, size=(n, num_experts)), axis=1)[:, :k]
    shapes = ((n, d), (n, k), (num_experts, d, f), (num_experts, d, f), (num_experts, f, d))
    x, gates, *weights = (rng.standard_normal(shape) for shape in shapes)
    return x, ids.astype(np.int32), gates, *weights


def on_one_device(held, x, ids, gates, *weights):
    """(The oracle's arrays, a device's with the first `held` experts, which choices are of these).

    A choice of another expert has id -1 in the oracle. On the device it has id `held` and gate 0.
    """
    here, own = ids < held, [w[:held] for w in weights]
    gates = np.where(here, gates, 0.0)
    return (x, np.where(here, ids, -1), gates, *own), (x, np.minimum(ids, held), gates, *own), here


@pytest.mark.parametrize(
    "choose, held, sizes",
    # rows of an expert span blocks, and end inside one
    [("two take all", 6, {}), ("uneven", 2, dict(n=700, d=3, f=2, num_experts=3))],
    ids=["few rows", "many rows, some of experts elsewhere"],
)
def test_backends_and_their_gradients_equal_dense(x64, rng, choose, held, sizes):
    known, arrays, here = on_one_device(held, *case(rng, choose, **sizes))
    weight = rng.standard_normal(known[0].shape)
    want = value_and_gradients(oracles.routed_swiglu_jnp, weight, *known)
    for backend in BACKENDS.values():
        y, (dx, d_gates, *rest) = value_and_gradients(backend, weight, *arrays)
        got = y, (dx, np.where(here, d_gates, 0.0), *rest)
        chex.assert_trees_all_close(got, want, rtol=0, atol=1e-9)  # hundreds of terms


DECODING = (
    dispatch.decode_experts,
    partial(dispatch.decode_experts, rows=3),  # in a loop over three rows
    decode_by_row,
    BACKENDS["row_blocks"],
)
dense = jax.jit(oracles.routed_swiglu_jnp)


@pytest.mark.parametrize(
    "n, choose, held", [(1, "any", 6), (8, "two take all", 4), (8, "uneven", 5)]
)
def test_few_tokens_equal_dense(x64, rng, n, choose, held):
    known, arrays, _ = on_one_device(held, *case(rng, choose, n=n))
    for decode in DECODING:
        np.testing.assert_allclose(jax.jit(decode)(*arrays), dense(*known), atol=1e-10)


def test_counting_equals_sorting(rng):
    ids = jnp.asarray(rng.integers(0, 7, (9, 3)))  # 6: of another device
    jax.tree.map(np.testing.assert_array_equal, count_by_expert(ids, 6), sort_by_expert(ids, 6))


@pytest.mark.parametrize("factor, choose", [(0.25, "uneven"), (3.0, "two take all")])
def test_capacity_drops_later_tokens(x64, rng, factor, choose):
    """Values and gradients are the oracle's with a gate of 0 for assignments beyond the capacity.

    factor = E/K gives every expert capacity for all n tokens: nothing is dropped.
    """
    x, ids, gates, *weights = case(rng, choose)
    kept = oracles.within_capacity(ids, 6, factor)
    assert kept.all() if factor == 3 else 0 < (~kept).sum() < kept.size
    weight, ours = rng.standard_normal(x.shape), partial(dispatch.capacity_swiglu, factor=factor)
    got = value_and_gradients(lambda *arrays: ours(*arrays)[0], weight, x, ids, gates, *weights)
    expected, (dx, d_gates, *d_weights) = value_and_gradients(
        oracles.routed_swiglu_jnp, weight, x, ids, np.where(kept, gates, 0.0), *weights
    )
    want = expected, (dx, np.where(kept, d_gates, 0.0), *d_weights)
    chex.assert_trees_all_close(got, want, rtol=0, atol=1e-10)
    dropped = jax.jit(ours)(x, ids, gates, *weights)[1]
    assert dropped.dtype == np.float32 and dropped == pytest.approx(1 - kept.mean(), abs=1e-6)

    # Padding gets what other tokens leave, and is not counted as dropped.
    mask = np.arange(len(x)) % 3 > 0
    order = np.argsort(~mask, kind="stable")
    kept[order] = oracles.within_capacity(ids[order], 6, factor)
    expected = oracles.routed_swiglu_jnp(x, ids, np.where(kept, gates, 0.0), *weights)
    y, dropped = jax.jit(partial(ours, mask=jnp.asarray(mask)))(x, ids, gates, *weights)
    np.testing.assert_allclose(y, expected, atol=1e-10)
    assert dropped == pytest.approx(1 - kept[mask].mean(), abs=1e-6)


def test_a_capacity_is_counted_exactly():
    """1.1 · 100 / 10 is 11; in floating point it is a little more, which would make 12."""
    x, ids, weight = jnp.ones((100, 1)), jnp.zeros((100, 1), jnp.int32), jnp.ones((10, 1, 1))
    dropped = dispatch.capacity_swiglu(x, ids, x, weight, weight, weight, factor=1.1)[1]
    assert dropped == pytest.approx(0.89)


# C++, in float32, whose unit roundoff is 6e-8; the oracle is in float64

# Widths are below and above a register's 16 floats and a panel's 64. With n=900 an expert has more
# rows than a chunk's 256.
WIDTHS = {
    "one row": ("uneven", dict(n=1, d=4, f=3, k=1)),
    "panels": ("two take all", dict(n=90, d=130, f=81)),
    "chunks": ("uneven", dict(n=900, d=20, f=33, num_experts=3)),
    "wide": ("two take all", dict(n=12, d=1100, f=2, num_experts=3)),
}


def float32(arrays):
    return [jnp.asarray(a if a.dtype == np.int32 else a.astype(np.float32)) for a in arrays]


@needs_cpp
@pytest.mark.parametrize("choose, sizes", WIDTHS.values(), ids=WIDTHS)
def test_cpp_and_its_gradients_equal_dense(rng, choose, sizes):
    """In every run they are the same bits, although threads take the experts in any order."""
    arrays = float32(case(rng, choose, **sizes))
    (weight,) = float32([rng.standard_normal(arrays[0].shape)])
    ours, *again = (value_and_gradients(grouped_swiglu, weight, *arrays) for _ in range(6))
    with jax.enable_x64(True):
        wide = [a if a.dtype == jnp.int32 else a.astype(jnp.float64) for a in (weight, *arrays)]
        theirs = value_and_gradients(oracles.routed_swiglu_jnp, *wide)
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(ours))
    assert_near(ours, theirs)  # sums have at most 1,100 products
    for others in again:
        assert_bitwise(others, ours)


FEW = [(1, {}), (5, dict(d=128, f=80)), (40, dict(d=7, f=130))]


ALONE = [(calls.decode_experts, *few) for few in FEW] + [(grouped_swiglu, 200, dict(d=48, f=80))]


@needs_cpp
@pytest.mark.parametrize("function, n, sizes", ALONE)
def test_in_cpp_a_token_has_the_same_bits_without_other_tokens(rng, function, n, sizes):
    x, ids, gates, *weights = float32(case(rng, "uneven", n=n, **sizes))
    run = jax.jit(lambda *arrays: function(*arrays))
    y = run(x, ids, gates, *weights)
    assert_near(y, dense(x, ids, gates, *weights))
    for i in range(0, n, 3):
        one = slice(i, i + 1)
        np.testing.assert_array_equal(run(x[one], ids[one], gates[one], *weights)[0], y[i])


# Grouped products: blocks, sums and tiles

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
