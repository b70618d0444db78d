"""A run folder is copied, renamed and used from any directory, and remains one run's; another version's is refused."""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from models import random_model, small
from runs import (
    STEPS,
    assert_bitwise,
    cheap_compiles,
    flags,
    make_run,
    rows_of,
    said_by,
    unhooked_cli,
    write_text,
)

import dsv3_jax as ds
from dsv3_jax.config import Execution, Layout, RunConfig
from dsv3_jax.data import open_source, tokenizer
from dsv3_jax.kernels import choose
from dsv3_jax.model.counting import train_flops_per_token
from dsv3_jax.training import loop, prepare
from dsv3_jax.training.checkpoint import Checkpoints, load_run
from dsv3_jax.training.evaluate import evaluate
from dsv3_jax.training.run_folder import RUN_FILE, TOKENIZER_FILE, claim, read_run

STOP = 5  # the step that the folders below have come to
PEAK = 1e5  # FLOP/s: a run takes minutes, so that its estimate tells numbers of steps apart
OTHER_EXECUTION = Execution(compute_dtype="bfloat16", kernels="xla", layout=Layout(fsdp=True))


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles():
        yield root


@pytest.fixture(autouse=True)
def _a_slow_machine(monkeypatch):
    monkeypatch.setattr(prepare, "gemm_flops", lambda dtype: PEAK)


@dataclass(frozen=True)
class Made:
    """A run that was made in `home` with relative paths, stopped at step STOP, and moved away from there."""

    home: Path
    run: RunConfig  # as it was given
    folder: Path  # where it is now; its tokenizer's original is gone
    whole: Path  # the same run, never stopped
    said: str  # what the first part of it printed
    evaluation: dict  # of step STOP, from where it was made
    continued: str  # the command line's greedy continuation of PROMPT, from there too


PROMPT = ("--prompt", "for x in", "--max-new-tokens", "8", "--temperature", "0")


