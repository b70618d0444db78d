"""Routing statistics equal slow loops over tokens, and their measures equal the definitions."""

from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from models import DENSE, random_model
from runs import MODEL

from dsv3_jax.data.tokenizer import ByteTokenizer
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.stats import RoutingStats, collect, decisions, favourites, lift, measures, specialisation
from dsv3_jax.stats.routing_stats import layer_names
from dsv3_jax.stats.token_rows import AFTER, BEFORE, TOP, TokenCounts

TOKENIZER = ByteTokenizer()
B, T, E, K = 3, 20, MODEL.num_experts, MODEL.experts_per_token
DOMAINS = ("even", "odd")


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Create rows of up to four pieces of documents 0 … 6, some of them twice; the last row ends in padding."""
    rng = np.random.default_rng(seed)
    segment_ids = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    segment_ids[-1, 9:] = 0
    starts = np.diff(segment_ids, axis=1, prepend=-1) != 0
    columns = np.arange(T)[None]
    documents = np.where(segment_ids, np.take_along_axis(rng.integers(0, 7, (B, 5)), segment_ids, axis=1), 7)
    batch = {
        "tokens": rng.integers(97, 101, (B, T)),
        "segment_ids": segment_ids,
        "positions": columns - np.maximum.accumulate(np.where(starts, columns, 0), axis=1),
        "domains": documents % 2,
        "documents": documents,
    }
    return {name: array.astype(np.int32) for name, array in batch.items()}


BATCHES = [make_batch(1), make_batch(2)]
CHANGES = {"deepseek": dict(mtp_depth=2), "meta": dict(mtp_depth=1, mtp_kind="meta", num_layers=1)}


class Seen(NamedTuple):
    """A token that is counted, in one layer."""

    batch: dict
    b: int
    t: int
    layer: int
    ids: np.ndarray
    gates: np.ndarray
    scores: np.ndarray  # of all experts
    bias: np.ndarray


@pytest.fixture(scope="module", params=["deepseek", pytest.param("meta", marks=pytest.mark.rare)])
def counted(request) -> tuple[Transformer, RoutingStats, list[Seen], list[np.ndarray]]:
    """A model, its statistics, what it chose for each token, and log p of each batch."""
    model = random_model(replace(MODEL, **CHANGES[request.param]), seed=2, execution=DENSE)
    empty = BATCHES[0] | {"segment_ids": np.zeros((B, T), np.int32)}
    stats = collect(model, [BATCHES[0], empty, BATCHES[1]], TOKENIZER, DOMAINS)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, inputs):
        model = nnx.merge(graphdef, state)
        out = model.forward_hidden(*inputs, watch=("scores",))
        trunk = zip(out.routing.expert_ids, out.routing.gates, out.routing.scores, strict=True)
        heads = [(head.expert_ids, head.gates, head.scores) for head in out.mtp_routing]
        return [*trunk, *heads], jax.nn.log_softmax(out.h @ model.head_matrix())

    outputs = [run(state, [batch[key] for key in ("tokens", "segment_ids", "positions")]) for batch in BATCHES]
    layers, log_p = zip(*jax.tree.map(np.asarray, outputs), strict=True)
    return model, stats, list(choices(model, layers)), list(log_p)


def choices(model, layers_of_batches):
    biases = np.asarray(decisions.biases(model))
    for batch, layers in zip(BATCHES, layers_of_batches, strict=True):
        for layer, (ids, gates, scores) in enumerate(layers):
            for b, t in np.ndindex(B, ids.shape[1]):
                segment, read = batch["segment_ids"][b], t + (T - ids.shape[1])
                if segment[t] and (model.cfg.mtp_kind == "meta" or segment[read] == segment[t]):
                    yield Seen(batch, b, t, layer, ids[b, t], gates[b, t], scores[b, t], biases[layer])


def test_counts_equal_slow_loops(counted):
    model, stats, seen_tokens, _ = counted
    shape = (7, len(stats.layers), E)
    load, coactivation = np.zeros(shape, int), np.zeros((*shape[1:], E), int)
    entropies, pairs = np.zeros((2, *shape[:2])), {}
    for batch, b, t, layer, ids, gates, scores, _ in seen_tokens:
        document = batch["documents"][b, t]
        for i, weights in enumerate((gates, scores)):
            p = weights.astype(np.float64) / weights.sum()
            entropies[i, document, layer] -= (p * np.log(p)).sum() / np.log(len(p))
        for e in ids:
            load[document, layer, e] += 1
            key = (layer, int(e), int(batch["tokens"][b, t]))
            pairs[key] = pairs.get(key, 0) + 1
            for other in ids:
                coactivation[layer, e, other] += 1
    seen = load.sum((1, 2)) > 0
    assert 4 < seen.sum() <= 7
    np.testing.assert_array_equal(stats.document_load, load[seen])
    np.testing.assert_array_equal(stats.document_domains, np.flatnonzero(seen) % 2)
    np.testing.assert_array_equal(stats.coactivation, coactivation)
    found = stats.document_gate_entropy, stats.document_score_entropy
    np.testing.assert_allclose(found, entropies[:, seen], rtol=1e-5)  # the model's float32
    counts = stats.token_counts
    keys = zip(counts.layer.tolist(), counts.expert.tolist(), counts.token.tolist(), strict=True)
    assert list(zip(keys, counts.num_routed.tolist(), strict=True)) == sorted(pairs.items())
    assert stats.layers == layer_names(model.cfg)
    weights = stats.load_by_domain.sum(-1) / stats.load.sum(-1)
    for sums, mean in zip(found, (stats.gate_entropy, stats.score_entropy), strict=True):
        np.testing.assert_allclose((weights * stats.mean_by_domain(sums)).sum(0), mean, rtol=1e-12)


def slow_choice(choice: np.ndarray, count: int) -> list[int]:
    """The largest `choice` scores within the best groups, equations as loops."""
    size = E // MODEL.num_groups
    groups = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(MODEL.num_groups)]
    kept = sorted(range(MODEL.num_groups), key=lambda g: (-groups[g], g))[: MODEL.groups_per_token]
    allowed = [e for e in range(E) if e // size in kept]
    return sorted(allowed, key=lambda e: (-choice[e], e))[:count]


def test_bias_and_margins_equal_slow_loops(counted):
    """The bias's work is the difference to a choice by the scores alone; margins are over the best expert left out."""
    model, stats, seen_tokens, _ = counted
    changed, without = np.zeros(len(stats.layers), int), np.zeros((len(stats.layers), E), int)
    margins, sums = [[] for _ in stats.layers], {}
    for batch, b, t, layer, ids, gates, scores, bias in seen_tokens:
        np.testing.assert_allclose(scores[ids] / scores[ids].sum(), gates / gates.sum(), rtol=1e-5)
        plain = slow_choice(scores, K)
        assert slow_choice(scores + bias, K) == ids.tolist()
        runner_up = slow_choice(scores + bias, K + 1)[K]
        changed[layer] += len(set(ids.tolist()) - set(plain))
        margin = (scores + bias)[ids] - (scores + bias)[runner_up]
        margins[layer].append(margin)
        for e in plain:
            without[layer, e] += 1
        for e, m in zip(ids.tolist(), margin.tolist(), strict=True):
            sums.setdefault((layer, e, int(batch["tokens"][b, t])), []).append(m)
    assert (changed > 0).all()
    np.testing.assert_array_equal(stats.bias.changed, changed)
    np.testing.assert_array_equal(stats.bias.load_without, without)
    np.testing.assert_allclose(stats.bias.value, np.asarray(decisions.biases(model)))
    for layer, of_layer in enumerate(margins):
        np.testing.assert_allclose(stats.rows.margin[layer, stats.rows.counted[layer]], of_layer, atol=1e-6)
    means = [np.mean(sums[key]) for key in sorted(sums)]
    np.testing.assert_allclose(stats.token_counts.margin, means, atol=1e-6)


