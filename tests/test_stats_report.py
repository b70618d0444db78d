"""`dsv3 stats`: its inputs, its numbers beside the model's own, other checkpoints, a folder replaced in one step."""

import contextlib
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from runs import MODEL, finished, fresh_state, make_run, rows_of, unhooked_cli

from dsv3_jax.config import DataConfig
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.hf.open_model import open_model
from dsv3_jax.model.counting import size
from dsv3_jax.report.metrics import parse_rows
from dsv3_jax.stats import ReportOptions, agreement, others, read_load, reading, report
from dsv3_jax.stats.numbers import name_of
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.evaluate import evaluate
from dsv3_jax.training.run_folder import claim

TOKENIZER, DATA = ByteTokenizer(), DataConfig(seq_len=16, batch_size=4, val_fraction=0.1)
TEXT = "def f(x): return x, a sentence"


# What is read


def test_the_users_text_is_read_to_its_end(tmp_path):
    texts = {"a/one.txt": "first text, " * 9, "a/two.txt": "x", "b/three.txt": "é second\n" * 20}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")

    def read(path, **more):
        return reading.open_text(DATA, tmp_path, TOKENIZER, paths=(str(path),), **more)

    def tokens_of(batches):
        tokens = np.concatenate([batch["tokens"][batch["segment_ids"] > 0] for batch in batches])
        return sorted(tokens[tokens != TOKENIZER.eos_id].tolist())

    whole = read(tmp_path)
    assert tokens_of(whole.batches) == sorted("".join(texts.values()).encode())
    assert whole.domains == ("a", "b") and whole.mix is None
    assert len(read(tmp_path, batches=2).batches) == 2 < len(whole.batches)


def test_a_text_is_a_sentence_or_a_file(tmp_path):
    text = "café\nof 20 letters ,"
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / encoding).write_text(text, encoding=encoding)
        assert reading.read_own(str(tmp_path / encoding)) == text
    assert reading.read_own(text) == text and reading.read_own("x" * 5000) == "x" * 5000
    batches = reading.own_batches(text, TOKENIZER, DATA)
    assert batches[0]["tokens"].ravel()[:21].tolist() == list(text.encode())
    assert batches[0]["positions"].ravel()[:21].tolist() == [*range(16), *range(5)]
    (tmp_path / "latin").write_bytes(text.encode("latin-1"))
    for place, sentence in (
        (str(tmp_path / "latin"), "latin' is not UTF-8 at position 3"),
        ("", "text='' is empty"),
    ):
        with pytest.raises(ValueError, match=sentence):
            reading.read_own(place)


def test_reports_of_other_inputs_have_other_folders():
    inputs = [((), None), (("notes",), None), (("notes/",), "a"), (("/other notes",), None), ((), "a"), ((), "b")]
    names = [reading.folder_name(7, *of) for of in inputs]
    assert len(set(names)) == len(names) and names[0] == "step-7"
    assert all(re.fullmatch(r"step-7[^/ ]*", name) for name in names)


def test_rows_of_wrong_types_are_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [{"step": 1, "loss": 2.0, "mtp_loss": [1.0, 2.0], "kernels": {}}, {"step": 2, "loss": float("nan")}]
    wrong = [{"loss": "2"}, {"lr": True}, {"mtp_loss": 2.0}, {"mtp_loss": [1.0]}, {"step": 2**63}]
    path.write_text("".join(json.dumps(row) + "\n" for row in (*good, *({"step": 3} | change for change in wrong))))
    rows, bad = parse_rows(path)
    assert len(rows) == 2 and bad == list(range(3, 3 + len(wrong)))
    loads = [{"load": load} for load in ([[1, 2]], [[1, 2, 3]], [[-1, 2]], [1, 2], [[1.5, 2]])]
    loads += [{"load": [[1, 2]], "bias": bias} for bias in ([[0.5, -0.25]], [[0.5]], [["0.5", 1.0]], [[0, 1.5]])]
    (tmp_path / "load.jsonl").write_text("".join(json.dumps({"step": i} | x) + "\n" for i, x in enumerate(loads)))
    log = read_load(tmp_path)
    assert log.steps.tolist() == [0, 5, 8] and log.bias_steps.tolist() == [5, 8]
    assert log.load.tolist() == [[[1, 2]]] * 3 and log.bias.tolist() == [[[0.5, -0.25]], [[0, 1.5]]]


# The command, its numbers and its folder


