"""Routers and balance rules in a layer and in a training step; a new one is a function and a row of its registry."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import DENSE, LIGHT, forward, parameters, random_model
from runs import MODEL, fresh_state, make_run, packed_batch

from dsv3_jax import reference
from dsv3_jax.config import Balance, ModelConfig, OptimConfig
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model.moe import MoE
from dsv3_jax.ops import balance, routing
from dsv3_jax.training import step as train_step
from dsv3_jax.training.loss import compute_loss
from dsv3_jax.training.step import Job, make_step

NO_GROUPS = dict(num_groups=1, groups_per_token=1)
PLAIN = replace(MODEL, num_layers=1, mtp_depth=0, **NO_GROUPS)
OPTIM = OptimConfig(learning_rate=1e-2, warmup_steps=2, eps=0.1)
SEGMENTS = np.array([[1] * 9 + [2] * 7, [1] * 16, [1] * 12 + [0] * 4, [1] * 5 + [2] * 3 + [0] * 8])


def run_of(model: ModelConfig, **optim):
    return make_run("nowhere", model=model, optim=replace(OPTIM, **optim))


def make_batch():
    return packed_batch(np.random.default_rng(0), SEGMENTS)


def test_the_layers_noise_is_the_equations(rng):
    """With keys the experts follow the noisy logits, with other noise in each row; without keys the logits."""
    cfg = replace(LIGHT, router="noisy_topk", **NO_GROUPS)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: MoE(cfg, DENSE, rngs=nnx.Rngs(0))))
    state, x = jax.tree.map(
        lambda v: 0.4 * rng.standard_normal(v.shape, np.float32), (state, jnp.zeros((2, 6, cfg.dim)))
    )
    keys = jax.random.split(jax.random.key(1), 2)

    @jax.jit
    def run(state, x, keys):
        moe = nnx.merge(graphdef, state)
        draws = [jax.random.normal(jax.random.fold_in(key, 0), (6, 8)) for key in keys]
        return moe(x, keys=keys)[1], moe(x)[1], jnp.concatenate(draws)

    noisy, plain, draws = run(state, x, keys)
    logits, spread = (x.reshape(12, -1) @ np.float64(state[name][...]) for name in ("w_router", "w_noise"))
    for found, h in ((noisy, logits + draws * np.logaddexp(0, spread)), (plain, logits)):
        ids, gates, _ = oracles.route(h, None, replace(cfg, router="topk"))
        np.testing.assert_array_equal(np.sort(found.expert_ids.reshape(12, -1)), np.sort(ids))
        np.testing.assert_allclose(np.sort(found.gates.reshape(12, -1)), np.sort(gates), rtol=1e-5)
    assert (np.sort(noisy.expert_ids) != np.sort(plain.expert_ids)).any()


@pytest.mark.rare
def test_a_step_with_quantile_and_z_loss():
    """Losses are the reference's, and the bias goes half of the way."""
    model = replace(PLAIN, router="sqrtsoftplus", balance=Balance(0.5, 1e-2, 0.0, "quantile", 1e-2))
    run, batch = run_of(model), make_batch()
    before, params = fresh_state(run), parameters(random_model(model))
    bias = np.asarray(before.bias["sparse"]["moe"]["bias"][...])[0]
    arrays = jax.tree.map(np.asarray, batch)
    ctx = reference.Context(model, arrays["positions"], arrays["segment_ids"])
    after, metrics = make_step(Job(run))(before, batch)
    want = reference.losses(ctx, params, arrays["tokens"], 0.0)
    assert float(metrics["balance_loss"]) == pytest.approx(want.balance, rel=1e-5)
    scores = reference.transformer(ctx, params, arrays["tokens"]).routing[0].scores[SEGMENTS != 0]
    moved = 0.5 * (bias + oracles.quantile_target(scores, bias.astype(np.float64), 2))
    np.testing.assert_allclose(after.bias["sparse"]["moe"]["bias"][...][0], moved - moved.mean(), rtol=0, atol=1e-5)


@pytest.mark.rare
def test_a_steps_noise_is_of_seed_step_and_row():
    """Two microbatches have the complete batch's noise. Another step has other noise; evaluation has none."""
    run, batch = run_of(replace(PLAIN, router="noisy_topk"), microbatches=2), make_batch()
    step, state = make_step(Job(run)), fresh_state(run)
    losses = jax.jit(lambda state, batch: compute_loss(train_step.model_of(Job(run), state), batch, 0.0))
    keys = [train_step._with_keys(run, batch, jnp.int32(at))["keys"] for at in (0, 1)]
    noisy, other = (losses(state, batch | {"keys": key}) for key in keys)
    plain = losses(state, batch)
    assert (other.load != noisy.load).any() and (plain.load != noisy.load).any()
    for at, want in enumerate((noisy, other)):
        metrics = step(fresh_state(run, step=at), batch)[1]
        assert float(metrics["loss"]) == pytest.approx(float(want.main), rel=1e-5)
        np.testing.assert_array_equal(metrics["load"], want.load)
    assert "keys" not in train_step._with_keys(run_of(PLAIN), batch, jnp.int32(0))


@pytest.mark.long
def test_a_new_router_and_a_new_rule_are_a_row_each(monkeypatch):
    """The router takes the first experts, in turn by position; the rule notes the load."""

    def in_turn(x, cfg):
        ids = (x.tokens[:, None] + jnp.arange(cfg.experts_per_token, dtype=jnp.int32)[None]) % cfg.num_experts
        scores = jax.nn.softmax(x.logits, axis=-1)
        return routing.Routing(ids, jnp.take_along_axis(scores, ids, axis=1), scores)

    monkeypatch.setitem(routing.ROUTERS, "in turn", routing.Router(in_turn, reads_bias=True, reads_tokens=True))
    monkeypatch.setitem(balance.RULES, "noted", balance.Rule(lambda bias, load, _, rate: bias + rate * load))
    run, batch = run_of(replace(PLAIN, router="in turn", balance=Balance(rule="noted", bias_rate=0.25))), make_batch()
    before = fresh_state(run)
    bias = np.asarray(before.bias["sparse"]["moe"]["bias"][...])
    after, metrics = make_step(Job(run))(before, batch)
    tokens = np.asarray(batch["tokens"])[SEGMENTS != 0]
    load = np.bincount(np.concatenate([tokens, tokens + 1]) % 8, minlength=8)
    np.testing.assert_array_equal(metrics["load"][0], load)
    np.testing.assert_allclose(after.bias["sparse"]["moe"]["bias"][...][0], bias[0] + 0.25 * load, rtol=1e-6)


@pytest.mark.rare
def test_drafts_of_a_model_that_routes_by_hash_change_no_text():
    """So the cache's steps and the heads read the tokens that the complete text has at their positions."""
    cfg = replace(LIGHT, router="hash", vocab_size=4, mtp_depth=2, **NO_GROUPS)
    model, prompts = random_model(cfg, execution=DENSE), [[1], [2, 3, 0, 1, 1], [0, 3]]
    plain = generate(model, prompts, 20)
    drafted = generate(model, prompts, 20, draft="mtp", draft_length=2)
    assert drafted.tokens == plain.tokens and 0 < drafted.acceptance[0]
    whole = [*prompts[1], *plain.tokens[1]]
    logits = forward(model, jnp.asarray([whole], jnp.int32)).logits[0]
    assert logits[len(prompts[1]) - 1 : -1].argmax(-1).tolist() == plain.tokens[1]
