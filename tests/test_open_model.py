"""A released model is used as it is: opened, measured, and trained on, without a run of its own."""

import shutil
from dataclasses import replace

import pytest
from models import arrays_of, random_model, small
from runs import assert_bitwise, refused

from dsv3_jax import hf
from dsv3_jax.config import DataConfig
from dsv3_jax.data.tokenizer import byte_tokenizer_json, train_bpe
from dsv3_jax.runs.open_model import load_model, load_text, open_draft, open_model, with_paths

CFG = small(num_layers=2, vocab_size=260, mtp_depth=1)


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("released") / "model"
    hf.save(model, path, quiet=True)
    (path / "tokenizer.json").write_text(byte_tokenizer_json())
    return path


def test_it_opens_as_a_run_does(folder, model):
    """Step 0, float32 on a CPU, and its own tokenizer. A draft has no multi-token heads."""
    opened, run, step = open_model(folder, kernels="xla")
    assert_bitwise(arrays_of(opened), arrays_of(model))
    assert (step, run.data.tokenizer, run.model) == (0, str(folder / "tokenizer.json"), opened.cfg)
    assert opened.kernels.target.kernels == "xla" and opened.execution.compute_dtype == "float32"
    draft = open_draft(folder, load_text(folder).tokenizer)
    assert draft.cfg == replace(opened.cfg, mtp_depth=0)
    with refused("step=3 is for runs, and folder=.* is a released one"):
        open_model(folder, step=3)


def test_a_draft_must_have_the_same_tokenizer(folder, tmp_path):
    train_bpe(["the same words, the same words " * 9], 280, str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    with refused("^draft='.*model' has another tokenizer"):
        open_draft(folder, load_text(tmp_path).tokenizer)


def test_text_needs_a_tokenizer_and_weights_do_not(folder, model, tmp_path):
    shutil.copytree(folder, tmp_path / "model", ignore=lambda *_: ["tokenizer.json"])
    for read in (open_model, load_text):
        with refused("has no tokenizer: neither tokenizer.json nor tiktoken.model is in it$"):
            read(tmp_path / "model")
    assert_bitwise(arrays_of(load_model(tmp_path / "model")), arrays_of(model))


def test_a_run_of_chats_is_measured_on_chats(tmp_path):
    """As it is trained; a folder with another file is text, notes beside its tables."""
    chats = DataConfig(format="chat")
    (tmp_path / "a.jsonl").write_text('{"messages": []}')
    for place in ("a.jsonl", "a.JSON", "a.jsonl.gz", "notes/a.parquet", str(tmp_path)):
        assert with_paths(chats, (place,)).format == "chat"
    assert with_paths(DataConfig(), ("a.jsonl",)).format == "text"
    (tmp_path / "notes.md").write_text("no chats")
    assert with_paths(chats, (str(tmp_path),)).format == "text"
