"""Inputs and comparisons of `dsv3 stats`: the user's text to its end, another run, earlier checkpoints."""

import contextlib
import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from runs import MODEL, cheap_compiles, finished, fresh_state, make_run, unhooked_cli

from dsv3_jax.config import DataConfig
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.hf.open_model import open_model
from dsv3_jax.model.counting import size
from dsv3_jax.stats import RoutingStats, agreement, reading, report, specialisation
from dsv3_jax.stats.contexts import Contexts
from dsv3_jax.stats.header import name_of
from dsv3_jax.stats.load_log import LoadLog
from dsv3_jax.stats.numbers import as_json
from dsv3_jax.stats.others import read_rows
from dsv3_jax.stats.text import AFTER, BEFORE
from dsv3_jax.stats.token_counts import TokenCounts
from dsv3_jax.stats.token_rows import rows_of
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.evaluate import evaluate
from dsv3_jax.training.run_folder import claim

TOKENIZER, DATA = ByteTokenizer(), DataConfig(seq_len=16, batch_size=4, val_fraction=0.1)


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    with cheap_compiles():
        yield tmp_path_factory.getbasetemp()


# What is read


def tokens_of(batches) -> np.ndarray:
    """All tokens but the ends of documents, sorted."""
    tokens = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
    return np.sort(tokens[tokens != TOKENIZER.eos_id])


def test_the_users_text_is_read_to_its_end(tmp_path):
    texts = {"a/one.txt": "first text, " * 9, "a/two.txt": "x", "b/three.txt": "é second\n" * 20}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    read = reading.open_text(DATA, tmp_path, TOKENIZER, paths=(str(tmp_path),))
    np.testing.assert_array_equal(tokens_of(read.batches), np.sort(list("".join(texts.values()).encode())))
    assert read.domains == ("a", "b") and read.mix is None
    few = reading.open_text(DATA, tmp_path, TOKENIZER, paths=(str(tmp_path),), batches=2)
    assert len(few.batches) == 2 < len(read.batches)
    one = reading.open_text(DATA, tmp_path, TOKENIZER, paths=(str(tmp_path / "a/two.txt"),))
    assert tokens_of(one.batches).tolist() == [ord("x")]  # one document is enough


