"""Products in 8 bits: bit by bit those of a slow NumPy oracle; nothing else of a model changes."""

import itertools
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from models import LIGHT, SMALL, random_model, value_and_gradients
from runs import documents

from dsv3_jax.config import Execution
from dsv3_jax.decoding.generate import generate
from dsv3_jax.kernels import low_precision as lp
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.kernels.low_precision import FP8, FP8_UE8M0, MXFP8
from dsv3_jax.kernels.table import TABLE
from dsv3_jax.training.loss import compute_loss

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

    def q(a, tile):
        return rounded(a, tile, pow2)[0].astype(np.float64)

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


@pytest.mark.parametrize("power_of_two, dtype", [(False, "f4"), (True, "f4"), (True, "bfloat16")])
def test_numbers_and_scales_are_the_oracles_bit_by_bit(rng, power_of_two, dtype):
    """bfloat16 holds the numbers whose scales are powers of two."""
    x, tiles = hostile(rng, (150, 161), dtype), ((1, 128), (128, 128), (32, 1))

    @jax.jit
    def run(x):
        scales_of = partial(lp.tile_scales, power_of_two=power_of_two)
        rounded_of = partial(lp.round_to_tiles, power_of_two=power_of_two)
        made = [(scales_of(x, tile), rounded_of(x, tile)) for tile in tiles]
        return made, rounded_of(x.at[3, 3].set(jnp.nan), (1, 32))

    made, with_nan = run(x)
    for tile, (scales, values) in zip(tiles, made, strict=True):
        assert scales.dtype == np.float32
        for got, want in zip((values, scales), rounded(x, tile, power_of_two), strict=True):
            np.testing.assert_array_equal(got, want)
        in_bfloat16 = np.asarray(values).astype(jnp.bfloat16).astype(np.float32)
        assert np.array_equal(in_bfloat16, values) == power_of_two
    # The training step skips a batch by what is not finite.
    assert np.isnan(with_nan[3, 3])
    assert np.isfinite(with_nan[4:]).all() and np.isfinite(with_nan[3, 32:]).all()


# One product


def close(got, want):
    """Equal up to float32 rounding of sums of some hundred terms."""
    atol = 2e-6 * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2e-6, atol=atol)


@RECIPES
def test_a_product_and_its_gradients(rng, recipe):
    """Every second row and column is 2¹⁷ times smaller: rounding depends on who shares a tile."""
    of_m, of_k, of_n = (np.where(np.arange(size) % 2, 2.0**-17, 1) for size in (140, 150, 130))

    def draw(*factors):
        normal = rng.standard_normal([f.size for f in factors])
        return (normal * np.outer(*factors)).astype(np.float32)

    x, w, dy = draw(of_m, 1 / of_k), draw(of_k, of_n), draw(1 / of_m, 1 / of_n)
    y, (dx, dw) = value_and_gradients(partial(lp.matmul, recipe), dy, x, w)
    sizes = np.outer(of_m, of_n), np.outer(1 / of_m, of_k), np.outer(1 / of_k, 1 / of_n)
    for got, want, size in zip((y, dx, dw), by_oracle(recipe, x, w, dy), sizes, strict=True):
        close(np.asarray(got, np.float64) / size, want / size)
    exact = x.astype(np.float64) @ w
    # it is not the exact product
    assert np.abs((np.asarray(y) - exact) / sizes[0]).max() > 1e-2


@pytest.mark.parametrize(
    "recipe", [FP8, pytest.param(MXFP8, marks=pytest.mark.rare)], ids=lambda x: x.name
)
def test_grouped_products_are_products_one_by_one(rng, recipe):
    """Wgrad's tiles restart with each group; two have more rows than a tile, one has none."""
    counts = np.array([140, 20, 0, 140], np.int32)
    shapes, backend = ((300, 40), (4, 40, 36), (300, 36)), lp.grouped(recipe)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)

    @jax.jit
    def run(x, w, dy, counts):
        dw = backend.dw(x, dy, counts, jnp.float32)
        return backend.forward(x, w, counts), backend.dx(dy, w, counts), dw

    y, dx, dw = map(np.asarray, run(x, w, dy, counts))
    for g, end in enumerate(np.cumsum(counts)):
        rows = slice(end - counts[g], end)
        want = by_oracle(recipe, x[rows], w[g], dy[rows])
        close(dw[g], want[2])
        if counts[g]:
            close(y[rows], want[0])
            close(dx[rows], want[1])