@pytest.fixture(scope="module")
def run(root):
    return finished(root)


@pytest.fixture(scope="module")
def reported(run, tmp_path_factory):
    """A report with everything: its folder, its numbers, the table of tokens, and what was printed."""
    out, folder = io.StringIO(), tmp_path_factory.mktemp("report")
    argv = [str(run.folder), "--batches", "2", "--draws", "20", "--text", TEXT, "--worth", "--devices", "4"]
    argv += ["--against", f"{run.folder}:8", "--out", str(folder / "out")]
    with contextlib.redirect_stdout(out):
        assert unhooked_cli().main(["stats", *argv, "--tokens", str(folder / "tokens.parquet")]) == 0
    return folder / "out", json.loads((folder / "out" / "stats.json").read_text()), out.getvalue()


@pytest.mark.long
def test_the_numbers_agree_with_each_other_with_the_page_and_with_what_is_printed(reported):
    folder, numbers, output = reported
    keys = numbers.pop("keys")
    assert {key for names in keys for key in names.split(", ")} == numbers.keys()
    assert {path.name for path in folder.iterdir()} == {"stats.json", "index.html", "load.png"}
    page = json.loads(re.search(r'id="data">(.*?)</script>', (folder / "index.html").read_text(), re.S)[1])
    assert page.items() >= numbers.items()
    assert (numbers["step"], numbers["layers"]) == (12, ["layer 0", "layer 1", "MTP 1"])
    assert (numbers["specialisation"]["draws"], numbers["specialisation"]["seed"]) == (20, 0)
    load = np.array(numbers["load"])
    np.testing.assert_array_equal(np.sum([numbers["load_by_domain"][d] for d in numbers["domains"]], axis=0), load)
    np.testing.assert_array_equal([np.diag(pairs) for pairs in numbers["coactivation"]], load)
    np.testing.assert_allclose(numbers["max_vio"], load.max(-1) / load.mean(-1) - 1, rtol=1e-5)  # six digits
    assert numbers["groups"]["load"] == load.reshape(3, 2, 4).sum(-1).tolist()
    assert numbers["devices"] == {"count": 4, "load": load.reshape(3, 4, 2).sum(-1).tolist()}
    for layer, vio in zip(numbers["layers"], numbers["max_vio"], strict=True):
        assert re.search(rf"{layer} +MaxVio {vio:.2f}", output)
    assert f"{max(numbers['tokens']):,} tokens of {sum(numbers['documents'].values())} documents" in output
    assert str(folder / "index.html") in output
    for words in ("The bias changes", "The token tells", "Without expert", "go to the matched expert"):
        assert words in output


@pytest.mark.long
def test_the_header_agrees_with_eval_and_worth_is_of_the_trunk(run, reported):
    _, numbers, _ = reported
    header = numbers["header"]
    model, config, step = open_model(run.folder)
    batches = reading.open_text(config.data, run.folder, TOKENIZER, batches=2)
    measured = evaluate(model, batches.batches, TOKENIZER, batches.domains, mix=batches.mix)
    names = {"loss": "val_loss", "bits_per_byte": "val_bits_per_byte", "max_vio_training_mix": "max_vio_training_mix"}
    for name, metric in names.items():
        assert header[name] == pytest.approx(measured[metric], rel=1e-5)
    assert (header["step"], header["steps"], header["tokens_seen"]) == (step, 12, 12 * 4 * 16) and step == 12
    assert (header["parameters"], header["router"], header["preset"]) == (size(MODEL).total, "sigmoid", name_of(MODEL))
    assert np.isfinite(numbers["worth"]["without"][:2]).all() and numbers["worth"]["without"][2] == [None] * 8


@pytest.mark.long
def test_the_users_text_is_shown_and_not_counted(run, reported):
    folder, numbers, _ = reported
    first = numbers["texts"][0]
    assert "".join(first["tokens"]) == TEXT and first["domain"] == "your text"
    assert numbers["domains"] == ["code", "prose"]
    model, config, _ = open_model(run.folder)
    rows = others.read_rows(model, reading.own_batches(TEXT, TOKENIZER, config.data))
    for layer in range(2):
        for t, (experts, gates) in enumerate(zip(first["experts"][layer], first["gates"][layer], strict=True)):
            assert set(experts) == set(rows.expert_ids[layer, t].tolist()) and gates == sorted(gates, reverse=True)
    pyarrow = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.read_table(folder.parent / "tokens.parquet").to_pylist()
    assert len(table) == sum(numbers["tokens"]) + rows.counted.sum()
    assert "".join(row["text"] for row in table if row["document"] == -1 and row["layer"] == "layer 0") == TEXT


