"""Heads on a frozen trunk: nothing of the trunk moves, and the run that is made stands on its own."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from runs import MODEL, assert_bitwise, cheap_compiles, fresh_state, make_run, packed_batch, rows_of, unhooked_cli
from runs import write_text as text_in

from dsv3_jax.config import DataConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.mesh import sharding
from dsv3_jax.training import frozen, loop
from dsv3_jax.training.checkpoint import Checkpoints, claim, load_model, read_run
from dsv3_jax.training.step import first_bad_tensor, make_step

pytestmark = pytest.mark.long

TRUNK = replace(MODEL, num_layers=1, num_dense_layers=1)  # compiles fastest
CASES = {  # a kind: (how many heads, dense layers of the trunk's one)
    "deepseek": (1, 0),
    "meta": (1, 1),
    "medusa": (2, 1),  # as in the runs below
    "eagle": (1, 1),
}
WORDS = tokenizer.ByteTokenizer()


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    with cheap_compiles(root):
        yield root


@pytest.fixture(autouse=True)
def _no_seconds_spent_on_the_rest(monkeypatch):
    monkeypatch.setattr(loop, "gemm_flops", lambda dtype: 1e9)
    monkeypatch.setattr(loop, "_draw", lambda *_: None)
    monkeypatch.setattr(loop, "_order2", lambda *_: 0.0)


@pytest.fixture(scope="module")
def trunk(root) -> str:
    """A run folder whose last checkpoint is random throughout."""
    folder = root / "frozen" / "trunk"
    save(folder, make_run(text_in(root / "frozen" / "text"), model=TRUNK))
    return str(folder)


def save(folder, run, step: int = 7) -> None:
    claim(folder, run)
    with Checkpoints(folder, run) as checkpoints:
        checkpoints.save(fresh_state(run, step), {}, wait=True)


def run_on(trunk: str, **model):
    """A run of four steps of Medusa's heads, which compile fastest, and what `model` changes."""
    run = frozen.on_trunk(make_run("", eval_every=4, steps=4, save_every=2), trunk)
    return replace(run, model=replace(run.model, **{"mtp_kind": "medusa", "mtp_depth": 2, **model}))


def cut(state) -> tuple[dict, dict]:
    """(heads, trunk) of parameters and biases, by name."""
    flat = {path: np.asarray(v[...]) for s in (state.params, state.bias) for path, v in nnx.to_flat_state(s)}
    heads = {path: a for path, a in flat.items() if path[0] == "mtp"}
    return heads, {path: a for path, a in flat.items() if path[0] != "mtp"}


def last_state(folder, run):
    with Checkpoints(folder, run, read_only=True) as checkpoints:
        return checkpoints.restore()


# the step


@pytest.mark.parametrize("kind", CASES)
def test_heads_learn_and_the_trunk_stands_still(trunk, kind):
    depth, dense = CASES[kind]
    run = run_on(trunk, mtp_kind=kind, mtp_depth=depth, num_dense_layers=dense)
    step, state, rows = make_step(run), fresh_state(run), []
    segment_ids = np.sort(np.random.default_rng(1).integers(1, 3, (4, 16)), axis=1)
    batch = packed_batch(np.random.default_rng(0), segment_ids)
    heads, still = cut(state)
    for means in state.opt:  # of the heads alone: no gradient of anything else is ever made
        assert {path[0] for path, _ in nnx.to_flat_state(means)} == {"mtp"}
    for _ in range(3):
        state, metrics = step(state, batch)
        rows.append(jax.device_get(metrics))
    assert rows[-1]["loss"] == rows[0]["loss"]  # the trunk's own
    assert (rows[-1]["mtp_loss"] < rows[0]["mtp_loss"]).all()
    if kind == "eagle":
        assert rows[-1]["feature_loss"] < rows[0]["feature_loss"]
    after, now = cut(state)
    assert_bitwise(now, still)
    routed = 0
    for path, before in heads.items():
        assert (after[path] != before).any(), f"{path} did not move"
        if path[-1] == "bias":  # follows the load of its own head
            routed += 1
            for row in rows:
                load = row["load"][1 - dense + path[1]]
                before = before + np.float32(1e-2) * np.sign(load.mean() - load)
            np.testing.assert_array_equal(after[path], before)
    assert rows[0]["load"].shape[0] - (1 - dense) == routed == (depth if kind in ("deepseek", "meta") else 0)
    assert first_bad_tensor(run, state, batch) == "the loss"  # all is finite


# a run


@pytest.fixture(scope="module")
def whole(trunk, root):
    """Trained without a stop, on a copy of the trunk, so that this may go."""
    mine = root / "frozen" / "copy"
    shutil.copytree(trunk, mine)
    run, folder = run_on(str(mine)), root / "frozen" / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "gemm_flops", lambda dtype: 1e9)
        patch.setattr(loop, "_draw", lambda *_: None)
        patch.setattr(loop, "_order2", lambda *_: 0.0)
        assert loop.fit(run, folder, quiet=True).finished
    return run, folder, mine


