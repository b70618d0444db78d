"""Attention: blocks and C++ equal the full score matrix, MLA's forms each other, YaRN the page."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import needs_cpp, scratch_bytes, small, value_and_gradients
from runs import assert_bitwise, assert_near

import dsv3_jax as ds
from dsv3_jax import reference
from dsv3_jax.config import Yarn
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.kernels.cpu import attention as cpu_attention
from dsv3_jax.model.cache import Cache, empty_cache
from dsv3_jax.model.context import How, from_zero, make_context
from dsv3_jax.model.sparse import DSA
from dsv3_jax.ops import rope
from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.cached_attention import Stored, cached_attention


def full_scores(q, k, v, mask):
    """Each key-value head serves the query heads after one another."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return oracles.attention_jnp(q, k, v, mask, scale=0.4)


IN_BLOCKS = partial(causal_attention, block=8), np.float64, 1e-9
# In float32, of unit roundoff 6e-8; the oracle is in float64. Blocks have 64 queries, 256 keys.
IN_CPP = cpu_attention.causal_attention, np.float32, 1e-5


CASES = [  # length, heads, key-value heads, widths of keys and of values
    pytest.param(IN_BLOCKS, (5, 4, 4, 6, 3), id="below a block"),
    pytest.param(IN_BLOCKS, (23, 4, 2, 6, 3), id="heads in groups"),
    pytest.param(IN_CPP, (1, 3, 3, 6, 3), id="cpu, one token", marks=needs_cpp),
    pytest.param(IN_CPP, (257, 3, 3, 21, 70), id="cpu, several blocks", marks=needs_cpp),
]


@pytest.mark.parametrize("how, sizes", CASES)
def test_attention_and_its_gradients_equal_the_full_score_matrix(x64, rng, how, sizes):
    (attend, dtype, atol), (length, heads, groups, key, value) = how, sizes
    shapes = ((heads, key), (groups, key), (groups, value), (heads, value))
    q, k, v, weight = (rng.standard_normal((2, length, *shape)).astype(dtype) for shape in shapes)
    # a few documents a row, some with one token, then padding
    ids = np.cumsum(rng.random((2, length)) < 4 / length, axis=1, dtype=np.int32) + 1
    ids[:, length - length // 8 :] = 0
    real = ids > 0
    weight = np.where(real[..., None, None], weight, 0)  # the output at padding is not defined
    ours = partial(attend, scale=0.4, segment_ids=jnp.asarray(ids))
    out, grads = value_and_gradients(ours, weight, q, k, v)
    wide = [x.astype(np.float64) for x in (weight, q, k, v)]
    mask = oracles.causal_mask(ids)
    expected, expected_grads = value_and_gradients(full_scores, *wide, mask)
    assert out.dtype == dtype and np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=atol)
    for name, g, e in zip("qkv", grads, expected_grads, strict=True):
        limit = atol * (1 + np.abs(e).max())
        np.testing.assert_allclose(g, e, atol=limit, err_msg=f"gradient of {name}")


FORMS = [
    pytest.param(partial(causal_attention, block=64), id="blocks"),
    pytest.param(cpu_attention.causal_attention, id="cpu", marks=needs_cpp),
]


