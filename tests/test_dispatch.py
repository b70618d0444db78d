"""Every dispatch backend against the oracle in which each expert computes each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.ops import dispatch

BACKENDS = {name: partial(dispatch.routed_swiglu, backend=name) for name in ("blocks", "ragged_dot", "dense")}


def case(rng, choose, n=37, d=5, f=7, num_experts=6, k=2):
    """x, expert_ids, gates and the three weights; nothing divides anything. `choose` says which experts get tokens."""
    liking = {
        "any": [0.0] * num_experts,
        "some idle": [-99.0] + [0.0] * (num_experts - 3) + [-99.0, 0.0],
        "two take all": [0.0, 99.0] + [0.0] * (num_experts - 3) + [99.0],
        "uneven": [0.5 * e for e in range(num_experts)],
    }[choose]
    ids = np.argsort(-rng.gumbel(liking, size=(n, num_experts)), axis=1)[:, :k]
    shapes = ((n, d), (n, k), (num_experts, d, f), (num_experts, d, f), (num_experts, f, d))
    x, gates, w_gate, w_up, w_down = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    return x, jnp.asarray(ids, jnp.int32), gates, w_gate, w_up, w_down


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, weight, x, expert_ids, gates, *weights):
    """y, and the gradients of sum(weight * y) in x, gates and the three matrices."""

    def loss(x, gates, *weights):
        y = function(x, expert_ids, gates, *weights)
        return (weight * y).sum(), y

    (_, y), grads = jax.value_and_grad(loss, argnums=range(5), has_aux=True)(x, gates, *weights)
    return y, grads


def assert_equal(got, want, atol=1e-10):
    (y, grads), (expected, expected_grads) = got, want
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, expected, atol=atol)
    for name, g, e in zip(("x", "gates", "w_gate", "w_up", "w_down"), grads, expected_grads, strict=True):
        np.testing.assert_allclose(g, e, atol=atol, err_msg=f"gradient of {name}")


@pytest.mark.parametrize(
    "choose, sizes", [("any", {}), ("some idle", {}), ("two take all", {}), ("any", dict(n=1, d=4, f=3, k=1))]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_and_its_gradients_equal_dense(x64, rng, backend, choose, sizes):
    arrays = case(rng, choose, **sizes)
    weight = jnp.asarray(rng.standard_normal(arrays[0].shape))
    got = value_and_gradients(BACKENDS[backend], weight, *arrays)
    assert_equal(got, value_and_gradients(oracles.routed_swiglu_jnp, weight, *arrays))


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot"])
def test_many_rows_an_expert(x64, rng, backend):
    """More rows an expert than any block holds, so that a group spans blocks and a block ends inside it."""
    arrays = case(rng, "uneven", n=700, d=3, f=2, num_experts=3)
    weight = jnp.asarray(rng.standard_normal((700, 3)))
    got = value_and_gradients(BACKENDS[backend], weight, *arrays)
    assert_equal(got, value_and_gradients(oracles.routed_swiglu_jnp, weight, *arrays), atol=1e-9)  # sums of hundreds


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_keeps_its_dtype(rng, backend):
    x, ids, gates, *weights = case(rng, "any", n=9)
    low = [a.astype(jnp.bfloat16) for a in (x, *weights)]
    y = jax.jit(BACKENDS[backend])(low[0], ids, gates.astype(jnp.float32), *low[1:])
    assert y.dtype == jnp.bfloat16
    exact = oracles.routed_swiglu_jnp(x, ids, gates, *weights)
    # Three products, each rounded to 8 bits, of values whose size is about the largest of y.
    assert np.abs(y.astype(jnp.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_unknown_backend_is_refused(rng):
    with pytest.raises(ValueError, match="magic"):
        dispatch.routed_swiglu(*case(rng, "any"), backend="magic")


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_a_stack_in_a_scan(x64, rng, backend):
    """Two layers, one stack that the scan closes over: values, and each layer's part of the stack's gradient."""
    x, ids, gates, *_ = case(rng, "any")
    other_ids = case(rng, "some idle")[1]
    all_ids, all_gates = jnp.stack([ids, other_ids]), jnp.stack([gates, -gates])
    shapes = ((2, 6, 5, 7), (2, 6, 5, 7), (2, 6, 7, 5))
    stack = dispatch.Experts(*(jnp.asarray(0.3 * rng.standard_normal(shape)) for shape in shapes))

    @jax.jit
    def ours(x, all_gates, stack):
        def layer(carry, xs):
            y, thread = carry
            ids, gates, index = xs
            out, thread = dispatch.routed_swiglu_in_stack(y, ids, gates, stack, thread, index, backend=backend)
            return (y + out, thread), None

        (y, _), _ = jax.lax.scan(layer, (x, stack), (all_ids, all_gates, jnp.arange(2, dtype=jnp.int32)))
        return jnp.sin(y).sum()

    @jax.jit
    def theirs(x, all_gates, stack):
        for ids, gates, *weights in zip(all_ids, all_gates, *stack, strict=True):
            x = x + oracles.routed_swiglu_jnp(x, ids, gates, *weights)
        return jnp.sin(x).sum()

    got = jax.value_and_grad(ours, argnums=(0, 1, 2))(x, all_gates, stack)
    expected = jax.value_and_grad(theirs, argnums=(0, 1, 2))(x, all_gates, stack)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-10), got, expected)


@pytest.mark.parametrize("n, choose", [(1, "any"), (8, "any"), (8, "two take all")])
def test_few_tokens_equal_dense(x64, rng, n, choose):
    x, ids, gates, *weights = case(rng, choose, n=n)
    stack = dispatch.Experts(*(jnp.stack([jnp.full_like(w, jnp.nan), w]) for w in weights))  # only layer 1 is read
    expected = oracles.routed_swiglu_jnp(x, ids, gates, *weights)
    for rows in (None, 1, 3):
        y = jax.jit(dispatch.few_tokens_swiglu, static_argnames="rows")(
            x, ids, gates, stack, jnp.array(1, jnp.int32), rows=rows
        )
        np.testing.assert_allclose(y, expected, atol=1e-10)
    wide = dispatch.side_by_side(stack, 1)
    y = jax.jit(dispatch.wide_swiglu, static_argnums=4)(x, ids, gates, wide, stack.w_gate.shape[1])
    np.testing.assert_allclose(y, expected, atol=1e-10)


@pytest.fixture
def native_kernel():
    if why := calls.why_not():
        pytest.skip(why)
    return jax.jit(calls.few_tokens_swiglu)


@pytest.mark.parametrize("choose", ["any", "two take all"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("sizes", [{}, dict(d=128, f=80), dict(d=7, f=130)], ids=str)
def test_native_few_tokens_equal_dense(native_kernel, rng, n, choose, sizes):
    """In float32, whose unit roundoff is 6e-8: sums of at most 130 products."""
    x, ids, gates, *weights = (np.asarray(a) for a in case(rng, choose, n=n, **sizes))
    expected = oracles.routed_swiglu_jnp(x, ids, gates, *weights)
    stack = [np.stack([np.full_like(w, np.nan), w]) for w in weights]  # only layer 1 is read
    y = native_kernel(x, ids, gates, *stack, np.int32(1))
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    for i in range(0, n, 3):  # to the last bit the same without the others
        one = slice(i, i + 1)
        np.testing.assert_array_equal(native_kernel(x[one], ids[one], gates[one], *stack, np.int32(1))[0], y[i])


def test_native_kernel_refuses_what_is_not_there(native_kernel, rng):
    x, ids, gates, *weights = (np.asarray(a) for a in case(rng, "any", n=2))
    stack = [w[None] for w in weights]
    for wrong, layer in ((ids + 1000, 0), (ids - 1000, 0), (ids, 1), (ids, -1)):
        with pytest.raises(Exception, match="outside the stack"):
            jax.block_until_ready(native_kernel(x, wrong, gates, *stack, np.int32(layer)))


# capacity

CAPACITY = {factor: partial(dispatch.capacity_swiglu, factor=factor) for factor in (0.25, 1.0, 1.25, 3.0)}
CAPACITY_Y = {factor: lambda *a, f=f: f(*a)[0] for factor, f in CAPACITY.items()}


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25])
def test_capacity_drops_later_tokens(x64, rng, factor):
    """Values and gradients are those of the dense oracle whose gates are 0 where there was no room."""
    x, ids, gates, *weights = case(rng, "uneven")
    kept = oracles.within_capacity(ids, 6, factor)
    assert 0 < (~kept).sum() < kept.size  # the case drops some and keeps some
    weight = jnp.asarray(rng.standard_normal(x.shape))
    got = value_and_gradients(CAPACITY_Y[factor], weight, x, ids, gates, *weights)
    expected, (dx, d_gates, *d_weights) = value_and_gradients(
        oracles.routed_swiglu_jnp, weight, x, ids, jnp.where(kept, gates, 0.0), *weights
    )
    assert_equal(got, (expected, (dx, jnp.where(kept, d_gates, 0.0), *d_weights)))
    _, dropped = jax.jit(CAPACITY[factor])(x, ids, gates, *weights)
    assert dropped.dtype == jnp.float32
    assert dropped == pytest.approx(1 - kept.mean(), abs=1e-6)


def test_capacity_large_enough_is_dropless(x64, rng):
    """factor = E/K gives every expert room for all n tokens."""
    arrays = case(rng, "two take all")
    weight = jnp.asarray(rng.standard_normal(arrays[0].shape))
    got = value_and_gradients(CAPACITY_Y[3.0], weight, *arrays)
    assert_equal(got, value_and_gradients(BACKENDS["dense"], weight, *arrays))
    assert jax.jit(CAPACITY[3.0])(*arrays)[1] == 0


def test_capacity_when_two_experts_take_all(x64, rng):
    """Room for ceil(1.0 * 37 * 2 / 6) = 13 tokens at each of the two; the 24 after them pass by."""
    arrays = case(rng, "two take all")
    y, dropped = jax.jit(CAPACITY[1.0])(*arrays)
    assert dropped == pytest.approx(24 / 37, abs=1e-6)
    assert (y[13:] == 0).all()
    np.testing.assert_allclose(y[:13], oracles.routed_swiglu_jnp(*arrays)[:13], atol=1e-10)
