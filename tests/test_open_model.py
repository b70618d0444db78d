"""A released model is used where it lies: opened, measured, and trained on, without a run of its own."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from models import random_model, small
from runs import assert_bitwise, make_run, unhooked_cli, write_text

from dsv3_jax import hf
from dsv3_jax.config import ConfigError
from dsv3_jax.hf.open_model import load_text, open_draft, open_model
from dsv3_jax.loading import load_model
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.train import open_start
from dsv3_jax.training import warm_start
from dsv3_jax.training.step import Job

pytestmark = pytest.mark.usefixtures("light_compiles")

CFG = small(num_layers=2, vocab_size=260, mtp_depth=1)


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "model"
    hf.save(model, path, quiet=True)
    name_end(path, 256)  # as earlier versions wrote a run of bytes
    return path


def name_end(folder, eos):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos}))


def arrays(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_it_opens_as_a_run_does(folder, model):
    """Step 0, float32 on a CPU, and the bytes that its vocabulary is of."""
    opened, run, step = open_model(folder, kernels="xla")
    assert_bitwise(arrays(opened), arrays(model))
    assert (step, run.data.tokenizer, run.model) == (0, "bytes", opened.cfg)
    assert opened.kernels.target.kernels == "xla" and opened.execution.compute_dtype == "float32"
    assert_bitwise(arrays(open_draft(folder, run)), arrays(model))


def test_a_step_is_for_runs(folder):
    for load in (open_model, load_model):
        with pytest.raises(ValueError, match="step=3 is for runs, and folder=.* is a released one"):
            load(folder, step=3)


def test_text_needs_a_tokenizer_and_weights_do_not(tmp_path):
    other = random_model(replace(CFG, vocab_size=37, mtp_depth=0))
    hf.save(other, tmp_path / "model", quiet=True)
    for read in (open_model, load_text):
        with pytest.raises(ValueError, match="has no tokenizer: neither tokenizer.json nor tiktoken.model is in it$"):
            read(tmp_path / "model")
    assert_bitwise(arrays(load_model(tmp_path / "model")), arrays(other))


def test_an_earlier_export_of_bytes_is_known_by_its_end(folder, tmp_path):
    """Only the vocabulary's size and the end of a document together say that tokens are bytes."""
    text = load_text(folder)
    assert text.encode("<eos>") == list(b"<eos>") and text.stop_ids == (256,)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match="the format of tokenizer.model is not supported"):
        load_text(copy)
    (copy / "tokenizer.model").unlink()
    for eos in (None, 0):
        name_end(copy, eos)
        for read in (open_model, load_text):
            with pytest.raises(ValueError, match='if its tokens are bytes, write "eos_token_id": 256 into its config'):
                read(copy)


@pytest.mark.long
@pytest.mark.parametrize("command", ["eval", "stats"])
def test_commands_take_it(folder, tmp_path, command):
    text, out = write_text(tmp_path / "text"), io.StringIO()
    more = ["--out", str(tmp_path / "stats")] if command == "stats" else []
    with contextlib.redirect_stdout(out):
        assert unhooked_cli().main([command, str(folder), "--paths", text, "--batches", "1", *more]) == 0
    assert ("val_loss" in out.getvalue()) == (command == "eval")
    assert (tmp_path / "stats" / "index.html").exists() == (command == "stats")
    assert sorted(path.name for path in folder.iterdir())[0] == "config.json"  # nothing was written there


@pytest.mark.long
def test_training_starts_from_it(folder, model, tmp_path):
    """The weights and biases are its own, bit by bit; the optimizer is new; data and schedule are the recipe's."""
    recipe = make_run(write_text(tmp_path / "text"))
    start = open_start(str(folder))
    run = warm_start.on_weights(recipe, start)
    assert (run.model, run.start, run.steps) == (hf.load(folder, quiet=True).cfg, str(folder), recipe.steps)
    assert run.data == replace(recipe.data, tokenizer="bytes")
    state, sentence = warm_start.begin(Job(run), start)
    assert_bitwise(state.params, nnx.state(model, nnx.Param))
    assert_bitwise(state.bias, nnx.state(model, RouterBias))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((state.opt.mu, state.opt.nu)))
    assert sentence == f"the weights are those in {folder}"
    with pytest.raises(ConfigError, match="model.dim=12 is not that of start="):
        warm_start.check(replace(run, model=replace(run.model, dim=12)), start)
