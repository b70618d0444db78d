"""Sparse attention: the choice, attention to it, the indexer's loss, against obvious loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import DENSE, INDEXED, flat, random_model, small
from runs import (
    MODEL,
    assert_bitwise,
    fresh_state,
    make_run,
    packed_batch,
    unhooked_cli,
    write_text,
)
from test_generate import PROMPTS

import dsv3_jax as ds
from dsv3_jax.config import ConfigError, replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.model.cache import Cache, empty_cache
from dsv3_jax.model.context import How, from_zero, make_context
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.sparse import DSA
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.indexer import divergence, index_choose, round_rotated
from dsv3_jax.ops.sparse_attention import sparse_attention
from dsv3_jax.runs.checkpoint import Checkpoints, load_run
from dsv3_jax.runs.folder import claim, read_run
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
    q, w, k = (
        rng.integers(-1, 2, shape).astype(float) for shape in ((B, T, N, X), (B, T, N), (B, T, X))
    )
    keys = Stored(jnp.asarray(k, dtype)[:, None], None)
    if dtype:
        scales = 2.0 ** rng.integers(-1, 2, (B, T, 1))
        keys, k = keys._replace(scales=jnp.asarray(scales, jnp.float32)[:, None]), k * scales
    scores, seen = np.asarray(index_scores(q, w, k)), oracles.causal_mask(B, T, SEGMENTS)
    for most in (10**6, 80):  # all queries at once, and in blocks
        ids = np.asarray(jax.jit(partial(index_choose, k=K, most=most))(q, w, keys, LAST, SEGMENTS))
        assert ids.dtype == np.int32
        for b, t in np.ndindex(B, T):
            want = oracles.best(scores[b, t], K, np.flatnonzero(seen[b, t]))
            assert ids[b, t].tolist() == [*want, *[-1] * (K - len(want))]


@pytest.mark.parametrize("groups", [1, 4], ids=["absorbed", "expanded"])
def test_attention_to_a_choice_is_dense_attention_under_its_mask(x64, rng, groups):
    """With gradients, all queries at once and in blocks."""
    heads, widths, seen = 4, (7, 2), oracles.causal_mask(B, T, SEGMENTS)

    def chosen_of(row):
        return (oracles.best(rng.random(T), K, np.flatnonzero(row)) + [-1] * K)[:K]

    ids = np.array([[chosen_of(row) for row in of] for of in seen], np.int32)
    queries = [rng.standard_normal((B, T, groups, heads // groups, width)) for width in widths]
    keys = [rng.standard_normal((B, groups, T, width)) for width in widths]
    weight = rng.standard_normal((B, T, groups, heads // groups, widths[0]))

    def sparse(most, queries, keys):
        stored = [Stored(x, None) for x in keys]
        return sparse_attention(queries, stored, stored[0], jnp.asarray(ids), scale=0.4, most=most)

    def dense(queries, keys):
        q = jnp.concatenate(queries, -1).reshape(B, T, heads, -1)
        k = jnp.repeat(jnp.concatenate(keys, -1).swapaxes(1, 2), heads // groups, axis=2)
        v = k[..., : widths[0]]
        out = oracles.attention_jnp(q, k, v, chosen_mask(ids), scale=0.4)
        return out.reshape(weight.shape)

    def value_and_gradients(attend):
        loss = lambda *args: ((y := attend(*args)) * weight).sum() + 0 * y.sum()  # noqa: E731
        return jax.jit(attend)(queries, keys), jax.jit(jax.grad(loss, (0, 1)))(queries, keys)

    want = value_and_gradients(dense)
    for most in (10**6, 400):
        got = value_and_gradients(partial(sparse, most))
        for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())


@pytest.mark.long
def test_what_the_indexer_learns_from(x64, rng):
    """Over all seen tokens, and over a choice; with the indexer's gradients, none for attention."""
    heads, widths, seen = 4, (7, 2), oracles.causal_mask(B, T, SEGMENTS)
    q, w, k = (rng.standard_normal(shape) for shape in ((B, T, N, X), (B, T, N), (B, T, X)))
    queries = [rng.standard_normal((B, T, heads, width)) for width in widths]
    keys = [rng.standard_normal((B, T, width)) for width in widths]
    chosen = jax.jit(partial(index_choose, k=K))(
        q, w, Stored(jnp.asarray(k)[:, None], None), LAST, SEGMENTS
    )

    def slow(q, w, k, mask):
        products = jnp.einsum(
            "bthx,bsx->bhts", jnp.concatenate(queries, -1), jnp.concatenate(keys, -1)
        )
        p = jax.nn.softmax(jnp.where(mask[:, None], 0.4 * products, -1e30), -1).sum(1) / heads
        log_q = jax.nn.log_softmax(jnp.where(mask, index_scores(q, w, k), -1e30), -1)
        return jnp.where(mask, p * (jnp.log(jnp.where(mask, p, 1)) - log_q), 0).sum(-1)

    for ids, mask in ((None, seen), (chosen, chosen_mask(chosen))):

        def fast(q, w, k, of, ids=ids):
            return divergence(q, w, k, *of, ids, *jnp.array([LAST, SEGMENTS]), scale=0.4)

        got, want = (
            jax.jit(f)(q, w, k, rest) for f, rest in ((fast, (queries, keys)), (slow, mask))
        )
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)
        assert np.asarray(want).max() > 0.1
        grads = jax.jit(jax.grad(lambda *a: fast(*a).sum(), (0, 1, 2, 3)))(q, w, k, (queries, keys))
        want = jax.jit(jax.grad(lambda *a: slow(*a, mask).sum(), (0, 1, 2)))(q, w, k)  # noqa: B023
        for a, b in zip(grads[:3], want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-9 * np.abs(b).max())
        assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads[3]))


