"""The lab's results: which stored runs are of the present configuration, and how they are kept."""

import json
from pathlib import Path

import numpy as np
import pytest
from lab_stub import called, fake_repository, make_study

from dsv3_jax.config import Layout, replace, to_dict
from dsv3_jax.presets import recipe
from experiments.lab import ABOVE, Column, Results, fingerprints, mean_spread
from experiments.lab.fingerprints import RECIPE, identify, settings_of
from experiments.lab.results import replace_block, thin_curves
from experiments.lab.tables import results_table
from experiments.lab.tasks import Facts

pytestmark = pytest.mark.long


@pytest.fixture
def repo(tmp_path, monkeypatch):
    return fake_repository(tmp_path, monkeypatch)


def settings_hash(*arguments):
    return str(sorted(settings_of(*arguments).items(), key=str))


def test_the_identity_ignores_kernels_and_the_layout_on_devices():
    """The compute dtype counts, and so do model, seed and steps, the task, and the runs that it starts from."""
    run = recipe("lab")
    execution = replace(run.execution, kernels="xla", layout=Layout(fsdp=True))
    assert settings_hash(run) == settings_hash(replace(run, execution=execution))
    others = [
        replace(run, seed=1),
        replace(run, model=replace(run.model, dim=48)),
        replace(run, steps=499),
        replace(run, execution=replace(run.execution, compute_dtype="bfloat16")),
        replace(run, model=replace(run.model, capacity_factor=1.0)),
        replace(run, model=replace(run.model, capacity_factor=1.25)),
    ]
    assert len({settings_hash(r) for r in (run, *others)}) == 7
    assert len({settings_hash(run), settings_hash(run, Facts()), settings_hash(run, Facts(bits=5))}) == 3
    started = replace(run, start="runs/lab/abc")
    assert settings_hash(started, None, {"runs/lab/abc": "x"}) != settings_hash(started, None, {"runs/lab/abc": "y"})


