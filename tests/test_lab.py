"""The lab: what a study asks for, that only what is missing runs, and what is made of the numbers."""

import importlib.util
import json
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
from experiments.lab import ABOVE, After, Column, Results, Study, overview, work
from experiments.lab import study as study_file
from experiments.lab.results import fingerprint, mean_spread, put_between, table, thinned, told_apart

pytestmark = pytest.mark.long

# Does a job as a study's script would, without training: a variant "bad" fails, and each job leaves a line.
STUB = """
import json, sys, time
from pathlib import Path
job = json.loads(sys.argv[2])
with open("called", "a") as file:
    print(job["variant"], job["seed"], sorted(job["others"]), job["alone"], file=file)
while Path("wait").exists():
    time.sleep(0.05)
if job["variant"] == "bad" and not Path("mended").exists():
    sys.exit("Traceback and so on\\nthe loss is not finite")
numbers = {"val_loss": 1.0 + job["seed"] + {"second": 0.25}.get(job["variant"], 0)}
if job["alone"]:
    numbers = json.loads(Path(job["record"]).read_text())["numbers"] | {"speed": 7.0}
found = {"numbers": numbers, "curves": {}, "steps": 1, "seconds": 1.0}
found["parameters"] = {"total": 1000, "active": 100, "cache_bytes": 8}
Path(job["record"]).write_text(json.dumps(found))
"""
PAGE = "# A question?\n\n<!-- results -->\nold\n<!-- /results -->\n\n## Verdict\n\n**Agrees, in\nshort.** It does.\n"


