"""Products of e4m3 numbers on Hopper (H100, H200), with a scale for each 128 contracted numbers. Asked for by name.

    y_ij = Σ_b s_bi t_bj Σ_k a_i(128 b + k) c_j(128 b + k)

A tile of 128 rows and 128 columns is computed by two warpgroups of 64 rows each, while a third one fetches the operands
of the next steps. A step is one block b. The matrix unit adds its 128 products, in about 14 bits as the V3 report says.
Then the sum is scaled and added to float32 registers. Nothing of a block goes through memory.

The matrix unit reads 8-bit operands along the contracted axis only, so both are [·, k] here, and whoever quantizes
writes the transposed ones.

Not yet run on a chip: held to the op in Pallas' interpret mode, and compiled for an H100 ahead of time.
Source: DeepSeek-V3 report, section 3.3.2, figure 7b.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from dsv3_jax.kernels.gpu.hopper_products import WARPGROUP, run_on_all_cores, swapped

COLUMNS = 128  # of a tile: its sums, and those of a block beside them, take half of a warpgroup's registers
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
    neighbours = next(side for side in (8, 4, 2, 1) if grid[1] % side == 0)  # tiles that share rows in the cache

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
            return a_ref.at[rows], a_scale_ref.at[:, rows], c_ref.at[columns], c_scale_ref.at[:, columns]

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
                        place = pl.ds(row * ROWS + wg * WARPGROUP, WARPGROUP), pl.ds(column * COLUMNS + at, CHUNK)
                        plgpu.copy_smem_to_gmem(out.at[wg], y_ref.at[place])

                def step(_, a_smem, a_scale, c_smem, c_scale, sums):
                    def of_block(products):
                        plgpu.wgmma(products, a_smem.at[own], swapped(c_smem))
                        return products[...]

                    products = pl.run_scoped(of_block, plgpu.ACC(shape, jnp.float32))
                    left = plgpu.layout_cast(a_scale[0, own], plgpu.Layout.WGMMA.reduce(1))
                    right = plgpu.layout_cast(c_scale[0], plgpu.Layout.WGMMA.reduce(0))
                    left, right = (
                        jax.lax.broadcast_in_dim(scale, shape, (axis,)) for axis, scale in enumerate((left, right))
                    )
                    return sums + products * (left * right)

                pipeline(step, compute)(*operands(row, column), allocations=buffers)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = jax.ShapeDtypeStruct((m, n), dtype)
    return run_on_all_cores(kernel, out, WARPGROUPS)(a, a_scales, c, c_scales)
