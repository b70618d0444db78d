"""The lab's statistics against closed forms, the rules of its verdicts, and all stored studies."""

from statistics import NormalDist

import numpy as np
import pytest
from runs import HERE
from scipy import stats

from experiments.lab import RUNS_FOLDER, Results, bases, fingerprints, overview
from experiments.lab.claims import (
    Claim,
    Stake,
    answer_to,
    as_json,
    judge,
    noise_within,
    verdict_table,
)
from experiments.lab.fingerprints import RECIPE
from experiments.lab.pooling import noise_for, recipe_noise
from experiments.lab.statistics import (
    Difference,
    estimate,
    holm,
    pool,
    share_bound,
    smallest_visible,
)
from experiments.lab.study import load


def test_the_residual_is_that_of_two_way_analysis_of_variance():
    """For a full table the residual is y − row mean − column mean + mean.

    It has (V − 1)(S − 1) degrees of freedom.
    """
    rng = np.random.default_rng(0)
    y = rng.normal(size=(5, 1)) + rng.normal(0, 0.3, 3) + rng.normal(0, 0.1, (5, 3))
    residual = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    found = pool([{f"v{v}": dict(enumerate(row)) for v, row in enumerate(y)}])
    assert found.dof == 8 and found.sd == pytest.approx(np.sqrt((residual**2).sum() / 8))
    assert found.within_dof == 10
    assert found.within_sd == pytest.approx(np.sqrt(y.var(1, ddof=1).mean()))


def test_a_pool_without_a_pair_is_that_of_what_is_left():
    """For two seeds a residual is half a difference of differences, so three variants by hand."""
    table = {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.1}, "c": {0: 0.0, 1: 1.3}}
    found = pool([table], ("a", "b"))
    other = (1.0 + 0.6) / 2 - 1.3  # how c moves against the mean of a and b
    # Its variance is 2 (σ² + σ² / 2): two seeds, and a mean of two has half of the variance.
    assert found.dof == 1 and found.sd == pytest.approx(abs(other) / np.sqrt(3))
    assert found.within_dof == 1 and found.within_sd == pytest.approx(1.3 / np.sqrt(2))


def test_a_difference_by_hand():
    """Two numbers of variance 0.02, shrunk to one of 0.01 by a weight of 1 / (1/40 + 1/60) = 24."""
    found = estimate([0.1, 0.3], variance=0.01, dof=60, prior=40)
    error = np.sqrt((24 * 0.01 + 0.02) / 25 / 2)
    assert found.seeds == 2 and found.mean == pytest.approx(0.2)
    assert found.dof == pytest.approx(25)
    assert found.error == pytest.approx(error)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 25) * error)
    assert found.p() == pytest.approx(2 * stats.t.sf(0.2 / error, 25))
    assert found.p(margin=0.5) == pytest.approx(2 * stats.t.sf(0.3 / error, 25))
    # From eight seeds on, and without a pool, the variance is the numbers' own.
    for numbers in ([0.1, 0.3, 0.2] * 3, [0.1, 0.3, 0.2]):
        found = estimate(numbers, 1e6, 60 if len(numbers) > 3 else 0, prior=40)
        assert found.error == pytest.approx(stats.sem(numbers))
        assert found.dof == len(numbers) - 1
    with pytest.raises(ValueError, match="differences=1 leave no degree of freedom"):
        estimate([0.1])


def test_no_wrong_answer_bounds_a_share():
    """Of 100 questions none is wrong in 5 % of cases, if the share of wrong ones is the bound."""
    assert (1 - share_bound(100)) ** 100 == pytest.approx(0.05)
    assert estimate([0.0, 0.0, 0.0], least=0.4).half == pytest.approx(0.4)