@pytest.mark.parametrize("attend", FORMS)
def test_large_scores_stay_finite_and_repeat(rng, attend):
    """exp of scores around 1e4 overflows, so every block must subtract the maximum."""
    shapes = [(1, 530, 2, width) for width in (24, 24, 16)]
    q, k, v = (100 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    loss = lambda q, k, v: attend(q, k, v, scale=1.0).sum()  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    first = jax.tree.leaves(run(q, k, v))
    assert all(np.isfinite(x).all() for x in first)
    for _ in range(5):
        assert_bitwise(jax.tree.leaves(run(q, k, v)), first)


def test_gradient_memory_grows_with_length_not_its_square():
    """Compiled, not run: four times the length needs 4 times the scratch memory; T^2 needs 16."""

    def scratch(length):
        def loss(q, k, v):
            return causal_attention(q, k, v, scale=1.0, segment_ids=segments, block=128).sum()

        segments = jnp.ones((1, length), jnp.int32)
        shapes = [(1, length, 1, width) for width in (20, 20, 8)]
        return scratch_bytes(jax.grad(loss, argnums=range(3)), *shapes)

    one, four = scratch(1024), scratch(4096)
    assert four < 6 * one and four < 4096 * 4096 * 4 / 4  # a quarter of one score matrix


V3_SCALE = 0.1352337788608801  # in bfloat16 it is 0.134766: 0.35 % less


def test_attention_in_bfloat16_is_not_biased(rng):
    """One-hot values of two keys give the difference of their scores, the log of the odds.

    Rounding a query's number changes it by about 2^-9/sqrt(3) of itself, and the mean of all scores
    by far less. A rounded scale would be seven times the bound. Each query sees two tokens, so odds
    of every size occur.
    """
    rows, width = 4096, 64
    q, k = (rng.standard_normal((rows, n, 1, width)).astype(jnp.bfloat16) for n in (1, 2))
    v = np.broadcast_to(np.eye(2, dtype=np.float32)[None, :, None], (rows, 2, 1, 2))
    exact = V3_SCALE * np.einsum("bthk,bshk->bs", q.astype(np.float64), k.astype(np.float64))

    @jax.jit
    def both(q, k, v):
        keys, values = (Stored(x.astype(q.dtype).swapaxes(1, 2), None) for x in (k, v))
        last = jnp.ones((rows, 1), jnp.int32)
        cached = cached_attention([q], [keys], values, last, scale=V3_SCALE)
        causal = causal_attention(jnp.concatenate([q, q], axis=1), k, v, scale=V3_SCALE)
        return causal[:, 1, 0], cached[:, 0, 0]

    for out, bound in zip(both(q, k, v), (1e-4, 5e-4), strict=True):
        out = np.asarray(out).astype(np.float64)
        seen = (out > 0.02).all(axis=1)  # a small weight has lost its digits
        odds, exact_odds = np.log(out[seen, 0] / out[seen, 1]), exact[seen, 0] - exact[seen, 1]
        bias = (odds * exact_odds).sum() / (exact_odds**2).sum() - 1
        assert abs(bias) < bound, bias


SPARSE = small(attention="dsa", index_heads=2, index_dim=9, index_topk=4)
MODULES = {"mla": small(), "dsa": SPARSE, "dsa of all tokens": replace(SPARSE, index_topk=12)}


@pytest.mark.parametrize("name", MODULES)
def test_expanded_equals_absorbed(x64, rng, name):
    """Over complete rows, and over both caches, whose free slots hold garbage.

    A choice of all tokens is attention without one.
    """
    cfg = MODULES[name]
    kind = ds.MLA if name == "mla" else DSA
    how = How(Kernels(Target("cuda", "xla")))  # plain XLA, which runs in float64 too
    graphdef, state = nnx.split(nnx.eval_shape(lambda: kind(cfg, rngs=nnx.Rngs(0))))
    mla = nnx.graphdef(nnx.eval_shape(lambda: ds.MLA(cfg, rngs=nnx.Rngs(0))))
    shapes = state, jnp.zeros((2, 11, cfg.dim))
    state, x = jax.tree.map(lambda w: rng.standard_normal(w.shape), shapes)

    @jax.jit
    def every(state, x):
        module, positions = nnx.merge(graphdef, state), from_zero(2, 11)
        kinds = [kind.cache_rows(cfg, rows) for rows in ("latent", "expanded")]
        caches = [empty_cache(rows, [1], 2, 16, jnp.float64) for rows in kinds]
        caches = [Cache(jax.tree.map(lambda rows: rows + 1e3, c.parts), c.lengths) for c in caches]
        contexts = [make_context(cfg, positions, how=how, cache=c) for c in (None, *caches)]
        outs = [module.attend(x, ctx)[0] for ctx in contexts]
        others = nnx.split_state(state, lambda path, _: "indexer" not in path, ...)[0]
        return outs, nnx.merge(mla, others).attend(x, contexts[0])[0]

    (alone, *cached), of_mla = every(state, x)
    assert alone.dtype == jnp.float64 and np.abs(alone).max() > 1
    assert (np.abs(alone - of_mla).max() < 1e-9) == (name != "dsa")
    assert_near(cached, [alone, alone], 1e-9)


# RoPE and YaRN: the page's frequencies and the released models' constants

V3 = Yarn(factor=40.0, original_max_positions=4096, mscale=1.0, mscale_all_dim=1.0)
V2_LITE = Yarn(factor=40.0, original_max_positions=4096, mscale=0.707, mscale_all_dim=0.707)


ANGLES = [
    (64, 1e4, V3),
    (32, 5e5, Yarn(factor=4.0, original_max_positions=8192)),
    (8, 1e4, Yarn(factor=8.0, original_max_positions=64)),  # low is clamped to 0
    (16, 10.0, Yarn(factor=3.0, original_max_positions=1000)),  # high is clamped to R-1
]


@pytest.mark.parametrize("rope_dim, theta, yarn", ANGLES)
def test_frequencies_follow_yarn(rope_dim, theta, yarn):
    cfg = small(rope_head_dim=rope_dim, rope_theta=theta, yarn=yarn, max_positions=64)
    freqs = np.asarray(rope.frequencies(rope_dim, theta, yarn))
    assert freqs.dtype == np.float32
    # a few float32 roundings
    np.testing.assert_allclose(freqs, reference.rope_frequencies(cfg), rtol=1e-6)
    if yarn is V3:  # the ramp is 0 up to pair 10, and 1 from pair 23
        ratio = freqs * theta ** (np.arange(32) / 32)
        np.testing.assert_allclose(ratio[[0, 10, 23, 31]], [1, 1, 1 / 40, 1 / 40], rtol=1e-5)


def test_softmax_scale_of_released_models():
    """The published digits."""
    for yarn, scale in ((V3, 0.135234), (V2_LITE, 0.114721), (Yarn(), 192**-0.5)):
        assert rope.softmax_scale(192, yarn) == pytest.approx(scale, abs=5e-7)
