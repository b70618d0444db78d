"""A new router, rule or head is a row or two; loops and meshes of one's own use the parts."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, random_model
from runs import MODEL, by_command, flags, fresh_state, make_run, packed_batch, refused, write_text

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import Balance, check_inputs
from dsv3_jax.host import imports
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.ops import balance, routing
from dsv3_jax.runs.folder import read_made
from dsv3_jax.training.router_bias import updated_bias
from dsv3_jax.training.state import Job
from dsv3_jax.training.step import make_step

PLAIN = replace(MODEL, num_layers=1, mtp_depth=0, num_groups=1, groups_per_token=1)
SEGMENTS = np.array([[1] * 9 + [2] * 7, [1] * 16, [1] * 12 + [0] * 4, [1] * 5 + [2] * 3 + [0] * 8])


# The router takes experts in turn, by the token's id; the rule adds the load up.
PROGRAM = """
import jax
import jax.numpy as jnp

import dsv3_jax as ds
from dsv3_jax.ops.balance import Rule
from dsv3_jax.ops.routing import Router, Routing


def in_turn(x, cfg):
    ids = (x.tokens.ids[:, None] + jnp.arange(cfg.experts_per_token)[None]) % cfg.num_experts
    scores = jax.nn.softmax(x.logits, axis=-1)
    return Routing(ids, jnp.take_along_axis(scores, ids, axis=1), scores)


