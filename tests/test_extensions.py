"""A new router, rule or head is a row or two; loops and meshes of one's own use the parts."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, parameters, random_model
from runs import (
    MODEL,
    SPEND_NO_SECONDS,
    environment,
    flags,
    fresh_state,
    make_run,
    packed_batch,
    refused,
    unhooked_cli,
    write_text,
)

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import (
    HEAD_KINDS,
    Balance,
    HeadKind,
    ModelConfig,
    OptimConfig,
    check_inputs,
    from_dict,
    to_dict,
)
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model import counting
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.mtp import HEADS, Head
from dsv3_jax.model.parameters import param
from dsv3_jax.ops import balance, routing
from dsv3_jax.runs.folder import read_made
from dsv3_jax.training.loss import compute_loss
from dsv3_jax.training.state import Job
from dsv3_jax.training.step import make_step

NO_GROUPS = dict(num_groups=1, groups_per_token=1)
PLAIN = replace(MODEL, num_layers=1, mtp_depth=0, **NO_GROUPS)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2, eps=0.1)
SEGMENTS = np.array([[1] * 9 + [2] * 7, [1] * 16, [1] * 12 + [0] * 4, [1] * 5 + [2] * 3 + [0] * 8])


def run_of(model: ModelConfig, **optim):
    return make_run("nowhere", model=model, optim=replace(OPTIM, **optim))


def make_batch():
    return packed_batch(np.random.default_rng(0), SEGMENTS)


@pytest.mark.long
def test_a_new_router_and_a_new_rule_are_a_row_each(monkeypatch):
    """The router takes the first experts, in turn by position; the rule notes the load."""

    def in_turn(x, cfg):
        steps = jnp.arange(cfg.experts_per_token, dtype=jnp.int32)
        ids = (x.tokens.ids[:, None] + steps[None]) % cfg.num_experts
        scores = jax.nn.softmax(x.logits, axis=-1)
        return routing.Routing(ids, jnp.take_along_axis(scores, ids, axis=1), scores)

    router = routing.Router(in_turn, reads_bias=True, reads_tokens=True)
    noted = balance.Rule(lambda bias, load, _, rate: bias + rate * load)
    monkeypatch.setitem(routing.ROUTERS, "in turn", router)
    monkeypatch.setitem(balance.RULES, "noted", noted)
    run = run_of(replace(PLAIN, router="in turn", balance=Balance(rule="noted", bias_rate=0.25)))
    batch = make_batch()
    before = fresh_state(run)
    bias = np.asarray(before.bias["sparse"]["moe"]["bias"][...])
    after, metrics = make_step(Job(run))(before, batch)
    tokens = np.asarray(batch["tokens"])[SEGMENTS != 0]
    load = np.bincount(np.concatenate([tokens, tokens + 1]) % 8, minlength=8)
    np.testing.assert_array_equal(metrics["load"][0], load)
    moved = after.bias["sparse"]["moe"]["bias"][...][0]
    np.testing.assert_allclose(moved, bias[0] + 0.25 * load, rtol=1e-6)


PROGRAM = """
import jax
import jax.numpy as jnp

import dsv3_jax as ds
from dsv3_jax.ops.balance import Rule
from dsv3_jax.ops.routing import Router, Routing


def my_hash(x, cfg):
    ids = (x.tokens.ids[:, None] + jnp.arange(cfg.experts_per_token)) % cfg.num_experts
    scores = jax.nn.softmax(x.logits, axis=-1)
    return Routing(ids, jnp.take_along_axis(scores, ids, axis=1), scores)


print("the program runs")
ds.register_router("my_hash", Router(my_hash, reads_bias=True, reads_tokens=True))
ds.register_rule("drift", Rule(lambda bias, load, _, rate: bias + rate))
"""
COMMANDS = """
import shlex, sys
from dsv3_jax.cli.main import main

for line in sys.stdin:
    print("code", main(shlex.split(line)), flush=True)
