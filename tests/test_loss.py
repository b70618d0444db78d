"""The loss and its gradient against the reference page, of all layers and of heads alone."""

import operator
from dataclasses import replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, forward, needs_cpp, parameters, random_model, small, tokens_of

from dsv3_jax import reference
from dsv3_jax.config import Execution
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.mtp import make_heads
from dsv3_jax.ops.draft_loss import summed_distance
from dsv3_jax.training import loss

BATCH, LENGTH, MTP_WEIGHT = 2, 10, 0.3
SEGMENTS = np.array([[1] * 5 + [2] * 3 + [0] * 2, [1] * 10], np.int32)
POSITIONS = np.array([[*range(5), *range(3), *range(2)], [*range(10)]], np.int32)


def batch_of(tokens, segment_ids=SEGMENTS, positions=POSITIONS):
    arrays = dict(tokens=tokens, segment_ids=segment_ids, positions=positions)
    return {name: jnp.asarray(a, jnp.int32) for name, a in arrays.items()}


@partial(jax.jit, static_argnums=0)
def losses_and_gradients(graphdef, state, batch):
    def total(state):
        out = loss.compute_loss(nnx.merge(graphdef, state), batch, MTP_WEIGHT)
        return out.total, out

    # with respect to all variables, the router biases too
    return jax.grad(total, has_aux=True)(state)


TIED = dict(num_layers=1, num_dense_layers=0, mtp_depth=2, tie_embeddings=True)
GQA = dict(attention="gqa", num_heads=4, num_kv_heads=2, qk_norm=True)
EAGLE = dict(num_layers=1, mtp_kind="eagle", mtp_depth=1, **GQA)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes, kernels, remat",
    [
        pytest.param(TIED, "cpu", "none", marks=needs_cpp),
        (dict(mtp_depth=1), "xla,grouped_swiglu=ragged_dot", "queries"),
        (EAGLE, "auto,grouped_swiglu=dense", "full"),
    ],
)
def test_losses_and_gradients_equal_the_reference(changes, kernels, remat):
    cfg = small(**changes)
    model = random_model(cfg, execution=Execution(kernels=kernels, remat=remat))
    tokens = tokens_of(cfg, BATCH, LENGTH)
    gradients, out = losses_and_gradients(*nnx.split(model), batch_of(tokens))
    ctx = reference.Context(cfg, POSITIONS, SEGMENTS)
    params = parameters(model)
    tokens = np.asarray(tokens)
    target = []  # of a regression, which takes no gradient: as it is before any change
    values = reference.losses(ctx, params, tokens, MTP_WEIGHT, lambda x: target.append(x) or x)
    for name, want in values._asdict().items():
        np.testing.assert_allclose(getattr(out, name), want, rtol=2e-6, err_msg=name)
    layers = cfg.num_sparse_layers + cfg.num_sparse_heads
    assert out.load.shape == (layers, cfg.num_experts if layers else 1)
    # Along a random direction each array's gradient is the difference quotient of the page's loss.
    rng, step = np.random.default_rng(0), 1e-6
    for path, variable in nnx.to_flat_state(gradients):
        array, gradient = reduce(operator.getitem, path, params), np.float64(variable[...])
        direction, start = rng.standard_normal(array.shape), array.copy()
        totals = []
        for sign in (1, -1):
            array[...] = start + sign * step * direction
            fixed = lambda x: (target or [x])[0]  # noqa: E731
            totals.append(reference.losses(ctx, params, tokens, MTP_WEIGHT, fixed).total)
        array[...] = start
        found, want = gradient * direction, (totals[0] - totals[1]) / (2 * step)
        assert (np.abs(found).max() > 0) != isinstance(variable, RouterBias), path
        # float32; a sum over tokens, experts and layers, whose terms have both signs
        assert abs(found.sum() - want) < 3e-5 * np.abs(found).sum() + 1e-8, path


# heads of other kinds, and heads alone on a frozen trunk