# Models that train in 8 bits

IN_FP8 = Execution(precision="fp8")
IN_8_BITS = {"product", "swiglu", "expand", "grouped_swiglu", "capacity_swiglu"}


def rounded_in_training(cfg, execution) -> set[tuple[int, ...]]:
    """Shapes of all arrays that a loss and its gradient round to e4m3's three bits of mantissa."""
    graphdef, params, rest = nnx.split(random_model(cfg, execution=execution), nnx.Param, ...)
    batch = documents(2, 9, 1, vocab_size=cfg.vocab_size)

    def loss(params):
        return compute_loss(nnx.merge(graphdef, params, rest), batch, 0.3).total

    program = str(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    rounding = re.findall(r"\w\[([\d,]*)\] = reduce_precision\[[^\]]*mantissa_bits=3\b", program)
    return {tuple(map(int, shape.split(","))) for shape in rounding}


def test_all_linear_layers_are_rounded_and_nothing_else():
    """By shape, all unlike: D 16, Q 12, C 10, R 4, heads 3 × (N 6, V 5), dense 20, F 7, E 8, W 37.

    18 tokens, of which the MTP module sees 16; they choose 3 experts each. Every operand of a
    product and of its two gradients is there. The router [16, 8], the tables [37, 16], scores of
    attention [2, 3, 9, 9] and logits are not.
    """
    shapes = rounded_in_training(replace(SMALL, num_layers=2, mtp_depth=1), IN_FP8)
    attention = {(16, 12), (12, 30), (16, 14), (10, 33), (15, 16)}
    # the last is the module's W_eh
    ffn = {(16, 20), (20, 16), (16, 7), (7, 16), (8, 16, 7), (8, 7, 16), (32, 16)}
    rows = {(tokens, width) for tokens in (18, 16) for width in (16, 12, 30, 14, 10, 33, 15, 7)}
    rows |= {(18, 20), (16, 32)}
    by_expert = {(3 * tokens, width) for tokens in (18, 16) for width in (16, 7)}
    assert shapes == attention | ffn | rows | by_expert
    assert not rounded_in_training(LIGHT, Execution())


@pytest.mark.parametrize("name", ["fp8", "fp8_ue8m0", "mxfp8"])
def test_the_door_gives_8_bits_to_linear_layers_only(name):
    """On accelerators too: no row of theirs computes a product in another precision."""
    plain, low = (Kernels(Target("cpu", precision=precision), ()) for precision in ("none", name))
    assert {op for op in TABLE if low.chosen()[op] == name} == IN_8_BITS
    assert {op for op in TABLE if plain.chosen()[op] != low.chosen()[op]} == IN_8_BITS
    assert low.in_compute_dtype == plain
    for platform, op in itertools.product(("cuda", "tpu"), IN_8_BITS):
        rows = Target(platform, precision=name).rows(op)
        assert {row.precision for row in rows} == {name} and rows[0].name == name
    # Accelerators multiply in bfloat16 where it holds the numbers exactly.
    for platform in ("cpu", "cuda", "tpu"):
        first = Target(platform, precision=name).rows("product")[0]
        program = jax.make_jaxpr(first.run)(jnp.ones((2, 8)), jnp.ones((8, 4)))
        assert ("bf16" in str(program)) == (platform != "cpu" and name != "fp8")


@pytest.mark.long
def test_decoding_does_without():
    low, plain = (random_model(LIGHT, execution=how) for how in (IN_FP8, Execution()))
    found = [generate(model, [[1, 2, 3]], 8, logprobs=True) for model in (low, plain)]
    assert found[0].model_logprobs == found[1].model_logprobs
    assert low.kernels.target.precision == "fp8"  # the model itself is as it was
