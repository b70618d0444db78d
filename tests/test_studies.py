"""The studies' own code: counts of experts, planted keys."""

import importlib.util
import re

import numpy as np
import pytest
from runs import HERE

from dsv3_jax.presets import recipe
from experiments.lab.fingerprints import config_hash


@pytest.fixture
def load(monkeypatch):
    """Load a file of a study as a module."""

    def load(name):
        path = HERE / "experiments" / name
        monkeypatch.syspath_prepend(path.parent)
        spec = importlib.util.spec_from_file_location(f"study_{path.parent.name}_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_specialisation_shares_the_runs_of_the_balance_study(load):
    base = recipe("lab")
    balance = {r.identity for r in load("03_balance/run.py").STUDY.list_runs(base, (0, 1)).values()}
    runs = load("09_specialisation/run.py").STUDY.list_runs(base, (0,))
    assert {name for (name, _), r in runs.items() if r.identity not in balance} == {"Switch loss, α 1e-2"}
    assert config_hash(base) in {
        identity.config for identity in balance
    }  # the base recipe, which other studies share too


def test_experts_are_sorted_by_favourite_domain(load):
    nine = load("09_specialisation/run.py")
    ratio = nine.over_mean(np.array([[[2, 6, 1, 3]], [[40, 10, 20, 10]]]))
    np.testing.assert_allclose(ratio[:, 0], [[2 / 3, 2, 1 / 3, 1], [2, 0.5, 1, 0.5]])
    assert nine.by_favourite(ratio[:, 0]).tolist() == [1, 3, 0, 2]


def test_keys_are_planted_and_removed_again(load):
    planted = load("10_yarn/planted.py")
    assert planted.plain("The 3 Keys, é and 42 more?! ") == "the  keys,  and  more "
    text = planted.plain("the keys, and more. " * 400)
    document = planted.with_keys(text, np.random.default_rng(0), 512, but="!")
    pairs = re.findall("([?!@])([A-Z0-9])", document)
    assert 70 < len(pairs) < 250 and set(dict(pairs)) == {"?", "@"}
    assert len(set(pairs)) == 2  # a key has one value
    assert all(value in planted.VALUES[key] for key, value in pairs) and planted.without_keys(document) == text


@pytest.mark.parametrize("distance", [16, 60, 198])
def test_a_question_has_one_answer_at_its_distance(load, distance):
    planted = load("10_yarn/planted.py")
    rng, values = np.random.default_rng(distance), set()
    for _ in range(20):
        row = planted.question("some words and more of them " * 10, 200, distance, rng, 512)
        key, value = row[-2:]
        values.add(value)
        assert len(row) == 200 and row.count(key) == 2 and row[row.index(key) + 1] == value
        assert not set(row[:-2].replace(key + value, "")) & set(planted.VALUES[key])
        assert abs(198 - row.index(key) - distance) <= 8
        assert not re.search("[?!@](?![A-Z0-9])|(?<![?!@])[A-Z0-9]", row)  # no other pair is cut
    assert len(values) > 3


def test_the_corpus_is_written_once(load, tmp_path, monkeypatch):
    planted = load("10_yarn/planted.py")
    monkeypatch.setattr(planted, "load_corpus", lambda cfg: corpus_of(20))
    for folder in ("a", "b"):
        planted.write_corpus(tmp_path / folder / "keys.jsonl", 100)
    first, second = ((tmp_path / folder / "keys.jsonl").read_bytes() for folder in ("a", "b"))
    assert first == second and first.count(b"\n") == 20
    planted.write_corpus(tmp_path / "a" / "keys.jsonl", 100, seed=1)
    assert (tmp_path / "a" / "keys.jsonl").read_bytes() == first and len(list((tmp_path / "a").iterdir())) == 1


def corpus_of(count):
    from dsv3_jax.data.corpus import Corpus, Document

    documents = tuple(Document(f"text number {i} " * 30, "code") for i in range(count))
    return Corpus(documents, (), ("code",), "")