def test_holm_by_hand():
    """The smallest of n is multiplied by n, the next by n − 1; none gets below one before it."""
    assert holm([0.03, 0.005, 0.02]) == pytest.approx([0.04, 0.015, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


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


def fill(path, table, **about):
    results = Results(path, about)
    for variant, seeds in table.items():
        for seed, value in enumerate(seeds):
            record = {"numbers": {"val_loss": value}, "steps": 5, "recipe": 2, "config": variant}
            results.runs.setdefault(variant, {})[str(seed)] = record
    return results


def test_a_failed_manipulation_check_gives_no_verdict(tmp_path):
    """A large difference is not judged if what the subject is worth is not told from 0."""
    table = {
        "base": [3.0, 3.1, 3.2],
        "better": [2.5, 2.6, 2.71],
        "none": [3.01, 3.12, 3.2],
        "far": [4, 4.1, 4.21],
    }
    results = fill(tmp_path / "results.json", table)

    def against(name):
        return lambda results: results.paired(name, "base", "val_loss")

    stakes = {
        "small": Stake("no subject", against("none")),
        "large": Stake("no model", against("far")),
    }
    asked = [Claim(stake, "better", "base", stake=stake) for stake in ("small", "large", "")]
    asked += [Claim("nowhere", "nowhere", "base"), Claim("worse", "far", "base")]
    verdicts, checks = judge(results, asked, stakes, noise_within(results))
    answers = {v.claim.text: v.answer for v in verdicts}
    assert answers == {"small": "no verdict", "large": "yes", "": "yes", "worse": "no"}
    assert [check.passed for check in checks] == [False, True]
    table = verdict_table(verdicts, checks)
    assert "| **no verdict** |" in table
    assert "4 of 4 claims rest on fewer than 8 degrees of freedom" in table
    kept = as_json(verdicts[1])
    # The sign is turned: lower is good.
    assert kept["difference"] == pytest.approx(0.4967, abs=1e-4) and kept["answer"] == "yes"


def test_a_recipe_s_noise_counts_shared_runs_once(tmp_path):
    """Runs of another base stay out, and so do heads on a frozen trunk, whose loss is its own."""
    first = fill(tmp_path / "01_x" / "results.json", {"a": [1.0, 2.0], "b": [1.5, 2.1]}, base="lab")
    frozen = fill(tmp_path / "02_x" / "results.json", {"a": [1.0], "head": [1.0, 2.0]}, base="lab")
    for record in frozen.runs["a"].values():
        record["config"] = "the hash of the same run by a version with more settings"
    other = fill(
        tmp_path / "03_x" / "results.json", {"c": [1.0, 9.0], "d": [3.0, 1.0]}, base="tiny"
    )
    found = recipe_noise([first, frozen, other], "lab", {5})
    assert (found.runs, found.dof, found.sd) == (4, 1, pytest.approx(0.2))
    assert noise_for(first, tmp_path)("val_loss") == recipe_noise([first], "lab", {5})


def test_runs_that_continue_from_one_parent_are_not_independent(tmp_path):
    """Copies of a gain leave its interval, and copies that are compared have their own noise."""
    seeds = {"before": [60.0, 45.0, 20.0], "after": [90.0, 55.0, 25.0]}
    copies = {
        f"copy {i}": [value + 0.1 * i * s for s, value in enumerate(seeds["after"])]
        for i in range(4)
    }
    few, many = (fill(tmp_path / f"{len(x)}", x) for x in (seeds, seeds | copies))
    many.begun = dict.fromkeys(["after", *copies], "before")
    gain = Claim("gain", "after", "before", expect="higher")
    (alone,), _ = judge(few, [gain], {}, noise_within(few))
    found, _ = judge(many, [gain, Claim("same", "copy 1", "copy 2")], {}, noise_within(many))
    own = stats.sem([30.0, 10.0, 5.0]) * stats.t.ppf(0.975, 2)  # of the three gains
    assert found[0].difference == alone.difference and alone.difference.half == pytest.approx(own)
    assert found[1].difference.half < 1


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
    asked = study.list_runs(bases.base_run(study.base, [], RUNS_FOLDER), (0,))
    assert list(study.list_runs(bases.short_run(study.base), (0,))) == list(asked)
    results = Results(folder / "results.json")
    page = (folder / "README.md").read_text()
    not_run = [name for name, _ in asked if name not in results.variants]
    assert results.recipe == RECIPE and set(results.variants) <= {name for name, _ in asked}
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
    assert f"{verdict_table(verdicts, checks)}\n\n{study.make_table(results)}" in page
