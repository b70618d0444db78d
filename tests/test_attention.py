"""Causal attention equals the full score matrix, by XLA and by the C++ kernel; both forms of MLA are equal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from dsv3_jax.kernels.cpu import attention as cpu_attention
from dsv3_jax.kernels.cpu import library
from dsv3_jax.ops import attention, mla
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


full_scores = partial(oracles.attention_jnp, scale=0.4)


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(attention, num_wrt, weight, *arrays):
    """Return out = attention(*arrays) and the gradients of sum(weight * out) in the first `num_wrt` arrays."""

    def loss(*arrays):
        out = attention(*arrays)
        return (out * weight).sum(), out

    (_, out), grads = jax.value_and_grad(loss, argnums=range(num_wrt), has_aux=True)(*arrays)
    return out, grads


def assert_gradients_equal(got, want):
    for name, g, e in zip("qkv", got, want, strict=True):
        np.testing.assert_allclose(g, e, atol=1e-9, err_msg=f"gradient of {name}")


@pytest.mark.parametrize("length, block, packed", [(5, 8, False), (23, 8, False), (23, 8, True), (32, 8, True)])
def test_attention_and_its_gradients_equal_the_full_score_matrix(x64, rng, length, block, packed):
    """The key dim is 6, the value dim 3. Lengths are below a block, not a multiple of it, and a multiple."""
    q, k, v, weight = draw(rng, (2, length, 2, 6), (2, length, 2, 6), (2, length, 2, 3), (2, length, 2, 3))
    segment_ids = np.array(SEGMENTS[length], np.int32) if packed else None
    mask = jnp.asarray(oracles.causal_mask(2, length, segment_ids))
    real = np.ones((2, length), bool) if segment_ids is None else segment_ids > 0
    weight = jnp.where(real[..., None, None], weight, 0.0)  # the output at padding is not defined
    arrays = (q, k, v) if segment_ids is None else (q, k, v, jnp.asarray(segment_ids))

    def ours(q, k, v, segment_ids=None):
        return causal_attention(q, k, v, scale=0.4, segment_ids=segment_ids, block=block)

    out, grads = value_and_gradients(ours, 3, weight, *arrays)
    expected, expected_grads = value_and_gradients(full_scores, 3, weight, q, k, v, mask)
    assert out.dtype == jnp.float64
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[real], expected[real], atol=1e-9)
    assert_gradients_equal(grads, expected_grads)


@pytest.mark.parametrize("length, block", [(23, 8), (23, 64)])
def test_output_does_not_depend_on_later_tokens_or_other_documents(rng, length, block):
    q, k, v = (x.astype(jnp.float32) for x in draw(rng, (1, length, 2, 6), (1, length, 2, 6), (1, length, 2, 3)))
    segment_ids = jnp.array(SEGMENTS[length][:1], jnp.int32)
    run = jax.jit(lambda k, v: causal_attention(q, k, v, scale=0.4, segment_ids=segment_ids, block=block))
    before = run(k, v)
    np.testing.assert_array_equal(run(k.at[:, 15:].add(9.0), v.at[:, 15:].add(9.0))[:, :15], before[:, :15])
    np.testing.assert_array_equal(run(k.at[:, :9].add(9.0), v.at[:, :9].add(9.0))[:, 9:], before[:, 9:])


def test_large_scores_stay_finite(rng):
    """exp of scores around 1e4 overflows, so the softmax must subtract the maximum in every block."""
    q, k, v = (x.astype(jnp.float32) for x in draw(rng, (1, 23, 2, 6), (1, 23, 2, 6), (1, 23, 2, 3)))
    loss = lambda q, k, v: causal_attention(100.0 * q, 100.0 * k, v, scale=1.0, block=8).sum()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_gradient_memory_grows_with_length_not_its_square():
    """Compiled, not run. Four times the length needs about 4 times the scratch memory; T^2 would need 16 times."""

    def scratch(length):
        def loss(q, k, v):
            return causal_attention(q, k, v, scale=1.0, segment_ids=segments, block=128).sum()

        segments = jnp.ones((1, length), jnp.int32)
        shapes = [(1, length, 1, 20), (1, length, 1, 20), (1, length, 1, 8)]
        args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        compiled = jax.jit(jax.grad(loss, argnums=range(3))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, two, four = scratch(1024), scratch(2048), scratch(4096)
    assert two < 2.5 * one
    assert four < 2.5 * two
    assert four < 4096 * 4096 * 4 / 4  # a quarter of one score matrix


@pytest.mark.parametrize("groups", [1, 2])
def test_heads_that_share_keys_equal_repeated_ones(x64, rng, groups):
    """Each key-value head serves the query heads after one another, and gets the sum of their gradients."""
    q, k, v, weight = draw(rng, (2, 23, 4, 6), (2, 23, groups, 6), (2, 23, groups, 3), (2, 23, 4, 3))
    mask = jnp.asarray(oracles.causal_mask(2, 23))

    def ours(q, k, v):
        return causal_attention(q, k, v, scale=0.4, block=8)

    def oracle(q, k, v):
        heads = jnp.array([h * groups // 4 for h in range(4)], jnp.int32)
        return full_scores(q, k[:, :, heads], v[:, :, heads], mask)

    out, grads = value_and_gradients(ours, 3, weight, q, k, v)
    expected, expected_grads = value_and_gradients(oracle, 3, weight, q, k, v)
    np.testing.assert_allclose(out, expected, atol=1e-9)
    assert_gradients_equal(grads, expected_grads)


@pytest.mark.parametrize("products, length", [(1, 100), (2, 1000), (64, 4096), (8192, 8192)])
def test_large_blocks_are_bounded_by_memory(products, length):
    """At least 128 rows; beyond, no more scores than the bound, and no more rows than the length needs."""
    block = attention.large_block(products, length)
    assert block == 128 or (block < 2 * length and products * block**2 <= attention.LARGE_SCORES)
    assert block >= length or products * (2 * block) ** 2 > attention.LARGE_SCORES


def test_large_blocks_change_nothing_but_rounding(x64, rng, monkeypatch):
    monkeypatch.setattr(attention, "LARGE_SCORES", 1 << 17)  # blocks of 256
    arrays = draw(rng, (1, 700, 2, 6), (1, 700, 1, 6), (1, 700, 1, 3))
    large = attention.causal_attention_in_large_blocks(*arrays, scale=0.4)
    np.testing.assert_allclose(large, causal_attention(*arrays, scale=0.4), atol=1e-12)


# bfloat16


def bfloat16(rng, *shapes):
    """Return normal arrays in bfloat16, and the same numbers in float64."""
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in draw(rng, *shapes)]
    return arrays, [np.asarray(x.astype(jnp.float32), np.float64) for x in arrays]


V3_SCALE = 0.1352337788608801  # in bfloat16 it is 0.134766: 0.35 % less


def test_scores_in_bfloat16_are_not_biased(rng):
    """Each score has rounding errors of both signs, and their mean is near zero.

    Rounding a query's number changes it by about 2^-9/sqrt(3) of itself, and the mean of 65,536 scores of 64 products
    by far less. A rounded scale would be 35 times the bound.
    """
    (q, k), (exact_q, exact_k) = bfloat16(rng, (256, 64), (256, 64))
    scores = np.asarray(attention.scaled(q, V3_SCALE).astype(jnp.float32), np.float64) @ exact_k.T
    exact = V3_SCALE * exact_q @ exact_k.T
    bias = (scores * exact).sum() / (exact * exact).sum() - 1  # of the factor between them
    assert abs(bias) < 1e-4, bias
    assert attention.scaled(q, V3_SCALE).dtype == jnp.bfloat16


@pytest.mark.parametrize("path", ["causal", "cached"])
def test_attention_in_bfloat16_is_not_biased(rng, path):
    """One-hot values of two keys read the difference of their scores off the output: log of the odds.

    Each query sees two tokens, so odds of every size occur. The bound is the one of the scores, with less data.
    """
    rows, width = 4096, 64
    (q, k), (exact_q, exact_k) = bfloat16(rng, (rows, 1, 1, width), (rows, 2, 1, width))
    v = jnp.broadcast_to(jnp.eye(2, dtype=jnp.float32)[None, :, None], (rows, 2, 1, 2))
    exact = V3_SCALE * np.einsum("bthk,bshk->bs", exact_q, exact_k)
    if path == "causal":
        q = jnp.concatenate([q, q], axis=1)  # the first query sees one key only
        out = causal_attention(q, k, v, scale=V3_SCALE)[:, 1, 0]
    else:
        stored = Stored(jnp.concatenate([k, v.astype(k.dtype)], axis=-1).swapaxes(1, 2)[None], None)
        last = jnp.ones((rows, 1), jnp.int32)
        q = q.swapaxes(1, 2).astype(jnp.bfloat16)
        out = cached_attention(q, stored, ZERO, last, parts=(width, 2), shared=False, scale=V3_SCALE)[:, 0, 0]
    out = np.asarray(out.astype(jnp.float32), np.float64)
    seen = (out > 0.02).all(axis=1)  # a small weight has lost its digits
    odds, exact_odds = np.log(out[seen, 0] / out[seen, 1]), exact[seen, 0] - exact[seen, 1]
    bias = (odds * exact_odds).sum() / (exact_odds**2).sum() - 1
    assert abs(bias) < (1e-4 if path == "causal" else 5e-4), bias


# the C++ kernel


@pytest.fixture
def kernel():
    if why := library.why_not():
        pytest.skip(why)


def documents(rng, batch, length):
    """Return segment ids [batch, length]: a few documents a row, some with one token, then padding."""
    ids = np.cumsum(rng.random((batch, length)) < 4 / length, axis=1, dtype=np.int32) + 1
    ids[:, length - length // 8 :] = 0
    return ids


# The lengths are below, at and above the kernel's blocks of 64 queries and 256 keys; the widths test partial registers.
@pytest.mark.parametrize("length, key, value", [(1, 6, 3), (64, 16, 64), (150, 96, 64), (257, 21, 70), (700, 8, 5)])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_kernel_and_its_gradients_equal_the_full_score_matrix(kernel, rng, length, key, value, packed):
    """The kernel runs in float32, whose unit roundoff is 6e-8; the oracle runs in float64."""
    shapes = [(2, length, 3, width) for width in (key, key, value, value)]
    q, k, v, weight = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    ids = documents(rng, 2, length) if packed else np.ones((2, length), np.int32)
    weight = np.where((ids > 0)[..., None, None], weight, 0)  # the output at padding is not defined

    def ours(q, k, v):
        return cpu_attention.causal_attention(q, k, v, scale=0.4, segment_ids=jnp.asarray(ids))

    out, grads = value_and_gradients(ours, 3, weight, q, k, v)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (weight, q, k, v)]
        mask = jnp.asarray(oracles.causal_mask(2, length, ids))
        expected, expected_grads = value_and_gradients(full_scores, 3, *wide, mask)
    real = ids > 0
    np.testing.assert_allclose(np.asarray(out)[real], np.asarray(expected)[real], atol=1e-5)
    for name, g, e in zip("qkv", grads, expected_grads, strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5 * (1 + np.abs(e).max()), err_msg=f"gradient of {name}")


def test_kernel_output_does_not_depend_on_later_tokens_or_other_documents(kernel, rng):
    q, k, v = (jnp.asarray(rng.standard_normal((1, 300, 2, n)), jnp.float32) for n in (24, 24, 16))
    ids = np.repeat([[1, 2, 3]], [100, 120, 80], axis=1).astype(np.int32)
    attend = cpu_attention.causal_attention
    run = jax.jit(lambda k, v: attend(q, k, v, scale=0.4, segment_ids=jnp.asarray(ids)))
    before = np.asarray(run(k, v))
    for first, last, unchanged in ((260, 300, slice(0, 260)), (0, 100, slice(100, 300)), (100, 220, slice(220, 300))):
        other_k, other_v = (x.at[:, first:last].add(9.0) for x in (k, v))
        np.testing.assert_array_equal(run(other_k, other_v)[:, unchanged], before[:, unchanged])


def test_kernel_is_finite_for_large_scores_and_deterministic(kernel, rng):
    q, k, v = (100 * rng.standard_normal((1, 530, 2, width)).astype(np.float32) for width in (24, 24, 16))
    loss = lambda q, k, v: cpu_attention.causal_attention(q, k, v, scale=1.0).sum()  # noqa: E731
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    first = jax.tree.leaves(run(q, k, v))
    assert all(np.isfinite(x).all() for x in first)
    for _ in range(10):
        for a, b in zip(first, jax.tree.leaves(run(q, k, v)), strict=True):
            np.testing.assert_array_equal(a, b)


# multi-head latent attention

B, T, H, N, R, C, V = 2, 11, 3, 6, 4, 10, 5
SCALE = 0.37


def latents(rng):
    """Return q_nope, q_rope, c_kv, k_rope, w_uk and w_uv."""
    shapes = ((B, T, H, N), (B, T, H, R), (B, T, C), (B, T, R), (H, N, C), (H, V, C))
    return draw(rng, *shapes)


SEGMENT_IDS = np.array([[1] * 4 + [2] * 7, [1] * 5 + [2] * 6], np.int32)


ZERO = jnp.zeros((), jnp.int32)


def test_expanded_equals_oracle(x64, rng):
    arrays = latents(rng)
    mask = oracles.causal_mask(B, T, SEGMENT_IDS)
    expected = oracles.mla(*map(np.asarray, arrays), mask, scale=SCALE)
    expanded = mla.expanded(*arrays, scale=SCALE, segment_ids=jnp.asarray(SEGMENT_IDS))
    np.testing.assert_allclose(expanded, expected, atol=1e-9)


@pytest.mark.parametrize("block", [3, 4, 16])  # the 11 rows need several blocks, the last of them partial, or only one
def test_expanded_equals_absorbed(x64, rng, block):
    q_nope, q_rope, c_kv, k_rope, w_uk, w_uv = arrays = latents(rng)
    stored = Stored(jnp.concatenate([c_kv, k_rope], axis=-1)[None, :, None], None)
    last = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    absorbed = mla.absorbed(q_nope, q_rope, stored, ZERO, last, w_uk, w_uv, scale=SCALE, block=block)
    np.testing.assert_allclose(absorbed, mla.expanded(*arrays, scale=SCALE), atol=1e-9)


def test_summed_scores_equal_concatenated(x64, rng):
    """The report sums two products; the fast paths compute one product of concatenated vectors."""
    shapes = ((B, T, H, N), (B, T, H, R), (B, T, H, N), (B, T, R))
    *arrays, weight = draw(rng, *shapes, (B, H, T, T))
    out, grads = value_and_gradients(mla.concat_scores, 4, weight, *arrays)
    expected, expected_grads = value_and_gradients(mla.summed_scores, 4, weight, *arrays)
    np.testing.assert_allclose(out, expected, atol=1e-9)
    for g, e in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(g, e, atol=1e-9)


@pytest.mark.parametrize("block", [3, 5, 16])
def test_absorbed_step_over_a_longer_ragged_cache(x64, rng, block):
    """The last two tokens of sequences of length 11 and 7, in layer 1 of a cache whose free slots hold garbage."""
    q_nope, q_rope, c_kv, k_rope, w_uk, w_uv = latents(rng)
    full = oracles.mla(
        *map(np.asarray, (q_nope, q_rope, c_kv, k_rope, w_uk, w_uv)), oracles.causal_mask(B, T), scale=SCALE
    )
    cache = np.full((2, B, 1, 16, C + R), 1e3)
    lengths = (11, 7)
    for b, length in enumerate(lengths):
        cache[1, b, 0, :length, :C] = c_kv[b, :length]
        cache[1, b, 0, :length, C:] = k_rope[b, :length]
    queries = np.array([[length - 2, length - 1] for length in lengths], np.int32)
    rows = np.arange(B)[:, None]
    step = mla.absorbed(
        q_nope[rows, queries], q_rope[rows, queries], Stored(jnp.asarray(cache), None), ZERO + 1, jnp.asarray(queries),
        w_uk, w_uv, scale=SCALE, block=block,
    )  # fmt: skip
    np.testing.assert_allclose(step, full[rows, queries], atol=1e-9)
