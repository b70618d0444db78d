"""The lab: the runs that a study asks for, skipping finished runs, and statistics and tables of the numbers."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import HERE, cheap_compiles, finished, make_run

from dsv3_jax.config import ConfigError, Layout, replace, to_dict
from dsv3_jax.presets import recipe
from experiments.lab import (
    ABOVE,
    RUNS_FOLDER,
    Column,
    FollowUp,
    OnTask,
    Results,
    Study,
    __main__,
    bases,
    fingerprints,
    mean_spread,
    overview,
    runner,
    work,
)
from experiments.lab import study as study_file
from experiments.lab.claims import Claim
from experiments.lab.fingerprints import RECIPE, identify, settings_of
from experiments.lab.results import replace_block, thin_curves
from experiments.lab.tables import results_table
from experiments.lab.tasks import Facts

pytestmark = pytest.mark.long

# A study's script without training: the variant "bad" fails, and each job appends a line to "called".
STUB = """
import json, os, sys, time
from pathlib import Path
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    job = json.loads(line)
    os.dup2(os.open(job["folder"] + ".log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
    with open("called", "a") as file:
        print(job["variant"], job["seed"], sorted(job["needed_folders"]), job["alone"], file=file)
    with open("processes", "a") as file:
        print(os.getpid(), file=file)
    while Path("wait").exists():
        time.sleep(0.05)
    if job["variant"] == "bad" and not Path("fixed").exists():
        sys.exit("Traceback and so on\\nthe loss is not finite")
    numbers = {"val_loss": 1.0 + job["seed"] + {"second": 0.25}.get(job["variant"], 0)}
    if job["alone"]:
        numbers = json.loads(Path(job["record"]).read_text())["numbers"] | {"speed": 7.0}
    record = {"numbers": numbers, "curves": {}, "steps": 1, "seconds": 1.0, "commit": "0123abc", "dirty": False}
    record["parameters"] = {"total": 1000, "active": 100, "cache_bytes": 8}
    Path(job["record"]).write_text(json.dumps(record))
    print(0, file=answers, flush=True)
"""
PAGE = "# A question?\n\n<!-- results -->\nold\n<!-- /results -->\n\n## Verdict\n\n**Agrees, in\nshort.** It does.\n"


def diffs(base):
    return {
        "first": base,
        "second": replace(base, steps=7),
        "bad": replace(base, steps=8),
        "heads": FollowUp(
            ("bad",), lambda trunk: replace(base, steps=9, model=replace(base.model, mtp_depth=1), trunk=trunk)
        ),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with cheap_compiles():
        yield tmp_path_factory.getbasetemp()


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repository with one study, whose jobs the stub does."""
    folder = tmp_path / "experiments" / "01_fake"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(STUB)
    (folder / "README.md").write_text(PAGE)
    (tmp_path / "experiments" / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    (tmp_path / RUNS_FOLDER).mkdir(parents=True)
    monkeypatch.setattr(study_file, "make_tokenizer", lambda run, root: None)  # the stub reads none
    monkeypatch.setattr(study_file, "_backend", lambda: "cpu")
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "the text")
    return tmp_path


def make_study(repo, **changes):
    script = str(repo / "experiments" / "01_fake" / "run.py")
    claims = (Claim("the second is lower", "second", "first"),)
    settings = {"script": script, "question": "A question?", "published": "yes", "variants": diffs, "claims": claims}
    return Study(**settings | changes)


def settings_hash(*arguments):
    return str(sorted(settings_of(*arguments).items(), key=str))


def called(repo):
    """Return the jobs since the last call."""
    path = repo / "called"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


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


def test_a_worker_begins_with_variants_that_it_has_done(tmp_path):
    """Then with the longest, by the times of the seeds before; a job that waits for others is left out."""
    jobs = [work.Job(*key, {}, "-".join(map(str, key)), {}, "", ()) for key in (("a", 1), ("b", 1), ("c", 1), ("b", 2))]
    jobs[1] = replace(jobs[1], needed_folders={"a": "a-1"})
    times = {"a": 1.0, "b": 9.0, "c": 2.0}
    assert runner._next_ready(jobs, {"a-1"}, set(), times, ()) is jobs[2]
    assert runner._next_ready(jobs, set(), set(), times, ()) is jobs[1]
    assert runner._next_ready(jobs, set(), set(), times, {"a", "c"}) is jobs[2]
    assert runner._next_ready(jobs, set(), set(), times, {"a"}) is jobs[0]
    assert runner._next_ready(jobs, set(), set(), {}, ()) is jobs[0]
    assert runner._next_ready([jobs[1]], {"a-1"}, set(), times, ()) is None


def test_timings_come_last(repo):
    study = make_study(
        repo, variants=lambda base: {"a": base, "b": replace(base, steps=3)}, measure_alone=lambda trained: {}
    )
    assert study.main(["--seeds", "0"]) == 0
    jobs = called(repo)
    assert sorted(jobs[:2]) == ["a 0 [] False", "b 0 [] False"] and jobs[2:] == ["a 0 [] True", "b 0 [] True"]
    timed = (repo / "processes").read_text().split()[2:]
    assert timed[0] != timed[1]  # nothing of another job is in a process that is timed
    kept = Results(repo / "experiments/01_fake/results.json")
    assert kept.values("b", "speed").tolist() == [7.0] and kept.values("b", "val_loss").tolist() == [1.0]


def test_an_interrupted_study_resumes(repo):
    """SIGTERM and Ctrl-C stop the workers. Finished runs are kept."""
    script = f"""
import sys
sys.path.insert(0, {str(HERE / "tests")!r})
from pathlib import Path
from test_lab import fingerprints, make_study, study_file
study_file._backend = lambda: "cpu"
study_file.make_tokenizer = lambda run, root: None
fingerprints._corpus_hash = lambda data: "the text"
sys.exit(make_study(Path({str(repo)!r})).main(["--seeds", "0", "--workers", "2"]))
"""
    (repo / "wait").touch()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (repo / "called").exists() or len((repo / "called").read_text().splitlines()) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert process.stderr.read().decode().strip() == "stopped; run the same command again to resume"
    process.stderr.close()
    (repo / "wait").unlink()
    (repo / "fixed").touch()
    called(repo)
    assert make_study(repo).main(["--seeds", "0"]) == 0
    assert len(called(repo)) == 4


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


def test_the_identity_ignores_kernels_and_the_layout_on_devices():
    """The compute dtype counts, and so do model, seed and steps, the task, and the runs that it starts from."""
    run = recipe("lab")
    execution = replace(run.execution, kernels="xla", layout=Layout(fsdp=True))
    assert settings_hash(run) == settings_hash(replace(run, execution=execution))
    others = [
        replace(run, seed=1),
        replace(run, model=replace(run.model, dim=48)),
        replace(run, steps=499),
        replace(run, execution=replace(run.execution, compute_dtype="bfloat16")),
        replace(run, model=replace(run.model, capacity_factor=1.0)),
        replace(run, model=replace(run.model, capacity_factor=1.25)),
    ]
    assert len({settings_hash(r) for r in (run, *others)}) == 7
    assert len({settings_hash(run), settings_hash(run, Facts()), settings_hash(run, Facts(bits=5))}) == 3
    started = replace(run, start="runs/lab/abc")
    assert settings_hash(started, None, {"runs/lab/abc": "x"}) != settings_hash(started, None, {"runs/lab/abc": "y"})


def test_a_changed_default_text_or_tokenizer_is_another_run(tmp_path, monkeypatch):
    """F6: each of them changed nothing in the old fingerprint, which named paths and left out defaults."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    base = recipe("lab")
    data = replace(base.data, paths=("text.jsonl",), tokenizer="words.json", val_fraction=0.4)
    run = replace(base, data=data)
    assert identify(run, tmp_path).tokenizer is None  # not made yet
    (tmp_path / "words.json").write_text("first")
    monkeypatch.setattr(fingerprints, "_tokenizer_hash", lambda name, changed: Path(name).read_text())
    before = identify(run, tmp_path)
    assert before == identify(run, tmp_path) and before.matches(before.stored())
    (tmp_path / "words.json").write_text("second")
    assert identify(run, tmp_path).mark != before.mark
    (tmp_path / "words.json").write_text("first")
    text.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "four"}\n')
    fingerprints._corpus_hash.cache_clear()
    assert identify(run, tmp_path).corpus != before.corpus
    text.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    fingerprints._corpus_hash.cache_clear()
    again = identify(run, tmp_path)
    assert again.matches(before.stored()) and not replace(again, recipe=RECIPE + 1).matches(before.stored())
    values = to_dict(run)
    monkeypatch.setattr(fingerprints, "to_dict", lambda run: values | {"log_every": 7})  # as if its default changed
    assert not identify(run, tmp_path).matches(before.stored())


def test_a_new_setting_at_its_default_keeps_results(tmp_path, monkeypatch):
    """The house's rule: a new setting's default means what was so before. Any other value is another run."""
    run, root = recipe("lab"), tmp_path
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "a text")
    old = identify(run, root)
    names, new = {old.keys: sorted(old.settings)}, fingerprints._defaults() | {"model.new": 0}
    monkeypatch.setattr(fingerprints, "_defaults", lambda: new)
    values = to_dict(run)
    for value, matches in ((0, True), (1, False)):
        later = values | {"model": values["model"] | {"new": value}}
        monkeypatch.setattr(fingerprints, "to_dict", lambda run, later=later: later)
        assert identify(run, root).matches(old.stored(), names) == matches
        assert not identify(run, root).matches(old.stored())  # without the names the difference is unknown
    changed = values | {"model": values["model"] | {"new": 0, "dim": 48}}
    monkeypatch.setattr(fingerprints, "to_dict", lambda run: changed)
    assert not identify(run, root).matches(old.stored(), names)


def test_a_redraw_deletes_nothing_and_results_of_another_recipe_are_named_not_mixed(repo, capsys):
    """F6: the old --redraw dropped what no longer matched from results.json."""
    (repo / "fixed").touch()
    study, path = make_study(repo), repo / "experiments/01_fake/results.json"
    assert study.main(["--seeds", "0", "1"]) == 0
    stored = json.loads(path.read_text())
    for seeds in stored["runs"].values():
        for record in seeds.values():
            record["recipe"] = RECIPE - 1
    path.write_text(json.dumps(stored))
    assert study.main(["--redraw"]) == 0
    page = (path.parent / "README.md").read_text()
    assert f"Recipe {RECIPE - 1}. These are not of the present configuration and text (recipe {RECIPE})" in page
    assert json.loads(path.read_text())["runs"] == stored["runs"]
    called(repo)
    assert study.main(["--seeds", "0", "--only", "first"]) == 0 and len(called(repo)) == 1
    after = Results(path)
    assert after.variants == ["first"] and after.seeds() == [0] and len(after.others) == 8
    page = (path.parent / "README.md").read_text()
    assert f"Kept but not shown: 8 results of recipe {RECIPE - 1}, text the text." in page
    assert study.main(["--redraw"]) == 0 and len(Results(path).others) == 8


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


def test_differences_are_paired_by_seed(tmp_path):
    """By hand: the differences between seeds, 1 and 10, cancel."""
    results = Results(tmp_path / "results.json")
    for variant, losses in {"a": {0: 1.0, 1: 11.0, 2: 5.0}, "b": {1: 10.5, 0: 0.7}}.items():
        for seed, loss in losses.items():
            results.add(variant, seed, {"numbers": {"val_loss": loss, "by": [{"x": loss}], "long": loss / 3}})
    np.testing.assert_allclose(results.paired("b", "a", "val_loss"), [-0.3, -0.5])
    assert mean_spread(results.paired("b", "a", "val_loss"), 2, sign=True) == "−0.40 ± 0.14"
    again = Results(tmp_path / "results.json")
    assert again.runs == results.runs and again.values("a", "by/0/x").tolist() == [1.0, 11.0, 5.0]
    for seeds in again.runs.values():
        for record in seeds.values():
            record["parameters"] = {"total": 1, "active": 1, "cache_bytes": 1}
    columns = [Column("loss", "val_loss", 1, paired=True, against=("b", ABOVE)), Column("speed", "speed")]
    rows = results_table(again, columns).splitlines()
    assert rows[0].endswith("| loss | against a, paired | against b, paired | against the row above, paired | speed |")
    assert rows[2] == "| a | 1 (1) | 1 | 5.7 ± 5.0 |  | +0.4 ± 0.1 |  | – |"
    assert rows[3] == "| b | 1 (1) | 1 | 5.6 ± 6.9 | −0.4 ± 0.1 |  | −0.4 ± 0.1 | – |"


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


def test_results_are_written_atomically(tmp_path, monkeypatch):
    results = Results(tmp_path / "results.json", {"question": 'why "@"?'})
    results.add("a", 0, {"numbers": {"x": 1.0}})
    before = (tmp_path / "results.json").read_text()
    assert json.loads(before)["question"] == 'why "@"?'
    monkeypatch.setattr(Path, "write_bytes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        results.add("a", 1, {"numbers": {"x": 2.0}})
    assert (tmp_path / "results.json").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_a_page_without_markers_is_rejected(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# nothing\n")
    with pytest.raises(ValueError, match=f"path='{page}'"):
        replace_block(page, "x")
    assert page.read_text() == "# nothing\n"


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


def test_thinned_curves_are_means():
    rows = [{"step": i, "loss": float(i)} for i in range(1, 101)] + [{"step": 100, "val_loss": 3.0}]
    curves = thin_curves(rows, ("loss", "val_loss", "absent"), points=4)
    assert curves == {"loss": [[25, 50, 75, 100], [13.0, 38.0, 63.0, 88.0]], "val_loss": [[100], [3.0]]}


def test_a_worker_measures_a_finished_run(root, tmp_path, monkeypatch):
    """In this process, on a copy of a finished run: the worker resumes at the last step."""
    done = finished(root)
    run, folder = done.run, tmp_path / "abc"
    shutil.copytree(done.folder, folder)
    saved = json.loads((folder / "run.json").read_text())
    saved["made"][0] |= {"commit": "fedcba9876543210", "dirty": True}  # of the code that trained it, which is not ours
    (folder / "run.json").write_text(json.dumps(saved))
    job = work.Job("a", 0, to_dict(run), str(folder), {}, str(tmp_path / "abc.json"), ())
    assert work.Job.from_json(job.to_json()).to_json() == job.to_json()

    def measure(trained):
        assert trained.model.cfg == run.model and len(trained.held_out()) == run.eval_batches
        return {"layers": len(trained.numbers["load"]), "rows": len(trained.metrics())}

    assert work.do(job, measure, None) == 0
    record = json.loads((tmp_path / "abc.json").read_text())
    assert record["numbers"]["val_loss"] == pytest.approx(done.fitted.evaluation["val_loss"])
    assert record["numbers"]["layers"] == 3 and record["numbers"]["rows"] >= run.steps
    assert "load" not in record["numbers"] and record["parameters"]["total"] > 0
    assert record["curves"]["loss"][0][-1] == record["steps"] == run.steps
    assert (record["commit"], record["dirty"]) == ("fedcba9", True)
    assert work.do(replace(job, alone=True), None, lambda trained: {"speed": trained.numbers["layers"]}) == 0
    alone = json.loads((tmp_path / "abc.json").read_text())
    assert alone["numbers"] == record["numbers"] | {"speed": 3}

    # Another study needs the same run: nothing is trained or evaluated again, and its seconds are those of training.
    monkeypatch.setattr("dsv3_jax.training.loop.fit", lambda *_, **__: pytest.fail("fit was called"))
    assert work.do(job, lambda trained: {"shape": np.shape(trained.numbers["load"])}, None) == 0
    again = json.loads((tmp_path / "abc.json").read_text())
    assert again["numbers"].pop("shape") == [3, run.model.num_experts]
    del record["numbers"]["layers"], record["numbers"]["rows"]
    assert again == record


def test_a_failing_run_prints_one_line(tmp_path, capsys):
    run = make_run(str(tmp_path / "nowhere"))
    job = work.Job("a", 0, to_dict(run), str(tmp_path / "runs/abc"), {}, str(tmp_path / "runs/abc.json"), ())
    assert work.do(job, None, None) == 1
    assert repr(str(tmp_path / "nowhere")) in capsys.readouterr().err.splitlines()[-1]


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


def test_a_base_with_invalid_values_is_rejected():
    with pytest.raises(ConfigError, match="steps=0"):
        bases.base_run("lab", ["steps=0"], RUNS_FOLDER)
