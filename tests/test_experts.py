"""The native kernels of the experts on many tokens, and their gradient, against the dense oracle and against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from test_dispatch import case, value_and_gradients

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.ops import dispatch
from dsv3_jax.ops.sort_by_expert import plan

# Widths below, at and around a register's 16 numbers and a panel's 64; more rows an expert than a chunk's 256.
SIZES = (
    {},
    dict(n=1, d=4, f=3, k=1),
    dict(n=90, d=64, f=128),
    dict(n=90, d=130, f=81),
    dict(n=900, d=20, f=33, num_experts=3),
    dict(n=12, d=1100, f=2, num_experts=3),
)


@pytest.fixture
def kernels():
    if why := calls.why_not():
        pytest.skip(why)


def blocks(*arrays):
    return dispatch.routed_swiglu(*arrays, backend="blocks")


def float32(arrays):
    return [a if a.dtype == jnp.int32 else a.astype(jnp.float32) for a in map(jnp.asarray, arrays)]


def close(ours, theirs):
    """float32, whose unit roundoff is 6e-8, in sums of at most 1,100 products."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def three_layers(rng):
    """A stack of 6 experts a layer, D = 24, F = 40."""
    shapes = ((3, 6, 24, 40), (3, 6, 24, 40), (3, 6, 40, 24))
    return dispatch.Experts(*(jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for shape in shapes))


@pytest.mark.parametrize("choose", ["two take all", "uneven"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_they_and_their_gradients_equal_dense(kernels, rng, choose, sizes):
    arrays = float32(case(rng, choose, **sizes))
    weight = jnp.asarray(rng.standard_normal(arrays[0].shape), jnp.float32)
    ours = value_and_gradients(lambda *a: blocks(*a), weight, *arrays)  # traced anew
    with jax.enable_x64(True):
        wide = [jnp.asarray(a, jnp.float64) if a.dtype == jnp.float32 else a for a in (weight, *arrays)]
        theirs = value_and_gradients(oracles.routed_swiglu_jnp, *wide)
    close(ours, theirs)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_layers_of_a_stack_in_a_scan(kernels, rng, monkeypatch, again):
    """Each layer's gradient is added in its place in the stack's; two microbatches add up there."""
    x, ids, gates, *_ = float32(case(rng, "any", n=300, d=24, f=40))
    other = case(rng, "some idle", n=300)[1]
    stack = three_layers(rng)

    def loss(x, gates, stack):
        def layer(carry, index):
            y, thread = carry
            picked = jnp.where(index == 1, other, ids)
            out, thread = dispatch.routed_swiglu_in_stack(y, picked, gates, stack, thread, index, backend="blocks")
            return (y + out, thread), None

        layer = jax.checkpoint(layer) if again else layer
        (y, _), _ = jax.lax.scan(layer, (x, stack), jnp.array([2, 1, 2], jnp.int32))  # layer 2 twice, layer 0 never
        return jnp.sin(y).sum()

    def gradients():
        return jax.jit(jax.value_and_grad(lambda *a: loss(*a), argnums=(0, 1, 2)))(x, gates, stack)

    ours = gradients()
    monkeypatch.setattr(calls, "why_not", lambda: "the test says so")
    theirs = gradients()
    close(ours, theirs)
    assert all((w[0] == 0).all() and (w[2] != 0).any() for w in ours[1][2])


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_a_gradient_that_begins_with_anything(kernels, rng, monkeypatch, again):
    """Where each layer comes once, all of what the stack's gradient began with is written over: idle experts too."""
    x, ids, gates, *_ = float32(case(rng, "some idle", n=300, d=24, f=40))
    stack = three_layers(rng)

    def loss(x, gates, stack, once):
        def layer(carry, index):
            y, thread = carry
            how = {"backend": "blocks", "once": once}
            out, thread = dispatch.routed_swiglu_in_stack(y, ids, gates, stack, thread, index, **how)
            return (y + out, thread), None

        layer = jax.checkpoint(layer) if again else layer
        (y, thread), _ = jax.lax.scan(layer, (x, stack), jnp.array([0, 2, 1], jnp.int32))
        return jnp.sin(dispatch.end_thread(y, thread, backend="blocks") if once else y).sum()

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    monkeypatch.setattr(calls, "room", lambda *like: [jnp.full_like(a, jnp.nan) for a in like])
    ours, theirs = (gradients(x, gates, stack, once) for once in (True, False))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(np.unique(ids)) < 6 and all((w != 0).any() for w in ours[1][2])


def test_room_has_the_shapes_asked_for(kernels):
    arrays = calls.room(jnp.zeros((2, 3)), jnp.zeros((5,)))
    assert [(a.shape, a.dtype) for a in arrays] == [((2, 3), jnp.float32), ((5,), jnp.float32)]


def test_a_token_does_not_hang_on_its_neighbours(kernels, rng):
    x, ids, gates, *weights = float32(case(rng, "any", n=200, d=48, f=80))
    run = jax.jit(lambda *a: blocks(*a))
    together = np.asarray(run(x, ids, gates, *weights))
    for first, count in ((0, 1), (7, 5), (30, 170)):
        part = slice(first, first + count)
        np.testing.assert_array_equal(run(x[part], ids[part], gates[part], *weights), together[part])
    decoded = calls.few_tokens_swiglu(x, ids, gates, *(w[None] for w in weights), jnp.int32(0))
    np.testing.assert_allclose(decoded, together, rtol=1e-5, atol=1e-5 * np.abs(together).max())


def test_the_gradient_is_the_same_each_time(kernels, rng):
    """However the threads share the experts."""
    arrays = float32(case(rng, "uneven", n=400, d=64, f=64))
    weight = jnp.ones_like(arrays[0])
    first = jax.tree.leaves(value_and_gradients(blocks, weight, *arrays))
    for _ in range(20):
        for a, b in zip(first, jax.tree.leaves(value_and_gradients(blocks, weight, *arrays)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_is_not_there_is_refused(kernels, rng):
    x, ids, gates, *weights = float32(case(rng, "any"))
    stack, p = tuple(w[None] for w in weights), plan(ids, 6)
    run = jax.jit(lambda p, layer: calls.experts_swiglu(x, gates, *p[:3], stack, layer, keep=False)[0])
    jax.block_until_ready(run(p, jnp.int32(0)))
    for wrong, layer, said in (
        (p, 1, "layer outside"),
        (p, -1, "layer outside"),
        (p._replace(counts=p.counts + 1), 0, "counts are not those of all rows"),
        (p._replace(order=p.order.at[3].set(99)), 0, "row outside"),
        (p._replace(place=p.place.at[3].set(-1)), 0, "row outside"),
    ):
        with pytest.raises(Exception, match=said):
            jax.block_until_ready(run(wrong, jnp.int32(layer)))


def test_they_compute_float32_alone(monkeypatch, rng):
    monkeypatch.setattr(calls, "why_not", lambda: "")

    def by_kernel(*arrays):
        return "dsv3_experts_swiglu" in str(jax.make_jaxpr(lambda *a: blocks(*a))(*arrays))

    arrays = float32(case(rng, "any"))
    assert by_kernel(*arrays)
    assert not by_kernel(arrays[0].astype(jnp.bfloat16), *arrays[1:])
    monkeypatch.setattr(calls, "why_not", lambda: "the test says so")
    assert not by_kernel(*arrays)
