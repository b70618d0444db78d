"""The contract of the expert stack: gradients are right however often a loop calls a layer, with and without C++.

The reference slices each layer's matrices and lets JAX differentiate: no stack, no carry.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import some_long
from flax import nnx
from models import small
from test_dispatch import case

from dsv3_jax.config import Execution
from dsv3_jax.kernels import choose
from dsv3_jax.kernels.cpu import calls, library
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.model.moe import Experts as ExpertsModule
from dsv3_jax.model.moe import MoE
from dsv3_jax.ops.expert_stack import Experts, open_stack, read_only, take_layer

KERNELS = ("cpu", "blocks", "ragged_dot", "dense")
LAYERS = 4
# Layers of the stack that a loop calls, in order, and how often each call runs its layer.
LOOPS = {
    "each once": ([0, 1, 2, 3], 1),
    "backward": ([3, 2, 1, 0], 1),
    "each twice in its turn": ([0, 1, 2, 3], 2),
    "the loop twice": ([0, 1, 2, 3, 0, 1, 2, 3], 1),
    "layer 2 twice, layer 0 never": ([2, 1, 2, 3], 1),
    "one half of the stack": ([0, 1], 1),
    "none": ([], 1),
}


def kernels_of(name):
    if name == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    asked = "auto" if name == "cpu" else f"xla,grouped_swiglu={name}"
    return choose.prepare(Execution(kernels=asked), platform="cpu")


def draw(rng):
    x, ids, gates, *_ = case(rng, "some idle", n=60, d=24, f=40)
    x, gates = x.astype(jnp.float32), gates.astype(jnp.float32)
    shapes = ((LAYERS, 6, 24, 40), (LAYERS, 6, 24, 40), (LAYERS, 6, 40, 24))
    return x, ids, gates, Experts(*(jnp.asarray(0.1 * rng.standard_normal(s), jnp.float32) for s in shapes))


def with_stack(kernels, order, repeats, x, ids, gates, weights, remat=False, frozen=False):
    """A loss over layers in a loop that carries the stack's gradient."""
    stack = kernels.open_experts(weights, frozen=frozen)

    def layer(carry, index):
        y, grad = carry
        after = stack.at(index, grad)
        for _ in range(repeats):
            out, after = kernels.grouped_swiglu(y, ids, gates, after)
            y = y + out
        return (y, after.grad), None

    layer = jax.checkpoint(layer) if remat else layer
    (y, grad), _ = jax.lax.scan(layer, (x, stack.grad), jnp.asarray(order, jnp.int32))
    return jnp.sin(kernels.close_experts(y, stack.at(0, grad))).sum()


def by_slices(order, repeats, x, ids, gates, weights):
    """The same loss in float64, each layer's matrices sliced."""
    for index in order:
        for _ in range(repeats):
            x = x + oracles.routed_swiglu_jnp(x, ids, gates, *(w[index] for w in weights))
    return jnp.sin(x).sum()