"""


@pytest.mark.long
def test_a_run_of_registered_names_is_opened_by_all_commands(tmp_path, root):
    """Its run.json keeps the program's name; without `--import` it is named, and does not run."""
    (tmp_path / "mine.py").write_text(PROGRAM)
    model = replace(PLAIN, router="my_hash", balance=Balance(rule="drift"))
    words = shlex.join(flags(make_run(write_text(tmp_path / "text"), model=model, steps=2)))
    train = f"train tiny {words} --out run"

    def said_by(*commands):
        how = {"cwd": tmp_path, "env": environment(root), "capture_output": True, "text": True}
        program = [sys.executable, "-c", SPEND_NO_SECONDS + COMMANDS]
        found = subprocess.run(program, input="\n".join(commands), timeout=600, **how)
        return re.findall(r"^code (\d+)$", found.stdout, re.M), found.stdout, found.stderr

    codes, out, error = said_by(train, f"{train} --import mine.py")
    assert codes == ["2", "0"] and out.count("the program runs") == 1, (out, error)
    assert "router='my_hash' is not one of " in error
    assert "; --import NAME imports a program that registers more" in error
    assert read_made(tmp_path / "run")[0]["imports"] == ["mine.py"]

    opening = "generate run --max-new-tokens 3", "eval run --batches 1", "convert run released"
    opening = *opening, "stats run --batches 1 --draws 9 --worth-tokens 32"
    codes, out, error = said_by(*opening, f"train tiny {words} --start run --out more")
    assert codes == ["2"] * 5 and "the program runs" not in out
    assert error.count("router='my_hash' of the run in run is registered by a program") == 5, error
    assert error.count("if you trust that program, add --import mine.py\n") == 5

    codes, out, error = said_by(*(f"{command} --import mine.py" for command in opening))
    assert codes == ["0", "0", "2", "0"] and out.count("the program runs") == 1, (out, error)
    assert "router='my_hash' has no released format" in error


def test_a_program_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch, capsys):
    """A failing file leaves no module; a file may not take the name of another module."""
    main = unhooked_cli().main
    files = {name: tmp_path / f"{name}.py" for name in ("failing", "ending", "json")}
    for name, text in {"failing": "1 / 0", "ending": "raise SystemExit(0)", "json": ""}.items():
        files[name].write_text(text)
    wanted = {
        f"{files['failing']}": "fails with ZeroDivisionError: division by zero",
        f"{files['ending']}": "fails with SystemExit: 0",
        f"{files['json']}": "has the name of the module 'json'; rename it",
        "no_such_module": "fails with ModuleNotFoundError: No module named 'no_such_module'",
        "": "is no name; give a Python file or a module",
    }
    for name, words in wanted.items():
        assert main(["info", "tiny", "--import", name]) == 2
        assert f"dsv3: import={name!r} {words}" in capsys.readouterr().err
    assert not {"failing", "ending"} & sys.modules.keys()


class HydraHead(Head):
    """h^k = h^{k-1} + silu([e, h^{k-1}] W_1) W_2, e: token i+k's embedding. arXiv 2402.05109."""

    remembers = False

    def __init__(self, cfg, *, rngs):
        self.w_1 = param(rngs, (2 * cfg.dim, cfg.dim), ("dim", None), cfg.init_std)
        self.w_2 = param(rngs, (cfg.dim, cfg.dim), ("dim", None), cfg.init_std)

    def __call__(self, h, ctx, embedded=None):
        hidden = ctx.run("product", jnp.concatenate([embedded, h], axis=-1), self.w_1[...])
        return h + ctx.run("product", jax.nn.silu(hidden), self.w_2[...]), ctx, {}


