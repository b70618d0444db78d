"""Weights that do not train keep their start's dtype in memory and on disk, and change no digit."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, flat, random_model
from released import GRID, write_folder
from runs import MODEL, assert_bitwise, documents, make_run, on_mesh, refused

import dsv3_jax as ds
from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.config import Layout, Lora, RunConfig
from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.hf.loading import load
from dsv3_jax.mesh import sharding
from dsv3_jax.model.parameters import in_use
from dsv3_jax.planning import cost
from dsv3_jax.runs import start as starts
from dsv3_jax.runs.checkpoint import Checkpoints, load_run
from dsv3_jax.runs.folder import claim
from dsv3_jax.training import lora
from dsv3_jax.training.state import Job, TrainState, split_trainable
from dsv3_jax.training.step import make_step

CFG = replace(MODEL, mtp_depth=0)
HOW = {"float32": DENSE, "bfloat16": replace(DENSE, compute_dtype="bfloat16", remat="full")}
KIMI = GRID["Kimi K2-Thinking"]  # its experts have 4 bits, and all else is float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A released folder in bfloat16."""
    path = tmp_path_factory.mktemp("released") / "model"
    ds.hf.save(random_model(CFG), path, dtype="bfloat16", quiet=True)
    (path / "tokenizer.json").write_text(byte_tokenizer_json())
    return str(path)


def run_from(folder: str, dtype: str, on: str = "lora") -> RunConfig:
    run = make_run("nowhere", model=CFG, execution=HOW[dtype])
    if on == "lora":
        return replace(run, start=folder, lora=Lora(2, 3.0, ("attention", "routed")))
    return replace(run, trunk=folder, model=replace(CFG, mtp_depth=1, mtp_kind="medusa"))


def begin(run: RunConfig) -> TrainState:
    """The state of step 0, with adapters of which none is 0."""
    state, _ = starts.begin(Job(run), starts.open_start(run.trunk or run.start))
    trained, frozen = split_trainable(run, state.params)
    return replace(state, params=nnx.merge_state(jax.tree.map(lambda x: x + 0.01, trained), frozen))


def widened(run: RunConfig, state: TrainState, dtype=jnp.float32) -> TrainState:
    state = replace(state, params=jax.jit(partial(in_use, dtype=dtype))(state.params))
    return jax.tree.map(jnp.copy, state)  # a step donates its state


def narrow(params: nnx.State) -> set[tuple]:
    """Paths of the parameters in bfloat16."""
    return {path for path, v in nnx.to_flat_state(params) if v.get_value().dtype == jnp.bfloat16}


def not_routers(params: nnx.State, part: str = "") -> set[tuple]:
    paths = {path for path, _ in nnx.to_flat_state(params) if path[-1] != "w_router"}
    return {path for path in paths if part in path} if part else paths


def assert_same_digits(step, state, wide, batch) -> TrainState:
    """Steps from both states are the same, bitwise; the one from `state` is returned."""
    (theirs, of_wide), (ours, of_ours) = step(wide, batch), step(state, batch)
    assert_bitwise((ours.opt, of_ours), (theirs.opt, of_wide))
    assert of_ours["finite"] and of_ours["grad_norm"] > 0
    return ours


def assert_policy_is_merged(run: RunConfig, state: TrainState) -> None:
    """Samplers have float32 copies of what adapters change; all else is not copied."""
    policy = dict(nnx.to_flat_state(lora.policy(run.lora, state.params, "float32")))
    merged = flat(lora.merge(run.lora, widened(run, state).params))
    adapters, weights = lora.split(state.params)
    changed = {path[1:-1] for path, _ in nnx.to_flat_state(adapters)}
    for path, v in nnx.to_flat_state(weights):
        found = policy[path].get_value()
        if path in changed:
            np.testing.assert_allclose(found, merged[path], rtol=1e-6, atol=1e-7, err_msg=str(path))
            assert found.dtype == jnp.float32
        else:
            same = zip(jax.tree.leaves(found), jax.tree.leaves(v), strict=True)
            assert all(x is y for x, y in same), path


def dtypes_of(weight, step, state, batch) -> set[str]:
    """The dtypes in which a step's program has arrays of a weight's shape."""
    text = step.lower(state, batch).as_text()
    return set(re.findall(f"<{'x'.join(map(str, weight.shape))}x(b?f[0-9]+)>", text))


@pytest.fixture
def plan(monkeypatch):
    """A function that plans the arrays that training keeps, without compiling a step."""

    def refuse(lowered):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: not compiled")

    monkeypatch.setattr(cost, "compile_with_hlo", refuse)
    return lambda run, **how: cost.train_cost(run, sharding.make_mesh(), **how).persistent


