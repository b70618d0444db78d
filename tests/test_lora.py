"""LoRA: steps train adapters alone, by the merged model's gradient; readers get merged weights.

The contractions are written out below for each matrix, where the library reads them off the names
of the axes.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, flat, parameters, random_model, small
from runs import (
    MODEL,
    assert_bitwise,
    assert_near,
    documents,
    make_run,
    new_state,
    on_mesh,
    write_text,
)

from dsv3_jax import reference
from dsv3_jax.config import Execution, Layout, Lora, OptimConfig, RunConfig
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.parameters import Packed
from dsv3_jax.runs import start as starts
from dsv3_jax.runs.checkpoint import Checkpoints, load_run
from dsv3_jax.runs.folder import claim
from dsv3_jax.training import lora
from dsv3_jax.training.state import Job, TrainState, abstract_state
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
PARTS = {"attention": "attn", "dense": "ffn", "shared": "shared", "routed": "experts"}
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
B, T = 4, 10


def matrices(params: dict, on: tuple[str, ...]) -> list[tuple]:
    """Paths of the matrices of these parts, among the paths of all parameters."""
    return [
        path for path in params if path[-1] in PRODUCTS and any(PARTS[part] in path for part in on)
    ]


def state_of(run: RunConfig, step: int = 0) -> TrainState:
    """Random weights, biases and adapters, none 0; new each time, since a step donates them."""
    params, bias = nnx.split(random_model(run.model), nnx.Param, RouterBias)[1:]
    shapes = jax.eval_shape(lambda: lora.init(run.lora, params, jax.random.key(0)))
    adapters = {}
    for path, v in nnx.to_flat_state(shapes):
        noise = np.random.default_rng(len(adapters)).standard_normal(v.shape)
        adapters[path] = v.replace(jnp.asarray(0.3 * noise, jnp.float32))
    params = nnx.merge_state(params, nnx.from_flat_state(adapters))
    return new_state(run, params, bias, step)


def product(params: dict, path: tuple) -> np.ndarray:
    """A B of the adapters of a weight."""
    of_a, of_b, of_w = PRODUCTS[path[-1]]
    a, b = (np.asarray(params["lora", *path, side], np.float64) for side in "ab")
    return np.einsum(f"...{of_a},...{of_b}->...{of_w}", a, b)


def merged_by_hand(params: dict) -> dict:
    """All weights in float64, each with its A B added."""
    merged = {path: np.asarray(w, np.float64) for path, w in params.items() if path[0] != "lora"}
    for path in merged:
        if ("lora", *path, "a") in params:
            merged[path] = merged[path] + ALPHA / RANK * product(params, path)
    return merged


BATCH = documents(B, T, 2, padding=[(1, 3)], seed=1, vocab_size=CFG.vocab_size)


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
    changed = set(matrices(want, ALL))
    assert len(changed) >= matrices_in_it
    for path, w in got.items():
        np.testing.assert_allclose(w, want[path], rtol=0, atol=1e-6, err_msg=str(path))
        assert np.array_equal(w, before[path]) == (path not in changed), path


def total_by_the_page(params: dict, batch: dict) -> float:
    """The reference's loss of the merged weights, in float64."""
    page = parameters(random_model(CFG))  # with its biases
    for (*where, name), w in merged_by_hand(params).items():
        there = page
        for key in where:
            there = there[key]
        there[name] = w
    ctx = reference.Context(CFG, batch["positions"], batch["segment_ids"])
    return reference.losses(ctx, page, batch["tokens"], RUN.optim.mtp_weight).total


@pytest.mark.long
def test_a_step_follows_the_gradient_of_the_merged_model(rng):
    """Difference quotients of the page along random directions: adapters, sides A and B, experts.

    Weights stay, and the router bias moves.
    """
    run = replace(RUN, execution=replace(DENSE, remat="dots"))
    old, (new, metrics) = state_of(run), make_step(Job(run))(state_of(run), BATCH)
    before, after, mean = flat(old.params), flat(new.params), flat(new.opt.mu)
    assert mean.keys() == {path for path in before if path[0] == "lora"}
    batch, step = jax.tree.map(np.asarray, BATCH), 1e-6
    for part in ("a", "b", "experts", "attn", "mtp", "sparse"):
        along = {path: rng.standard_normal(before[path].shape) for path in mean if part in path}
        totals = [
            total_by_the_page(before | {p: before[p] + s * way for p, way in along.items()}, batch)
            for s in (step, -step)
        ]
        # the first mean is 0.1 times the gradient
        terms = [np.ravel(10 * np.float64(mean[path]) * way) for path, way in along.items()]
        terms, want = np.concatenate(terms), (totals[0] - totals[1]) / (2 * step)
        # float32; a sum of terms of both signs
        assert abs(terms.sum() - want) < 3e-5 * np.abs(terms).sum(), part
    for path in before:
        assert np.array_equal(before[path], after[path]) == (path[0] != "lora"), path
    assert metrics["finite"] and new.step == 1
    moved = jax.tree.map(lambda a, b: (a != b).any(), old.bias, new.bias)
    assert all(jax.tree.leaves(moved))


