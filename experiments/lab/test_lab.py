"""The lab's commands: which runs they make, what options do and workers write, what counts."""

import contextlib
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from runs import HERE, environment

from dsv3_jax.config import Layout, replace
from dsv3_jax.presets import recipe
from experiments.lab import OnTask, Results, Study, fingerprints, runner, running, work
from experiments.lab.__main__ import main
from experiments.lab.fingerprints import RECIPE_OF_TEXT, identify, settings_of
from experiments.lab.measuring import alike
from experiments.lab.study import load
from experiments.lab.tables import markdown_table
from experiments.lab.tasks import Facts

STUDY = """"A question?"

from dsv3_jax.config import replace
from experiments.lab import Study
from experiments.lab.claims import Claim, Stake

def variants(base):
    model = replace(base.model, mtp_depth=1)
    return {"first": base, "second": replace(base, steps=7), "bad": replace(base, steps=8),
            "heads": replace(base, steps=9, model=model, trunk="bad")}

CLAIM = Claim("the second is lower", "second", "first")
STUDY = Study(variants, claims=(CLAIM,), stakes={"steps": Stake("a step more", "bad", "first")})
"""
PAGE = (
    "# A question?\n\n<!-- results -->\nold\n<!-- /results -->\n\n"
    "## Verdict\n\n**Agrees, in\nshort.** It does.\n"
)


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Return (arguments of `run 1`) → (exit code, jobs that it did), in a repository with a study.

    It trains nothing. The variant "bad" fails until `lab.fixed`.
    """
    folder, made = tmp_path / "experiments" / "01_fake", []
    folder.mkdir(parents=True)
    (folder / "study.py").write_text(STUDY)
    (folder / "README.md").write_text(PAGE)
    (folder.parent / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")

    def run_all(folder, jobs, cores, on_finish):
        made.extend(
            f"{job.variant} {job.seed} {sorted(job.needed_folders)}" + job.alone * " alone"
            for job in jobs
        )
        good = [job for job in jobs if job.variant != "bad" or lab.fixed]
        for job in good:
            record = {
                "numbers": {"val_loss": 1.0 + job.seed + {"second": 0.25}.get(job.variant, 0)},
                "curves": {},
            }
            record |= {"steps": 1, "seconds": 1.0, "commit": "0123abc", "dirty": False}
            on_finish(
                job, record | {"parameters": {"total": 1000, "active": 100, "cache_bytes": 8}}
            )
        return [f"{job.name} failed: it is bad" for job in jobs if job not in good]

    monkeypatch.setattr(running, "run_all", run_all)
    monkeypatch.setattr(running, "make_tokenizer", lambda run, root: None)
    monkeypatch.setattr(running, "_backend", lambda: "cpu")
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "the text")

    def lab(*arguments):
        made.clear()
        return main(["run", "1", *arguments], folder.parent), list(made)

    lab.folder, lab.results, lab.fixed = folder, lambda: Results(folder / "results.json"), False
    return lab


def test_only_missing_runs_are_made_and_failures_are_named(lab, capsys):
    """There is a page, picture, overview. Then the fixed or the changed variant alone is made."""
    code, made = lab("--seeds", "0", "1", "--only", "first", "second", "bad")
    assert code == 1 and "bad, seed 0 failed: it is bad" in capsys.readouterr().err
    assert made == [f"{name} {seed} []" for seed in (0, 1) for name in ("first", "second", "bad")]
    page = (lab.folder / "README.md").read_text()
    assert "| second | 1,000 (100) | 8 | 1.7500 ± 0.7071 | +0.2500 ± 0.0000 |" in page
    assert "| the second is lower | +0.250 (" in page
    assert "trained at commit 0123abc. Machine: " in page
    assert f'Recipe {RECIPE_OF_TEXT}. Not run yet: "bad", "heads".\n' in page
    assert "\nold\n" not in page
    assert page.startswith("# A question?") and page.endswith("It does.\n")
    assert (lab.folder / "fake.png").read_bytes()[:4] == b"\x89PNG"
    assert (lab.folder.parent / "verdicts.png").read_bytes()[:4] == b"\x89PNG"
    row = "| [01 fake](01_fake/README.md) | A question? | Agrees, in short |"
    assert row in (lab.folder.parent / "README.md").read_text()

    lab.fixed = True
    code, made = lab("--seeds", "0", "1")
    assert code == 0
    assert made == [job for s in (0, 1) for job in (f"bad {s} []", f"heads {s} ['bad']")]
    assert lab.results().variants == ["first", "second", "bad", "heads"]
    assert lab.results().seeds() == [0, 1]
    assert "Not run yet" not in (lab.folder / "README.md").read_text()
    assert lab("--seeds", "0", "1") == (0, [])
    (lab.folder / "study.py").write_text(STUDY.replace("steps=8", "steps=80"))
    assert lab("--seeds", "0") == (0, ["bad 0 []", "heads 0 ['bad']"])
    capsys.readouterr()
    assert lab("--list") == (0, []) and "bad, seed 1: missing, runs/lab/" in capsys.readouterr().out
    (lab.folder / "study.py").write_text(
        STUDY.replace("Study(variants", "Study(variants, measure_alone=len")
    )
    made = ["first 0 []", "first 0 [] alone"]
    assert lab("--fresh", "--seeds", "0", "--only", "first") == (0, made)

    # The folder of a short run goes, and its picture with it.
    capsys.readouterr()
    assert lab("--short", "--only", "first", "second")[0] == 0
    printed = capsys.readouterr().out
    assert "--short does not keep it" in printed and "fake.png" not in printed


def test_bad_input_is_one_sentence(lab, capsys):
    for argv, sentence in (
        (["--base", "huge"], "'huge' is not one of"),
        (["--set", "model.dimm=3"], "--set='model.dimm=3'"),
        (["--only", "third"], "--only='third' is not one of first, second, bad, heads"),
        (["9"], "study='9' is not one of 01, or all"),
        (["--short", "--set", "steps=9"], "--short has a base of its own"),
        (["--set", "seed=5"], "--set='seed=5' would have no effect"),
    ):
        assert lab(*argv) == (2, [])
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
    for text in ("", '{"runs": {"a"', "[3]"):
        (lab.folder / "results.json").write_text(text)
        assert lab("--redraw") == (2, [])
        assert f"{lab.folder}/results.json' is no file of results" in capsys.readouterr().err
    (lab.folder / "results.json").unlink()
    shutil.copytree(lab.folder, lab.folder.with_name("01_other"))
    assert lab() == (2, [])
    assert "lab: 01_fake and 01_other have one number; rename" in capsys.readouterr().err
    shutil.rmtree(lab.folder.with_name("01_other"))
    assert not (lab.folder / "results.json").exists()
    with pytest.raises(SystemExit, match="2"):
        lab("--workers", "-1")
    assert "argument --workers: '-1' is no number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "claim, sentence",
    [
        ('"secnod", "first"', "compares 'secnod', which is not one of the variants first, second"),
        ('"second", "first", stake="rate"', "stake='rate' of claim='the second is lower' is not"),
        ('"second", "first", expect="Lower"', "expect='Lower' of claim='the second is lower'"),
    ],
)
def test_a_claim_that_names_nothing_is_refused(lab, capsys, claim, sentence):
    """Even before --fresh deletes results. One without its number is named below the table."""
    arguments = ("--seeds", "0", "1", "--only", "first", "second")
    for measured in ('"second", "first"', '"second", "first", "bits"'):
        (lab.folder / "study.py").write_text(STUDY.replace('"second", "first"', measured))
        assert lab(*arguments)[0] == 0
    assert "key='bits' is no number of these runs; they have " in capsys.readouterr().out
    page = (lab.folder / "README.md").read_text()
    assert 'Without runs, numbers or seeds for a verdict: "the second is lower".' in page
    unchecked = STUDY.replace("stakes=", "**{} and ")
    for study, said in (
        (STUDY.replace('"second", "first"', claim), sentence),
        (unchecked, "01_fake/study.py has claims and no manipulation check: give it stakes="),
    ):
        (lab.folder / "study.py").write_text(study)
        assert lab(*arguments, "--fresh") == (2, []) and said in capsys.readouterr().err
    assert lab.results().variants == ["first", "second"]


def test_claims_about_runs_that_share_a_parent_are_counted_below_the_table(lab):
    claim = STUDY.replace('"second", "first")', '"heads", "bad")')
    (lab.folder / "study.py").write_text(claim)
    lab.fixed = True
    assert lab("--seeds", "0", "1")[0] == 0
    sentence = "1 of 1 claims compare runs that share a parent: they are not independent"
    assert sentence in (lab.folder / "README.md").read_text()


def test_a_new_study_is_a_folder_that_lists_its_runs(lab, capsys):
    """Its study.py has variants, claims and a manipulation check. A taken name is refused."""
    assert main(["new", "my_question"], lab.folder.parent) == 0
    study = load(lab.folder.parent / "02_my_question")
    names = {name for name, _ in study.list_runs(recipe("lab"), (0,))}
    compared = {name for c in study.claims for name in (c.variant, c.against)}
    assert compared <= names and study.stakes
    assert main(["new", "my_question"], lab.folder.parent) == 2
    assert "is taken by 02_my_question" in capsys.readouterr().err


def test_a_task_of_a_study_of_its_own_reaches_a_worker(lab):
    own = "from experiments.lab.tasks import Facts\nclass Mine(Facts):\n    name = 'mine'\n"
    (lab.folder / "study.py").write_text(f"{own}{STUDY}TASK = Mine()\n")
    load(lab.folder)
    task = sys.modules["study_01_fake"].TASK
    assert pickle.loads(pickle.dumps(task)) == task


REAL = """"Why?"

