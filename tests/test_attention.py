"""Attention: the block-wise op and the C++ kernel equal the full score matrix, and MLA's two forms each other."""

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
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.ops import attention
from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.cached_attention import Stored, cached_attention

SEGMENTS = {  # rows of packed documents; 0 is padding
    5: [[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]],
    23: [[1] * 9 + [2] * 3 + [3] * 11, [1] * 4 + [2] * 13 + [0] * 6],
    32: [[1] * 16 + [2] * 16, [1] * 7 + [2] * 18 + [3] * 7],
}


def draw(rng, *shapes):
    """Return standard normal arrays."""
    return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


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


@pytest.mark.parametrize(
    "length, block, packed, groups",
    [(5, 8, False, 4), (23, 8, False, 2), (23, 8, True, 1), (32, 8, True, 4)],
)
def test_attention_and_its_gradients_equal_the_full_score_matrix(x64, rng, length, block, packed, groups):
    """The key dim is 6, the value dim 3. Lengths are below a block, not a multiple of it, and a multiple."""
    shapes = (2, length, 4, 6), (2, length, groups, 6), (2, length, groups, 3), (2, length, 4, 3)
    q, k, v, weight = draw(rng, *shapes)
    segment_ids = np.array(SEGMENTS[length], np.int32) if packed else np.ones((2, length), np.int32)
    mask, real = jnp.asarray(oracles.causal_mask(2, length, segment_ids)), segment_ids > 0
    weight = jnp.where(real[..., None, None], weight, 0.0)  # the output at padding is not defined

    def ours(q, k, v, segment_ids):
        segment_ids = segment_ids if packed else None
        return causal_attention(q, k, v, scale=0.4, segment_ids=segment_ids, block=block)

    out, grads = value_and_gradients(ours, weight, q, k, v, jnp.asarray(segment_ids))
    expected, expected_grads = value_and_gradients(full_scores, weight, q, k, v, mask)
    assert out.dtype == jnp.float64 and np.isfinite(out).all()
    np.testing.assert_allclose(out[real], expected[real], atol=1e-9)
    for name, g, e in zip("qkv", grads, expected_grads, strict=True):
        np.testing.assert_allclose(g, e, atol=1e-9, err_msg=f"gradient of {name}")


# The lengths are below, at and above the kernel's blocks of 64 queries and 256 keys; the widths test partial registers.
@pytest.mark.parametrize("length, key, value", [(1, 6, 3), (64, 16, 64), (257, 21, 70), (700, 8, 5)])
def test_the_kernel_and_its_gradients_equal_the_full_score_matrix(rng, length, key, value):
    """The kernel runs in float32, whose unit roundoff is 6e-8; the oracle runs in float64."""
    if why := library.why_not():
        pytest.skip(why)
    q, k, v, weight = (rng.standard_normal((2, length, 3, n)).astype(np.float32) for n in (key, key, value, value))
    # a few documents a row, some with one token, then padding
    ids = np.cumsum(rng.random((2, length)) < 4 / length, axis=1, dtype=np.int32) + 1
    ids[:, length - length // 8 :] = 0
    real = ids > 0
    weight = np.where(real[..., None, None], weight, 0)

    def ours(q, k, v):
        return cpu_attention.causal_attention(q, k, v, scale=0.4, segment_ids=jnp.asarray(ids))

    out, grads = value_and_gradients(ours, weight, q, k, v)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (weight, q, k, v)]
        mask = jnp.asarray(oracles.causal_mask(2, length, ids))
        expected, expected_grads = value_and_gradients(full_scores, *wide, mask)
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
    for name, g, e in zip("qkv", grads, expected_grads, strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5 * (1 + np.abs(e).max()), err_msg=f"gradient of {name}")


@pytest.fixture(params=["blocks", "cpu"])
def attend(request):
    if request.param == "cpu" and (why := library.why_not()):
        pytest.skip(why)
    return partial(causal_attention, block=64) if request.param == "blocks" else cpu_attention.causal_attention


def test_output_does_not_depend_on_later_tokens_or_other_documents(rng, attend):
    q, k, v = (jnp.asarray(rng.standard_normal((1, 300, 2, n)), jnp.float32) for n in (24, 24, 16))
    ids = np.repeat([[1, 2, 3]], [100, 120, 80], axis=1).astype(np.int32)
    run = jax.jit(lambda k, v: attend(q, k, v, scale=0.4, segment_ids=jnp.asarray(ids)))
    before = np.asarray(run(k, v))
    for first, last, unchanged in ((260, 300, slice(0, 260)), (0, 100, slice(100, 300)), (100, 220, slice(220, 300))):
        other_k, other_v = (x.at[:, first:last].add(9.0) for x in (k, v))
        np.testing.assert_array_equal(run(other_k, other_v)[:, unchanged], before[:, unchanged])


