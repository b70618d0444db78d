"""The backward pass recomputes attention's forward pass once. test_loss has the gradient under each policy."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from models import small
from runs import cheap_compiles, make_run

from dsv3_jax.config import Execution
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.kernels.cpu import library
from dsv3_jax.training.step import Job, abstract_state, make_step

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _cheap():
    with cheap_compiles():
        yield


CFG = small(num_layers=5, num_dense_layers=1, mtp_depth=1)  # more layers than training unrolls
BLOCKS = 3  # a scan over dense layers, one over sparse layers, and a head: each calls attention once


def traced_step(remat: str, platform: str, kernels: str, **changes):
    execution = Execution(remat=remat, kernels=kernels)
    run = make_run("nowhere", model=replace(CFG, **changes), execution=execution)
    batch = {name: jax.ShapeDtypeStruct((2, 16), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    return make_step(Job(run, kernels=prepare(execution, platform=platform))).trace(abstract_state(Job(run)), batch)


PASSES = {"none": 1, "dots": 1, "attention": 1, "full": 2}  # forward passes of attention in a step


@pytest.mark.parametrize("remat", PASSES)
def test_attention_runs_forward_once_unless_everything_is_recomputed(remat):
    """Counted by the division [B, H, T, V] by the rows' sums, which ends a forward pass. A head has 15 positions."""
    text = traced_step(remat, "cuda", "xla,grouped_swiglu=dense").lower(lowering_platforms=("cuda",)).as_text()
    ends = re.findall(rf"stablehlo\.divide .* : tensor<2x{CFG.num_heads}x1[56]x{CFG.v_head_dim}xf32>", text)
    assert len(ends) == PASSES[remat] * BLOCKS
    if not library.why_not():  # on the CPU attention is a call
        text = traced_step(remat, "cpu", "auto,grouped_swiglu=dense").lower(lowering_platforms=("cpu",)).as_text()
        assert text.count("@dsv3_causal_attention_gradients(") == BLOCKS
        assert text.count("@dsv3_causal_attention(") == PASSES[remat] * BLOCKS
