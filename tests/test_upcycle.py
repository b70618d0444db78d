"""Upcycling: a mixture made of a dense model computes the same, and begins with what was asked."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE as FAST
from models import INDEXED, LIGHT, flat, forward, random_model, small
from runs import MODEL, assert_bitwise, by_command, make_run, refused, save_run
from runs import write_text as text_in

import dsv3_jax as ds
from dsv3_jax.model.upcycle import NOISE, Upcycling, redraw, upcycle, upcycled_config
from dsv3_jax.ops import routing
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.start import on_weights, open_start

DENSE = small(num_layers=2, num_dense_layers=2, capacity_factor=0.5)  # dropped no token
MIXTURE = replace(LIGHT, mtp_depth=1)
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 37, (2, 9)), jnp.int32)


def arrays_of(model):
    return flat(nnx.state(model))


@pytest.mark.parametrize(
    ("how", "width", "scale"),
    [
        pytest.param(Upcycling(4), 20, 1.0, marks=pytest.mark.long),
        (Upcycling(12, parts=4), 5, 4.0),
        pytest.param(Upcycling(6, parts=2, experts_per_token=2), 10, 2.0, marks=pytest.mark.long),
    ],
    ids=["copies", "quarters", "one copy of halves"],
)
def test_a_mixture_begins_as_the_dense_model(how, width, scale):
    """Its logits are equal to rounding, and a token's experts are all parts of some copies."""
    dense = random_model(DENSE, execution=FAST)
    mixture = upcycle(dense, how)
    cfg = mixture.cfg
    assert cfg == upcycled_config(DENSE, how)
    assert (cfg.num_dense_layers, cfg.expert_dim, cfg.routed_scale) == (0, width, scale)
    found, wanted = forward(mixture, TOKENS), forward(dense, TOKENS).logits
    # some tens of roundings of 6e-8 of values as large as a logit
    np.testing.assert_allclose(found.logits, wanted, rtol=0, atol=2e-6 * abs(wanted).max())

    copies = how.experts // how.parts
    part, copy = np.divmod(np.sort(found.routing.expert_ids, axis=-1), copies)
    chosen = cfg.experts_per_token // how.parts
    assert (part == np.repeat(np.arange(how.parts), chosen)).all()
    assert (copy.reshape(*copy.shape[:-1], how.parts, chosen) == copy[..., None, :chosen]).all()
    # Tokens do not all use the same copies.
    assert len(np.unique(copy)) == copies