@pytest.mark.long
def test_a_new_kind_of_head_is_a_class_and_two_rows(monkeypatch):
    """Its losses are the equation's, and its drafts, beyond its depth too, change no text."""
    kind = HeadKind("Hydra heads", reads_tokens=True, has_experts=False, reads_raw=False)
    monkeypatch.setitem(HEAD_KINDS, "hydra", kind)
    monkeypatch.setitem(HEADS, "hydra", HydraHead)
    # so few tokens that drafts are right at times
    cfg = replace(LIGHT, vocab_size=4, mtp_kind="hydra", mtp_depth=2)
    assert from_dict(ModelConfig, to_dict(cfg)) == cfg
    assert counting.size(cfg).mtp == 2 * (2 * 16 * 16 + 16 * 16)
    batch = make_batch()
    batch["tokens"] %= 4
    model = random_model(cfg, seed=2, execution=DENSE)
    found = jax.jit(lambda batch: compute_loss(model, batch, 0.3).mtp)(batch)
    params, arrays = parameters(model), jax.tree.map(np.asarray, batch)
    ctx = reference.Context(replace(cfg, mtp_depth=0), arrays["positions"], arrays["segment_ids"])
    h, wanted = reference.transformer(ctx, params, arrays["tokens"]).hidden, []
    for k, p in enumerate(params["mtp"].values(), start=1):
        h = h[:, : 16 - k]
        gate = np.concatenate([params["embed"][arrays["tokens"][:, k:]], h], axis=-1) @ p["w_1"]
        h = h + gate / (1 + np.exp(-gate)) @ p["w_2"]
        wanted.append(reference.cross_entropy(ctx, h @ params["head"], arrays["tokens"], k + 1))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    prompts = [[1], [2, 3, 0, 1, 1], [0, 3]]
    drafted = generate(model, prompts, 20, draft="mtp", draft_length=3)
    assert drafted.tokens == generate(model, prompts, 20).tokens
    assert len(drafted.acceptance) == 3 and 0 < drafted.acceptance[2] <= drafted.acceptance[0] < 1


# names, loops and meshes of one's own


def test_names_are_added_once(monkeypatch):
    monkeypatch.delitem(routing.ROUTERS, "hash")
    ds.register_router("hash", routing.Router(lambda x, cfg: x))
    with refused("router='hash' is taken"):
        ds.register_router("hash", routing.Router(lambda x, cfg: x))
    with refused("rule='sign' is taken"):
        ds.register_rule("sign", None)


def test_a_loop_of_ones_own_moves_every_bias_as_the_reference():
    cfg = ds.replace(LIGHT, mtp_kind="deepseek", mtp_depth=1, balance=ds.Balance(bias_rate=0.25))
    model = random_model(cfg, execution=DENSE)
    before = jax.tree.leaves(jax.tree.map(np.asarray, nnx.state(model, RouterBias)))
    out = jax.jit(model)(jnp.arange(16, dtype=jnp.int32).reshape(2, 8))
    with refused("routings do not belong to"):
        ds.balance.update(model, out.routing)
    ds.balance.update(model, out.routing, *out.mtp_routing)
    moved = jax.tree.leaves(jax.tree.map(np.asarray, nnx.state(model, RouterBias)))
    # as the leaves' paths
    loads = [routing.load for routing in (*out.mtp_routing, out.routing)]
    for old, new, load in zip(before, moved, loads, strict=True):
        layers = zip(*map(np.atleast_2d, (old, load)), strict=True)
        want = [reference.updated_bias(*layer, 0.25) for layer in layers]
        np.testing.assert_allclose(np.atleast_2d(new), want, rtol=1e-6)


@pytest.mark.parametrize("names", [("dp", "ep"), ("data", "expert")])
def test_a_mesh_of_other_axes_is_refused_in_one_sentence(names):
    moe = ds.MoE(LIGHT, rngs=nnx.Rngs(0))
    with jax.set_mesh(jax.make_mesh((2, 1), names)), refused("mesh axes=.* are not"):
        jax.eval_shape(moe, jnp.ones((2, 4, LIGHT.dim)))


def test_inputs_of_another_shape_or_kind_are_refused_in_one_sentence():
    ids = np.ones((2, 4), np.int32)
    of_tokens, same = "is not an array [B, T] of integers", "shape (2, 4), as tokens is"
    for inputs, sentence in (
        ({"tokens": [[1, 2]]}, f"tokens of type list {of_tokens}"),
        ({"tokens": ids[0]}, f"tokens of shape (4,) {of_tokens}"),
        ({"tokens": ids.astype(float)}, f"tokens of shape (2, 4) {of_tokens}"),
        ({"tokens": ids, "segment_ids": ids[:1]}, "segment_ids is not an array of " + same),
    ):
        with refused(f"^{re.escape(sentence)}$"):
            check_inputs(None, **inputs)
    check_inputs(None, tokens=ids, segment_ids=ids, positions=None)