def test_rows_are_the_tokens_in_the_order_of_reading(counted):
    _, stats, seen_tokens, log_probabilities = counted
    rows, at = stats.rows, 0
    taken = np.zeros(len(stats.layers), int)
    expected = [[(one.ids, one.gates) for one in seen_tokens if one.layer == i] for i in range(len(stats.layers))]
    for batch, log_p in zip(BATCHES, log_probabilities, strict=True):
        for b, t in zip(*np.nonzero(batch["segment_ids"]), strict=True):
            of_batch = [batch[key][b, t] for key in ("tokens", "positions", "documents", "domains")]
            assert [rows.token[at], rows.position[at], rows.document[at], rows.domain[at]] == of_batch
            new = t == 0 or batch["segment_ids"][b, t] != batch["segment_ids"][b, t - 1]
            assert (at == 0 or rows.segment[at] != rows.segment[at - 1]) == new
            nll = np.nan if new else -log_p[b, t - 1, batch["tokens"][b, t]]
            np.testing.assert_allclose(rows.nll[at], nll, rtol=1e-4)
            for layer in np.flatnonzero(rows.counted[:, at]):
                ids, gates = expected[layer][taken[layer]]
                np.testing.assert_array_equal(rows.expert_ids[layer, at], ids)
                np.testing.assert_allclose(rows.gates[layer, at], gates)
                taken[layer] += 1
            at += 1
    assert at == len(rows.token) and taken.tolist() == [len(of_layer) for of_layer in expected]


