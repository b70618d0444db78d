"""A damaged checkpoint is never loaded: it is named by file, and training resumes from the whole one before."""

import gc
import json
import mmap
import random
import shutil
import time
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from cases import some_long
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata
from runs import assert_bitwise
from test_checkpoint import PLACE, RUN, make_state, save, steps_in

from dsv3_jax.lock import FolderGone
from dsv3_jax.training import checkpoint, checksums
from dsv3_jax.training.checkpoint import Checkpoints, SaveFailed, load_run
from dsv3_jax.training.checksums import COMMIT, MANIFEST, MARK, METADATA, DamagedCheckpoint, find_damage, write_manifest
from dsv3_jax.training.finite import first_nonfinite
from dsv3_jax.training.loop import _only_writer
from dsv3_jax.training.run_folder import claim

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


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit, at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def without_checksums(run: Path) -> None:
    """As older versions wrote it."""
    for step in (EARLIER, LAST):
        folder = run / "checkpoints" / str(step)
        (folder / MANIFEST).unlink()
        values = json.loads((folder / METADATA).read_text())
        (folder / METADATA).write_text(json.dumps(values | {"custom_metadata": {}}))


def test_every_file_of_a_checkpoint_is_in_its_manifest(saved):
    for step in (EARLIER, LAST):
        folder = saved / "checkpoints" / str(step)
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        assert listed.keys() | {MANIFEST, METADATA, COMMIT} == files
        assert sum(size for size, _ in listed.values()) == sum((folder / name).stat().st_size for name in listed)
        assert json.loads((folder / METADATA).read_text())["custom_metadata"] == MARK
        assert find_damage(folder) == []


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_a_flipped_bit_is_found_in_every_file(run, at):
    folder = last(run)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / COMMIT):
        before = path.read_bytes()
        flip(path, at)
        if path.name == METADATA and at == 0.3 and find_damage(folder) == []:
            continue  # within the time of the commit, which nothing reads
        assert find_damage(folder), path
        path.write_bytes(before)
    assert find_damage(folder) == []


def test_a_large_file_is_checked_in_pieces(run, monkeypatch):
    piece = mmap.ALLOCATIONGRANULARITY
    monkeypatch.setattr(checksums, "PIECE", piece)
    monkeypatch.setattr(checksums, "_CHUNK", 3000)
    path = last(run) / "state" / "large"
    content = random.Random(0).randbytes(3 * piece + 250)
    path.write_bytes(content)
    write_manifest(last(run))
    # As every version wrote it: zlib's CRC-32 of those of the pieces.
    crcs = [zlib.crc32(content[at : at + piece]).to_bytes(4, "little") for at in range(0, len(content), piece)]
    listed = json.loads((last(run) / MANIFEST).read_text())["files"]["state/large"]
    assert listed == [len(content), zlib.crc32(b"".join(crcs))]
    assert find_damage(last(run)) == []
    for at in (0.0, 0.3, 0.31, 0.62, 1.0):
        flip(path, at)
        assert find_damage(last(run)) == [f"file='{path}' is damaged: its checksum is not the one that was written"], at
        flip(path, at)


def array_file(folder: Path) -> Path:
    """The largest file of the arrays."""
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


DAMAGE = {
    "bit of an array": lambda folder: flip(array_file(folder)),
    "bit of the data position": lambda folder: flip(folder / "data" / "metadata"),
    "cut": lambda folder: array_file(folder).write_bytes(array_file(folder).read_bytes()[:-9]),
    "empty": lambda folder: array_file(folder).write_bytes(b""),
    "absent": lambda folder: array_file(folder).unlink(),
    "longer": lambda folder: array_file(folder).write_bytes(array_file(folder).read_bytes() + b"more"),
    "another file": lambda folder: (folder / "state" / "other").write_text("x"),
    "a link": lambda folder: (array_file(folder).unlink(), (folder / "state" / "d" / "a").symlink_to("/dev/zero")),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "half a manifest": lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:99]),
    "an empty manifest": lambda folder: (folder / MANIFEST).write_text("{}"),
    "no metadata": lambda folder: (folder / METADATA).unlink(),
    "an empty folder": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("name", some_long(DAMAGE.keys(), "bit of an array", "cut", "another file", "no metadata"))
