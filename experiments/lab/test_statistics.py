"""The rules of the lab's verdicts, and all stored studies, whose claims test_rule recomputes."""

from statistics import NormalDist

import pytest
from runs import HERE

from experiments.lab import Results, Study, bases, fingerprints, overview
from experiments.lab.claims import Claim, Stake, answer_to, judge, noise_within, verdict_table
from experiments.lab.fingerprints import RECIPE_OF_TASKS, RECIPE_OF_TEXT
from experiments.lab.pooling import noise_for
from experiments.lab.statistics import Difference, estimate, smallest_visible
from experiments.lab.study import load


def test_the_smallest_visible_difference_has_80_percent_power():
    """The quantiles of a normal distribution, with many degrees of freedom: 2.8 standard errors."""
    normal = NormalDist().inv_cdf(1 - 0.05 / 3 / 2) + NormalDist().inv_cdf(0.8)
    assert smallest_visible(2.0, dof=10**7, comparisons=3) == pytest.approx(2 * normal, rel=1e-3)


def test_the_answer_to_a_claim():
    for expect, mean, p, answer in (
        ("lower", -3, 0.01, "yes"),
        ("lower", 3, 0.01, "no"),
        ("higher", 3, 0.01, "yes"),
        ("lower", -3, 0.06, "too small to tell here"),
        ("none", -3, 0.01, "yes"),
        ("equal", 0.5, 0.01, "yes"),
        ("equal", 0.5, 0.06, "too small to tell here"),
        ("equal", -3.5, 0.01, "no"),
    ):
        claim = Claim("x", "a", "b", expect=expect, margin=2.0)
        assert answer_to(claim, Difference(mean, 1.0, 3, 0.5, 50), p) == answer


def test_a_failed_manipulation_check_gives_no_verdict(tmp_path):
    """A large difference is not judged if what the subject is worth is not told from 0.

    Claims whose runs are missing are left out.
    """
    losses = {"base": [3.0, 3.1, 3.2], "better": [2.5, 2.6, 2.71], "none": [3.01, 3.12, 3.2]}
    results = Results(tmp_path / "results.json")
    for variant, seeds in losses.items():
        records = {str(seed): {"numbers": {"val_loss": loss}} for seed, loss in enumerate(seeds)}
        results.runs[variant] = records
    stakes = {
        "small": Stake("no subject", "none", "base"),
        "large": Stake("no model", "base", "better"),
    }
    asked = [Claim(stake, "better", "base", stake=stake) for stake in ("small", "large", "")]
    asked += [Claim("nowhere", "nowhere", "base")]
    verdicts, checks = judge(results, asked, stakes, noise_within(results))
    answers = {v.claim.text: v.answer for v in verdicts}
    assert answers == {"small": "no verdict", "large": "yes", "": "yes"}
    assert [check.passed for check in checks] == [False, True]
    with pytest.raises(ValueError, match="differences=1 leave no degree of freedom"):
        estimate([0.1])


def test_a_table_is_shown_without_what_one_seed_cannot_tell(tmp_path):
    results = Results(tmp_path / "results.json")
    size = {"total": 1, "active": 1, "cache_bytes": 1}
    results.runs = {"base": {"0": {"numbers": {"val_loss": 3.0}, "parameters": size}}}
    study = Study(dict, below=lambda results: str(estimate([0.1])))
    assert study.make_table(results).endswith("| base | 1 (1) | 1 | 3.0000 |  |")


def test_copies_have_a_noise_of_their_own_for_the_loss_too(tmp_path):
    """Pairs of one parent's runs, and others, are pooled as for any number of a study."""
    losses = {"p": [3.0, 3.5, 3.1], "x": [3.4, 3.1, 3.3], "a": [2.9, 3.4, 3.02]}
    losses |= {"b": [2.91, 3.41, 3.01], "c": [2.93, 3.42, 3.03]}
    results = Results(tmp_path / "01_own" / "results.json", {"base": "lab"})
    for name, seeds in losses.items():
        records = [{"numbers": {"val_loss": x, "copy": x}, "steps": 5} for x in seeds]
        results.runs[name] = {str(seed): record for seed, record in enumerate(records)}
    results.begun = dict.fromkeys("abc", "p")
    noise = noise_for(results, tmp_path)
    for pair in (("a", "b"), ("a", "p"), ("x", "p"), ("x", "a")):
        assert str(noise("val_loss", pair)) == str(noise("copy", pair))


def test_a_study_without_results_claims_nothing_yet():
    """Its claims are fixed before its runs. The page says so, and has no table."""
    experiments = HERE / "experiments"
    for folder in set(overview.folders(experiments)) - set(overview.with_results(experiments)):
        page = (folder / "README.md").read_text()
        assert page.partition("## Verdict")[2].lstrip().startswith("Not run yet."), folder.name
        assert "<!-- results -->\n<!-- /results -->" in page and load(folder).claims, folder.name


@pytest.mark.long
@pytest.mark.parametrize(
    "folder", overview.with_results(HERE / "experiments"), ids=lambda folder: folder.name
)
def test_every_study_is_complete(folder, monkeypatch, tmp_path):
    """Variants are valid, short ones too. results.json has all runs, and the same verdicts.

    A page names the variants that are not run yet. Claims on them have no verdict.
    """
    study, drawn = load(folder), []
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "a text")
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure)
    )
    asked = study.list_runs(bases.base_run(study.base), (0,))
    assert list(study.list_runs(bases.short_run(study.base), (0,))) == list(asked)
    results = Results(folder / "results.json")
    page = (folder / "README.md").read_text()
    not_run = [name for name, _ in asked if name not in results.variants]
    assert results.recipe in (RECIPE_OF_TASKS, RECIPE_OF_TEXT)
    assert set(results.variants) <= {name for name, _ in asked}
    named = page.partition("Not run yet: ")[2].partition(".\n")[0]
    assert named == ", ".join(f'"{name}"' for name in not_run)
    for variant in results.variants:
        assert results.seeds_of(variant) == [str(seed) for seed in study.own_seeds(variant)]
    # tables have the study's order
    results.runs = {name: results.runs[name] for name, _ in asked if name not in not_run}
    verdicts, checks = study.judge(results)
    kept = [(v["claim"], v["answer"]) for v in results.about["verdicts"]]
    found = [(v.claim.text, v.answer) for v in verdicts]
    assert found == kept, (
        "studies share their noise: run python -m experiments.lab run all --redraw"
    )
    claimed = [c.text for c in study.claims if not {c.variant, c.against} & set(not_run)]
    assert [text for text, _ in kept] == claimed != []
    assert page.startswith(f"# {study.question}\n") and study.question.endswith("?")
    assert page.count("<!-- results -->") == page.count("<!-- /results -->") == 1
    assert overview.verdict(folder) != "pending"
    assert f"python -m experiments.lab run {folder.name[:2]}" in page
    assert f"({folder.name}/README.md)" in (HERE / "experiments" / "README.md").read_text()
    study.draw(results, tmp_path / "picture.png")
    assert drawn[0].axes
    table = verdict_table(verdicts, checks, results.begun)
    assert f"{table}\n\n{study.make_table(results)}" in page
