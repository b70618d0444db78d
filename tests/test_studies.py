"""The studies' own code: counts of experts, planted keys, rows of long texts, parts taken away."""

import importlib.util
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from runs import HERE

from dsv3_jax.config import replace
from dsv3_jax.data.corpus import Document
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.ops import routing
from dsv3_jax.presets import recipe
from experiments.lab.fingerprints import settings_of


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
    assert {r.identity for r in runs.values()} <= balance
    # The base recipe is among them: other studies share it too.
    assert settings_of(base) in [identity.settings for identity in balance]


def test_a_token_is_sent_once_to_each_other_device_of_its_experts(load):
    ids = np.zeros((1, 16, 1, 3), np.int32)  # 8 devices with 2 rows and 4 experts each
    ids[0, :, 0] = [0, 1, 4]  # on the first two devices
    ids[0, 15, 0] = [31, 30, 29]  # on the last device, whose row this is
    assert load("05_groups/on_mesh.py").copies(ids, 4).ravel().tolist() == [1, 1, 1, 1, *[2] * 11, 0]


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


def test_rows_by_position_come_from_many_documents(load):
    """F1: rows were kept from packed validation batches, where 3 of 128 are of one document."""
    yarn = load("10_yarn/run.py")
    long = tuple(Document("".join(chr(97 + (i + j) % 26) for j in range(60 + i)), "keys") for i in range(150))
    documents = (*long, *(Document("short", "keys") for _ in range(50)))
    rows = yarn.held_out_rows(documents, ByteTokenizer(), 64)
    assert len(rows) == 146 and len({tuple(row) for row in rows.tolist()}) == 13
    assert rows[0].tolist() == list(long[4].text.encode()[-64:])
    with pytest.raises(ValueError, match="rows=99 from held-out documents"):
        yarn.held_out_rows(long[:103], ByteTokenizer(), 64)


def test_growing_contexts_score_the_same_bytes(load, monkeypatch):
    """A stand-in model costs 1 / (tokens before the target), so the loss says which context each target had."""
    yarn = load("10_yarn/run.py")
    length = 16
    monkeypatch.setattr(yarn, "retrieved", lambda *_: [0.0])
    seen = []

    def predict(model, tokens):
        seen.append(tokens)
        return np.broadcast_to(1 / np.arange(1, tokens.shape[1]), (len(tokens), tokens.shape[1] - 1)), None

    monkeypatch.setattr(yarn, "predict", predict)
    texts = tuple(
        Document("some words of the text, without any sign of a key in them; " * 2, "keys") for _ in range(100)
    )
    run = SimpleNamespace(model=SimpleNamespace(max_positions=4 * length))
    trained = SimpleNamespace(run=run, tokenizer=ByteTokenizer(), corpus=SimpleNamespace(val=texts))
    found = yarn.scores(trained, None)
    half = length // 2
    assert found["documents"] == 100 and [rows.shape[1] for rows in seen] == [12, 16, 24, 32, 48, 64]
    assert {tuple(rows[0, -half:].tolist()) for rows in seen} == {tuple(seen[0][0, -half:].tolist())}
    np.testing.assert_allclose(found["loss"], [np.mean(1 / np.arange(n - half, n)) for n in (12, 16, 24, 32, 48, 64)])


def test_the_experts_with_the_highest_scores_are_skipped(load, rng):
    """Against a loop: of the order of s + b, the first m are passed over and the next K are taken."""
    parts = load("14_parts/run.py")
    cfg = replace(recipe("lab").model, num_experts=8, experts_per_token=5, num_groups=1, groups_per_token=1)
    logits, bias = rng.normal(size=(6, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    found = parts.skip_top(routing.route, 2, jnp.asarray(logits), jnp.asarray(bias), cfg)
    scores = 1 / (1 + np.exp(-logits))
    for row, (ids, gates) in enumerate(zip(np.asarray(found.expert_ids), np.asarray(found.gates), strict=True)):
        wanted = np.argsort(-(scores[row] + bias))[2:5]
        assert ids.tolist() == wanted.tolist()
        np.testing.assert_allclose(gates, cfg.routed_scale * scores[row, wanted] / scores[row, wanted].sum(), rtol=1e-5)


def test_windows_cut_documents_and_restart_positions(load):
    parts = load("14_parts/run.py")
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32)
    cut = parts.windows_of({"tokens": segments, "segment_ids": segments}, 3)
    assert cut["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 3, 4, 0]]  # the second document is cut at 6 too
    assert cut["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]


def test_far_keys_are_those_beyond_the_trained_length(load):
    retrieval = load("13_retrieval/run.py")
    far = [[float(c * d > 1) for d in retrieval.DEPTHS] for c in retrieval.CONTEXTS]
    assert retrieval.beyond("own")({"own": far}) == 100 and retrieval.within("own")({"own": far}) == 0
    assert sum(map(sum, far)) == 12  # 2L: 2 of 4 depths, 4L: 3, 8L: 3, the nearest is at L; 16L: 4
