"""`dsv3 stats`: pictures draw the numbers, the page needs no other file, and a folder is replaced in one step."""

import contextlib
import io
import json
import re
from collections import defaultdict
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from runs import MODEL, cheap_compiles, finished, rows_of, unhooked_cli

from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.report.metrics import Rows, parse_rows, read_rows
from dsv3_jax.report.run_plots import training_curves
from dsv3_jax.stats import RoutingStats, plots, read_load, report, specialisation
from dsv3_jax.stats.contexts import Contexts
from dsv3_jax.stats.page import render_page
from dsv3_jax.stats.reporting import PICTURES, as_json
from dsv3_jax.stats.text import AFTER, BEFORE

pytestmark = pytest.mark.long

TOKENIZER, E = ByteTokenizer(), MODEL.num_experts


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    with cheap_compiles():
        yield tmp_path_factory.getbasetemp()


# Pictures


def drawn(figure) -> list[np.ndarray]:
    """Return the values of each panel of a heat map, in order."""
    panels = [ax for ax in figure.axes if ax.images]
    return [np.ma.filled(ax.images[0].get_array(), np.nan) for ax in panels]


def test_pictures_draw_the_numbers(tmp_path, rng):
    names = ("layer 0", "MTP 1")
    load = rng.integers(1, 50, (6, 2, 4))
    steps = np.array([1, 2, 4, 8, 16, 32])
    figure = plots.load_over_time(steps, load, names, tmp_path / "time.png")
    for layer in (0, 1):
        values = np.asarray(figure.axes[layer].collections[0].get_array())
        np.testing.assert_allclose(values, (load[:, layer] / load[:, layer].mean(-1, keepdims=True)).T)
    vio = load.max(-1) / load.mean(-1) - 1
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[2].lines}
    np.testing.assert_allclose([lines["layer 0"], lines["MTP 1"], lines["mean"]], [*vio.T, vio.mean(-1)])

    figure = plots.domain_lift(load[:3], ("a", "b", "c"), names, tmp_path / "domains.png")
    for layer, values in enumerate(drawn(figure)):
        by_domain, total = load[:3, layer], load[:3, layer].sum(0)
        want = (by_domain / by_domain.sum(-1, keepdims=True)) / (total / total.sum())
        np.testing.assert_allclose(2.0**values, want)
    ratios = np.exp(rng.standard_normal((2, 4, 4)))
    ratios[0, 1, 2] = 0  # experts that are never chosen together must be drawn too
    ratios[:, range(4), range(4)] = np.nan
    for values, want in zip(drawn(plots.coactivation(ratios, names, tmp_path / "pairs.png")), ratios, strict=True):
        np.testing.assert_allclose(2.0**values, np.maximum(want, plots.NEVER))

    special = specialisation(RoutingStats.from_loads(load, np.arange(6) % 2, ("a", "b")), draws=5)
    ax = plots.information(special, names, tmp_path / "information.png").axes[0]
    heights = [patch.get_height() for patch in ax.patches]
    np.testing.assert_allclose(heights, [*special.bits, *special.shuffled_mean])
    overall, by_domain = {"gates": np.array([0.5, 0.6])}, {"gates": np.array([[0.4, 0.5], [0.6, np.nan]])}
    ax = plots.entropies(overall, by_domain, ("a", "b"), names, tmp_path / "entropy.png").axes[0]
    assert {line.get_label(): line.get_ydata().tolist() for line in ax.lines}["all"] == [0.5, 0.6]
    assert ax.get_xlabel() == "layer" and ax.get_ylabel()


def test_pictures_of_one_step_and_of_many_layers(tmp_path, rng, monkeypatch):
    plots.load_over_time(np.array([7]), rng.integers(1, 9, (1, 2, 4)), ("layer 0", "layer 1"), tmp_path / "one.png")
    monkeypatch.setattr(plots, "MOST", 4)
    names = tuple(f"layer {i}" for i in range(10))
    figure = plots.domain_lift(rng.integers(1, 9, (2, 10, 4)), ("a", "b" * 30), names, tmp_path / "many.png")
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["layer 0", "layer 3", "layer 6", "layer 9"]


