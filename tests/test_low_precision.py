"""Products in 8 bits: bit by bit the numbers of a slow NumPy oracle, and nothing else of the model changes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.kernels import low_precision as lp
from dsv3_jax.kernels.low_precision import FP8, FP8_UE8M0, MXFP8
from dsv3_jax.ops import dispatch
from dsv3_jax.ops.grouped_product import ROW_BLOCKS

E4M3 = ml_dtypes.float8_e4m3fn
ALL = (FP8, FP8_UE8M0.in_bfloat16, MXFP8)
RECIPES = pytest.mark.parametrize("recipe", ALL, ids=lambda r: f"{r.name} {r.operands}")


# The oracle: one tile after the other, as the reports say


def scale_of(tile, power_of_two):
    largest = np.float32(np.abs(tile).max(initial=0))
    if not power_of_two:
        return max(np.float32(largest * np.float32(1 / 448)), np.float32(2.0**-100))
    exponent = max(-100, int(np.log2(max(largest, 1e-30))) - 12)  # low enough
    while np.ldexp(448.0, exponent) < largest:  # float64: exact
        exponent += 1
    return np.float32(np.ldexp(1.0, exponent))


def quantized(x, tile, power_of_two):
    """(float8 numbers, scales) of a matrix."""
    x = np.asarray(x).astype(np.float32)
    rows, columns = (range(0, size, step) for size, step in zip(x.shape, tile, strict=True))
    numbers, scales = np.zeros(x.shape, E4M3), np.zeros((len(rows), len(columns)), np.float32)
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            part = x[r : r + tile[0], c : c + tile[1]]
            scales[i, j] = scale_of(part, power_of_two)
            numbers[r : r + tile[0], c : c + tile[1]] = (part / scales[i, j]).astype(E4M3)
    return numbers, scales


def rounded(x, tile, power_of_two):
    """number · scale, in float32."""
    numbers, scales = quantized(x, tile, power_of_two)
    spread = np.repeat(np.repeat(scales, tile[0], 0), tile[1], 1)[: numbers.shape[0], : numbers.shape[1]]
    return numbers.astype(np.float32) * spread


def by_oracle(recipe, x, w, dy):
    """(y, dx, dw) of one product, in float64 from rounded operands."""
    t, pow2 = recipe.tile, recipe.power_of_two
    w_tiles = ((t, t), (t, t)) if t == 128 else ((t, 1), (1, t))
    q = lambda a, tile: rounded(a, tile, pow2).astype(np.float64)  # noqa: E731
    y = q(x, (1, t)) @ q(w, w_tiles[0])
    dx = q(dy, (1, t)) @ q(w, w_tiles[1]).T
    return y, dx, q(x, (t, 1)).T @ q(dy, (t, 1))


def hostile(rng, shape, dtype=np.float32):
    """Numbers of all magnitudes, with zeros, subnormals and a row and a column of zeros."""
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 6, shape)
    x[rng.random(shape) < 0.1] = 0
    x[0] = x[:, 0] = 0
    x[1, 1:4], x[-1, -1], x[-2, 1] = (1e-40, -1e-44, 1e-37), 3e38, -1.7e38
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_numbers_and_scales_are_the_oracles_bit_by_bit(rng, power_of_two, dtype):
    x = hostile(rng, (150, 161), dtype)
    for tile in ((1, 128), (128, 1), (128, 128), (1, 32), (32, 1)):
        scales = jax.jit(partial(lp.tile_scales, tile=tile, power_of_two=power_of_two))(jnp.asarray(x))
        assert scales.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(scales), quantized(x, tile, power_of_two)[1])
        values = jax.jit(partial(lp.round_to_tiles, tile=tile, power_of_two=power_of_two))(jnp.asarray(x))
        np.testing.assert_array_equal(np.asarray(values), rounded(x, tile, power_of_two))


def test_arithmetic_rounds_as_the_cast_does():
    """All e4m3 numbers, all midpoints between two of them, and the float32 numbers on both sides of each midpoint."""
    numbers = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(448))])
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(np.asarray(lp.round_to_e4m3(jnp.asarray(x))), x.astype(E4M3).astype(np.float32))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_stays_so(power_of_two):
    """The training step skips a batch by it."""
    for bad in (np.nan, np.inf, -np.inf):
        x = jnp.ones((2, 130)).at[0, 3].set(bad)
        values = np.asarray(lp.round_to_tiles(x, (1, 128), power_of_two=power_of_two))
        assert np.isnan(values[0, 3]) and np.isfinite(values[1]).all() and np.isfinite(values[0, 128:]).all()


def test_bfloat16_holds_the_numbers_whose_scales_are_powers_of_two(rng):
    x = jnp.asarray(hostile(rng, (150, 161)))
    for recipe in (FP8, MXFP8):
        found = np.asarray(lp.round_to_tiles(x, (1, recipe.tile), power_of_two=recipe.power_of_two))
        same = np.array_equal(found.astype(jnp.bfloat16).astype(np.float32), found)
        assert same == recipe.power_of_two == (recipe.in_bfloat16.operands == "bfloat16")


# One product


@partial(jax.jit, static_argnums=0)
def forward_and_back(recipe, x, w, dy):
    y, pull_back = jax.vjp(recipe.matmul, x, w)
    return y, *pull_back(dy)


SHAPES = [(140, 150, 130), (5, 7, 3)]  # not divided by 128 or 32; smaller than a tile


def close(got, want, dtype=np.float32):
    """Equal up to the rounding of float32 sums of some hundred terms, and of the result to `dtype`."""
    limit = 2e-6 if dtype == np.float32 else 2.0**-8
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=limit, atol=limit * np.abs(want).max())


@RECIPES
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_and_its_gradients(rng, recipe, shape):
    """Every second row and column is 2¹⁷ times smaller, so that rounding depends on which numbers share a tile."""
    of_m, of_k, of_n = (np.where(np.arange(size) % 2, 2.0**-17, 1) for size in shape)
    draw = lambda *factors: (rng.standard_normal([f.size for f in factors]) * np.outer(*factors)).astype(np.float32)  # noqa: E731
    x, w, dy = draw(of_m, 1 / of_k), draw(of_k, of_n), draw(1 / of_m, 1 / of_n)
    y, dx, dw = forward_and_back(recipe, *map(jnp.asarray, (x, w, dy)))
    outer = (of_m, of_n), (1 / of_m, of_k), (1 / of_k, 1 / of_n)
    for got, want, factors in zip((y, dx, dw), by_oracle(recipe, x, w, dy), outer, strict=True):
        close(np.asarray(got, np.float64) / np.outer(*factors), want / np.outer(*factors))
    exact = x.astype(np.float64) @ w
    assert np.abs((np.asarray(y) - exact) / np.outer(of_m, of_n)).max() > 1e-2  # it is not the exact product


@RECIPES
def test_bfloat16_rows_with_float32_weights(rng, recipe):
    """The master weight is rounded once, from float32, and its gradient is float32."""
    x, dy = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((140, 150), (140, 130)))
    w = jnp.asarray(rng.standard_normal((150, 130)), jnp.float32)
    y, dx, dw = forward_and_back(recipe, x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    want = by_oracle(recipe, *(np.asarray(a) for a in (x, w, dy)))
    for got, expected, dtype in zip((y, dx, dw), want, (jnp.bfloat16, jnp.bfloat16, np.float32), strict=True):
        close(got, expected, dtype)


def test_heads_and_swiglu_are_products(rng):
    """Heads are joined to one matrix; W_uk and W_uv of a head lie side by side, as the released kv_b_proj has them."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    times = lambda a, b: by_oracle(FP8, a, b, np.zeros((len(a), b.shape[1])))[0]  # noqa: E731
    product = jax.jit(partial(lp.product, recipe=FP8), static_argnames="axes")
    out, from_heads = draw(2, 3, 4, 8), draw(4, 8, 24)
    y = product(jnp.asarray(out), jnp.asarray(from_heads), axes=2)
    close(y, times(out.reshape(6, 32), from_heads.reshape(32, 24)).reshape(2, 3, 24))

    c_kv, k_rope, w_uk, w_uv = draw(2, 3, 10), draw(2, 3, 4), draw(3, 6, 10), draw(3, 5, 10)
    k, v = jax.jit(partial(lp.expand, recipe=FP8))(*map(jnp.asarray, (c_kv, k_rope, w_uk, w_uv)))
    kv = times(c_kv.reshape(6, 10), np.concatenate([w_uk, w_uv], axis=1).reshape(33, 10).T).reshape(2, 3, 3, 11)
    close(k[..., :6], kv[..., :6])
    close(v, kv[..., 6:])
    np.testing.assert_array_equal(k[..., 6:], np.broadcast_to(k_rope[:, :, None], (2, 3, 3, 4)))

    x, w_gate, w_up, w_down = map(jnp.asarray, (draw(6, 24), draw(24, 20), draw(24, 20), draw(20, 24)))
    want = product(jax.nn.silu(product(x, w_gate)) * product(x, w_up), w_down)
    np.testing.assert_allclose(
        jax.jit(partial(lp.swiglu, recipe=FP8))(x, w_gate, w_up, w_down), want, rtol=1e-5, atol=1e-5
    )


