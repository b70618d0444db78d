"""Products of e4m3 numbers on Hopper (H100, H200), with a scale for each 128 contracted numbers.

    y_ij = Σ_b s_bi t_bj Σ_k a_i(128 b + k) c_j(128 b + k)

A tile of 128 rows and 128 columns is computed by two warpgroups of 64 rows each, while a third one
fetches the operands of the next steps. A step is one block b. The matrix unit adds its 128
products, in about 14 bits as the V3 report says. Then the sum is scaled and added to float32
registers. Nothing of a block goes through memory.

The matrix unit reads 8-bit operands along the contracted axis only, so both are [·, k] here, and
whoever quantizes writes the transposed ones.

Not yet run on a chip: held to the op in Pallas' interpret mode, and compiled for an H100 ahead of
time.
Source: DeepSeek-V3 report, section 3.3.2, figure 7b.
"""

import math
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from dsv3_jax.kernels import table
from dsv3_jax.kernels.gpu.grouped_product import why_not_hopper
from dsv3_jax.kernels.low_precision import (
    FP8,
    FP8_UE8M0,
    Recipe,
    expand,
    product,
    spread,
    swiglu,
    tile_scales,
)
from experiments.accel.kernels.hopper_products import WARPGROUP, run_on_all_cores, swapped

BLOCK = 128  # numbers that share a scale, and the step of every size
# Of a tile: its sums, and those of a block beside them, take half of a warpgroup's registers.
COLUMNS = 128
WARPGROUPS = 2
ROWS = WARPGROUP * WARPGROUPS
STAGES = 4  # steps in flight: 33 KB each, of 227 KB
CHUNK = 64  # columns that leave a warpgroup at a time


def scaled_product(a: Array, a_scales: Array, c: Array, c_scales: Array, dtype: Any) -> Array:
    """Multiply a with cᵀ. See the top of this file.

    Args:
        a, c: e4m3, [m, k] and [n, k].
        a_scales, c_scales: float32, [k / 128, m] and [k / 128, n].
    Returns: [m, n], rounded once to `dtype`.
    """
    (m, k), n, block = a.shape, c.shape[0], a.shape[1] // a_scales.shape[0]
    grid = m // ROWS, n // COLUMNS
    # Tiles that share rows in the cache.
    neighbours = next(side for side in (8, 4, 2, 1) if grid[1] % side == 0)

    def kernel(a_ref, a_scale_ref, c_ref, c_scale_ref, y_ref):
        def nothing(*args, **kwargs):
            return None

        def pipeline(body, context):
            specs = []
            for size in (ROWS, COLUMNS):
                specs.append(plgpu.BlockSpec((size, block), lambda i: (0, i)))
                specs.append(plgpu.BlockSpec((1, size), lambda i: (i, 0)))
            return plgpu.emit_pipeline_warp_specialized(
                body,
                grid=(k // block,),
                memory_registers=40,
                in_specs=specs,
                wg_axis="wg",
                num_compute_wgs=WARPGROUPS,
                max_concurrent_steps=STAGES,
                compute_context=context,
            )

        def operands(row, column):
            rows, columns = pl.ds(row * ROWS, ROWS), pl.ds(column * COLUMNS, COLUMNS)
            return (
                a_ref.at[rows],
                a_scale_ref.at[:, rows],
                c_ref.at[columns],
                c_scale_ref.at[:, columns],
            )

        @partial(
            pl.run_scoped,
            buffers=pipeline(nothing, nothing).get_allocations(*operands(0, 0)),
            out=plgpu.SMEM((WARPGROUPS, WARPGROUP, CHUNK), y_ref.dtype),
            collective_axes="wg",
        )
        def scope(buffers, out):
            wg = jax.lax.axis_index("wg")
            own, shape = pl.ds(wg * WARPGROUP, WARPGROUP), (WARPGROUP, COLUMNS)

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="core")
            def tile(info):
                row, column = plgpu.planar_snake(info.index[0], grid, 1, neighbours)

                def compute(run):
                    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                    values = run(zeros).astype(y_ref.dtype)
                    for at in range(0, COLUMNS, CHUNK):
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out[wg] = values[:, at : at + CHUNK]
                        plgpu.commit_smem()
                        place = (
                            pl.ds(row * ROWS + wg * WARPGROUP, WARPGROUP),
                            pl.ds(column * COLUMNS + at, CHUNK),
                        )
                        plgpu.copy_smem_to_gmem(out.at[wg], y_ref.at[place])

                def step(_, a_smem, a_scale, c_smem, c_scale, sums):
                    def of_block(products):
                        plgpu.wgmma(products, a_smem.at[own], swapped(c_smem))
                        return products[...]

                    products = pl.run_scoped(of_block, plgpu.ACC(shape, jnp.float32))
                    left = plgpu.layout_cast(a_scale[0, own], plgpu.Layout.WGMMA.reduce(1))
                    right = plgpu.layout_cast(c_scale[0], plgpu.Layout.WGMMA.reduce(0))
                    left, right = (
                        jax.lax.broadcast_in_dim(scale, shape, (axis,))
                        for axis, scale in enumerate((left, right))
                    )
                    return sums + products * (left * right)

                pipeline(step, compute)(*operands(row, column), allocations=buffers)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = jax.ShapeDtypeStruct((m, n), dtype)
    return run_on_all_cores(kernel, out, WARPGROUPS)(a, a_scales, c, c_scales)