print("the program runs")
ds.register_router("in turn", Router(in_turn, reads_bias=True, reads_tokens=True))
ds.register_rule("noted", Rule(lambda bias, load, _, rate: bias + rate * load))
"""
EXTENDED = replace(PLAIN, router="in turn", balance=Balance(rule="noted", bias_rate=0.25))


@pytest.fixture
def forget():
    """Return a function that forgets imported programs, as a new process does; also do it last."""
    tables = [(table, dict(table)) for table in (routing.ROUTERS, balance.RULES)]

    def forget():
        for table, rows in tables:
            table.clear()
            table.update(rows)
        sys.modules.pop("mine", None)
        imports.IMPORTED.clear()

    yield forget
    forget()


@pytest.mark.long
@pytest.mark.usefixtures("forget")
def test_a_new_router_and_a_new_rule_are_a_row_each(rng):
    exec(PROGRAM, {})
    run, batch = make_run("nowhere", model=EXTENDED), packed_batch(rng, SEGMENTS)
    before = fresh_state(run)
    bias = np.asarray(before.bias["sparse"]["moe"]["bias"][...])
    after, metrics = make_step(Job(run))(before, batch)
    tokens = np.asarray(batch["tokens"])[SEGMENTS != 0]
    load = np.bincount(np.concatenate([tokens, tokens + 1]) % 8, minlength=8)
    np.testing.assert_array_equal(metrics["load"][0], load)
    moved = after.bias["sparse"]["moe"]["bias"][...][0]
    np.testing.assert_allclose(moved, bias[0] + 0.25 * load, rtol=1e-6)


# commands that open a run, and their exit code
OPENING = {
    "generate run --max-new-tokens 3": 0,
    "eval run --batches 1": 0,
    "stats run --batches 1 --draws 9 --worth-tokens 32": 0,
    "convert run released": 2,
}


@pytest.mark.long
def test_a_run_of_registered_names_is_opened_by_all_commands(tmp_path, monkeypatch, forget):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PROGRAM)
    settings = flags(make_run(write_text(Path("text")), model=EXTENDED, steps=2))
    train, importing = ["train", "tiny", *settings, "--out"], ["--import", "mine.py"]

    code, _, error = by_command(*train, "run")
    assert code == 2 and "router='in turn' is not one of " in error
    assert "; --import NAME imports a program that registers more" in error
    code, out, error = by_command(*train, "run", *importing)
    assert code == 0 and out.count("the program runs") == 1, error
    assert read_made(Path("run"))[0]["imports"] == ["mine.py"]

    forget()
    for command in (*map(str.split, OPENING), [*train, "more", "--start", "run"]):
        code, out, error = by_command(*command)
        assert code == 2 and "the program runs" not in out
        assert "router='in turn' of the run in run is registered by a program" in error
        assert "if you trust that program, add --import mine.py\n" in error
    for command, wanted in OPENING.items():
        code, _, error = by_command(*command.split(), *importing)
        assert code == wanted, error
    assert "router='in turn' has no released format" in error


def test_a_program_that_cannot_be_imported_is_one_sentence(tmp_path):
    files = {name: tmp_path / f"{name}.py" for name in ("failing", "ending", "json")}
    for name, text in {"failing": "1 / 0", "ending": "raise SystemExit(0)", "json": ""}.items():
        files[name].write_text(text)
    for name, words in {
        files["failing"]: "fails with ZeroDivisionError: division by zero",
        files["ending"]: "fails with SystemExit: 0",
        files["json"]: "has the name of the module 'json'; rename it",
        "no_such_module": "fails with ModuleNotFoundError: No module named 'no_such_module'",
        "": "is no name; give a Python file or a module",
    }.items():
        code, _, error = by_command("info", "tiny", "--import", name)
        assert code == 2 and f"dsv3: import={str(name)!r} {words}" in error
    assert not {"failing", "ending"} & sys.modules.keys()


# names, loops and meshes of one's own


def test_names_are_added_once(monkeypatch):
    monkeypatch.delitem(routing.ROUTERS, "hash")
    ds.register_router("hash", routing.Router(lambda x, cfg: x))
    for register, name, row, sentence in (
        (ds.register_router, "hash", routing.ROUTERS["hash"], "router='hash' is taken"),
        (ds.register_rule, "sign", balance.RULES["sign"], "rule='sign' is taken"),
        (ds.register_router, "own", len, "router='own': <built-in function len> is no Router"),
        (ds.register_rule, "own", len, "rule='own': <built-in function len> is no Rule"),
    ):
        with refused(sentence):
            register(name, row)


def changed(**arrays):
    """A router that gives these arrays instead of those of `topk`."""

    def route(x, cfg):
        found = routing.topk(x.logits, k=cfg.experts_per_token)
        return found._replace(**{name: change(found) for name, change in arrays.items()})

    return route


# (what a router gives, the error)
WRONG = [
    (lambda x, cfg: None, "gives NoneType, not a Routing"),
    (changed(expert_ids=lambda found: found.expert_ids[:, :1]), "expert_ids of shape (8, 1)"),
    (changed(gates=lambda found: found.gates[:, :1]), "gives gates of shape (8, 1), not (8, 2)"),
    (changed(scores=lambda found: found.gates), "gives scores of shape (8, 2), not (8, 8)"),
    (changed(expert_ids=lambda found: found.gates), "gives expert_ids of dtype float32, not int32"),
    (changed(expert_ids=lambda found: found.expert_ids + 1), "experts [[1, 8]], which are not 2"),
    (changed(expert_ids=lambda found: found.expert_ids * 0), "experts [[0, 0]], which are not 2"),
]


@pytest.mark.parametrize("route, sentence", WRONG, ids=[sentence for _, sentence in WRONG])
def test_what_a_router_gives_is_checked_before_a_kernel_reads_it(route, sentence, monkeypatch):
    monkeypatch.setitem(routing.ROUTERS, "own", routing.Router(route))
    moe = ds.MoE(replace(PLAIN, router="own"), rngs=nnx.Rngs(0))
    with refused(f"router='own' .*{re.escape(sentence)}"):
        moe(jnp.ones((2, 4, PLAIN.dim)))


def test_a_rule_that_gives_another_shape_is_refused():
    bias = nnx.State({"bias": RouterBias(jnp.zeros((2, 8)))})
    rule = balance.Rule(lambda bias, load, _, rate: bias[:, :1])
    with refused(re.escape("the balance rule gives bias of shape (2, 1), not (2, 8)")):
        updated_bias(bias, jnp.ones((2, 8)), jnp.float32(1), rule)


@pytest.mark.long
def test_a_loop_of_ones_own_moves_every_bias_as_the_reference():
    cfg = ds.replace(LIGHT, mtp_kind="meta", mtp_depth=3, balance=ds.Balance(bias_rate=0.25))
    model = random_model(cfg, execution=DENSE)

    def biases():
        return jax.tree.leaves(jax.tree.map(np.asarray, nnx.state(model, RouterBias)))

    before, out = biases(), jax.jit(model)(jnp.arange(16, dtype=jnp.int32).reshape(2, 8))
    with refused("routings do not belong to"):
        ds.balance.update(model, out.routing)
    ds.balance.update(model, out.routing, *out.mtp_routing)
    # in the order of the leaves' paths: heads, trunk
    routings = [*out.mtp_routing, out.routing]
    for old, new, found in zip(before, biases(), routings, strict=True):
        want = reference.updated_bias(old.ravel(), found.load.ravel(), 0.25)
        np.testing.assert_allclose(new.ravel(), want, rtol=1e-6)


@pytest.mark.parametrize("names", [("dp", "ep"), ("data", "expert")])
def test_a_mesh_of_other_axes_is_refused_in_one_sentence(names):
    moe = ds.MoE(LIGHT, rngs=nnx.Rngs(0))
    with jax.set_mesh(jax.make_mesh((2, 1), names)), refused("mesh axes=.* are not"):
        jax.eval_shape(moe, jnp.ones((2, 4, LIGHT.dim)))


IDS = np.ones((2, 4), np.int32)
INPUTS = [
    ({"tokens": [[1, 2]]}, "tokens of type list is not an array [B, T] of integers"),
    ({"tokens": IDS[0]}, "tokens of shape (4,) is not an array [B, T] of integers"),
    ({"tokens": IDS * 1.0}, "tokens of shape (2, 4) is not an array [B, T] of integers"),
    (
        {"tokens": IDS, "segment_ids": IDS[:1]},
        "segment_ids is not an array of shape (2, 4), as tokens is",
    ),
]


@pytest.mark.parametrize("inputs, sentence", INPUTS)
def test_inputs_of_another_shape_or_kind_are_refused_in_one_sentence(inputs, sentence):
    with refused(f"^{re.escape(sentence)}$"):
        check_inputs(None, **inputs)
