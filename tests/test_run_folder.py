"""A run folder is copied, renamed and used from any directory, and remains one run's; another version's is refused."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
from flax import nnx
from models import random_model, small
from runs import (
    assert_bitwise,
    make_run,
    rows_of,
    write_text,
)

import dsv3_jax as ds
from dsv3_jax.config import Execution, Layout, RunConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import Checkpoints, load_run
from dsv3_jax.training.run_folder import RUN_FILE, TOKENIZER_FILE, claim, read_run

pytestmark = pytest.mark.usefixtures("cheap")

STOP = 5  # the step that the folders below have come to
OTHER_EXECUTION = Execution(compute_dtype="bfloat16", kernels="xla", layout=Layout(fsdp=True))


@dataclass(frozen=True)
class Made:
    """A run that was made in `home` with relative paths, stopped at step STOP, and moved away from there."""

    home: Path
    run: RunConfig  # as it was given
    folder: Path  # where it is now; its tokenizer's original is gone
    whole: Path  # the same run, never stopped


@pytest.fixture(scope="module")
def made(root) -> Made:
    home = root / "run folders" / "home"
    write_text(home / "text")
    run = make_run("text")
    run = replace(run, data=replace(run.data, tokenizer="words/tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train_tokenizer(Path("words") / TOKENIZER_FILE)
        loop.fit(run, "whole", quiet=True)
        loop.fit(run, "made", stop_after=STOP, quiet=True)
        shutil.move("made", home.parent / "kept")
        shutil.rmtree("words")
    return Made(home, run, home.parent / "kept", home / "whole")


@pytest.fixture
def moved(made, tmp_path, monkeypatch) -> Path:
    """A copy of it under another name, relative to a current directory that it was not made in."""
    shutil.copytree(made.folder, tmp_path / "elsewhere" / "renamed")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Path("renamed")


def train_tokenizer(path: Path, *, swapped: bool = False) -> str:
    """A tokenizer of 260 ids, the specials first: none means what a byte's does. `swapped`: nor a and b the other's."""
    tokenizer.train_bpe(["no merges"], 260, str(path))
    if swapped:
        values = json.loads(path.read_text())
        ids = values["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        path.write_text(json.dumps(values))
    return str(path)


# moved


def test_a_moved_folder_is_loaded_and_continued_without_the_tokenizers_file(made, moved):
    """It names what is inside it by its name, and text by its place; the text may have another spelling."""
    written = json.loads((moved / RUN_FILE).read_text())["run"]["data"]
    assert (written["tokenizer"], written["paths"]) == (TOKENIZER_FILE, [str(made.home / "text")])
    _, run, step = load_run(moved)
    assert (step, run.data.tokenizer) == (STOP, "renamed/tokenizer.json")
    assert tokenizer.load(run.data.tokenizer).encode("a") != tokenizer.ByteTokenizer().encode("a")
    run = replace(made.run, data=replace(made.run.data, paths=(f"{made.home}/text/../text",)))
    assert not Path(run.data.tokenizer).exists()
    assert loop.fit(run, moved, quiet=True).resumed_from == STOP
    ends = []
    for place in (moved, made.whole):
        with Checkpoints(place, read_run(place), read_only=True) as checkpoints:
            ends.append(checkpoints.restore())
    assert_bitwise(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1] and rows_of(moved) == rows_of(made.whole)


# one run


def test_another_tokenizer_is_another_run(made, moved, tmp_path):
    run, before = read_run(moved), sorted(moved.rglob("*"))
    other = train_tokenizer(tmp_path / "other" / TOKENIZER_FILE, swapped=True)
    for name in (other, "bytes"):
        with pytest.raises(ValueError, match=rf"^data\.tokenizer='{name}' is not that of the run in renamed, 'renamed"):
            loop.fit(replace(run, data=replace(run.data, tokenizer=name)), moved, quiet=True)
    assert sorted(moved.rglob("*")) == before
    copy = str(shutil.copy(moved / TOKENIZER_FILE, tmp_path / "copy.json"))  # the same ids are the same tokenizer
    claim(moved, replace(run, data=replace(run.data, tokenizer=copy)))


@pytest.mark.rare
def test_another_execution_is_the_same_run(made, moved):
    run = replace(read_run(moved), execution=OTHER_EXECUTION)
    again = loop.fit(run, moved, stop_after=STOP + 2, quiet=True)
    assert (again.resumed_from, again.step) == (STOP, STOP + 2)
    rows = [json.loads(line) for line in (moved / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    unstopped = {row["step"]: row["loss"] for row in rows_of(made.whole) if "loss" in row}
    for row in rows[STOP:]:  # bfloat16 has 8 bits
        assert row["loss"] != unstopped[row["step"]] and row["loss"] == pytest.approx(unstopped[row["step"]], rel=0.02)
    assert load_run(moved).step == STOP + 2


# loaded


def test_a_model_is_loaded_without_the_optimizer(made, monkeypatch):
    """Its arrays are neither read nor allocated."""
    names = set()
    read = ocp.type_handlers.ArrayHandler.deserialize

    async def noted(self, infos, args=None):
        names.update(info.name.split(".")[0] for info in infos)
        return await read(self, infos, args)

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", noted)
    model = load_run(made.folder).model
    assert names == {"params", "bias", "step"}
    with Checkpoints(made.folder, read_run(made.folder), read_only=True) as checkpoints:
        whole, _ = checkpoints.restore()
    assert names == {"params", "bias", "step", "opt"}
    assert_bitwise(nnx.split(model, nnx.Param, ...)[1:], (whole.params, whole.bias))


def test_load_model_takes_a_run_or_a_released_folder(made, tmp_path):
    released = random_model(small(num_layers=1, num_dense_layers=1))
    ds.hf.save(released, tmp_path / "released")
    for folder, wanted in ((made.folder, load_run(made.folder).model), (tmp_path / "released", released)):
        model = ds.load_model(folder)
        assert isinstance(model, ds.Transformer)
        assert_bitwise(nnx.split(model)[1], nnx.split(wanted)[1])
    for folder, step, sentence in (
        (tmp_path, None, "is neither a run .* nor released"),
        (made.folder, 3, "^step=3 has no checkpoint in"),
        (tmp_path / "released", 3, "^step=3 is for runs"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ds.load_model(folder, step=step)