def test_a_text_is_a_sentence_or_a_file(tmp_path):
    text = "café\nof 20 letters ,"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / encoding).write_text(text, encoding=encoding)
        assert reading.read_own(str(tmp_path / encoding)) == text
    assert reading.read_own(text) == text and reading.read_own("x" * 5000) == "x" * 5000
    batches = reading.own_batches(text, TOKENIZER, DATA)
    assert batches[0]["tokens"].ravel()[:21].tolist() == list(text.encode())
    assert batches[0]["positions"].ravel()[:21].tolist() == [*range(16), *range(5)]
    (tmp_path / "latin").write_bytes(text.encode("latin-1"))
    (tmp_path / "cut").write_bytes(text.encode("utf-16")[:-1])
    (tmp_path / "empty").write_text(" ")
    for place, sentence in (
        (str(tmp_path / "latin"), "latin' is in no known encoding: no byte order mark, and byte 3 is not UTF-8"),
        (str(tmp_path / "cut"), "cut' is not UTF-16"),
        (str(tmp_path / "empty"), "empty' is empty"),
        ("", "text='' is empty"),
        ("caf\udce9", "is not UTF-8 at character 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            reading.read_own(place)


def test_reports_of_other_inputs_have_other_folders(tmp_path):
    (tmp_path / "notes").mkdir()
    inputs = [((), None), (("notes",), None), (("notes/",), "a"), (("other notes",), None), ((), "a"), ((), "b")]
    inputs += [((str(tmp_path / "notes"),), None)]
    names = [reading.folder_name(7, *of) for of in inputs]
    assert len(set(names)) == len(names) and names[0] == "step-7"
    assert all(name.startswith("step-7") and "/" not in name and " " not in name for name in names)
    assert names == [reading.folder_name(7, *of) for of in inputs]


# A large model


@pytest.mark.long
def test_numbers_of_v3s_shape_are_few_and_quick(rng):
    """58 layers of 256 experts, 8 a token: no table of E² pairs, and a few megabytes in all."""
    layers, e, k, n = 58, 256, 8, 300
    ids = np.argpartition(rng.random((layers, n, e), dtype=np.float32), k, axis=-1)[..., :k].astype(np.int16)
    rows = rows_of(ids, document=np.arange(n) // 50)._replace(token=rng.integers(97, 123, n).astype(np.int32))
    load = rng.integers(1000, 3000, (12, layers, e))
    layer, expert, token = (x.ravel() for x in np.indices((layers, e, 40)))
    counts = TokenCounts(layer, expert, token, rng.integers(20, 200, layer.size), rng.random(layer.size))
    at = np.indices((layers, e, 8)).reshape(3, -1)
    window = rng.integers(97, 123, (at.shape[1], BEFORE + 1 + AFTER)).astype(np.int32)
    ones = np.ones(at.shape[1], np.float32)
    stats = replace(
        RoutingStats.from_loads(load, np.arange(12) % 4, ["code", "tests", "C", "English"]),
        coactivation=rng.integers(1, 99, (layers, e, e)),
        token_counts=counts,
        contexts=Contexts(at[0], at[1], ones, window, ones, np.zeros(at.shape[1], np.int32)),
        rows=rows,
    )
    steps = np.arange(100)
    log = LoadLog(steps, rng.integers(1, 9, (100, layers, e)), steps, rng.random((100, layers, e)))
    special = specialisation(stats, draws=1)
    start = time.process_time()  # other tests share the machine
    numbers = as_json(stats, special, TOKENIZER, log)
    text = json.dumps(numbers, allow_nan=False)
    assert time.process_time() - start < 10
    assert len(text) < 8e6
    assert numbers["coactivation"] is None and numbers["transitions"]["lift"] is None
    assert len(numbers["transitions"]["top"]) == layers - 1
    assert all(len(of_expert) >= 1 for of_layer in numbers["favourites"] for of_expert in of_layer)
    assert 4 <= len(numbers["texts"]) <= 12


# A run


@pytest.fixture(scope="module")
def run(root):
    return finished(root)


def printed(argv: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert unhooked_cli().main(["stats", *argv]) == 0
    return out.getvalue()


@pytest.mark.long
def test_a_run_beside_its_earlier_checkpoints_itself_and_without_its_experts(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_jax.stats.reporting._draw", lambda *args: None)  # the pictures have their own test
    text = "def f(x): return x, a sentence"
    argv = [str(run.folder), "--batches", "2", "--draws", "2", "--text", text, "--worth", "--devices", "4"]
    argv += [
        "--against",
        f"{run.folder}:8",
        "--tokens",
        str(tmp_path / "tokens.parquet"),
        "--out",
        str(tmp_path / "out"),
    ]
    output = printed(argv)
    numbers = json.loads((tmp_path / "out" / "stats.json").read_text())
    documented = {key for keys in numbers["keys"] for key in keys.split(", ")}
    assert documented == numbers.keys() - {"keys"}

    header = numbers["header"]
    model, config, step = open_model(run.folder)
    batches = reading.open_text(config.data, run.folder, TOKENIZER, batches=2)
    measured = evaluate(model, batches.batches, TOKENIZER, batches.domains, mix=batches.mix)
    assert header["loss"] == pytest.approx(measured["val_loss"], rel=1e-5)
    assert header["bits_per_byte"] == pytest.approx(measured["val_bits_per_byte"], rel=1e-5)
    assert header["max_vio_training_mix"] == pytest.approx(measured["max_vio_training_mix"], rel=1e-5)
    assert (header["step"], header["steps"], header["tokens_seen"]) == (step, 12, 12 * 4 * 16) and step == 12
    assert (header["parameters"], header["router"], header["preset"]) == (size(MODEL).total, "sigmoid", name_of(MODEL))

    first = numbers["texts"][0]
    assert "".join(first["tokens"]) == text and first["domain"] == "your text"
    assert numbers["domains"] == ["code", "prose"]  # the sentence is counted nowhere
    rows = read_rows(model, reading.own_batches(text, TOKENIZER, config.data))
    for layer in range(2):
        for t, (experts, gates) in enumerate(zip(first["experts"][layer], first["gates"][layer], strict=True)):
            assert set(experts) == set(rows.expert_ids[layer, t].tolist()) and gates == sorted(gates, reverse=True)
    pyarrow = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.read_table(tmp_path / "tokens.parquet").to_pylist()
    assert len(table) == sum(numbers["tokens"]) + rows.counted.sum()
    assert "".join(row["text"] for row in table if row["document"] == -1 and row["layer"] == "layer 0") == text

    earlier = read_rows(open_model(run.folder, step=8)[0], batches.batches)
    shares = agreement(read_rows(model, batches.batches), earlier)
    assert numbers["saturation"]["steps"] == [8, 12]
    np.testing.assert_allclose(numbers["saturation"]["share"], [shares, [1, 1, 1]], rtol=1e-5)
    other = numbers["against"]
    assert (other["step"], other["note"], other["layers"]) == (8, None, numbers["layers"])
    assert (np.array(other["shared"]) >= shares - 1e-5).all()  # the best match is no worse than the same numbers
    assert [sorted(of_layer) for of_layer in other["match"]] == [list(range(8))] * 3

    load = np.array(numbers["load"])
    assert np.array(numbers["groups"]["load"]).tolist() == load.reshape(3, 2, 4).sum(-1).tolist()
    assert numbers["devices"] == {"count": 4, "load": load.reshape(3, 4, 2).sum(-1).tolist()}
    assert np.isfinite(numbers["worth"]["without"][:2]).all() and numbers["worth"]["without"][2] == [None] * 8
    for words in (
        "choices that the bias changes",
        "I(expert; token)",
        "the most missed",
        "choices that go to the matched",
    ):
        assert words in output


def write_untrained(run, folder) -> None:
    """A run of random weights, without compiling."""
    claim(folder, run)
    with Checkpoints(folder, run) as checkpoints:
        checkpoints.save(fresh_state(run), {}, wait=True)


@pytest.mark.long
def test_what_two_runs_do_not_share_is_said(run, root, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_jax.stats.reporting._draw", lambda *args: None)
    data = run.run.data
    texts = ["def return x y = 2 for in range(9): prose and code"] * 40
    bpe = tokenizers.train_bpe(texts, 300, str(tmp_path / "bpe" / "tokenizer.json"))
    assert not bpe.same_ids(TOKENIZER)
    small = replace(MODEL, vocab_size=300, num_layers=1, mtp_depth=0, num_experts=4, num_groups=1, groups_per_token=1)
    other = make_run(data.paths[0], model=small)
    write_untrained(replace(other, data=replace(data, tokenizer=str(tmp_path / "bpe"))), tmp_path / "words")
    write_untrained(other, tmp_path / "bytes")
    for name, why in (("words", "the tokenizers differ"), ("bytes", "num_experts=8 here and 4 there")):
        made = report(run.folder, tmp_path / "out", batches=1, draws=2, against=str(tmp_path / name))
        against = made.numbers["against"]
        assert why in against["note"] and against["match"] is None and against["shared"] is None
        model, config, _ = open_model(tmp_path / name)
        tokenizer = tokenizers.load(config.data.tokenizer)
        read = reading.open_text(replace(data, tokenizer=config.data.tokenizer), tmp_path / name, tokenizer, batches=1)
        measured = evaluate(model, read.batches, tokenizer, read.domains)
        assert against["bits_per_byte"] == pytest.approx(measured["val_bits_per_byte"], rel=1e-5)
        np.testing.assert_array_equal(against["load"], measured["load"])
        assert against["layers"] == ["layer 0"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["RUN", "--text", "LATIN"], "is in no known encoding"),
        (["RUN", "--paths", "LATIN"], "latin.txt is not UTF-8"),
        (["RUN", "--text", ""], "text='' is empty"),
        (["RUN", "--devices", "3"], "devices=3 does not divide the 8 experts"),
        (["RUN", "--worth", "--worth-tokens", "0"], "worth_tokens=0 is below 1"),
        (["RUN", "--against", "nowhere"], "folder='nowhere' is neither a run"),
        (["RUN", "--against", "RUN:3"], "step=3 has no checkpoint"),
    ],
)
def test_errors_are_a_sentence(run, capsys, tmp_path, argv, sentence):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    places = {"RUN": str(run.folder), "LATIN": str(tmp_path / "latin.txt"), "RUN:3": f"{run.folder}:3"}
    argv = [places.get(word, word) for word in argv]
    assert unhooked_cli().main(["stats", *argv, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("dsv3: ") and sentence in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