from dsv3_jax.config import replace
from experiments.lab import OnTask, Study
from experiments.lab.tasks import Facts

def variants(base):
    model = replace(base.model, num_layers=1, num_experts=3, experts_per_token=1)
    base = replace(base, model=model, steps=20, save_every=20, eval_every=20, eval_batches=1)
    return {"a": OnTask(Facts(), base), "b": OnTask(Facts(), replace(base, steps=40)),
            "bad": OnTask(Facts(), replace(base, start="nowhere")),
            "c": OnTask(Facts(), replace(base, start="bad"))}

STUDY = Study(variants, base="facts",
              measure=lambda run: {"rows": len(run.metrics()), "layers": run.model.cfg.num_layers})
"""


@pytest.mark.rare
def test_a_study_trains_is_interrupted_and_resumes(tmp_path, tmp_path_factory):
    """The real worker: SIGTERM stops it, finished runs are kept, the command makes the rest."""
    shutil.copytree(HERE / "experiments" / "lab", tmp_path / "experiments" / "lab")
    for name in ("__init__.py", "apart.py", "markdown.py"):
        shutil.copy(HERE / "experiments" / name, tmp_path / "experiments")
    folder = tmp_path / "experiments" / "01_one"
    folder.mkdir()
    (folder / "study.py").write_text(REAL)
    (folder / "README.md").write_text("<!-- results -->\n<!-- /results -->\n")
    command = [sys.executable, "-m", "experiments.lab", "run", "1"]
    command += ["--seeds", "0", "--workers", "1"]
    env = environment(tmp_path_factory.getbasetemp())
    env |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{HERE}", "JAX_NUM_CPU_DEVICES": "1"}
    options = {
        "cwd": tmp_path,
        "env": env,
        "text": True,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
    }
    process = subprocess.Popen(command, **options)
    while not list(tmp_path.glob("runs/lab/*.json")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120)[1].strip().endswith("without --fresh, to resume")
    assert process.returncode == 130
    done = subprocess.run(command, **options)
    assert done.returncode == 1
    assert "bad, seed 0 failed: " in done.stderr and "nowhere" in done.stderr
    assert "c, seed 0 was not run: it depends on bad, which failed" in done.stderr
    results = Results(folder / "results.json")
    assert results.variants == ["a", "b"] and results.values("b", "layers") == 1
    record = results.records("b")[0]
    assert record["curves"]["loss"][0][-1] == record["steps"] == 40


def test_a_killed_worker_fails_its_job_alone(tmp_path):
    worker, job = runner._Worker(tmp_path, ()), work.Job("a", 0, recipe("lab"), "run", {})
    worker.give(job)
    worker.process.kill()  # before it reads the job
    code = worker.answer()
    worker.end()
    assert "a, seed 0 failed: signal 9 killed it" in runner._failure(job, tmp_path, code)


def test_a_start_is_made_before_a_run_and_belongs_to_the_run_that_it_is_made_of(
    lab, tmp_path, capsys
):
    made = []

    def make_start(run):
        made.append(run.start)
        raise ValueError(f"start={run.start!r} cannot be made")

    start = str(tmp_path / "parent" / "made")
    for run in (recipe("lab"), replace(recipe("lab"), start=start)):
        job = work.Job("a", 0, replace(run, data=replace(run.data, paths=("absent",))), "run", {})
        with contextlib.chdir(tmp_path):
            assert work.do(job, None, make_start) == 1
    assert made == [start] and capsys.readouterr().err.endswith("/made' cannot be made\n")

    inside = STUDY.replace('trunk="bad"', 'trunk="bad/made"')
    (lab.folder / "study.py").write_text(inside)
    assert load(lab.folder).begun() == {"heads": "bad"}


@pytest.mark.parametrize("units", [2, 3])
def test_experts_are_as_alike_as_their_best_matching(units):
    """By trying every order of the units. Copies with their units in other orders are alike."""
    rng = np.random.default_rng(0)
    shapes = {"w_gate": (2, 3, 5, units), "w_up": (2, 3, 5, units), "w_down": (2, 3, units, 5)}
    drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    vectors = np.concatenate(
        [drawn["w_gate"].swapaxes(2, 3), drawn["w_up"].swapaxes(2, 3), drawn["w_down"]], axis=-1
    )
    vectors /= np.sqrt((vectors**2).sum(-1, keepdims=True))
    best = [
        max(
            np.mean([layer[e][i] @ layer[f][j] for i, j in enumerate(order)])
            for order in itertools.permutations(range(units))
        )
        for layer in vectors
        for e in range(3)
        for f in range(e)
    ]
    assert alike(model_of_experts(drawn)) == pytest.approx(np.mean(best), rel=1e-9)

    order = rng.permutation(units)
    for name, w in drawn.items():
        w[:, 1] = w[:, 0].take(order, axis=1 if name == "w_down" else 2)
        w[:, 2] = w[:, 0]
    assert alike(model_of_experts(drawn)) == pytest.approx(1)


def model_of_experts(weights):
    experts = SimpleNamespace(**weights)
    return SimpleNamespace(sparse=SimpleNamespace(moe=SimpleNamespace(experts=experts)))


def settings_hash(*arguments):
    return str(sorted(settings_of(*arguments).items(), key=str))


def test_the_identity_of_a_run(tmp_path, monkeypatch):
    """Kernels and layout do not count. Model, steps, task, start and text do.

    A setting that a later version adds keeps old results if it is at its default.
    """
    run = recipe("lab")
    execution = replace(run.execution, kernels="xla", layout=Layout(fsdp=True))
    assert settings_hash(run) == settings_hash(replace(run, execution=execution))
    others = [
        replace(run, seed=1),
        replace(run, model=replace(run.model, dim=48)),
        replace(run, steps=499),
    ]
    assert len({settings_hash(r) for r in (run, *others)} | {settings_hash(run, Facts())}) == 5
    started = replace(run, start="runs/lab/abc")
    x, y = (settings_hash(started, None, {"runs/lab/abc": of_start}) for of_start in "xy")
    assert x != y
    inside = replace(run, start="runs/lab/abc/made")  # by `Study.make_start`
    found = {settings_hash(inside, None, {"runs/lab/abc": of_start}) for of_start in "xy"}
    assert len(found | {x, y}) == 4
    again = [
        fingerprints.changed(replace(run, start=folder), {folder: "x"})
        for folder in ("runs/lab/a", "runs/lab/b")
    ]
    # What it starts from counts, not that folder's name, which newer settings change.
    assert again[0] == again[1]
    monkeypatch.setattr(fingerprints, "_corpus_hash", lambda data: "a text")

    parents = {str(seed): OnTask(Facts(table_seed=seed), run) for seed in (0, 1, 2)}
    children = {f"after {name}": OnTask(Facts(), replace(run, start=name)) for name in parents}
    study = Study(lambda base: parents | children, folder=tmp_path / "a" / "b")
    assert len({one.folder for one in study.list_runs(run, (0,)).values()}) == 6
    old = identify(run, tmp_path)
    assert old.matches(old.stored()) and not replace(old, corpus="other").matches(old.stored())
    names, values = {old.keys: sorted(old.settings)}, fingerprints.to_dict(run)
    new = fingerprints._defaults() | {"model.new": 0}
    monkeypatch.setattr(fingerprints, "_defaults", lambda: new)
    for changed, matches in ((0, True), (1, False)):
        later = values | {"model": values["model"] | {"new": changed}}
        monkeypatch.setattr(fingerprints, "to_dict", lambda run, later=later: later)
        assert identify(run, tmp_path).matches(old.stored(), names) == matches


def test_a_name_with_a_bar_stays_in_its_cell():
    assert markdown_table(["|x|"], [["1"]]) == "| \\|x\\| |\n| --- |\n| 1 |"


def test_a_table_is_the_same_after_its_file_is_read(tmp_path):
    results = Results(tmp_path / "results.json")
    results.add("a", 0, {"numbers": {"val_loss": 1 / 3}})
    assert (
        Results(results.path).runs
        == results.runs
        == {"a": {"0": {"numbers": {"val_loss": 0.333333}}}}
    )
