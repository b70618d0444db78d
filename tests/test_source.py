"""A run that begins with another's weights: they are bitwise that run's, all else is new, and it stands on its own."""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from runs import MODEL, assert_bitwise, cheap_compiles, fresh_state, make_run, rows_of, unhooked_cli
from runs import write_text as text_in

from dsv3_jax.config import Balance, ConfigError, DataConfig, Layout, Yarn
from dsv3_jax.data import tokenizer
from dsv3_jax.mesh import sharding
from dsv3_jax.training import loop, warm_start
from dsv3_jax.training.checkpoint import Checkpoints, claim, load_model, read_run

pytestmark = pytest.mark.long

WORDS = tokenizer.ByteTokenizer()
LONGER = {"yarn": Yarn(factor=4.0, original_max_positions=16), "balance": Balance(bias_rate=3e-3)}


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
def other(root) -> str:
    """A run folder whose last checkpoint is random throughout, biases and optimizer too, at step 7."""
    folder = root / "source" / "other"
    run = make_run(text_in(root / "source" / "text"))
    save(folder, run)
    return str(folder)


def save(folder, run) -> None:
    claim(folder, run)
    state = fresh_state(run, 7)
    state = replace(state, opt=jax.tree.map(lambda x: x + 1, state.opt))
    with Checkpoints(folder, run) as checkpoints:
        checkpoints.save(state, {}, wait=True)


def run_from(other, **model):
    run = warm_start.on_weights(make_run("", eval_every=4, steps=4, save_every=2), other)
    return replace(run, model=replace(run.model, **LONGER | model))


def test_weights_and_biases_are_the_others_and_all_else_is_new(other):
    run = run_from(other)
    assert run.data == read_run(other).data and run.model == replace(MODEL, **LONGER)
    state, at = warm_start.begin(run, WORDS)
    wanted = fresh_state(read_run(other))
    assert_bitwise((state.params, state.bias), (wanted.params, wanted.bias))
    assert all(np.asarray(b[...]).any() for _, b in nnx.to_flat_state(state.bias))
    assert_bitwise(state.opt, wanted.opt)  # zeros
    assert (at, int(state.step), state.step.dtype) == (7, 0, np.int32)


def test_it_goes_on_without_the_other(other, root, tmp_path):
    """Stopped, the other's folder taken away, resumed: bitwise what an unbroken run gives; and it learns."""
    mine = tmp_path / "mine"
    shutil.copytree(other, mine)
    run = run_from(str(mine))
    assert loop.fit(run, tmp_path / "whole", quiet=True).finished
    assert loop.fit(run, tmp_path / "parts", stop_after=2, quiet=True).step == 2
    shutil.rmtree(mine)
    assert loop.fit(run, tmp_path / "parts", quiet=True).resumed_from == 2
    states = []
    for name in ("whole", "parts"):
        with Checkpoints(tmp_path / name, run, read_only=True) as checkpoints:
            states.append(checkpoints.restore()[0])
    assert_bitwise(*states)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    assert load_model(tmp_path / "whole")[1].yarn.factor == 4


def test_on_a_mesh_it_lies_where_the_mesh_wants_it(other):
    run = run_from(other, layout=Layout(fsdp=True))
    mesh = sharding.make_mesh(2, 2)
    state, _ = warm_start.begin(run, WORDS, mesh)
    where = sharding.state_sharding(state, mesh, fsdp=True)
    for leaf, at in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(at, leaf.ndim)
    assert_bitwise(jax.device_get(state), jax.device_get(warm_start.begin(run_from(other), WORDS)[0]))


def test_what_does_not_fit_is_refused(other, tmp_path):
    for change, sentence in ({"num_heads": 1}, "has model.num_heads 2, not 1"), ({"mtp_depth": 0}, "model.mtp_depth 1"):
        with pytest.raises(ConfigError, match=sentence):
            loop.fit(run_from(other, **change), tmp_path / "new", quiet=True)
    with pytest.raises(ConfigError, match="not with both"):
        replace(run_from(other), trunk=other)
    assert not (tmp_path / "new").exists()


def test_the_command_line_takes_model_text_and_tokenizer_along(other, tmp_path, capfd):
    cli = unhooked_cli()
    cli._prepare = lambda: None
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.mkdir()
    tokenizer.train_bpe(["a b c d e f g h i j k l m n o p " * 9], 260, str(mine / "tokenizer.json"))
    text = read_run(other).data.paths
    data = DataConfig(text, str(mine / "tokenizer.json"), seq_len=16, batch_size=4, val_fraction=0.3)
    save(mine, make_run("", data=data))
    words = "--model.balance.bias-rate 0.5 --steps 2 --eval-batches 1".split()
    argv = ["train", "tiny", f"--out={out}", "--start", str(mine), *words]
    assert cli.main(argv) == 0
    assert "the weights are those of step 7" in capfd.readouterr().out
    run = read_run(out)
    assert run.model == replace(MODEL, balance=replace(MODEL.balance, bias_rate=0.5)) and run.start == str(mine)
    assert run.data == replace(data, tokenizer=str(out / "tokenizer.json"))
    shutil.rmtree(mine)
    assert cli.main(argv) == 0 and "resumed from the checkpoint of step 2" in capfd.readouterr().out
