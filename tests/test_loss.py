"""The training loss and its gradient against the reference page, with every kernel, remat policy and depth."""

import operator
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, parameters, random_model, small, tokens_of

from dsv3_jax import reference
from dsv3_jax.config import Balance, Execution
from dsv3_jax.kernels.cpu import library
from dsv3_jax.model.moe import RouterBias
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

    return jax.grad(total, has_aux=True)(state)  # with respect to all variables, the router biases too


TIED = dict(num_layers=1, num_dense_layers=0, mtp_depth=2, tie_embeddings=True)
EAGLE = dict(num_layers=1, mtp_kind="eagle", mtp_depth=1, attention="gqa", num_heads=4, num_kv_heads=2, qk_norm=True)


@pytest.mark.parametrize(
    "changes, kernels, remat",
    [
        (TIED, "cpu", "none"),
        pytest.param(dict(mtp_depth=1), "cpu", "full", marks=pytest.mark.rare),
        pytest.param(dict(mtp_depth=1), "xla", "attention", marks=pytest.mark.long),
        pytest.param(dict(mtp_depth=1), "auto,grouped_swiglu=ragged_dot", "dots", marks=pytest.mark.rare),
        pytest.param(EAGLE, "auto,grouped_swiglu=dense", "none", marks=pytest.mark.rare),
    ],
)
def test_losses_and_gradients_equal_the_reference(changes, kernels, remat):
    """In C++, in plain XLA's loops, with `ragged_dot`, and with every expert on every token."""
    if kernels == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    cfg = small(**changes)
    model, tokens = random_model(cfg, execution=Execution(kernels=kernels, remat=remat)), tokens_of(cfg, BATCH, LENGTH)
    gradients, out = losses_and_gradients(*nnx.split(model), batch_of(tokens))
    ctx, params, tokens = reference.Context(cfg, POSITIONS, SEGMENTS), parameters(model), np.asarray(tokens)
    target = []  # of a regression, which takes no gradient: as it is before any change
    values = reference.losses(ctx, params, tokens, MTP_WEIGHT, lambda x: target.append(x) or x)
    for name, want in values._asdict().items():
        np.testing.assert_allclose(getattr(out, name), want, rtol=2e-6, err_msg=name)
    layers = cfg.num_sparse_layers + cfg.num_sparse_heads
    assert out.load.shape == (layers, cfg.num_experts if layers else 1)
    # The gradient of each array along a random direction is the difference quotient of the page's loss.
    rng, step = np.random.default_rng(0), 1e-6
    for path, variable in nnx.to_flat_state(gradients):
        array, gradient = reduce(operator.getitem, path, params), np.float64(variable[...])
        direction, start = rng.standard_normal(array.shape), array.copy()
        totals = []
        for sign in (1, -1):
            array[...] = start + sign * step * direction
            totals.append(reference.losses(ctx, params, tokens, MTP_WEIGHT, lambda x: (target or [x])[0]).total)
        array[...] = start
        found, want = gradient * direction, (totals[0] - totals[1]) / (2 * step)
        assert (np.abs(found).max() > 0) != isinstance(variable, RouterBias), path
        # float32; a sum over tokens, experts and layers, whose terms have both signs
        assert abs(found.sum() - want) < 3e-5 * np.abs(found).sum() + 1e-8, path


def test_targets_stay_within_their_document():
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    run = jax.jit(lambda *a: ([loss.targets(*a, ahead) for ahead in (1, 2, 3)], loss.target_counts(a[1], 3)))
    found, counts = run(tokens, SEGMENTS)
    for ahead, (wanted, mask) in enumerate(found, start=1):
        np.testing.assert_array_equal(wanted, tokens[:, ahead:])
        want = [[0 < SEGMENTS[b, i] == SEGMENTS[b, i + ahead] for i in range(10 - ahead)] for b in range(2)]
        np.testing.assert_array_equal(mask, want)
    # Documents of 5, 3 and 10 tokens have so many targets 1, 2, 3 places on.
    np.testing.assert_array_equal(counts, [4 + 2 + 9, 3 + 1 + 8, 2 + 0 + 7])


# parts of a batch, and scores

LIGHT = small(
    vocab_size=4,  # so that a guess is right now and then
    num_layers=1,
    num_dense_layers=0,
    mtp_depth=2,
    mtp_kind="medusa",
    balance=Balance(sequence_alpha=0.1),  # the sequence-wise loss alone: a batch-wise one is no sum over parts
)


def test_parts_with_the_whole_batchs_counts_add_up_to_it():
    graphdef, state = nnx.split(random_model(LIGHT, execution=DENSE))
    segments = np.array([[1] * 5 + [2] * 3 + [0] * 2, [1] * 10, [1] * 2 + [0] * 8, [1] * 4 + [2] * 6], np.int32)
    batch = batch_of(tokens_of(LIGHT, 4, LENGTH, seed=3), segments, np.broadcast_to(np.arange(10), (4, 10)))

    @jax.jit
    def run(state, batch):
        model, counts = nnx.merge(graphdef, state), loss.target_counts(batch["segment_ids"], 3)
        parts = [
            loss.compute_loss(model, {k: v[i : i + 2] for k, v in batch.items()}, MTP_WEIGHT, counts=counts, share=0.5)
            for i in (0, 2)
        ]
        both = loss.over_parts(jax.tree.map(lambda *x: jnp.stack(x), *parts))
        return loss.compute_loss(model, batch, MTP_WEIGHT), parts[0], both

    want, part, both = run(state, batch)
    jax.tree.map(lambda both, one: np.testing.assert_allclose(both, one, rtol=1e-6), both, want)
    assert all(np.abs(x).max() > 0 for x in (*part[:3], part.load))
    assert want.total == pytest.approx(float(want.main + MTP_WEIGHT * np.mean(want.mtp) + want.balance), rel=1e-6)


def test_scores_equal_log_probabilities_and_a_walk_along_the_drafts():
    model = random_model(LIGHT, seed=4, execution=DENSE)  # both depths draft some tokens right and some wrong
    tokens, ctx = np.asarray(tokens_of(LIGHT, BATCH, LENGTH, seed=8)), reference.Context(LIGHT, POSITIONS, SEGMENTS)
    logits, mtp_logits, *_ = reference.transformer(ctx, parameters(model), tokens)
    got = jax.jit(lambda b: loss.score_tokens(model, b))(batch_of(tokens))
    probs = np.take_along_axis(reference.softmax(logits[:, :-1], np), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(got.nll, -np.log(probs), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.mask, reference.same_document(ctx, 1))
    # Position by position: draft at depth 0, 1, … as long as the model would have said the same.
    drafted, agree = np.zeros(2), np.zeros(2)
    for b, i in np.ndindex(BATCH, LENGTH):
        for k in range(2):
            target = i + k + 2
            if target >= LENGTH or not 0 < SEGMENTS[b, i] == SEGMENTS[b, target]:
                break
            drafted[k] += 1
            if mtp_logits[k][b, i].argmax() != logits[b, target - 1].argmax():
                break
            agree[k] += 1
    np.testing.assert_array_equal(got.drafted, drafted)
    np.testing.assert_array_equal(got.agree, agree)
    assert (0 < agree).all() and (agree < drafted).all()
