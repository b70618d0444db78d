"""`dsv3 stats`: inputs, numbers beside the model's own, other checkpoints, one-step replacement.

Its page: one file, every name escaped, and small for V3's shape.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from routing_reports import HOSTILE, hostile, made_up, version_three
from runs import MODEL, by_command, refused, rows_of

from dsv3_jax.config import DataConfig
from dsv3_jax.data.tokenizer import ByteTokenizer, train_bpe
from dsv3_jax.model.counting import size
from dsv3_jax.runs.evaluate import evaluate
from dsv3_jax.runs.open_model import open_model
from dsv3_jax.stats import ReportOptions, agreement, others, read_load, reading, report, tokens
from dsv3_jax.stats.page import SCRIPTS, WEB, render_page

TOKENIZER, DATA = ByteTokenizer(), DataConfig(seq_len=16, batch_size=4, val_fraction=0.1)
TEXT = "def f(x): return x, a sentence"


def data_of(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_a_text_is_a_sentence_or_a_file(tmp_path):
    text = "café\nof 20 letters ,"
    (tmp_path / "file").write_text(text, encoding="utf-8-sig")
    assert reading.read_own(str(tmp_path / "file")) == reading.read_own(text) == text


def test_another_tokenizer_reads_text_and_no_chats(whole, tmp_path):
    trained = train_bpe(["the same words " * 9], 270, str(tmp_path / "tokenizer.json"))
    other = replace(others.open_other(str(whole.folder)), tokenizer=trained)
    others.check_text(other, TOKENIZER, DATA)
    with refused("has another tokenizer, and format='chat' is read by its own alone"):
        others.check_text(other, TOKENIZER, replace(DATA, format="chat"))


@pytest.fixture(scope="module")
def reported(whole, tmp_path_factory):
    """A report with everything: its folder, its numbers, the printed text; the table of tokens."""
    folder = tmp_path_factory.mktemp("report")
    words = "--batches 2 --draws 20 --worth --devices 4 --text".split()
    argv = ["stats", whole.folder, *words, TEXT, "--against", f"{whole.folder}:8"]
    code, said, err = by_command(*argv, "--out", folder / "out", "--tokens", folder / "tokens.npz")
    assert code == 0, err
    return folder / "out", json.loads((folder / "out" / "stats.json").read_text()), said


@pytest.mark.long
def test_the_numbers_agree_with_each_other_with_the_page_and_with_what_is_printed(reported):
    folder, numbers, output = reported
    keys = numbers.pop("keys")
    assert {key for names in keys for key in names.split(", ")} == numbers.keys()
    assert {path.name for path in folder.iterdir()} == {"stats.json", "index.html", "load.png"}
    assert data_of((folder / "index.html").read_text()).items() >= numbers.items()
    assert (numbers["step"], numbers["layers"]) == (12, ["layer 0", "layer 1", "MTP 1"])
    assert (numbers["specialisation"]["draws"], numbers["specialisation"]["seed"]) == (20, 0)
    load = np.array(numbers["load"])
    assert numbers["groups"]["load"] == load.reshape(3, 2, 4).sum(-1).tolist()
    assert numbers["devices"] == {"count": 4, "load": load.reshape(3, 4, 2).sum(-1).tolist()}
    for layer, vio in zip(numbers["layers"], numbers["max_vio"], strict=True):
        assert re.search(rf"{layer} +MaxVio {vio:.2f}", output)
    documents = sum(numbers["documents"].values())
    assert f"{max(numbers['tokens']):,} tokens of {documents} documents" in output
    assert str(folder / "index.html") in output
    assert np.isfinite(numbers["worth"]["without"][:2]).all()
    assert numbers["worth"]["without"][2] == [None] * 8


@pytest.mark.long
def test_the_header_agrees_with_eval(whole, reported):
    header = reported[1]["header"]
    model, config, step = open_model(whole.folder)
    batches = reading.open_text(config.data, whole.folder, TOKENIZER, batches=2)
    measured = evaluate(model, batches.batches, TOKENIZER, batches.domains, mix=batches.mix)
    for name in ("val_loss", "val_bits_per_byte", "max_vio_training_mix"):
        assert header[name.removeprefix("val_")] == pytest.approx(measured[name], rel=1e-5)
    expected = dict(step=step, steps=12, tokens_seen=12 * 4 * 16, router="sigmoid", preset=None)
    assert header.items() >= (expected | {"parameters": size(MODEL).total}).items()


@pytest.mark.long
def test_the_users_text_is_shown_and_not_counted(whole, reported):
    folder, numbers, _ = reported
    first = numbers["texts"][0]
    assert "".join(first["tokens"]) == TEXT and first["domain"] == "your text"
    assert numbers["domains"] == ["code", "prose"]
    model, config, _ = open_model(whole.folder)
    rows = tokens(model, reading.own_batches(TEXT, TOKENIZER, config.data), ())
    np.testing.assert_array_equal(np.sort(first["experts"][0]), np.sort(rows.expert_ids[0]))
    written = np.load(folder.parent / "tokens.npz")
    assert written["counted"].sum() == sum(numbers["tokens"]) + rows.counted.sum()
    assert written["layers"].tolist() == numbers["layers"]
    assert written["domains"].tolist()[-1] == "your text"
    np.testing.assert_array_equal(written["expert_ids"][:, : len(rows.token)], rows.expert_ids)


@pytest.mark.long
def test_checkpoints_and_load_over_time_agree_with_rows_and_metrics(whole, reported):
    _, numbers, _ = reported
    batches = reading.open_text(whole.run.data, whole.folder, TOKENIZER, batches=2).batches
    models = [open_model(whole.folder, step=step)[0] for step in (12, 8)]
    shares = agreement(*(tokens(model, batches, ()) for model in models))
    assert numbers["saturation"]["steps"] == [8, 12]
    np.testing.assert_allclose(numbers["saturation"]["share"], [shares, [1, 1, 1]], rtol=1e-5)
    other = numbers["against"]
    assert (other["step"], other["note"], other["layers"]) == (8, None, numbers["layers"])
    assert (np.array(other["shared"]) >= shares - 1e-5).all()
    log = read_load(whole.folder)
    vio = {row["step"]: row["max_vio"] for row in rows_of(whole.folder) if "max_vio" in row}
    assert log.steps.tolist() == sorted(vio)
    means = np.mean(numbers["over_time"]["max_vio"], axis=-1)
    np.testing.assert_allclose(means, list(vio.values()), rtol=1e-5)
    # The bias of a row is the one after its step.
    bias, history = numbers["bias"], numbers["bias"]["history"]
    assert history["steps"] == log.steps.tolist()
    np.testing.assert_allclose(history["value"][-1], bias["value"], rtol=1e-5)


def test_a_folder_of_other_files_is_no_report(whole, tmp_path):
    """test_files has how an earlier report is replaced."""
    (tmp_path / "notes.txt").write_text("notes")
    with refused(rf"out='{tmp_path}' holds other files .*notes\.txt"):
        report(whole.folder, tmp_path, ReportOptions(batches=1, draws=2))


def test_the_page_needs_no_other_file_and_holds_the_numbers():
    page = render_page(numbers := made_up())
    ids = re.findall(r' id="([^"]*)"', page)
    links = re.findall(r'(?:src|href|action)="([^"]*)"', page)
    sections = re.findall(r'<section id="([a-z_]+)">', page)
    assert len(set(ids)) == len(ids) and {link.removeprefix("#") for link in links} == set(sections)
    assert not re.search(r"<(img|link|iframe|form|base|object)\b| on[a-z]+=", page)
    assert "://" not in page and "url(" not in page and "@import" not in page
    assert "default-src 'none'" in page and "'unsafe-inline'; script-src 'sha256-" in page
    # Text goes into the page as text alone; test_stats_browser opens the hostile page.
    scripts = "".join((WEB / name).read_text() for name in SCRIPTS)
    markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|</"
    assert not re.search(markup, scripts)
    page = render_page(hostile(numbers))
    assert "<b" not in page.replace("<body", "").replace("<button", "")
    assert page.count("</script>") == 2 and data_of(page)["domains"][0] == HOSTILE


@pytest.mark.long
def test_version_three_fits():
    """59 layers of 256 experts: no table of E² pairs, every list, and a page below 5 MB."""
    numbers = version_three()
    assert len(render_page(numbers).encode()) < 5_000_000
    assert numbers["coactivation"] is None and numbers["transitions"]["lift"] is None
    assert len(numbers["transitions"]["top"]) == 58 and len(numbers["domains"]) == 7
    for key in ("favourites", "contexts", "partners"):
        assert sum(len(rows) > 0 for layer in numbers[key] for rows in layer) > 0.99 * 59 * 256
    assert len(numbers["texts"]) >= 2 and len(numbers["over_time"]["steps"]) == 40
