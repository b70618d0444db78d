"""The lab's commands: the runs that a study asks for, skipping finished ones, and what the options do."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from lab_stub import called, diffs, fake_repository, make_study
from runs import HERE

from dsv3_jax.config import ConfigError, replace
from dsv3_jax.presets import recipe
from experiments.lab import RUNS_FOLDER, FollowUp, OnTask, Results, __main__, bases, overview, work
from experiments.lab.fingerprints import RECIPE
from experiments.lab.tasks import Facts

pytestmark = pytest.mark.long


@pytest.fixture
def repo(tmp_path, monkeypatch):
    return fake_repository(tmp_path, monkeypatch)


def test_a_picture_whose_runs_are_missing_is_not_drawn_and_the_table_is_there(repo, capsys):
    """Only the first variant has run: the sentence names what is missing, and nothing fails."""

    def needs_second(results, *_):
        return str(results.values("second", "val_loss").mean())

    study = make_study(repo, table=needs_second, draw=needs_second)
    assert study.main(["--seeds", "0", "--only", "first"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("No picture: no run of 'second'.\n") and "| first | 1,000 (100) |" in printed.out


def test_only_missing_runs_are_made_and_failures_are_named(repo, capsys):
    study, folder = make_study(repo), repo / "experiments" / "01_fake"
    assert study.main(["--seeds", "0", "1", "--workers", "1"]) == 1
    errors = capsys.readouterr().err
    assert "bad, seed 0 failed: the loss is not finite" in errors and "bad, seed 1 failed" in errors
    assert "heads, seed 0 was not run: it depends on bad" in errors
    jobs = [f"{name} {seed} [] False" for seed in (0, 1) for name in ("first", "second", "bad")]
    made = called(repo)  # of the second seed in the order of their times
    assert made[:3] == jobs[:3] and sorted(made) == sorted(jobs)
    # One process does job after job, until one of them ends it. The next job has a new one.
    ended = [job.startswith("bad") for job in made]
    numbers = [sum(ended[:i]) for i in range(len(made))]
    processes = (repo / "processes").read_text().split()
    assert [sorted(set(processes), key=processes.index).index(p) for p in processes] == numbers
    page = (folder / "README.md").read_text()
    assert "| second | 1,000 (100) | 8 | 1.7500 ± 0.7071 | +0.2500 ± 0.0000 |" in page
    assert "| the second is lower | +0.250 (" in page and "trained at commit 0123abc. Machine: " in page
    assert f"Recipe {RECIPE}." in page and "These are not" not in page
    assert "\nold\n" not in page and page.startswith("# A question?") and page.endswith("It does.\n")
    assert (folder / "fake.png").read_bytes()[:4] == b"\x89PNG"
    row = f"| [01 fake](01_fake/README.md) | A question? | Agrees, in short | {RECIPE} |"
    assert row in (folder.parent / "README.md").read_text()
    assert (folder.parent / overview.PICTURE).read_bytes()[:4] == b"\x89PNG"

    (repo / "fixed").touch()
    assert study.main(["--seeds", "0", "1", "--workers", "1"]) == 0
    assert called(repo) == [f"{job} False" for s in (0, 1) for job in (f"bad {s} []", f"heads {s} ['bad']")]
    kept = Results(folder / "results.json")
    assert kept.variants == ["first", "second", "bad", "heads"] and kept.seeds() == [0, 1]
    assert study.main([]) == 0  # seed 2 of all
    assert len(called(repo)) == 4
    assert study.main([]) == 0 and not called(repo)

    # A variant that changes is run again, and so are the variants that depend on it. The others stay.
    changed = make_study(repo, variants=lambda base: diffs(base) | {"bad": replace(base, steps=80)})
    assert changed.main(["--only", "bad", "--seeds", "0"]) == 0 and called(repo) == ["bad 0 [] False"]
    assert changed.main(["--seeds", "0"]) == 0
    # The stub wrote no checkpoint, so the trunk's folder is not a finished run, and it is trained first.
    assert called(repo) == ["bad 0 [] False", "heads 0 ['bad'] False"]
    assert Results(folder / "results.json").values("second", "val_loss").tolist() == [1.25, 2.25, 3.25]


def test_bad_input_is_one_sentence(repo, capsys):
    study = make_study(repo)
    for argv, sentence in (
        (["--base", "huge"], "'huge' is not one of"),
        (["--set", "model.dimm=3"], "--set='model.dimm=3'"),
        (["--set", "model.dim=-3"], "dim=-3"),
        (["--only", "third"], "--only='third' is not one of first, second, bad, heads"),
    ):
        assert study.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("01_fake: ") and sentence in error and error.count("\n") == 1
    assert not (repo / "experiments/01_fake/results.json").exists() and not called(repo)


def test_another_base_has_separate_results(repo):
    study = make_study(repo, variants=lambda base: {"a": base})
    assert study.main(["--base", "tiny", "--set", "steps=5", "--seeds", "0"]) == 0
    assert (repo / "runs/lab/01_fake-tiny-steps=5/results.json").exists()
    assert not (repo / "experiments/01_fake/results.json").exists()


def test_a_seed_sets_parameters_and_data_order_of_all_variants(repo):
    runs = make_study(repo).list_runs(recipe("lab"), (0, 3))
    assert list(runs)[:2] == [("first", 0), ("second", 0)]  # one seed after the other
    assert all(r.run.seed == r.run.data.seed == seed for (_, seed), r in runs.items())
    assert runs["heads", 3].run.trunk == runs["heads", 3].needed_folders["bad"] == runs["bad", 3].folder
    assert len({r.folder for r in runs.values()}) == len(runs)


def test_a_follow_up_needs_an_earlier_variant(repo):
    study = make_study(repo, variants=lambda base: {"heads": FollowUp(("absent",), lambda folder: base)})
    with pytest.raises(ValueError, match="'heads' needs='absent'"):
        study.list_runs(recipe("lab"), (0,))


def test_check_trains_one_run_again_and_says_by_how_much_it_moved(repo, capsys):
    study, path = make_study(repo), repo / "experiments/01_fake/results.json"
    assert study.main(["--check"]) == 2 and "--check has no finished run" in capsys.readouterr().err
    (repo / "fixed").touch()
    assert study.main(["--seeds", "0"]) == 0
    stored = json.loads(path.read_text())
    stored["runs"]["second"]["0"]["numbers"]["val_loss"] = 1.5
    path.write_text(json.dumps(stored))
    called(repo), capsys.readouterr()
    assert study.main(["--check", "--only", "second", "--seeds", "0"]) == 0
    assert called(repo) == ["second 0 [] False"]
    assert "second, seed 0, trained again:\n  val_loss 1.5 → 1.25 (−0.25)" in capsys.readouterr().out
    assert json.loads(path.read_text()) == stored  # a check changes no result


def test_a_study_can_name_a_task(repo):
    task = Facts(bits=4)
    study = make_study(repo, variants=lambda base: {"first": OnTask(task, base), "second": base}, base="facts")
    runs = study.list_runs(bases.short_run("facts"), (0,))
    assert runs["first", 0].task == task and runs["second", 0].task is None
    assert runs["first", 0].identity.corpus == task.fingerprint != runs["second", 0].identity.corpus
    assert runs["first", 0].folder != runs["second", 0].folder
    assert study.main(["--seeds", "0"]) == 0 and len(called(repo)) == 2
    assert (repo / "experiments/01_fake/results.json").exists()


@pytest.mark.parametrize("option", ["--fresh", "--remeasure"])
def test_repeating_some_runs_keeps_the_others(repo, option):
    study, path = make_study(repo), repo / "experiments/01_fake/results.json"
    (repo / "fixed").touch()
    assert study.main(["--seeds", "0", "1", "3"]) == 0
    called(repo)
    before = Results(path).runs
    run = study.list_runs(bases.base_run("lab", [], RUNS_FOLDER), [0])["second", 0]
    (evaluation := repo / run.folder / work.EVALUATION).parent.mkdir()
    evaluation.touch()  # of the code before
    assert study.main([option, "--only", "second", "--seeds", "0"]) == 0
    assert called(repo) == ["second 0 [] False"] and not evaluation.exists()
    after = Results(path)
    assert after.variants == list(before) and after.seeds() == [0, 1, 3] and after.runs == before


def test_all_studies_get_the_same_options(tmp_path, capsys):
    """`python -m experiments.lab`: each study runs once with the options; the exit code is the largest one."""
    assert __main__.EXPERIMENTS == HERE / "experiments"  # whatever the working directory
    for name, code in (("01_a", 0), ("02_b", 3), ("03_c", 1)):
        (tmp_path / name).mkdir()
        line = f'Path("{tmp_path}/called").open("a").write(repr(sys.argv[1:]))'
        (tmp_path / name / "run.py").write_text(f"import sys\nfrom pathlib import Path\n{line}\nsys.exit({code})\n")
    assert __main__.main(["--seeds", "1", "--redraw"], tmp_path) == 3
    assert (tmp_path / "called").read_text() == 3 * "['--seeds', '1', '--redraw']"
    assert "| [02 b](02_b/README.md) |  | not run yet |" in capsys.readouterr().out
    for argv, code in ((["--help"], 0), (["--redrew"], 2)):
        with pytest.raises(SystemExit) as ended:
            __main__.main(argv, tmp_path)
        assert ended.value.code == code
    assert len((tmp_path / "called").read_text()) == 3 * len("['--seeds', '1', '--redraw']")  # no study was called


def test_a_fresh_lab_deletes_first_trains_then_draws_again(tmp_path, capsys):
    """So a run that studies share is trained once, verdicts have the noise of all runs, and a stop can be resumed."""
    lines = f"""import sys
