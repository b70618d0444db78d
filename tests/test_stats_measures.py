"""Measures of token rows equal their definitions; knock-outs equal models without the expert."""

import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest
from models import DENSE, forward, random_model
from runs import MODEL
from test_stats import BATCHES

from dsv3_jax.stats import (
    agreement,
    flow,
    information,
    knockouts,
    match_experts,
    mutual_information,
    worth,
)
from dsv3_jax.stats.bits import WIDE
from dsv3_jax.stats.token_rows import TokenRows, first_rows, rows_of

E, K, N = 6, 2, 400


def random_rows(rng, layers=2, n=N, experts=E, tokens=9, documents=20) -> TokenRows:
    """Random choices in documents of two domains; the last layer counts some, as a head does."""
    ids = np.argsort(rng.random((layers, n, experts)), axis=-1)[..., :K]
    document = np.sort(rng.integers(0, documents, n))
    counted = np.ones((layers, n), bool)
    counted[-1, ::7] = False
    return rows_of(ids, document)._replace(
        token=rng.integers(0, tokens, n).astype(np.int32),
        domain=(document % 2).astype(np.int32),
        counted=counted,
    )


def chosen(rows: TokenRows, experts: int = E) -> np.ndarray:
    """Return [L, n, E]: 1 where a counted choice took the expert."""
    return np.eye(experts, dtype=int)[rows.expert_ids].sum(2) * rows.counted[..., None]


def mutual(counts: np.ndarray) -> float:
    """Σ p log2(p / (p_a p_b)) of a table of counts [a, b]."""
    p = counts / counts.sum()
    chance = np.outer(p.sum(1), p.sum(0))
    return (p[p > 0] * np.log2(p[p > 0] / chance[p > 0])).sum()


def test_information_equals_the_definitions(rng):
    rows = random_rows(rng)
    found = information(rows, E, 2, draws=2, resamples=2)
    for layer, taken in enumerate(chosen(rows)):
        table = np.einsum("ne,nt,nd->etd", taken, np.eye(9)[rows.token], np.eye(2)[rows.domain])
        given = sum(table[:, t].sum() / table.sum() * mutual(table[:, t]) for t in range(9))
        want = mutual(table.sum(2)), mutual(table.sum(1)), given
        parts = (found.token, found.domain, found.domain_given_token)
        sums = [part.bits[layer] + part.chance[layer] for part in parts]
        np.testing.assert_allclose(sums, want, rtol=1e-9)
        assert mutual_information(table.sum(1).T[:, None])[0] == pytest.approx(want[1], rel=1e-9)
        load = taken.sum(0) / taken.sum()
        assert found.entropy[layer] == pytest.approx(-(load * np.log2(load)).sum())


def test_intervals_resample_documents(rng):
    # one expert a document
    experts, document = rng.integers(0, 4, 30), np.repeat(np.arange(30), 200)
    rows = rows_of(experts[document][None, :, None], document)
    rows = rows._replace(domain=(document % 2).astype(np.int32))
    wide, plain = information(rows, 4, 2, draws=5, resamples=100).domain, []
    for _ in range(200):
        picked, load = rng.integers(0, 30, 30), np.zeros((2, 4))
        np.add.at(load, (picked % 2, experts[picked]), 1)
        plain.append(mutual(load))
    # 100 and 200 resamples
    assert wide.high[0] - wide.low[0] == pytest.approx(2 * WIDE * np.std(plain), rel=0.3)