# Experts


def one_by_one(recipe, x, ids, gates, weights, d_y):
    """(y, d_x, d_weights of one layer): each expert gathers its tokens, in their order, and runs three products."""
    y, d_x, d_w = np.zeros(x.shape), np.zeros(x.shape), [np.zeros(w.shape) for w in weights]
    hidden = weights[0].shape[2]
    for e in range(len(weights[0])):
        token, choice = np.nonzero(ids == e)
        if not len(token):
            continue
        g, u, d = (w[e] for w in weights)
        rows, d_out, gate = x[token], d_y[token], gates[token, choice][:, None].astype(np.float64)
        a, b = (by_oracle(recipe, rows, w, np.zeros((len(token), hidden)))[0] for w in (g, u))
        sig = 1 / (1 + np.exp(-a))
        h = (a * sig * b * gate).astype(np.float32)
        out, d_h, d_w[2][e] = by_oracle(recipe, h, d, d_out)
        d_h = d_h * gate
        d_a, d_b = (z.astype(np.float32) for z in (d_h * b * (sig + a * sig * (1 - sig)), d_h * a * sig))
        np.add.at(y, token, out)
        for w, d_z, index in ((g, d_a, 0), (u, d_b, 1)):
            _, d_rows, d_w[index][e] = by_oracle(recipe, rows, w, d_z)
            np.add.at(d_x, token, d_rows)
    return y, d_x, d_w