def test_damage_is_named_by_file(run, name):
    DAMAGE[name](last(run))
    assert find_damage(last(run))[0].startswith(f"file='{last(run)}/")


@pytest.mark.parametrize("name", ["bit of an array", "an empty folder"])
def test_damage_is_refused_by_readers_and_passed_over_by_training(run, name):
    DAMAGE[name](last(run))
    with pytest.raises(DamagedCheckpoint, match=rf"^step=8: file='{last(run)}.*; step 4 is whole: use --step 4$"):
        load_run(run)
    assert load_run(run, step=EARLIER).step == EARLIER
    with Checkpoints(run, RUN) as checkpoints:
        (sentence,) = checkpoints.rewind()
        assert f"the checkpoint of step 8 is kept as 8.damaged: file='{last(run)}" in sentence
        state, place = checkpoints.restore()
        assert place == PLACE | {"offset": EARLIER}
        assert_bitwise(state, make_state(EARLIER))
        checkpoints.save(make_state(LAST), PLACE)  # training comes to that step again
    assert steps_in(run) == {"4", "8", "8.damaged"}
    assert find_damage(last(run)) == []


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


def test_older_checkpoints_are_loaded_without_a_check(run):
    without_checksums(run)
    assert load_run(run).step == LAST
    for file in (last(run) / "state").rglob("d/*"):  # one may hold nothing but moments, which load_run does not read
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="step=8: .* or is damaged: it has no checksums"):
        load_run(run)
    (last(run) / "data" / "metadata").unlink()
    with pytest.raises(DamagedCheckpoint, match="data/metadata' is absent; step 4 is whole"):
        load_run(run)


def test_several_processes_share_the_check(saved, run):
    flip(array_file(last(run)))
    names = [find_damage(last(run), (i, 3)) for i in range(3)]
    assert sorted(map(len, names)) == [0, 0, 1]
    assert find_damage(last(saved), (1, 3)) == []


def test_the_manifest_is_written_after_orbax_metadata(run, monkeypatch):
    """Another thread writes the metadata. On a busy machine it is late."""
    store = orbax_metadata._MetadataStoreImpl
    update = store.update

    def late(self, *args, **more):
        time.sleep(0.3)
        update(self, *args, **more)

    monkeypatch.setattr(store, "update", late)
    save(run, LAST + 1)
    assert find_damage(run / "checkpoints" / str(LAST + 1)) == []


def test_a_save_that_fails_in_the_background_is_named(run, monkeypatch):
    def fail(folder):
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    with pytest.raises(SaveFailed, match=r"^the checkpoint of step 9 cannot be written to .*: the disk is gone;"):
        with Checkpoints(run, RUN) as checkpoints:
            checkpoints.save(make_state(9), PLACE)
            while checkpoints._manager.is_saving_in_progress():
                time.sleep(0.01)
            checkpoints.check_save()
            pytest.fail("the failure was not noticed")
    with Checkpoints(run, RUN) as checkpoints:
        assert checkpoints.latest == LAST


def test_a_folder_that_is_moved_during_a_save_is_named(run, monkeypatch):
    def move(folder):
        run.rename(run.with_name("moved"))
        write_manifest(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", move)
    with pytest.raises(FolderGone, match=f"^out='{run}' was moved or deleted"), _only_writer(run, RUN):
        with Checkpoints(run, RUN) as checkpoints:
            checkpoints.save(make_state(9), PLACE)
    assert load_run(run.with_name("moved")).step == LAST


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_what_an_update_made_is_tested_before_it_is_saved(value):
    state = make_state(3)
    assert first_nonfinite(state) == ""
    state.params["head"] = state.params["head"].replace(jnp.full_like(state.params["head"][...], value))
    assert first_nonfinite(state) == "parameter head"