from pathlib import Path
with Path("{tmp_path}/called").open("a") as file:
    print(Path(__file__).parent.name, *sys.argv[1:], file=file)
if sys.argv[-1] == "1" and Path("{tmp_path}/stopped").exists() and "02" in __file__:
    sys.exit(130)
if "--forget" not in sys.argv:
    Path(__file__).with_name("results.json").write_text('{{"question": "A question?", "runs": {{}}}}')
"""
    for name in ("01_a", "02_b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.py").write_text(lines)
    deleted, run, redrawn = (
        [f"{name} --seeds 1{option}" for name in ("01_a", "02_b")] for option in (" --forget", "", " --redraw")
    )
    (tmp_path / "stopped").touch()
    assert __main__.main(["--fresh", "--seeds", "1"], tmp_path) == 130  # Ctrl-C in the second
    assert called(tmp_path) == [*deleted, *run] and "without --fresh to resume" in capsys.readouterr().out
    (tmp_path / "stopped").unlink()
    assert __main__.main(["--seeds", "1"], tmp_path) == 0
    assert called(tmp_path) == [*run, *redrawn]
    assert __main__.main(["--seeds", "1"], tmp_path) == 0
    assert called(tmp_path) == run  # nothing is new


def test_a_study_names_its_seeds(repo, capsys):
    """Without --seeds a run of the study makes all that its page shows; --list names what it would make."""
    (repo / "fixed").touch()
    study = make_study(repo, seeds=1, seeds_of={"second": 3})
    assert study.main(["--only", "first", "second"]) == 0
    assert sorted(called(repo)) == ["first 0 [] False", *(f"second {seed} [] False" for seed in range(3))]
    assert study.main(["--seeds", "4", "--only", "first"]) == 0 and called(repo) == ["first 4 [] False"]
    capsys.readouterr()
    assert study.main(["--list"]) == 0
    listed = [line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines() if ", seed " in line]
    done = ["first, seed 0: done", "first, seed 4: done", *(f"second, seed {seed}: done" for seed in range(3))]
    assert sorted(listed) == sorted([*done, "bad, seed 0: missing", "heads, seed 0: missing"])
    assert study.main(["--forget"]) == 0  # all that the study makes, and not the seed that was asked for besides
    assert Results(repo / "experiments/01_fake/results.json").runs.keys() == {"first"} and called(repo) == []


def test_forgetting_deletes_results_and_runs_and_runs_nothing(repo):
    study, path = make_study(repo), repo / "experiments/01_fake/results.json"
    (repo / "fixed").touch()
    assert study.main(["--seeds", "0", "1"]) == 0
    runs = study.list_runs(bases.base_run("lab", [], RUNS_FOLDER), (0, 1))
    folders = [repo / runs["second", seed].folder for seed in (0, 1)]
    for folder in folders:
        folder.mkdir()
    called(repo)
    assert study.main(["--forget", "--only", "second", "--seeds", "1"]) == 0
    assert called(repo) == [] and [folder.exists() for folder in folders] == [True, False]
    assert list(Results(path).runs["second"]) == ["0"] and len(Results(path).runs["first"]) == 2
    with pytest.raises(SystemExit):  # they would delete, then not run
        study.main(["--fresh", "--redraw"])


def test_a_new_study_is_a_folder_that_lists_its_runs(repo, capsys, monkeypatch):
    """Its run.py is complete: variants, claims, a manipulation check. Names that are taken or odd are refused."""
    experiments = repo / "experiments"
    assert __main__.main(["new", "my_question"], experiments) == 0
    folder = experiments / "02_my_question"
    assert str(folder) in capsys.readouterr().out and sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "run.py",
    ]
    spec = importlib.util.spec_from_file_location("a_new_study", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    study = module.STUDY
    names = {name for name, _ in study.list_runs(bases.short_run(), (0,))}
    assert {c.variant for c in study.claims} | {c.against for c in study.claims} <= names and study.stakes
    assert (folder / "README.md").read_text().startswith(f"# {study.question}\n")
    assert overview.verdict(folder) == "pending"
    for argv, sentence in (
        (["new", "my_question"], "name='my_question' is taken by 02_my_question"),
        (["new", "../x"], "name='../x' is not a short word"),
        (["new"], "new takes one name"),
        (["new", "a", "b"], "not 'a b'"),
    ):
        assert __main__.main(argv, experiments) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    assert len(list(experiments.iterdir())) == 3  # two studies and README.md


@pytest.mark.parametrize(
    "command", [["experiments/01_attention/run.py", "--list"], ["-m", "experiments.lab", "--help"]]
)
def test_commands_work_from_any_folder(command, tmp_path):
    path = HERE / command[0]
    line = [str(path), *command[1:]] if path.exists() else command
    env = os.environ | {"PYTHONPATH": str(HERE)} if line[0] == "-m" else os.environ
    done = subprocess.run([sys.executable, *line], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("\nMLA, seed 0: " if command[1] == "--list" else "--remeasure") in done.stdout


def test_a_base_with_invalid_values_is_rejected():
    with pytest.raises(ConfigError, match="steps=0"):
        bases.base_run("lab", ["steps=0"], RUNS_FOLDER)
