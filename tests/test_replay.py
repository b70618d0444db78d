"""Routing that is recorded, replayed and forced, and the log-probabilities that go with it."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import DENSE, random_model, small, tokens_of
from runs import MODEL, documents, packed_batch, refused
from test_routing import ROUTERS, config, route

import dsv3_jax as ds
from dsv3_jax.data.batches import Row, model_inputs, stack
from dsv3_jax.model.moe import check_expert_ids
from dsv3_jax.ops import balance, routing
from dsv3_jax.ops.routing import Tokens
from dsv3_jax.training.loss import compute_loss

CFG = small(num_layers=2, num_dense_layers=0, mtp_depth=1)
BY_ROUTER = ROUTERS | {"hash": dict(router="hash")}


@pytest.mark.parametrize("router", BY_ROUTER)
def test_own_ids_change_nothing_and_given_ids_take_their_own_scores(rng, router):
    """Gates are the router's own scores at the given ids; neither bias nor groups act on them."""
    cfg = config(**BY_ROUTER[router])
    logits = np.float32(rng.normal(0, 1.5, (40, cfg.num_experts)))
    bias = np.float32(rng.uniform(-0.4, 0.4, cfg.num_experts))
    tokens = Tokens()
    if router == "hash":
        tokens = Tokens(ids=rng.integers(0, 99, 40, np.int32))
    free = route(logits, bias, cfg, tokens)
    again = route(logits, bias, cfg, tokens._replace(given=free.expert_ids))
    chex.assert_trees_all_equal(again, free)
    if router == "dense":
        return  # every expert is chosen, whatever is given
    ids = np.argsort(rng.random(logits.shape), axis=1)[:, : cfg.experts_per_token].astype(np.int32)
    ids[::2] = -1
    forced = route(logits, bias, cfg, tokens._replace(given=ids))
    np.testing.assert_array_equal(forced.expert_ids, np.where(ids < 0, free.expert_ids, ids))
    gates = np.take_along_axis(np.float64(forced.scores), np.asarray(forced.expert_ids), axis=1)
    if cfg.normalize_gates or "topk" in router:
        gates /= gates.sum(1, keepdims=True)
    scale = 1.0 if "topk" in router else cfg.routed_scale
    np.testing.assert_allclose(forced.gates, scale * gates, rtol=1e-5)


@jax.jit
def run(model, batch, expert_ids=None, *of_heads):
    return model(**batch, expert_ids=expert_ids, mtp_expert_ids=of_heads)


@pytest.fixture(scope="module")
def model():
    return random_model(CFG, execution=DENSE)


def test_replaying_a_pass_changes_no_bit(model):
    """With documents and a head. A free V3 loss counts top scores without bias: it alone moves."""
    rng = np.random.default_rng(0)
    batch = packed_batch(rng, np.sort(rng.integers(0, 4, (2, 24)), axis=1), CFG.vocab_size)
    free = run(model, batch)
    ids = free.routing.expert_ids, free.mtp_routing[0].expert_ids

    def compared(out):
        routings = [r._replace(balance_loss=0) for r in (out.routing, *out.mtp_routing)]
        return out.logits, out.mtp_logits, routings

    chex.assert_trees_all_equal(compared(run(model, batch, *ids)), compared(free))
    none = [jnp.full_like(of_some, -1) for of_some in ids]
    chex.assert_trees_all_equal(run(model, batch, *none), free)


@pytest.mark.long
def test_a_batch_brings_experts_of_trunk_and_head():
    """Each counts its own, and the trunk's router learns through the gates of given experts."""
    cfg, rng = replace(MODEL, num_layers=1), np.random.default_rng(1)
    batch = documents(4, 12, 2)
    ids = np.argsort(rng.random((4, 2, 12, cfg.num_experts)), axis=-1)[..., : cfg.experts_per_token]
    batch["expert_ids"] = ids = jnp.asarray(ids, jnp.int32)
    graph, params, rest = nnx.split(random_model(cfg, execution=DENSE), nnx.Param, ...)

    @jax.jit
    def loss(params):
        out = compute_loss(nnx.merge(graph, params, rest), batch, 0.0)
        return out.main, out.load

    grads, load = jax.grad(loss, has_aux=True)(params)
    same = batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    of_head = balance.load(ids[:, 1, :-1], cfg.num_experts, same)
    np.testing.assert_array_equal(load, [balance.load(ids[:, 0], cfg.num_experts), of_head])
    assert np.abs(grads["sparse"]["moe"]["w_router"][...]).max() > 1e-4


# The second row is the first one, refilled; an int8 cache rounds keys to 1 in 254.
DRAFTED = dict(batch_size=1, draft="mtp", draft_length=2, temperature=0.7, top_p=0.8)
INT8 = dict(cache_dtype="int8", temperature=1.0)
HOW = [
    pytest.param(dict(batch_size=1), 1e-5, id="plain"),
    pytest.param(DRAFTED, 1e-5, id="mtp"),
    pytest.param(INT8, 0.05, id="int8", marks=pytest.mark.rare),
]


