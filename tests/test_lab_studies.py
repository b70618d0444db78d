"""Every study of `experiments/` as it is stored: variants, results, claims and page."""

import importlib.util

import pytest
from runs import HERE

from dsv3_jax.presets import recipe
from experiments.lab import RUNS_FOLDER, Results, bases, fingerprints, overview
from experiments.lab.fingerprints import RECIPE

pytestmark = pytest.mark.long


SCRIPTS = sorted((HERE / "experiments").glob("[0-9][0-9]_*/run.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_every_study_is_complete(script, monkeypatch):
    """Its variants are valid, short and as mini; results.json has all runs; README.md has markers and a verdict."""
    monkeypatch.syspath_prepend(script.parent)
    spec = importlib.util.spec_from_file_location("a_study", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    study = module.STUDY
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "a text")
    asked = study.list_runs(bases.base_run(study.base, [], RUNS_FOLDER), (0, 1))
    for base in (bases.short_run(study.base), *([recipe("mini")] if study.base == "lab" else [])):
        assert list(study.list_runs(base, (0, 1))) == list(asked)
    results = Results(script.parent / "results.json")
    assert results.recipe in (1, RECIPE, None) and set(results.variants) <= {name for name, _ in asked}
    verdicts, _ = study.judge(results)
    judged = [v.claim.text for v in verdicts]
    assert study.claims and judged == [v["claim"] for v in results.about.get("verdicts", [])]
    if results.recipe == RECIPE:  # a key that no result has would leave its claim out
        assert judged == [claim.text for claim in study.claims]
    kept = [v["answer"] for v in results.about.get("verdicts", [])]
    assert [v.answer for v in verdicts] == kept, "studies share their noise: run python -m experiments.lab --redraw"
    page = (script.parent / "README.md").read_text()
    assert page.startswith(f"# {study.question}\n") and study.question.endswith("?")
    assert page.count("<!-- results -->") == page.count("<!-- /results -->") == 1
    assert (overview.verdict(script.parent) == "pending") == (results.recipe is None)  # what has results is answered


def test_studies_are_numbered_and_listed():
    names = [script.parent.name for script in SCRIPTS]
    assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1)) and names
    page = (HERE / "experiments" / "README.md").read_text()
    assert [name for name in names if f"({name}/README.md)" not in page] == []
