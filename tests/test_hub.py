"""Hugging Face's datasets are read as files of the same rows; without the package: a sentence."""

import datetime
import json
import sys

import pytest

from dsv3_jax.chat.examples import contents
from dsv3_jax.data import hub
from dsv3_jax.data.corpus import read_documents

ROWS = [
    {"body": f"text {i} " * (1 + i % 5), "domain": ("web", "code")[i % 2], "n": i}
    for i in range(40)
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The rows as JSONL, and as `datasets` saves them: one dataset, and one with two splits."""
    datasets = pytest.importorskip(
        "datasets", reason="datasets is not installed: pip install datasets"
    )
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
    with pytest.raises(ValueError, match=f"hf:{saved}/splits@dev.*there is no split 'dev' among"):
        list(read_documents([f"hf:{saved}/splits@dev"], "body"))


def test_a_time_in_a_message_is_no_value_of_json(saved):
    import datasets

    turns = [{"role": "user", "content": "hi", "time": datetime.datetime(2026, 1, 2)}]
    datasets.Dataset.from_list([{"body": turns}]).save_to_disk(str(saved / "times"))
    with pytest.raises(
        ValueError, match="times cannot be read after row 0: Object of type datetime is not JSON"
    ):
        list(contents((f"hf:{saved / 'times'}",), "body"))


def test_the_column_of_chats_can_have_another_name(tmp_path):
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    (file := tmp_path / "chats.jsonl").write_text(
        json.dumps({"turns": turns, "id": 7, "domain": "sums"})
    )
    [(record, domain, _)] = contents((str(file),), "turns")
    assert (record, domain) == ({"messages": turns, "tools": None}, "sums")


def test_names(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hf:a/b .* needs datasets.*pip install datasets"):
        list(read_documents(["hf:a/b"]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    assert tuple(map(hub.absolute, ("hf:allenai/c4:en@train", "hf:saved@test", "books"))) == (
        "hf:allenai/c4:en@train",
        f"hf:{tmp_path}/saved@test",
        f"{tmp_path}/books",
    )
