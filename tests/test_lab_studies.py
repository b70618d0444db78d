"""Every study of `experiments/` as it is stored: variants, results, claims, page, picture; and its own code."""

import importlib.util
import re

import jax.numpy as jnp
import numpy as np
import pytest
from runs import HERE

from dsv3_jax.config import replace
from dsv3_jax.model.counting import size
from dsv3_jax.ops import routing
from dsv3_jax.ops.quantize import dequantize_rows, quantize_rows
from dsv3_jax.presets import recipe
from experiments.lab import RUNS_FOLDER, Results, bases, fingerprints, overview
from experiments.lab.fingerprints import RECIPE, settings_of
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
def test_every_study_is_complete(folder, monkeypatch):
    """Variants are valid, short and as mini. results.json has all runs that the study makes, and the same verdicts."""
    study = load(folder)
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "a text")
    asked = study.list_runs(bases.base_run(study.base, [], RUNS_FOLDER), (0, 1))
    for base in (bases.short_run(study.base), *([recipe("mini")] if study.base == "lab" else [])):
        assert list(study.list_runs(base, (0, 1))) == list(asked)
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
    assert [int(f.name[:2]) for f in FOLDERS].index(int(folder.name[:2])) == int(folder.name[:2]) - 1


@pytest.mark.long
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_pictures_say_a_number_and_a_part_of_the_runs_is_shown(folder, tmp_path, monkeypatch):
    """One variant with one seed gives a table, and a picture or the name of the run that it needs."""
    study, results, written = load(folder), Results(folder / "results.json"), []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: written.append(figure))
    study.judge(results)
    study.draw(results, tmp_path / "picture.png")
    whole = written[0].get_suptitle()
    titles = [whole] if whole else [ax.get_title() for ax in written[0].axes if ax.has_data() and ax.get_title()]
    assert titles and all(any(c.isdigit() for c in title) for title in titles), titles
    everything = results.runs
    for variant in (list(everything)[0], list(everything)[-1]):
        results.runs = {variant: dict([min(everything[variant].items())])}
        study.judge(results)
        assert study.make_table(results).startswith("| ")
        try:
            study.draw(results, tmp_path / "picture.png")
        except MissingRuns as missing:
            assert str(missing).startswith("no run of ")


def test_specialisation_shares_the_runs_of_the_balance_study():
    base = recipe("lab")
    balance = load(HERE / "experiments/03_balance").list_runs(base, (0, 1))
    runs = load(HERE / "experiments/09_specialisation").list_runs(base, (0,))
    assert {r.identity for r in runs.values()} <= {r.identity for r in balance.values()}
    assert settings_of(base) in [r.identity.settings for r in balance.values()]


def test_a_token_is_sent_once_to_each_other_device_of_its_experts():
    ids = np.zeros((1, 16, 1, 3), np.int32)  # 8 devices with 2 rows and 4 experts each
    ids[0, :, 0] = [0, 1, 4]  # on the first two devices
    ids[0, 15, 0] = [31, 30, 29]  # on the last device, whose row this is
    assert module_of("05_groups", "on_mesh").copies(ids, 4).ravel().tolist() == [1, 1, 1, 1, *[2] * 11, 0]


def test_the_share_of_a_draft():
    """Each of four heads is a quarter of them. A model that drafts for itself costs a full step."""
    module, cfg = module_of("07_speculation"), recipe("lab").model
    assert module.share(cfg, cfg) == 1
    medusa = replace(cfg, mtp_depth=4, mtp_kind="medusa")
    assert module.share(cfg, medusa) == pytest.approx((cfg.dim**2 + cfg.vocab_size * cfg.dim) / size(cfg).active)


def test_rounding_to_eight_bits_is_int8(rng):
    """And 2 bits leave three values: −max, 0 and max of a row."""
    module = module_of("08_cache_dtype")
    x = rng.normal(size=(4, 8)).astype(np.float32)
    x[2] = 0
    rows, scales = quantize_rows(jnp.asarray(x), jnp.int8)
    np.testing.assert_allclose(module.round_to_bits(x, 8), dequantize_rows(rows, scales, jnp.float32), rtol=1e-6)
    top = np.abs(x).max(1, keepdims=True)
    np.testing.assert_allclose(module.round_to_bits(x, 2), np.where(np.abs(x) > top / 2, np.sign(x) * top, 0))


@pytest.mark.parametrize("distance", [16, 60, 198])
def test_a_question_has_one_answer_at_its_distance(distance):
    planted = module_of("10_yarn", "planted")
    text = planted.plain("the keys, and more. " * 400)
    document = planted.with_keys(text, np.random.default_rng(0), 512, but="!")
    pairs = re.findall("([?!@])([A-Z0-9])", document)
    assert set(dict(pairs)) == {"?", "@"} and len(set(pairs)) == 2 and planted.without_keys(document) == text
    rng, values = np.random.default_rng(distance), set()
    for _ in range(20):
        row = planted.question("some words and more of them " * 10, 200, distance, rng, 512)
        key, value = row[-2:]
        values.add(value)
        assert len(row) == 200 and row.count(key) == 2 and row[row.index(key) + 1] == value
        assert not set(row[:-2].replace(key + value, "")) & set(planted.VALUES[key])
        assert abs(198 - row.index(key) - distance) <= 8
    assert len(values) > 3


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
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 0]], np.int32)
    cut = parts.windows_of({"tokens": segments, "segment_ids": segments}, 3)
    assert cut["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 3, 4, 0]]  # the second document is cut at 6 too
    assert cut["positions"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]


def test_far_keys_are_those_beyond_the_trained_length():
    retrieval = module_of("13_retrieval")
    far = [[float(c * d > 1) for d in retrieval.DEPTHS] for c in retrieval.CONTEXTS]
    assert retrieval.beyond("own")({"own": far}) == 100 and retrieval.within("own")({"own": far}) == 0