@pytest.fixture(scope="module")
def made(root) -> Made:
    home = root / "run folders" / "home"
    write_text(home / "text")
    run = make_run("text")
    run = replace(run, data=replace(run.data, tokenizer="words/tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "gemm_flops", lambda dtype: PEAK)
        patch.chdir(home)
        train_tokenizer(Path("words") / TOKENIZER_FILE)
        loop.fit(run, "whole", quiet=True)
        _, said = said_by(lambda: loop.fit(run, "made", stop_after=STOP))
        evaluation, continued = evaluated("made"), output_of("generate", "made", *PROMPT)
        shutil.move("made", home.parent / "kept")
        shutil.rmtree("words")
    return Made(home, run, home.parent / "kept", home / "whole", said, evaluation, continued)


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


def evaluated(folder: str | Path) -> dict:
    model, run, _ = load_run(folder)
    words = tokenizer.load(run.data.tokenizer)
    source = open_source(run.data, words)
    return evaluate(model, source.val_batches(2), words, source.domains)


def output_of(*argv: str) -> str:
    cli = unhooked_cli()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(list(argv)) == 0
    return out.getvalue()


def assert_same_end(run: RunConfig, folder: Path, made: Made) -> None:
    """The last checkpoint and all metrics are those of the run that was never stopped or moved."""
    found = []
    for place in (folder, made.whole):
        with Checkpoints(place, read_run(place), read_only=True) as checkpoints:
            assert checkpoints.latest == STEPS
            found.append(checkpoints.restore())
    (state, position), (wanted, wanted_position) = found
    assert_bitwise(state, wanted)
    assert position == wanted_position and rows_of(folder) == rows_of(made.whole)


# moved


def test_a_moved_folder_is_loaded_evaluated_and_continued(made, moved):
    """It names what is inside it by its name, and text by its place. Also where another run has its first name."""
    written = json.loads((moved / RUN_FILE).read_text())["run"]["data"]
    assert (written["tokenizer"], written["paths"]) == (TOKENIZER_FILE, [str(made.home / "text")])
    model, run, step = load_run(moved)
    assert (step, run.data.tokenizer) == (STOP, "renamed/tokenizer.json")
    assert tokenizer.load(run.data.tokenizer).encode("a") != tokenizer.ByteTokenizer().encode("a")
    np.testing.assert_equal(evaluated(moved), made.evaluation)
    lines = dict(line.split(maxsplit=1) for line in output_of("eval", "renamed", "--batches", "2").splitlines())
    assert (lines["step"], lines["val_loss"]) == (str(STOP), f"{made.evaluation['val_loss']:.4f}")
    train_tokenizer(Path("made") / TOKENIZER_FILE, swapped=True)
    assert output_of("generate", "renamed", *PROMPT) == made.continued
    assert made.continued.startswith(PROMPT[1]) and len(made.continued) > len(PROMPT[1]) + 1


# one run


@pytest.mark.long
def test_the_same_command_resumes_without_the_tokenizers_file(made, moved):
    """The folder was moved. The command names a file that is gone; the text by another spelling of its path."""
    run = replace(made.run, data=replace(made.run.data, paths=(f"{made.home}/text/../text",)))
    assert not Path(run.data.tokenizer).exists()
    said = output_of("train", "tiny", "--out", "renamed", *flags(run))
    assert f"resumed from the checkpoint of step {STOP}" in said
    assert_same_end(run, moved, made)


def test_another_tokenizer_is_another_run(made, moved, tmp_path):
    run, before = read_run(moved), sorted(moved.rglob("*"))
    other = train_tokenizer(tmp_path / "other" / TOKENIZER_FILE, swapped=True)
    for name in (other, "bytes"):
        with pytest.raises(ValueError, match=rf"^data\.tokenizer='{name}' is not that of the run in renamed, 'renamed"):
            loop.fit(replace(run, data=replace(run.data, tokenizer=name)), moved, quiet=True)
    assert sorted(moved.rglob("*")) == before
    copy = str(shutil.copy(moved / TOKENIZER_FILE, tmp_path / "copy.json"))  # the same ids are the same tokenizer
    claim(moved, replace(run, data=replace(run.data, tokenizer=copy)))


@pytest.mark.long
def test_another_execution_is_the_same_run(made, moved):
    run = replace(read_run(moved), execution=OTHER_EXECUTION)
    again = loop.fit(run, moved, stop_after=STOP + 2, quiet=True)
    assert (again.resumed_from, again.step) == (STOP, STOP + 2)
    rows = [json.loads(line) for line in (moved / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "kernels" in row] == [1, STOP + 1]
    first, second = (rows[i]["kernels"] for i in (0, STOP))
    assert first == choose.prepare(made.run.execution).chosen() and first["grouped_swiglu"] == "dense"
    assert second == choose.prepare(OTHER_EXECUTION).chosen("bfloat16") and second["grouped_swiglu"] != "dense"
    written = json.loads((moved / RUN_FILE).read_text())
    assert written["kernels"] == first and written["run"]["execution"]["compute_dtype"] == "float32"
    unstopped = {row["step"]: row["loss"] for row in rows_of(made.whole) if "loss" in row}
    for row in rows[STOP:]:  # bfloat16 has 8 bits
        assert row["loss"] != unstopped[row["step"]] and row["loss"] == pytest.approx(unstopped[row["step"]], rel=0.02)
    assert load_run(moved).step == STOP + 2


def test_the_lines_at_the_start(made, moved):
    """The text, the kernels, and how long training may take: at 30 and at 60 % of the peak."""
    _, said = said_by(lambda: loop.fit(read_run(moved), moved, stop_after=STOP + 1))
    names = choose.prepare(made.run.execution).describe()
    tokens = made.run.data.batch_size * made.run.data.seq_len
    for text, steps in ((made.said, STEPS), (said, STEPS - STOP)):
        lines = text.splitlines()
        assert lines[0].startswith("text: code 0.0 MB, prose 0.0 MB; 0.00 MB of it held out")
        assert lines[1] == names and names.startswith("kernels for cpu: ") and ", dense" in names
        slow, fast = (steps * tokens * train_flops_per_token(made.run.model) / (s * PEAK) for s in (0.3, 0.6))
        assert lines[2].startswith(f"{steps} steps of {tokens} tokens: between ")
        for seconds in (slow, fast):
            assert prepare.format_duration(seconds) in lines[2]


# loaded


def test_a_model_is_loaded_without_the_optimizer(made, monkeypatch):
    """Its arrays are neither read nor allocated."""
    names = []
    read = ocp.type_handlers.ArrayHandler.deserialize

    async def noted(self, infos, args=None):
        names.extend(info.name for info in infos)
        return await read(self, infos, args)

    monkeypatch.setattr(ocp.type_handlers.ArrayHandler, "deserialize", noted)
    run = read_run(made.folder)
    with Checkpoints(made.folder, run, read_only=True) as checkpoints:
        state, _ = checkpoints.restore(optimizer=False)
        assert jax.tree.leaves(state.opt) == []
        assert {name.split(".")[0] for name in names} == {"params", "bias", "step"}
        names.clear()
        whole, _ = checkpoints.restore()
        assert {name.split(".")[0] for name in names} == {"params", "bias", "step", "opt"}
    assert_bitwise((state.params, state.bias, state.step), (whole.params, whole.bias, whole.step))
    names.clear()
    model = load_run(made.folder).model
    assert names and not any(name.startswith("opt") for name in names)
    assert_bitwise(nnx.split(model, nnx.Param, ...)[1:], (whole.params, whole.bias))


def test_load_model_takes_a_run_or_a_released_folder(made, tmp_path):
    released = random_model(small(num_layers=1, num_dense_layers=1))
    ds.hf.save(released, tmp_path / "released")
    for folder, wanted in ((made.folder, load_run(made.folder).model), (tmp_path / "released", released)):
        model = ds.load_model(folder)
        assert isinstance(model, ds.Transformer)
        assert_bitwise(nnx.split(model)[1], nnx.split(wanted)[1])
    assert ds.load_model(str(made.folder), step=4).cfg == made.run.model


def test_load_model_refuses_other_folders_in_one_sentence(made, tmp_path):
    released = tmp_path / "released"
    ds.hf.save(random_model(small(num_layers=1, num_dense_layers=1)), released)
    for folder, step, sentence in (
        (tmp_path, None, f"folder='{tmp_path}' is neither a run (no run.json) nor released (no config.json)"),
        (tmp_path / "absent", None, f"folder='{tmp_path}/absent' is neither a run (no run.json) nor released"),
        (made.folder, 3, "step=3 has no checkpoint in"),
        (released, 3, f"step=3 is for runs, and folder='{released}' is a released one"),
    ):
        with pytest.raises(ValueError) as caught:
            ds.load_model(folder, step=step)
        said = str(caught.value)
        assert said.startswith(sentence) and "\n" not in said and len(said) < 300