def test_contexts_are_the_largest_gates_of_different_tokens_and_documents(counted):
    _, stats, seen_tokens, _ = counted
    seen: dict = {}  # (layer, expert) → [(gate, order, token, document, window)]
    for order, (batch, b, t, layer, ids, gates, *_) in enumerate(seen_tokens):
        tokens, segment = batch["tokens"][b], batch["segment_ids"][b]
        columns = range(t - BEFORE, t + AFTER + 1)
        window = [int(tokens[i]) if 0 <= i < T and segment[i] == segment[t] else -1 for i in columns]
        for e, gate in zip(ids.tolist(), gates.tolist(), strict=True):
            found = (gate, order, int(tokens[t]), int(batch["documents"][b, t]), window)
            seen.setdefault((layer, e), []).append(found)
    want = []
    for layer, e in sorted(seen):
        kept: list = []
        for gate, _, token, document, window in sorted(seen[layer, e], key=lambda found: (-found[0], found[1])):
            if len(kept) < TOP and all(token != k[3] and document != k[4] for k in kept):
                kept.append((layer, e, gate, token, document, window))
        want += kept
    found = stats.contexts
    columns = found.layer, found.expert, found.gate, found.tokens[:, BEFORE], found.document, found.tokens
    got = list(zip(*(column.tolist() for column in columns), strict=True))
    assert got == want and len(want) > len(seen)


def of_loads(document_load, document_domains, num_domains) -> RoutingStats:
    return RoutingStats.from_loads(document_load, np.asarray(document_domains), tuple("abcdefgh"[:num_domains]))


def chance_of(stats, draws, seed):
    domains = stats.document_domains, len(stats.domains)
    return measures.permuted_information(stats.document_load, *domains, draws=draws, seed=seed)


def test_information_of_experts_by_domain_at_random_and_by_document(rng):
    domains = np.arange(40) % 4
    by_domain = np.zeros((40, 1, 8))
    by_domain[np.arange(40), 0, 2 * domains + 1] = rng.integers(50, 100, 40)
    at_random = rng.multinomial(200, np.full(8, 1 / 8), (40, 1))
    by_document = rng.multinomial(200, rng.dirichlet(np.full(8, 0.3), 40)[:, None])  # whatever its domain
    stats = of_loads(np.concatenate([by_domain, at_random, by_document], axis=1), domains, 4)
    result = specialisation(stats, draws=100, seed=1)
    upper_bound = measures.domain_entropy(stats.load_by_domain)
    assert result.bits[0] == pytest.approx(upper_bound[0], rel=1e-12)
    assert result.share[0] == pytest.approx(1, rel=1e-12)
    assert result.p_value[0] == 1 / 101 and result.shuffled_95[0] < 0.5 * upper_bound[0]
    drawn = chance_of(stats, draws=100, seed=1)
    np.testing.assert_allclose(result.shuffled_mean, drawn.mean(0))
    assert (result.bits[1:] <= np.quantile(drawn, 0.99, axis=0)[1:]).all()
    # Documents with few experts each: a shuffle of tokens would count this as specialisation.
    assert result.shuffled_mean[2] > 10 * result.shuffled_mean[1]


