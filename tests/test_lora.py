"""LoRA: steps train adapters alone, by the gradient of the merged model. See test_frozen, too.

The contractions are written out below for each matrix, where the library reads them off the names
of the axes.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, flat, random_model, small
from runs import documents, make_run, new_state

from dsv3_jax.config import Execution, Lora, OptimConfig, RunConfig
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.training import lora
from dsv3_jax.training.loss import compute_loss
from dsv3_jax.training.state import Job, TrainState, graph_of
from dsv3_jax.training.step import make_step

ALL = ("attention", "dense", "shared", "routed")
RANK, ALPHA = 2, 3.0
# Weight → axes of A, B and W in W += (alpha / rank) A B, after those of layers and experts.
PRODUCTS = {
    **dict.fromkeys(("w_q", "w_k", "w_v"), ("dr", "rhk", "dhk")),
    **dict.fromkeys(("w_dq", "w_dkv"), ("dr", "rc", "dc")),
    "w_uq": ("cr", "rhk", "chk"),
    **dict.fromkeys(("w_uk", "w_uv"), ("rc", "hnr", "hnc")),
    "w_o": ("hvr", "rd", "hvd"),
    **dict.fromkeys(("w_gate", "w_up"), ("dr", "rf", "df")),
    "w_down": ("fr", "rd", "fd"),
}
# A dense layer, two sparse ones and a head: each kind of matrix, alone and in a stack
CFG = small(num_layers=3, mtp_depth=1)
RUN = make_run(
    "nowhere",
    model=CFG,
    execution=Execution(),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=0, eps=0.1, clip_norm=1e9),
    start="nowhere",
    lora=Lora(RANK, ALPHA, ALL),
)
BATCH = documents(4, 10, 2, padding=[(1, 3)], seed=1, vocab_size=CFG.vocab_size)


def state_of(run: RunConfig) -> TrainState:
    """Random weights, biases and adapters, none 0; new each time, since a step donates them."""
    params, bias = nnx.split(random_model(run.model), nnx.Param, RouterBias)[1:]
    shapes = jax.eval_shape(lambda: lora.init(run.lora, params, jax.random.key(0)))
    adapters = {}
    for path, v in nnx.to_flat_state(shapes):
        noise = np.random.default_rng(len(adapters)).standard_normal(v.shape)
        adapters[path] = v.replace(jnp.asarray(0.3 * noise, jnp.float32))
    params = nnx.merge_state(params, nnx.from_flat_state(adapters))
    return new_state(run, params, bias)


def merged_by_hand(params: dict) -> dict:
    merged = {path: np.asarray(w, np.float64) for path, w in params.items() if path[0] != "lora"}
    for path in merged:
        if ("lora", *path, "a") in params:
            of_a, of_b, of_w = PRODUCTS[path[-1]]
            a, b = (np.asarray(params["lora", *path, side], np.float64) for side in "ab")
            added = np.einsum(f"...{of_a},...{of_b}->...{of_w}", a, b)
            merged[path] = merged[path] + ALPHA / RANK * added
    return merged


@pytest.mark.parametrize(
    ("changes", "matrices_in_it"),
    [({}, 20), ({"attention": "gqa", "num_kv_heads": 1, "num_layers": 2, "mtp_depth": 0}, 14)],
    ids=["mla", "gqa"],
)
def test_each_layer_head_and_expert_gets_its_own_product(changes, matrices_in_it):
    run = replace(RUN, model=replace(CFG, **changes))
    params = state_of(run).params
    before, want = flat(params), merged_by_hand(flat(params))
    got = flat(lora.merge(run.lora, params))
    assert got.keys() == want.keys()
    parts = {"attn", "ffn", "shared", "experts"}
    changed = {path for path in want if path[-1] in PRODUCTS and parts & {*path}}
    assert len(changed) >= matrices_in_it
    for path, w in got.items():
        np.testing.assert_allclose(w, want[path], rtol=0, atol=1e-6, err_msg=str(path))
        assert np.array_equal(w, before[path]) == (path not in changed), path


@pytest.mark.long
def test_a_step_follows_the_gradient_of_the_merged_model():
    """dA = (alpha / rank) dW Bᵀ and dB = (alpha / rank) Aᵀ dW; weights stay, router biases move.

    dW is of the plain loss, which test_loss compares with the page, at the merged weights.
    """
    run = replace(RUN, model=replace(CFG, mtp_depth=0), execution=replace(DENSE, remat="dots"))
    old, (new, metrics) = state_of(run), make_step(Job(run))(state_of(run), BATCH)
    before, after, mean = flat(old.params), flat(new.params), flat(new.opt.mu)
    assert mean.keys() == {path for path in before if path[0] == "lora"}
    graph = graph_of(Job(run))

    def loss(params):
        return compute_loss(nnx.merge(graph, params, old.bias), BATCH, 0.0).total

    gradients = flat(jax.jit(jax.grad(loss))(lora.merge(run.lora, old.params)))
    for (_, *path, side), of_step in mean.items():
        of_a, of_b, of_w = PRODUCTS[path[-1]]
        own, other, factor = (of_a, of_b, "b") if side == "a" else (of_b, of_a, "a")
        arrays = gradients[*path,], before["lora", *path, factor]
        want = ALPHA / RANK * np.einsum(f"...{of_w},...{other}->...{own}", *arrays)
        # the first mean is 0.1 times the gradient
        np.testing.assert_allclose(10 * of_step, want, rtol=0, atol=3e-5 * np.abs(want).max())
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path[0] != "lora"), path
    assert metrics["finite"] and new.step == 1
    moved = jax.tree.map(lambda a, b: (a != b).any(), old.bias, new.bias)
    assert all(jax.tree.leaves(moved))
