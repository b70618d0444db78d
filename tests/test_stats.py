"""Routing statistics over tokens equal their definitions, and so do their measures."""

import itertools
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from models import DENSE, random_model
from runs import MODEL, packed_batch, refused

from dsv3_jax import reference
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.stats import RoutingStats, collect, decisions, favourites, measures, specialisation
from dsv3_jax.stats.routing_stats import layer_names
from dsv3_jax.stats.token_rows import AFTER, BEFORE, TOP, find_contexts, rows_of

B, T, E, K = 3, 20, MODEL.num_experts, MODEL.experts_per_token
DOMAINS = ("even", "odd")


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Create rows of up to four pieces of documents 0 … 6, some twice; the last is padded."""
    rng = np.random.default_rng(seed)
    segment_ids = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    segment_ids[-1, 9:] = 0
    drawn = np.take_along_axis(rng.integers(0, 7, (B, 5)), segment_ids, axis=1)
    documents = np.where(segment_ids, drawn, 7)
    batch = packed_batch(rng, segment_ids, vocab_size=4)
    batch |= {"domains": documents % 2, "documents": documents}
    return {name: np.asarray(array, np.int32) for name, array in batch.items()}


BATCHES = [make_batch(1), make_batch(2)]
MODEL_2 = replace(MODEL, mtp_depth=2)


class Layer(NamedTuple):
    """The n tokens that are counted in one layer, in the order of reading."""

    at: np.ndarray  # [n], places among the tokens of both batches
    ids: np.ndarray  # [n, K]
    gates: np.ndarray  # [n, K]
    scores: np.ndarray  # [n, E]
    bias: np.ndarray  # [E]


def flat(name: str) -> np.ndarray:
    return np.concatenate([batch[name].ravel() for batch in BATCHES])


@pytest.fixture(scope="module")
def counted() -> tuple[Transformer, RoutingStats, list[Layer], np.ndarray]:
    """A model, its statistics, what it chose for each token, and log p of the token after each."""
    model = random_model(MODEL_2, seed=2, execution=DENSE)
    empty = BATCHES[0] | {"segment_ids": np.zeros((B, T), np.int32)}
    stats = collect(model, [BATCHES[0], empty, BATCHES[1]], DOMAINS)
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, tokens, segment_ids, positions):
        model = nnx.merge(graphdef, state)
        how = model.how(watch=frozenset({"scores"}))
        out = model.forward_hidden(tokens, segment_ids, positions, how=how)
        trunk = zip(out.routing.expert_ids, out.routing.gates, out.routing.scores, strict=True)
        heads = [(head.expert_ids, head.gates, head.scores) for head in out.mtp_routing]
        return [*trunk, *heads], jax.nn.log_softmax(out.h @ model.head_matrix())

    names = ("tokens", "segment_ids", "positions")
    outputs = [run(state, *(batch[name] for name in names)) for batch in BATCHES]
    choices, log_p = zip(*jax.tree.map(np.asarray, outputs), strict=True)
    segments, layers = flat("segment_ids").reshape(-1, T), []
    biases = np.asarray(decisions.biases(model))
    for of_layer, bias in zip(zip(*choices, strict=True), biases, strict=True):
        arrays = [np.concatenate(parts) for parts in zip(*of_layer, strict=True)]
        length = arrays[0].shape[1]  # a head reads up to a later token, of the same piece
        first, last = segments[:, :length], segments[:, T - length :]
        rows, columns = np.nonzero((first > 0) & (first == last))
        layers.append(Layer(rows * T + columns, *(x[rows, columns] for x in arrays), bias))
    return model, stats, layers, np.concatenate(log_p).reshape(2 * B * T, -1)


def test_counts_equal_the_definitions(counted):
    _, stats, layers, _ = counted
    load, coactivation = np.zeros((7, len(layers), E), int), np.zeros((len(layers), E, E), int)
    entropies = np.zeros((2, 7, len(layers)))
    for i, one in enumerate(layers):
        documents = flat("documents")[one.at]
        np.add.at(load[:, i], (documents[:, None], one.ids), 1)
        taken = np.eye(E, dtype=int)[one.ids].sum(1)
        coactivation[i] = taken.T @ taken
        for total, weights in zip(entropies, (one.gates, one.scores), strict=True):
            p = weights.astype(np.float64) / weights.sum(-1, keepdims=True)
            np.add.at(total[:, i], documents, -(p * np.log(p)).sum(-1) / np.log(p.shape[1]))
    seen = load.sum((1, 2)) > 0
    assert stats.layers == layer_names(MODEL_2)
    np.testing.assert_array_equal(stats.document_load, load[seen])
    np.testing.assert_array_equal(stats.document_domains, np.flatnonzero(seen) % 2)
    np.testing.assert_array_equal(stats.coactivation, coactivation)
    found = stats.document_gate_entropy, stats.document_score_entropy
    np.testing.assert_allclose(found, entropies[:, seen], rtol=1e-5)  # the model's float32
    weights = stats.load_by_domain.sum(-1) / stats.load.sum(-1)
    for sums, mean in zip(found, (stats.gate_entropy, stats.score_entropy), strict=True):
        np.testing.assert_allclose((weights * stats.mean_by_domain(sums)).sum(0), mean, rtol=1e-12)


def choose(choice: np.ndarray, count: int) -> np.ndarray:
    return reference.top_k(reference.in_best_groups(MODEL, choice[None], np)[0], count, np)


def test_bias_and_margins_equal_the_definitions(counted):
    model, stats, layers, _ = counted
    for i, (_, ids, gates, scores, bias) in enumerate(layers):
        of_ids = np.take_along_axis(scores, ids, 1)
        shares = of_ids / of_ids.sum(1)[:, None], gates / gates.sum(1)[:, None]
        np.testing.assert_allclose(*shares, rtol=1e-5)
        plain, ranked = choose(scores, K), choose(scores + bias, K + 1)
        np.testing.assert_array_equal(ranked[:, :K], ids)
        assert stats.bias.changed[i] == (ids[:, :, None] != plain[:, None]).all(2).sum() > 0
        load = np.bincount(plain.ravel(), minlength=E)
        np.testing.assert_array_equal(stats.bias.load_without[i], load)
        sums = np.take_along_axis(scores + bias, ranked, 1)
        margins = sums[:, :K] - sums[:, K:]
        np.testing.assert_allclose(stats.rows.margin[i, stats.rows.counted[i]], margins, atol=1e-6)
    np.testing.assert_allclose(stats.bias.value, np.asarray(decisions.biases(model)))


def test_rows_are_the_tokens_in_the_order_of_reading(counted):
    _, stats, layers, log_p = counted
    rows, real = stats.rows, np.flatnonzero(flat("segment_ids"))
    for name in ("token", "position", "document", "domain"):
        np.testing.assert_array_equal(getattr(rows, name), flat(f"{name}s")[real])
    first = rows.position == 0
    np.testing.assert_array_equal(np.diff(rows.segment) != 0, first[1:])
    nll = np.where(first, np.nan, -log_p[real - 1, rows.token])
    np.testing.assert_allclose(rows.nll, nll, rtol=1e-4)
    found = (rows.counted, rows.expert_ids, rows.gates)
    for one, here, ids, gates in zip(layers, *found, strict=True):
        np.testing.assert_array_equal(real[here], one.at)
        np.testing.assert_array_equal(ids[here], one.ids)
        np.testing.assert_allclose(gates[here], one.gates)


def test_contexts_are_the_largest_gates_of_different_tokens_and_documents(counted):
    _, stats, layers, _ = counted
    tokens, segments, documents = flat("tokens"), flat("segment_ids"), flat("documents")
    want = []
    for (layer, one), e in itertools.product(enumerate(layers), range(E)):
        kept: list = []
        places = zip(*np.nonzero(one.ids == e), strict=True)
        for i in sorted(places, key=lambda i, gates=one.gates: -gates[i]):
            at = int(one.at[i[0]])
            near = range(at - BEFORE, at + AFTER + 1)
            window = [
                int(tokens[j]) if at // T == j // T and segments[j] == segments[at] else -1
                for j in near
            ]
            new = (layer, e, float(one.gates[i]), int(tokens[at]), int(documents[at]), window)
            if len(kept) < TOP and all(new[3] != old[3] and new[4] != old[4] for old in kept):
                kept.append(new)
        want += kept
    found = find_contexts(stats.rows, E)
    columns = [found.layer, found.expert, found.gate, found.tokens[:, BEFORE], found.document]
    got = list(zip(*(column.tolist() for column in (*columns, found.tokens)), strict=True))
    assert got == want and len(want) > E * len(layers)


def of_loads(document_load, document_domains, num_domains) -> RoutingStats:
    names = tuple("abcdefgh"[:num_domains])
    return RoutingStats.from_loads(document_load, np.asarray(document_domains), names)


def test_information_of_experts_by_domain_at_random_and_by_document(rng):
    domains = np.arange(40) % 4
    by_domain = np.zeros((40, 1, 8))
    by_domain[np.arange(40), 0, 2 * domains + 1] = rng.integers(50, 100, 40)
    at_random = rng.multinomial(200, np.full(8, 1 / 8), (40, 1))
    # whatever its domain
    by_document = rng.multinomial(200, rng.dirichlet(np.full(8, 0.3), 40)[:, None])
    stats = of_loads(np.concatenate([by_domain, at_random, by_document], axis=1), domains, 4)
    result = specialisation(stats, draws=100, seed=1)
    upper_bound = measures.domain_entropy(stats.load_by_domain)
    assert result.bits[0] == pytest.approx(upper_bound[0], rel=1e-12)
    assert result.share[0] == pytest.approx(1, rel=1e-12)
    assert result.p_value[0] == 1 / 101 and result.shuffled_95[0] < 0.5 * upper_bound[0]
    drawn, same = [], np.random.default_rng(1)
    for _ in range(100):
        shuffled = replace(stats, document_domains=same.permutation(domains))
        drawn.append(measures.mutual_information(shuffled.load_by_domain))
    np.testing.assert_allclose(result.shuffled_mean, np.mean(drawn, axis=0))
    assert (result.bits[1:] <= np.quantile(drawn, 0.99, axis=0)[1:]).all()
    # Documents with few experts each: a shuffle of tokens would count this as specialisation.
    assert result.shuffled_mean[2] > 10 * result.shuffled_mean[1]


def test_favourites_are_ranked_by_their_part_of_the_information():
    """Frequent tokens precede rare ones of larger lift: p log2(p / (p_token p_expert))."""
    joint = np.array([[4, 0], [40, 10], [6, 40]])  # tokens 7, 8, 9 by expert
    token, expert = (np.repeat(x, joint.ravel()) for x in np.indices(joint.shape).reshape(2, -1))
    rows = rows_of(expert[None, :, None])._replace(token=(token + 7).astype(np.int32))
    rows = rows._replace(margin=np.arange(100, dtype=np.float32)[None, :, None])
    stats = replace(of_loads(np.array([[[50, 50]]]), [0], 1), rows=rows)
    first = favourites(stats, 0, min_count=1)[0]
    found = [(f.token, f.num_routed, f.lift, f.margin) for f in first]
    assert found == [(8, 40, 1.6, 23.5), (7, 4, 2.0, 1.5)]
    np.testing.assert_allclose([f.bits for f in first], [0.4 * np.log2(1.6), 0.04], rtol=1e-12)
    assert [f.token for f in favourites(stats, 0, min_count=50)[0]] == [8]


def test_refuses_models_without_experts_and_batches_without_tokens(counted):
    dense = abstract(replace(MODEL, num_layers=3, num_dense_layers=3, mtp_depth=0))
    with refused("no experts to count: all of its 3 layers are dense"):
        collect(dense, [], DOMAINS)
    with refused("no token to"):
        collect(counted[0], [], DOMAINS)
