"""Every dispatch backend equals the oracle, in which each expert computes each token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.kernels.cpu import blocks, calls, library
from dsv3_jax.kernels.cpu import experts as cpu_experts
from dsv3_jax.ops import dispatch, grouped_product

BACKENDS = {
    "blocks": blocks.blocks_swiglu,
    "ragged_dot": dispatch.grouped_swiglu,
    "row_blocks": partial(dispatch.grouped_swiglu, product=grouped_product.ROW_BLOCKS),
    "dense": dispatch.dense_swiglu,
}


def case(rng, choose, n=37, d=5, f=7, num_experts=6, k=2):
    """Return x, expert_ids, gates and the three weights, whose sizes do not divide each other.

    `choose` sets which experts get tokens.
    """
    preference = {
        "any": [0.0] * num_experts,
        "some idle": [-99.0] + [0.0] * (num_experts - 3) + [-99.0, 0.0],
        "two take all": [0.0, 99.0] + [0.0] * (num_experts - 3) + [99.0],
        "uneven": [0.5 * e for e in range(num_experts)],
    }[choose]
    ids = np.argsort(-rng.gumbel(preference, size=(n, num_experts)), axis=1)[:, :k]
    shapes = ((n, d), (n, k), (num_experts, d, f), (num_experts, d, f), (num_experts, f, d))
    x, gates, w_gate, w_up, w_down = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)
    return x, jnp.asarray(ids, jnp.int32), gates, w_gate, w_up, w_down


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
    for name, g, e in zip(("x", "gates", "w_gate", "w_up", "w_down"), grads, expected_grads, strict=True):
        np.testing.assert_allclose(g, e, atol=atol, err_msg=f"gradient of {name}")


@pytest.mark.long
@pytest.mark.parametrize(
    "choose, sizes", [("any", {}), ("some idle", {}), ("two take all", {}), ("any", dict(n=1, d=4, f=3, k=1))]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_and_its_gradients_equal_dense(x64, rng, backend, choose, sizes):
    arrays = case(rng, choose, **sizes)
    weight = jnp.asarray(rng.standard_normal(arrays[0].shape))
    got = value_and_gradients(BACKENDS[backend], weight, *arrays)
    assert_equal(got, value_and_gradients(oracles.routed_swiglu_jnp, weight, *arrays))


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot", "row_blocks"])
def test_many_rows_for_each_expert(x64, rng, backend):
    """Experts have more rows than a block, so an expert's rows span several blocks and end inside one."""
    arrays = case(rng, "uneven", n=700, d=3, f=2, num_experts=3)
    weight = jnp.asarray(rng.standard_normal((700, 3)))
    got = value_and_gradients(BACKENDS[backend], weight, *arrays)
    assert_equal(got, value_and_gradients(oracles.routed_swiglu_jnp, weight, *arrays), atol=1e-9)  # hundreds of terms


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_keeps_its_dtype(rng, backend):
    x, ids, gates, *weights = case(rng, "any", n=9)
    low = [a.astype(jnp.bfloat16) for a in (x, *weights)]
    y = jax.jit(BACKENDS[backend])(low[0], ids, gates.astype(jnp.float32), *low[1:])
    assert y.dtype == jnp.bfloat16
    exact = oracles.routed_swiglu_jnp(x, ids, gates, *weights)
    # There are three products of values about as large as the largest of y, each rounded to 8 bits.
    assert np.abs(y.astype(jnp.float32) - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.parametrize("backend", [*BACKENDS, "cpu", "cpu under remat"])
def test_layers_in_a_scan_that_are_called_twice(rng, backend):
    """Gradients of a loop's layers, each called twice, are the oracle's; frozen experts change no other gradient."""
    run, remat = BACKENDS.get(backend, cpu_experts.grouped_swiglu), "remat" in backend
    if backend not in BACKENDS and (why := library.why_not()):
        pytest.skip(why)
    x, ids, gates, *_ = case(rng, "some idle")
    shapes = ((2, 6, 5, 7), (2, 6, 5, 7), (2, 6, 7, 5))
    x, gates, *weights = (
        jnp.asarray(a, jnp.float32) for a in (x, gates, *(0.1 * rng.standard_normal(shape) for shape in shapes))
    )

    def ours(x, gates, weights):
        def layer(x, w):
            for _ in range(2):
                x = x + run(x, ids, gates, *w)
            return x, None

        return jnp.sin(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, weights)[0]).sum()

    def theirs(x, gates, weights):
        for *layer, _ in zip(*weights, range(2), strict=True):
            for _ in range(2):
                x = x + oracles.routed_swiglu_jnp(x, ids, gates, *layer)
        return jnp.sin(x).sum()

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(x, gates, weights)
    frozen = jax.jit(jax.grad(ours, argnums=(0, 1)))(x, gates, weights)
    jax.tree.map(np.testing.assert_array_equal, frozen, got[1][:2])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, gates, weights))
        expected = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1, 2)))(*wide)
    # float32, whose unit roundoff is 6e-8, in sums of some hundred products
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=2e-5 * np.abs(e).max()), got, expected)


