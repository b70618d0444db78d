"""A new kind of multi-token head is one class and two rows: it then trains and drafts."""

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
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model import counting
from dsv3_jax.model.layers import param
from dsv3_jax.model.mtp import HEADS, Head
from dsv3_jax.training.step import Job, make_step

pytestmark = [pytest.mark.usefixtures("registered"), pytest.mark.long]
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
    """The logits of each head by the reference page and the head's equation."""
    trunk = reference.transformer(reference.Context(replace(cfg, mtp_depth=0), POSITIONS, SEGMENTS), params, tokens)
    h, heads = trunk.hidden, []
    for k, p in enumerate(params["mtp"].values(), start=1):
        h = h[:, : LENGTH - k]
        gate = np.concatenate([params["embed"][tokens[:, k:]], h], axis=-1) @ p["w_1"]
        h = h + gate / (1 + np.exp(-gate)) @ p["w_2"]
        heads.append(h @ params["head"])
    return heads


def test_it_trains(cfg):
    """Its loss is that of the equations, and a step changes each of its parameters."""
    assert from_dict(ModelConfig, to_dict(cfg)) == cfg and counting.size(cfg).mtp == 2 * (2 * 16 * 16 + 16 * 16)
    run = make_run("nowhere", model=cfg, optim=OptimConfig(learning_rate=1e-2, warmup_steps=0))
    state, tokens = fresh_state(run), tokens_of(cfg, BATCH, LENGTH)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(state.params))["mtp"]
    batch = {"tokens": tokens, "segment_ids": jnp.asarray(SEGMENTS), "positions": jnp.asarray(POSITIONS)}
    after, metrics = make_step(Job(run))(state, batch)
    heads = expected_logits(cfg, parameters(random_model(cfg)), np.asarray(tokens))
    ctx = reference.Context(cfg, POSITIONS, SEGMENTS)
    wanted = [reference.cross_entropy(ctx, y, np.asarray(tokens), k) for k, y in enumerate(heads, start=2)]
    np.testing.assert_allclose(metrics["mtp_loss"], wanted, rtol=1e-5)
    assert jax.tree.structure(before) == jax.tree.structure(after := nnx.to_pure_dict(after.params)["mtp"])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.abs(new - old).max() > 1e-3


def test_it_drafts(cfg):
    """Greedy text stays the same. The last head drafts beyond its depth."""
    model, prompts = random_model(cfg, seed=2, execution=DENSE), [[1], [2, 3, 0, 1, 1], [0, 3]]
    plain = generate(model, prompts, 20)
    drafted = generate(model, prompts, 20, draft="mtp", draft_length=3)
    assert drafted.tokens == plain.tokens
    assert len(drafted.acceptance) == 3 and 0 < drafted.acceptance[2] <= drafted.acceptance[0] < 1
    assert drafted.steps < plain.steps
