"""Every study of `experiments/` as it is stored: variants, results, claims, page, picture; and its own code."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest
from runs import HERE

from dsv3_jax.config import replace
from dsv3_jax.ops import routing
from dsv3_jax.presets import recipe
from experiments.lab import RUNS_FOLDER, Results, bases, fingerprints, overview
from experiments.lab.fingerprints import RECIPE
from experiments.lab.results import MissingRuns
from experiments.lab.study import load

FOLDERS = overview.folders(HERE / "experiments")


def module_of(name, file="study"):
    """Load a file of a study as a module."""
    path = HERE / "experiments" / name / f"{file}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_{file}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_study_is_complete(folder, monkeypatch, tmp_path):
    """Variants are valid, also as short ones. results.json has all runs that the study makes, and the same verdicts.

    The picture's title says a number. One variant with one seed gives a table, and a picture or the name of what lacks.
    """
    study, written = load(folder), []
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "a text")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: written.append(figure))
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
    whole = written[0].get_suptitle()
    titles = [whole] if whole else [ax.get_title() for ax in written[0].axes if ax.has_data() and ax.get_title()]
    assert titles and all(any(c.isdigit() for c in title) for title in titles), titles
    last = list(results.runs)[-1]
    results.runs = {last: dict([min(results.runs[last].items())])}
    study.judge(results)
    assert study.make_table(results).startswith("| ")
    try:
        study.draw(results, tmp_path / "picture.png")
    except MissingRuns as missing:
        assert str(missing).startswith("no run of ")


def test_the_experts_with_the_highest_scores_are_skipped(rng):
    """Against a loop: of the order of s + b, the first m are passed over and the next K are taken."""
    parts = module_of("14_parts")
    cfg = replace(recipe("lab").model, num_experts=8, experts_per_token=5, num_groups=1, groups_per_token=1)
    logits, bias = rng.normal(size=(6, 8)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    found = parts.skip_top(routing.route, 2, jnp.asarray(logits), jnp.asarray(bias), cfg)
    scores = 1 / (1 + np.exp(-logits))
    for row, (ids, gates) in enumerate(zip(np.asarray(found.expert_ids), np.asarray(found.gates), strict=True)):
        wanted = np.argsort(-(scores[row] + bias))[2:5]
        assert ids.tolist() == wanted.tolist()
        np.testing.assert_allclose(gates, cfg.routed_scale * scores[row, wanted] / scores[row, wanted].sum(), rtol=1e-5)
