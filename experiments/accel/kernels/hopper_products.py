"""Grouped products on Hopper (H100, H200) in bfloat16: kernels of this project, in Pallas.

A tile of 128 rows and 256 columns is computed by two warpgroups of 64 rows each, while a third one
fetches the operands of the next steps. A block of rows begins where its group begins, rounded down
to 8 rows, so a group wastes part of its last block only. Which block belongs to which group is a
table made once for all products of a layer's rows.

Compared with the kernels of the libraries (grouped_product.py): experts are read in place from the
stack of all layers, groups without rows cost nothing, and dw leaves the kernel in float32.

Not yet run on a chip: held to the op in Pallas' interpret mode, and compiled for an H100 ahead of
time.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from dsv3_jax.kernels import table
from dsv3_jax.kernels.gpu.grouped_product import ROWS, fits, why_not_hopper
from dsv3_jax.ops import dispatch
from dsv3_jax.ops.grouped_product import GroupedProduct

CORES = 132  # of an H100 SXM: each runs one program, which takes tile after tile
ALIGNED = 8  # rows: where a block may begin in memory
WARPGROUP = 64  # rows of a warpgroup's product
STEP = 64  # contracted columns, or rows, of a step
STAGES = 4  # steps in flight: 48 KB each at the largest tile, of 227 KB
CHUNK = 64  # columns that leave a warpgroup at a time
FEW_ROWS = 32  # of a group on average, up to which blocks are of 64 rows


class Blocks(NamedTuple):
    """Which rows each block has. J blocks, of which the first `used` are needed."""

    group: Array  # int32 [J]: matrix
    start: Array  # int32 [J]: first row in memory
    low: Array  # int32 [J]: first row of the group, counted from `start`
    high: Array  # int32 [J]: row after the last one of the group, counted from `start`
    used: Array  # int32 [1]


def blocks_of(counts: Array, num_rows: int, size: int, first: Array | None = None) -> Blocks:
    """Cut the rows of each group into blocks of `size` rows, which begin at multiples of ALIGNED.

    Args:
        num_rows: of all groups and after them: a multiple of `size`.
        first: the matrix of group 0. None means 0.
    """
    num_groups = counts.shape[0]
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    starts = ends - counts
    aligned = starts // ALIGNED * ALIGNED
    blocks = jnp.where(counts > 0, -(-(ends - aligned) // size), 0)
    most = (num_rows + (size + ALIGNED - 2) * min(num_groups, num_rows)) // size
    last = jnp.cumsum(blocks, dtype=jnp.int32)
    j = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum((last[None] <= j[:, None]).sum(axis=1, dtype=jnp.int32), num_groups - 1)
    begin = aligned[group] + (j - (last - blocks)[group]) * size
    # The last block of all may not reach beyond the rows.
    start = jnp.clip(begin, 0, num_rows - size)
    low = jnp.maximum(begin, starts[group]) - start
    high = jnp.minimum(begin + size, ends[group]) - start
    return Blocks(group + (0 if first is None else first), start, low, high, last[-1:])


def _columns(n: int) -> int:
    return next((c for c in (256, 128) if n % c == 0), CHUNK)


def _neighbours(n: int) -> int:
    """Tiles side by side that share rows in the cache."""
    return next(c for c in (8, 4, 2, 1) if n % c == 0)


def _pipeline(body: Any, context: Any, steps: Any, shapes: list, warpgroups: int) -> Any:
    """Fetch both operands step by step, and multiply: one warpgroup fetches.

    A step's buffers are released when its product is done. With a delay, the last step of a tile
    would never be released, and the first steps of the next tile would overwrite what is being
    multiplied.
    """
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        memory_registers=40,
        in_specs=[plgpu.BlockSpec(shape, index) for shape, index in shapes],
        wg_axis="wg",
        num_compute_wgs=warpgroups,
        max_concurrent_steps=STAGES,
        compute_context=context,
    )


def product(
    x: Array, w: Array, counts: Array, first: Array | None = None, *, transposed: bool = False
) -> Array:
    """`GroupedProduct.forward`, or `dx`."""
    m, k = x.shape
    n = w.shape[1 if transposed else 2]
    warpgroups = 1 if m <= FEW_ROWS * counts.shape[0] else 2
    rows, columns = WARPGROUP * warpgroups, _columns(n)
    blocks = blocks_of(counts, m, rows, first)

    def kernel(x_ref, w_ref, group_ref, start_ref, low_ref, high_ref, used_ref, y_ref):
        def nothing(*args, **kwargs):
            return None

        x_spec = ((rows, STEP), lambda i: (0, i))
        w_spec = (
            ((columns, STEP), lambda i: (0, i))
            if transposed
            else ((STEP, columns), lambda i: (i, 0))
        )
        pipeline = partial(
            _pipeline, steps=k // STEP, shapes=[x_spec, w_spec], warpgroups=warpgroups
        )
        one = w_ref.at[0, pl.ds(0, columns), :] if transposed else w_ref.at[0, :, pl.ds(0, columns)]

        @partial(
            pl.run_scoped,
            buffers=pipeline(nothing, nothing).get_allocations(x_ref.at[pl.ds(0, rows), :], one),
            out=plgpu.SMEM((warpgroups, WARPGROUP, CHUNK), y_ref.dtype),
            collective_axes="wg",
        )
        def scope(buffers, out):
            wg = jax.lax.axis_index("wg")

            @plgpu.nd_loop((used_ref[0] * (n // columns),), collective_axes="core")
            def tile(info):
                block, column = plgpu.planar_snake(
                    info.index[0], (used_ref[0], n // columns), 1, _neighbours(n // columns)
                )
                start = pl.multiple_of(start_ref[block], ALIGNED)
                here = pl.ds(column * columns, columns)

                def compute(run):
                    def with_sums(sums):
                        run(sums)
                        _store_rows(
                            sums[...].astype(y_ref.dtype),
                            out.at[wg],
                            y_ref.at[pl.ds(start + wg * WARPGROUP, WARPGROUP), here],
                            jnp.maximum(low_ref[block] - wg * WARPGROUP, 0),
                            jnp.minimum(high_ref[block] - wg * WARPGROUP, WARPGROUP),
                            columns,
                        )

                    pl.run_scoped(with_sums, plgpu.ACC((WARPGROUP, columns), jnp.float32))

                def step(_, x_smem, w_smem, sums):
                    own = x_smem.at[pl.ds(wg * WARPGROUP, WARPGROUP)]
                    plgpu.wgmma(sums, own, swapped(w_smem) if transposed else w_smem)
                    plgpu.wgmma_wait(0)
                    return sums

                expert = w_ref.at[group_ref[block]]
                pipeline(step, compute)(
                    x_ref.at[pl.ds(start, rows), :],
                    expert.at[here, :] if transposed else expert.at[:, here],
                    allocations=buffers,
                )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    run = run_on_all_cores(kernel, jax.ShapeDtypeStruct((m, n), x.dtype), warpgroups)
    return run(x, w, *blocks)


def _store_rows(values, out, y, low, high, columns):
    """Write rows low to high of a warpgroup's result, chunk by chunk, in copies of 2^i rows each.

    A copy's size is fixed when the kernel is compiled.
    """
    rows = jnp.maximum(high - low, 0)
    for c in range(0, columns, CHUNK):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out[...] = values[:, c : c + CHUNK]
        plgpu.commit_smem()
        row, size = low, WARPGROUP
        while size:

            @pl.when((rows & size) != 0)
            def _(row=row, size=size, c=c):
                plgpu.copy_smem_to_gmem(
                    out.at[pl.ds(row, size)], y.at[pl.ds(row, size), pl.ds(c, CHUNK)]
                )

            row, size = row + (rows & size), size // 2


def product_dw(x: Array, dy: Array, counts: Array, dtype: Any) -> Array:
    """`GroupedProduct.dw`."""
    (_, k), n = x.shape, dy.shape[1]
    warpgroups = 2 if k % 128 == 0 else 1
    rows, columns = WARPGROUP * warpgroups, _columns(n)  # of a tile of dw
    num_groups = counts.shape[0]
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    starts = ends - counts
    first = jnp.minimum(starts // STEP, x.shape[0] // STEP - 1)  # step of each group's first row
    # A group without rows takes one step, in which no row is its own: its gradient is zeros.
    steps = jnp.maximum(-(-ends // STEP) - first, 1)

    def kernel(x_ref, dy_ref, start_ref, end_ref, first_ref, steps_ref, dw_ref):
        def nothing(*args, **kwargs):
            return None

        def pipeline(body, context, num_steps, at, row, column):
            shapes = [
                ((STEP, rows), lambda i: (at + i, row)),
                ((STEP, columns), lambda i: (at + i, column)),
            ]
            return _pipeline(body, context, num_steps, shapes, warpgroups)

        @partial(
            pl.run_scoped,
            buffers=pipeline(nothing, nothing, STAGES, 0, 0, 0).get_allocations(x_ref, dy_ref),
            out=plgpu.SMEM((warpgroups, WARPGROUP, CHUNK // 2), dw_ref.dtype),
            collective_axes="wg",
        )
        def scope(buffers, out):
            wg = jax.lax.axis_index("wg")

            @plgpu.nd_loop((num_groups, (k // rows) * (n // columns)), collective_axes="core")
            def tile(info):
                group = info.index[0]
                row, column = plgpu.planar_snake(
                    info.index[1], (k // rows, n // columns), 1, _neighbours(n // columns)
                )
                at, num_steps = first_ref[group], steps_ref[group]

                def compute(run):
                    def with_sums(sums):
                        run(sums)
                        values = sums[...].astype(dw_ref.dtype)
                        for c in range(0, columns, CHUNK // 2):
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            out[wg] = values[:, c : c + CHUNK // 2]
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(
                                out.at[wg],
                                dw_ref.at[
                                    group,
                                    pl.ds(row * rows + wg * WARPGROUP, WARPGROUP),
                                    pl.ds(column * columns + c, CHUNK // 2),
                                ],
                            )

                    pl.run_scoped(with_sums, plgpu.ACC((WARPGROUP, columns), jnp.float32))

                def step(index, x_smem, dy_smem, sums):
                    (i,) = index
                    # These rows are this warpgroup's, so it may write there.
                    own = x_smem.at[:, pl.ds(wg * WARPGROUP, WARPGROUP)]

                    @pl.when((i == 0) | (i == num_steps - 1))
                    def _():
                        line = plgpu.layout_cast(
                            jax.lax.broadcasted_iota(jnp.int32, (STEP, WARPGROUP), 0),
                            plgpu.Layout.WGMMA,
                        )
                        line = line + (at + i) * STEP
                        inside = (line >= start_ref[group]) & (line < end_ref[group])
                        own[...] = own[...] * inside.astype(own.dtype)
                        plgpu.commit_smem()

                    plgpu.wgmma(sums, swapped(own), dy_smem)
                    plgpu.wgmma_wait(0)
                    return sums

                pipeline(step, compute, num_steps, at, row, column)(
                    x_ref, dy_ref, allocations=buffers
                )

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    out = jax.ShapeDtypeStruct((num_groups, k, n), dtype)
    return run_on_all_cores(kernel, out, warpgroups)(x, dy, starts, ends, first, steps)


def swapped(ref: Any) -> Any:
    if jax.__version_info__ >= (0, 11):
        return ref.transpose((1, 0))
    return plgpu.transpose_ref(ref, (1, 0))


def run_on_all_cores(kernel: Any, out: Any, warpgroups: int) -> Any:
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(CORES,),
        grid_names=("core",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


HOPPER_PRODUCTS = GroupedProduct(
    "hopper", product, partial(product, transposed=True), product_dw, row_multiple=ROWS
)


def add() -> None:
    """Enter the table as "hopper"."""
    run = partial(dispatch.grouped_swiglu, product=HOPPER_PRODUCTS)
    for op in ("grouped_swiglu", "decode_experts"):
        table.add(
            op,
            table.Implementation(
                "hopper", run, ("cuda",), ("bfloat16",), fits=fits, why_not=why_not_hopper
            ),
        )
