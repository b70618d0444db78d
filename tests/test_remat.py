"""What the backward pass recomputes: the same gradient under every policy, and attention's forward pass once."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_model, small, tokens_of
from runs import cheap_compiles, make_run

from dsv3_jax.config import Execution
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.kernels.cpu import library
from dsv3_jax.training.loss import compute_loss
from dsv3_jax.training.step import abstract_state, make_step

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _cheap():
    with cheap_compiles():
        yield


CFG = small(num_layers=3, num_dense_layers=1, mtp_depth=1)
BLOCKS = 3  # a scan over dense layers, one over sparse layers, and a head: each calls attention once
POLICIES = ("none", "dots", "attention", "full")


def gradient(remat: str):
    """Of a stack of two sparse layers."""
    cfg = replace(CFG, num_layers=2, num_dense_layers=0, mtp_depth=0)
    execution = Execution(remat=remat, kernels="xla,grouped_swiglu=dense")
    graph, state = nnx.split(random_model(cfg, execution=execution))
    tokens = tokens_of(cfg, 2, 12)
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(12)[None] + 0 * tokens}
    return jax.jit(jax.grad(lambda state: compute_loss(nnx.merge(graph, state), batch, 0.3).total, allow_int=True))(
        state
    )


def test_the_gradient_is_the_same():
    wanted = jax.tree.leaves(gradient("none"))
    for remat in POLICIES[1:]:
        for got, want in zip(jax.tree.leaves(gradient(remat)), wanted, strict=True):
            # the same operations, which XLA may fuse in another way
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * max(float(jnp.abs(want).max()), 1e-9))


def traced_step(remat: str, platform: str, kernels: str, **changes):
    execution = Execution(remat=remat, kernels=kernels)
    run = make_run("nowhere", model=replace(CFG, **changes), execution=execution)
    batch = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    return make_step(run, prepare(execution, platform=platform)).trace(abstract_state(run), batch)


PASSES = {"none": 1, "dots": 1, "attention": 1, "full": 2}  # forward passes of attention in a step


@pytest.mark.parametrize("remat", PASSES)
def test_attention_runs_forward_once_unless_everything_is_recomputed(remat):
    """Counted in the program for CPUs, where attention is a call."""
    if why := library.why_not():
        pytest.skip(why)
    text = traced_step(remat, "cpu", "auto,grouped_swiglu=dense").lower(lowering_platforms=("cpu",)).as_text()
    assert text.count("@dsv3_causal_attention_gradients(") == BLOCKS
    assert text.count("@dsv3_causal_attention(") == PASSES[remat] * BLOCKS


@pytest.mark.parametrize("remat", PASSES)
def test_so_it_does_in_plain_xla(remat):
    """Counted by the division [B, H, T, V] by the rows' sums, which ends a forward pass. A head has 15 positions."""
    text = traced_step(remat, "cuda", "xla,grouped_swiglu=dense").lower(lowering_platforms=("cuda",)).as_text()
    ends = re.findall(rf"stablehlo\.divide .* : tensor<2x{CFG.num_heads}x1[56]x{CFG.v_head_dim}xf32>", text)
    assert len(ends) == PASSES[remat] * BLOCKS


def test_heads_with_a_capacity_are_recomputed():
    assert traced_step("full", "cpu", "xla,grouped_swiglu=dense", capacity_factor=1.25).jaxpr
