"""Checkpoints are complete or absent, damage is named and never loaded, a folder is one run's."""

import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import runs
from flax import nnx
from models import DENSE, random_model
from runs import assert_bitwise, by_command, make_run, refused

from dsv3_jax.model.moe import RouterBias
from dsv3_jax.runs import checksums
from dsv3_jax.runs.checkpoint import Checkpoints, DamagedCheckpoint, SaveFailed, load_run
from dsv3_jax.runs.checksums import LATE, MANIFEST, find_damage, write_manifest
from dsv3_jax.runs.folder import REPLACED, RUN_FILE, claim, read_run, settled
from dsv3_jax.runs.loop import fit
from dsv3_jax.training import optim
from dsv3_jax.training.state import TrainState

# A save or restore that fails inside Orbax leaves its event loop open.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MODEL = replace(runs.MODEL, num_layers=1, mtp_depth=0)
RUN = make_run("some text", model=MODEL, keep=2)
PLACE = {"corpus": "abc", "seed": 0, "document": 3, "offset": 7}
EARLIER, LAST = 4, 8


def make_state(step: int) -> TrainState:
    """Every leaf random: parameters, biases, both means of the optimizer."""
    models = [random_model(MODEL, step + i, DENSE) for i in range(3)]
    parts = [nnx.split(model, nnx.Param, RouterBias)[1:] for model in models]
    means = optim.AdamState(parts[1][0], parts[2][0])
    return TrainState(*parts[0], means, jnp.asarray(step, jnp.int32))


def save(folder, *steps, run=RUN):
    with Checkpoints(folder, run) as checkpoints:
        for step in steps:
            checkpoints.save(make_state(step), PLACE | {"offset": step})


def steps_in(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


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


def test_a_checkpoint_is_never_half_there(run, monkeypatch):
    def one_file_only(path, **_):
        for file in Path(path).rglob("_METADATA"):
            file.unlink()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", one_file_only)
        save(run, 9)
    shutil.copytree(last(run), run / "checkpoints" / "10.orbax-checkpoint-tmp-123")
    assert steps_in(run) == {"4.deleted", "8", "9", "10.orbax-checkpoint-tmp-123"}
    assert find_damage(run / "checkpoints" / "4.deleted")
    assert not any(find_damage(run / "checkpoints" / step) for step in ("8", "9"))
    with Checkpoints(run, RUN) as checkpoints:
        assert checkpoints.latest == 9
    assert steps_in(run) == {"8", "9"}


def test_a_save_that_fails_in_the_background_is_named(saved, tmp_path):
    """Orbax takes the path for a pattern. Such a run is read, and no save counts older ones."""
    run = Path(shutil.copytree(saved, tmp_path / "in[1]" / "run"))
    sentence = "^the checkpoint of step 9 cannot be written to .*: Orbax has not written .*;"
    with pytest.raises(SaveFailed, match=sentence):
        save(run, 9, run=replace(RUN, keep=1))
    assert steps_in(run) == {"8"} and load_run(run).step == LAST
    with refused(f"^out='{re.escape(str(tmp_path))}/a\\*/run' holds '.', which Orbax"):
        fit(RUN, tmp_path / "a*" / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"in[1]"}


# damage


def flip(path: Path, bit: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    bit = 4 * len(content) if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_or_changes_nothing(run):
    folder, rng = last(run), random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = json.loads((folder / MANIFEST).read_text())
    late = {folder / name for name in LATE}
    assert {folder / name for name in listed} == set(files) - late
    assert "state/manifest.ocdbt" in listed
    for path in files:
        before, bits = path.read_bytes(), 8 * path.stat().st_size
        for bit in (0, bits - 1, rng.randrange(bits)):
            flip(path, bit)
            damage = find_damage(folder)
            if path.name == MANIFEST:  # nothing changes where a space becomes another one
                assert damage or json.loads(path.read_text()) == listed
            else:
                assert bool(damage) == (path not in late), (path, bit)
            path.write_bytes(before)
    for name in LATE[1:]:
        (folder / name).write_bytes(os.urandom(99))
    with Checkpoints(run, RUN) as checkpoints:
        assert checkpoints.rewind() == []
        assert_bitwise(checkpoints.restore()[0], make_state(LAST))


def array_file(folder: Path) -> Path:
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: array_file(folder).unlink(),
        lambda folder: (folder / "state" / "other").write_text("x"),
        lambda folder: os.mkfifo(folder / "state" / "pipe"),
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:99]),
        lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    ],
)
def test_damage_is_named_by_file(run, damage):
    damage(last(run))
    found = find_damage(last(run))
    assert f"{last(run)}/" in found and "\n" not in found and len(found) < 300


def test_a_checkpoint_without_checksums_is_there(run):
    """A process that dies before it has written them leaves a checkpoint that was not checked."""
    (last(run) / MANIFEST).unlink()
    with Checkpoints(run, RUN) as checkpoints:
        assert checkpoints.rewind() == [] and checkpoints.restore()[1]["offset"] == LAST
    code, said, _ = by_command("runs", "check", run)
    assert code == 0 and "step 4: whole" in said and "step 8: not checked" in said


