"""The training of Meta's, Medusa's and EAGLE's heads, against the reference page. test_model has their values."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, forward, parameters, random_model, small, tokens_of

from dsv3_jax import reference
from dsv3_jax.config import Execution
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.model.context import make_context
from dsv3_jax.model.mtp import make_heads, run_heads
from dsv3_jax.model.transformer import ForwardOut
from dsv3_jax.training import loss

BATCH, LENGTH = 2, 14
# Row 0: documents of 6 and 5 tokens, then padding. Row 1: one of 14.
SEGMENTS = np.array([[1] * 6 + [2] * 5 + [0] * 3, [1] * 14], np.int32)
POSITIONS = np.array([[*range(6), *range(5), *range(3)], [*range(14)]], np.int32)
TOKENS = np.asarray(tokens_of(small(), BATCH, LENGTH))

ARRAYS = {"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS), "positions": jnp.asarray(POSITIONS)}

KINDS = {
    "meta": small(mtp_kind="meta", mtp_depth=2, mtp_input="raw", num_layers=2),
    "medusa": small(mtp_kind="medusa", mtp_depth=3, num_layers=1),
    "eagle": small(mtp_kind="eagle", mtp_depth=1, num_layers=1),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return random_model(KINDS[kind], execution=DENSE if kind == "meta" else None)


@partial(jax.jit, static_argnums=0)
def losses_of(graphdef, state):
    return [loss.compute_loss(nnx.merge(graphdef, state), ARRAYS, 0.3, heads_only=only) for only in (False, True)]


def test_losses_equal_the_reference(model, kind):
    """The loss of the model, and the loss of the heads on a frozen trunk."""
    cfg = KINDS[kind]
    expected = reference.losses(reference.Context(cfg, POSITIONS, SEGMENTS), parameters(model), TOKENS, 0.3)
    total, main, mtp, feature, balance = expected
    trunk = reference.losses(
        reference.Context(replace(cfg, mtp_depth=0), POSITIONS, SEGMENTS), parameters(model), TOKENS, 0.3
    )
    own_balance = balance - trunk.balance
    own = np.mean(mtp) + own_balance if kind != "eagle" else feature + 0.1 * mtp[0]
    for out, want in zip(losses_of(*nnx.split(model)), ((total, balance), (own, own_balance)), strict=True):
        got = (out.total, out.balance, out.main, out.mtp, out.feature)
        for a, b in zip(got, (*want, main, mtp, feature), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6)
        layers = cfg.num_sparse_layers + cfg.num_sparse_heads
        assert out.load.shape == (layers, cfg.num_experts if layers else 1)


def test_a_new_medusa_head_says_what_the_trunks_own_head_says():
    """Bit by bit; and it is not stuck there: a gradient reaches its matrix of zeros."""
    model = random_model(KINDS["medusa"])
    new_heads = make_heads(KINDS["medusa"], Execution(), nnx.Rngs(0), prepare())
    for head, new in zip(model.mtp, new_heads, strict=True):
        head.w[...] = new.w[...]
    out = forward(model, *ARRAYS.values())
    for k, drafts in enumerate(out.mtp_logits, start=1):
        np.testing.assert_array_equal(drafts, out.logits[:, : LENGTH - k])
    graph, heads, rest = nnx.split(model, lambda path, _: path[0] == "mtp", ...)
    grads = jax.jit(jax.grad(lambda h: loss.compute_loss(nnx.merge(graph, h, rest), ARRAYS, 0.3).total))(heads)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))


def test_the_regression_moves_the_head_and_not_its_target(rng):
    """Hidden states have a gradient as what the head reads, none as what it is held against."""
    model = random_model(KINDS["eagle"])
    segment_ids = ARRAYS["segment_ids"]
    ctx, counts = make_context(model.cfg, ARRAYS["positions"], segment_ids), loss.target_counts(segment_ids, 2)

    def feature(h, target):
        made, *_ = run_heads(model.mtp, model.cfg, model.embedding, h, ARRAYS["tokens"], ctx)
        out = ForwardOut(target, target, made, None, (), {})
        return loss._token_losses(model, out, ARRAYS, counts, "ce")[2]

    h = jnp.asarray(rng.standard_normal((BATCH, LENGTH, 16)), jnp.float32)
    both = jax.jit(jax.grad(lambda h: feature(h, h)))(h)
    reading = jax.jit(jax.grad(lambda h: feature(h, jax.lax.stop_gradient(h))))(h)
    np.testing.assert_array_equal(both, reading)
    mask = loss.targets(ARRAYS["tokens"], segment_ids, 2)[1]
    assert (np.abs(both[:, :-2]).max(-1) > 1e-3)[np.asarray(mask)].all()