@pytest.mark.long
def test_checkpoints_and_load_over_time_agree_with_rows_and_metrics(run, reported):
    _, numbers, _ = reported
    batches = reading.open_text(run.run.data, run.folder, TOKENIZER, batches=2).batches
    shares = agreement(*(others.read_rows(open_model(run.folder, step=step)[0], batches) for step in (12, 8)))
    assert numbers["saturation"]["steps"] == [8, 12]
    np.testing.assert_allclose(numbers["saturation"]["share"], [shares, [1, 1, 1]], rtol=1e-5)
    other = numbers["against"]
    assert (other["step"], other["note"], other["layers"]) == (8, None, numbers["layers"])
    assert (np.array(other["shared"]) >= shares - 1e-5).all()  # the best match is no worse than the same numbers
    log = read_load(run.folder)
    vio = {row["step"]: row["max_vio"] for row in rows_of(run.folder) if "max_vio" in row}
    assert log.steps.tolist() == sorted(vio)
    np.testing.assert_allclose(np.mean(numbers["over_time"]["max_vio"], axis=-1), list(vio.values()), rtol=1e-5)
    # The bias of a row is the one after its step: the last is the checkpoint's, and each moves by the row's load.
    bias, history = numbers["bias"], numbers["bias"]["history"]
    assert history["steps"] == log.steps.tolist()
    np.testing.assert_allclose(history["value"][-1], bias["value"], rtol=1e-5)
    moved = np.diff(np.array(history["value"]), axis=0, prepend=0)
    mean = log.load.mean(-1, keepdims=True)
    np.testing.assert_allclose(moved, MODEL.balance.bias_rate * np.sign(mean - log.load), atol=1e-6)


@pytest.mark.rare
def test_a_run_with_other_experts_is_compared_and_not_matched(run, tmp_path):
    data = run.run.data
    small = replace(MODEL, num_layers=1, mtp_depth=0, num_experts=4, num_groups=1, groups_per_token=1)
    claim(tmp_path / "other", other := make_run(data.paths[0], model=small))
    with Checkpoints(tmp_path / "other", other) as checkpoints:  # random weights, without compiling
        checkpoints.save(fresh_state(other), {}, wait=True)
    options = ReportOptions(batches=1, draws=2, against=str(tmp_path / "other"))
    against = report(run.folder, tmp_path / "out", options).numbers["against"]
    assert "num_experts=8 here and 4 there" in against["note"] and against["match"] is against["shared"] is None
    read = reading.open_text(data, tmp_path / "other", TOKENIZER, batches=1)
    measured = evaluate(open_model(tmp_path / "other")[0], read.batches, TOKENIZER, read.domains)
    assert against["bits_per_byte"] == pytest.approx(measured["val_bits_per_byte"], rel=1e-5)
    np.testing.assert_array_equal(against["load"], measured["load"])


@pytest.mark.long
def test_a_folder_is_replaced_in_one_step_or_not_at_all(run, tmp_path, monkeypatch):
    out, options = tmp_path / "stats", ReportOptions(batches=1, draws=2)
    assert report(run.folder, out, options).folder == out
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dsv3_jax.stats.reporting.render_page", fail)
        with pytest.raises(OSError, match="disk full"):
            report(run.folder, out, options)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    report(run.folder, out, replace(options, step=8, paths=(run.run.data.paths[0],)))
    assert json.loads((out / "stats.json").read_text())["step"] == 8
    assert {p.name for p in out.iterdir()} == before.keys() and list(tmp_path.iterdir()) == [out]
    (out / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"out='.*stats' holds other files .*notes\.txt"):
        report(run.folder, out, options)


@pytest.mark.long
def test_errors_are_a_sentence(run, capsys, tmp_path):
    for words, sentence in (
        (["--batches", "0"], "batches=0 is below 1"),
        (["--paths", "nothing"], "path='nothing' does not exist"),
        (["--devices", "3"], "devices=3 does not divide the 8 experts"),
        (["--worth", "--worth-tokens", "0"], "worth_tokens=0 is below 1"),
        (["--against", f"{run.folder}:3"], "step=3 has no checkpoint"),
    ):
        assert unhooked_cli().main(["stats", str(run.folder), *words, "--out", str(tmp_path / "out")]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("dsv3: ") and sentence in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())
