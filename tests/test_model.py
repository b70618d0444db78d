"""The model, its heads and modules against the reference page; which outputs depend on what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, forward, parameters, random_model, small, tokens_of
from runs import refused

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import Execution, Yarn
from dsv3_jax.model import moe
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer, abstract

BATCH, LENGTH = 2, 14
# Row 0: documents of 6 and 5 tokens, then padding. Row 1: one of 14.
SEGMENTS = np.array([[1] * 6 + [2] * 5 + [0] * 3, [1] * 14], np.int32)
POSITIONS = np.array([[*range(6), *range(5), *range(3)], [*range(14)]], np.int32)
TOKENS = np.asarray(tokens_of(small(), BATCH, LENGTH))

YARN = Yarn(factor=8.0, original_max_positions=16, beta_fast=4.0, mscale=1.3, mscale_all_dim=0.7)
# layer, sparse, without groups
ONE = dict(num_dense_layers=0, num_layers=1, num_groups=1, groups_per_token=1)
AUTO, XLA = Execution(), Execution(kernels="xla")
HEADS = {  # of each kind, with other attentions and routers: the model and how it is computed
    "deepseek": (small(num_layers=2, mtp_depth=2), AUTO),
    "meta": (
        small(
            mtp_kind="meta", mtp_depth=2, mtp_input="raw", router="topk", num_shared_experts=0,
            attention="gqa", num_heads=6, num_kv_heads=2, **ONE,
        ),
        DENSE,
    ),
    "medusa": (
        small(
            mtp_kind="medusa", mtp_depth=3, router="dense", experts_per_token=8,
            attention="mha", qk_norm=True, yarn=YARN, tie_embeddings=True, **ONE,
        ),
        AUTO,
    ),
    "eagle": (
        small(
            mtp_kind="eagle", mtp_depth=1, attention="mqa", num_heads=4, rope_interleaved=False,
            capacity_factor=8 / 3 + 0.01, **ONE,  # E / K: an expert may take all
        ),
        XLA,
    ),
}  # fmt: skip
V2 = small(
    router="softmax", group_score="max", normalize_gates=False, routed_scale=4.0,
    num_shared_experts=2, yarn=YARN, num_layers=2, num_dense_layers=0, q_latent_dim=None,
    rope_interleaved=False, mtp_depth=1, mtp_input="raw",
)  # fmt: skip
DSA = small(
    attention="dsa", index_heads=2, index_dim=9, index_topk=5, mtp_depth=1,
    index_types=("full", "full", "shared"),
)  # fmt: skip
RAGGED_DOT = Execution(kernels="xla,grouped_swiglu=ragged_dot")
CASES = HEADS | {"v2": (V2, RAGGED_DOT), "dsa": (DSA, DENSE)}


def run(model, tokens=TOKENS):
    return forward(model, *map(jnp.asarray, (tokens, SEGMENTS, POSITIONS)))


@pytest.fixture(scope="module", params=HEADS)
def model(request):
    cfg, execution = HEADS[request.param]
    return random_model(cfg, execution=execution)


def pairs(a, b):
    """The logits of both: the model's own first, then each head's."""
    return zip((a.logits, *a.mtp_logits), (b.logits, *b.mtp_logits), strict=True)


def read_by(model, k: int) -> int:
    """Tokens that head k reads beyond the model's own head, which is 0 here."""
    return k if model.cfg.head_kind.reads_tokens else 0


# values


@pytest.mark.parametrize("name", CASES)
def test_model_equals_the_reference(name):
    cfg, execution = CASES[name]
    model = random_model(cfg, execution=execution)
    out = run(model)
    ctx = reference.Context(cfg, POSITIONS, SEGMENTS)
    expected = reference.transformer(ctx, parameters(model), TOKENS)
    assert len(out.mtp_logits) == cfg.mtp_depth
    for k, (got, want) in enumerate(pairs(out, expected)):
        assert got.dtype == jnp.float32
        assert got.shape == (BATCH, LENGTH - k, cfg.vocab_size)
        # float32 against float64: some hundred roundings of 6e-8 of values as large as a logit
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * want.std())
        # no copy of the trunk's own
        assert k == 0 or np.abs(want - expected.logits[:, : LENGTH - k]).max() > 0.1
    layers = len(out.routing.expert_ids)
    trunk = [jax.tree.map(lambda a, i=i: a[i], out.routing) for i in range(layers)]
    routings = zip((*trunk, *out.mtp_routing), expected.routing, strict=True)
    for k, (got, want) in enumerate(routings, start=1 - layers):
        ids, gates = want.expert_ids, want.gates
        if cfg.router == "dense":  # the model lists all experts by id, the reference by score
            gates, ids = np.take_along_axis(gates, ids.argsort(-1), axis=-1), np.sort(ids, axis=-1)
        np.testing.assert_array_equal(got.expert_ids, ids)
        np.testing.assert_allclose(got.gates, gates, rtol=1e-4)
        here = SEGMENTS[:, : ids.shape[1]]
        read = SEGMENTS[:, read_by(model, max(k, 0)) :][:, : ids.shape[1]]
        counted = (here != 0) & (here == read)
        np.testing.assert_array_equal(want.counted, counted)
        load = np.bincount(ids[counted].ravel(), minlength=cfg.num_experts)
        np.testing.assert_array_equal(got.load, load)