@pytest.mark.parametrize(
    "recipe, inner",
    [
        (FP8, ROW_BLOCKS),
        pytest.param(MXFP8, ROW_BLOCKS, marks=pytest.mark.long),
    ],
    ids=lambda x: x.name,
)
def test_experts_are_products_one_by_one(rng, recipe, inner):
    """Wgrad's tiles restart with each expert; one has more tokens than a tile, one has none."""
    n, dim, hidden = 150, 40, 36
    ids = np.stack([rng.permutation(4)[:2] for _ in range(n)]).astype(np.int32)
    ids[:140, 0] = 0
    ids[:, 1] = np.where(ids[:, 0] == 3, 1, 3)
    ids[ids == 2] = 1
    assert np.bincount(ids.ravel(), minlength=4)[2] == 0 and np.bincount(ids.ravel())[0] > 128
    x, d_y = (rng.standard_normal((n, dim)).astype(np.float32) for _ in range(2))
    gates = rng.uniform(0.2, 1, ids.shape).astype(np.float32)
    shapes = (dim, hidden), (dim, hidden), (hidden, dim)
    weights = [rng.standard_normal((4, *s)).astype(np.float32) / 6 for s in shapes]

    def run(x, *weights):
        product = lp.grouped(recipe, inner)
        return dispatch.grouped_swiglu(x, jnp.asarray(ids), jnp.asarray(gates), *weights, product=product)

    y, pull_back = jax.vjp(jax.jit(run), jnp.asarray(x), *map(jnp.asarray, weights))
    d_x, *d_weights = pull_back(jnp.asarray(d_y))
    want_y, want_dx, want_dw = one_by_one(recipe, x, ids, gates, weights, d_y)
    # h and the gradients before silu are rounded from float32 here and from float64 there. A few fall on other e4m3
    # numbers, each a change of 1/16 of itself. Most numbers are equal to float32 rounding, all to 1 %.
    for got, want in zip((y, d_x, *d_weights), (want_y, want_dx, *want_dw), strict=True):
        difference = np.abs(np.asarray(got, np.float64) - want) / np.abs(want).max()
        assert np.median(difference) < 1e-6 and difference.max() < 1e-2


def test_grouped_products_of_bfloat16_rows_give_the_backend_bfloat16(rng):
    """The backend's float32 products of the same numbers, rounded to bfloat16 once. Rows of float32 stay float32."""
    seen = []

    def forward(x, w, counts):
        seen.append((x.dtype.name, w.dtype.name))
        return ROW_BLOCKS.forward(x, w, counts)

    x = jnp.asarray(rng.standard_normal((150, 40)), jnp.bfloat16)
    w, counts = jnp.asarray(rng.standard_normal((3, 40, 36)), jnp.float32), jnp.asarray([130, 0, 20], jnp.int32)
    for_wide, for_narrow = (lp.grouped(r, replace(ROW_BLOCKS, forward=forward)) for r in (MXFP8, MXFP8.in_bfloat16))
    want, got = (jax.jit(backend.forward)(x, w, counts) for backend in (for_wide, for_narrow))
    assert got.dtype == jnp.bfloat16 and seen == [2 * ("float32",), 2 * ("bfloat16",)]
    close(got, np.asarray(want, np.float64), jnp.bfloat16)
    jax.eval_shape(for_narrow.forward, x.astype(jnp.float32), w, counts)
    assert seen[-1] == ("float32", "float32")