def test_the_trunk_is_its_last_checkpoint_and_stays_so(whole, trunk):
    run, folder, _ = whole
    wanted = cut(last_state(trunk, make_run(run.data.paths[0], model=TRUNK))[0])[1]
    assert_bitwise(cut(last_state(folder, run)[0])[1], wanted)
    heads, still = cut(frozen.start(run, WORDS)[0])
    assert_bitwise(still, wanted)
    assert all((a != b).any() for a, b in zip(heads.values(), cut(last_state(folder, run)[0])[0].values(), strict=True))


def test_stopped_and_resumed_without_the_trunk_is_never_stopped(whole, tmp_path, monkeypatch):
    run, folder, mine = whole
    first = loop.fit(run, tmp_path / "run", stop_after=2, quiet=True)
    assert (first.step, first.resumed_from) == (2, None)
    mine.rename(tmp_path / "away")
    try:
        second = loop.fit(run, tmp_path / "run", quiet=True)
        assert (second.step, second.resumed_from) == (4, 2)
        state, place = last_state(tmp_path / "run", run)
        want, want_place = last_state(folder, run)
        assert_bitwise(state, want)
        assert place == want_place and rows_of(tmp_path / "run") == rows_of(folder)
        model, cfg, _, step = load_model(tmp_path / "run")
        assert (cfg, step, len(model.mtp)) == (run.model, 4, 2)
    finally:
        (tmp_path / "away").rename(mine)


def test_on_a_mesh_it_is_a_single_devices(whole, trunk, tmp_path):
    run, folder, _ = whole
    mesh, experts = sharding.make_mesh(1, 2), run_on(trunk, mtp_kind="meta", mtp_depth=1)
    state, step = frozen.start(experts, WORDS, mesh)
    assert step == 7
    for leaf, at in zip(jax.tree.leaves(state), jax.tree.leaves(sharding.state_sharding(state, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    assert_bitwise(jax.device_get(state), jax.device_get(frozen.start(experts, WORDS)[0]))
    loop.fit(run, tmp_path / "run", mesh=mesh, stop_after=2, quiet=True)
    for got, want in zip(rows_of(tmp_path / "run"), rows_of(folder)[:2], strict=True):
        np.testing.assert_allclose(got["mtp_loss"], want["mtp_loss"], rtol=1e-5)  # sums in another order


# the command line


def test_model_data_and_tokenizer_are_the_trunks(root, trunk, tmp_path, monkeypatch, capfd):
    """What is not said is the trunk's; its tokenizer comes along; and with the trunk gone all this still holds."""
    cli = unhooked_cli()
    cli._prepare = lambda: None
    mine, out = tmp_path / "mine", tmp_path / "out"
    text = read_run(trunk).data.paths[0]
    mine.mkdir()
    tokenizer.train_bpe(["a b c d e f g h i j k l m n o p " * 9], 260, str(mine / "tokenizer.json"))
    data = DataConfig((text,), str(mine / "tokenizer.json"), seq_len=16, batch_size=4, val_fraction=0.3)
    save(mine, make_run(text, model=replace(TRUNK, mtp_depth=0), data=data))
    words = "--model.mtp-kind medusa --steps 2 --eval-batches 1 --log-every 1".split()
    argv = ["train", "tiny", f"--out={out}", "--trunk", str(mine), *words]
    assert cli.main(argv) == 0
    assert "the trunk is that of step 7" in capfd.readouterr().out
    run = read_run(out)
    assert run.model == replace(TRUNK, mtp_depth=1, mtp_kind="medusa")
    assert run.data == replace(data, tokenizer=str(out / "tokenizer.json")) and run.trunk == str(mine)
    shutil.rmtree(mine)
    assert cli.main(argv) == 0
    assert "resumed from the checkpoint of step 2" in capfd.readouterr().out
    assert tokenizer.load(run.data.tokenizer).vocab_size == 260
    assert cli.main(["train", "tiny", "--out", str(tmp_path / "new"), "--trunk", str(mine)]) == 2
    assert "mine holds no run" in capfd.readouterr().err and not (tmp_path / "new").exists()


def test_the_trunks_biases_come_along(trunk, tmp_path):
    run = make_run(read_run(trunk).data.paths[0], model=replace(TRUNK, num_dense_layers=0))
    save(tmp_path / "sparse", run)
    still = cut(frozen.start(run_on(str(tmp_path / "sparse")), WORDS)[0])[1]
    assert_bitwise(still, cut(fresh_state(run))[1])
    assert still["sparse", "moe", "bias"].all()


def test_nothing_is_written_into_the_trunk(trunk, whole):
    """A half-written checkpoint there may be that of a run which goes on: it is not cleaned away."""
    half = Path(trunk) / "checkpoints" / "9.orbax-checkpoint-tmp-1"
    half.mkdir()
    frozen.start(run_on(trunk), WORDS)
    assert half.exists()
    half.rmdir()
