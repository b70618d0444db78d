"""Meta's, Medusa's and EAGLE's heads against the reference page, and which tokens each may depend on."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, QUICK, forward, parameters, random_model, small, tokens_of

from dsv3_jax import reference
from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.model.context import make_context
from dsv3_jax.model.mtp import make_heads, run_heads, smooth_l1
from dsv3_jax.model.transformer import ForwardOut, abstract
from dsv3_jax.training import loss

BATCH, LENGTH = 2, 14
# Row 0: documents of 6 and 5 tokens, then padding. Row 1: one of 14.
SEGMENTS = np.array([[1] * 6 + [2] * 5 + [0] * 3, [1] * 14], np.int32)
POSITIONS = np.array([[*range(6), *range(5), *range(3)], [*range(14)]], np.int32)
ONE_SEGMENT, PLACES = np.ones_like(SEGMENTS), np.broadcast_to(np.arange(LENGTH, dtype=np.int32), SEGMENTS.shape)
TOKENS = np.asarray(tokens_of(small(), BATCH, LENGTH))

ARRAYS = {"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS), "positions": jnp.asarray(POSITIONS)}

pytestmark = pytest.mark.usefixtures("light_compiles")

KINDS = {
    "meta": small(mtp_kind="meta", mtp_depth=2, mtp_input="raw", num_layers=2),
    "medusa": small(mtp_kind="medusa", mtp_depth=3, num_layers=1),
    "eagle": small(mtp_kind="eagle", mtp_depth=1, num_layers=1),
}
READS = {"meta": 0, "medusa": 0, "eagle": 1}  # how many tokens more than the trunk's own head a head reads


def run(model, tokens, segment_ids=SEGMENTS, positions=POSITIONS):
    return forward(model, *map(jnp.asarray, (tokens, segment_ids, positions)))


def other_at(places) -> np.ndarray:
    """TOKENS with all those at `places` changed."""
    other = TOKENS.copy()
    other[places] = (other[places] + 1) % small().vocab_size
    return other


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return random_model(KINDS[kind], execution=DENSE if kind == "meta" else None)


def test_heads_equal_the_reference(model, kind):
    cfg, out = KINDS[kind], run(model, TOKENS)
    expected = reference.transformer(reference.Context(cfg, POSITIONS, SEGMENTS), parameters(model), TOKENS)
    logits = expected.logits
    assert len(out.mtp_logits) == cfg.mtp_depth
    both = zip((out.logits, *out.mtp_logits), (logits, *expected.mtp_logits), strict=True)
    for k, (got, want) in enumerate(both):
        assert got.shape == (BATCH, LENGTH - k, cfg.vocab_size)
        # float32 against float64: some hundred roundings of 6e-8 of values as large as a logit.
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * want.std())
        if k:
            assert np.abs(want - logits[:, : LENGTH - k]).max() > 0.1  # no copy of the trunk's own
    assert len(out.mtp_routing) == cfg.num_sparse_heads == (2 if kind == "meta" else 0)
    routings = zip(out.mtp_routing, expected.routing[cfg.num_sparse_layers :], strict=True)
    for k, (got, want) in enumerate(routings, start=1):
        np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
        np.testing.assert_allclose(got.gates, want.gates, rtol=1e-4)
        counted = SEGMENTS[:, : LENGTH - k] != 0  # a parallel head reads no token of another document
        np.testing.assert_array_equal(want.counted, counted)
        load = np.bincount(want.expert_ids[counted].ravel(), minlength=cfg.num_experts)
        np.testing.assert_array_equal(got.load, load)


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def losses_of(graphdef, state):
    return [loss.compute_loss(nnx.merge(graphdef, state), ARRAYS, 0.3, loss.Objective(only)) for only in (False, True)]


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


@pytest.mark.parametrize("changed", [3, 8, 13])
def test_later_tokens_change_no_earlier_draft(model, kind, changed):
    both = [run(model, tokens, ONE_SEGMENT, PLACES) for tokens in (TOKENS, other_at(np.s_[:, changed]))]
    for left, right in zip(*(out.mtp_logits for out in both), strict=True):
        first = changed - READS[kind]  # the first entry that reads the token
        np.testing.assert_array_equal(left[:, :first], right[:, :first])
        assert first >= left.shape[1] or (left[:, first] != right[:, first]).any(axis=-1).all()


def test_a_segment_sees_itself_alone(model, kind):
    """Other documents and padding change no entry whose tokens, with those that it reads, are of the segment."""
    base = run(model, TOKENS).mtp_logits
    for theirs in ((0, 6), (6, 11), (11, 14)):
        out = run(model, other_at(np.s_[0, slice(*theirs)])).mtp_logits
        for left, right in zip(base, out, strict=True):
            for own in ((0, 6), (6, 11)):
                whole = slice(own[0], own[1] - READS[kind])
                assert np.array_equal(left[0, whole], right[0, whole]) == (theirs != own)
            np.testing.assert_array_equal(left[1], right[1])


def test_a_packed_document_is_drafted_as_if_alone(model, kind):
    packed = run(model, TOKENS).mtp_logits
    for start, end in ((0, 6), (6, 11)):
        alone = np.zeros_like(TOKENS)
        alone[0, : end - start] = TOKENS[0, start:end]
        segments = (np.arange(LENGTH)[None] < np.array([[end - start], [0]])).astype(np.int32)
        for left, right in zip(packed, run(model, alone, segments, PLACES).mtp_logits, strict=True):
            length = min(end - start - READS[kind], left.shape[1])
            # Not exact: attention's blocks then hold other columns, and sums run in another order.
            np.testing.assert_allclose(
                left[0, start : start + length], right[0, :length], rtol=0, atol=1e-5 * np.std(left)
            )


def test_a_new_medusa_head_says_what_the_trunks_own_head_says():
    """Bit by bit; and it is not stuck there: a gradient reaches its matrix of zeros."""
    model = random_model(KINDS["medusa"])
    new_heads = make_heads(KINDS["medusa"], Execution(), nnx.Rngs(0), prepare())
    for head, new in zip(model.mtp, new_heads, strict=True):
        head.w[...] = new.w[...]
    out = run(model, TOKENS)
    for k, drafts in enumerate(out.mtp_logits, start=1):
        np.testing.assert_array_equal(drafts, out.logits[:, : LENGTH - k])
    graph, heads, rest = nnx.split(model, lambda path, _: path[0] == "mtp", ...)
    grads = jax.jit(
        jax.grad(lambda h: loss.compute_loss(nnx.merge(graph, h, rest), ARRAYS, 0.3).total), compiler_options=QUICK
    )(heads)
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(grads))


def test_the_regression_moves_the_head_and_not_its_target(rng):
    """Hidden states have a gradient as what the head reads, none as what it is held against."""
    model = random_model(KINDS["eagle"])
    segment_ids = ARRAYS["segment_ids"]
    ctx, counts = make_context(model.cfg, ARRAYS["positions"], segment_ids), loss.target_counts(segment_ids, 2)

    def feature(h, target):
        made, *_ = run_heads(model.mtp, model.cfg, model.embedding, h, ARRAYS["tokens"], ctx)
        return loss._feature_loss(model, ForwardOut(target, target, made, None, (), {}), segment_ids, None, counts)

    h = jnp.asarray(rng.standard_normal((BATCH, LENGTH, 16)), jnp.float32)
    both = jax.jit(jax.grad(lambda h: feature(h, h)), compiler_options=QUICK)(h)
    reading = jax.jit(jax.grad(lambda h: feature(h, jax.lax.stop_gradient(h))), compiler_options=QUICK)(h)
    np.testing.assert_array_equal(both, reading)
    mask = loss.targets(ARRAYS["tokens"], segment_ids, 2)[1]
    assert (np.abs(both[:, :-2]).max(-1) > 1e-3)[np.asarray(mask)].all()


def test_smooth_l1():
    d = np.array([[0.0, 0.5, -0.5, 1.0], [-1.0, 2.0, -3.0, 0.25]], np.float32)
    want = [[0.0, 0.125, 0.125, 0.5], [0.5, 1.5, 2.5, 0.03125]]
    np.testing.assert_allclose(smooth_l1(jnp.asarray(d + 7), jnp.full_like(d, 7.0)), np.mean(want, -1), rtol=1e-6)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(mtp_kind="eagle", mtp_depth=2), "mtp_depth=2 .* mtp_kind='eagle'"),
        (dict(mtp_kind="medusa", mtp_depth=1, mtp_input="raw"), "mtp_input='raw' .* mtp_kind='medusa'"),
    ],
)
def test_heads_that_cannot_be(changes, named):
    with pytest.raises(ConfigError, match=named):
        small(**changes)


@pytest.mark.parametrize("kind", KINDS)
def test_no_heads_is_no_heads(kind):
    assert len(abstract(small(mtp_kind=kind, mtp_depth=0)).mtp) == 0
