"""Weights that do not train keep the dtype of their start, in memory and in checkpoints, and change no digit by it."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from models import random_model
from released import GRID, write_folder
from runs import MODEL, assert_bitwise, make_run, packed_batch

import dsv3_jax as ds
from dsv3_jax import train
from dsv3_jax.config import ConfigError, Execution, Lora, RunConfig
from dsv3_jax.data.tokenizer import byte_tokenizer_json
from dsv3_jax.hf.reading import load
from dsv3_jax.mesh import sharding
from dsv3_jax.planning import cost
from dsv3_jax.train import open_start
from dsv3_jax.training import lora, warm_start
from dsv3_jax.training.checkpoint import Checkpoints, load_run
from dsv3_jax.training.run_folder import claim
from dsv3_jax.training.step import Job, TrainState, make_step, map_frozen, split_trainable

BF16 = np.dtype(ml_dtypes.bfloat16)
CFG = replace(MODEL, mtp_depth=0)
LORA = Lora(2, 3.0, ("attention", "routed"))
HOW = {"float32": Execution(), "bfloat16": Execution(compute_dtype="bfloat16", remat="full")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A released folder in bfloat16."""
    path = tmp_path_factory.mktemp("released") / "model"
    ds.hf.save(random_model(CFG), path, dtype="bfloat16", quiet=True)
    (path / "tokenizer.json").write_text(byte_tokenizer_json())
    return str(path)


def run_from(folder: str, dtype: str, on: str = "lora") -> RunConfig:
    run = warm_start.on_weights(make_run("nowhere", execution=HOW[dtype]), open_start(folder))
    if on == "lora":
        return replace(run, lora=LORA)
    return replace(run, start=None, trunk=folder, model=replace(CFG, mtp_depth=1, mtp_kind="medusa"))


def begin(run: RunConfig) -> TrainState:
    """The state of step 0, with adapters of which none is 0."""
    state, _ = warm_start.begin(Job(run), open_start(run.trunk or run.start))
    trained, frozen = split_trainable(run, state.params)
    return replace(state, params=nnx.merge_state(jax.tree.map(lambda x: x + 0.01, trained), frozen))


def widened(run: RunConfig, state: TrainState) -> TrainState:
    params = map_frozen(lambda x: x.astype(jnp.float32), run, state.params)
    return jax.tree.map(jnp.copy, replace(state, params=params))


def batch() -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    return packed_batch(rng, np.sort(rng.integers(1, 3, (4, 16)), axis=1))


def dtypes(params: nnx.State) -> dict[str, np.dtype]:
    return {".".join(map(str, path)): v.get_value().dtype for path, v in nnx.to_flat_state(params)}


@pytest.mark.parametrize(
    ("dtype", "on"),
    [("float32", "lora"), pytest.param("bfloat16", "lora", marks=pytest.mark.long), ("bfloat16", "trunk")],
)
def test_a_step_gives_the_digits_of_float32_weights(folder, dtype, on):
    """Bitwise, since each use casts to one dtype; with remat no array is a float32 stack of frozen weights."""
    run = run_from(folder, dtype, on)
    state = begin(run)
    trained, frozen = split_trainable(run, state.params)
    wide = {name for name, dtype in dtypes(frozen).items() if dtype != BF16}
    assert wide == {name for name in dtypes(frozen) if "w_router" in name} and len(dtypes(frozen)) > 12
    assert set(dtypes(trained).values()) == {np.dtype(np.float32)}
    assert jax.tree.structure(state.opt.mu) == jax.tree.structure(trained)
    step, before = make_step(Job(run)), jax.tree.map(np.array, frozen)
    shape = "x".join(map(str, frozen["sparse"]["moe"]["experts"]["w_gate"].shape))
    text = step.lower(state, batch()).as_text()
    assert f"<{shape}xbf16>" in text and (dtype == "float32" or f"<{shape}xf32>" not in text)
    other, theirs = step(widened(run, state), batch())
    state, ours = step(state, batch())
    assert_bitwise(ours, theirs)
    assert_bitwise(state.opt, other.opt)
    assert_bitwise(split_trainable(run, state.params)[1], before)
    assert ours["finite"] and np.any(jax.tree.leaves(state.opt.mu)[0])


@pytest.mark.parametrize("dtype", HOW)
def test_a_checkpoint_has_their_dtype_and_readers_that_of_computation(folder, tmp_path, dtype):
    run = claim(tmp_path / "run", run_from(folder, dtype))
    state = begin(run)
    with Checkpoints(tmp_path / "run", run) as checkpoints:
        checkpoints.save(state, {}, wait=True)
        restored, _ = checkpoints.restore()
    assert_bitwise(restored, state)  # so the next step is the same
    read = dtypes(nnx.state(load_run(tmp_path / "run").model, nnx.Param))
    narrow = {name for name, dtype in read.items() if dtype == BF16}
    assert narrow == ({name for name in read if "w_router" not in name} if dtype == "bfloat16" else set())
    again = replace(run, start=str(tmp_path / "run"), lora=Lora())  # trained, all is float32
    params = warm_start.begin(Job(again), warm_start.open_run(again.start))[0].params
    want = lora.merge(run.lora, widened(run, begin(run)).params)
    assert_bitwise(jax.tree.map(np.array, params), jax.tree.map(np.array, want))


def test_each_parameter_has_the_dtype_of_its_tensors(folder, tmp_path):
    """Float32 where one of them is wider than bfloat16; FP8 and 4 bits are rounded to bfloat16, once."""
    fp8 = Path(folder).with_name("fp8")
    ds.hf.convert(folder, fp8, dtype="fp8", quiet=True)
    own, plain = (nnx.state(load(fp8, dtype, quiet=True), nnx.Param) for dtype in (None, jnp.bfloat16))
    assert_bitwise(own, plain)
    cell = GRID["Kimi K2-Thinking"]  # experts of 4 bits, all else float32
    found = dtypes(nnx.state(load(write_folder(tmp_path / "int4", cell), None, quiet=True), nnx.Param))
    assert {name for name, dtype in found.items() if dtype == BF16} == {n for n in found if "experts" in n}


def test_weights_of_4_bits_do_not_train(tmp_path, monkeypatch):
    path = str(write_folder(tmp_path / "int4", GRID["Kimi K2-Thinking"]))
    monkeypatch.setattr(train, "released_run", lambda folder, cfg: make_run("nowhere", model=cfg))
    start = open_start(path)
    run = warm_start.on_weights(make_run("nowhere"), start)
    with pytest.raises(ConfigError, match=f"^start='{path}' has weights of 4 bits, which do not train; "):
        warm_start.check(run, start)
    warm_start.check(replace(run, lora=Lora(2)), start)


def test_a_plan_counts_them_in_their_dtype(folder, monkeypatch):
    def refuse(lowered):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: not compiled")

    monkeypatch.setattr(cost, "compile_with_hlo", refuse)
    run = run_from(folder, "bfloat16")
    found = cost.train_cost(run, sharding.make_mesh()).persistent
    trained, frozen = split_trainable(run, begin(run).params)
    routers = sum(v.get_value().nbytes for path, v in nnx.to_flat_state(frozen) if path[-1] == "w_router")
    assert found["frozen, in bfloat16"] == sum(x.nbytes for x in jax.tree.leaves(frozen)) - routers // 2
    assert found["routed experts"] + found["other parameters"] == sum(x.nbytes for x in jax.tree.leaves(trained))
