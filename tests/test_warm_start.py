"""A run that begins with another's weights, or trains heads on its trunk, depends on it no more."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from models import flat
from runs import (
    MODEL,
    assert_bitwise,
    by_command,
    documents,
    fresh_state,
    last_state,
    make_run,
    refused,
    rows_of,
    save_run,
)
from runs import write_text as text_in

from dsv3_jax.config import Balance, Execution, Layout, Yarn
from dsv3_jax.data import tokenizer
from dsv3_jax.mesh import sharding
from dsv3_jax.runs import loop
from dsv3_jax.runs import start as starts
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import read_run
from dsv3_jax.runs.start import on_trunk, on_weights
from dsv3_jax.training.state import Job
from dsv3_jax.training.step import make_step

pytestmark = pytest.mark.long

TRUNK = replace(MODEL, num_layers=1)
LONGER = {"yarn": Yarn(factor=4.0, original_max_positions=16), "balance": Balance(bias_rate=3e-3)}


@pytest.fixture(scope="module")
def other(root) -> str:
    """A run folder whose checkpoint of step 7 is random, biases too."""
    return save(root / "warm start" / "other", make_run(text_in(root / "warm start" / "text")))


@pytest.fixture(scope="module")
def trunk(root) -> str:
    """A run folder as `other`, with one layer."""
    return save(root / "frozen" / "trunk", make_run(text_in(root / "frozen" / "text"), model=TRUNK))


def save(folder: Path, run) -> str:
    save_run(folder, run)
    return str(folder)


RECIPE = dict(eval_every=4, steps=4, save_every=2)


def run_from(other: str, **model):
    """A run of four steps that begins with the other's weights."""
    run = on_weights(make_run("unread", **RECIPE), starts.open_run(other))
    return replace(run, model=replace(run.model, **LONGER | model))


def run_on(trunk: str, **model):
    """A run of four steps of Medusa's heads, which compile fastest, and what `model` changes."""
    run = on_trunk(make_run("unread", **RECIPE), starts.open_run(trunk))
    return replace(run, model=replace(run.model, **{"mtp_kind": "medusa", "mtp_depth": 2, **model}))


def begin(run, mesh=None):
    return starts.begin(Job(run, mesh), starts.open_run(run.start or run.trunk))


def cut(state) -> tuple[dict, dict]:
    """(heads, trunk) of parameters and biases, by name."""
    arrays = flat(state.params) | flat(state.bias)
    heads = {path: a for path, a in arrays.items() if path[0] == "mtp"}
    return heads, {path: a for path, a in arrays.items() if path[0] != "mtp"}


