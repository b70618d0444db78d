"""Training in 8 bits: products whose operands are e4m3 numbers with a scale for each tile.

    y  = q(x) q(w)     Fprop: x in tiles of 1 × 128 along the contracted axis, w in blocks of
                       128 × 128
    dx = q(dy) q(w)ᵀ   Dgrad: dy in tiles of 1 × 128; the same blocks of w
    dw = q(x)ᵀ q(dy)   Wgrad: both in tiles of 128 × 1, because this product is contracted over
                       tokens

q(x) rounds each x / s to e4m3, for a scale s of its tile such that the tile's largest magnitude
becomes 448. Sums are float32. FP8 is DeepSeek-V3's recipe, and FP8_UE8M0 that of V3.1: the same
tiles, with scales that are powers of two. MXFP8 has tiles of 32 along the contracted axis in all
operands, weights too, and such scales. The linear layers use these products: attention's
projections, SwiGLU, experts, and those of multi-token heads. Embedding, output head, router, norms,
attention itself and the optimizer do not.

This file emulates the recipe on any device. The operands hold exactly the values of e4m3 numbers
times their scales, in float32. One float32 product adds them up. The recipe's own order, one sum
for each 128 numbers and then the scales, differs by float32 rounding only. On a mesh that shards
experts or their tokens, tiles do not cross devices.

If scales are powers of two, bfloat16 holds each of these values exactly too, because an e4m3 number
has four significant bits. GPUs and TPUs then multiply in bfloat16 and add in float32
(`in_bfloat16`): the same terms, at the speed of bfloat16.

Departs from the paper: nothing is kept in 8 bits. The report caches activations in FP8, and so
rounds their scales, and the scales of what it dispatches, to powers of two: a 1 × 128 tile then
becomes a 128 × 1 tile without a second rounding. Here both come from the same unrounded
activations, so all scales are float32. For the same reason no operand needs the report's E5M6
format. Source: DeepSeek-V3 report, section 3.3; the model card of DeepSeek-V3.1 for UE8M0; OCP
Microscaling Formats v1.0; arXiv 2506.08027 for the rounding of MXFP8's scales.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.xla.row_blocks import ROW_BLOCKS, row_blocks
from dsv3_jax.ops import mla
from dsv3_jax.ops.grouped_product import GroupedProduct

LARGEST = 448.0  # of e4m3
SMALLEST_NORMAL = 2.0**-6  # of e4m3; below it numbers are multiples of 2⁻⁹
# no e4m3 number times it is subnormal in float32, which devices flush to 0
SMALLEST_SCALE = 2.0**-100


@dataclass(frozen=True)
class Recipe:
    """How operands are divided into tiles, each with one scale.

    Example:
        >>> FP8.weight_tile(contracted=0), MXFP8.weight_tile(contracted=0)
        ((128, 128), (32, 1))
    """

    name: str  # Execution.precision
    tile: int  # numbers along the contracted axis that share a scale
    square_weights: bool  # a weight's tiles are as wide as they are long
    power_of_two: bool  # of scales
    # dtype that products read; bfloat16 only where it holds the rounded numbers exactly
    operands: str = "float32"

    def weight_tile(self, contracted: int) -> tuple[int, int]:
        """The tile of a matrix that is contracted over its axis 0 or 1."""
        short = self.tile if self.square_weights else 1
        return (short, self.tile) if contracted else (self.tile, short)

    @property
    def in_bfloat16(self) -> "Recipe":
        """The same numbers as bfloat16, for devices that multiply it faster than float32.

        Example:
            >>> MXFP8.in_bfloat16.operands, FP8.in_bfloat16.operands
            ('bfloat16', 'float32')
        """
        return replace(self, operands="bfloat16") if self.power_of_two else self


FP8 = Recipe("fp8", 128, square_weights=True, power_of_two=False)
FP8_UE8M0 = Recipe("fp8_ue8m0", 128, square_weights=True, power_of_two=True)
MXFP8 = Recipe("mxfp8", 32, square_weights=False, power_of_two=True)


# Rounding


def tile_scales(
    x: Float[Array, "*n r c"], tile: tuple[int, int], *, power_of_two: bool = False
) -> Float[Array, "*n R C"]:
    """Compute the scale of each tile of the last two axes: its largest magnitude over 448.

    A power of two is rounded up, so that no number exceeds 448. The OCP specification's example
    rounds down and clips the largest numbers, which training does not bear (arXiv 2506.08027).

    Returns: float32, ⌈r / tile[0]⌉ × ⌈c / tile[1]⌉; at least 2⁻¹⁰⁰, so a tile of zeros has a scale
        too.

    Example:
        >>> x = jnp.array([[448.0, 1.0, 600.0]])
        >>> tile_scales(x, (1, 2)), tile_scales(x, (1, 2), power_of_two=True)[0, 1]
        (Array([[1.       , 1.3392857]], dtype=float32), Array(2., dtype=float32))
    """
    x = jnp.abs(x.astype(jnp.float32))
    for axis, size in zip((-2, -1), tile, strict=True):
        x = _largest_of_each(x, axis % x.ndim, size)
    if power_of_two:
        return jnp.maximum(_power_of_two_over_448(x), SMALLEST_SCALE)
    # A product, because compilers divide by a constant in different ways.
    return jnp.maximum(x * jnp.float32(1 / LARGEST), SMALLEST_SCALE)


def _largest_of_each(x: Array, axis: int, size: int) -> Array:
    length = x.shape[axis]
    if size == 1:
        return x
    if length <= size:
        return x.max(axis=axis, keepdims=True)

    if length % size:
        pad = [(0, -length % size if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pad)
    tiles = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return tiles.max(axis=axis + 1)


def _power_of_two_over_448(x: Array) -> Array:
    """The smallest power of two that is at least x / 448, for x ≥ 0, exactly: by its bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    scale = jax.lax.bitcast_convert_type(jnp.maximum(exponent, 1) << 23, jnp.float32)
    return jnp.where(jnp.isfinite(x), scale, x)