def test_transitions_repeats_and_heads_equal_the_definitions(rng):
    rows = random_rows(rng, layers=3)
    # documents that share a piece are still apart
    rows = rows._replace(segment=np.arange(N, dtype=np.int32) // 100)
    taken = chosen(rows)
    pairs = np.einsum("lna,lnb->lab", taken[:-1], taken[1:])
    np.testing.assert_array_equal(flow.transitions(rows, E), pairs)
    chance = pairs.sum(2)[:, :, None] * pairs.sum(1)[:, None] / pairs.sum((1, 2))[:, None, None]
    np.testing.assert_allclose(flow.transition_lift(pairs), pairs / chance)
    found = flow.repeats(rows, E)
    near = (np.diff(rows.document) == 0) & (np.diff(rows.segment) == 0)
    near = near & rows.counted[:, 1:] & rows.counted[:, :-1]
    same = (taken[:, 1:] * taken[:, :-1]).sum(-1) * near
    np.testing.assert_allclose(found.share, same.sum(1) / (K * near.sum(1)))
    p = taken.sum(1) / taken.sum((1, 2))[:, None]
    np.testing.assert_allclose(found.by_chance, K * (p**2).sum(-1))
    head = flow.heads_against_trunk(rows, E, 1)
    # the last layer's and the head's choices of one token
    two = (taken[1:] * rows.counted[2][:, None]).astype(float)
    loads = two.sum(1)
    assert head.same_expert_number == pytest.approx((two[0] * two[1]).sum() / loads[0].sum())
    chance = K * (loads[0] @ loads[1]) / (loads[0].sum() * loads[1].sum())
    assert head.by_chance[0] == pytest.approx(chance)
    assert head.load_correlation[0] == pytest.approx(np.corrcoef(loads)[0, 1])


def test_matched_experts_share_the_most_choices(rng):
    rows, others = random_rows(rng, experts=5), random_rows(rng, experts=5)
    found = match_experts(rows, others, 5)
    shared = np.einsum("lna,lnb->lab", chosen(rows, 5), chosen(others, 5))
    maps = list(itertools.permutations(range(5)))
    of_one = [[table[range(5), one].sum() for one in maps] for table in shared]
    total = K * rows.counted.sum(1)
    np.testing.assert_allclose(found.shared, np.max(of_one, axis=1) / total)
    of_match = [t[range(5), m].sum() for t, m in zip(shared, found.match, strict=True)]
    assert of_match == np.max(of_one, axis=1).tolist()
    np.testing.assert_allclose(agreement(rows, others), np.trace(shared, axis1=1, axis2=2) / total)
    assert np.abs(found.shared - found.by_chance).max() < 0.05  # these two are unrelated
    fewer = match_experts(rows, first_rows(others, 9), 5)  # it has more layers, so fewer rows
    assert fewer.shared.tolist() == match_experts(first_rows(rows, 9), others, 5).shared.tolist()
    order = rng.permutation(5)
    renamed = match_experts(rows, rows._replace(expert_ids=order[rows.expert_ids]), 5)
    assert renamed.match.tolist() == [order.tolist()] * 2 and renamed.shared.tolist() == [1, 1]


@pytest.mark.long
def test_a_muted_expert_is_one_without_weights():
    """Gate 0 equals zeros as output matrix, by complete logits. One program serves all experts."""
    model = random_model(replace(MODEL, mtp_depth=0), seed=2, execution=DENSE)
    before, found = knockouts._nll._cache_size(), worth(model, BATCHES, resamples=50)
    assert knockouts._nll._cache_size() == before + 1

    w_down = model.sparse.moe.experts.w_down
    whole = w_down[...]
    for layer, expert in ((None, None), (0, 1), (1, 6)):
        w_down[...] = whole if layer is None else whole.at[layer, expert].set(0.0)
        nll = []
        for batch in BATCHES:
            tokens, segment = batch["tokens"], batch["segment_ids"]
            logits = forward(model, tokens, segment, batch["positions"]).logits
            log_p = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
            given = np.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
            nll += (-given[(segment[:, 1:] > 0) & (segment[:, 1:] == segment[:, :-1])]).tolist()
        loss = found.loss if layer is None else found.without[layer, expert]
        assert loss == pytest.approx(np.mean(nll), rel=1e-5) and found.tokens == len(nll)
    assert np.abs(found.without - found.loss).max() > 1e-3  # the experts matter here
    assert (found.low <= found.high).all()


@pytest.mark.parametrize("pull", [0.0, 0.3])
def test_what_the_domain_tells_beyond_the_token(rng, pull):
    """Half of a text is of its domain's own words, the other half of words of all domains.

    There a domain decides the expert with probability `pull`. Shuffled domains alone would take off
    too much.
    """
    n, domains, experts = 7200, 3, 8
    document = np.arange(n) // 150
    p = pull * np.eye(experts)[:domains] + (1 - pull) / experts  # of a common word's expert
    truth = mutual(p) / 2
    covered, errors = [], []
    for _ in range(8):
        domain, is_own = document % domains, rng.random(n) < 0.5
        token = np.where(is_own, 20 + 60 * domain + rng.zipf(1.3, n) % 60, rng.integers(0, 20, n))
        decided = ~is_own & (rng.random(n) < pull)
        ids = np.where(decided, (domain + token) % experts, rng.integers(0, experts, n))
        rows = rows_of(ids[None, :, None], document)
        rows = rows._replace(token=token.astype(np.int32), domain=domain.astype(np.int32))
        found = information(rows, experts, domains, draws=10, resamples=40).domain_given_token
        covered.append(found.low[0] <= truth <= found.high[0])
        errors.append(found.bits[0] - truth)
    assert abs(np.mean(errors)) < 0.012
    assert np.mean(covered) >= 0.75  # 95 % of texts; six of eight leave room for chance
