"""The training loss and its gradient against the reference page, with every kernel, remat policy and depth."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, QUICK, parameters, random_model, small, tokens_of

from dsv3_jax import reference
from dsv3_jax.config import Balance, Execution
from dsv3_jax.kernels.cpu import library
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.training import loss

pytestmark = pytest.mark.usefixtures("light_compiles")
BATCH, LENGTH, MTP_WEIGHT = 2, 10, 0.3
SEGMENTS = np.array([[1] * 5 + [2] * 3 + [0] * 2, [1] * 10], np.int32)
POSITIONS = np.array([[*range(5), *range(3), *range(2)], [*range(10)]], np.int32)


def batch_of(tokens, segment_ids=SEGMENTS, positions=POSITIONS):
    arrays = dict(tokens=tokens, segment_ids=segment_ids, positions=positions)
    return {name: jnp.asarray(a, jnp.int32) for name, a in arrays.items()}


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def losses_and_gradients(graphdef, state, batch):
    def total(state):
        out = loss.compute_loss(nnx.merge(graphdef, state), batch, MTP_WEIGHT)
        return out.total, out

    return jax.grad(total, has_aux=True)(state)  # with respect to all variables, the router biases too


@pytest.fixture(scope="module")
def expected():
    """The reference's losses and float64 gradient for a configuration."""
    made = {}

    def of(cfg):
        key = cfg.num_layers, cfg.mtp_depth, cfg.mtp_kind
        if key not in made:
            params, tokens = parameters(random_model(cfg)), np.asarray(tokens_of(cfg, BATCH, LENGTH))
            values = reference.losses(reference.Context(cfg, POSITIONS, SEGMENTS), params, tokens, MTP_WEIGHT)

            def total(p):
                ctx = reference.Context(cfg, POSITIONS, SEGMENTS, jnp)
                return reference.losses(ctx, p, tokens, MTP_WEIGHT, jax.lax.stop_gradient).total

            with jax.enable_x64(True):
                gradient = jax.jit(jax.grad(total), compiler_options=QUICK)(jax.tree.map(jnp.asarray, params))
                made[key] = values, jax.tree.map(np.asarray, gradient)
        return made[key]

    return of


TIED = dict(num_layers=2, num_dense_layers=0, mtp_depth=2, tie_embeddings=True)
CASES = [
    (TIED, "cpu", "none"),
    (TIED, "xla", "none"),
    (dict(mtp_depth=1), "cpu", "full"),
    (dict(mtp_depth=1), "xla", "attention"),
    (dict(mtp_depth=1), "auto,grouped_swiglu=ragged_dot", "dots"),
    (dict(num_layers=2, num_dense_layers=0), "xla,grouped_swiglu=dense", "none"),
    (dict(num_layers=1, mtp_kind="eagle", mtp_depth=1), "auto", "none"),
]


@pytest.mark.parametrize(
    "changes, kernels, remat", [CASES[0], *(pytest.param(*case, marks=pytest.mark.long) for case in CASES[1:])]
)
def test_losses_and_gradients_equal_the_reference(expected, changes, kernels, remat):
    """In C++, in plain XLA's loops, with `ragged_dot`, and with every expert on every token."""
    if kernels == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    cfg = small(**changes)
    model = random_model(cfg, execution=Execution(kernels=kernels, remat=remat))
    gradients, out = losses_and_gradients(*nnx.split(model), batch_of(tokens_of(cfg, BATCH, LENGTH)))
    values, wanted = expected(cfg)
    for name, want in values._asdict().items():
        np.testing.assert_allclose(getattr(out, name), want, rtol=2e-6, err_msg=name)
    assert out.mtp.shape == (cfg.mtp_depth,)
    layers = cfg.num_sparse_layers + cfg.num_sparse_heads
    assert out.load.shape == (layers, cfg.num_experts if layers else 1)
    flat = nnx.to_flat_state(gradients)
    assert {path[-1] for path, v in flat if isinstance(v, RouterBias)} == ({"bias"} if layers else set())
    for path, variable in flat:
        want = wanted
        for name in path:
            want = want[name]
        got = np.asarray(variable[...])
        assert got.shape == want.shape
        if isinstance(variable, RouterBias):
            assert not got.any(), f"a gradient reached {path}"
        else:
            assert np.abs(want).max() > 0, f"nothing is known of {path}"
            # float32 against float64; sums over tokens, experts and layers of terms as large as the largest entry.
            np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * np.abs(want).max(), err_msg=str(path))


