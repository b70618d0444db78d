"""What a run of GRPO shows: rewards that are numbers, and answers.jsonl."""

import io
import re
import sys
from dataclasses import replace
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from runs import make_run, refused, said_by

from dsv3_jax.chat.checkers import CHECKERS, Checker
from dsv3_jax.config import DataConfig, Grpo
from dsv3_jax.report.metrics_files import ANSWERS_FILE, AnswersFile, read_rows
from dsv3_jax.report.progress import Progress
from dsv3_jax.training.policy import advantages

NO_NUMBERS = (None, "1", [1.0], float("nan"), -np.inf, 1e31, 10**400, 1j, Fraction(1, 2))


# nobody closes what takes stdout's place
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reward_is_any_finite_number(monkeypatch):
    """A function that fails, however, does not end the process: training saves before it stops."""

    def check(function):
        monkeypatch.setitem(CHECKERS, "own", (function, str))
        return Checker("own").check("text", {}, "line 3")

    for value, wanted in ((True, 1), (np.bool_(False), 0), (-3, -3), (jnp.float32(0.5), 0.5)):
        found = check(lambda *_, value=value: value)
        assert (type(found), found) == (float, wanted)
    for value in NO_NUMBERS:
        with refused(re.escape(f"TypeError: it returns {value!r:.60}, not a number")):
            check(lambda *_, value=value: value)
    with refused("^grpo checker='own' fails at line 3 with SystemExit: the server is down"):
        check(lambda *_: sys.exit("the server is down"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with refused("fails at line 3 with ValueError: it closes stdout"):
        check(lambda *_: sys.stdout.close() or True)


def test_a_checker_is_stopped_and_changes_no_task(monkeypatch):
    row = {"answer": "", "seen": []}
    monkeypatch.setitem(CHECKERS, "writes", (lambda text, row: not row["seen"].append(text), str))
    assert Checker("writes").check("a", row, "") and row == {"answer": "", "seen": []}
    monkeypatch.setattr("dsv3_jax.chat.checkers.MAX_SECONDS", 0.05)
    with refused("more than 0.05 seconds"):
        Checker("regex").check("a" * 40, {"answer": "(a+)+$b"}, "line 3")


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("regex", "(", r"line 3: answer='\(' does not fit 'regex': missing"),
        ("exact", 4, "line 3 has answer=4, not a text"),
        ("exakt", "", "did you mean 'exact'"),
        ("none:such", "", "cannot be imported: ModuleNotFound"),
        ("leaving:such", "", "cannot be imported: SystemExit"),
    ],
)
def test_bad_checkers_and_tasks_are_named(monkeypatch, tmp_path, name, answer, said):
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with refused(said):
        Checker(name).look_at({"answer": answer}, "line 3")


def test_advantages_are_the_same_in_any_unit_and_equal_rewards_teach_nothing(rng):
    rewards = rng.normal(0, 1, (5, 8))
    np.testing.assert_allclose(advantages(rewards), advantages(100 * rewards - 7), atol=1e-5)
    equal = np.full((1, 7), 0.1)
    assert equal.mean() != 0.1 and not advantages(equal).any()
    some = np.array([[1.5, 1.0, 0.99, -2.0], [0.0, 0.0, 0.0, 0.0]])
    assert advantages(some, "right").tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    assert (advantages(np.ones((1, 3)), "right") == 1).all()


def test_a_resumed_run_writes_the_answers_after_its_checkpoint_again(tmp_path):
    """Some of each batch, at about a thousand steps of a run; texts have both ends."""
    chats = DataConfig(paths=("nowhere",), seq_len=16, batch_size=4, format="chat")
    run = make_run("nowhere", grpo=Grpo(group=2, updates=2), data=chats)
    groups = [
        [{"prompt": f"{i}" + 5000 * "p" + "?", "answer": "é\n", "reward": j / 9} for j in range(9)]
        for i in range(3)
    ]
    file = AnswersFile(tmp_path, 0, run)
    for step in range(1, 8):
        file.keep(step, groups)
    rows = read_rows(tmp_path / ANSWERS_FILE)
    assert [row["step"] for row in rows] == [step for step in (1, 3, 5, 7) for _ in range(16)]
    assert [row["reward"] for row in rows[:16]] == [j / 9 for j in range(8)] * 2
    assert rows[8]["prompt"][0] == "1" and rows[8]["prompt"][-1] == "?"
    assert len(rows[8]["prompt"]) < 4010 and rows[8]["answer"] == "é\n"

    # The checkpoint is of step 4, and the process died while it wrote a row.
    path = tmp_path / ANSWERS_FILE
    path.write_text(path.read_text() + '{"step": 9, "prom')
    again = AnswersFile(tmp_path, 4, run)
    assert read_rows(path) == rows[:32] and again.sentence == ""
    for step in range(5, 8):
        again.keep(step, groups)
    assert read_rows(path) == rows

    long = AnswersFile(tmp_path, 0, replace(run, steps=4000))
    for step in range(1, 4001):
        long.keep(step, [[{"prompt": "p", "answer": "a", "reward": 1.0}]])
    assert len(read_rows(path)) == 1000


def test_a_sample_is_one_line_with_control_codes_visible():
    sample = {"prompt": "user\n1+1", "answer": 300 * "a\x1b", "reward": 1 / 3}
    said = said_by(Progress(steps=9).show_sample, 4, sample)[1]
    assert re.match(r"step 4  sample: 'user\\n1\+1' → 'a\\x1b.* ….*reward 0.333\n$", said), said
