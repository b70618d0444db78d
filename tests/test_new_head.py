"""A new kind of multi-token head is one class and two rows: it then trains, is evaluated, and drafts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, parameters, random_model, tokens_of
from runs import fresh_state, make_run

from dsv3_jax import reference
from dsv3_jax.config import HEAD_KINDS, HeadKind, ModelConfig, OptimConfig, from_dict, to_dict
from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model import counting
from dsv3_jax.model.layers import param
from dsv3_jax.model.mtp import HEADS, Head
from dsv3_jax.training.evaluate import evaluate
from dsv3_jax.training.step import Job, make_step

pytestmark = [pytest.mark.usefixtures("light_compiles", "registered"), pytest.mark.long]
BATCH, LENGTH = 4, 16
SEGMENTS = np.array([[1] * 9 + [2] * 7, [1] * 16, [1] * 12 + [0] * 4, [1] * 16], np.int32)
POSITIONS = np.array([[*range(9), *range(7)], [*range(16)], [*range(12), *range(4)], [*range(16)]], np.int32)


class HydraHead(Head):
    """h^k = h^{k-1} + silu([e, h^{k-1}] W_1) W_2, where e is the embedding of token i+k. After arXiv 2402.05109."""

    remembers = False

    def __init__(self, cfg, execution, *, rngs, kernels):
        super().__init__(cfg, execution, rngs=rngs, kernels=kernels)
        self.w_1 = param(rngs, (2 * cfg.dim, cfg.dim), ("dim", None), cfg.init_std)
        self.w_2 = param(rngs, (cfg.dim, cfg.dim), ("dim", None), cfg.init_std)

    def __call__(self, h, ctx, embedded=None):
        hidden = self.kernels("product", jnp.concatenate([embedded, h], axis=-1), self.w_1[...])
        return h + self.kernels("product", jax.nn.silu(hidden), self.w_2[...]), ctx, {}


@pytest.fixture
def registered(monkeypatch):
    kind = HeadKind("Hydra heads", reads_tokens=True, has_experts=False, reads_raw=False)
    monkeypatch.setitem(HEAD_KINDS, "hydra", kind)
    monkeypatch.setitem(HEADS, "hydra", HydraHead)


@pytest.fixture
def cfg(registered):
    return replace(LIGHT, vocab_size=4, mtp_kind="hydra", mtp_depth=2)  # so few tokens that drafts are right at times


def expected_logits(cfg, params, tokens):
    """(logits of the trunk, logits of each head) by the reference page and the head's equation."""
    trunk = reference.transformer(reference.Context(replace(cfg, mtp_depth=0), POSITIONS, SEGMENTS), params, tokens)
    h, heads = trunk.hidden, []
    for k, p in enumerate(params["mtp"].values(), start=1):
        h = h[:, : LENGTH - k]
        gate = np.concatenate([params["embed"][tokens[:, k:]], h], axis=-1) @ p["w_1"]
        h = h + gate / (1 + np.exp(-gate)) @ p["w_2"]
        heads.append(h @ params["head"])
    return trunk.logits, heads


def test_it_is_a_configuration_like_any_other(cfg):
    assert from_dict(ModelConfig, to_dict(cfg)) == cfg
    assert counting.size(cfg).mtp == 2 * (2 * 16 * 16 + 16 * 16)


def test_it_trains(cfg):
    """Its loss is that of the equations, and a step changes each of its parameters."""
    run = make_run("nowhere", model=cfg, optim=OptimConfig(learning_rate=1e-2, warmup_steps=0))
    state, tokens = fresh_state(run), tokens_of(cfg, BATCH, LENGTH)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(state.params))["mtp"]
    batch = {"tokens": tokens, "segment_ids": jnp.asarray(SEGMENTS), "positions": jnp.asarray(POSITIONS)}
    after, metrics = make_step(Job(run))(state, batch)
    _, heads = expected_logits(cfg, parameters(random_model(cfg)), np.asarray(tokens))
    ctx = reference.Context(cfg, POSITIONS, SEGMENTS)
    wanted = [reference.cross_entropy(ctx, y, np.asarray(tokens), k) for k, y in enumerate(heads, start=2)]
    np.testing.assert_allclose(metrics["mtp_loss"], wanted, rtol=1e-5)
    assert jax.tree.structure(before) == jax.tree.structure(after := nnx.to_pure_dict(after.params)["mtp"])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.abs(new - old).max() > 1e-3


def test_its_acceptance_is_measured(cfg):
    """Position by position: a draft counts while the drafts before it are what the model itself says."""
    model, tokens = random_model(cfg, execution=DENSE), np.asarray(tokens_of(cfg, BATCH, LENGTH))
    logits, heads = expected_logits(cfg, parameters(model), tokens)
    drafted, accepted = np.zeros(2), np.zeros(2)
    for b, i in np.ndindex(BATCH, LENGTH):
        for k, target in enumerate((i + 2, i + 3)):
            if target >= LENGTH or not 0 < SEGMENTS[b, i] == SEGMENTS[b, target]:
                break
            drafted[k] += 1
            if heads[k][b, i].argmax() != logits[b, target - 1].argmax():
                break
            accepted[k] += 1
    batch = {"tokens": tokens, "segment_ids": SEGMENTS, "positions": POSITIONS}
    found = evaluate(model, [batch], ByteTokenizer())["mtp_acceptance"]
    np.testing.assert_allclose(found, accepted / drafted)
    assert (0 < accepted).all() and (accepted < drafted).all()


def test_it_drafts(cfg):
    """Greedy text stays the same. The last head drafts beyond its depth."""
    model, prompts = random_model(cfg, seed=2, execution=DENSE), [[1], [2, 3, 0, 1, 1], [0, 3]]
    plain = generate(model, prompts, 20)
    drafted = generate(model, prompts, 20, draft="mtp", draft_length=3)
    assert drafted.tokens == plain.tokens
    assert len(drafted.acceptance) == 3 and 0 < drafted.acceptance[2] <= drafted.acceptance[0] < 1
    assert drafted.steps < plain.steps