@pytest.mark.long
def test_a_step_on_a_frozen_trunk_gives_the_digits_of_float32_weights(folder, plan):
    run = run_from(folder, "bfloat16", "trunk")
    state, batch = begin(run), batch_of(run)
    trained, frozen = split_trainable(run, state.params)
    assert narrow(trained) == set() and narrow(frozen) == not_routers(frozen)
    assert jax.tree.structure(state.opt.mu) == jax.tree.structure(trained)
    planned = plan(run)
    assert planned["frozen, in bfloat16"] == sum(2 * x.size for x in jax.tree.leaves(frozen))
    assert planned["other parameters"] == sum(x.nbytes for x in jax.tree.leaves(trained))
    before = jax.tree.map(np.array, frozen)
    experts = frozen["sparse"]["moe"]["experts"]
    step = make_step(Job(run))
    assert dtypes_of(experts["w_gate"], step, state, batch) == {"bf16"}
    ours = assert_same_digits(step, state, widened(run, state), batch)
    assert_bitwise(split_trainable(run, ours.params)[1], before)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_has_their_dtype_and_readers_that_of_computation(folder, tmp_path, dtype):
    run = claim(tmp_path / "run", run_from(folder, dtype))
    state = begin(run)
    with Checkpoints(tmp_path / "run", run) as checkpoints:
        checkpoints.save(state, {}, wait=True)
        assert_bitwise(checkpoints.restore()[0], state)  # so the next step is the same
    assert_policy_is_merged(run, state)
    read = nnx.state(load_run(tmp_path / "run").model, nnx.Param)
    assert narrow(read) == (not_routers(read) if dtype == "bfloat16" else set())
    again = Job(replace(run, lora=Lora()))  # trained, all is float32
    params = starts.begin(again, starts.open_run(str(tmp_path / "run")))[0].params
    want = lora.merge(run.lora, widened(run, state).params)
    assert_bitwise(jax.tree.map(np.array, params), jax.tree.map(np.array, want))


@pytest.fixture
def without_tokenizer(monkeypatch):
    """Let released folders without a tokenizer open."""
    monkeypatch.setattr(starts, "load_text", lambda _: plain_settings())
    monkeypatch.setattr(starts, "released_run", lambda _, cfg, text: make_run("nowhere", model=cfg))


@pytest.mark.usefixtures("without_tokenizer")
def test_fp8_and_4_bits_are_bfloat16_and_4_bits_do_not_train(folder, tmp_path):
    fp8, int4 = Path(folder).with_name("fp8"), str(write_folder(tmp_path / "int4", KIMI))
    ds.hf.convert(folder, fp8, dtype="fp8", quiet=True)
    read = [load(fp8, dtype, quiet=True) for dtype in (None, jnp.bfloat16)]
    assert_bitwise(*(nnx.state(model, nnx.Param) for model in read))
    params = nnx.state(load(int4, None, quiet=True), nnx.Param)
    assert narrow(params) == not_routers(params, "experts")
    run = starts.on_weights(make_run("nowhere"), start := starts.open_start(int4))
    with refused(f"^start='{int4}' has weights of 4 bits, which do not train; "):
        starts.check_start(run, start)
    starts.check_start(replace(run, lora=Lora(2)), start)


def packed_run(place: Path, kind: str, **layout) -> RunConfig:
    """A run from a folder whose weights have FP8, in two groups of 128, or 4 bits."""
    cfg, how = KIMI.cfg, replace(HOW["bfloat16"], layout=Layout(**layout))
    if kind == "fp8":
        cfg = replace(CFG, dim=256)
        ds.hf.save(random_model(cfg), place, fp8=True, quiet=True)
    else:
        write_folder(place, KIMI)
    return replace(run_from(str(place), "bfloat16"), model=cfg, execution=how)


def batch_of(run: RunConfig) -> dict[str, jax.Array]:
    return documents(4, 16, 2, seed=3, vocab_size=run.model.vocab_size)


INT4 = pytest.param("int4", {"w_gate": 4, "w_down": 3}, marks=pytest.mark.rare)


@pytest.mark.long
@pytest.mark.usefixtures("without_tokenizer")
@pytest.mark.parametrize(("kind", "groups"), [("fp8", {"w_gate": 2, "w_up": 2}), INT4])
def test_packed_weights_give_the_digits_of_bfloat16(tmp_path, plan, kind, groups):
    run = claim(tmp_path / "run", packed_run(tmp_path / "model", kind))
    state = begin(run)
    experts = state.params["sparse"]["moe"]["experts"]
    for name, count in groups.items():
        assert experts[name].get_value().scales.shape[-2] == count
    assert_policy_is_merged(run, state)
    wide = widened(run, state, jnp.bfloat16)
    plain = nnx.state(load(tmp_path / "model", jnp.bfloat16, quiet=True), nnx.Param)
    assert_bitwise(wide.params["sparse"]["moe"]["experts"], plain["sparse"]["moe"]["experts"])
    with Checkpoints(tmp_path / "run", run) as checkpoints:
        checkpoints.save(state, {}, wait=True)
        assert_bitwise(checkpoints.restore()[0], state)
    read = nnx.state(load_run(tmp_path / "run").model, nnx.Param)
    assert_bitwise(read, lora.merge(run.lora, jax.tree.map(jnp.copy, wide.params)))
    if kind == "fp8":
        nbytes = sum(x.nbytes for x in jax.tree.leaves(split_trainable(run, state.params)[1]))
        # float32, and planned in bfloat16
        nbytes -= state.params["sparse"]["moe"]["w_router"].nbytes // 2
        assert plan(run, frozen="fp8")["frozen, in fp8"] == nbytes
    step, batch = make_step(Job(run)), batch_of(run)
    assert "bf16" not in dtypes_of(experts["w_gate"], step, state, batch)
    assert_same_digits(step, state, wide, batch)


@pytest.mark.rare
@pytest.mark.usefixtures("without_tokenizer")
def test_packed_weights_give_the_digits_of_bfloat16_on_a_mesh(tmp_path):
    run, mesh = packed_run(tmp_path / "model", "fp8", fsdp=True), sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        state, _ = starts.begin(Job(run, mesh), starts.open_start(run.start))
        wide = on_mesh(widened(run, state, jnp.bfloat16), mesh, fsdp=True)
        batch = jax.device_put(batch_of(run), sharding.batch_sharding(mesh))
        assert_same_digits(make_step(Job(run, mesh)), state, wide, batch)