def test_rotation_changes_no_product_and_rounding_little(rng):
    a, b = rng.standard_normal((2, 50, 16)).astype(np.float32)
    exact = (a * b).sum(-1)
    for power_of_two in (False, True):
        x, y = (round_rotated(jnp.asarray(v), power_of_two) for v in (a, b))
        got = np.asarray((x * y).sum(-1))
        assert 1e-3 < np.abs(got - exact).max() < 1  # each number is off by up to 2^-4 of itself
        scale = np.abs(np.asarray(x)).max(-1)
        assert np.isfinite(got).all() and (scale > 0).all()


@pytest.mark.long
def test_memory_grows_with_length_not_its_square():
    """Compiled, not run, with gradients: four times the length, about four times the scratch."""

    def scratch(length):
        def loss(q, w, k, queries, keys):
            stored = Stored(keys[:, None], None)
            last = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (1, length))
            ids = index_choose(*jax.lax.stop_gradient((q, w)), Stored(k[:, None], None), last, k=16)
            out = sparse_attention([queries[:, :, None]], [stored], stored, ids, scale=1.0).sum()
            return out + sum(
                divergence(q, w, k, [queries], [keys], i, last, scale=1.0).sum()
                for i in (None, ids)
            )

        shapes = (
            (1, length, 2, 8),
            (1, length, 2),
            (1, length, 8),
            (1, length, 2, 8),
            (1, length, 8),
        )
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, four = scratch(4096), scratch(16384)
    assert four < 6 * one and four < 16384**2 * 4 / 4  # a quarter of one score matrix


CFG = small(attention="dsa", index_heads=2, index_dim=9, index_topk=7)
SHARED = replace(
    CFG,
    num_layers=2,
    num_dense_layers=2,
    index_types=("full", "shared"),
    index_interleaved=True,
    mtp_depth=1,
)


@pytest.mark.parametrize("k", [4, 12])
def test_the_module_is_the_same_with_every_cache_and_dense_where_k_is_large(x64, rng, k):
    """Over complete rows of 11 tokens, and over caches of 16 slots whose free ones hold garbage."""
    # plain XLA, which runs in float64 too
    cfg, how = replace(CFG, index_topk=k), How(Kernels(Target("cuda", "xla")))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: DSA(cfg, rngs=nnx.Rngs(0))))
    state, x = jax.tree.map(
        lambda w: rng.standard_normal(w.shape), (state, jnp.zeros((2, 11, cfg.dim)))
    )
    dense = nnx.graphdef(nnx.eval_shape(lambda: ds.MLA(cfg, rngs=nnx.Rngs(0))))

    @jax.jit
    def every(state, x):
        module, positions = nnx.merge(graphdef, state), from_zero(2, 11)
        caches = [
            empty_cache(DSA.cache_rows(cfg, kind), [1], 2, 16, jnp.float64)
            for kind in ("latent", "expanded")
        ]
        caches = [Cache(jax.tree.map(lambda rows: rows + 1e3, c.parts), c.lengths) for c in caches]
        contexts = [make_context(cfg, positions, how=how, cache=c) for c in (None, *caches)]
        outs = [module.attend(x, ctx)[0] for ctx in contexts]
        others = nnx.split_state(state, lambda path, _: "indexer" not in path, ...)[0]
        return outs, nnx.merge(dense, others).attend(x, contexts[0])[0]

    (alone, *cached), of_mla = every(state, x)
    assert (np.abs(alone - of_mla).max() < 1e-9) == (k == 12)
    for out in cached:
        np.testing.assert_allclose(out, alone, rtol=0, atol=1e-9 * np.abs(alone).max())