KINDS = {
    "meta": (small(mtp_kind="meta", mtp_depth=2, mtp_input="raw", num_layers=1), DENSE),
    "medusa": (small(mtp_kind="medusa", mtp_depth=3, num_layers=1), Execution()),
    "eagle": (small(mtp_kind="eagle", mtp_depth=1, num_layers=1), Execution()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_the_model_and_of_its_heads_equal_the_reference(kind):
    cfg, execution = KINDS[kind]
    graphdef, state = nnx.split(random_model(cfg, execution=execution))
    tokens, params = tokens_of(cfg, BATCH, LENGTH), parameters(nnx.merge(graphdef, state))

    @jax.jit
    def run(state, batch):
        model = nnx.merge(graphdef, state)
        return [loss.compute_loss(model, batch, weight) for weight in (MTP_WEIGHT, None)]

    contexts = [reference.Context(c, POSITIONS, SEGMENTS) for c in (cfg, replace(cfg, mtp_depth=0))]
    of_page = [reference.losses(c, params, np.asarray(tokens), MTP_WEIGHT) for c in contexts]
    want, of_trunk = of_page
    balance = want.balance - of_trunk.balance
    own = want.feature + 0.1 * want.mtp[0] if kind == "eagle" else np.mean(want.mtp) + balance
    of_heads = want._replace(total=own, balance=balance)
    for out, wanted in zip(run(state, batch_of(tokens)), (want, of_heads), strict=True):
        for name, value in wanted._asdict().items():
            np.testing.assert_allclose(getattr(out, name), value, rtol=2e-6, err_msg=name)


def test_a_new_medusa_head_says_what_the_trunks_own_head_says():
    cfg = KINDS["medusa"][0]
    model = random_model(cfg)
    for head, new in zip(model.mtp, make_heads(cfg, nnx.Rngs(0)), strict=True):
        head.w[...] = new.w[...]
    out = forward(model, *batch_of(tokens_of(cfg, BATCH, LENGTH)).values())
    for k, drafts in enumerate(out.mtp_logits, start=1):
        np.testing.assert_array_equal(drafts, out.logits[:, : LENGTH - k])


# heads that learn the trunk's distribution in place of the text's token


def by_hand(kind, target, drafter):
    """(distances, gradients by the drafter's logits) of tokens, in float64."""
    p, q = (reference.softmax(logits, np) for logits in (target, drafter))
    if kind == "kl":
        return (p * np.log(p / q)).sum(-1), q - p
    s = np.where(p > q, -1.0, 0.0)
    return np.abs(p - q).sum(-1) / 2, q * (s - (q * s).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", ["kl", "tv"])
def test_the_sum_in_chunks_is_the_masked_sum_and_leaves_the_target_alone(x64, rng, kind):
    h, own, w = (jnp.asarray(rng.normal(size=shape)) for shape in ((10, 4), (10, 4), (4, 9)))
    mask = jnp.asarray(rng.integers(2, size=10) == 1)
    total = jax.jit(lambda h, own: summed_distance(h, own, w, mask, kind, chunk=3))
    values, gradients = by_hand(kind, np.asarray(own @ w), np.asarray(h @ w))
    assert float(total(h, own)) == pytest.approx(values[np.asarray(mask)].sum(), rel=1e-12)
    of_h, of_own = jax.grad(total, argnums=(0, 1))(h, own)
    gradients *= np.asarray(mask)[:, None]
    np.testing.assert_allclose(of_h, gradients @ np.asarray(w).T, atol=1e-13)
    assert not of_own.any()
    # the minimum is p itself
    assert abs(total(own, own)) < 1e-14 and abs(jax.grad(total)(own, own)).max() < 1e-14


def test_heads_are_compared_with_the_trunk_at_the_position_before_their_token():
    """By the complete model's logits: head k's at i, the trunk's at i + k, of one document."""
    cfg = KINDS["medusa"][0]
    model, batch = random_model(cfg), batch_of(tokens_of(cfg, BATCH, LENGTH))
    out, ctx = forward(model, *batch.values()), reference.Context(cfg, POSITIONS, SEGMENTS)
    for kind in ("kl", "tv"):
        run = jax.jit(lambda kind=kind: loss.compute_loss(model, batch, None, head_loss=kind).mtp)
        for k, (found, drafts) in enumerate(zip(run(), out.mtp_logits, strict=True), start=1):
            same = reference.same_document(ctx, k + 1)
            target, drafter = out.logits[:, k:-1][same], drafts[:, :-1][same]
            values, _ = by_hand(kind, np.float64(target), np.float64(drafter))
            assert float(found) == pytest.approx(np.mean(values), rel=2e-5)  # float32