DECODING = {
    "a loop": dispatch.decode_experts,
    "a loop over rows": partial(dispatch.decode_experts, rows=1),
    "a loop over three rows": partial(dispatch.decode_experts, rows=3),
    "by_row": dispatch.decode_by_row,
    "row_blocks": partial(dispatch.grouped_swiglu, product=grouped_product.ROW_BLOCKS),
    "ragged_dot": partial(dispatch.grouped_swiglu, product=grouped_product.RAGGED_DOT),
}


@pytest.mark.parametrize("n, choose", [(1, "any"), (8, "any"), (8, "two take all")])
@pytest.mark.parametrize("decode", DECODING.values(), ids=DECODING)
def test_few_tokens_equal_dense(x64, rng, decode, n, choose):
    x, ids, gates, *weights = case(rng, choose, n=n)
    y = jax.jit(decode)(x, ids, gates, *weights)
    np.testing.assert_allclose(y, oracles.routed_swiglu_jnp(x, ids, gates, *weights), atol=1e-10)


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("backend", [*BACKENDS, *DECODING])
def test_an_expert_that_is_elsewhere_adds_nothing(x64, rng, backend, n):
    """Id E, gate 0: its rows come last and belong to no expert. Gradients too, where there are any."""
    if backend == "dense":
        pytest.skip("one_hot of an id beyond the last is all zeros")
    x, ids, gates, *weights = case(rng, "any", n=n)
    held = [w[:4] for w in weights]
    here = ids < 4
    there = jnp.where(here, ids, 4), jnp.where(here, gates, 0.0)
    expected = oracles.routed_swiglu_jnp(x, jnp.minimum(ids, 3), there[1], *held)
    if backend in DECODING:
        y = jax.jit(DECODING[backend])(x, *there, *held)
        np.testing.assert_allclose(y, expected, atol=1e-10)
        return
    weight = jnp.asarray(rng.standard_normal(x.shape))
    y, (dx, d_gates, *d_weights) = value_and_gradients(BACKENDS[backend], weight, x, *there, *held)
    np.testing.assert_allclose(y, expected, atol=1e-10)
    _, (dx_want, d_gates_want, *d_weights_want) = value_and_gradients(
        oracles.routed_swiglu_jnp, weight, x, jnp.minimum(ids, 3), there[1], *held
    )
    np.testing.assert_allclose(dx, dx_want, atol=1e-10)
    np.testing.assert_allclose(np.where(here, d_gates, 0), np.where(here, d_gates_want, 0), atol=1e-10)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=1e-10), d_weights, d_weights_want)


def counting(joins):
    """A backend and the shapes that its functions were called with."""
    calls = {"forward": [], "dx": [], "dw": []}

    def spied(name, function):
        def call(a, b, *args):
            calls[name].append((a.shape, b.shape, b.dtype.name))
            return function(a, b, *args)

        return call

    functions = (grouped_product.ragged_dot, grouped_product.ragged_dot_dx, grouped_product.ragged_dot_dw)
    spies = [spied(name, f) for name, f in zip(calls, functions, strict=True)]
    return grouped_product.GroupedProduct("spy", *spies, row_multiple=16, joins=joins), calls


def float32_experts_in_bfloat16(x, ids, gates, *weights, product):
    """(Value and gradients of one layer, its arguments): float32 parameters and bfloat16 tokens, as in training."""
    weights = tuple(w.astype(jnp.float32) for w in weights)

    def loss(x, gates, weights):
        return dispatch.grouped_swiglu(x, ids, gates, *weights, product=product).astype(jnp.float32).sum()

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    return gradient, (x.astype(jnp.bfloat16), gates.astype(jnp.float32), weights)


