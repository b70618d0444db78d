"""Every dispatch backend equals the oracle, in which each expert computes each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.kernels.cpu import calls, expert_loops, library
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
    """Return x, expert_ids, gates and the three weights, whose sizes do not divide each other.

    `choose` sets which experts get tokens.
    """
    preference = {
        "any": [0.0] * num_experts,
        "two take all": [0.0, 99.0] + [0.0] * (num_experts - 3) + [99.0],
        "uneven": [0.5 * e for e in range(num_experts)],
    }[choose]
    ids = np.argsort(-rng.gumbel(preference, size=(n, num_experts)), axis=1)[:, :k]
    shapes = ((n, d), (n, k), (num_experts, d, f), (num_experts, d, f), (num_experts, f, d))
    x, gates, *weights = (rng.standard_normal(shape) for shape in shapes)
    return x, ids.astype(np.int32), gates, *weights


def float32(array):
    return array if array.dtype == np.int32 else array.astype(np.float32)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, weight, x, expert_ids, gates, *weights):
    """Return y and the gradients of sum(weight * y) in x, gates and the three matrices."""

    def loss(x, gates, *weights):
        y = function(x, expert_ids, gates, *weights)
        return (weight * y).sum(), y

    (_, y), grads = jax.value_and_grad(loss, argnums=range(5), has_aux=True)(x, gates, *weights)
    return y, grads


def assert_equal(got, want, atol=1e-10):
    (y, grads), (expected, expected_grads) = got, want
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, expected, atol=atol)
    for name, g, e in zip(
        ("x", "gates", "w_gate", "w_up", "w_down"), grads, expected_grads, strict=True
    ):
        np.testing.assert_allclose(g, e, atol=atol, err_msg=f"gradient of {name}")


@pytest.mark.parametrize(
    "choose, sizes",
    [
        ("two take all", {}),
        # rows of an expert span blocks, and end inside one
        pytest.param("uneven", dict(n=700, d=3, f=2, num_experts=3), marks=pytest.mark.long),
    ],
    ids=["two take all", "many rows"],
)
def test_backends_and_their_gradients_equal_dense(x64, rng, choose, sizes):
    arrays = case(rng, choose, **sizes)
    weight = rng.standard_normal(arrays[0].shape)
    want = value_and_gradients(oracles.routed_swiglu_jnp, weight, *arrays)
    for backend in BACKENDS.values():
        # hundreds of terms
        assert_equal(value_and_gradients(backend, weight, *arrays), want, atol=1e-9)


DECODING = (
    dispatch.decode_experts,
    partial(dispatch.decode_experts, rows=3),  # in a loop over three rows
    decode_by_row,
    BACKENDS["row_blocks"],
)
dense = jax.jit(oracles.routed_swiglu_jnp)


@pytest.mark.parametrize("n, choose, held", [(1, "any", 6), (8, "two take all", 4)])
def test_few_tokens_equal_dense(x64, rng, n, choose, held):
    """Also where some experts are on another device: id E, gate 0."""
    x, ids, gates, *weights = case(rng, choose, n=n)
    here, own = ids < held, [w[:held] for w in weights]
    expected = dense(x, np.where(here, ids, -1), gates, *own)
    for decode in DECODING:
        y = jax.jit(decode)(x, np.where(here, ids, held), np.where(here, gates, 0.0), *own)
        np.testing.assert_allclose(y, expected, atol=1e-10)


def test_counting_equals_sorting(rng):
    ids = jnp.asarray(rng.integers(0, 7, (9, 3)))  # 6: of another device
    jax.tree.map(np.testing.assert_array_equal, count_by_expert(ids, 6), sort_by_expert(ids, 6))


def test_an_expert_that_is_elsewhere_adds_nothing(x64, rng):
    """Id E, gate 0: its rows come last and belong to no expert, in the gradients too."""
    x, ids, gates, *weights = case(rng, "any", n=8)
    here, held, weight = ids < 4, [w[:4] for w in weights], rng.standard_normal(x.shape)
    gates = np.where(here, gates, 0.0)
    want = value_and_gradients(
        oracles.routed_swiglu_jnp, weight, x, np.where(here, ids, -1), gates, *held
    )
    for backend in ("blocks", "ragged_dot", "row_blocks"):
        arrays = x, np.where(here, ids, 4), gates, *held
        y, (dx, d_gates, *rest) = value_and_gradients(BACKENDS[backend], weight, *arrays)
        assert_equal((y, (dx, np.where(here, d_gates, 0.0), *rest)), want)


@pytest.fixture
def native_kernel():
    """The C++ kernel `decode_experts`; the test is skipped if it cannot be compiled."""
    if why := library.why_not():
        pytest.skip(why)
    return jax.jit(calls.decode_experts)


@pytest.mark.parametrize("n, sizes", [(1, {}), (5, dict(d=128, f=80)), (40, dict(d=7, f=130))])
def test_decode_kernel_equals_dense(native_kernel, rng, n, sizes):
    """The kernel runs in float32, whose unit roundoff is 6e-8, and sums at most 130 products."""
    x, ids, gates, *weights = map(
        float32, case(rng, "two take all" if n > 5 else "any", n=n, **sizes)
    )
    expected = dense(x, ids, gates, *weights)
    y = native_kernel(x, ids, gates, *weights)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    for i in range(0, n, 3):  # bitwise the same without the other tokens
        one = slice(i, i + 1)
        np.testing.assert_array_equal(
            native_kernel(x[one], ids[one], gates[one], *weights)[0], y[i]
        )


@pytest.mark.parametrize("factor, choose", [(0.25, "uneven"), (3.0, "two take all")])
def test_capacity_drops_later_tokens(x64, rng, factor, choose):
    """Values and gradients are the oracle's with a gate of 0 for assignments beyond the capacity.

    factor = E/K gives every expert capacity for all n tokens: nothing is dropped.
    """
    x, ids, gates, *weights = case(rng, choose)
    kept = oracles.within_capacity(ids, 6, factor)
    assert kept.all() if factor == 3 else 0 < (~kept).sum() < kept.size
    weight, shares = rng.standard_normal(x.shape), []

    def ours(*args):
        y, dropped = dispatch.capacity_swiglu(*args, factor=factor)
        jax.debug.callback(shares.append, dropped)
        return y

    got = value_and_gradients(ours, weight, x, ids, gates, *weights)
    expected, (dx, d_gates, *d_weights) = value_and_gradients(
        oracles.routed_swiglu_jnp, weight, x, ids, np.where(kept, gates, 0.0), *weights
    )
    assert_equal(got, (expected, (dx, np.where(kept, d_gates, 0.0), *d_weights)))
    jax.effects_barrier()
    assert shares[0].dtype == np.float32 and shares[0] == pytest.approx(1 - kept.mean(), abs=1e-6)
