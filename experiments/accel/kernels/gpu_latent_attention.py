"""Attention to a latent cache on Hopper GPUs, in Pallas: each row is read once for 64 queries.

A thread block has 64 queries of one sequence and a share of its rows, 64 at a time. One warpgroup
copies rows from memory, two blocks ahead. Two warpgroups each compute the scores of 32 rows,
exchange their maxima and weights, and each then adds to one half of the output. All of it (512 wide
in V3) does not fit in one warpgroup's registers. The shares of a sequence are combined in plain JAX
by their log-sums. Rows beyond a sequence's last are not read.

It has not run on a GPU yet. Compiled for an H100 at V3's width it spills 288 bytes of registers a
thread. It spills more with 64 or 32 columns at a time, or with other shares of registers. Commit
ef1ed35f also has 8-bit rows, which take 225 KB of the 227 KB of shared memory that a block may use.
Fits no library: cuDNN's heads have at most 256 numbers, and tokamax's kernel needs 286 KB or more
for 576 and 512.
Source: the design of FlashMLA (github.com/deepseek-ai/FlashMLA); arXiv 2205.14135; the split is
Flash-Decoding's.
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import table
from dsv3_jax.ops.attention import scaled
from dsv3_jax.ops.cached_attention import Stored

TILE = 64  # queries of a thread block, and rows that it visits at a time
BUFFERS = 2  # blocks of rows in shared memory
THREAD_BLOCKS = 132  # of an H100: one for each of its multiprocessors
# Of the output that a warpgroup adds to at a time: they take 64 more registers a thread.
COLUMNS = 128
COLUMNS_OF_A_TILE = 64  # of a swizzle's in shared memory, at most
# The score of a row that a query does not see; finite, as a share may have none that it sees.
HIDDEN = -1e30
MOST_SHARED = 232448  # bytes of shared memory that a thread block may use


def _pallas() -> tuple[Any, Any]:
    """(Pallas, its part for Mosaic GPU, whose interface changes), imported when they are used."""
    pallas = import_module("jax.experimental.pallas")
    return pallas, import_module("jax.experimental.pallas.mosaic_gpu")


def why_not(target: Any) -> str:
    """Why the kernel cannot run on a target; "" if it can."""
    if target.chip and not target.chip.startswith("9."):
        return f"it is for Hopper GPUs (compute capability 9), and this one is {target.chip}"
    _, plgpu = _pallas()
    if "out_type" not in inspect.signature(plgpu.kernel).parameters:
        return "it needs Pallas for Mosaic GPU as in jax 0.12"
    return ""


def fits(
    queries: Sequence[Any], keys: Sequence[Stored], values: Stored, *others: Any, **settings: Any
) -> bool:
    """Whether a cache is latents and rotated keys, in blocks that shared memory holds."""
    latent = len(keys) == 2 and values.rows.shape == keys[0].rows.shape
    one_head = values.rows.shape[1] == 1
    widths = [key.rows.shape[-1] for key in keys]
    # Queries and blocks of rows, with weights, maxima, last rows and barriers.
    shared = 2 * TILE * sum(widths) * (1 + BUFFERS) + 2 * TILE * TILE + 3 * 4 * TILE + 128
    small = values.rows.dtype == jnp.bfloat16 and shared < MOST_SHARED
    by_block = values.rows.shape[2] % TILE == 0
    in_tiles = all(width % COLUMNS_OF_A_TILE == 0 for width in widths)
    return latent and one_head and by_block and in_tiles and small


def latent_attention(
    queries: Sequence[Float[Array, "B 1 Q _"]],
    keys: Sequence[Stored],
    values: Stored,
    last: Int[Array, "B Q"],
    *,
    scale: float,
    splits: int | None = None,
) -> Float[Array, "B 1 Q V"]:
    """Compute `ops.cached_attention.cached_attention` in bfloat16 for latents that `fits` accepts.

    Takes no gradient. A test runs it on the CPU under `plgpu.force_gpu_interpret_mode`.

    Args: splits: shares of each sequence's rows. None means enough to fill an H100.
    """
    _, plgpu = _pallas()
    batch, _, capacity, value_width = values.rows.shape
    count = queries[0].shape[2]
    size = min(TILE, -(-count // 8) * 8)  # of the queries that a thread block reads and writes
    tiles = -(-count // size)
    padding = tiles * size - count
    rows = [key.rows[:, 0] for key in keys]
    queries = [
        jnp.pad(
            scaled(q[:, 0], scale * math.log2(math.e)),
            ((0, 0), (0, padding), (0, x.shape[-1] - q.shape[-1])),
        )
        for q, x in zip(queries, rows, strict=True)
    ]
    ends = last.max(axis=1).astype(jnp.int32) + 1  # rows of each sequence that some query sees
    last = jnp.pad(last, ((0, 0), (0, padding))).astype(jnp.float32)  # exact up to 2^24 rows
    splits = splits or max(1, min(THREAD_BLOCKS // (batch * tiles), capacity // TILE))
    value = jax.ShapeDtypeStruct((splits, batch, tiles * size, value_width), queries[0].dtype)
    logs = jax.ShapeDtypeStruct((splits, batch, tiles * size), jnp.float32)
    out, log_sums = plgpu.kernel(
        partial(_kernel, splits=splits, size=size),
        out_type=[value, logs],
        grid=(tiles, splits, batch),
        grid_names=("tile", "split", "batch"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(ends, last, *queries, *rows)
    if splits == 1:
        return out[0][:, None, :count]
    share = jax.nn.softmax(log_sums * math.log(2), axis=0)[..., None]
    return (out.astype(jnp.float32) * share).sum(axis=0).astype(out.dtype)[:, None, :count]


def _kernel(
    ends_ref,
    last_ref,
    q_latent_ref,
    q_key_ref,
    latent_ref,
    key_ref,
    out_ref,
    logs_ref,
    *,
    splits: int,
    size: int,
):
    """One thread block, see the module.

    `out` [splits, B, Q, V] is normalized by itself; `logs`, its log2 of sums.
    """
    pl, plgpu = _pallas()

    parts, q_refs = (latent_ref, key_ref), (q_latent_ref, q_key_ref)
    capacity, widths = latent_ref.shape[1], [ref.shape[2] for ref in parts]
    # Columns of the output, and rows of a block, of a warpgroup.
    half, part = widths[0] // 2, TILE // 2
    step = min(half, COLUMNS)
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
        """Shared memory as the tensor cores read it."""
        size = jnp.dtype(dtype).itemsize
        # Not 128: a product's two operands share a swizzle, and 32 rows' weights are 64 bytes wide.
        swizzle = next(n for n in (64, 32) if shape[-1] * size % n == 0)
        transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    scratch = {
        "queries": [tiled((TILE, width), jnp.bfloat16) for width in widths],
        "stored": [tiled((BUFFERS, TILE, width), jnp.bfloat16) for width in widths],
        "weights": tiled((2, TILE, part), jnp.bfloat16),
        # last rows; what the warpgroups found in their parts of a block
        "shared": plgpu.SMEM((3, TILE), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=1 + len(parts)),
        # a block's copies
        "filled": plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=len(parts)),
        "barriers": plgpu.Barrier(num_barriers=1 + BUFFERS, num_arrivals=2),
    }

    @partial(pl.run_scoped, collective_axes="warpgroup", **scratch)
    def _thread_block(queries, stored, weights, shared, loaded, filled, barriers):
        meeting = barriers.at[0]
        batch, split = jax.lax.axis_index("batch"), jax.lax.axis_index("split")
        # Rows beyond `own_rows` hold anything.
        tile, own_rows = pl.ds(jax.lax.axis_index("tile") * size, size), pl.ds(0, size)
        blocks = (ends_ref[batch] + TILE - 1) // TILE
        each = (blocks + splits - 1) // splits
        begin = split * each
        count = jnp.clip(blocks - begin, 0, each)

        def first_row(i):
            # The last block may overlap the one before.
            return jnp.minimum((begin + i) * TILE, capacity - TILE)

        def meet():
            """Wait for the other warpgroup; both then see what each wrote to shared memory."""
            plgpu.barrier_arrive(meeting)
            plgpu.barrier_wait(meeting)

        @pl.when(jax.lax.axis_index("warpgroup") == 2)
        def _copy():
            plgpu.set_max_registers(40, action="decrease")
            plgpu.copy_gmem_to_smem(last_ref.at[batch, tile], shared.at[2, own_rows], loaded)
            for q_ref, q in zip(q_refs, queries, strict=True):
                plgpu.copy_gmem_to_smem(q_ref.at[batch, tile], q.at[own_rows], loaded)

            def copy(i, slot):
                rows = pl.ds(first_row(i), TILE)
                for rows_ref, block in zip(parts, stored, strict=True):
                    plgpu.copy_gmem_to_smem(
                        rows_ref.at[batch, rows], block.at[slot], filled.at[slot]
                    )

            for i in range(BUFFERS):
                pl.when(i < count)(partial(copy, i, i))

            @pl.loop(BUFFERS, jnp.maximum(count, BUFFERS))
            def _refill(i):
                slot = jax.lax.rem(i, jnp.int32(BUFFERS))
                plgpu.barrier_wait(barriers.at[1 + slot])
                copy(i, slot)

        def compute(which: int):
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(loaded)
            last = plgpu.load(shared.at[2], layout=by_row)
            own = pl.ds(which * part, part)
            columns = [pl.ds(which * half + at, step) for at in range(0, half, step)]

            def visit(i, carry):
                acc, top, total = carry
                slot = jax.lax.rem(i, jnp.int32(BUFFERS))
                plgpu.barrier_wait(filled.at[slot])
                visited = [block.at[slot] for block in stored]

                def score(acc_ref):
                    for q, block in zip(queries, visited, strict=True):
                        plgpu.wgmma(acc_ref, q, block.at[own].transpose((1, 0)))
                    return acc_ref[...]

                s = pl.run_scoped(score, plgpu.ACC((TILE, part), jnp.float32))
                row = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
                row = (row + (first_row(i) + which * part)).astype(jnp.float32)
                first_new = ((begin + i) * TILE).astype(jnp.float32)
                seen = (row <= jax.lax.broadcast_in_dim(last, s.shape, [0])) & (row >= first_new)
                s = jnp.where(seen, s, HIDDEN)
                shared.at[which][...] = s.max(axis=1)
                meet()
                highest = [plgpu.load(shared.at[n], layout=by_row) for n in range(2)]
                new_top = jnp.maximum(top, jnp.maximum(*highest))
                p = jnp.exp2(s - jax.lax.broadcast_in_dim(new_top, s.shape, [0]))
                keep = jnp.exp2(top - new_top)
                total = total * keep + p.sum(axis=1)
                weights.at[which][...] = p.astype(jnp.bfloat16)
                plgpu.commit_smem()
                meet()

                def add(acc_ref, columns):
                    for n in range(2):
                        plgpu.wgmma(
                            acc_ref, weights.at[n], visited[0].at[pl.ds(n * part, part), columns]
                        )
                    return acc_ref[...]

                keep = jax.lax.broadcast_in_dim(keep, (TILE, step), [0])
                acc = tuple(
                    old * keep
                    + pl.run_scoped(partial(add, columns=at), plgpu.ACC((TILE, step), jnp.float32))
                    for old, at in zip(acc, columns, strict=True)
                )
                plgpu.barrier_arrive(barriers.at[1 + slot])
                return acc, new_top, total

            def full(shape, value, layout):
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            acc = tuple(full((TILE, step), 0, plgpu.Layout.WGMMA) for _ in columns)
            start = acc, full((TILE,), HIDDEN, by_row), full((TILE,), 0, by_row)
            acc, top, total = jax.lax.fori_loop(0, count, visit, start)
            meet()  # both have read the last maxima, and the queries, whose memory takes the output
            shared.at[which][...] = total
            meet()
            totals = [plgpu.load(shared.at[n], layout=by_row) for n in range(2)]
            total = totals[0] + totals[1]
            total = jnp.maximum(total, 1e-30)  # a share without rows
            for at, some in zip(columns, acc, strict=True):
                some = some / jax.lax.broadcast_in_dim(total, some.shape, [0])
                queries[0].at[:, at][...] = some.astype(jnp.bfloat16)
            if which == 0:
                shared.at[2][...] = top + jnp.log(total) * (1 / math.log(2))
            plgpu.commit_smem()
            meet()

            @pl.when(which == 0)
            def _write():
                plgpu.copy_smem_to_gmem(queries[0].at[own_rows], out_ref.at[split, batch, tile])
                plgpu.copy_smem_to_gmem(shared.at[2, own_rows], logs_ref.at[split, batch, tile])
                plgpu.wait_smem_to_gmem(0)

        for which in range(2):
            pl.when(jax.lax.axis_index("warpgroup") == which)(partial(compute, which))


def add() -> None:
    """Enter the table as "latent"."""
    row = table.Implementation(
        "latent", latent_attention, ("cuda",), ("bfloat16",), fits=fits, why_not=why_not
    )
    table.add("cached_attention", row)