def test_chance_moves_whole_documents(rng):
    two = of_loads(rng.integers(0, 50, (2, 3, 4)), [0, 1], 2)
    result = specialisation(two, draws=20)
    # A shuffle of two documents can only swap their domains, which keeps the information.
    np.testing.assert_allclose(chance_of(two, 20, 1), np.broadcast_to(result.bits[None], (20, 3)), rtol=1e-12)
    np.testing.assert_array_equal(result.p_value, 1)
    with pytest.raises(ValueError, match="draws=0"):
        specialisation(two, draws=0)


def test_lift_of_experts_chosen_together(rng):
    coactivation = np.zeros((5, 5), int)
    for _ in range(50):
        ids = rng.choice(5, 2, replace=False, p=[0.4, 0.3, 0.1, 0.1, 0.1])
        coactivation[np.ix_(ids, ids)] += 1
    lifts, load = lift(coactivation[None])[0], np.diag(coactivation)
    pairs = [(e, f) for e in range(5) for f in range(5) if e != f]
    scale = sum(coactivation[p] for p in pairs) / sum(load[e] * load[f] for e, f in pairs)
    for e, f in pairs:
        assert lifts[e, f] == pytest.approx(coactivation[e, f] / (scale * load[e] * load[f]), rel=1e-12)
    assert np.isnan(np.diag(lifts)).all()


def test_favourites_are_ranked_by_their_part_of_the_information(counted):
    """The bits of all tokens add up to I(expert; token); a frequent token comes before a rare one of larger lift."""
    stats = counted[1]
    counts = stats.token_counts
    for layer in range(len(stats.layers)):
        here = counts.layer == layer
        joint = np.zeros((128, 1, E))
        joint[counts.token[here], 0, counts.expert[here]] = counts.num_routed[here]
        p = joint[:, 0] / joint.sum()
        parts = np.where(p > 0, p * np.log2(np.where(p > 0, p, 1) / (p.sum(1)[:, None] * p.sum(0)[None] + 1e-300)), 0)
        assert parts.sum() == pytest.approx(measures.mutual_information(joint)[0], rel=1e-9)
        for e, of_expert in enumerate(favourites(stats, layer, top=99, min_count=1)):
            assert [f.bits for f in of_expert] == sorted((f.bits for f in of_expert), reverse=True)
            assert len({f.token for f in of_expert}) == len(of_expert) == (parts[:, e] > 0).sum()
            np.testing.assert_allclose([f.bits for f in of_expert], [parts[f.token, e] for f in of_expert], rtol=1e-9)
    # Token 7 always goes to expert 0, token 8 in 40 of 50 cases: the second tells more. Tokens 7 and 9 are rarer.
    expert, token, num_routed = np.array([[0, 0, 0, 1, 1], [7, 8, 9, 8, 9], [4, 40, 6, 10, 40]])
    stats = replace(
        of_loads(np.array([[[50, 50]]]), [0], 1), token_counts=TokenCounts(0 * expert, expert, token, num_routed)
    )
    assert [(f.token, f.lift) for f in favourites(stats, 0, min_count=1)[0]] == [(8, 1.6), (7, 2.0)]
    assert [f.token for f in favourites(stats, 0, min_count=50)[0]] == [8]


def test_refuses_models_without_experts_and_batches_without_tokens(counted):
    dense = abstract(replace(MODEL, num_layers=3, num_dense_layers=3, mtp_depth=0))
    for model, sentence in ((dense, "no experts to count: all of its 3 layers are dense"), (counted[0], "no token to")):
        with pytest.raises(ValueError, match=sentence):
            collect(model, [], TOKENIZER, DOMAINS)