@pytest.mark.long
def test_decoding_gives_the_tokens_of_the_forward():
    """With every cache and draft, in ragged batches; the second layer shares the first's choice."""
    model = random_model(SHARED, execution=DENSE)
    want = generate(model, PROMPTS, 10, cache="none").tokens
    # a model that repeats one token could not fail
    assert len({t for row in want for t in row}) > 5
    for how in (
        {"cache": "expanded", "draft": "lookup", "draft_length": 3},
        {"draft": "mtp", "draft_length": 2},
    ):
        assert generate(model, PROMPTS, 10, **how).tokens == want, how
    assert bytes_per_token(SHARED, "latent", jnp.dtype("int8")) == 2 * (10 + 4 + 9 + 3 * 4)


@pytest.mark.parametrize(
    ("words", "changes"),
    {
        "q_latent_dim=None with attention='dsa'": {"q_latent_dim": None},
        "index_topk=0 is outside": {"index_topk": 0},
        "index_types='half' is not one of full, shared": {"index_types": ("full", "half", "full")},
        "index_dim=9 is no power of 2, as index_precision='fp8'": {"index_precision": "fp8"},
        "begins with a layer that has no set to share": {"index_types": ("shared",) * 3},
    }.items(),
)
def test_an_indexer_that_cannot_be_is_refused(words, changes):
    with pytest.raises(ConfigError, match=words):
        replace(CFG, **changes)


MLA_RUN = make_run(
    "nowhere", model=replace(MODEL, num_layers=1, num_dense_layers=1, q_latent_dim=7)
)
DSA_RUN = replace(MLA_RUN, model=replace(MLA_RUN.model, **INDEXED), start="nowhere")
BATCH = packed_batch(
    np.random.default_rng(0), np.sort(np.random.default_rng(1).integers(1, 3, (4, 16)), axis=1)
)


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

    def gradients(watch):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            merged = nnx.merge(graphdef, params, rest)
            return compute_loss(merged, BATCH, 0.3, watch=watch).total

        return split(jax.jit(jax.grad(loss))(params))

    (without, alone), (indexers, beside) = gradients(()), gradients(("index_sparse",))
    for path, x in alone.items():
        np.testing.assert_allclose(
            beside[path], x, rtol=0, atol=1e-5 * np.abs(x).max(), err_msg=str(path)
        )
    assert not any(x.any() for x in without.values())
    assert all(x.any() for x in indexers.values())


@pytest.mark.long
def test_two_commands_make_a_trained_run_sparse(tmp_path, capfd):
    main = unhooked_cli().main
    dense, warm, sparse = (tmp_path / name for name in ("dense", "warm", "sparse"))
    data = replace(MLA_RUN.data, paths=(write_text(tmp_path / "text"),))
    run = claim(dense, replace(MLA_RUN, data=data, model=replace(MLA_RUN.model, mtp_depth=0)))
    with Checkpoints(dense, run) as checkpoints:
        checkpoints.save(fresh_state(run, 2), {}, wait=True)
    index = [
        word
        for name, x in INDEXED.items()
        for word in (f"--model.{name.replace('_', '-')}", str(x))
    ]
    warm_up = ["--indexer-stage", "warm", "--steps", "2"]
    assert main(["train", "tiny", f"--out={warm}", "--start", str(dense), *index, *warm_up]) == 0
    assert main(["train", "tiny", f"--out={sparse}", "--start", str(warm), "--steps", "2"]) == 0
    runs = [read_run(folder) for folder in (warm, sparse)]
    assert [(run.model.attention, run.indexer_stage) for run in runs] == [
        ("dsa", "warm"),
        ("dsa", "sparse"),
    ]
    trained = [
        split(nnx.state(load_run(folder)[0], nnx.Param))[1] for folder in (dense, warm, sparse)
    ]
    assert_bitwise(trained[1], trained[0])
    assert any((trained[2][path] != x).any() for path, x in trained[1].items())
    capfd.readouterr()
    for start, words, more in (
        (sparse, "indexer_stage='warm' learns from dense attention", warm_up),
        (dense, "indexer_stage='warm' is for attention='dsa', not 'mla'", warm_up),
        (
            dense,
            "model.kv_latent_dim=6 is not that of start",
            [*index, "--model.kv-latent-dim", "6"],
        ),
    ):
        assert (
            main(["train", "tiny", f"--out={tmp_path / 'new'}", "--start", str(start), *more]) == 2
        )
        assert words in " ".join(capfd.readouterr().err.split())
    with pytest.raises(ConfigError, match="those of start=None are random"):
        replace(DSA_RUN, indexer_stage="warm", start=None)