# targets


def test_targets_stay_within_their_document():
    tokens = np.arange(20).reshape(2, 10)
    for ahead in (1, 2, 3):
        wanted, mask = loss.targets(jnp.asarray(tokens, jnp.int32), jnp.asarray(SEGMENTS), ahead)
        np.testing.assert_array_equal(wanted, tokens[:, ahead:])
        want = [[0 < SEGMENTS[b, i] == SEGMENTS[b, i + ahead] for i in range(10 - ahead)] for b in range(2)]
        np.testing.assert_array_equal(mask, want)
    # Documents of 5, 3 and 10 tokens have so many targets 1, 2, 3 places on.
    np.testing.assert_array_equal(loss.target_counts(jnp.asarray(SEGMENTS), 3), [4 + 2 + 9, 3 + 1 + 8, 2 + 0 + 7])


# parts of a batch


LIGHT = small(
    vocab_size=4,  # so that a guess is right now and then
    num_layers=1,
    num_dense_layers=0,
    mtp_depth=2,
    balance=Balance(sequence_alpha=0.1),  # the sequence-wise loss alone: a batch-wise one is no sum over parts
)


@partial(jax.jit, static_argnums=(0, 4), compiler_options=QUICK)
def light_losses(graphdef, state, batch, counts, share):
    return loss.compute_loss(nnx.merge(graphdef, state), batch, MTP_WEIGHT, counts=counts, share=share)


def test_parts_with_the_whole_batchs_counts_add_up_to_it():
    model = random_model(LIGHT, execution=DENSE)
    segments = np.array([[1] * 5 + [2] * 3 + [0] * 2, [1] * 10, [1] * 2 + [0] * 8, [1] * 4 + [2] * 6], np.int32)
    whole = batch_of(tokens_of(LIGHT, 4, LENGTH, seed=3), segments, np.broadcast_to(np.arange(10), (4, 10)))
    counts = loss.target_counts(whole["segment_ids"], 3)
    want = light_losses(*nnx.split(model), whole, None, 1.0)
    parts = [
        light_losses(*nnx.split(model), {k: v[start : start + 2] for k, v in whole.items()}, counts, 0.5)
        for start in (0, 2)
    ]
    both = loss.over_parts(jax.tree.map(lambda *x: jnp.stack(x), *parts))
    jax.tree.map(lambda both, one: np.testing.assert_allclose(both, one, rtol=1e-6), both, want)
    assert all(np.abs(np.asarray(x)).max() > 0 for x in (*parts[0][:3], parts[0].load))
    assert want.total == pytest.approx(float(want.main + MTP_WEIGHT * want.mtp.mean() + want.balance), rel=1e-6)


# scores


def test_scores_equal_log_probabilities_and_a_walk_along_the_drafts():
    cfg = LIGHT
    model = random_model(
        cfg, seed=4, execution=DENSE
    )  # seeds with which both depths draft some tokens right and some wrong
    tokens = np.asarray(tokens_of(cfg, BATCH, LENGTH, seed=8))
    logits, mtp_logits, *_ = reference.transformer(
        reference.Context(cfg, POSITIONS, SEGMENTS), parameters(model), tokens
    )

    got = jax.jit(lambda b: loss.score_tokens(model, b), compiler_options=QUICK)(batch_of(tokens))
    probs = np.take_along_axis(reference.softmax(logits[:, :-1], np), tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(got.nll, -np.log(probs), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(got.mask, reference.same_document(reference.Context(cfg, POSITIONS, SEGMENTS), 1))
    drafted, agree = walk(logits, mtp_logits)
    np.testing.assert_array_equal(got.drafted, drafted)
    np.testing.assert_array_equal(got.agree, agree)
    assert (0 < agree).all() and (agree < drafted).all()


def walk(logits, mtp_logits):
    """Position by position: draft at depth 0, 1, … as long as the model would have said the same."""
    drafted, agree = np.zeros(len(mtp_logits)), np.zeros(len(mtp_logits))
    for b in range(BATCH):
        for i in range(LENGTH):
            for k in range(len(mtp_logits)):
                target = i + k + 2
                if target >= LENGTH or not 0 < SEGMENTS[b, i] == SEGMENTS[b, target]:
                    break
                drafted[k] += 1
                if mtp_logits[k][b, i].argmax() != logits[b, target - 1].argmax():
                    break
                agree[k] += 1
    return drafted, agree
