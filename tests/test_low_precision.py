"""Products in 8 bits: bit by bit the numbers of a slow NumPy oracle, and nothing else of the model changes."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.kernels import low_precision as lp
from dsv3_jax.kernels.low_precision import FP8, FP8_UE8M0, MXFP8

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


def rounded(x, tile, power_of_two):
    """(e4m3 number · scale, in float32; scales) of a matrix."""
    x = np.asarray(x).astype(np.float32)
    rows, columns = (range(0, size, step) for size, step in zip(x.shape, tile, strict=True))
    values, scales = np.zeros_like(x), np.zeros((len(rows), len(columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        part = slice(rows[i], rows[i] + tile[0]), slice(columns[j], columns[j] + tile[1])
        scales[i, j] = scale_of(x[part], power_of_two)
        values[part] = (x[part] / scales[i, j]).astype(E4M3).astype(np.float32) * scales[i, j]
    return values, scales


def by_oracle(recipe, x, w, dy):
    """(y, dx, dw) of one product, in float64 from rounded operands."""
    t, pow2 = recipe.tile, recipe.power_of_two
    w_tiles = ((t, t), (t, t)) if t == 128 else ((t, 1), (1, t))
    q = lambda a, tile: rounded(a, tile, pow2)[0].astype(np.float64)  # noqa: E731
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


@pytest.mark.parametrize("power_of_two, dtype", [(False, np.float32), (True, np.float32), (True, ml_dtypes.bfloat16)])
def test_numbers_and_scales_are_the_oracles_bit_by_bit(rng, power_of_two, dtype):
    """bfloat16 holds the numbers whose scales are powers of two."""
    x, tiles = hostile(rng, (150, 161), dtype), ((1, 128), (128, 128), (32, 1))

    @jax.jit
    def run(x):
        made = [[f(x, tile, power_of_two=power_of_two) for f in (lp.tile_scales, lp.round_to_tiles)] for tile in tiles]
        return made, lp.round_to_tiles(x.at[3, 3].set(jnp.nan), (1, 32), power_of_two=power_of_two)

    made, with_nan = run(x)
    for tile, (scales, values) in zip(tiles, made, strict=True):
        assert scales.dtype == np.float32
        for got, want in zip((values, scales), rounded(x, tile, power_of_two), strict=True):
            np.testing.assert_array_equal(got, want)
        values = np.asarray(values)
        assert np.array_equal(values.astype(jnp.bfloat16).astype(np.float32), values) == power_of_two
    # The training step skips a batch by what is not finite.
    assert np.isnan(with_nan[3, 3]) and np.isfinite(with_nan[4:]).all() and np.isfinite(with_nan[3, 32:]).all()


def test_arithmetic_rounds_as_the_cast_does():
    """All e4m3 numbers, all midpoints between two of them, and the float32 numbers on both sides of each midpoint."""
    numbers = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)  # 0 to 448
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(448))])
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(jax.jit(lp.round_to_e4m3)(x), x.astype(E4M3).astype(np.float32))


# One product


@partial(jax.jit, static_argnums=0)
def forward_and_back(recipe, x, w, dy):
    y, pull_back = jax.vjp(recipe.matmul, x, w)
    return y, *pull_back(dy)


def close(got, want, dtype=np.float32):
    """Equal up to the rounding of float32 sums of some hundred terms, and of the result to `dtype`."""
    limit = 2e-6 if dtype == np.float32 else 2.0**-8
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=limit, atol=limit * np.abs(want).max())


@RECIPES
def test_a_product_and_its_gradients(rng, recipe):
    """Every second row and column is 2¹⁷ times smaller, so that rounding depends on which numbers share a tile."""
    of_m, of_k, of_n = (np.where(np.arange(size) % 2, 2.0**-17, 1) for size in (140, 150, 130))
    draw = lambda *factors: (rng.standard_normal([f.size for f in factors]) * np.outer(*factors)).astype(np.float32)  # noqa: E731
    x, w, dy = draw(of_m, 1 / of_k), draw(of_k, of_n), draw(1 / of_m, 1 / of_n)
    y, dx, dw = forward_and_back(recipe, x, w, dy)
    outer = (of_m, of_n), (1 / of_m, of_k), (1 / of_k, 1 / of_n)
    for got, want, factors in zip((y, dx, dw), by_oracle(recipe, x, w, dy), outer, strict=True):
        close(np.asarray(got, np.float64) / np.outer(*factors), want / np.outer(*factors))
    exact = x.astype(np.float64) @ w
    assert np.abs((np.asarray(y) - exact) / np.outer(of_m, of_n)).max() > 1e-2  # it is not the exact product


def test_bfloat16_rows_with_float32_weights(rng):
    """The master weight is rounded once, from float32, and its gradient is float32."""
    x, dy = (rng.standard_normal(s).astype(jnp.bfloat16) for s in ((140, 150), (140, 130)))
    w = rng.standard_normal((150, 130)).astype(np.float32)
    y, dx, dw = forward_and_back(MXFP8, x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    want = by_oracle(MXFP8, x, w, dy)
    for got, expected, dtype in zip((y, dx, dw), want, (jnp.bfloat16, jnp.bfloat16, np.float32), strict=True):
        close(got, expected, dtype)


@pytest.mark.parametrize("recipe", [FP8, pytest.param(MXFP8, marks=pytest.mark.rare)], ids=lambda x: x.name)
def test_grouped_products_are_products_one_by_one(rng, recipe):
    """Wgrad's tiles restart with each group; two have more rows than a tile, one has none."""
    counts = np.array([140, 20, 0, 140], np.int32)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in ((300, 40), (4, 40, 36), (300, 36)))
    backend = lp.grouped(recipe)

    @jax.jit
    def run(x, w, dy, counts):
        return backend.forward(x, w, counts), backend.dx(dy, w, counts), backend.dw(x, dy, counts, jnp.float32)

    y, dx, dw = map(np.asarray, run(x, w, dy, counts))
    for g, end in enumerate(np.cumsum(counts)):
        rows = slice(end - counts[g], end)
        want = by_oracle(recipe, x[rows], w[g], dy[rows])
        close(dw[g], want[2])
        if counts[g]:
            close(y[rows], want[0])
            close(dx[rows], want[1])
