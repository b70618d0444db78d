"""Sparse attention: the choice, attention to it, the indexer's loss, against obvious loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import (
    DENSE,
    INDEXED,
    assert_best,
    flat,
    random_model,
    scratch_bytes,
    small,
    value_and_gradients,
)
from runs import (
    MODEL,
    assert_bitwise,
    assert_near,
    by_command,
    documents,
    fresh_state,
    make_run,
    refused,
    save_run,
    write_text,
)
from test_generate import PROMPTS

from dsv3_jax.config import replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.indexer import divergence, index_choose
from dsv3_jax.ops.sparse_attention import sparse_attention
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import read_run
from dsv3_jax.training.loss import compute_loss
from dsv3_jax.training.state import Job, model_of
from dsv3_jax.training.step import make_step

# batch, tokens, index heads and their width, of exact roots, chosen tokens
B, T, N, X, K = 2, 13, 4, 16, 5
SEGMENTS = np.array([[1] * 8 + [2] * 4 + [0], [1] + [2] * 12], np.int32)
LAST = np.array([np.arange(T, dtype=np.int32)] * B)


def index_scores(q, w, k):
    """[B, T, S]: the equation of `reference.choose`."""
    products = jnp.einsum("btix,bsx->btis", q, k) * X**-0.5
    return jnp.einsum("bti,btis->bts", w * N**-0.5, jnp.maximum(products, 0))


def chosen_mask(ids):
    """bool [B, T, T]: the tokens in ids."""
    mask = np.zeros((B, T, T + 1), bool)
    np.put_along_axis(mask, np.asarray(ids), True, axis=-1)  # -1 is the last column
    return mask[..., :-1]


@pytest.mark.parametrize("dtype", [None, jnp.int8])
def test_the_choice_is_the_best_that_a_query_sees(x64, rng, dtype):
    """Small whole numbers make many ties, with zeros of both signs; the lower index wins."""
    shapes = (B, T, N, X), (B, T, N), (B, T, X)
    q, w, k = (rng.integers(-1, 2, shape).astype(float) for shape in shapes)
    keys = Stored(jnp.asarray(k, dtype)[:, None], None)
    if dtype:
        scales = 2.0 ** rng.integers(-1, 2, (B, T, 1))
        keys, k = keys._replace(scales=jnp.asarray(scales, jnp.float32)[:, None]), k * scales
    scores, seen = np.asarray(index_scores(q, w, k)), oracles.causal_mask(SEGMENTS)
    for most in (10**6, 80):  # all queries at once, and in blocks
        ids = np.asarray(jax.jit(partial(index_choose, k=K, most=most))(q, w, keys, LAST, SEGMENTS))
        assert ids.dtype == np.int32
        for b, t in np.ndindex(B, T):
            want = oracles.best(scores[b, t], K, np.flatnonzero(seen[b, t]))
            assert ids[b, t].tolist() == [*want, *[-1] * (K - len(want))]


def test_attention_to_a_choice_is_dense_attention_under_its_mask(x64, rng):
    groups, heads, widths, seen = 2, 4, (7, 2), oracles.causal_mask(SEGMENTS)

    def chosen_of(row):
        return (oracles.best(rng.random(T), K, np.flatnonzero(row)) + [-1] * K)[:K]

    ids = np.array([[chosen_of(row) for row in of] for of in seen], np.int32)
    queries = [rng.standard_normal((B, T, groups, heads // groups, width)) for width in widths]
    keys = [rng.standard_normal((B, groups, T, width)) for width in widths]
    weight = rng.standard_normal((B, T, groups, heads // groups, widths[0]))

    def sparse(most, queries, keys):
        stored = [Stored(x, None) for x in keys]
        how = dict(scale=0.4, most=most)
        return sparse_attention(queries, stored, stored[0], jnp.asarray(ids), **how)

    def dense(queries, keys):
        q = jnp.concatenate(queries, -1).reshape(B, T, heads, -1)
        k = jnp.repeat(jnp.concatenate(keys, -1).swapaxes(1, 2), heads // groups, axis=2)
        v = k[..., : widths[0]]
        out = oracles.attention_jnp(q, k, v, chosen_mask(ids), scale=0.4)
        return out.reshape(weight.shape)

    want = value_and_gradients(dense, weight, queries, keys)
    for most in (10**6, 400):
        assert_near(value_and_gradients(partial(sparse, most), weight, queries, keys), want, 1e-9)


@pytest.mark.long
def test_what_the_indexer_learns_from(x64, rng):
    heads, widths, seen = 4, (7, 2), oracles.causal_mask(SEGMENTS)
    q, w, k = (rng.standard_normal(shape) for shape in ((B, T, N, X), (B, T, N), (B, T, X)))
    queries = [rng.standard_normal((B, T, heads, width)) for width in widths]
    keys = [rng.standard_normal((B, T, width)) for width in widths]
    stored = Stored(jnp.asarray(k)[:, None], None)
    chosen = jax.jit(partial(index_choose, k=K))(q, w, stored, LAST, SEGMENTS)

    def slow(mask, q, w, k):
        whole = jnp.concatenate(queries, -1), jnp.concatenate(keys, -1)
        products = jnp.einsum("bthx,bsx->bhts", *whole)
        p = jax.nn.softmax(jnp.where(mask[:, None], 0.4 * products, -1e30), -1).sum(1) / heads
        log_q = jax.nn.log_softmax(jnp.where(mask, index_scores(q, w, k), -1e30), -1)
        return jnp.where(mask, p * (jnp.log(jnp.where(mask, p, 1)) - log_q), 0).sum(-1)

    def fast(ids, q, w, k, of):
        return divergence(q, w, k, *of, ids, *jnp.array([LAST, SEGMENTS]), scale=0.4)

    for ids, mask in ((None, seen), (chosen, chosen_mask(chosen))):
        want = value_and_gradients(partial(slow, mask), 1.0, q, w, k)
        found = value_and_gradients(partial(fast, ids), 1.0, q, w, k, [queries, keys])
        got, (*grads, of_attention) = found
        np.testing.assert_allclose(got, want[0], rtol=0, atol=1e-9)
        assert np.asarray(got).max() > 0.1
        assert_near(grads, list(want[1]), 1e-9)
        assert not any(np.asarray(g).any() for g in jax.tree.leaves(of_attention))


@pytest.mark.long
def test_memory_grows_with_length_not_its_square():
    """Compiled, not run, with gradients: four times the length, about four times the scratch."""

    def scratch(length):
        def loss(q, w, k, queries, keys):
            stored = Stored(keys[:, None], None)
            last = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (1, length))
            ids = index_choose(*jax.lax.stop_gradient((q, w)), Stored(k[:, None], None), last, k=16)
            out = sparse_attention([queries[:, :, None]], [stored], stored, ids, scale=1.0).sum()
            of = [divergence(q, w, k, [queries], [keys], i, last, scale=1.0) for i in (None, ids)]
            return out + sum(x.sum() for x in of)

        shapes = [(1, length, *width) for width in ((2, 8), (2,), (8,), (2, 8), (8,))]
        return scratch_bytes(jax.grad(loss, range(5)), *shapes)

    one, four = scratch(4096), scratch(16384)
    assert four < 6 * one and four < 16384**2 * 4 / 4  # a quarter of one score matrix


CFG = small(attention="dsa", index_heads=2, index_dim=9, index_topk=7)
SHARED = replace(
    CFG, num_layers=2, num_dense_layers=2, index_types=("full", "shared"), index_interleaved=True,
    mtp_depth=1,
)  # fmt: skip


@pytest.mark.long
def test_decoding_gives_the_tokens_of_the_forward():
    model = random_model(SHARED, execution=DENSE)
    for cache, draft in (("expanded", "lookup"), ("latent", "mtp")):
        how = dict(cache=cache, draft=draft, draft_length=3)
        assert_best(model, PROMPTS, generate(model, PROMPTS, 10, **how).tokens)


NO_INDEXER = {
    "q_latent_dim=None with attention='dsa'": {"q_latent_dim": None},
    "index_topk=0 is outside": {"index_topk": 0},
    "index_types='half' is not one of full, shared": {"index_types": ("full", "half", "full")},
    "index_dim=9 is no power of 2, as index_precision='fp8'": {"index_precision": "fp8"},
    "begins with a layer that has no set to share": {"index_types": ("shared",) * 3},
}


def test_an_indexer_that_cannot_be_is_refused():
    for sentence, changes in NO_INDEXER.items():
        with refused(sentence):
            replace(CFG, **changes)


TINY = replace(MODEL, num_layers=1, num_dense_layers=1, q_latent_dim=7)
MLA_RUN = make_run("nowhere", model=TINY)
DSA_RUN = replace(MLA_RUN, model=replace(TINY, **INDEXED), start="nowhere")
BATCH = documents(4, 16, 2)


def split(params):
    """(The indexers' parameters, all others), by path."""
    arrays = flat(params)
    indexers = {path: x for path, x in arrays.items() if "indexer" in path}
    return indexers, {path: x for path, x in arrays.items() if path not in indexers}


@pytest.mark.long
def test_the_warm_up_trains_the_indexers_alone_and_reads_densely():
    run = replace(DSA_RUN, indexer_stage="warm")
    step, state, rows = make_step(Job(run)), fresh_state(run), []
    before, bias = split(state.params), jax.device_get(state.bias)
    assert all("indexer" in path for means in state.opt for path, _ in nnx.to_flat_state(means))
    for _ in range(4):
        state, metrics = step(state, BATCH)
        rows.append(jax.device_get(metrics))
    after = split(state.params)
    assert_bitwise((after[1], jax.device_get(state.bias)), (before[1], bias))
    assert all((after[0][path] != x).any() for path, x in before[0].items())
    assert rows[-1]["index_kl"] < rows[0]["index_kl"]
    params = nnx.from_flat_state([(path, nnx.Param(x)) for path, x in before[1].items()])
    dense = model_of(Job(MLA_RUN), replace(fresh_state(MLA_RUN), params=params, bias=bias))
    of_mla = jax.jit(lambda model: compute_loss(model, BATCH, 0.3).main)(dense)
    np.testing.assert_allclose(rows[0]["loss"], of_mla, rtol=1e-6)


@pytest.mark.long
def test_the_indexers_loss_is_detached():
    """It changes no gradient of the model, and the model's loss gives the indexers none."""
    model = random_model(replace(DSA_RUN.model, mtp_depth=0), execution=DENSE)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def gradients(watch):
        def loss(params):
            merged = nnx.merge(graphdef, params, rest)
            return compute_loss(merged, BATCH, 0.3, watch=watch).total

        return split(jax.jit(jax.grad(loss))(params))

    (without, alone), (indexers, beside) = gradients(()), gradients(("index_sparse",))
    assert_near(beside, alone)
    assert not any(x.any() for x in without.values())
    assert all(x.any() for x in indexers.values())


@pytest.mark.long
def test_two_commands_make_a_trained_run_sparse(tmp_path):
    dense, warm, sparse = (tmp_path / name for name in ("dense", "warm", "sparse"))
    data = replace(MLA_RUN.data, paths=(write_text(tmp_path / "text"),))
    save_run(dense, replace(MLA_RUN, data=data, model=replace(TINY, mtp_depth=0)))
    index = [f"--model.{name.replace('_', '-')}={x}" for name, x in INDEXED.items()]
    warm_up = ["--indexer-stage", "warm", "--steps", "2"]

    def train(out, start, *words):
        code, _, said = by_command("train", "tiny", f"--out={out}", f"--start={start}", *words)
        return code, " ".join(said.split())

    assert train(warm, dense, *index, *warm_up)[0] == train(sparse, warm, "--steps", "2")[0] == 0
    stages = [(run.model.attention, run.indexer_stage) for run in map(read_run, (warm, sparse))]
    assert stages == [("dsa", "warm"), ("dsa", "sparse")]
    of_dense, of_warm, of_sparse = (
        split(nnx.state(load_run(folder)[0], nnx.Param))[1] for folder in (dense, warm, sparse)
    )
    assert_bitwise(of_warm, of_dense)
    assert any((of_sparse[path] != x).any() for path, x in of_warm.items())
    for start, words, more in (
        (sparse, "indexer_stage='warm' learns from dense attention", warm_up),
        (dense, "indexer_stage='warm' is for attention='dsa', not 'mla'", warm_up),
        (dense, "kv_latent_dim=6 is not that of start", [*index, "--model.kv-latent-dim=6"]),
    ):
        code, said = train(tmp_path / "new", start, *more)
        assert code == 2 and words in said
    with refused("those of start=None are random"):
        replace(DSA_RUN, indexer_stage="warm", start=None)