def test_weights_and_biases_are_the_others_and_all_else_is_new(other):
    """On a mesh they are sharded as this run's layout says, whatever the other's was."""
    run = run_from(other)
    assert run.data == read_run(other).data and run.model == replace(MODEL, **LONGER)
    assert run.execution == read_run(other).execution
    state, sentence = begin(run)
    wanted = fresh_state(read_run(other))
    # the optimizer's are zeros
    assert_bitwise((state.params, state.bias, state.opt), (wanted.params, wanted.bias, wanted.opt))
    assert all(np.asarray(b[...]).any() for _, b in nnx.to_flat_state(state.bias))
    assert (int(state.step), state.step.dtype) == (0, np.int32)
    assert sentence == f"the weights are those of step 7 in {other}"
    mesh = sharding.make_mesh(2, 2)
    there, _ = begin(replace(run, execution=Execution(layout=Layout(fsdp=True))), mesh)
    where = sharding.state_sharding(there, mesh, fsdp=True)
    for leaf, at in zip(jax.tree.leaves(there), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    assert_bitwise(jax.device_get(there), jax.device_get(state))


def test_it_resumes_without_the_other(trunk, tmp_path):
    """Its trunk is the other's last checkpoint, with the biases.

    Nothing is written there: a half-written checkpoint may be a run's that is training.
    """
    mine = shutil.copytree(trunk, tmp_path / "mine")
    (half := mine / "checkpoints" / "9.orbax-checkpoint-tmp-1").mkdir()
    run = run_on(str(mine))
    sentence = begin(run)[1]
    assert sentence.startswith(f"the trunk is that of step 7 in {mine}; only the multi-token heads")
    assert loop.fit(run, tmp_path / "whole", quiet=True).finished and half.exists()
    assert loop.fit(run, tmp_path / "parts", stop_after=2, quiet=True).step == 2
    shutil.rmtree(mine)
    assert loop.fit(run, tmp_path / "parts", quiet=True).resumed_from == 2
    (whole, position), (parts, again) = (last_state(tmp_path / x) for x in ("whole", "parts"))
    assert_bitwise(parts, whole)
    assert again == position and rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    frozen = cut(whole)[1]
    assert_bitwise(frozen, cut(fresh_state(read_run(trunk)))[1])
    assert frozen["sparse", "moe", "bias"].all()
    assert load_run(tmp_path / "whole").model.cfg == run.model


def test_a_model_that_does_not_fit_is_refused(other, tmp_path):
    with refused(f"^model.num_heads=1 is not that of start='{other}', 2$"):
        loop.fit(run_from(other, num_heads=1), tmp_path / "new", quiet=True)
    with refused("is given for a run with start=None; make the run by on_w"):
        plain = replace(run_from(other), start=None)
        loop.fit(plain, tmp_path / "new", start=starts.open_start(other), quiet=True)
    copy = shutil.copytree(other, tmp_path / "copy")
    with refused(f"^start='{copy}' is given for a run with start='{other}'; make the run by on_w"):
        loop.fit(run_from(other), tmp_path / "new", start=starts.open_start(str(copy)), quiet=True)
    assert not (tmp_path / "new").exists()


def test_heads_learn_and_the_trunk_is_frozen(trunk):
    run = run_on(trunk, mtp_kind="deepseek", mtp_depth=1)
    step, state, rows = make_step(Job(run)), fresh_state(run), []
    batch = documents(4, 16, most=2)
    heads, frozen = cut(state)
    for means in state.opt:  # of the heads alone: no gradient of anything else is ever made
        assert {path[0] for path, _ in nnx.to_flat_state(means)} == {"mtp"}
    for _ in range(3):
        state, metrics = step(state, batch)
        rows.append(jax.device_get(metrics))
    assert all(row["finite"] for row in rows)
    assert rows[-1]["loss"] == rows[0]["loss"]  # the trunk's own
    assert (rows[-1]["mtp_loss"] < rows[0]["mtp_loss"]).all()
    after, now = cut(state)
    assert_bitwise(now, frozen)
    for path, before in heads.items():
        assert (after[path] != before).any(), f"{path} did not move"
        if path[-1] == "bias":  # follows its head's load
            for row in rows:
                load = row["load"][1 + path[1]]
                before = before + np.float32(1e-2) * np.sign(load.mean() - load)
            np.testing.assert_array_equal(after[path], before)


def test_the_command_line_takes_model_text_and_tokenizer_from_the_other(trunk, tmp_path):
    mine, out, run = tmp_path / "mine", tmp_path / "out", read_run(trunk)
    words = str(mine / "tokenizer.json")
    tokenizer.train_bpe(["a b c d e f g h i j k l m n o p " * 9], 260, words)
    data = replace(run.data, tokenizer=words)
    save(mine, replace(run, model=replace(TRUNK, mtp_depth=0), data=data))
    argv = ["train", "tiny", f"--out={out}", "--trunk", mine]
    argv += ["--model.mtp-kind", "medusa", "--steps", 2]
    code, said, _ = by_command(*argv)
    assert code == 0 and "the trunk is that of step 7" in said
    run = read_run(out)
    assert run.model == replace(TRUNK, mtp_depth=1, mtp_kind="medusa") and run.trunk == str(mine)
    assert run.data == replace(data, tokenizer=str(out / "tokenizer.json"))
