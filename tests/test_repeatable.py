"""The programs of a training step, lowered on this host for other platforms and read.

Two runs of one seed give the same bits on a GPU: no float is added to in any order. A scatter that
adds floats is ordered only if its indices are unique. The router's products are exact. The backward
pass recomputes attention once.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from models import small
from runs import make_run

from dsv3_jax.config import Execution, replace
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.kernels.cpu import library
from dsv3_jax.kernels.xla.in_order import look_up_in_order
from dsv3_jax.ops import embedding
from dsv3_jax.training.state import Job, abstract_state
from dsv3_jax.training.step import make_step

BATCH, LENGTH = 2, 16
DENSE = "grouped_swiglu=dense"
SCATTER = re.compile(
    r'"stablehlo\.scatter"\(.*?unique_indices = (true|false)\}> \(\{(.*?)\}\) : ', re.DOTALL
)
FLOAT_ADD = re.compile(r"stablehlo\.add .* : tensor<b?f\d+>")


def lower(function, platform, *shapes) -> str:
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def step_text(cfg, execution: Execution, platform: str, microbatches: int = 1) -> str:
    run = make_run("nowhere", model=cfg, execution=execution)
    run = replace(run, optim=replace(run.optim, microbatches=microbatches))
    batch = {
        name: jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
        for name in ("tokens", "segment_ids", "positions")
    }
    step = make_step(Job(run, kernels=prepare(execution, platform=platform)))
    return lower(step, platform, abstract_state(Job(run)), batch)


def unordered_adds(text: str) -> list[str]:
    """The scatters that add floats at indices that may repeat."""
    assert len(SCATTER.findall(text)) == text.count('"stablehlo.scatter"')
    return [
        body
        for unique, body in SCATTER.findall(text)
        if unique == "false" and FLOAT_ADD.search(body)
    ]


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "gqa", "num_kv_heads": 1, "tie_embeddings": True, "mtp_kind": "meta"},
        pytest.param(
            {"router": "softmax", "group_score": "max", "mtp_kind": "eagle"},
            marks=pytest.mark.rare,
        ),
    ],
    ids=str,
)
def test_a_training_step_adds_floats_in_one_order(changes):
    cfg = small(num_layers=2, mtp_depth=1, **changes)
    text = step_text(cfg, Execution("bfloat16", "full", DENSE), "cuda", microbatches=2)
    assert unordered_adds(text) == []


@pytest.mark.parametrize(("look_up", "adds"), [(embedding.look_up, 1), (look_up_in_order, 0)])
def test_what_the_test_above_looks_for_is_there_to_be_found(look_up, adds):
    table = jax.ShapeDtypeStruct((11, 4), jnp.float32)
    tokens = jax.ShapeDtypeStruct((5,), jnp.int32)
    text = lower(jax.grad(lambda t, i: look_up(t, i).sum()), "cuda", table, tokens)
    assert len(unordered_adds(text)) == adds


@pytest.mark.long
def test_the_routers_product_is_exact():
    """Forward and both of its gradients, in the training step.

    Nothing else is but the sums of the embedding's gradient on a GPU, two products.
    """
    cfg = small(num_layers=2, num_dense_layers=1, mtp_depth=0)
    text = step_text(cfg, Execution("bfloat16", kernels=DENSE), "cuda")
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    exact = [line for line in dots if "HIGHEST" in line]
    tokens, dim, experts = BATCH * LENGTH, cfg.dim, cfg.num_experts
    results = [sorted(map(int, re.findall(r"\d+(?=x)", line.split("->")[1]))) for line in exact]
    for shape in (tokens, experts), (tokens, dim), (dim, experts):
        assert results.count(sorted(shape)) == 1
    assert len(exact) == 5 and len(dots) > 2 * len(exact)


PASSES = {"attention": 1, "full": 2}  # forward passes of attention in a step
# a scan over dense layers, one over sparse layers, and a head: each calls attention once
BLOCKS = 3


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param("attention", marks=pytest.mark.long),
        pytest.param("full", marks=pytest.mark.rare),
    ],
)
def test_attention_runs_forward_once_unless_everything_is_recomputed(remat):
    """Counted by the division [B, H, T, V] that ends a forward pass. A head has 15 positions."""
    cfg = small(num_layers=5, num_dense_layers=1, mtp_depth=1)  # two scans: remat unrolls none
    text = step_text(cfg, Execution(remat=remat, kernels=f"xla,{DENSE}"), "cuda")
    ends = re.findall(
        rf"stablehlo\.divide .* : tensor<2x{cfg.num_heads}x1[56]x{cfg.v_head_dim}xf32>", text
    )
    assert len(ends) == PASSES[remat] * BLOCKS
    if not library.why_not():  # on the CPU attention is a call
        text = step_text(cfg, Execution(remat=remat, kernels=f"auto,{DENSE}"), "cpu")
        assert text.count("@dsv3_causal_attention_gradients(") == BLOCKS
        assert text.count("@dsv3_causal_attention(") == PASSES[remat] * BLOCKS
