"""The board: who may compete, on which seeds, and who enters."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsv3_jax.config import replace
from experiments.lab import board
from experiments.lab.bases import OF_TASKS
from experiments.lab.measuring import BITS
from experiments.lab.results import Results
from experiments.lab.tasks import Chains

EXPERIMENTS = Path(__file__).resolve().parents[1]
RECIPE = "def facts(run):\n    return run\n"


def test_seeds_follow_from_the_commit():
    seeds = board.draw_seeds("a" * 40)
    assert seeds == board.draw_seeds("a" * 40) != board.draw_seeds("b" * 40)
    assert len(set(seeds)) == board.SEEDS


def test_a_recipe_must_be_committed_as_it_is(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path)

    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    git("init", "-q")
    with pytest.raises(ValueError, match=r"mine\.py is not committed"):
        board.commit_of(path)
    git("add", "."), git("commit", "-qm", "mine")
    assert len(board.commit_of(path)) == 40
    path.write_text(RECIPE + "# better\n")
    with pytest.raises(ValueError, match=r"mine\.py is not committed"):
        board.commit_of(path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("mine", None, r"recipe='mine' is not in \w+/, which has"),
        ("../mine", None, r"is not in|is not a name"),
        ("Mine", RECIPE, "recipe='Mine' is not a name of a to z"),
        ("mine", "x = 1\n", "has no function of a track; they are facts, domains, induction"),
    ],
)
def test_what_is_no_recipe(tmp_path, name, text, message):
    path = tmp_path / f"{name}.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        board.load_recipe(path)


def test_recipes_share_data_and_size():
    base = OF_TASKS["facts"]
    more = replace(base.model, num_experts=2 * base.model.num_experts)
    for change, message in (
        ({"data": replace(base.data, batch_size=1024)}, "changes data, start or trunk"),
        ({"model": more}, "parameters; a recipe has .* at most"),
        ({"steps": -1}, "steps=-1"),
        ({"log_every": 1}, "changes log_every or eval_batches"),
    ):
        with pytest.raises(ValueError, match=message):
            board.changed_run(lambda run, c=change: replace(run, **c), base, "mine", "facts")
    with pytest.raises(ValueError, match="returns None; return the changed run"):
        board.changed_run(lambda run: None, base, "mine", "facts")


def test_a_recipe_that_stops_before_it_learns_is_not_the_soonest():
    rows = [{"step": step, "loss": 2.0} for step in range(1, 31)]
    run = replace(OF_TASKS["chains"], steps=30)
    trained = SimpleNamespace(task=Chains(), run=run, metrics=lambda: rows)
    assert board.measure(trained) == {"formed": 600}


@pytest.mark.parametrize("path", sorted((EXPERIMENTS / "board").glob("*.py")), ids=lambda p: p.stem)
def test_each_recipe_of_the_board_may_compete(path):
    if path.stem == "study":
        return
    for track, recipe in board.load_recipe(path).items():
        base = OF_TASKS[board.TRACKS[track].base]
        assert board.changed_run(recipe, base, path.stem, track).run.data == base.data


@pytest.mark.parametrize(
    "bits, seconds, said",
    [
        ((0.5, 0.51, 0.49), 90, "entered: -0.50 bits against best, "),
        ((0.99, 1.0, 0.98), 90, "not entered: -0.01 bits against best, "),
        ((1.5, 1.5, 1.5), 90, "not entered: +0.50 bits against best, "),
        ((0.5, 0.5, 0.5), 130, "not entered: 390 s, more than 315"),
    ],
)
def test_who_enters(tmp_path, capsys, bits, seconds, said):
    """The best has 1 bit, and takes 300 s."""
    results = Results(tmp_path / "board.json")
    for name, values, took in (("best", (1.0, 1.01, 0.99), 100), ("mine", bits, seconds)):
        results.stored[f"facts: {name}"] = {
            str(seed): {"numbers": {"val_loss": x / BITS}, "seconds": took}
            for seed, x in enumerate(values)
        }
    best = {"track": "facts", "recipe": "best", "seconds": 300}
    row = board.enter("facts", "mine", best, results, EXPERIMENTS, (0, 1, 2))
    assert said in capsys.readouterr().out.replace("−", "-")
    assert (row is not None) == (" not entered" not in said and said.startswith("entered"))
    if row is not None:
        assert row["gain"] == pytest.approx(-0.5) and row["seeds"] == [0, 1, 2]
        rows = [best | {"score": 1.0, "gain": None, "commit": "a", "date": "b"}]
        lines = board.table([*rows, row | {"commit": "c", "date": "d"}]).splitlines()
        assert "mine.py" in lines[2] and "best.py" in lines[3]
