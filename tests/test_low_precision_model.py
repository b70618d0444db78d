"""Models that train in 8 bits: which products are rounded, and that nothing else changes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import LIGHT, SMALL, random_model, tokens_of
from runs import MODEL, fresh_state, make_run, packed_batch

from dsv3_jax.config import Execution, Layout, OptimConfig
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import generate_in_parts
from dsv3_jax.kernels.choose import TABLE, Kernels, Target, prepare
from dsv3_jax.mesh import sharding
from dsv3_jax.training.loss import compute_loss
from dsv3_jax.training.step import Job, make_step

FP8, MXFP8 = Execution(precision="fp8"), Execution(precision="mxfp8")
IN_8_BITS = {"product", "swiglu", "expand", "grouped_swiglu", "decode_experts", "capacity_swiglu"}


def batch_of(cfg, batch=2, length=9):
    tokens = tokens_of(cfg, batch, length)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    return {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}


def rounded_shapes(jaxpr, found=None) -> set[tuple[int, ...]]:
    """Shapes of all arrays that a program rounds to e4m3's three bits, in loops and branches too."""
    found = set() if found is None else found
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "reduce_precision" and eqn.params["mantissa_bits"] == 3:
            found.add(eqn.outvars[0].aval.shape)
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                rounded_shapes(getattr(inner, "jaxpr", inner), found)
    return found


def trace(cfg, execution):
    """The program of a loss and its gradient; nothing is compiled."""
    graphdef, params, rest = nnx.split(random_model(cfg, execution=execution), nnx.Param, ...)

    def loss(params):
        return compute_loss(nnx.merge(graphdef, params, rest), batch_of(cfg), 0.3).total

    return jax.make_jaxpr(jax.grad(loss))(params).jaxpr


def test_all_linear_layers_are_rounded_and_nothing_else():
    """By shape, of which no two are alike: D 16, Q 12, C 10, R 4, heads 3 × (N 6, V 5), dense 20, F 7, E 8, W 37.

    18 tokens, of which the MTP module sees 16; they choose 3 experts each. Every operand of a product and of its two
    gradients is there. The router [16, 8], the tables [37, 16], scores of attention [2, 3, 9, 9] and logits are not.
    """
    shapes = rounded_shapes(trace(replace(SMALL, num_layers=2, mtp_depth=1), FP8))
    attention = {(16, 12), (12, 30), (16, 14), (10, 33), (15, 16)}
    ffn = {(16, 20), (20, 16), (16, 7), (7, 16), (8, 16, 7), (8, 7, 16), (32, 16)}  # the last is the module's W_eh
    rows = {(tokens, width) for tokens in (18, 16) for width in (16, 12, 30, 14, 10, 33, 15, 7)} | {(18, 20), (16, 32)}
    by_expert = {(3 * tokens, width) for tokens in (18, 16) for width in (16, 7)}
    assert shapes == attention | ffn | rows | by_expert
    assert not rounded_shapes(trace(LIGHT, Execution()))


NAMES = ("fp8", "fp8_ue8m0", "mxfp8")


@pytest.mark.parametrize("name", NAMES)
def test_the_door_gives_8_bits_to_linear_layers_only(name):
    plain, low = (Kernels(Target("cpu", precision=precision), ()) for precision in ("none", name))
    names, others = plain.chosen(), low.chosen()
    assert {op for op in TABLE if others[op] == name} == IN_8_BITS == {op for op in TABLE if names[op] != others[op]}
    assert low.in_compute_dtype == plain and not set(NAMES) & set(names.values())
    for platform, grouped in (("cuda", "mosaic"), ("tpu", "megablox")):  # of bfloat16
        target = Target(platform, precision=name)
        assert Kernels(target, ()).chosen("bfloat16")["grouped_swiglu"] == (name if name == "fp8" else grouped)
        for op in IN_8_BITS:
            assert {row.precision for row in target.rows(op)} == {name}


def test_the_head_is_exact_and_decoding_does_without():
    """Logits of the same hidden states are equal bit by bit, and so is every generated token."""
    low = random_model(LIGHT, execution=FP8)
    plain = random_model(LIGHT)
    h = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    np.testing.assert_array_equal(*(jax.jit(model.logits)(h) for model in (low, plain)))
    config = DecodeConfig(max_new_tokens=8)
    results = [list(generate_in_parts(model, [[1, 2, 3]], config, part=None))[-1] for model in (low, plain)]
    assert results[0].tokens == results[1].tokens
    assert low.kernels.target.precision == "fp8"  # the model itself is as it was


# eps: AdamW then does not turn the rounding of gradients near 0 into whole steps of either sign
RUN = make_run("nowhere", optim=OptimConfig(learning_rate=1e-2, warmup_steps=2, eps=0.1), execution=Execution())
RUN = replace(RUN, model=replace(MODEL, dim=40, num_layers=1, expert_dim=36, mtp_depth=0))


def after_a_step(execution, mesh=None):
    run = replace(RUN, execution=execution)
    step, state = make_step(Job(run, kernels=prepare(execution, mesh=mesh))), fresh_state(run)
    batch = packed_batch(rng := np.random.default_rng(0), np.sort(rng.integers(1, 4, (4, 24)), axis=1))
    if mesh is not None:
        state = jax.device_put(state, sharding.state_sharding(state, mesh, fsdp=execution.layout.fsdp))
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with sharding.use_mesh(mesh):
        return jax.device_get(step(state, batch))


@pytest.mark.parametrize(
    "low",
    [
        pytest.param(FP8, marks=pytest.mark.long),
        pytest.param(replace(MXFP8, compute_dtype="bfloat16", remat="full"), marks=pytest.mark.rare),
    ],
)
def test_a_training_step_in_8_bits_is_near_that_in_float32(low):
    """Three bits of mantissa round an operand by 3 % at most, and sums average it out."""
    (want, exact), (state, found) = (after_a_step(execution) for execution in (Execution(), low))
    assert bool(found["finite"]) and found["loss"] != exact["loss"]
    np.testing.assert_allclose(found["loss"], exact["loss"], rtol=0.02)
    np.testing.assert_allclose(found["grad_norm"], exact["grad_norm"], rtol=0.1)
    leaves = jax.tree.leaves((state.params, state.opt.mu, state.opt.nu))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)  # master weights and moments
    got, mean = (np.concatenate([np.ravel(a) for a in jax.tree.leaves(x.opt.mu)]) for x in (state, want))
    assert 0.95 < got @ mean / np.sqrt(got @ got * (mean @ mean)) < 0.99999  # their error is below a third
    # Not equal on a mesh: a device rounds experts in tiles of its own hidden units and tokens.
    if low is FP8:
        layout = Layout(fsdp=True, expert_comm="all_to_all")
        _, on_mesh = after_a_step(replace(FP8, layout=layout), sharding.make_mesh(2, 2, 2))
        np.testing.assert_array_equal(on_mesh["load"].sum(), found["load"].sum())
        np.testing.assert_allclose(on_mesh["loss"], found["loss"], rtol=0.005)
        np.testing.assert_allclose(on_mesh["grad_norm"], found["grad_norm"], rtol=0.05)