MODULES = {
    ds.MLA: (small(), reference.mla),
    ds.GQA: (small(attention="gqa", num_heads=6, num_kv_heads=2), reference.gqa),
    ds.MoE: (small(), reference.moe),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules_alone_equal_the_reference(rng, kind):
    cfg, page = MODULES[kind]
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(cfg, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda a: 0.3 * rng.standard_normal(a.shape, np.float32), state)
    x = rng.standard_normal((BATCH, LENGTH, cfg.dim)).astype(np.float32)
    where = {"segment_ids": SEGMENTS, "positions": POSITIONS}
    where = {"mask": SEGMENTS != 0} if kind is ds.MoE else where
    got = jax.jit(lambda state, x, of: nnx.merge(graphdef, state)(x, **of))(state, x, where)
    ctx = reference.Context(cfg, POSITIONS, SEGMENTS)
    want = page(ctx, parameters(nnx.merge(graphdef, state)), np.float64(x))
    if kind is ds.MoE:
        (got, routing), (want, chosen) = got, want
        np.testing.assert_array_equal(routing.expert_ids, chosen.expert_ids)
        load = np.bincount(chosen.expert_ids[SEGMENTS != 0].ravel(), minlength=cfg.num_experts)
        np.testing.assert_array_equal(routing.load, load)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * want.std())


# what depends on what


def test_what_the_logits_depend_on(model):
    """In row 0 on all tokens of their segment and no others; in row 1 on no later ones.

    To the bit. A head's last entries of a segment read tokens of the next one.
    """
    base = run(model)
    for place, theirs in ((3, (0, 6)), (13, (6, 11)), (9, (11, 14))):
        tokens = TOKENS.copy()
        for changed in ((0, slice(*theirs)), (1, place)):
            tokens[changed] = (tokens[changed] + 1) % small().vocab_size
        for k, (left, right) in enumerate(pairs(base, run(model, tokens))):
            same = (left == right).all(axis=-1)
            for own in ((0, 6), (6, 11)):
                whole = slice(own[0], own[1] - read_by(model, k))
                assert same[0, whole].all() == (theirs != own), (k, theirs, own)
            first = place - read_by(model, k)  # the first entry that reads the token
            assert same[1, :first].all() and not same[1, first : first + 1].any(), (k, place)


def test_rows_that_the_model_cannot_read_are_refused():
    """The embedding would clip a token that is no id, and answer for another one."""
    model = abstract(small(mtp_depth=2))
    for tokens, sentence in (
        (np.zeros((1, 129)), "length 129 is over the model's max_positions=128"),
        (np.zeros((1, 2)), "length 2 leaves nothing for mtp_depth=2"),
        (np.full((1, 5), -1), "tokens holds -1, which is no id of a vocabulary of 37$"),
        (np.full((1, 5), 37), "tokens holds 37, which is no id of a vocabulary of 37$"),
    ):
        with refused(f"^{sentence}"):
            model(jnp.asarray(tokens, jnp.int32))


# parameters


def test_new_parameters_are_drawn_as_the_configuration_and_the_seed_say():
    cfg = small(num_layers=2, num_dense_layers=0, num_shared_experts=0, dim=32, init_std=0.02)
    make = jax.jit(lambda key: nnx.state(Transformer(cfg, rngs=nnx.Rngs(key))))
    state, other = make(jax.random.key(1)), make(jax.random.key(2))
    assert (np.asarray(state["embed"][...]) != np.asarray(other["embed"][...])).all()
    starts = []
    for path, variable in nnx.to_flat_state(state):
        value = np.asarray(variable[...])
        assert value.dtype == np.float32
        if not variable.get_metadata().get("decay", True):  # a norm's scale
            assert (value == 1).all()
        elif isinstance(variable, RouterBias):
            assert (value == 0).all()
        else:  # within five standard deviations of a sample's own
            assert value.std() == pytest.approx(0.02, rel=5 / np.sqrt(2 * value.size)), path
            starts += [layer.ravel()[0] for layer in (value if path[0] == "sparse" else [value])]
    assert len(set(starts)) == len(starts)  # no two from one key


def test_near_ties_are_counted_among_the_allowed_experts():
    """One of three tokens has two scores 0.0005 apart; a nearer one is in a left-out group."""
    cfg = small(num_experts=6, experts_per_token=2, num_groups=2, groups_per_token=1)
    first, second = [0.9, 0.5, 0.4, 0.4999, 0.1, 0.1], [0.9, 0.5, 0.4995, 0.1, 0.1, 0.1]
    scores = jnp.array([first, second, [0.9, 0.6, 0.4, 0.6, 0.0, 0.0]])
    near = jax.jit(lambda bias: moe.near_ties(scores, bias, cfg))
    assert near(np.zeros(6, np.float32)).tolist() == [False, True, False]
    assert not near(0.01 * np.eye(6, dtype=np.float32)[1]).any()  # of the scores that choose


def test_near_ties_are_a_share_of_the_tokens_that_count(monkeypatch):
    monkeypatch.setattr(moe, "near_ties", lambda scores, bias, cfg: jnp.arange(len(scores)) < 3)
    layer, x = ds.MoE(LIGHT, rngs=nnx.Rngs(0)), jnp.ones((1, 4, LIGHT.dim))

    @jax.jit
    def share(segment_ids):
        _, metrics = layer.route(x, make_context(LIGHT, from_zero(1, 4), segment_ids))
        return metrics["near_ties"]

    found = [share(np.array([ids], np.int32)) for ids in ([1, 1, 1, 1], [0, 0, 1, 1], [0] * 4)]
    assert found == [0.75, 0.5, 0.0]
