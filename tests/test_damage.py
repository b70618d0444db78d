"""A damaged checkpoint is never loaded: it is named by file, and training resumes from the whole one before."""

import gc
import json
import os
import random
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from cases import some_long
from runs import assert_bitwise
from test_checkpoint import PLACE, RUN, make_state, save, steps_in

from dsv3_jax.config import replace
from dsv3_jax.training import checkpoint
from dsv3_jax.training.checkpoint import (
    LATE,
    MANIFEST,
    Checkpoints,
    DamagedCheckpoint,
    SaveFailed,
    find_damage,
    load_run,
)
from dsv3_jax.training.run_folder import claim
from dsv3_jax.training.step import first_nonfinite

# A save or restore that fails inside Orbax leaves its event loop open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
EARLIER, LAST = 4, 8


@pytest.fixture(autouse=True)
def _collected():
    """Collect Orbax's leftovers here, and not in a test of another file."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with two whole checkpoints."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    claim(folder, RUN)
    save(folder, EARLIER, LAST)
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of it, under another name."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def last(run: Path) -> Path:
    return run / "checkpoints" / str(LAST)


def flip(path: Path, bit: int | None = None) -> None:
    """Flip one bit, by default in the middle."""
    content = bytearray(path.read_bytes())
    bit = 4 * len(content) if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_or_changes_nothing(run):
    folder, rng = last(run), random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = json.loads((folder / MANIFEST).read_text())
    late = {folder / name for name in LATE}
    assert {folder / name for name in listed} == set(files) - late and "state/manifest.ocdbt" in listed
    found = 0
    for path in files:
        bits = 8 * path.stat().st_size
        for bit in (0, bits - 1, *(rng.randrange(bits) for _ in range(6))):
            before = path.read_bytes()
            flip(path, bit)
            damage = find_damage(folder)
            found += bool(damage)
            if path.name == MANIFEST:  # nothing changes where a space becomes another one
                assert damage or json.loads(path.read_text()) == listed
            else:
                assert bool(damage) == (path not in late), (path, bit)
            path.write_bytes(before)
    assert found > 8 * (len(files) - 3)
    for name in LATE[1:]:
        (folder / name).write_bytes(os.urandom(99))
    with Checkpoints(run, RUN) as checkpoints:
        assert checkpoints.rewind() == []
        assert_bitwise(checkpoints.restore()[0], make_state(LAST))


def array_file(folder: Path) -> Path:
    """The largest file of the arrays."""
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


DAMAGE = {
    "bit of an array": lambda folder: flip(array_file(folder)),
    "absent": lambda folder: array_file(folder).unlink(),
    "another file": lambda folder: (folder / "state" / "other").write_text("x"),
    "a link": lambda folder: (array_file(folder).unlink(), (folder / "state" / "d" / "a").symlink_to("/dev/zero")),
    "a pipe": lambda folder: os.mkfifo(folder / "state" / "pipe"),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "half a manifest": lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:99]),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_by_file(run, name):
    DAMAGE[name](last(run))
    damage = find_damage(last(run))
    assert f"{last(run)}/" in damage and "\n" not in damage and len(damage) < 300


@pytest.mark.parametrize("name", some_long(["bit of an array", "an empty folder"], "bit of an array"))
def test_damage_is_refused_by_readers_and_passed_over_by_training(run, name):
    DAMAGE[name](last(run))
    with pytest.raises(DamagedCheckpoint, match=rf"^step=8: .*{last(run)}.*; `dsv3 runs check` says"):
        load_run(run)
    assert load_run(run, step=EARLIER).step == EARLIER
    with Checkpoints(run, RUN) as checkpoints:
        (sentence,) = checkpoints.rewind()
        assert sentence.startswith("the checkpoint of step 8 is kept as 8.damaged: ") and str(last(run)) in sentence
        state, place = checkpoints.restore()
        assert place == PLACE | {"offset": EARLIER}
        assert_bitwise(state, make_state(EARLIER))
        checkpoints.save(make_state(LAST), PLACE)  # training comes to that step again
    assert steps_in(run) == {"4", "8", "8.damaged"}
    assert find_damage(last(run)) == ""


def test_training_starts_from_no_damaged_checkpoint(run):
    for step in (EARLIER, LAST):
        flip(run / "checkpoints" / str(step) / "config" / "metadata")
    with (
        Checkpoints(run, RUN) as checkpoints,
        pytest.raises(DamagedCheckpoint, match="no other checkpoint .* is whole"),
    ):
        checkpoints.rewind()
    assert steps_in(run) == {"4", "8"}


def test_a_step_can_be_chosen(run):
    """Later checkpoints are kept under another name; a damaged or absent one is not replaced by another."""
    with Checkpoints(run, RUN) as checkpoints:
        with pytest.raises(ValueError, match=r"^step=5 has no checkpoint in .*; there are those of 4, 8$"):
            checkpoints.rewind(5)
        assert checkpoints.rewind(LAST) == checkpoints.rewind() == []
        assert checkpoints.rewind(EARLIER) == [
            "the checkpoint of step 8 is kept as 8.superseded: training resumes from step 4"
        ]
        assert checkpoints.latest == EARLIER
    flip(run / "checkpoints" / "4" / "data" / "metadata")
    with Checkpoints(run, RUN) as checkpoints, pytest.raises(DamagedCheckpoint, match="step=4: .*data/metadata"):
        checkpoints.rewind(EARLIER)


@pytest.mark.parametrize("when", ["checksums", "config", "state", "end"])
def test_a_reader_beside_a_trainer_takes_the_next_newest_checkpoint(run, monkeypatch, when):
    """The trainer deletes the checkpoint while its checksums, its configuration or its state is read, or after."""
    read_checksums, read, calls = find_damage, ocp.AsyncCheckpointer.restore, []

    def train():
        with monkeypatch.context() as patch:
            patch.setattr(ocp.AsyncCheckpointer, "restore", read)
            save(run, 12, run=replace(RUN, keep=1))
        assert steps_in(run) == {"12"}

    def checksums(folder):
        if when == "checksums" and folder.name == str(LAST):
            train()
        return read_checksums(folder)

    def restore(self, folder, args):
        calls.append(folder.name)
        if when == ("config", "state", "")[min(len(calls), 3) - 1]:
            train()
        result = read(self, folder, args=args)
        if when == "end" and len(calls) == 2:
            train()
        return result

    monkeypatch.setattr(checkpoint, "find_damage", checksums)
    monkeypatch.setattr(ocp.AsyncCheckpointer, "restore", restore)
    with Checkpoints(run, RUN, read_only=True) as checkpoints:
        state, place = checkpoints.restore()
        assert_bitwise(state, make_state(12))
        assert place == PLACE | {"offset": 12} and calls[-1] == "12"
        with pytest.raises(ValueError, match=r"^step=8 has no checkpoint in .*; there are those of 12$"):
            checkpoints.restore(step=LAST)


def test_a_save_that_fails_in_the_background_is_named(run, monkeypatch):
    def fail(folder):
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    with pytest.raises(SaveFailed, match=r"^the checkpoint of step 9 cannot be written to .*: the disk is gone;"):
        with Checkpoints(run, RUN) as checkpoints:
            checkpoints.save(make_state(9), PLACE)
    assert steps_in(run) == {"4", "8"}


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_what_an_update_made_is_tested_before_it_is_saved(value):
    params = make_state(3).params
    assert first_nonfinite("parameter", params) == ""
    params["head"] = params["head"].replace(jnp.full_like(params["head"][...], value))
    assert first_nonfinite("parameter", params) == "parameter head"
