"""Two runs of one seed give the same bits on a GPU: its programs hold no float that threads add to in any order.

Lowered on this host for CUDA, and read. A scatter that adds floats is ordered only if its indices are unique. Adding
whole numbers is exact in any order.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from models import small
from runs import make_run

from dsv3_jax.config import Execution
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.ops import embedding
from dsv3_jax.training.step import Job, abstract_state, make_step

BATCH, LENGTH = 2, 16
SCATTER = re.compile(r'"stablehlo\.scatter"\(.*?unique_indices = (true|false)\}> \(\{(.*?)\}\) : ', re.DOTALL)
FLOAT_ADD = re.compile(r"stablehlo\.add .* : tensor<b?f\d+>")


def unordered_adds(function, *shapes) -> list[str]:
    """The scatters of a CUDA program that add floats at indices that may repeat."""
    text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert len(SCATTER.findall(text)) == text.count('"stablehlo.scatter"')
    return [body for unique, body in SCATTER.findall(text) if unique == "false" and FLOAT_ADD.search(body)]


@pytest.mark.long
@pytest.mark.parametrize(
    "changes, kernels",
    [
        ({}, "auto"),
        ({}, "grouped_swiglu=dense"),
        ({"router": "topk", "num_groups": 1, "groups_per_token": 1, "tie_embeddings": True}, "auto"),
        ({"attention": "gqa", "num_kv_heads": 1, "router": "softmax", "group_score": "max"}, "grouped_swiglu=dense"),
        *(({"mtp_kind": kind}, "grouped_swiglu=dense") for kind in ("meta", "medusa", "eagle")),
    ],
    ids=str,
)
def test_a_training_step_adds_floats_in_one_order(changes, kernels):
    execution = Execution("bfloat16", "full", kernels)
    run = make_run("nowhere", model=small(num_layers=2, mtp_depth=1, **changes), execution=execution)
    run = replace(run, optim=replace(run.optim, microbatches=2))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    batch = {name: tokens for name in ("tokens", "segment_ids", "positions")}
    step = make_step(Job(run, kernels=prepare(execution, platform="cuda")))
    assert unordered_adds(step, abstract_state(Job(run)), batch) == []


@pytest.mark.parametrize(("look_up", "adds"), [(embedding.look_up, 1), (embedding.look_up_in_order, 0)])
def test_what_the_test_above_looks_for_is_there_to_be_found(look_up, adds):
    table, tokens = jax.ShapeDtypeStruct((11, 4), jnp.float32), jax.ShapeDtypeStruct((5,), jnp.int32)
    assert len(unordered_adds(jax.grad(lambda t, i: look_up(t, i).sum()), table, tokens)) == adds


@pytest.mark.long
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_routers_product_is_exact(platform):
    """Forward and both of its gradients, in the training step. Nothing else is but the sums of the embedding's gradient
    on a GPU, two products."""
    cfg = small(num_layers=2, num_dense_layers=1, mtp_depth=0)
    execution = Execution("bfloat16", kernels="grouped_swiglu=dense")
    run = make_run("nowhere", model=cfg, execution=execution)
    batch = {name: jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    step = make_step(Job(run, kernels=prepare(execution, platform=platform)))
    text = step.trace(abstract_state(Job(run)), batch).lower(lowering_platforms=(platform,)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    exact = [line for line in dots if "HIGHEST" in line]
    tokens, dim, experts = BATCH * LENGTH, cfg.dim, cfg.num_experts
    results = [sorted(map(int, re.findall(r"\d+(?=x)", line.split("->")[1]))) for line in exact]
    for shape in (tokens, experts), (tokens, dim), (dim, experts):
        assert results.count(sorted(shape)) == 1
    assert len(exact) == (5 if platform == "cuda" else 3) and len(dots) > 2 * len(exact)
