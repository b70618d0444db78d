"""The lab's statistics against closed forms and simulation, and the rules of its verdicts."""

import doctest
from statistics import NormalDist

import numpy as np
import pytest
from scipy import stats

from experiments.lab import Results, claims, drawing, fingerprints, measuring, statistics, tables
from experiments.lab.claims import Claim, Stake, answer_to, as_json, judge, noise_within, verdict_table
from experiments.lab.pooling import noise_for, recipe_noise
from experiments.lab.statistics import (
    Difference,
    Noise,
    against_constant,
    compare,
    holm,
    pool,
    smallest_visible,
)

NOISE = Noise(sd=0.0141, dof=58, seed_sd=0.013, within_sd=0.019, within_dof=60, variants=30, runs=90)


def simulated(rng, variants, seeds, sd, seed_sd):
    """Return a table variant → seed → number, from y = μ_v + β_s + ε."""
    effects = rng.normal(0, seed_sd, seeds)
    means = rng.normal(0, 1, variants)
    noise = rng.normal(0, sd, (variants, seeds))
    return {f"v{v}": {s: means[v] + effects[s] + noise[v, s] for s in range(seeds)} for v in range(variants)}


def test_the_residual_is_that_of_two_way_analysis_of_variance(rng):
    """For a full table the residual is y − row mean − column mean + mean, with (V − 1)(S − 1) degrees of freedom."""
    table = simulated(rng, 5, 3, 0.1, 0.3)
    y = np.array([list(row.values()) for row in table.values()])
    residual = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    found = pool([table])
    assert found.dof == 8 and found.sd == pytest.approx(np.sqrt((residual**2).sum() / 8))
    assert found.within_dof == 10 and found.within_sd == pytest.approx(np.sqrt(y.var(1, ddof=1).mean()))


def test_an_interval_covers_the_truth_in_95_of_100_cases(rng):
    """With seeds missing in the pool; also against a constant, where the seeds' effects count as noise."""
    covered, constant, squares = 0, 0, []
    wide = Noise(0.1, 18, 0.3, float(np.hypot(0.1, 0.3)), 10**6, 10, 30)
    for _ in range(500):
        first, second = simulated(rng, 6, 3, 0.1, 0.3), simulated(rng, 4, 2, 0.1, 0.3)
        del first["v1"][2], first["v4"][0]
        noise = pool([first, second])
        assert noise.dof == (16 - 8) + (8 - 5)
        squares.append(noise.sd**2)
        a, b = rng.normal(0, 0.1, (2, 3))
        found = compare(dict(enumerate(0.5 + a)), dict(enumerate(b)), noise)
        covered += found.interval[0] <= 0.5 <= found.interval[1]
        clean = {s: 2.0 + rng.normal(0, np.hypot(0.1, 0.3)) for s in range(3)}
        constant += abs(against_constant(clean, 2.0, wide).mean) <= against_constant(clean, 2.0, wide).half
    for count in (covered, constant):
        assert abs(count - 475) < 4 * np.sqrt(500 * 0.95 * 0.05)
    assert np.mean(squares) == pytest.approx(0.01, rel=4 * np.sqrt(2 / 11 / 500))  # four standard errors


def test_a_difference_by_hand():
    found = compare({0: 1.0, 1: 1.2, 5: 9.0}, {0: 1.01, 1: 1.23, 2: 0.0}, NOISE)
    error = 0.0141 * np.sqrt(2 / 2)
    assert found.seeds == 2 and found.mean == pytest.approx(-0.02) and found.error == pytest.approx(error)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 58) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(0.02 / error, 58)) and found.p > 0.1
    with pytest.raises(ValueError, match=r"seeds=\[0\] and \[1\]"):
        compare({0: 1.0}, {1: 1.0}, NOISE)
    with pytest.raises(ValueError, match="variants=1 with runs=1 leave no degree"):
        pool([{"a": {0: 1.0}}])


def test_holm_keeps_false_positives_below_five_percent(rng):
    """By hand, in any order; and among ten true nulls one is found in at most 5 of 100 studies, but not in fewer."""
    assert holm([0.03, 0.005, 0.02]) == pytest.approx([0.04, 0.015, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    wrong = np.mean([min(holm(list(rng.uniform(size=10)))) < 0.05 for _ in range(2000)])
    assert 0.03 < wrong < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_the_smallest_visible_difference_is_seen_in_80_of_100_studies(rng):
    """Simulated with an estimated σ; and 2.8 standard errors with many degrees of freedom."""
    shift = smallest_visible(1.0, dof=6, comparisons=3)
    draws, critical = 20000, stats.t.ppf(1 - 0.05 / 3 / 2, 6)
    t = rng.normal(shift, 1, draws) / np.sqrt(rng.chisquare(6, draws) / 6)
    assert (np.abs(t) > critical).mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / draws))
    normal = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    assert smallest_visible(2.0, dof=10**7) == pytest.approx(2 * normal, rel=1e-3)