def test_large_scores_stay_finite_and_repeat(rng, attend):
    """exp of scores around 1e4 overflows, so the softmax must subtract the maximum in every block."""
    q, k, v = (100 * rng.standard_normal((1, 530, 2, width)).astype(np.float32) for width in (24, 24, 16))
    loss = lambda q, k, v: attend(q, k, v, scale=1.0).sum()  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    first = jax.tree.leaves(run(q, k, v))
    assert all(np.isfinite(x).all() for x in first)
    for a, b in zip(first * 5, [x for _ in range(5) for x in jax.tree.leaves(run(q, k, v))], strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradient_memory_grows_with_length_not_its_square():
    """Compiled, not run. Four times the length needs about 4 times the scratch memory; T^2 would need 16 times."""

    def scratch(length):
        def loss(q, k, v):
            return causal_attention(q, k, v, scale=1.0, segment_ids=segments, block=128).sum()

        segments = jnp.ones((1, length), jnp.int32)
        args = [jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32) for width in (20, 20, 8)]
        compiled = jax.jit(jax.grad(loss, argnums=range(3))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, four = scratch(1024), scratch(4096)
    assert four < 6 * one and four < 4096 * 4096 * 4 / 4  # a quarter of one score matrix


def test_large_blocks_change_nothing_but_rounding(x64, rng, monkeypatch):
    monkeypatch.setattr(attention, "LARGE_SCORES", 1 << 17)
    assert attention.block_size(2, 700, large=True) == 256 and attention.block_size(2, 700) == 128
    arrays = draw(rng, (1, 700, 2, 6), (1, 700, 1, 6), (1, 700, 1, 3))
    large = causal_attention(*arrays, scale=0.4, large=True)
    np.testing.assert_allclose(large, causal_attention(*arrays, scale=0.4), atol=1e-12)


V3_SCALE = 0.1352337788608801  # in bfloat16 it is 0.134766: 0.35 % less


def test_attention_in_bfloat16_is_not_biased(rng):
    """One-hot values of two keys read the difference of their scores off the output: log of the odds.

    Rounding a query's number changes it by about 2^-9/sqrt(3) of itself, and the mean of all scores by far less. A
    rounded scale would be seven times the bound. Each query sees two tokens, so odds of every size occur.
    """
    rows, width = 4096, 64
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in draw(rng, (rows, 1, 1, width), (rows, 2, 1, width)))
    exact_q, exact_k = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k))
    v = jnp.broadcast_to(jnp.eye(2, dtype=jnp.float32)[None, :, None], (rows, 2, 1, 2))
    exact = V3_SCALE * np.einsum("bthk,bshk->bs", exact_q, exact_k)
    keys, values = (Stored(x.astype(q.dtype).swapaxes(1, 2), None) for x in (k, v))
    causal = causal_attention(jnp.concatenate([q, q], axis=1), k, v, scale=V3_SCALE)[:, 1, 0]
    cached = cached_attention([q], [keys], values, jnp.ones((rows, 1), jnp.int32), scale=V3_SCALE)[:, 0, 0]
    for out, bound in ((causal, 1e-4), (cached, 5e-4)):
        out = np.asarray(out.astype(jnp.float32), np.float64)
        seen = (out > 0.02).all(axis=1)  # a small weight has lost its digits
        odds, exact_odds = np.log(out[seen, 0] / out[seen, 1]), exact[seen, 0] - exact[seen, 1]
        bias = (odds * exact_odds).sum() / (exact_odds**2).sum() - 1
        assert abs(bias) < bound, bias


def test_expanded_equals_absorbed(x64, rng):
    """MLA over complete rows, and over a cache of latents whose free slots hold garbage."""
    cfg = small()
    make = partial(ds.MLA, cfg, kernels=Kernels(Target("cuda", "xla")))  # plain XLA, which runs in float64 too
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    module = nnx.merge(graphdef, jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape)), state))
    x, positions = jnp.asarray(rng.standard_normal((2, 11, cfg.dim))), from_zero(2, 11)
    cache = empty_cache(ds.MLA.cache_rows(cfg, "latent"), [1], 2, 16, jnp.float64)
    cache = Cache(jax.tree.map(lambda rows: rows + 1e3, cache.parts), cache.lengths)
    expanded, absorbed = (module.attend(x, make_context(cfg, positions, cache=c))[0] for c in (None, cache))
    assert expanded.dtype == jnp.float64 and np.abs(expanded).max() > 1
    np.testing.assert_allclose(absorbed, expanded, atol=1e-9 * np.abs(expanded).max())
