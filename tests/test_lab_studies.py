"""Every study of `experiments/` as it is stored: variants, results, claims, page."""

import pytest
from runs import HERE

from experiments.lab import RUNS_FOLDER, Results, bases, fingerprints, overview
from experiments.lab.fingerprints import RECIPE
from experiments.lab.study import load

FOLDERS = overview.folders(HERE / "experiments")


@pytest.mark.long
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_study_is_complete(folder, monkeypatch, tmp_path):
    """Variants are valid, also as short ones. results.json has all runs that the study makes, and the same verdicts."""
    study, drawn = load(folder), []
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "a text")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    asked = study.list_runs(bases.base_run(study.base, [], RUNS_FOLDER), (0,))
    assert list(study.list_runs(bases.short_run(study.base), (0,))) == list(asked)
    results = Results(folder / "results.json")
    assert results.recipe == RECIPE and set(results.variants) == {name for name, _ in asked}
    for variant in results.variants:
        assert results.seeds_of(variant) == [str(seed) for seed in range(study.seeds_of.get(variant, study.seeds))]
    verdicts, _ = study.judge(results)
    kept = [(v["claim"], v["answer"]) for v in results.about["verdicts"]]
    found = [(v.claim.text, v.answer) for v in verdicts]
    assert found == kept, "studies share their noise: run python -m experiments.lab run all --redraw"
    assert [text for text, _ in kept] == [claim.text for claim in study.claims] != []
    page = (folder / "README.md").read_text()
    assert page.startswith(f"# {study.question}\n") and study.question.endswith("?")
    assert page.count("<!-- results -->") == page.count("<!-- /results -->") == 1
    assert overview.verdict(folder) != "pending" and f"python -m experiments.lab run {folder.name[:2]}" in page
    assert f"({folder.name}/README.md)" in (HERE / "experiments" / "README.md").read_text()
    study.draw(results, tmp_path / "picture.png")
    assert drawn[0].axes and study.make_table(results).startswith("| ")