def diffs(base):
    return {
        "first": base,
        "second": replace(base, steps=7),
        "bad": replace(base, steps=8),
        "heads": After(
            ("bad",), lambda trunk: replace(base, steps=9, model=replace(base.model, mtp_depth=1), trunk=trunk)
        ),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with cheap_compiles(tmp_path_factory.getbasetemp()):
        yield tmp_path_factory.getbasetemp()


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A repository with one study, whose jobs are done by the stub."""
    folder = tmp_path / "experiments" / "01_fake"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(STUB)
    (folder / "README.md").write_text(PAGE)
    (tmp_path / "experiments" / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    tokenizer = tmp_path / study_file.RUNS / "tokenizer-1024.json"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.touch()  # as if it were made: the stub reads none
    monkeypatch.setattr(study_file, "_backend", lambda: "cpu")
    return tmp_path


def make_study(repo, **changes):
    script = str(repo / "experiments" / "01_fake" / "run.py")
    return Study(**{"script": script, "question": "A question?", "published": "yes", "variants": diffs} | changes)


def called(repo):
    """The jobs since the last look."""
    path = repo / "called"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_only_what_is_missing_runs_and_a_failure_is_named(repo, capsys):
    study, folder = make_study(repo), repo / "experiments" / "01_fake"
    assert study.main(["--seeds", "0", "1", "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert "bad, seed 0 failed: the loss is not finite" in said and "bad, seed 1 failed" in said
    assert "heads, seed 0 was not run, for it needs bad" in said
    jobs = [f"{name} {seed} [] False" for seed in (0, 1) for name in ("first", "second", "bad")]
    assert called(repo) == jobs
    page = (folder / "README.md").read_text()
    assert "| second | 1,000 (100) | 8 | 1.7500 ± 0.7071 | **+0.2500 ± 0.0000** |" in page
    assert "\nold\n" not in page and page.startswith("# A question?") and page.endswith("It does.\n")
    assert (folder / "fake.png").read_bytes()[:4] == b"\x89PNG"
    row = "| [01 fake](01_fake/README.md) | A question? | yes |  | Agrees, in short |"
    assert row in (folder.parent / "README.md").read_text()

    (repo / "mended").touch()
    assert study.main(["--seeds", "0", "1", "--workers", "1"]) == 0
    assert called(repo) == [f"{job} False" for s in (0, 1) for job in (f"bad {s} []", f"heads {s} ['bad']")]
    kept = Results(folder / "results.json")
    assert kept.variants == ["first", "second", "bad", "heads"] and kept.seeds() == [0, 1]
    assert study.main([]) == 0  # seed 2 of all
    assert len(called(repo)) == 4
    assert study.main([]) == 0 and not called(repo)

    # A variant that changes is run again, and so is what was made of it; the others stay.
    changed = make_study(repo, variants=lambda base: diffs(base) | {"bad": replace(base, steps=80)})
    assert changed.main(["--only", "bad", "--seeds", "0"]) == 0 and called(repo) == ["bad 0 [] False"]
    assert changed.main(["--seeds", "0"]) == 0
    # The trunk's folder is not that of a finished run, for the stub made none: it is trained first.
    assert called(repo) == ["bad 0 [] False", "heads 0 ['bad'] False"]
    assert Results(folder / "results.json").values("second", "val_loss").tolist() == [1.25, 2.25, 3.25]


def test_what_needs_the_machine_alone_comes_last(repo):
    study = make_study(
        repo, variants=lambda base: {"a": base, "b": replace(base, steps=3)}, measure_alone=lambda trained: {}
    )
    assert study.main(["--seeds", "0"]) == 0
    jobs = called(repo)
    assert sorted(jobs[:2]) == ["a 0 [] False", "b 0 [] False"] and jobs[2:] == ["a 0 [] True", "b 0 [] True"]
    results = Results(repo / "experiments/01_fake/results.json")
    assert results.values("b", "speed").tolist() == [7.0] and results.values("b", "val_loss").tolist() == [1.0]


def test_an_interrupted_study_goes_on(repo):
    """SIGTERM or Ctrl-C ends the workers; what was finished stays."""
    script = f"""
import sys
sys.path.insert(0, {str(HERE / "tests")!r})
from pathlib import Path
from test_lab import make_study, study_file
study_file._backend = lambda: "cpu"
sys.exit(make_study(Path({str(repo)!r})).main(["--seeds", "0", "--workers", "2"]))
"""
    (repo / "wait").touch()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not (repo / "called").exists() or len((repo / "called").read_text().splitlines()) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert process.stderr.read().decode().strip() == "stopped; the same command goes on from here"
    process.stderr.close()
    (repo / "wait").unlink()
    (repo / "mended").touch()
    called(repo)
    assert make_study(repo).main(["--seeds", "0"]) == 0
    assert len(called(repo)) == 4


def test_bad_input_is_one_sentence(repo, capsys):
    study = make_study(repo)
    for words, sentence in (
        (["--base", "huge"], "preset 'huge' is not one of"),
        (["--set", "model.dimm=3"], "'model.dimm' is not a key of a run"),
        (["--set", "model.dim=-3"], "dim=-3 is not positive"),
        (["--only", "third"], "--only 'third' is not one of first, second, bad, heads"),
    ):
        assert study.main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("01_fake: ") and sentence in said and said.count("\n") == 1
    assert not (repo / "experiments/01_fake/results.json").exists() and not called(repo)


def test_another_size_has_results_of_its_own(repo):
    study = make_study(repo, variants=lambda base: {"a": base})
    assert study.main(["--base", "tiny", "--set", "steps=5", "--seeds", "0"]) == 0
    assert (repo / "runs/lab/01_fake-tiny-steps=5/results.json").exists()
    assert not (repo / "experiments/01_fake/results.json").exists()


def test_a_seed_changes_parameters_and_order_alike_for_all(repo):
    asked = make_study(repo).asked(recipe("lab"), (0, 3))
    assert list(asked)[:2] == [("first", 0), ("second", 0)]  # seed by seed
    assert all(a.run.seed == a.run.data.seed == seed for (_, seed), a in asked.items())
    assert asked["heads", 3].run.trunk == asked["heads", 3].others["bad"] == asked["bad", 3].folder
    assert len({a.folder for a in asked.values()}) == len(asked)


def test_the_fingerprint_is_of_what_is_computed():
    run = recipe("lab")
    assert fingerprint(run) == fingerprint(replace(run, model=replace(run.model, layout=Layout(fsdp=True))))
    others = [replace(run, seed=1), replace(run, model=replace(run.model, dim=48)), replace(run, steps=499)]
    assert len({fingerprint(r) for r in (run, *others)}) == 4


def test_differences_are_paired_by_seed(tmp_path):
    """By hand: the seeds' own differences, 1 and 10, fall out."""
    results = Results(tmp_path / "results.json")
    for variant, losses in {"a": {0: 1.0, 1: 11.0, 2: 5.0}, "b": {1: 10.5, 0: 0.7}}.items():
        for seed, loss in losses.items():
            results.add(variant, seed, {"numbers": {"val_loss": loss, "by": [{"x": loss}]}})
    np.testing.assert_allclose(results.paired("b", "a", "val_loss"), [-0.3, -0.5])
    assert mean_spread(results.paired("b", "a", "val_loss"), 2, sign=True) == "−0.40 ± 0.14"
    again = Results(tmp_path / "results.json")
    assert again.runs == results.runs and again.values("a", "by/0/x").tolist() == [1.0, 11.0, 5.0]
    for seeds in again.runs.values():
        for record in seeds.values():
            record["parameters"] = {"total": 1, "active": 1, "cache_bytes": 1}
    columns = [Column("loss", "val_loss", 1, paired=True, against=("b", ABOVE)), Column("speed", "speed")]
    rows = table(again, columns).splitlines()
    assert rows[0].endswith("| loss | against a, paired | against b, paired | against the row above, paired | speed |")
    assert rows[2] == "| a | 1 (1) | 1 | 5.7 ± 5.0 |  | +0.4 ± 0.1 |  | – |"
    assert rows[3] == "| b | 1 (1) | 1 | 5.6 ± 6.9 | −0.4 ± 0.1 |  | −0.4 ± 0.1 | – |"


def test_what_is_told_apart_is_bold(tmp_path):
    """Student's t of 3 seeds at 95 % is 4.303: the mean against 4.303 standard deviations over √3."""
    for spread, bold in ((0.4, True), (0.41, False)):
        differences = 1 + spread * np.array([-1.0, 0.0, 1.0])  # their sample standard deviation is `spread`
        assert told_apart(differences) == bold == (spread * 4.303 / 3**0.5 < 1)
    assert not told_apart(np.array([5.0])) and told_apart(np.array([-1.0, -1.1]))


@pytest.mark.parametrize("again", ["--fresh", "--remeasure"])
def test_making_some_anew_keeps_the_others(repo, again):
    study, path = make_study(repo), repo / "experiments/01_fake/results.json"
    (repo / "mended").touch()
    assert study.main(["--seeds", "0", "1", "3"]) == 0
    called(repo)
    before = Results(path).runs
    assert study.main([again, "--only", "second", "--seeds", "0"]) == 0
    assert called(repo) == ["second 0 [] False"]
    after = Results(path)
    assert after.variants == list(before) and after.seeds() == [0, 1, 3] and after.runs == before


def test_results_are_written_whole(tmp_path, monkeypatch):
    results = Results(tmp_path / "results.json", {"question": 'why "@"?'})
    results.add("a", 0, {"numbers": {"x": 1.0}})
    before = (tmp_path / "results.json").read_text()
    assert json.loads(before)["question"] == 'why "@"?'
    monkeypatch.setattr(Path, "write_bytes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        results.add("a", 1, {"numbers": {"x": 2.0}})
    assert (tmp_path / "results.json").read_text() == before and len(list(tmp_path.iterdir())) == 1


def test_a_page_without_a_place_is_refused(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# nothing\n")
    with pytest.raises(ValueError, match="has no place for results"):
        put_between(page, "x")
    assert page.read_text() == "# nothing\n"


def test_curves_are_thinned_to_means():
    rows = [{"step": i, "loss": float(i)} for i in range(1, 101)] + [{"step": 100, "val_loss": 3.0}]
    curves = thinned(rows, ("loss", "val_loss", "absent"), points=4)
    assert curves == {"loss": [[25, 50, 75, 100], [13.0, 38.0, 63.0, 88.0]], "val_loss": [[100], [3.0]]}


def test_a_worker_measures_what_is_trained(root, tmp_path):
    """The real thing, in this process, on a copy of a finished run: it goes on from there, which is the end."""
    done = finished(root)
    run, folder = done.run, tmp_path / "abc"
    shutil.copytree(done.folder, folder)
    job = work.Job("a", 0, to_dict(run), str(folder), {}, str(tmp_path / "abc.json"), ())
    assert work.Job.read(job.write()).write() == job.write()

    def measure(trained):
        assert trained.model.cfg == run.model and len(trained.held_out()) == run.eval_batches
        return {"layers": len(trained.numbers["load"]), "rows": len(trained.metrics())}

    assert work.main(job.write(), measure, None) == 0
    found = json.loads((tmp_path / "abc.json").read_text())
    assert found["numbers"]["val_loss"] == pytest.approx(done.fitted.evaluation["val_loss"])
    assert found["numbers"]["layers"] == 3 and found["numbers"]["rows"] >= run.steps and "load" not in found["numbers"]
    assert found["curves"]["loss"][0][-1] == found["steps"] == run.steps and found["parameters"]["total"] > 0
    assert work.main(replace(job, alone=True).write(), None, lambda trained: {"speed": trained.numbers["layers"]}) == 0
    alone = json.loads((tmp_path / "abc.json").read_text())
    assert alone["numbers"] == found["numbers"] | {"speed": 3}


def test_a_bad_run_is_one_line(tmp_path, capsys):
    run = make_run(str(tmp_path / "nowhere"))
    job = work.Job("a", 0, to_dict(run), str(tmp_path / "runs/abc"), {}, str(tmp_path / "runs/abc.json"), ())
    assert work.main(job.write(), None, None) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"path {str(tmp_path / 'nowhere')!r} does not exist"


SCRIPTS = sorted((HERE / "experiments").glob("[0-9][0-9]_*/run.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_every_study_is_whole(script, monkeypatch):
    """Its variants can be, cut short and as mini; its page has a question, a place and a verdict."""
    monkeypatch.syspath_prepend(script.parent)
    spec = importlib.util.spec_from_file_location("a_study", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    study = module.STUDY
    for base in (study_file.short_run(), recipe("mini")):
        assert study.asked(base, (0,))
    page = (script.parent / "README.md").read_text()
    assert page.startswith("# ") and page.partition("\n")[0].endswith("?")
    assert page.count("<!-- results -->") == page.count("<!-- /results -->") == 1
    assert overview.verdict(script.parent)


def test_there_are_studies():
    assert SCRIPTS
    with pytest.raises(ConfigError):
        study_file.base_run("lab", ["steps=0"])