def test_a_damaged_checkpoint_is_not_chosen(run):
    for step in (EARLIER, LAST):
        flip(run / "checkpoints" / str(step) / "config" / "metadata")
    with Checkpoints(run, RUN) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match="^step=4: .*config/metadata' is damaged"):
            checkpoints.rewind(EARLIER)
        with pytest.raises(DamagedCheckpoint, match="no other checkpoint .* is whole"):
            checkpoints.rewind()
    assert steps_in(run) == {"4", "8"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_reader_beside_a_trainer_takes_the_next_newest_checkpoint(run, monkeypatch, when):
    read, steps = Checkpoints._read_state, []

    def train(moment):
        if (moment, steps) == (when, [LAST]):
            save(run, 12, run=replace(RUN, keep=1))
            assert steps_in(run) == {"12"}

    def read_state(self, step, *args):
        steps.append(step)
        train("before")
        found = read(self, step, *args)
        train("after")
        return found

    monkeypatch.setattr(Checkpoints, "_read_state", read_state)
    with Checkpoints(run, RUN, read_only=True) as checkpoints:
        state, place = checkpoints.restore()
    assert_bitwise(state, make_state(12))
    assert place == PLACE | {"offset": 12} and steps == [LAST, 12]


def test_check_passes_over_what_a_trainer_deletes(run, monkeypatch):
    monkeypatch.setattr(checksums, "find_damage", lambda folder: shutil.rmtree(folder) or "absent")
    code, said, _ = by_command("runs", "check", run)
    assert code == 0 and "step" not in said


def test_a_changed_checkpoint_that_is_sealed_again_is_refused_in_a_sentence(run):
    """Anyone can write checksums, and edit run.json. The sentence names the checkpoint's step."""
    config, data = (last(run) / name / "metadata" for name in ("config", "data"))
    values = json.loads(config.read_text())
    edited = (run / RUN_FILE).read_text().replace('"mtp_depth": 0', '"mtp_depth": 1')
    unreadable = f"the checkpoint in {run}/checkpoints cannot be read: "
    two = [[8, 260], "uint8"], [[1, 260], "float32"]
    changes = [
        (config, json.dumps(values | {"packed": 5}), unreadable),
        (config, json.dumps(values | {"packed": [[["nowhere"], two]]}), unreadable),
        (config, "[]", unreadable),
        (data, "3", unreadable),
        (data, '{"a": 1', f".*{data} is not JSON: "),
        (run / RUN_FILE, edited, ".*: model.mtp_depth=1 is not that of the checkpoint, 0$"),
    ]
    for file, text, sentence in changes:
        before = file.read_text()
        file.write_text(text)
        write_manifest(last(run))
        with refused(f"^step=8: {sentence}"):
            load_run(run)
        file.write_text(before)


def test_an_array_without_its_file_and_a_router_bias_of_nan(run):
    state = make_state(LAST)
    bias = jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.bias)
    with Checkpoints(run, RUN) as checkpoints:
        checkpoints.save(replace(state, bias=bias, step=state.step + 1), PLACE)
    with refused("^step=9: the checkpoint in .* the norm of router bias sparse.* is not finite"):
        load_run(run)
    shutil.rmtree(last(run) / "state" / "ocdbt.process_0" / "d")
    write_manifest(last(run))
    with refused("^step=8: the checkpoint in .* cannot be read: "):
        load_run(run, step=LAST)


# a folder is one run's


def test_a_folder_is_claimed_once(tmp_path):
    """An empty folder becomes the run's, also after a killed claim; only that run finds it again.

    How long it goes and how often it reports may change.
    """
    (tmp_path / f".{RUN_FILE}.1.part").write_text('{"mod')
    first = claim(tmp_path, RUN)
    assert first == replace(RUN, data=replace(RUN.data, paths=(os.path.abspath("some text"),)))
    assert read_run(tmp_path) == claim(tmp_path, RUN) == first
    for change, key in (
        ({"data": replace(RUN.data, paths=("/a", "b"))}, r"data.paths=\('/a', '.*/b'\) is not"),
        ({"model": replace(MODEL, q_latent_dim=3)}, "model.q_latent_dim=3 is not that .*, None"),
    ):
        with refused(f"^{key}.*; choose another --out$"):
            claim(tmp_path, replace(RUN, **change))
    longer = replace(RUN, steps=RUN.steps + 8, save_every=3)
    claim(tmp_path, longer)
    claim(tmp_path, replace(longer, keep=9))
    assert read_run(tmp_path) == replace(settled(longer, tmp_path), keep=9)
    history = json.loads((tmp_path / RUN_FILE).read_text())["history"]
    first = {"steps": [RUN.steps, RUN.steps + 8], "save_every": [RUN.save_every, 3]}
    assert [entry["changed"] for entry in history] == [first, {"keep": [RUN.keep, 9]}]


@pytest.mark.parametrize("name", [*REPLACED, "checkpoints"])
def test_a_run_is_not_written_through_a_link(saved, run, tmp_path, name):
    """A stranger's folder may link to the user's files. checkpoints/ may link to a larger disk."""
    own = tmp_path / "own"
    own.mkdir()
    shutil.rmtree(run / "checkpoints")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(saved / name if name == "checkpoints" else own / name)
    with refused(f"{run / name}'? is a link .*{'the run' if name == 'checkpoints' else own}"):
        claim(run, RUN)
    assert steps_in(saved) == {"4", "8"} and list(own.iterdir()) == []
    (run / name).unlink()
    (run / "checkpoints").symlink_to(own)
    if name != RUN_FILE:
        claim(run, RUN)


def test_what_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with refused(f"out='{tmp_path}' holds other files and no run.json"):
        claim(tmp_path, RUN)
    with refused(f"folder='{tmp_path}' holds no run: there is no run.json"):
        load_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    claim(tmp_path / "run", RUN)
    with refused("holds no checkpoint yet"):
        load_run(tmp_path / "run")
    values = json.loads((tmp_path / "run" / RUN_FILE).read_text()) | {"run": {"colour": 3}}
    for text, sentence in (
        (json.dumps(values), "run.json: 'colour' is not a key of RunConfig"),
        ("{}", "has a run of format=None, not 2: dsv3-jax 0.1.0 reads it"),
    ):
        (tmp_path / "run" / RUN_FILE).write_text(text)
        with refused(sentence):
            load_run(tmp_path / "run")