def test_the_answer_to_a_claim():
    for expect, mean, p, answer in (
        ("lower", -3, 0.01, "yes"),
        ("lower", 3, 0.01, "no"),
        ("higher", 3, 0.01, "yes"),
        ("lower", -3, 0.06, "too small to tell here"),
        ("equal", 0.5, 0.6, "yes"),  # −0.5 … 1.5 is within 2
        ("equal", 1.5, 0.01, "too small to tell here"),  # 0.5 … 2.5 is neither within nor outside
        ("equal", -3.5, 0.01, "no"),
        ("equal", -3.5, 0.2, "too small to tell here"),
    ):
        claim = Claim("x", "a", "b", expect=expect, margin=2.0)
        assert answer_to(claim, Difference(mean, 1.0, 0.5, 3, 0.5, 50), p) == answer


def fill(path, table, **about):
    results = Results(path, about)
    for variant, seeds in table.items():
        for seed, value in enumerate(seeds):
            record = {"numbers": {"val_loss": value}, "steps": 5, "recipe": 2, "config": variant}
            results.runs.setdefault(variant, {})[str(seed)] = record
    return results


def test_a_failed_manipulation_check_gives_no_verdict(tmp_path):
    """A large difference is not judged if taking the subject away costs less than 3 × the noise."""
    table = {"base": [3.0, 3.1, 3.2], "better": [2.5, 2.6, 2.71], "none": [3.01, 3.12, 3.2], "far": [4, 4.1, 4.21]}
    results = fill(tmp_path / "results.json", table)

    def against(name):
        return lambda results: results.paired(name, "base", "val_loss")

    stakes = {"small": Stake("no subject", against("none")), "large": Stake("no model", against("far"))}
    stakes |= {"absent": Stake("what nobody ran", against("nowhere"))}
    asked = [Claim(stake, "better", "base", stake=stake) for stake in ("small", "large", "absent", "")]
    asked += [Claim("nowhere", "nowhere", "base"), Claim("worse", "far", "base")]
    verdicts, checks = judge(results, asked, stakes, noise_within(results))
    answers = {v.claim.text: v.answer for v in verdicts}
    assert answers == {"small": "no verdict", "large": "yes", "absent": "no verdict", "": "yes", "worse": "no"}
    assert [check.passed for check in checks] == [False, True, False]
    text = verdict_table(verdicts, checks)
    assert "| large | −0.497 (" in text and "| **no verdict** |" in text
    assert "no subject: costs 0.010 nats, noise of a run 0.007: below 3 × the noise" in text
    kept = as_json(verdicts[1])
    assert kept["difference"] == pytest.approx(0.4967, abs=1e-4) and kept["answer"] == "yes"  # turned: lower is good


def test_a_recipe_s_noise_counts_shared_runs_once(tmp_path):
    """Runs of another base or length stay out, and so do heads on one frozen trunk, whose loss is the trunk's.

    A variant that trains longer is a separate table, because its seeds have other effects.
    """
    first = fill(tmp_path / "01_x" / "results.json", {"a": [1.0, 2.0], "b": [1.5, 2.1]}, base="lab")
    frozen = fill(tmp_path / "02_x" / "results.json", {"a": [1.0], "head": [1.0, 2.0]}, base="lab")
    for record in frozen.runs["a"].values():
        record["config"] = "the hash of the same run by a version with more settings"
    other = fill(tmp_path / "03_x" / "results.json", {"c": [1.0, 9.0], "d": [3.0, 1.0]}, base="tiny")
    found = recipe_noise([first, frozen, other], "lab", {5})
    assert (found.runs, found.dof, found.sd) == (4, 1, pytest.approx(0.2))
    with pytest.raises(ValueError, match="runs=0"):
        recipe_noise([first], "lab", {6})
    mixed = fill(tmp_path / "02_x" / "results.json", {"c": [1.1, 2.3], "d": [3.0, 4.4], "e": [2.0, 2.7]}, base="lab")
    for record in mixed.runs["d"].values():
        record["steps"] = 9
    assert recipe_noise([first, mixed], "lab", {5}).dof == 3
    found = recipe_noise([first, mixed], "lab", {5, 9})
    assert (found.dof, found.runs) == (3, 10)
    assert noise_for(mixed, tmp_path)("val_loss") == recipe_noise([mixed], "lab", {5, 9})


def test_the_doctests_of_the_lab():
    for module in (statistics, claims, tables, drawing, fingerprints, measuring):
        done = doctest.testmod(module)
        assert done.failed == 0 < done.attempted
