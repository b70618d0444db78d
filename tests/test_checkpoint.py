"""Checkpoints are complete or absent, and a run folder belongs to one run."""

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, random_model
from runs import MODEL, assert_bitwise, make_run

from dsv3_jax.model.moe import RouterBias
from dsv3_jax.training import optim, orbax_noise
from dsv3_jax.training.checkpoint import Checkpoints, SaveFailed, find_damage, load_run
from dsv3_jax.training.run_folder import RUN_FILE, claim, read_run, settled
from dsv3_jax.training.step import TrainState

pytestmark = pytest.mark.usefixtures("cheap")

RUN = make_run("some text", keep=2)
PLACE = {"corpus": "abc", "seed": 0, "document": 3, "offset": 7}


def make_state(step: int) -> TrainState:
    """Every leaf random: parameters, biases, both means of the optimizer."""
    parts = [
        nnx.split(random_model(MODEL, seed, DENSE), nnx.Param, RouterBias)[1:] for seed in (step, step + 1, step + 2)
    ]
    return TrainState(*parts[0], optim.AdamState(parts[1][0], parts[2][0]), jnp.asarray(step, jnp.int32))


def save(folder, *steps, run=RUN):
    with Checkpoints(folder, run) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), PLACE | {"offset": step})


def steps_in(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_what_is_restored_is_what_was_saved(tmp_path):
    with Checkpoints(tmp_path, RUN) as checkpoints:
        assert checkpoints.latest is None and checkpoints.restore() is None
    save(tmp_path, 3, 5, 8)
    assert steps_in(tmp_path) == {"5", "8"}  # keep=2
    with Checkpoints(tmp_path, RUN) as checkpoints:
        assert checkpoints.latest == 8
        state, place = checkpoints.restore()
    assert_bitwise(state, make_state(8))
    assert place == PLACE | {"offset": 8}
    assert all(np.any(leaf) for leaf in jax.tree.leaves(state))


def test_a_checkpoint_is_never_half_there(tmp_path, monkeypatch):
    """A run that dies while it writes or deletes leaves whole checkpoints only, and the next start deletes the rest."""

    def one_file_only(path, **_):
        for file in Path(path).rglob("_METADATA"):
            file.unlink()

    monkeypatch.setattr(shutil, "rmtree", one_file_only)
    save(tmp_path, 3, 5, 7)
    monkeypatch.undo()
    shutil.copytree(tmp_path / "checkpoints" / "7", tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-123")
    assert steps_in(tmp_path) == {"3.deleted", "5", "7", "9.orbax-checkpoint-tmp-123"}
    assert find_damage(tmp_path / "checkpoints" / "3.deleted")
    assert not any(find_damage(tmp_path / "checkpoints" / step) for step in ("5", "7"))
    with Checkpoints(tmp_path, RUN) as checkpoints:
        assert checkpoints.latest == 7
    assert steps_in(tmp_path) == {"5", "7"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves the other writes pending
def test_a_disk_that_fills_up_leaves_the_checkpoint_before(tmp_path):
    """A real disk of half a megabyte."""
    disk, run = tmp_path / "disk", replace(RUN, keep=20)
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        with pytest.raises(SaveFailed, match="cannot be written to .*(No space left|RESOURCE_EXHAUSTED)"):
            save(disk, *range(1, 20), run=run)
        with Checkpoints(disk, run) as checkpoints:
            last = checkpoints.latest
            assert last >= 1
            assert_bitwise(checkpoints.restore()[0], make_state(last))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_orbax_prints_beside_its_error_is_left_out_and_nothing_else(monkeypatch, caplog):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    orbax_noise.silence.__wrapped__()
    for error in (RuntimeError("Event loop is closed"), RuntimeError("another"), OSError("Event loop is closed")):
        sys.unraisablehook(SimpleNamespace(exc_type=type(error), exc_value=error))
    assert [str(found.exc_value) for found in heard] == ["another", "Event loop is closed"]
    code = compile("raise OSError('full')", "/lib/orbax/checkpoint/serialization.py", "exec")
    for run in (partial(exec, code), partial(int, "x")):
        try:
            run()
        except (OSError, ValueError):
            logging.getLogger("asyncio").exception("never retrieved")
    for message in ("run/4.orbax-checkpoint-tmp/d/5", "NOT_FOUND: in OCDBT database [tensorstore_spec={}]"):
        logging.getLogger("asyncio").error(message)
    assert [record.exc_info[0] for record in caplog.records] == [ValueError]


def test_a_folder_is_claimed_once(tmp_path):
    """An empty folder becomes the run's, also after a claim was killed; only the same run finds it again."""
    (tmp_path / f".{RUN_FILE}.1.part").write_text('{"mod')
    settled = claim(tmp_path, RUN)
    assert settled == replace(RUN, data=replace(RUN.data, paths=(os.path.abspath("some text"),)))
    assert read_run(tmp_path) == settled
    written = (tmp_path / RUN_FILE).read_bytes()
    assert claim(tmp_path, RUN) == settled
    for change, key in (
        ({"seed": 7}, "seed=7 is not that of the run in .*, 0"),
        ({"data": replace(RUN.data, paths=("/a", "b"))}, r"data.paths=\('/a', '.*/b'\) is not .*/some text',\)"),
        ({"model": replace(MODEL, q_latent_dim=3)}, "model.q_latent_dim=3 is not that of the run in .*, None"),
    ):
        with pytest.raises(ValueError, match=f"^{key}; choose another --out$"):
            claim(tmp_path, replace(RUN, **change))
    assert (tmp_path / RUN_FILE).read_bytes() == written


def test_how_long_a_run_goes_and_how_often_it_reports_may_change(tmp_path):
    claim(tmp_path, RUN)
    longer = replace(RUN, steps=RUN.steps + 8, save_every=3)
    assert claim(tmp_path, longer).steps == RUN.steps + 8
    claim(tmp_path, longer)  # nothing changes, so nothing is recorded
    claim(tmp_path, replace(longer, keep=9))
    assert read_run(tmp_path) == replace(settled(longer, tmp_path), keep=9)
    history = json.loads((tmp_path / RUN_FILE).read_text())["history"]
    changed = [{"steps": [RUN.steps, RUN.steps + 8], "save_every": [RUN.save_every, 3]}, {"keep": [RUN.keep, 9]}]
    assert [entry["changed"] for entry in history] == changed
    assert all(datetime.fromisoformat(entry["time"]) <= datetime.now(UTC) for entry in history)


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"out='{tmp_path}' holds other files and no run.json"):
        claim(tmp_path, RUN)
    with pytest.raises(ValueError, match="notes.txt' is a file, not a folder"):
        claim(tmp_path / "notes.txt", RUN)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"folder='{tmp_path}' holds no run: there is no run.json"):
        load_run(tmp_path)
    claim(tmp_path, RUN)
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        load_run(tmp_path)
    values = json.loads((tmp_path / RUN_FILE).read_text())
    for text, sentence in (
        (json.dumps(values | {"run": values["run"] | {"colour": 3}}), "'colour' is not a key of RunConfig"),
        (json.dumps(values)[:100], "run.json is not JSON"),
        ("[]", "has a run of format=None, not 2: dsv3-jax 0.1.0 reads it"),
    ):
        (tmp_path / RUN_FILE).write_text(text)
        with pytest.raises(ValueError, match=sentence):
            load_run(tmp_path)


@pytest.mark.parametrize("change", [{"expert_dim": 5}, {"mtp_depth": 2}])
def test_a_checkpoint_of_another_model_is_refused(tmp_path, change):
    """run.json was edited by hand: one sentence, not a page of Orbax."""
    claim(tmp_path / "run", RUN)
    save(tmp_path / "run", 4)
    file = tmp_path / "run" / RUN_FILE
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"run": values["run"] | {"model": values["run"]["model"] | change}}))
    with pytest.raises(ValueError, match="checkpoint") as caught:
        load_run(tmp_path / "run")
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400 and "run" in said
