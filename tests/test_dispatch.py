"""Every dispatch backend equals the oracle, in which each expert computes each token."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models import needs_cpp, value_and_gradients
from runs import assert_bitwise, assert_near

from dsv3_jax.kernels.cpu import calls, expert_loops
from dsv3_jax.kernels.cpu.experts import grouped_swiglu
from dsv3_jax.kernels.xla.by_row import decode_by_row
from dsv3_jax.kernels.xla.count_by_expert import count_by_expert
from dsv3_jax.kernels.xla.row_blocks import ROW_BLOCKS
from dsv3_jax.ops import dispatch
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