def begin(run: RunConfig) -> tuple[TrainState, str]:
    return starts.begin(Job(run), starts.open_run(run.start))


@pytest.fixture(scope="module")
def trained(root) -> tuple[Path, RunConfig]:
    """A LoRA run's folder at step 7, whose adapters are random."""
    folder = root / "lora" / "run"
    on = ("attention", "shared", "routed")
    model = replace(MODEL, num_layers=1)
    text = write_text(root / "lora" / "text")
    run = claim(folder, make_run(text, model=model, start="gone", lora=Lora(RANK, ALPHA, on)))
    with Checkpoints(folder, run) as checkpoints:
        checkpoints.save(state_of(run, 7), {}, wait=True)
    return folder, run


@pytest.mark.long
def test_a_run_adds_new_adapters_to_its_start(trained):
    """Also to a LoRA run's merged weights."""
    folder, run = trained
    run = replace(run, start=str(folder), lora=Lora(4, 8.0, ("routed",)))
    state, _ = begin(run)
    adapters, weights = lora.split(state.params)
    assert_bitwise(weights, nnx.state(load_run(folder).model, nnx.Param))
    assert jax.tree.structure(state) == jax.tree.structure(abstract_state(Job(run)))
    assert jax.tree.structure(state.opt.mu) == jax.tree.structure(adapters)
    want = jax.tree.map(np.array, weights)
    assert_bitwise(lora.merge(run.lora, state.params), want)  # new adapters change nothing


def pack(w: np.ndarray) -> tuple[Packed, np.ndarray]:
    """(4-bit numbers in groups of 2 inputs, their float32.)"""
    numbers = np.clip(np.rint(w / 0.1), -8, 7).astype(np.int32)
    scales = np.full((*w.shape[:-2], w.shape[-2] // 2, w.shape[-1]), 0.125, np.float32)
    low, high = (numbers[..., i::2, :] + 8 for i in (0, 1))
    packed = Packed(jnp.asarray(low | high << 4, jnp.uint8), jnp.asarray(scales))
    return packed, np.float32(numbers * 0.125)


@pytest.mark.long
def test_the_policy_has_what_adapters_change_in_the_compute_dtype():
    """From bfloat16 and from 4 bits; what has no adapter is not copied, and stays packed."""
    on = Lora(RANK, 1e-3, ("attention", "routed"))
    run = replace(RUN, model=replace(CFG, expert_dim=8), lora=on)
    adapters, weights = lora.split(state_of(run).params)
    start, used = {}, {}
    for path, v in nnx.to_flat_state(weights):
        value = v.get_value().astype(jnp.bfloat16)
        used[path] = np.asarray(value, np.float64)
        if "experts" in path or path[-2:] == ("shared", "w_up"):
            value, used[path] = pack(np.asarray(v.get_value()))
        start[path] = v.replace(value)
    found = lora.policy(run.lora, nnx.merge_state(nnx.from_flat_state(start), adapters), "float32")
    for path, v in nnx.to_flat_state(found):
        if ("lora", *path, "a") not in flat(adapters):
            ours, theirs = (jax.tree.leaves(x) for x in (v, start[path]))
            assert all(x is y for x, y in zip(ours, theirs, strict=True)), path
            continue
        change = 1e-3 / RANK * product(flat(adapters), path)
        assert v.get_value().dtype == jnp.float32 and 0 < np.abs(change).max() < 2e-3
        want = used[path] + change
        np.testing.assert_allclose(v.get_value(), want, rtol=1e-6, atol=1e-7, err_msg=str(path))


@pytest.mark.rare  # test_mesh has a step of all weights
def test_a_step_on_a_mesh_is_a_single_devices():
    """Each of the mesh's axes shards some of the adapters."""
    model = small(num_layers=1, num_dense_layers=0, num_heads=4)
    execution = replace(DENSE, layout=Layout(fsdp=True))
    on = ("attention", "shared", "routed")
    run = replace(RUN, model=model, execution=execution, lora=Lora(RANK, ALPHA, on))
    want, metrics = jax.device_get(make_step(Job(run))(state_of(run), BATCH))
    mesh = sharding.make_mesh(2, 2, 2)
    rows = jax.device_put(BATCH, sharding.batch_sharding(mesh))
    state = on_mesh(state_of(run), mesh, fsdp=True)
    with jax.set_mesh(mesh):
        got, metrics_there = jax.device_get(make_step(Job(run))(state, rows))
    np.testing.assert_array_equal(metrics_there["load"], metrics["load"])
    assert_near(got.opt.mu, want.opt.mu, 3e-5)