# The command, its page and its folder


class Reader(HTMLParser):
    """Ids, links and text of a page; each element that opens must close."""

    VOID = {"meta", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.addresses, self.texts = [], [], [], defaultdict(list)
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "data")]

    def handle_startendtag(self, tag, attributes):
        """An element that closes itself does not stay open."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text):
        self.texts[self.open[-1] if self.open else ""].append(text)


def cells(page: str) -> list[tuple[str, ...]]:
    """(layer, expert, text) of each cell of the load maps."""
    return re.findall(r"<title>(.+), expert (\d+): (.+)</title>", page)


@pytest.fixture(scope="module")
def reported(root):
    """The finished run, the folder of its statistics, and what `dsv3 stats` printed."""
    run, out = finished(root), io.StringIO()
    with contextlib.redirect_stdout(out):
        code = unhooked_cli().main(["stats", str(run.folder), "--batches", "3", "--draws", "20"])
    assert code == 0
    return run, run.folder / "stats" / "step-12", out.getvalue()


def test_the_numbers_of_a_run(reported):
    _, folder, output = reported
    numbers = json.loads((folder / "stats.json").read_text())
    documented = {key for keys in numbers["keys"] for key in keys.split(", ")}
    assert documented == numbers.keys() - {"keys"}
    assert (numbers["step"], numbers["layers"]) == (12, ["layer 0", "layer 1", "MTP 1"])
    assert (numbers["specialisation"]["draws"], numbers["specialisation"]["seed"]) == (20, 0)
    load = np.array(numbers["load"])
    np.testing.assert_array_equal(np.sum([numbers["load_by_domain"][d] for d in numbers["domains"]], axis=0), load)
    np.testing.assert_array_equal([np.diag(pairs) for pairs in numbers["coactivation"]], load)
    np.testing.assert_allclose(numbers["max_vio"], load.max(-1) / load.mean(-1) - 1, rtol=1e-5)  # six digits
    for layer, vio in zip(numbers["layers"], numbers["max_vio"], strict=True):
        assert re.search(rf"{layer} +MaxVio {vio:.2f}", output)
    assert f"{max(numbers['tokens']):,} tokens of {sum(numbers['documents'].values())} documents" in output
    assert str(folder / "index.html") in output


def test_the_page_is_complete_and_needs_no_other_file(reported):
    _, folder, _ = reported
    text = (folder / "index.html").read_text()
    reader = Reader(text)
    sections = ["load", "layers", "over-time", "domains", "information", "coactivation", "entropy", "experts"]
    assert [i for i in reader.ids if i in sections] == sections
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(a.startswith("#") or a.startswith("data:image/png;base64,") for a in reader.addresses)
    assert {a[1:] for a in reader.addresses if a.startswith("#")} == set(sections)
    script_data = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert "//" not in re.sub('base64,[^"]*', "", text.replace(script_data, ""))  # no address at all
    data, numbers = json.loads(script_data), json.loads((folder / "stats.json").read_text())
    assert len(data["experts"]) == 3 and len(data["experts"][0]) == E
    for layer, of_layer in enumerate(data["experts"]):
        load = np.array(numbers["load"][layer])
        np.testing.assert_allclose([expert["load"] for expert in of_layer], load / load.mean(), atol=5e-4)  # 3 digits
        assert [expert["contexts"] for expert in of_layer] == numbers["contexts"][layer]
    maps = [numbers["load"], *(numbers["load_by_domain"][name] for name in numbers["domains"])]
    assert cells(text) == [
        (layer, str(e), f"{x:.2f} × mean load")
        for load in np.array(maps)
        for layer, ratio in zip(numbers["layers"], load / load.mean(-1, keepdims=True), strict=True)
        for e, x in enumerate(ratio)
    ]
    assert "prefers-color-scheme: dark" in text
    assert {p.name for p in folder.iterdir()} == {"stats.json", "index.html", *PICTURES}


def test_load_over_time_agrees_with_the_metrics_of_training(reported):
    run, folder, _ = reported
    log = read_load(run.folder)
    vio = {row["step"]: row["max_vio"] for row in rows_of(run.folder) if "max_vio" in row}
    assert log.steps.tolist() == sorted(vio)
    np.testing.assert_allclose((log.load.max(-1) / log.load.mean(-1) - 1).mean(-1), list(vio.values()), rtol=1e-5)
    numbers = json.loads((folder / "stats.json").read_text())
    over_time = numbers["over_time"]
    np.testing.assert_allclose(np.mean(over_time["max_vio"], axis=-1), list(vio.values()), rtol=1e-5)
    # The bias of a row is the one after its step: the last is the checkpoint's, and each moves by the row's load.
    bias, history = numbers["bias"], numbers["bias"]["history"]
    assert history["steps"] == log.steps.tolist()
    np.testing.assert_allclose(history["value"][-1], bias["value"], rtol=1e-5)
    moved = np.diff(np.array(history["value"]), axis=0, prepend=0)
    mean = log.load.mean(-1, keepdims=True)
    np.testing.assert_allclose(moved, MODEL.balance.bias_rate * np.sign(mean - log.load), atol=1e-6)


HOSTILE = "</script><b>&'\""


def hand_made_page(folder, document_load, domains) -> str:
    """The page of these loads, with hostile text wherever a run can bring it in."""
    window = np.full((1, BEFORE + 1 + AFTER), -1, np.int32)
    window[0, BEFORE + 1 - len(HOSTILE) : BEFORE + 1] = list(HOSTILE.encode())
    zero, one = np.zeros(1, np.int64), np.ones(1, np.float32)
    stats = replace(
        RoutingStats.from_loads(document_load, np.arange(len(document_load)) % len(domains), domains),
        contexts=Contexts(zero, zero, one, window, one, zero.astype(np.int32)),
    )
    numbers = as_json(stats, specialisation(stats, draws=2), TOKENIZER, None)
    assert np.isnan(np.array(numbers["coactivation_lift"], float)).all()  # one expert a token
    return render_page({"run": HOSTILE, "step": 0, "data": HOSTILE} | numbers, folder)


def test_a_page_of_one_domain(tmp_path):
    """One domain needs no choice of domain, and missing pictures have no sections."""
    page = hand_made_page(tmp_path, np.array([[[3, 0]], [[0, 0]]]), (HOSTILE,))
    ids = Reader(page).ids
    assert "over-time" not in ids and "layers" in ids
    assert "data-map" not in page.split("<script")[0] and "I(expert; domain)" not in page
    assert [text for *_, text in cells(page)] == ["2.00 × mean load", "0.00 × mean load"]


def test_text_never_becomes_markup(tmp_path):
    """Domains may have any name, even the name of the map of all text."""
    page = hand_made_page(tmp_path, np.array([[[3, 1]], [[0, 0]]]), (HOSTILE, "all"))
    reader = Reader(page)
    assert "<b>" not in page and page.count("</script>") == 2
    assert reader.texts["button"] == ["all", HOSTILE, "all"]
    assert reader.texts["h1"] == [f"Where tokens go: {HOSTILE}, step 0"]
    assert [text for *_, text in cells(page)] == ["1.50 × mean load", "0.50 × mean load"] * 2 + ["no load"] * 2
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["domains"] == [HOSTILE, "all"] and data["experts"][0][0]["contexts"][0]["before"] == HOSTILE[:-1]


def test_a_folder_is_replaced_in_one_step_or_not_at_all(reported, tmp_path, monkeypatch):
    run, _, _ = reported
    out = tmp_path / "stats"
    monkeypatch.setattr("dsv3_jax.stats.reporting._draw", lambda *args: None)  # the pictures have their own test
    first = report(run.folder, out, batches=1, draws=2)
    assert first[0] == out
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dsv3_jax.stats.reporting.render_page", fail)
        with pytest.raises(OSError, match="disk full"):
            report(run.folder, out, batches=1, draws=2)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
    (out / "load.png").write_text("of the earlier statistics")
    report(run.folder, out, step=8, batches=1, draws=2, paths=(run.run.data.paths[0],))
    assert json.loads((out / "stats.json").read_text())["step"] == 8
    assert {p.name for p in out.iterdir()} == before.keys() and list(tmp_path.iterdir()) == [out]
    (out / "notes.txt").write_text("notes")
    with pytest.raises(ValueError, match=r"out='.*stats' holds other files .*notes\.txt"):
        report(run.folder, out, batches=1)
    with pytest.raises(ValueError, match=r"out='.*notes\.txt' is a file"):
        report(run.folder, out / "notes.txt", batches=1)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["nowhere"], "folder='nowhere' is neither a run"),
        (["RUN", "--batches", "0"], "batches=0 is below 1"),
        (["RUN", "--step", "3"], "step=3 has no checkpoint"),
        (["RUN", "--draws", "0"], "draws=0 is below 1"),
        (["RUN", "--paths", "nothing"], "path='nothing' does not exist"),
    ],
)
def test_errors_are_a_sentence(reported, capsys, tmp_path, argv, sentence):
    run, _, _ = reported
    argv = [str(run.folder) if argument == "RUN" else argument for argument in argv]
    assert unhooked_cli().main(["stats", *argv, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("dsv3: ") and sentence in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_of_wrong_types_are_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = [
        {"step": 1, "loss": 2.0, "mtp_loss": [1.0, 2.0], "kernels": {"product": "cpu"}},
        {"step": 2, "loss": float("nan")},
    ]
    changes = [{"loss": "2"}, {"loss": None}, {"loss": [2.0]}, {"lr": True}, {"mtp_loss": 2.0}, {"mtp_loss": [1.0]},
               {"mtp_loss": [None, 1.0]}, {"step": 2**63}, {"loss": 10**30}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in (*good, *({"step": 3} | change for change in changes))))
    rows, bad = parse_rows(path)
    assert len(rows) == 2 and bad == list(range(3, 3 + len(changes)))
    training_curves(rows, tmp_path / "training.png")
    loads = [[[1, 2]], [[1, 2, 3]], [[1], [1, 2]], [[-1, 2]], [1, 2], [[1.5, 2]], [[4, 5]]]
    (tmp_path / "load.jsonl").write_text("".join(json.dumps({"step": 1, "load": load}) + "\n" for load in loads))
    log = read_load(tmp_path)
    assert log.load.tolist() == [[[1, 2]], [[4, 5]]] and log.bias is None and not len(log.bias_steps)
    biases = [[[0.5, -0.25]], [[0.5]], [["0.5", 1.0]], [[True, 1.0]], "0.5", [[0, 1.5]]]
    rows = [{"step": i, "load": [[1, 2]], "bias": bias} for i, bias in enumerate(biases)]
    (tmp_path / "load.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"step": 0, "load": [[3, 4]]}, *rows])
    )
    log = read_load(tmp_path)
    assert log.steps.tolist() == [0, 0, 5] and log.bias_steps.tolist() == [0, 5]
    assert log.bias.tolist() == [[[0.5, -0.25]], [[0, 1.5]]]


def test_rows_after_a_step_are_dropped(tmp_path):
    path = tmp_path / "load.jsonl"
    assert read_rows(path) == [] and read_load(tmp_path) is None
    first = Rows(path, after=0)
    for step in (1, 2, 3):
        first.write({"step": step, "load": [[step, 0]]})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    again = Rows(path, after=2)
    again.write({"step": 3, "load": [[9, 9]]})
    log = read_load(tmp_path)
    assert log.steps.tolist() == [1, 2, 3] and log.load[:, 0, 0].tolist() == [1, 2, 9]
    assert again.rows() == read_rows(path)
