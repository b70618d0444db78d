"""The lab's worker processes: which job comes next, a stop, and what a worker writes."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from lab_stub import called, fake_repository, make_study
from runs import HERE, cheap_compiles, finished, make_run

from dsv3_jax.config import replace, to_dict
from experiments.lab import Results, runner, work

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with cheap_compiles():
        yield tmp_path_factory.getbasetemp()


@pytest.fixture
def repo(tmp_path, monkeypatch):
    return fake_repository(tmp_path, monkeypatch)


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


def test_an_idle_worker_that_hangs_is_killed(repo, monkeypatch):
    (repo / "hangs").touch()
    monkeypatch.setattr(runner, "STOP_TIMEOUT", 0.5)
    assert make_study(repo, measure_alone=lambda trained: {}).main(["--seeds", "0", "--only", "first"]) == 0
    assert called(repo) == ["first 0 [] False", "first 0 [] True"]


def test_an_interrupted_study_resumes(repo):
    """SIGTERM and Ctrl-C stop the workers. Finished runs are kept."""
    script = f"""
import sys
sys.path.insert(0, {str(HERE / "tests")!r})
from pathlib import Path
from lab_stub import fingerprints, make_study, study_file
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
    monkeypatch.setattr("dsv3_jax.train.fit", lambda *_, **__: pytest.fail("fit was called"))
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
