"""Attention: blocks and C++ equal the full score matrix, and MLA's two forms each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from models import small

import dsv3_jax as ds
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.kernels.cpu import attention as cpu_attention
from dsv3_jax.kernels.cpu import library
from dsv3_jax.model.cache import Cache, empty_cache
from dsv3_jax.model.context import How, from_zero, make_context
from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.cached_attention import Stored, cached_attention


def full_scores(q, k, v, mask):
    """Each key-value head serves the query heads after one another."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return oracles.attention_jnp(q, k, v, mask, scale=0.4)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(attention, weight, q, k, v, *rest):
    """Return out = attention(…) and the gradients of sum(weight * out) in q, k and v."""

    def loss(*arrays):
        out = attention(*arrays, *rest)
        return (out * weight).sum(), out

    (_, out), grads = jax.value_and_grad(loss, argnums=range(3), has_aux=True)(q, k, v)
    return out, grads


IN_BLOCKS = partial(causal_attention, block=8), np.float64, 1e-9
# In float32, of unit roundoff 6e-8; the oracle is in float64. Blocks have 64 queries, 256 keys.
IN_CPP = cpu_attention.causal_attention, np.float32, 1e-5


@pytest.mark.parametrize(
    "how, length, heads, groups, key, value",
    [
        (IN_BLOCKS, 5, 4, 4, 6, 3),
        (IN_BLOCKS, 23, 4, 2, 6, 3),
        (IN_CPP, 1, 3, 3, 6, 3),
        (IN_CPP, 257, 3, 3, 21, 70),
    ],
    ids=["below a block", "heads in groups", "cpu, one token", "cpu, several blocks"],
)
def test_attention_and_its_gradients_equal_the_full_score_matrix(
    x64, rng, how, length, heads, groups, key, value
):
    attend, dtype, atol = how
    shapes = ((heads, key), (groups, key), (groups, value), (heads, value))
    if how is IN_CPP and (why := library.why_not()):
        pytest.skip(why)
    q, k, v, weight = (rng.standard_normal((2, length, *shape)).astype(dtype) for shape in shapes)
    # a few documents a row, some with one token, then padding
    ids = np.cumsum(rng.random((2, length)) < 4 / length, axis=1, dtype=np.int32) + 1
    ids[:, length - length // 8 :] = 0
    real = ids > 0
    weight = np.where(real[..., None, None], weight, 0)  # the output at padding is not defined
    ours = lambda q, k, v: attend(q, k, v, scale=0.4, segment_ids=jnp.asarray(ids))  # noqa: E731
    out, grads = value_and_gradients(ours, weight, q, k, v)
    wide = [x.astype(np.float64) for x in (weight, q, k, v)]
    expected, expected_grads = value_and_gradients(
        full_scores, *wide, oracles.causal_mask(2, length, ids)
    )
    assert out.dtype == dtype and np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=atol)
    for name, g, e in zip("qkv", grads, expected_grads, strict=True):
        np.testing.assert_allclose(
            g, e, atol=atol * (1 + np.abs(e).max()), err_msg=f"gradient of {name}"
        )


@pytest.fixture(params=["blocks", "cpu"])
def attend(request):
    if request.param == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    return (
        partial(causal_attention, block=64)
        if request.param == "blocks"
        else cpu_attention.causal_attention
    )


def test_large_scores_stay_finite_and_repeat(rng, attend):
    """exp of scores around 1e4 overflows, so every block must subtract the maximum."""
    q, k, v = (
        100 * rng.standard_normal((1, 530, 2, width)).astype(np.float32) for width in (24, 24, 16)
    )
    loss = lambda q, k, v: attend(q, k, v, scale=1.0).sum()  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    first = jax.tree.leaves(run(q, k, v))
    assert all(np.isfinite(x).all() for x in first)
    for a, b in zip(
        first * 5, [x for _ in range(5) for x in jax.tree.leaves(run(q, k, v))], strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_gradient_memory_grows_with_length_not_its_square():
    """Compiled, not run: four times the length needs 4 times the scratch memory; T^2 needs 16."""

    def scratch(length):
        def loss(q, k, v):
            return causal_attention(q, k, v, scale=1.0, segment_ids=segments, block=128).sum()

        segments = jnp.ones((1, length), jnp.int32)
        args = [jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32) for width in (20, 20, 8)]
        compiled = jax.jit(jax.grad(loss, argnums=range(3))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

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
        cached = cached_attention(
            [q], [keys], values, jnp.ones((rows, 1), jnp.int32), scale=V3_SCALE
        )
        causal = causal_attention(jnp.concatenate([q, q], axis=1), k, v, scale=V3_SCALE)
        return causal[:, 1, 0], cached[:, 0, 0]

    for out, bound in zip(both(q, k, v), (1e-4, 5e-4), strict=True):
        out = np.asarray(out).astype(np.float64)
        seen = (out > 0.02).all(axis=1)  # a small weight has lost its digits
        odds, exact_odds = np.log(out[seen, 0] / out[seen, 1]), exact[seen, 0] - exact[seen, 1]
        bias = (odds * exact_odds).sum() / (exact_odds**2).sum() - 1
        assert abs(bias) < bound, bias


def test_expanded_equals_absorbed(x64, rng):
    """MLA over complete rows, and over a cache of latents whose free slots hold garbage."""
    cfg = small()
    # plain XLA, which runs in float64 too
    how = How(Kernels(Target("cuda", "xla")))
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ds.MLA(cfg, rngs=nnx.Rngs(0))))
    state, x = jax.tree.map(
        lambda w: rng.standard_normal(w.shape), (state, jnp.zeros((2, 11, cfg.dim)))
    )

    @jax.jit
    def both(state, x):
        module, positions = nnx.merge(graphdef, state), from_zero(2, 11)
        cache = empty_cache(ds.MLA.cache_rows(cfg, "latent"), [1], 2, 16, jnp.float64)
        cache = Cache(jax.tree.map(lambda rows: rows + 1e3, cache.parts), cache.lengths)
        contexts = [make_context(cfg, positions, how=how, cache=c) for c in (None, cache)]
        return [module.attend(x, ctx)[0] for ctx in contexts]

    expanded, absorbed = both(state, x)
    assert expanded.dtype == jnp.float64 and np.abs(expanded).max() > 1
    np.testing.assert_allclose(absorbed, expanded, atol=1e-9 * np.abs(expanded).max())