@pytest.mark.parametrize("cfg", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_all_but_experts_and_routers_is_as_it_was(cfg):
    cfg = replace(cfg, **INDEXED)  # an indexer has a bias of another kind
    model = random_model(cfg)
    old, new = arrays_of(model), arrays_of(upcycle(model, Upcycling(16)))
    if cfg.num_dense_layers:
        old = {("sparse", *path[1:]) if path[0] == "dense" else path: x for path, x in old.items()}
    routed = {("moe", "w_router"), ("moe", "bias")}
    kept = [path for path in new if "experts" not in path and path[-2:] not in routed]
    assert any("indexer" in path and path[-1] == "bias" for path in kept)
    assert_bitwise([new[path] for path in kept], [old[path] for path in kept])
    assert {path for path in old if "ffn" not in path} <= new.keys()


@pytest.mark.long
def test_more_experts_of_a_mixture_are_copies_with_their_router_rows():
    """Sent to any copy of its old experts, a token gets the old output, up to the router's noise.

    Heads too. Without the noise the copies of an expert have one row of the router.
    """
    old = random_model(MIXTURE, execution=FAST)
    new = upcycle(old, Upcycling(24))
    assert new.cfg == replace(MIXTURE, num_experts=24)
    wanted = forward(old, TOKENS)
    copy = np.arange(3, dtype=np.int32)  # of a token's first, second and third expert
    routings = (wanted.routing, *wanted.mtp_routing)
    trunk, *heads = [jnp.asarray(3 * routing.expert_ids + copy) for routing in routings]
    found = nnx.jit(lambda model: model(TOKENS, expert_ids=trunk, mtp_expert_ids=heads))(new)
    for a, b in ((found.logits, wanted.logits), (found.mtp_logits[0], wanted.mtp_logits[0])):
        assert 0 < abs(a - b).max() < 5 * NOISE * abs(b).max()

    before, after = arrays_of(old), arrays_of(new)
    for at in (("sparse", "moe"), ("mtp", 0, "block", "moe")):
        for name in ("w_gate", "w_up", "w_down"):
            experts = after[*at, "experts", name]
            assert (experts == np.repeat(before[*at, "experts", name], 3, axis=-3)).all()
        assert (after[*at, "bias"] == np.repeat(before[*at, "bias"], 3, axis=-1)).all()
        noise = after[*at, "w_router"] - np.repeat(before[*at, "w_router"], 3, axis=-1)
        # of 16 · 24 numbers or more: five standard errors of a deviation
        assert abs(noise.std() / before[*at, "w_router"].std() / NOISE - 1) < 5 / np.sqrt(2 * 384)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_as_many_hidden_units_are_drawn_anew_as_asked(rng, share):
    """The same units of an expert's three matrices; all others are bitwise as they were.

    A unit's new weights have the mean and the deviation of those that they replace.
    """
    lead, dim, width = (2, 3), 200, 10
    shapes = {"w_gate": (dim, width), "w_up": (dim, width), "w_down": (width, dim)}
    old = [
        (1 + i + (2 + i) * rng.standard_normal((*lead, *shape))).astype(np.float32)
        for i, shape in enumerate(shapes.values())
    ]
    new = [np.asarray(x) for x in redraw(*map(jnp.asarray, old), share, jax.random.key(0))]
    units = [[np.swapaxes(x, -1, -2) if i < 2 else x for i, x in enumerate(x)] for x in (old, new)]
    for at in np.ndindex(lead):
        changed = [(a[at] != b[at]) for a, b in zip(*units, strict=True)]
        chosen = changed[0].any(axis=1)
        assert chosen.sum() == round(share * width)
        for one, a, b in zip(changed, *units, strict=True):
            assert (one == chosen[:, None]).all()
            was, drawn = a[at][chosen], b[at][chosen]
            error = 5 / np.sqrt(was.size)  # five standard errors, in deviations
            assert abs(drawn.mean() - was.mean()) < error * was.std()
            assert abs(drawn.std() - was.std()) < error * was.std()


@pytest.fixture
def dense_run(tmp_path):
    """A run folder of a dense model with a checkpoint of step 7."""
    model = replace(MODEL, num_layers=1, num_dense_layers=1, mtp_depth=0)
    save_run(tmp_path / "run", make_run(text_in(tmp_path / "text"), model=model))
    return tmp_path / "run"


@pytest.mark.long
def test_the_command_makes_a_run_to_start_from(dense_run, tmp_path):
    out, how = tmp_path / "mixture", Upcycling(8, parts=2)
    code, said, _ = by_command("convert", dense_run, out, "--experts", 8, "--parts", 2)
    sentence = "made of the checkpoint of step 7, with 4 of 8 experts a token"
    assert code == 0 and sentence in said.replace("\n", " ")
    made, dense = load_run(out), load_run(dense_run)
    assert_bitwise(arrays_of(made.model), arrays_of(upcycle(dense.model, how)))
    run = on_weights(make_run("unread"), open_start(str(out)))
    assert made.step == 0 and run.model == made.run.model and run.data == dense.run.data

    ds.hf.convert(dense_run, tmp_path / "released", quiet=True)
    ds.hf.convert(tmp_path / "released", tmp_path / "again", quiet=True, upcycling=how)
    assert_bitwise(arrays_of(ds.load_model(tmp_path / "again")), arrays_of(made.model))


def test_what_cannot_be_made_is_refused(dense_run, tmp_path, monkeypatch):
    by_id = routing.ROUTERS["hash"]  # registered by a program
    monkeypatch.setitem(routing.ROUTERS, "by id", by_id)
    for cfg, experts, how, sentence in (
        (DENSE, 4, dict(parts=3), "parts=3 does not divide dense_dim=20"),
        (DENSE, 6, dict(parts=4), "parts=4 does not divide experts=6"),
        (DENSE, 8, dict(parts=4, experts_per_token=6), "parts=4 does not divide experts_per_token"),
        (DENSE, 4, dict(experts_per_token=5), "experts=4 is fewer than experts_per_token=5"),
        (DENSE, 4, dict(experts_per_token=1), "experts_per_token=1 has a gate of 1"),
        (DENSE, 4, dict(redrawn=0.01), "redrawn=0.01 is none of an expert's 20 hidden"),
        (replace(DENSE, mtp_depth=1), 4, {}, "heads of mtp_kind='deepseek' have experts"),
        (MIXTURE, 12, {}, "experts=12 is not 2, 3, … times the num_experts=8"),
        (MIXTURE, 8, {}, "experts=8 is not 2, 3, … times the num_experts=8"),
        (MIXTURE, 16, dict(parts=2), "parts=2 divides dense layers"),
        (MIXTURE, 16, dict(experts_per_token=4), "experts_per_token=4 is not the 3 that the model"),
        (replace(MIXTURE, router="hash"), 16, {}, "router='hash' is not supported"),
        (replace(MIXTURE, router="by id"), 16, {}, "router='by id' is not supported"),
    ):
        with refused(sentence):
            upcycled_config(cfg, Upcycling(experts, **how))
    with refused("dtype='bfloat16' is for released weights"):
        ds.hf.convert(dense_run, tmp_path / "out", dtype="bfloat16", upcycling=Upcycling(4))
    assert not (tmp_path / "out").exists()
