"""`dsv3 stats`: pictures draw the numbers, the page needs no other file, and a folder is replaced in one step."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from runs import MODEL, cheap_compiles, finished, rows_of, unhooked_cli

from dsv3_jax.report.metrics import Rows, parse_rows, read_rows
from dsv3_jax.report.run_plots import training_curves
from dsv3_jax.stats import RoutingStats, plots, read_load, report, specialisation
from dsv3_jax.stats.packing import unpack, unpack_ids
from dsv3_jax.stats.reporting import PICTURES

pytestmark = pytest.mark.long


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


def test_the_page_shows_the_numbers_of_the_run(reported):
    _, folder, _ = reported
    text = (folder / "index.html").read_text()
    data, numbers = (
        json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1]),
        json.loads((folder / "stats.json").read_text()),
    )
    load = np.array([numbers["load"], *(numbers["load_by_domain"][name] for name in numbers["domains"])])
    np.testing.assert_allclose(unpack(data["load"]), load / load.mean(-1, keepdims=True), atol=5e-4)  # 16 bits
    assert unpack_ids(data["contexts"]["starts"])[-1] == len(data["contexts"]["rows"])
    assert len(data["contexts"]["rows"]) == sum(len(rows) for layer in numbers["contexts"] for rows in layer)
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
    biases = [[[0.5, -0.25]], [[0.5]], [["0.5", 1.0]], [[True, 1.0]], "0.5", [], [[0, 1.5]]]
    rows = [{"step": i, "load": [[1, 2]], "bias": bias} for i, bias in enumerate(biases)]
    (tmp_path / "load.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"step": 0, "load": [[3, 4]]}, *rows])
    )
    log = read_load(tmp_path)
    assert log.steps.tolist() == [0, 0, 5, 6] and log.bias_steps.tolist() == [0, 6]
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