@pytest.mark.long
@pytest.mark.parametrize("settings, atol", HOW)
def test_what_decoding_recorded_is_the_teacher_forced_pass(model, settings, atol):
    """Log-probabilities, as the model's own and as drawn from; experts exactly."""
    prompts = [[5], [8, 1, 30, 2, 2]]
    result = ds.generate(model, prompts, 8, logprobs=True, return_routing=True, **settings)
    text, recorded = np.zeros((2, 16), np.int32), np.full((2, 2, 16, 3), -1, np.int32)
    for i, (prompt, new) in enumerate(zip(prompts, result.tokens, strict=True)):
        size, ids = len(prompt) + len(new), result.expert_ids[i]
        assert ids.shape == (2, size, 3) and (ids[:, -1] == -1).all() and (ids[:, :-1] >= 0).all()
        text[i, :size], recorded[:, i, :size] = [*prompt, *new], ids
    if atol < 0.01:
        free = run(model, {"tokens": text}, np.full_like(recorded, -1)).routing.expert_ids
        np.testing.assert_array_equal(np.where(recorded < 0, free, recorded), free)
    logits = np.float64(run(model, {"tokens": text}, recorded).logits)
    law = {key: settings[key] for key in ("temperature", "top_p") if key in settings}
    for i, (prompt, new) in enumerate(zip(prompts, result.tokens, strict=True)):
        row = logits[i, len(prompt) - 1 :][: len(new)]
        own = np.log([oracles.softmax_probs(x) for x in row])[range(len(new)), new]
        np.testing.assert_allclose(result.model_logprobs[i], own, rtol=0, atol=atol)
        drawn = np.zeros(len(new))  # greedy
        if law:
            probs = zip(new, row, strict=True)
            drawn = np.log([oracles.sampling_probs(x, **law)[token] for token, x in probs])
        np.testing.assert_allclose(result.logprobs[i], drawn, rtol=0, atol=atol)


def test_ids_that_no_router_could_have_chosen_are_refused(model):
    ids = np.zeros((2, 2, 24, 3), np.int32) + np.arange(3, dtype=np.int32)
    for wrong, said in (
        (ids[:1], r"int32 \(1, 2, 24, 3\), not an array int32 \(2, 2, 24, 3\)"),
        (ids + 6, "holds 8, which is neither one of 8 experts"),
        (ids * 0, r"\[0, 0, 0\] for a token, not 3 different experts"),
    ):
        with refused(said):
            check_expert_ids(CFG, wrong, (2, 2, 24))
    with refused("mtp_expert_ids has 2 arrays, and 1 heads"):
        model(tokens_of(CFG, 2, 24), mtp_expert_ids=[jnp.asarray(ids[0])] * 2)
    with refused("needs routed experts"):
        ds.generate(random_model(small(num_layers=1)), [[1]], 2, return_routing=True)


def test_a_router_that_does_not_replay_is_refused(monkeypatch):
    """The first experts for all tokens, without a look at the given ones."""
    cfg = small(num_layers=1, num_dense_layers=0, num_groups=1, groups_per_token=1, router="first")

    def first(x, cfg):
        ids = jnp.zeros_like(x.logits, jnp.int32)[:, : cfg.experts_per_token]
        ids += jnp.arange(cfg.experts_per_token, dtype=jnp.int32)[None]
        scores = jax.nn.softmax(x.logits, axis=-1)
        return routing.Routing(ids, jnp.take_along_axis(scores, ids, axis=1), scores)

    monkeypatch.setitem(routing.ROUTERS, "first", routing.Router(first))
    given = np.zeros((1, 2, 5, 3), np.int32) + np.int32([7, 0, 3])
    with refused("router='first' returns other experts than those to replay"):
        run(random_model(cfg, execution=DENSE), {"tokens": tokens_of(cfg, 2, 5)}, given)


def test_experts_of_another_text_or_shifted_by_one_are_noticed():
    """A fault that no shape shows."""
    names = "segment_ids", "positions", "domains", "documents"
    row = Row(tokens=np.int32([5, 6, 7, 8, 9, 0]), **dict.fromkeys(names, np.ones(6, np.int32)))
    right = row | {"expert_ids": np.zeros((2, 6, 3), np.int32)}

    def inputs_of(*routed):
        return model_inputs(stack([right | {"routed_tokens": np.int32(routed)}]))

    assert "expert_ids" in inputs_of(5, 6, 7, 8, 9, -1)
    for routed, said in (
        ([6, 7, 8, 9, 0, -1], "place 0 for token 6, and the row has 5 there: .* shifted by 1"),
        ([-1, 5, 6, 7, 8, 9], "place 1 for token 5, and the row has 6 there: .* shifted by -1"),
        ([5, 6, 7, 1, 9, -1], "place 3 for token 1, and the row has 8 there: .* of another text"),
    ):
        with refused(said):
            inputs_of(*routed)
    with refused("without routed_tokens"):
        stack([right])


@pytest.mark.parametrize("kind", ["deepseek", "meta"])
def test_a_heads_router_reads_the_tokens_that_the_head_reads(kind):
    """The hash router chooses by the token alone; DeepSeek's head k reads token i + k at i."""
    cfg = replace(CFG, mtp_depth=2, router="hash", mtp_kind=kind)
    out = run(random_model(cfg, execution=DENSE), {"tokens": tokens_of(cfg, 2, 12)})
    of_trunk = out.routing.expert_ids[0]
    for k, of_head in enumerate(out.mtp_routing, start=1):
        read = of_trunk[:, k:] if kind == "deepseek" else of_trunk[:, :-k]
        np.testing.assert_array_equal(of_head.expert_ids, read)