def round_to_tiles(
    x: Float[Array, "*n r c"], tile: tuple[int, int], *, power_of_two: bool = False
) -> Float[Array, "*n r c"]:
    """Round to e4m3 numbers times the scales of their tiles, in float32. Args: as `tile_scales`.

    Example:
        >>> round_to_tiles(jnp.array([[896.0, -2.1]]), (1, 128))
        Array([[896.,  -2.]], dtype=float32)
    """
    scales = tile_scales(x, tile, power_of_two=power_of_two)
    scale = spread(scales, tile, x.shape)
    # A quotient may exceed 448 by rounding; e4m3 still rounds it to 448.
    return round_to_e4m3(x.astype(jnp.float32) / scale) * scale


def round_to_e4m3(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Round as a cast to e4m3 and back does, up to magnitude 448, eight times as fast on a CPU.

    Example:
        >>> round_to_e4m3(jnp.array([1.06, 0.001, 300.0]))
        Array([1.000000e+00, 1.953125e-03, 2.880000e+02], dtype=float32)
    """
    # Below the normal numbers are multiples of 2⁻⁹. (To add and subtract a large number rounds
    # too, but XLA may fold the two.)
    small = jnp.round(x * 2.0**9) * 2.0**-9
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, small, jax.lax.reduce_precision(x, 8, 3))


def spread(scales: Array, tile: tuple[int, int], shape: tuple[int, ...]) -> Array:
    """Each number's scale; an axis with a single tile is left to broadcast."""
    for axis, size in zip((-2, -1), tile, strict=True):
        if size > 1 and scales.shape[axis] > 1:
            scales = jnp.repeat(scales, size, axis=axis)
            scales = jax.lax.slice_in_dim(scales, 0, shape[axis], axis=axis % scales.ndim)
    return jnp.broadcast_to(scales, shape)


# One product


def _operand(recipe: Recipe, x: Array, tile: tuple[int, int]) -> Array:
    return round_to_tiles(x, tile, power_of_two=recipe.power_of_two).astype(recipe.operands)


def _rows(recipe: Recipe, x: Array) -> Array:
    """An operand whose rows are contracted, as x in Fprop and dy in Dgrad."""
    return _operand(recipe, x, (1, recipe.tile))


def _columns(recipe: Recipe, x: Array) -> Array:
    """An operand whose columns are contracted, as both in Wgrad."""
    return _operand(recipe, x, (recipe.tile, 1))


def _weight(recipe: Recipe, w: Array, contracted: int) -> Array:
    return _operand(recipe, w, recipe.weight_tile(contracted))


def _dot(a: Array, b: Array, over: tuple[int, int]) -> Array:
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dims, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def matmul(recipe: Recipe, x: Float[Array, "m K"], w: Float[Array, "K N"]) -> Float[Array, "m N"]:
    """Multiply x with w by a recipe, and their gradients too.

    Args: w: in its own dtype, as a float32 master weight.
    Returns: q(x) q(w) in x's dtype.

    Example:
        >>> x = jnp.array([[1.0, 1.2]])  # 1.2 is rounded to 1.25
        >>> jax.jit(partial(matmul, MXFP8))(x, jnp.ones((2, 1)))
        Array([[2.25]], dtype=float32)
    """
    return _dot(_rows(recipe, x), _weight(recipe, w, 0), (1, 0)).astype(x.dtype)


def _matmul_fwd(recipe, x, w):
    return matmul(recipe, x, w), (x, w)


def _matmul_bwd(recipe, saved, dy):
    x, w = saved
    dx = _dot(_rows(recipe, dy), _weight(recipe, w, 1), (1, 1))
    dw = _dot(_columns(recipe, x), _columns(recipe, dy), (0, 0))
    return dx.astype(x.dtype), dw.astype(w.dtype)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def product(
    x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1, *, recipe: Recipe
) -> Float[Array, "..."]:
    """Compute `ops.products.product` by a recipe. Heads make one matrix, as in released weights.

    Example:
        >>> jax.jit(partial(product, recipe=FP8))(jnp.ones((1, 2)), jnp.ones((2, 3)))
        Array([[2., 2., 2.]], dtype=float32)
    """
    depth = math.prod(w.shape[:axes])
    y = matmul(recipe, x.reshape(-1, depth), w.reshape(depth, -1))
    return y.reshape(*x.shape[: x.ndim - axes], *w.shape[axes:])


def swiglu(
    x: Float[Array, "*n D"],
    w_gate: Float[Array, "D F"],
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
    *,
    recipe: Recipe,
) -> Float[Array, "*n D"]:
    """Compute `ops.products.swiglu` by a recipe.

    Example:
        >>> one = jnp.ones((1, 1))
        >>> jax.jit(partial(swiglu, recipe=FP8))(one, 9 * one, one, one).round(2)  # silu(9)
        Array([[9.]], dtype=float32)
    """
    times = partial(product, recipe=recipe)
    return times(jax.nn.silu(times(x, w_gate)) * times(x, w_up), w_down)


def expand(
    c_kv: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    w_uk: Float[Array, "H N C"],
    w_uv: Float[Array, "H V C"],
    *,
    recipe: Recipe,
) -> tuple[Float[Array, "B T H X"], Float[Array, "B T H V"]]:
    """Compute `ops.mla.expand` by a recipe: one product, whose matrix is the released kv_b_proj.

    Example:
        >>> c_kv, k_rope, w_uk, w_uv = map(jnp.ones, ((1, 1, 2), (1, 1, 1), (3, 4, 2), (3, 5, 2)))
        >>> k, v = jax.eval_shape(partial(expand, recipe=FP8), c_kv, k_rope, w_uk, w_uv)
        >>> k.shape, v.shape  # of three heads: N + R and V
        ((1, 1, 3, 5), (1, 1, 3, 5))
    """
    kv_b_proj = jnp.concatenate([w_uk, w_uv], axis=1).transpose(2, 0, 1)
    kv = product(c_kv, kv_b_proj, recipe=recipe)
    k_nope, v = jnp.split(kv, [w_uk.shape[1]], axis=-1)
    return mla.join_keys(k_nope, k_rope), v


def product_by_expert(
    x: Float[Array, "E m K"], w: Float[Array, "E K N"], *, recipe: Recipe
) -> Float[Array, "E m N"]:
    """Multiply each expert's rows, as many of each, with its matrix.

    Example:
        >>> by_expert = jax.jit(partial(product_by_expert, recipe=MXFP8))
        >>> by_expert(jnp.ones((2, 1, 1)), jnp.array([[[3.0]], [[4.0]]])).ravel()
        Array([3., 4.], dtype=float32)
    """
    return jax.vmap(partial(matmul, recipe))(x, w)


# Products of sorted rows, each group with its own matrix


def round_tokens_by_group(
    rows: Float[Array, "m c"], counts: Int[Array, " G"], tile: int, *, power_of_two: bool = False
) -> Float[Array, "m c"]:
    """Round columns of sorted rows, in tiles that restart with each group, as each Wgrad does.

    Args: counts: rows of each group. Rows after the last group are left as they are.

    Example:
        >>> rows, counts = jnp.array([[448.0], [0.013], [0.013]]), jnp.array([2, 1])
        >>> round_rows = jax.jit(partial(round_tokens_by_group, tile=32, power_of_two=True))
        >>> found = round_rows(rows, counts)  # beside 448 numbers are multiples of 2⁻⁹
        >>> found.ravel().tolist()  # the last row has a tile of its own
        [448.0, 0.013671875, 0.0126953125]
    """
    m = rows.shape[0]
    blocks = row_blocks(counts, m, tile)

    # The scales of J tiles of t rows. Rows of the next group do not count.
    place_t = jnp.arange(tile, dtype=jnp.int32)[None]
    places_Jt = jnp.minimum(blocks.start[:, None] + place_t, m - 1)
    own_Jt = place_t < blocks.left[:, None]
    tiles_Jtc = jnp.where(own_Jt[..., None], jnp.abs(rows[places_Jt]), 0)
    scales_Jc = tile_scales(tiles_Jtc, (tile, 1), power_of_two=power_of_two)[:, 0]

    # A row's tile is the last that starts at or before it. Those without rows start after all rows.
    row = jnp.arange(m, dtype=jnp.int32)[:, None]
    started = (blocks.start[None] <= row).sum(axis=1, dtype=jnp.int32)
    scale_mc = scales_Jc[jnp.maximum(started - 1, 0)]

    rounded = round_to_e4m3(rows.astype(jnp.float32) / scale_mc) * scale_mc
    return jnp.where(row < counts.sum(dtype=jnp.int32), rounded, rows)


def grouped(recipe: Recipe) -> GroupedProduct:
    """The grouped products of a recipe: operands are rounded, then multiplied by blocks of rows.

    A block's product has the dtype of its rows, so float32 rows stay float32 for it, whatever
    `recipe.operands`.

    Example:
        >>> backend = grouped(MXFP8)
        >>> x, w, counts = jnp.ones((2, 1)), jnp.array([[[3.0]], [[4.0]]]), jnp.array([1, 1])
        >>> jax.jit(backend.forward)(x, w, counts).ravel()
        Array([3., 4.], dtype=float32)
    """

    def of(rows: Array) -> Recipe:
        return recipe if rows.dtype == recipe.operands else replace(recipe, operands="float32")

    def forward(x: Array, w: Array, counts: Array) -> Array:
        w = _weight(of(x), w, 0)
        with jax.default_matmul_precision("highest"):
            return ROW_BLOCKS.forward(_rows(of(x), x), w, counts).astype(x.dtype)

    def dx(dy: Array, w: Array, counts: Array) -> Array:
        w = _weight(of(dy), w, 1)
        with jax.default_matmul_precision("highest"):
            return ROW_BLOCKS.dx(_rows(of(dy), dy), w, counts).astype(dy.dtype)

    def dw(x: Array, dy: Array, counts: Array, dtype) -> Array:
        round_columns = partial(
            round_tokens_by_group,
            counts=counts,
            tile=recipe.tile,
            power_of_two=recipe.power_of_two,
        )
        operands = of(x).operands
        a = round_columns(x.astype(jnp.float32)).astype(operands)
        b = round_columns(dy.astype(jnp.float32)).astype(operands)
        with jax.default_matmul_precision("highest"):
            return ROW_BLOCKS.dw(a, b, counts, dtype)

    return GroupedProduct(recipe.name, forward, dx, dw, casts=False)
