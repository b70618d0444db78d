"""Scores of continuations are the teacher-forced pass's, whatever else is in the batch."""

import jax
import numpy as np
import pytest
from models import LIGHT, forward, random_model, small

import dsv3_jax as ds
from dsv3_jax.mesh import sharding
from dsv3_jax.model.transformer import abstract


@pytest.mark.long
def test_pairs_of_any_lengths_are_the_teacher_forced_pass():
    """Batches by length keep the pairs' order; nothing is dropped: a score is of its pair."""
    rng, model = np.random.default_rng(0), random_model(LIGHT)
    tight = random_model(ds.replace(LIGHT, capacity_factor=0.5))
    pairs = [
        (rng.integers(37, size=n).tolist(), rng.integers(37, size=m).tolist())
        for n, m in ((40, 3), (1, 1), (9, 30))
    ]
    greedy = ds.generate(model, [pairs[0][0]], 4).tokens[0]
    pairs.append((pairs[0][0], greedy))
    scores = ds.loglikelihood(tight, pairs, batch_size=3)
    rows = np.zeros((4, 64), np.int32)
    for row, (context, more) in zip(rows, pairs, strict=True):
        row[: len(context) + len(more)] = [*context, *more]
    logits = np.float64(forward(model, jax.device_put(rows)).logits)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, ((context, more), (score, is_greedy)) in enumerate(zip(pairs, scores, strict=True)):
        where = np.arange(len(context) - 1, len(context) + len(more) - 1)
        np.testing.assert_allclose(score, logp[i, where, more].sum(), rtol=1e-5)
        assert is_greedy == (logp[i, where].argmax(-1) == more).all() == (i == 3)


@pytest.mark.long
def test_a_mesh_gives_the_same_scores():
    model, pairs = random_model(small(capacity_factor=0.5)), [([1, 2, 3], [4, 5]), ([6], [7])]
    mesh = sharding.make_mesh(2, 2)
    placed = jax.device_put(model, sharding.state_sharding(model, mesh))
    want, got = ds.loglikelihood(model, pairs), ds.loglikelihood(placed, pairs)
    np.testing.assert_allclose([s for s, _ in got], [s for s, _ in want], rtol=1e-5)


def test_bad_pairs_are_refused():
    for pairs, said in (
        ([([1], [])], "the continuation of pair 0 is empty"),
        ([([1], [2]), ([], [2])], "the context of pair 1 is empty"),
        (
            [([1], [37])],
            "the continuation of pair 0 holds token 37, which is no id of a vocabulary of 37",
        ),
        ([([1] * 128, [2])], "pair 0 has 129 tokens, over max_positions=128"),
    ):
        with pytest.raises(ValueError, match=said):
            ds.loglikelihood(abstract(small()), pairs)
