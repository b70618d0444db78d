"""Study 32's measures of right sums, and its coin."""

import numpy as np
import pytest
from runs import HERE

from experiments.lab.study import load

FOLDER = HERE / "experiments/32_mismatch"


@pytest.fixture(scope="module")
def study():
    """The module of study.py."""
    return load(FOLDER).measure.__globals__


def test_shares_are_those_of_counting(study):
    rng = np.random.default_rng(0)
    likeliest, sampled = rng.random((50, 1)) < 0.6, rng.random((50, 8)) < 0.2
    carries = (rng.random(50) < 0.4).tolist()
    found = study["shares"](likeliest, sampled, carries)
    for name, asked in (("", range(50)), (", carry", [i for i in range(50) if carries[i]])):
        counts = [sum(map(bool, sampled[i])) for i in asked]
        assert found["likeliest" + name] == 100 * np.mean([likeliest[i, 0] for i in asked])
        assert found["sampled" + name] == pytest.approx(100 * sum(counts) / 8 / len(counts))
        assert found["one of 8" + name] == 100 * np.mean([count > 0 for count in counts])


def test_a_coin_knows_nothing_of_the_sum_and_falls_alike_again(study):
    toss = __import__("coin").toss
    tasks = [(f"{a}+{b}=", a + b) for a, b in study["sums"]("tasks")]
    right, wrong = (
        np.array([toss(str(total + off), {"prompt": prompt}) for prompt, total in tasks])
        for off in (0, 1)
    )
    again = [toss(str(total), {"prompt": prompt}) for prompt, total in tasks]
    assert again == right.tolist()
    four_errors = 4 * 0.5 / np.sqrt(len(tasks))
    for heads in (right, wrong, right == wrong):
        assert abs(heads.mean() - 0.5) < four_errors


def test_no_sum_is_asked_that_was_trained_on(study):
    parts = [set(study["sums"](part)) for part in ("text", "tasks", "asked")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 9000
    assert sum(study["careless"](a, b) != a + b for a, b in parts[2]) == 444