def assert_close(ours, theirs):
    """float32, whose unit roundoff is 6e-8, in sums of some hundred products."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize(
    "name, remat",
    [("cpu", False), pytest.param("cpu", True, marks=pytest.mark.long), ("blocks", False), ("dense", False)],
    ids=str,
)
@pytest.mark.parametrize("order, repeats", some_long(LOOPS, "each twice in its turn", "layer 2 twice, layer 0 never"))
def test_gradients_are_the_references_however_often_a_layer_is_called(rng, monkeypatch, name, order, repeats, remat):
    kernels = kernels_of(name)
    # Uninitialised memory that is not finite shows whatever is read before it is written.
    monkeypatch.setattr(calls, "uninitialized_like", lambda *arrays: [jnp.full_like(a, jnp.nan) for a in arrays])
    x, ids, gates, weights = draw(rng)
    ours = jax.jit(
        jax.value_and_grad(lambda *a: with_stack(kernels, order, repeats, a[0], ids, *a[1:], remat), argnums=(0, 1, 2))
    )(x, gates, weights)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, gates, weights))
        loss = lambda *a: by_slices(order, repeats, a[0], ids, *a[1:])  # noqa: E731
        theirs = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*wide)
    assert_close(ours, theirs)
    never = set(range(LAYERS)) - set(order)
    assert all((np.asarray(w)[list(never)] == 0).all() for w in ours[1][2])


@pytest.mark.parametrize("name", ["cpu", "blocks"])
def test_a_shared_layer_that_a_model_loops_over(rng, name):
    """A MoE module called twice in one layer, as a looped model does: each call gets the stack of the one before."""
    cfg = small(num_experts=6, experts_per_token=2, num_groups=1, groups_per_token=1)
    kernels = kernels_of(name)
    moe = MoE(cfg, rngs=nnx.Rngs(0), kernels=kernels, stacked=True)
    owner = ExpertsModule(cfg, 1, rngs=nnx.Rngs(1))
    graph, state = nnx.split((moe, owner), nnx.Param, ...)[0], nnx.split((moe, owner), nnx.Param, ...)[1:]
    x = jnp.asarray(rng.standard_normal((2, 9, cfg.dim)), jnp.float32)

    def looped(params, times_open):
        moe, owner = nnx.merge(graph, params, *state[1:])
        ctx = make_context(cfg, from_zero(2, 9))
        y = x
        if times_open == 1:  # one stack that passes through both calls
            stack = owner.open(kernels, train=True)
            for _ in range(2):
                out, stack, _ = moe.mix(y, ctx._replace(experts=stack))
                y = y + out
            y = kernels.close_experts(y, stack)
        else:  # two stacks of the same weights: JAX adds their gradients up
            for _ in range(2):
                stack = owner.open(kernels, train=True)
                out, stack, _ = moe.mix(y, ctx._replace(experts=stack))
                y = kernels.close_experts(y + out, stack)
        return jnp.sin(y).sum()

    once, twice = (jax.jit(jax.grad(lambda p, n=n: looped(p, n)))(state[0]) for n in (1, 2))
    assert_close(once, twice)
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(once["1"] if "1" in once else once[1]))


@pytest.mark.parametrize("name", ["cpu", "blocks", "dense"])
def test_frozen_weights_take_no_gradient_and_change_no_other(rng, name):
    x, ids, gates, weights = draw(rng)

    def gradients(frozen):
        loss = lambda *a: with_stack(kernels_of(name), [0, 2], 1, a[0], ids, *a[1:], frozen=frozen)  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, gates, weights)

    (*ours, of_weights), (*theirs, _) = gradients(True), gradients(False)
    assert_close(ours, theirs)
    assert not any(np.asarray(w).any() for w in of_weights)


def test_a_stack_that_is_used_twice_is_refused(rng):
    x, ids, gates, weights = draw(rng)
    kernels = kernels_of("dense")
    stack = kernels.open_experts(weights).at(1, kernels.open_experts(weights).grad)
    kernels.grouped_swiglu(x, ids, gates, stack)
    with pytest.raises(ValueError, match="grad_carry of the expert stack is used twice"):
        kernels.grouped_swiglu(x, ids, gates, stack)
    with pytest.raises(ValueError, match="used twice"):
        kernels.close_experts(x, stack)


def test_a_read_only_stack_is_used_as_often_as_one_likes(rng):
    x, ids, gates, weights = draw(rng)
    stack = read_only(weights).at(3)
    assert stack.grad is None
    outputs = [kernels_of(name).grouped_swiglu(x, ids, gates, stack)[0] for name in KERNELS for _ in range(2)]
    for y in outputs[1:]:
        assert_close(y, outputs[0])
    one, again = take_layer(stack)
    assert again is stack
    for part, all_layers in zip(one, weights, strict=True):
        np.testing.assert_array_equal(part, all_layers[3])


def test_flags_say_which_layers_hold_numbers(rng):
    """The rule by itself: a layer whose flag is 0 is overwritten, one whose flag is 1 is added to."""
    _, _, _, weights = draw(rng)
    stack = open_stack(weights)
    part = jax.tree.map(lambda w: jnp.ones_like(w[0]), weights)

    def use(grad):
        one, after = take_layer(stack.at(2, grad))
        return one, after.grad

    _, transpose = jax.vjp(use, stack.grad)
    for flag, expected in ((0.0, 1.0), (1.0, 8.0)):
        before = jax.tree.map(lambda a: jnp.full_like(a, 7.0), stack.grad)
        before = type(before)(before.carry, jnp.full((LAYERS,), flag))
        (after,) = transpose((part, before))
        assert (after.carry.w_up[2] == expected).all() and (after.carry.w_up[1] == 7).all()
        np.testing.assert_array_equal(after.written, [flag, flag, 1, flag])