class OnHopper(Recipe):
    """A recipe whose products multiply the e4m3 numbers themselves."""

    def matmul(self, x: Float[Array, "m K"], w: Float[Array, "K N"]) -> Float[Array, "m N"]:
        return _matmul(self, x, w)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(recipe, x, w):
    return scaled_product(*_rows(recipe, x), *_weight(recipe, w), x.dtype)


def _fwd(recipe, x, w):
    return _matmul(recipe, x, w), (x, w)


def _bwd(recipe, saved, dy):
    x, w = saved
    dx = scaled_product(*_rows(recipe, dy), *_weight(recipe, w.T), x.dtype)
    return dx, scaled_product(*_columns(recipe, x), *_columns(recipe, dy), w.dtype)


_matmul.defvjp(_fwd, _bwd)


def quantize(
    x: Float[Array, "r c"], tile: tuple[int, int], *, power_of_two: bool = False
) -> tuple[Array, Float[Array, "R C"]]:
    """(e4m3 numbers, float32 scales of their tiles); value = number · scale."""
    scales = tile_scales(x, tile, power_of_two=power_of_two)
    return (x.astype(jnp.float32) / spread(scales, tile, x.shape)).astype(jnp.float8_e4m3fn), scales


def _rows(recipe: Recipe, x: Array) -> tuple[Array, Array]:
    """(numbers [m, k], scales [k / tile, m]) of rows that are contracted."""
    numbers, scales = quantize(x, (1, recipe.tile), power_of_two=recipe.power_of_two)
    return numbers, scales.T


def _columns(recipe: Recipe, x: Array) -> tuple[Array, Array]:
    """(numbers [m, k], scales [k / tile, m]) of columns that are contracted: x is [k, m]."""
    numbers, scales = quantize(x, (recipe.tile, 1), power_of_two=recipe.power_of_two)
    return numbers.T, scales


def _weight(recipe: Recipe, w: Array) -> tuple[Array, Array]:
    """(numbers [n, k], scales [k / tile, n]) of a weight [k, n] contracted over its first axis."""
    tile = recipe.weight_tile(0)
    numbers, scales = quantize(w, tile, power_of_two=recipe.power_of_two)
    return numbers.T, jnp.repeat(scales, tile[1], axis=1)


def _divided(*sizes: int) -> bool:
    return all(size % BLOCK == 0 for size in sizes)


def _fits_product(x: Array, w: Array, axes: int = 1) -> bool:
    depth = math.prod(w.shape[:axes])
    return _divided(x.size // depth, depth, w.size // depth)


def _fits_swiglu(x: Array, w_gate: Array, *others: Array) -> bool:
    return _divided(x.size // x.shape[-1], *w_gate.shape)


def _fits_expand(c_kv: Array, k_rope: Array, w_uk: Array, w_uv: Array) -> bool:
    rows, latent = c_kv.size // c_kv.shape[-1], c_kv.shape[-1]
    return _divided(rows, latent, w_uk.shape[0] * (w_uk.shape[1] + w_uv.shape[1]))


# Each op, and whether its products and gradients have whole tiles: each size is contracted once.
OPS = {
    "product": (product, _fits_product),
    "swiglu": (swiglu, _fits_swiglu),
    "expand": (expand, _fits_expand),
}


def add() -> None:
    """Enter the table as "hopper", for the recipes whose tiles are the kernel's."""
    for recipe in (FP8, FP8_UE8M0):
        for op, (run, fits) in OPS.items():
            row = table.Implementation(
                "hopper",
                partial(run, recipe=OnHopper(**asdict(recipe))),
                ("cuda",),
                ("float32", "bfloat16"),
                one_device=True,
                fits=fits,
                why_not=why_not_hopper,
                precision=recipe.name,
            )
            table.add(op, row)
