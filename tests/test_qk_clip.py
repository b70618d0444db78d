"""QK-clip: the largest logits are the reference's, and a clipped head's are below the threshold."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import needs_cpp, parameters, random_model, small
from runs import documents, fresh_state, make_run

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import OptimConfig
from dsv3_jax.kernels import choose, table
from dsv3_jax.model.context import from_zero, how_of, make_context
from dsv3_jax.ops import attention
from dsv3_jax.training import qk_clip
from dsv3_jax.training.state import Job
from dsv3_jax.training.step import make_step

B, T = 4, 12
# A stack of two, and a head. It also reads a later token; without experts it compiles faster.
HEAD = dict(mtp_depth=1, mtp_kind="eagle")
CFG = small(num_layers=2, num_dense_layers=2, vocab_size=260, init_std=0.5, **HEAD)
# Rows of documents; the first two end in padding.
BATCH = documents(B, T, 2, padding=[(0, 4), (1, 4)], seed=3)


def reference_maxima(cfg, params: dict, batch, monkeypatch) -> list[np.ndarray]:
    """Each head's largest logit [H], in float64, of all attentions of the reference, in order."""
    found = []
    plain = reference.attend
    batch = jax.tree.map(np.asarray, batch)
    whole = reference.Context(cfg, batch["positions"], batch["segment_ids"])

    def attend(ctx, q, k, v):
        scores = np.einsum("bthx,bshx->bhts", reference.rotate(ctx, q), reference.rotate(ctx, k))
        scores *= q.shape[-1] ** -0.5
        # A head also reads a later token, and counts where that is of the same document.
        ahead = T - ctx.segment_ids.shape[1]
        counted = reference.same_document(whole, ahead) if ahead else ctx.segment_ids != 0
        seen = reference.visible(ctx) & counted[:, :, None]
        found.append(np.where(seen[:, None], scores, -np.inf).max((0, 2, 3)))
        return plain(ctx, q, k, v)

    monkeypatch.setattr(reference, "attend", attend)
    reference.transformer(whole, params, batch["tokens"])
    return found


# the largest logits


@pytest.mark.parametrize("name", [pytest.param("cpu", marks=needs_cpp), "xla", "mute"])
def test_row_maxima_are_those_of_the_scores(rng, monkeypatch, name):
    """By what the softmax keeps; a kernel that keeps them to itself gets a separate product."""
    shapes = [(2, 150, *of) for of in ((4, 6), (2, 6), (2, 3))]
    q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    ids = np.sort(rng.integers(1, 4, (2, 150)), axis=1).astype(np.int32)
    scores = np.einsum("bthx,bshx->bths", np.float64(q), np.repeat(np.float64(k), 2, axis=2)) * 0.7
    seen = oracles.causal_mask(ids)
    want = np.where(seen[:, :, None], scores, -np.inf).max(-1)
    monkeypatch.setitem(table.TABLE, "causal_attention", table.TABLE["causal_attention"])
    mute = table.Implementation("mute", table.kept_maxima(attention.causal_attention))
    table.add("causal_attention", mute)
    kernels = choose.Kernels(choose.Target("cpu", f"causal_attention={name}"))

    @jax.jit
    def run(q, k, v):
        how = dict(scale=0.7, segment_ids=jnp.asarray(ids))
        attend = partial(kernels, "causal_attention", q, k, v, **how)
        return attend(), attend(maxima=True)

    plain, (out, got) = run(q, k, v)
    np.testing.assert_array_equal(out, plain)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)  # float32


# the clip


@pytest.mark.long
def test_a_step_scales_each_head_of_each_layer_by_its_own_logit(monkeypatch):
    """By the reference's float64 logits, in a stack and in a head's block; half are above."""
    largest = reference_maxima(CFG, parameters(random_model(CFG)), BATCH, monkeypatch)
    assert len(largest) == CFG.num_layers + CFG.mtp_depth
    ordered = np.sort(np.ravel(largest))
    threshold = float(ordered[len(ordered) // 2 - 1 :][:2].mean())  # between two heads
    # almost no step of the optimizer, so that what moves is the clip
    still = dict(learning_rate=1e-20, final_learning_rate=0.0, warmup_steps=0, weight_decay=0.0)
    run = make_run("nowhere", model=CFG, optim=OptimConfig(**still, qk_clip=threshold))
    maxima = {"dense": np.float32(largest[:2]), "mtp.0.block": np.float32(largest[2])}
    maxima, params = jax.tree.map(jnp.asarray, maxima), fresh_state(run).params
    want = qk_clip.clip(params, maxima, threshold, CFG.nope_head_dim, jnp.asarray(True))
    new, metrics = make_step(Job(run))(fresh_state(run), BATCH)
    # of the forward pass, before the clip
    np.testing.assert_allclose(metrics["max_logit"], np.max(largest), rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), new.params, want)


@pytest.mark.parametrize("compressed", [True, False])
def test_clipped_logits_are_at_most_the_threshold(rng, compressed):
    """On the same input clipped heads reach the threshold, and the others keep their logits."""
    cfg = small() if compressed else small(q_latent_dim=None)
    graph, state = nnx.split(nnx.eval_shape(lambda: ds.MLA(cfg, rngs=nnx.Rngs(1))))
    x, state = jax.tree.map(
        lambda w: 0.6 * rng.standard_normal(w.shape, np.float32),
        (jnp.zeros((2, 9, cfg.dim)), state),
    )

    @jax.jit
    def maxima(state):
        how = replace(how_of(), watch=frozenset(["max_logit"]))
        ctx = make_context(cfg, from_zero(2, 9), how=how)
        return nnx.merge(graph, state).attend(jnp.asarray(x), ctx)[2]["max_logit"]

    before = np.asarray(maxima(state))
    threshold = float(np.sort(before)[1])  # of three heads: one is above
    params = nnx.State({"block": {"attn": state}})
    clip = jax.jit(partial(qk_clip.clip, threshold=threshold, nope_head_dim=cfg.nope_head_dim))
    new = clip(params, {"block": before}, keep=True)
    after = np.asarray(maxima(new["block"]["attn"]))
    above = before > threshold
    assert above.sum() == 1
    np.testing.assert_allclose(after[above], threshold, rtol=1e-5)
    np.testing.assert_array_equal(after[~above], before[~above])
