"""Measures of token rows equal slow loops; knock-outs equal models without the expert's weights."""

import itertools
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
from models import DENSE, forward, random_model
from runs import MODEL
from test_stats import BATCHES

from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.stats import agreement, flow, information, knockouts, match_experts, mutual_information, worth
from dsv3_jax.stats.bits import WIDE
from dsv3_jax.stats.token_rows import TokenRows, rows_of, write_parquet

E, K, N = 6, 2, 400


def random_rows(rng, layers=2, n=N, experts=E, k=K, tokens=9, documents=20) -> TokenRows:
    """Random choices in documents of two domains; the last layer counts a part of the positions, as a head does."""
    ids = np.argsort(rng.random((layers, n, experts)), axis=-1)[..., :k]
    document = np.sort(rng.integers(0, documents, n))
    counted = np.ones((layers, n), bool)
    counted[-1, ::7] = False
    return rows_of(ids, document)._replace(
        token=rng.integers(0, tokens, n).astype(np.int32), domain=(document % 2).astype(np.int32), counted=counted
    )


# Token against domain


def slow_bits(triples: list[tuple]) -> tuple[float, float, float]:
    """I(expert; token), I(expert; domain), I(expert; domain | token) of (expert, token, domain), by the definitions."""

    def mutual(pairs):
        n, left, right = len(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
        return sum(c / n * np.log2(c * n / (left[a] * right[b])) for (a, b), c in Counter(pairs).items())

    given = 0.0
    for token in {t for _, t, _ in triples}:
        of_token = [(e, d) for e, t, d in triples if t == token]
        given += len(of_token) / len(triples) * mutual(of_token)
    return mutual([(e, t) for e, t, _ in triples]), mutual([(e, d) for e, _, d in triples]), given


def test_information_equals_the_definitions(rng):
    rows = random_rows(rng)
    found = information(rows, E, 2, draws=2, resamples=2)
    for layer in (0, 1):
        triples = [
            (int(e), int(rows.token[i]), int(rows.domain[i]))
            for i in range(N)
            if rows.counted[layer, i]
            for e in rows.expert_ids[layer, i]
        ]
        parts = (found.token, found.domain, found.domain_given_token)
        np.testing.assert_allclose([p.bits[layer] + p.chance[layer] for p in parts], slow_bits(triples), rtol=1e-9)
        joint = np.zeros((2, E))
        np.add.at(joint, tuple(np.array([(d, e) for e, _, d in triples]).T), 1)
        assert mutual_information(joint[:, None])[0] == pytest.approx(slow_bits(triples)[1], rel=1e-9)
        load = joint.sum(0) / joint.sum()
        assert found.entropy[layer] == pytest.approx(-(load * np.log2(load)).sum())


def test_independent_choices_give_no_information(rng):
    """Even where most tokens occur once or twice, and the plug-in estimate is above one bit."""
    found = information(random_rows(rng, n=3000, tokens=2000, documents=60), E, 2, draws=10, resamples=50)
    for part in (found.token, found.domain, found.domain_given_token):
        assert (np.abs(part.bits) < 0.02).all()
        assert ((part.low < 0.01) & (part.high > -0.01)).all()
    assert (found.token.chance > 0.5).all()


def test_information_that_is_there_is_found(rng):
    """The token chooses the first expert, and the domain the second, of three of each kind."""
    n = 6000
    document = np.repeat(np.arange(60), n // 60)
    token, domain = rng.integers(0, 3, n), document % 2
    ids = np.stack([token, 3 + domain], axis=1)[None]
    rows = rows_of(ids, document)._replace(token=token.astype(np.int32), domain=domain.astype(np.int32))
    found = information(rows, 5, 2, draws=5, resamples=50)
    # Half of the assignments tell the token (log2 3 bits of it), the other half the domain (1 bit), at any token.
    want = slow_bits([(int(e), int(t), int(d)) for row, t, d in zip(ids[0], token, domain, strict=True) for e in row])
    assert want[0] == pytest.approx(np.log2(3) / 2, abs=0.01) and want[2] == pytest.approx(0.5, abs=0.01)
    for part, bits in zip((found.token, found.domain, found.domain_given_token), want, strict=True):
        assert part.bits[0] == pytest.approx(bits, abs=0.03)
        assert part.low[0] <= bits + 0.02 and part.high[0] >= bits - 0.02


def test_intervals_resample_documents(rng):
    """Documents that differ make the interval wide, even of many tokens: its width is the spread over documents."""
    experts = np.repeat(rng.integers(0, 4, 30), 200)  # one expert a document
    document = np.repeat(np.arange(30), 200)
    rows = rows_of(experts[None, :, None], document)._replace(domain=(document % 2).astype(np.int32))
    wide, plain = information(rows, 4, 2, draws=5, resamples=100).domain, []
    for _ in range(200):
        picked = rng.integers(0, 30, 30)
        load = np.zeros((2, 4))
        np.add.at(load, (picked % 2, experts[picked * 200]), 1)
        p = load / load.sum()
        plain.append(sum(x * np.log2(x / (p[i].sum() * p[:, j].sum())) for (i, j), x in np.ndenumerate(p) if x))
    assert wide.high[0] - wide.low[0] == pytest.approx(2 * WIDE * np.std(plain), rel=0.3)  # 100 and 200 resamples


# From layer to layer, from token to token


def test_transitions_and_repeats_equal_slow_loops(rng):
    rows = random_rows(rng, layers=3)
    rows = rows._replace(segment=np.arange(N, dtype=np.int32) // 100)  # documents that share a piece are still apart
    pairs = np.zeros((2, E, E), int)
    same, seen, load = np.zeros(3), np.zeros(3), np.zeros((3, E))
    for layer, i in itertools.product(range(3), range(N)):
        if not rows.counted[layer, i]:
            continue
        ids = rows.expert_ids[layer, i].tolist()
        load[layer, ids] += 1
        if layer < 2 and rows.counted[layer + 1, i]:
            for a, b in itertools.product(ids, rows.expert_ids[layer + 1, i]):
                pairs[layer, a, b] += 1
        near = i and rows.document[i] == rows.document[i - 1] and i % 100  # in one document and one piece
        if near and rows.counted[layer, i - 1]:
            seen[layer] += K
            same[layer] += len(set(ids) & set(rows.expert_ids[layer, i - 1].tolist()))
    np.testing.assert_array_equal(flow.transitions(rows, E), pairs)
    found = flow.repeats(rows, E)
    np.testing.assert_allclose(found.share, same / seen)
    p = load / load.sum(-1, keepdims=True)
    np.testing.assert_allclose(found.by_chance, K * (p**2).sum(-1))
    assert np.abs(found.share - found.by_chance).max() < 0.1  # these choices are independent
    for lifts, table in zip(flow.transition_lift(pairs), pairs, strict=True):
        np.testing.assert_allclose(lifts, table * table.sum() / np.outer(table.sum(1), table.sum(0)))


def test_heads_against_the_trunk_equal_slow_loops(rng):
    rows = random_rows(rng, layers=3)
    found = flow.heads_against_trunk(rows, E, 1)
    both = [i for i in range(N) if rows.counted[2, i] and rows.counted[1, i]]
    same = sum(len(set(rows.expert_ids[2, i].tolist()) & set(rows.expert_ids[1, i].tolist())) for i in both)
    assert found.same_expert_number == pytest.approx(same / (K * len(both)))
    loads = [np.bincount(rows.expert_ids[layer, both].ravel(), minlength=E) for layer in (2, 1)]
    chance = K * sum(a * b for a, b in zip(*loads, strict=True)) / (loads[0].sum() * loads[1].sum())
    assert found.by_chance[0] == pytest.approx(chance)
    deviations = [load - load.mean() for load in loads]
    want = (deviations[0] * deviations[1]).sum() / np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum())
    assert found.load_correlation[0] == pytest.approx(want)
    assert flow.heads_against_trunk(rows, E, 0) is None


# Two checkpoints


def test_matched_experts_share_the_most_choices(rng):
    """The match is the best of all one-to-one maps, tried one by one; a permutation of the experts is found again."""
    rows, others = random_rows(rng, experts=5), random_rows(rng, experts=5)
    others = others._replace(counted=rows.counted)
    found = match_experts(rows, others, 5)
    for layer in (0, 1):
        shared = np.zeros((5, 5))
        for i in np.flatnonzero(rows.counted[layer]):
            for a, b in itertools.product(rows.expert_ids[layer, i], others.expert_ids[layer, i]):
                shared[a, b] += 1
        best = max(sum(shared[a, b] for a, b in enumerate(p)) for p in itertools.permutations(range(5)))
        total = rows.counted[layer].sum() * K
        assert found.shared[layer] == pytest.approx(best / total)
        assert sum(shared[a, b] for a, b in enumerate(found.match[layer])) == best
        kept = np.flatnonzero(rows.counted[layer])
        hits = [len({*rows.expert_ids[layer, i].tolist()} & {*others.expert_ids[layer, i].tolist()}) for i in kept]
        assert agreement(rows, others)[layer] == pytest.approx(np.mean(hits) / K)
    assert np.abs(found.shared - found.by_chance).max() < 0.05  # these two are unrelated
    order = rng.permutation(5)
    renamed = match_experts(rows, rows._replace(expert_ids=order[rows.expert_ids]), 5)
    assert renamed.match.tolist() == [order.tolist()] * 2 and renamed.shared.tolist() == [1, 1]


# Knock-outs


@pytest.mark.long
def test_a_muted_expert_is_one_without_weights():
    """Gate 0 equals an output matrix of zeros: the loss by complete logits. One program for all experts."""
    model = random_model(replace(MODEL, mtp_depth=1), seed=2, execution=DENSE)
    before, found = knockouts._nll._cache_size(), worth(model, BATCHES, resamples=50)
    assert knockouts._nll._cache_size() == before + 1

    w_down = model.sparse.moe.experts.w_down
    whole = w_down[...]
    for layer, expert in ((None, None), (0, 1), (1, 6)):
        w_down[...] = whole if layer is None else whole.at[layer, expert].set(0.0)
        nll = []
        for batch in BATCHES:
            out = forward(model, batch["tokens"], batch["segment_ids"], batch["positions"])
            log_p = np.asarray(jax.nn.log_softmax(out.logits))
            for b, t in np.ndindex(*batch["tokens"].shape):
                segment = batch["segment_ids"][b]
                if t and segment[t] and segment[t] == segment[t - 1]:
                    nll.append(-log_p[b, t - 1, batch["tokens"][b, t]])
        said = found.loss if layer is None else found.without[layer, expert]
        assert said == pytest.approx(np.mean(nll), rel=1e-5) and found.tokens == len(nll)
    w_down[...] = whole
    assert np.abs(found.without - found.loss).max() > 1e-3  # the experts matter here
    assert (found.low <= found.high).all() and worth(model, BATCHES, tokens=1, resamples=2).tokens < found.tokens


def test_parquet_holds_every_counted_choice(rng, tmp_path):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    rows = random_rows(rng, n=30)
    rows = rows._replace(nll=np.where(np.arange(30) % 3, rng.random(30), np.nan).astype(np.float32))
    count = write_parquet(tmp_path / "tokens.parquet", rows, ["layer 3", "MTP 1"], ["a", "b"], ByteTokenizer())
    table = pyarrow.read_table(tmp_path / "tokens.parquet").to_pylist()
    assert len(table) == count == rows.counted.sum()
    at = iter(table)
    for layer, i in np.argwhere(rows.counted):
        row = next(at)
        assert row["layer"] == ("layer 3", "MTP 1")[layer] and row["domain"] == "ab"[rows.domain[i]]
        assert row["expert"] == rows.expert_ids[layer, i].tolist()
        np.testing.assert_allclose(row["gate"], rows.gates[layer, i])
        assert row["margin"] == [None] * K  # unknown in these rows
        assert (row["nll"] is None) == (i % 3 == 0)
        key = ("document", "piece", "position", "token")
        assert [row[k] for k in key] == [rows.document[i], rows.segment[i], rows.position[i], rows.token[i]]