def test_a_changed_default_text_or_tokenizer_is_another_run(tmp_path, monkeypatch):
    """F6: each of them changed nothing in the old fingerprint, which named paths and left out defaults."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    base = recipe("lab")
    data = replace(base.data, paths=("text.jsonl",), tokenizer="words.json", val_fraction=0.4)
    run = replace(base, data=data)
    assert identify(run, tmp_path).tokenizer is None  # not made yet
    (tmp_path / "words.json").write_text("first")
    monkeypatch.setattr(fingerprints, "_tokenizer_hash", lambda name, changed: Path(name).read_text())
    before = identify(run, tmp_path)
    assert before == identify(run, tmp_path) and before.matches(before.stored())
    (tmp_path / "words.json").write_text("second")
    assert identify(run, tmp_path).mark != before.mark
    (tmp_path / "words.json").write_text("first")
    text.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "four"}\n')
    fingerprints._corpus_hash.cache_clear()
    assert identify(run, tmp_path).corpus != before.corpus
    text.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    fingerprints._corpus_hash.cache_clear()
    again = identify(run, tmp_path)
    assert again.matches(before.stored()) and not replace(again, recipe=RECIPE + 1).matches(before.stored())
    values = to_dict(run)
    monkeypatch.setattr(fingerprints, "to_dict", lambda run: values | {"log_every": 7})  # as if its default changed
    assert not identify(run, tmp_path).matches(before.stored())


def test_a_new_setting_at_its_default_keeps_results(tmp_path, monkeypatch):
    """The house's rule: a new setting's default means what was so before. Any other value is another run."""
    run, root = recipe("lab"), tmp_path
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "a text")
    old = identify(run, root)
    names, new = {old.keys: sorted(old.settings)}, fingerprints._defaults() | {"model.new": 0}
    monkeypatch.setattr(fingerprints, "_defaults", lambda: new)
    values = to_dict(run)
    for value, matches in ((0, True), (1, False)):
        later = values | {"model": values["model"] | {"new": value}}
        monkeypatch.setattr(fingerprints, "to_dict", lambda run, later=later: later)
        assert identify(run, root).matches(old.stored(), names) == matches
        assert not identify(run, root).matches(old.stored())  # without the names the difference is unknown
    changed = values | {"model": values["model"] | {"new": 0, "dim": 48}}
    monkeypatch.setattr(fingerprints, "to_dict", lambda run: changed)
    assert not identify(run, root).matches(old.stored(), names)


def test_a_redraw_deletes_nothing_and_results_of_another_recipe_are_named_not_mixed(repo, capsys):
    """F6: the old --redraw dropped what no longer matched from results.json."""
    (repo / "fixed").touch()
    study, path = make_study(repo), repo / "experiments/01_fake/results.json"
    assert study.main(["--seeds", "0", "1"]) == 0
    stored = json.loads(path.read_text())
    for seeds in stored["runs"].values():
        for record in seeds.values():
            record["recipe"] = RECIPE - 1
    path.write_text(json.dumps(stored))
    assert study.main(["--redraw"]) == 0
    page = (path.parent / "README.md").read_text()
    assert f"Recipe {RECIPE - 1}. These are not of the present configuration and text (recipe {RECIPE})" in page
    assert json.loads(path.read_text())["runs"] == stored["runs"]
    called(repo)
    assert study.main(["--seeds", "0", "--only", "first"]) == 0 and len(called(repo)) == 1
    after = Results(path)
    assert after.variants == ["first"] and after.seeds() == [0] and len(after.others) == 8
    page = (path.parent / "README.md").read_text()
    assert f"Kept but not shown: 8 results of recipe {RECIPE - 1}, text the text." in page
    assert study.main(["--redraw"]) == 0 and len(Results(path).others) == 8


def test_differences_are_paired_by_seed(tmp_path):
    """By hand: the differences between seeds, 1 and 10, cancel."""
    results = Results(tmp_path / "results.json")
    for variant, losses in {"a": {0: 1.0, 1: 11.0, 2: 5.0}, "b": {1: 10.5, 0: 0.7}}.items():
        for seed, loss in losses.items():
            results.add(variant, seed, {"numbers": {"val_loss": loss, "by": [{"x": loss}], "long": loss / 3}})
    np.testing.assert_allclose(results.paired("b", "a", "val_loss"), [-0.3, -0.5])
    assert mean_spread(results.paired("b", "a", "val_loss"), 2, sign=True) == "−0.40 ± 0.14"
    again = Results(tmp_path / "results.json")
    assert again.runs == results.runs and again.values("a", "by/0/x").tolist() == [1.0, 11.0, 5.0]
    for seeds in again.runs.values():
        for record in seeds.values():
            record["parameters"] = {"total": 1, "active": 1, "cache_bytes": 1}
    columns = [Column("loss", "val_loss", 1, paired=True, against=("b", ABOVE)), Column("speed", "speed")]
    rows = results_table(again, columns).splitlines()
    assert rows[0].endswith("| loss | against a, paired | against b, paired | against the row above, paired | speed |")
    assert rows[2] == "| a | 1 (1) | 1 | 5.7 ± 5.0 |  | +0.4 ± 0.1 |  | – |"
    assert rows[3] == "| b | 1 (1) | 1 | 5.6 ± 6.9 | −0.4 ± 0.1 |  | −0.4 ± 0.1 | – |"


def test_results_are_written_atomically(tmp_path, monkeypatch):
    results = Results(tmp_path / "results.json", {"question": 'why "@"?'})
    results.add("a", 0, {"numbers": {"x": 1.0}})
    before = (tmp_path / "results.json").read_text()
    assert json.loads(before)["question"] == 'why "@"?'
    monkeypatch.setattr(Path, "write_bytes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        results.add("a", 1, {"numbers": {"x": 2.0}})
    assert (tmp_path / "results.json").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_a_page_without_markers_is_rejected(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# nothing\n")
    with pytest.raises(ValueError, match=f"path='{page}'"):
        replace_block(page, "x")
    assert page.read_text() == "# nothing\n"


def test_thinned_curves_are_means():
    rows = [{"step": i, "loss": float(i)} for i in range(1, 101)] + [{"step": 100, "val_loss": 3.0}]
    curves = thin_curves(rows, ("loss", "val_loss", "absent"), points=4)
    assert curves == {"loss": [[25, 50, 75, 100], [13.0, 38.0, 63.0, 88.0]], "val_loss": [[100], [3.0]]}
