"""Datasets of Hugging Face are read as files with the same rows are; without the package there is one sentence."""

import json
import sys

import pytest

from dsv3_jax.chat.examples import records_of
from dsv3_jax.cli.tokenize import Tokenize, tokenize
from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import read_documents
from dsv3_jax.data.hub import parts_of
from dsv3_jax.data.shards import open_shards
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.training.run_folder import absolute

ROWS = [{"body": f"text {i} " * (1 + i % 5), "domain": ("web", "code")[i % 2], "n": i} for i in range(40)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The rows as JSONL, and as `datasets` saves them: one dataset, and one with two splits."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'dsv3-jax[datasets]'")
    root = tmp_path_factory.mktemp("hub")
    (root / "rows").mkdir()
    (root / "rows" / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(str(root / "one"))
    datasets.DatasetDict(train=made, test=made.select(range(3))).save_to_disk(str(root / "splits"))
    return root


def test_a_dataset_has_the_documents_of_its_rows(saved):
    expected = list(read_documents([str(saved / "rows")], "body"))
    for name in ("one", "splits", "rows"):  # "rows" by load_dataset, streamed
        assert list(read_documents([f"hf:{saved / name}"], "body")) == expected
    assert list(read_documents([f"hf:{saved / 'splits'}@test"], "body")) == expected[:3]


def test_a_dataset_becomes_the_shards_of_its_rows(saved, tmp_path):
    bytes_of = {}
    for name, path in (("a", saved / "rows"), ("b", f"hf:{saved / 'one'}")):
        job = Tokenize((str(path),), tmp_path / name, row_tokens=32, val_fraction=0.2, text_column="body", workers=1)
        tokenize(job)
        bytes_of[name] = [path.read_bytes() for path in sorted((tmp_path / name).glob("*.array_record"))]
    assert bytes_of["a"] == bytes_of["b"] and len(bytes_of["a"]) == 2
    cfg = DataConfig(paths=(str(tmp_path / "b"),), format="shards", seq_len=16, batch_size=2)
    assert open_shards(cfg, ByteTokenizer()).domains == ("web", "code")


@pytest.mark.parametrize(
    ("path", "column", "sentence"),
    [
        ("hf:{}/one", "text", "there is no column 'text' among"),
        ("hf:{}/splits@dev", "body", "there is no split 'dev' among"),
        ("hf:{}/one", "n", "not a string"),
    ],
)
def test_a_dataset_that_does_not_fit_is_named(saved, path, column, sentence):
    path = path.format(saved)
    with pytest.raises(ValueError, match=sentence) as info:
        list(read_documents([path], column))
    assert path in str(info.value)


def test_the_column_of_chats_can_have_another_name(tmp_path):
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"turns": turns, "id": 7, "domain": "sums"}) + "\n" + json.dumps({"turns": "a text"}))
    assert [record for _, record, _ in records_of(str(file), "turns")] == [
        {"messages": turns, "domain": "sums"},
        {"text": "a text"},
    ]
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 1, has no 'talk'; it has \['domain', 'id', 'turns'\]"):
        list(records_of(str(file), "talk"))


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"path='hf:a/b' needs datasets.*dsv3-jax\[datasets\]"):
        list(read_documents(["hf:a/b"]))


@pytest.mark.parametrize("path", ["hf:", "hf:@train", "hf:a/b@", "hf:a/b:", "hf::en"])
def test_names_with_empty_parts(path):
    with pytest.raises(ValueError, match="has an empty part"):
        parts_of(path)


def test_names_of_the_hub_are_no_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    assert absolute(("hf:allenai/c4:en@train", "hf:saved@test", "books")) == (
        "hf:allenai/c4:en@train",
        f"hf:{tmp_path}/saved@test",
        f"{tmp_path}/books",
    )
