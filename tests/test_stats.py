"""Routing statistics against loops over tokens, their measures against the definitions, and the page as a reader."""

import contextlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import forward, random_model
from runs import MODEL, cheap_compiles, finished, rows_of, unhooked_cli

from dsv3_jax.metrics import Rows, read_rows
from dsv3_jax.modules.transformer import Transformer, abstract
from dsv3_jax.stats import collect, favourites, lift, measures, plots, read_load, readable, report, specialisation
from dsv3_jax.stats.collect import RoutingStats, layer_names
from dsv3_jax.stats.page import page
from dsv3_jax.stats.reporting import PICTURES, as_json
from dsv3_jax.stats.tokens import AFTER, BEFORE, NEAR, TOP, Contexts, TokenCounts, context
from dsv3_jax.tokenizer import ByteTokenizer

WORDS = ByteTokenizer()
B, T, E, K = 3, 20, MODEL.num_experts, MODEL.experts_per_token
DOMAINS = ("even", "odd")


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    with cheap_compiles(tmp_path_factory.getbasetemp()):
        yield tmp_path_factory.getbasetemp()


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Rows of up to four pieces of documents 0 … 6, some of which come again; the last row ends in padding."""
    rng = np.random.default_rng(seed)
    segment_ids = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    segment_ids[-1, 9:] = 0
    starts = np.diff(segment_ids, axis=1, prepend=-1) != 0
    columns = np.arange(T)[None]
    documents = np.take_along_axis(rng.integers(0, 7, (B, 5)), segment_ids, axis=1)
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


@pytest.fixture(scope="module", params=CHANGES)
def counted(request) -> tuple[Transformer, RoutingStats]:
    model = random_model(replace(MODEL, **CHANGES[request.param]), seed=2)
    empty = BATCHES[0] | {"segment_ids": np.zeros((B, T), np.int32)}
    return model, collect(model, [BATCHES[0], empty, BATCHES[1]], WORDS, DOMAINS)


def choices(model):
    """(batch, row, place, layer, ids, gates) of every token that counts, one after the other."""
    for batch in BATCHES:
        out = forward(model, batch["tokens"], batch["segment_ids"], batch["positions"])
        layers = [
            *zip(out.routing.expert_ids, out.routing.gates, strict=True),
            *((r.expert_ids, r.gates) for r in out.mtp_routing),
        ]
        for layer, (ids, gates) in enumerate(layers):
            for b in range(B):
                for t in range(ids.shape[1]):
                    segment, read = batch["segment_ids"][b], t + (T - ids.shape[1])
                    if segment[t] and (model.cfg.mtp_kind == "meta" or segment[read] == segment[t]):
                        yield batch, b, t, layer, ids[b, t], gates[b, t]


def test_counts_are_the_slow_loops(counted):
    model, stats = counted
    shape = (7, len(stats.layers), E)
    load, together = np.zeros(shape, int), np.zeros((*shape[1:], E), int)
    entropy, pairs = np.zeros(shape[:2]), {}
    for batch, b, t, layer, ids, gates in choices(model):
        document = batch["documents"][b, t]
        p = gates.astype(np.float64) / gates.sum()
        entropy[document, layer] -= (p * np.log(p)).sum() / np.log(K)
        for e in ids:
            load[document, layer, e] += 1
            key = (layer, int(e), int(batch["tokens"][b, t]))
            pairs[key] = pairs.get(key, 0) + 1
            for other in ids:
                together[layer, e, other] += 1
    there = load.sum((1, 2)) > 0
    assert 4 < there.sum() < 7 or there.all()
    np.testing.assert_array_equal(stats.document_load, load[there])
    np.testing.assert_array_equal(stats.document_domains, np.flatnonzero(there) % 2)
    np.testing.assert_array_equal(stats.together, together)
    np.testing.assert_allclose(stats.document_gate_entropy, entropy[there], rtol=1e-5)  # the model's float32
    counts = stats.token_counts
    keys = zip(counts.layer.tolist(), counts.expert.tolist(), counts.token.tolist(), strict=True)
    assert list(zip(keys, counts.times.tolist(), strict=True)) == sorted(pairs.items())
    assert stats.layers == layer_names(model.cfg)


def test_sums_agree_with_each_other_and_with_the_model(counted):
    model, stats = counted
    own = sum(
        np.concatenate([out.routing.load, *(r.load[None] for r in out.mtp_routing)])
        for out in (forward(model, b["tokens"], b["segment_ids"], b["positions"]) for b in BATCHES)
    )
    np.testing.assert_array_equal(stats.load, own)
    np.testing.assert_array_equal(stats.load_by_domain.sum(0), stats.load)
    np.testing.assert_array_equal(stats.load.sum(-1), stats.tokens * K)
    np.testing.assert_array_equal(stats.together, stats.together.swapaxes(1, 2))
    np.testing.assert_array_equal(np.diagonal(stats.together, axis1=1, axis2=2), stats.load)
    np.testing.assert_array_equal(stats.together.sum(-1), stats.load * K)  # each of a token's experts meets K
    weights = stats.load_by_domain.sum(-1) / stats.load.sum(-1)
    for sums, mean in (
        (stats.document_gate_entropy, stats.gate_entropy),
        (stats.document_score_entropy, stats.score_entropy),
    ):
        np.testing.assert_allclose((weights * stats.mean_by_domain(sums)).sum(0), mean, rtol=1e-12)
        assert ((0 < mean) & (mean < 1)).all()


def test_entropy_of_scores_is_the_scores_own():
    model = random_model(replace(MODEL, num_layers=1, mtp_depth=0), seed=1)
    h = np.random.default_rng(0).standard_normal((1, 5, MODEL.dim)).astype(np.float32)
    blocks = nnx.merge(nnx.graphdef(model.sparse), jax.tree.map(lambda x: x[0], nnx.state(model.sparse)))
    experts = model.experts.arrays()
    mask = jnp.ones((1, 5), jnp.bool_)
    _, found, _ = jax.jit(blocks.moe)(jnp.asarray(h), mask, experts, experts, jnp.zeros((), jnp.int32))
    logits = h[0].astype(np.float64) @ np.asarray(blocks.moe.w_router[...], np.float64)
    scores = 1 / (1 + np.exp(-logits))
    p = scores / scores.sum(-1, keepdims=True)
    np.testing.assert_allclose(found.score_entropy[0], -(p * np.log(p)).sum(-1) / np.log(E), rtol=1e-5)


def test_contexts_are_the_places_of_the_largest_gates(counted):
    model, stats = counted
    seen: dict = {}  # (layer, expert) → what the last NEAR tokens were → (gate, window)
    for batch, b, t, layer, ids, gates in choices(model):
        tokens, segment = batch["tokens"][b], batch["segment_ids"][b]
        around = range(t - BEFORE, t + AFTER + 1)
        window = [int(tokens[i]) if 0 <= i < T and segment[i] == segment[t] else -1 for i in around]
        near = tuple(window[BEFORE + 1 - NEAR : BEFORE + 1])
        for e, gate in zip(ids.tolist(), gates.tolist(), strict=True):
            mine = seen.setdefault((layer, e), {})
            if near not in mine or gate > mine[near][0]:
                mine[near] = (gate, window)
    found: dict = {}
    for layer, e, gate, window in zip(*(x.tolist() for x in stats.contexts), strict=True):
        found.setdefault((layer, e), []).append((gate, window))
    assert list(found) == sorted(seen)
    assert max(map(len, seen.values())) > TOP  # or nothing was left out
    for key, mine in seen.items():
        best = sorted((gate for gate, _ in mine.values()), reverse=True)[:TOP]
        assert [gate for gate, _ in found[key]] == best
        assert all((gate, window) in mine.values() for gate, window in found[key])


def slow_information(load_by_domain) -> float:
    joint = load_by_domain / load_by_domain.sum()
    total = 0.0
    for row in joint:
        for e, p in enumerate(row):
            if p:
                total += p * np.log2(p / (row.sum() * joint[:, e].sum()))
    return total


def made(document_load, document_domains, num_domains, **changes) -> RoutingStats:
    """Statistics of nothing but these loads [S, L, E], of one expert a token."""
    num_documents, num_layers, num_experts = document_load.shape
    none, zeros = np.zeros(0, np.int64), np.zeros((num_documents, num_layers))
    values = dict(
        layers=tuple(f"layer {i}" for i in range(num_layers)),
        domains=tuple("abcdefgh"[:num_domains]),
        experts_per_token=1,
        document_domains=np.asarray(document_domains, np.int64),
        document_load=document_load.astype(np.int64),
        document_gate_entropy=zeros,
        document_score_entropy=zeros,
        together=np.zeros((num_layers, num_experts, num_experts), np.int64),
        token_counts=TokenCounts(none, none, none, none),
        contexts=Contexts(none, none, np.zeros(0, np.float32), np.zeros((0, BEFORE + 1 + AFTER), np.int32)),
    )
    return RoutingStats(**values | changes)


def test_information_is_the_definition(rng):
    loads = rng.integers(0, 9, (3, 2, 5))
    found = measures.mutual_information(loads)
    np.testing.assert_allclose(found, [slow_information(loads[:, layer]) for layer in (0, 1)], rtol=1e-12)
    np.testing.assert_array_equal(measures.mutual_information(np.zeros((3, 2, 5))), [0, 0])


def test_information_of_experts_that_know_the_domain_and_of_those_that_do_not(rng):
    domains = np.arange(40) % 4
    knows = np.zeros((40, 1, 8))
    knows[np.arange(40), 0, 2 * domains + 1] = rng.integers(50, 100, 40)
    blind = rng.multinomial(200, np.full(8, 1 / 8), (40, 1))
    own = rng.multinomial(200, rng.dirichlet(np.full(8, 0.3), 40)[:, None])  # each document's, whatever its domain
    stats = made(np.concatenate([knows, blind, own], axis=1), domains, 4)
    found = specialisation(stats, draws=100, seed=1)
    most = measures.domain_entropy(stats.load_by_domain)
    assert found.bits[0] == pytest.approx(most[0], rel=1e-12) and found.share[0] == pytest.approx(1, rel=1e-12)
    assert found.p_value[0] == 1 / 101 and found.shuffled_95[0] < 0.5 * most[0]
    assert (found.bits[1:] <= np.quantile(chance_of(stats), 0.99, axis=0)[1:]).all()
    # documents of few experts each: shuffling tokens would have called this specialisation
    assert found.shuffled_mean[2] > 10 * found.shuffled_mean[1]


def chance_of(stats, draws=100, seed=1):
    return measures.permuted_information(
        stats.document_load, stats.document_domains, len(stats.domains), draws=draws, seed=seed
    )


def test_chance_moves_whole_documents_and_is_reproducible(rng):
    two = made(rng.integers(0, 50, (2, 3, 4)), [0, 1], 2)
    found = specialisation(two, draws=20)
    # the two can only change names, which tells as much
    np.testing.assert_allclose(chance_of(two, 20), np.broadcast_to(found.bits[None], (20, 3)), rtol=1e-12)
    np.testing.assert_array_equal(found.p_value, 1)
    many = made(rng.integers(0, 50, (12, 3, 4)), np.arange(12) % 3, 3)
    np.testing.assert_array_equal(chance_of(many, 20, 5), chance_of(many, 20, 5))
    assert (chance_of(many, 20, 5) != chance_of(many, 20, 6)).any()
    drawn, told = chance_of(many, 50, 0), specialisation(many, draws=50)
    np.testing.assert_allclose(told.shuffled_mean, drawn.mean(0))
    np.testing.assert_allclose(told.shuffled_95, np.quantile(drawn, 0.95, axis=0))
    one = specialisation(made(rng.integers(1, 9, (4, 2, 3)), np.zeros(4), 1), draws=3)
    np.testing.assert_allclose(one.bits, 0, atol=1e-12)
    np.testing.assert_array_equal(one.share, 0)
    with pytest.raises(ValueError, match="draws=0"):
        specialisation(many, draws=0)


def test_lift_of_experts_chosen_together():
    even = np.full((1, 4, 4), 5) + np.diag([10] * 4)[None]
    found = lift(even)[0]
    assert np.isnan(np.diag(found)).all()
    np.testing.assert_allclose(found[~np.eye(4, dtype=bool)], 1, rtol=1e-12)
    rng = np.random.default_rng(3)
    together = np.zeros((5, 5), int)
    for _ in range(50):
        ids = rng.choice(5, 2, replace=False, p=[0.4, 0.3, 0.1, 0.1, 0.1])
        together[np.ix_(ids, ids)] += 1
    found, load = lift(together[None])[0], np.diag(together)
    pairs = [(e, f) for e in range(5) for f in range(5) if e != f]
    scale = sum(together[p] for p in pairs) / sum(load[e] * load[f] for e, f in pairs)
    for e, f in pairs:
        assert found[e, f] == pytest.approx(together[e, f] / (scale * load[e] * load[f]), rel=1e-12)
    assert np.isnan(lift(np.diag([3, 4])[None])).all()  # one expert a token: there are no pairs


def test_favourites_are_by_lift_among_the_frequent():
    # tokens 7, 8, 9 occur 10, 4 and 6 times; expert 1 gets half of all
    times = np.array([2, 2, 6, 8, 2, 0])
    counts = TokenCounts(np.zeros(6, np.int64), np.repeat([0, 1], 3), np.tile([7, 8, 9], 2), times)
    stats = made(np.array([[[10, 10]]]), [0], 1, token_counts=TokenCounts(*(x[times > 0] for x in counts)))
    said = [[tuple(f) for f in expert] for expert in favourites(stats, 0, min_count=5)]
    assert said == [[(9, 6, 2.0)], [(7, 8, 1.6)]]
    assert favourites(stats, 0, min_count=11) == [[], []]
    assert len(favourites(stats, 0, top=0, min_count=1)[0]) == 0


def test_text_for_the_eye():
    assert readable(WORDS, [*"é\u202e\t".encode(), 0xC3, 256, 258]) == "é\\u202e⇥\\xc3<eos><258>"
    window = np.full(BEFORE + 1 + AFTER, -1, np.int32)
    window[BEFORE - 1 : BEFORE + 2] = [10, 97, 98]
    assert context(WORDS, window) == ("↵", "a", "b")


def test_what_cannot_be_counted():
    dense = abstract(replace(MODEL, num_layers=3, num_dense_layers=3, mtp_depth=0))
    with pytest.raises(ValueError, match="no experts to count: all of its 3 layers are dense"):
        collect(dense, BATCHES, WORDS, DOMAINS)
    model = random_model(replace(MODEL, **CHANGES["deepseek"]), seed=2)
    empty = BATCHES[0] | {"segment_ids": np.zeros((B, T), np.int32)}
    for batches in ([], [empty]):
        with pytest.raises(ValueError, match="no token to count"):
            collect(model, batches, WORDS, DOMAINS)


# Pictures


def drawn(figure) -> list[np.ndarray]:
    """Values of each panel of a heat map, in order."""
    panels = [ax for ax in figure.axes if ax.images]
    return [np.ma.filled(ax.images[0].get_array(), np.nan) for ax in panels]


def test_pictures_draw_the_numbers(tmp_path, rng):
    names = ("layer 0", "MTP 1")
    load = rng.integers(1, 50, (6, 2, 4))
    steps = np.array([1, 2, 4, 8, 16, 32])
    figure = plots.load_over_time(steps, load, names, tmp_path / "time.png")
    for layer in (0, 1):
        values = np.asarray(figure.axes[layer].collections[0].get_array())
        np.testing.assert_allclose(values, (load[:, layer] / load[:, layer].mean(-1, keepdims=True)).T)
    vio = load.max(-1) / load.mean(-1) - 1
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[2].lines}
    np.testing.assert_allclose([lines["layer 0"], lines["MTP 1"], lines["mean"]], [*vio.T, vio.mean(-1)])

    figure = plots.domain_lift(load[:3], ("a", "b", "c"), names, tmp_path / "domains.png")
    for layer, values in enumerate(drawn(figure)):
        mine, whole = load[:3, layer], load[:3, layer].sum(0)
        want = (mine / mine.sum(-1, keepdims=True)) / (whole / whole.sum())
        np.testing.assert_allclose(2.0**values, want)
    ratios = np.exp(rng.standard_normal((2, 4, 4)))
    ratios[0, 1, 2] = 0  # two that never meet, and must not be left out
    ratios[:, range(4), range(4)] = np.nan
    for values, want in zip(drawn(plots.coactivation(ratios, names, tmp_path / "pairs.png")), ratios, strict=True):
        np.testing.assert_allclose(2.0**values, np.maximum(want, plots.NEVER))

    found = specialisation(made(load, np.arange(6) % 2, 2), draws=5)
    ax = plots.information(found, names, tmp_path / "information.png").axes[0]
    heights = [patch.get_height() for patch in ax.patches]
    np.testing.assert_allclose(heights, [*found.bits, *found.shuffled_mean])
    whole, parts = {"gates": np.array([0.5, 0.6])}, {"gates": np.array([[0.4, 0.5], [0.6, np.nan]])}
    ax = plots.entropies(whole, parts, ("a", "b"), names, tmp_path / "entropy.png").axes[0]
    assert {line.get_label(): line.get_ydata().tolist() for line in ax.lines}["all"] == [0.5, 0.6]
    assert ax.get_xlabel() == "layer" and ax.get_ylabel()


def test_pictures_of_one_step_and_of_many_layers(tmp_path, rng, monkeypatch):
    plots.load_over_time(np.array([7]), rng.integers(1, 9, (1, 2, 4)), ("layer 0", "layer 1"), tmp_path / "one.png")
    monkeypatch.setattr(plots, "MOST", 4)
    names = tuple(f"layer {i}" for i in range(10))
    figure = plots.domain_lift(rng.integers(1, 9, (2, 10, 4)), ("a", "b" * 30), names, tmp_path / "many.png")
    assert [ax.get_title() for ax in figure.axes if ax.images] == ["layer 0", "layer 3", "layer 6", "layer 9"]


# The command, its page and its folder


class Reader(HTMLParser):
    """Ids, addresses and text of a page; every element that opens must close."""

    VOID = {"meta", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.addresses, self.data = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [v for k, v in attributes if k in ("src", "href", "action", "data")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text):
        self.data[self.open[-1] if self.open else ""] = text


@pytest.fixture(scope="module")
def told(root):
    """(the run, the folder of its statistics, what was printed)."""
    whole, out = finished(root), io.StringIO()
    with contextlib.redirect_stdout(out):
        code = unhooked_cli().main(["stats", str(whole.folder), "--batches", "3", "--draws", "20"])
    assert code == 0
    return whole, whole.folder / "stats", out.getvalue()


def test_the_numbers_of_a_run(told):
    whole, folder, said = told
    found = json.loads((folder / "stats.json").read_text())
    documented = {key for keys in found["keys"] for key in keys.split(", ")}
    assert documented == found.keys() - {"keys"}
    assert (found["step"], found["layers"]) == (12, ["layer 0", "layer 1", "MTP 1"])
    assert (found["specialisation"]["draws"], found["specialisation"]["seed"]) == (20, 0)
    load = np.array(found["load"])
    np.testing.assert_array_equal(np.sum([found["load_by_domain"][d] for d in found["domains"]], axis=0), load)
    np.testing.assert_array_equal([np.diag(pairs) for pairs in found["coactivation"]], load)
    np.testing.assert_allclose(found["max_vio"], load.max(-1) / load.mean(-1) - 1, rtol=1e-5)  # six digits
    for layer, vio in zip(found["layers"], found["max_vio"], strict=True):
        assert re.search(rf"{layer} +MaxVio {vio:.2f}", said)
    assert f"{max(found['tokens']):,} tokens of {sum(found['documents'].values())} documents" in said
    assert str(folder / "index.html") in said


def test_the_page_is_whole_and_alone(told):
    _, folder, _ = told
    text = (folder / "index.html").read_text()
    reader = Reader(text)
    sections = ["load", "layers", "over-time", "domains", "information", "coactivation", "entropy", "experts"]
    assert [i for i in reader.ids if i in sections] == sections
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(a.startswith("#") or a.startswith("data:image/png;base64,") for a in reader.addresses)
    assert {a[1:] for a in reader.addresses if a.startswith("#")} == set(sections)
    held = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert "//" not in re.sub('base64,[^"]*', "", text.replace(held, ""))  # no address at all
    data = json.loads(held)
    assert len(data["experts"]) == 3 and len(data["experts"][0]) == E
    assert "prefers-color-scheme: dark" in text
    assert {p.name for p in folder.iterdir()} == {"stats.json", "index.html", *PICTURES}


def test_load_over_time_is_what_training_measured(told):
    whole, folder, _ = told
    log = read_load(whole.folder)
    vio = {row["step"]: row["max_vio"] for row in rows_of(whole.folder) if "max_vio" in row}
    assert log.steps.tolist() == sorted(vio)
    np.testing.assert_allclose((log.load.max(-1) / log.load.mean(-1) - 1).mean(-1), list(vio.values()), rtol=1e-5)
    over_time = json.loads((folder / "stats.json").read_text())["over_time"]
    np.testing.assert_allclose(np.mean(over_time["max_vio"], axis=-1), list(vio.values()), rtol=1e-5)


def test_a_page_of_one_domain_and_of_hostile_text(tmp_path):
    """Without pictures there are no sections for them; text of documents and domains never becomes markup."""
    text = "</script><b>&"
    window = np.full((1, BEFORE + 1 + AFTER), -1, np.int32)
    window[0, BEFORE + 1 - len(text) : BEFORE + 1] = list(text.encode())
    one = np.zeros(1, np.int64)
    stats = made(
        np.array([[[3, 0]], [[0, 0]]]),
        [0, 0],
        1,
        domains=(text,),
        contexts=Contexts(one, one, np.ones(1, np.float32), window),
    )
    numbers = as_json(stats, specialisation(stats, draws=2), WORDS, None)
    made_page = page({"run": text, "step": 0, "data": text} | numbers, tmp_path)
    reader = Reader(made_page)
    assert "over-time" not in reader.ids and "data-map" not in made_page.split("<script")[0]
    assert "<b>" not in made_page
    assert numbers["coactivation_lift"] == [[[None, None], [None, None]]]


def test_a_folder_is_replaced_whole_or_not_at_all(told, tmp_path, monkeypatch):
    whole, _, _ = told
    out = tmp_path / "stats"
    monkeypatch.setattr("dsv3_jax.stats.reporting._draw", lambda *args: None)  # the pictures have their own test
    first = report(whole.folder, out, batches=1, draws=2)
    assert first[0] == out
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dsv3_jax.stats.page.load_map", fail)
        with pytest.raises(OSError, match="disk full"):
            report(whole.folder, out, batches=1, draws=2)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]
    (out / "load.png").write_text("of the statistics before")
    report(whole.folder, out, step=8, batches=1, draws=2, paths=(whole.run.data.paths[0],))
    assert json.loads((out / "stats.json").read_text())["step"] == 8
    assert {p.name for p in out.iterdir()} == before.keys() and list(tmp_path.iterdir()) == [out]
    (out / "mine.txt").write_text("notes")
    with pytest.raises(ValueError, match="holds other files than statistics, such as mine.txt"):
        report(whole.folder, out, batches=1)
    with pytest.raises(ValueError, match="mine.txt is a file, not a folder"):
        report(whole.folder, out / "mine.txt", batches=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere holds no run"),
        (["RUN", "--batches", "0"], "batches=0 is below 1"),
        (["RUN", "--step", "3"], "no checkpoint of step 3"),
        (["RUN", "--draws", "0"], "draws=0 is below 1"),
        (["RUN", "--paths", "nothing"], "path 'nothing' does not exist"),
    ],
)
def test_errors_are_a_sentence(told, capsys, tmp_path, words, said):
    whole, _, _ = told
    words = [str(whole.folder) if word == "RUN" else word for word in words]
    assert unhooked_cli().main(["stats", *words, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("dsv3: ") and said in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_rows_after_a_step_are_dropped(tmp_path):
    path = tmp_path / "load.jsonl"
    assert read_rows(path) == [] and read_load(tmp_path) is None
    first = Rows(path, after=0)
    for step in (1, 2, 3):
        first.write({"step": step, "load": [[step, 0]]})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    again = Rows(path, after=2)
    again.write({"step": 3, "load": [[9, 9]]})
    log = read_load(tmp_path)
    assert log.steps.tolist() == [1, 2, 3] and log.load[:, 0, 0].tolist() == [1, 2, 9]
    assert again.rows() == read_rows(path)