def test_gate_and_up_are_one_product_where_they_are_cast(rng):
    """Two products forward, and two of each gradient; nothing is computed twice. Experts have 5 x 7 numbers."""
    joined, calls = counting(joins=True)
    layer = case(rng, "any", n=9)
    gradient, arrays = float32_experts_in_bfloat16(*layer, product=joined)
    got = gradient(*arrays)
    rows = 32  # 18 assignments, padded
    assert calls["forward"] == [((rows, 5), (6, 5, 14), "bfloat16"), ((rows, 7), (6, 7, 5), "bfloat16")]
    assert calls["dx"] == [((rows, 5), (6, 7, 5), "bfloat16"), ((rows, 14), (6, 5, 14), "bfloat16")]
    assert calls["dw"] == [((rows, 5), (rows, 14), "bfloat16"), ((rows, 7), (rows, 5), "bfloat16")]
    apart, calls = counting(joins=False)
    gradient, arrays = float32_experts_in_bfloat16(*layer, product=apart)
    expected = gradient(*arrays)
    assert [len(made) for made in calls.values()] == [3, 3, 3]
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(g, np.float32), np.asarray(e, np.float32), rtol=0.02, atol=0.1)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("product", [grouped_product.RAGGED_DOT, grouped_product.ROW_BLOCKS], ids=lambda p: p.name)
def test_only_whole_numbers_are_added_by_scatter(rng, product):
    """So no two sums meet in an order that changes from run to run, forward or backward, and loops have a length."""
    gradient, arrays = float32_experts_in_bfloat16(*case(rng, "any", n=9), product=product)
    found = list(equations(jax.make_jaxpr(gradient)(*arrays).jaxpr))
    names = {e.primitive.name for e in found}
    assert "scatter-add" in names and "while" not in names  # the sort adds up the rows of each expert
    floats = [e for e in found if e.primitive.name == "scatter-add" and e.outvars[0].aval.dtype.kind != "i"]
    assert not floats, floats


@pytest.fixture
def native_kernel():
    """The C++ kernel `decode_experts`; the test is skipped if it cannot be compiled."""
    if why := library.why_not():
        pytest.skip(why)
    return jax.jit(calls.decode_experts)


@pytest.mark.parametrize("choose", ["any", "two take all"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("sizes", [{}, dict(d=128, f=80), dict(d=7, f=130)], ids=str)
def test_decode_kernel_equals_dense(native_kernel, rng, n, choose, sizes):
    """The kernel runs in float32, whose unit roundoff is 6e-8, and sums at most 130 products."""
    x, ids, gates, *weights = (np.asarray(a) for a in case(rng, choose, n=n, **sizes))
    expected = oracles.routed_swiglu_jnp(x, ids, gates, *weights)
    y = native_kernel(x, ids, gates, *weights)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    for i in range(0, n, 3):  # bitwise the same without the other tokens
        one = slice(i, i + 1)
        np.testing.assert_array_equal(native_kernel(x[one], ids[one], gates[one], *weights)[0], y[i])


def test_decode_kernel_rejects_other_ids(native_kernel, rng):
    x, ids, gates, *weights = (np.asarray(a) for a in case(rng, "any", n=2))
    for wrong in (ids + 1000, ids - 1000):
        with pytest.raises(Exception, match="an expert id outside the experts"):
            jax.block_until_ready(native_kernel(x, wrong, gates, *weights))


# capacity


CAPACITY = {factor: partial(dispatch.capacity_swiglu, factor=factor) for factor in (0.25, 1.0, 1.25, 3.0)}
CAPACITY_Y = {factor: lambda *a, f=f: f(*a)[0] for factor, f in CAPACITY.items()}


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25])
def test_capacity_drops_later_tokens(x64, rng, factor):
    """Values and gradients equal the oracle's with a gate of 0 for each assignment beyond the capacity."""
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
    """factor = E/K gives every expert capacity for all n tokens."""
    arrays = case(rng, "two take all")
    weight = jnp.asarray(rng.standard_normal(arrays[0].shape))
    got = value_and_gradients(CAPACITY_Y[3.0], weight, *arrays)
    assert_equal(got, value_and_gradients(BACKENDS["dense"], weight, *arrays))
    assert jax.jit(CAPACITY[3.0])(*arrays)[1] == 0


def test_capacity_when_two_experts_take_all(x64, rng):
    """Each of the two experts has capacity for ceil(1.0 * 37 * 2 / 6) = 13 tokens; the other 24 tokens are dropped."""
    arrays = case(rng, "two take all")
    y, dropped = jax.jit(CAPACITY[1.0])(*arrays)
    assert dropped == pytest.approx(24 / 37, abs=1e-6)
    assert (y[13:] == 0).all()
    np.testing.assert_allclose(y[:13], oracles.routed_swiglu_jnp(*arrays)[:13], atol=1e-10)
