"""`dsv3 stats`: pictures draw the numbers, the page is whole and alone, a folder is replaced whole or not at all."""

import contextlib
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from counts import made
from runs import MODEL, cheap_compiles, finished, rows_of, unhooked_cli

from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.report.metrics import Rows, read_rows
from dsv3_jax.stats import plots, read_load, report, specialisation
from dsv3_jax.stats.page import page
from dsv3_jax.stats.reporting import PICTURES, as_json
from dsv3_jax.stats.tokens import AFTER, BEFORE, Contexts

pytestmark = pytest.mark.long

WORDS, E = ByteTokenizer(), MODEL.num_experts


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    with cheap_compiles(tmp_path_factory.getbasetemp()):
        yield tmp_path_factory.getbasetemp()


# Pictures


def drawn(figure) -> list[np.ndarray]:
    """Values of each panel of a heat map, in order."""
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
        mine, whole = load[:3, layer], load[:3, layer].sum(0)
        want = (mine / mine.sum(-1, keepdims=True)) / (whole / whole.sum())
        np.testing.assert_allclose(2.0**values, want)
    ratios = np.exp(rng.standard_normal((2, 4, 4)))
    ratios[0, 1, 2] = 0  # two that never meet, and must not be left out
    ratios[:, range(4), range(4)] = np.nan
    for values, want in zip(drawn(plots.coactivation(ratios, names, tmp_path / "pairs.png")), ratios, strict=True):
        np.testing.assert_allclose(2.0**values, np.maximum(want, plots.NEVER))

    found = specialisation(made(load, np.arange(6) % 2, 2), draws=5)
    ax = plots.information(found, names, tmp_path / "information.png").axes[0]
    heights = [patch.get_height() for patch in ax.patches]
    np.testing.assert_allclose(heights, [*found.bits, *found.shuffled_mean])
    whole, parts = {"gates": np.array([0.5, 0.6])}, {"gates": np.array([[0.4, 0.5], [0.6, np.nan]])}
    ax = plots.entropies(whole, parts, ("a", "b"), names, tmp_path / "entropy.png").axes[0]
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
    """Ids, addresses and text of a page; every element that opens must close."""

    VOID = {"meta", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.addresses, self.data = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "data")]

    def handle_startendtag(self, tag, attributes):
        """It closes itself: nothing is open after it."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text):
        self.data[self.open[-1] if self.open else ""] = text


@pytest.fixture(scope="module")
def told(root):
    """(the run, the folder of its statistics, what was printed)."""
    whole, out = finished(root), io.StringIO()
    with contextlib.redirect_stdout(out):
        code = unhooked_cli().main(["stats", str(whole.folder), "--batches", "3", "--draws", "20"])
    assert code == 0
    return whole, whole.folder / "stats", out.getvalue()


def test_the_numbers_of_a_run(told):
    whole, folder, said = told
    found = json.loads((folder / "stats.json").read_text())
    documented = {key for keys in found["keys"] for key in keys.split(", ")}
    assert documented == found.keys() - {"keys"}
    assert (found["step"], found["layers"]) == (12, ["layer 0", "layer 1", "MTP 1"])
    assert (found["specialisation"]["draws"], found["specialisation"]["seed"]) == (20, 0)
    load = np.array(found["load"])
    np.testing.assert_array_equal(np.sum([found["load_by_domain"][d] for d in found["domains"]], axis=0), load)
    np.testing.assert_array_equal([np.diag(pairs) for pairs in found["coactivation"]], load)
    np.testing.assert_allclose(found["max_vio"], load.max(-1) / load.mean(-1) - 1, rtol=1e-5)  # six digits
    for layer, vio in zip(found["layers"], found["max_vio"], strict=True):
        assert re.search(rf"{layer} +MaxVio {vio:.2f}", said)
    assert f"{max(found['tokens']):,} tokens of {sum(found['documents'].values())} documents" in said
    assert str(folder / "index.html") in said


def test_the_page_is_whole_and_alone(told):
    _, folder, _ = told
    text = (folder / "index.html").read_text()
    reader = Reader(text)
    sections = ["load", "layers", "over-time", "domains", "information", "coactivation", "entropy", "experts"]
    assert [i for i in reader.ids if i in sections] == sections
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(a.startswith("#") or a.startswith("data:image/png;base64,") for a in reader.addresses)
    assert {a[1:] for a in reader.addresses if a.startswith("#")} == set(sections)
    held = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert "//" not in re.sub('base64,[^"]*', "", text.replace(held, ""))  # no address at all
    data = json.loads(held)
    assert len(data["experts"]) == 3 and len(data["experts"][0]) == E
    assert "prefers-color-scheme: dark" in text
    assert {p.name for p in folder.iterdir()} == {"stats.json", "index.html", *PICTURES}


def test_load_over_time_is_what_training_measured(told):
    whole, folder, _ = told
    log = read_load(whole.folder)
    vio = {row["step"]: row["max_vio"] for row in rows_of(whole.folder) if "max_vio" in row}
    assert log.steps.tolist() == sorted(vio)
    np.testing.assert_allclose((log.load.max(-1) / log.load.mean(-1) - 1).mean(-1), list(vio.values()), rtol=1e-5)
    over_time = json.loads((folder / "stats.json").read_text())["over_time"]
    np.testing.assert_allclose(np.mean(over_time["max_vio"], axis=-1), list(vio.values()), rtol=1e-5)


def test_a_page_of_one_domain_and_of_hostile_text(tmp_path):
    """Without pictures there are no sections for them; text of documents and domains never becomes markup."""
    text = "</script><b>&"
    window = np.full((1, BEFORE + 1 + AFTER), -1, np.int32)
    window[0, BEFORE + 1 - len(text) : BEFORE + 1] = list(text.encode())
    one = np.zeros(1, np.int64)
    stats = made(
        np.array([[[3, 0]], [[0, 0]]]),
        [0, 0],
        1,
        domains=(text,),
        contexts=Contexts(one, one, np.ones(1, np.float32), window),
    )
    numbers = as_json(stats, specialisation(stats, draws=2), WORDS, None)
    made_page = page({"run": text, "step": 0, "data": text} | numbers, tmp_path)
    reader = Reader(made_page)
    assert "over-time" not in reader.ids and "data-map" not in made_page.split("<script")[0]
    assert "<b>" not in made_page
    assert numbers["coactivation_lift"] == [[[None, None], [None, None]]]


def test_a_folder_is_replaced_whole_or_not_at_all(told, tmp_path, monkeypatch):
    whole, _, _ = told
    out = tmp_path / "stats"
    monkeypatch.setattr("dsv3_jax.stats.reporting._draw", lambda *args: None)  # the pictures have their own test
    first = report(whole.folder, out, batches=1, draws=2)
    assert first[0] == out
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dsv3_jax.stats.page.load_map", fail)
        with pytest.raises(OSError, match="disk full"):
            report(whole.folder, out, batches=1, draws=2)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
    (out / "load.png").write_text("of the statistics before")
    report(whole.folder, out, step=8, batches=1, draws=2, paths=(whole.run.data.paths[0],))
    assert json.loads((out / "stats.json").read_text())["step"] == 8
    assert {p.name for p in out.iterdir()} == before.keys() and list(tmp_path.iterdir()) == [out]
    (out / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match="holds other files than statistics, such as mine.txt"):
        report(whole.folder, out, batches=1)
    with pytest.raises(ValueError, match="mine.txt is a file, not a folder"):
        report(whole.folder, out / "mine.txt", batches=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["RUN", "--batches", "0"], "batches=0 is below 1"),
        (["RUN", "--step", "3"], "no checkpoint of step 3"),
        (["RUN", "--draws", "0"], "draws=0 is below 1"),
        (["RUN", "--paths", "nothing"], "path 'nothing' does not exist"),
    ],
)
def test_errors_are_a_sentence(told, capsys, tmp_path, words, said):
    whole, _, _ = told
    words = [str(whole.folder) if word == "RUN" else word for word in words]
    assert unhooked_cli().main(["stats", *words, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("dsv3: ") and said in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


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
