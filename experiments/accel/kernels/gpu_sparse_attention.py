"""Sparse attention's decoding on Hopper GPUs, in Pallas: each index key is read once for all heads.

XLA writes the products of all heads in float32, [B, I, S], and reads them again: for V3.2's 64
heads of 128 numbers that is four times the index keys. Here a warpgroup multiplies 64 keys with the
queries of one token, and weighs and adds up the heads in its registers. The next keys are copied
meanwhile.

The chosen rows are gathered into one array, which the kernel of dense attention to latents then
reads once.

It has not run on a GPU yet.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.kernels import table
from dsv3_jax.ops import indexer
from dsv3_jax.ops.attention import scaled
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.sparse_attention import sparse_attention
from experiments.accel.kernels.gpu_latent_attention import (
    THREAD_BLOCKS,
    TILE,
    _pallas,
    is_latent,
    latent_attention,
    why_not,
)

BUFFERS = 3  # blocks of keys in shared memory
AT_ONCE = 2  # thread blocks of a multiprocessor


def index_scores(
    q: Float[Array, "B I X"],
    w: Float[Array, "B I"],
    rows: Float[Array, "B S X"],
    scales: None = None,
) -> Float[Array, "B S"]:
    """Compute `ops.indexer.index_scores` in bfloat16 for a multiple of 64 slots, no gradient."""
    _, plgpu = _pallas()
    (batch, slots, _), (heads, dim) = rows.shape, q.shape[1:]
    splits = max(1, min(AT_ONCE * THREAD_BLOCKS // batch, slots // TILE))
    return plgpu.kernel(
        partial(_kernel, splits=splits),
        out_type=jax.ShapeDtypeStruct((batch, slots), jnp.float32),
        grid=(splits, batch),
        grid_names=("split", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(scaled(q, dim**-0.5), scaled(w.astype(jnp.float32), heads**-0.5), rows)


def _kernel(q_ref, w_ref, rows_ref, out_ref, *, splits: int):
    """One thread block: a share of a sequence's slots."""
    pl, plgpu = _pallas()
    (heads, width), slots = q_ref.shape[1:], rows_ref.shape[1]
    swizzle = next(n for n in (128, 64, 32) if 2 * width % n == 0)
    tiled = plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

    @partial(
        pl.run_scoped,
        q=plgpu.SMEM((heads, width), jnp.bfloat16, transforms=tiled),
        w=plgpu.SMEM((heads,), jnp.float32),
        keys=plgpu.SMEM((BUFFERS, TILE, width), jnp.bfloat16, transforms=tiled),
        scores=plgpu.SMEM((TILE,), jnp.float32),
        loaded=plgpu.Barrier(num_arrivals=2),
        filled=plgpu.Barrier(num_barriers=BUFFERS),
    )
    def _thread_block(q, w, keys, scores, loaded, filled):
        batch, blocks = jax.lax.axis_index("batch"), slots // TILE
        each = -(-blocks // splits)
        begin = jax.lax.axis_index("split") * each
        count = jnp.clip(blocks - begin, 0, each)

        def block(i):
            return batch, pl.ds((begin + i) * TILE, TILE)

        def copy(i, slot):
            plgpu.copy_gmem_to_smem(rows_ref.at[block(i)], keys.at[slot], filled.at[slot])

        plgpu.copy_gmem_to_smem(q_ref.at[batch], q, loaded)
        plgpu.copy_gmem_to_smem(w_ref.at[batch], w, loaded)
        for i in range(BUFFERS):
            pl.when(i < count)(partial(copy, i, i))
        plgpu.barrier_wait(loaded)
        weights = plgpu.load(w, layout=plgpu.Layout.WGMMA.reduce(0))

        @pl.loop(0, count)
        def _visit(i):
            slot = jax.lax.rem(i, jnp.int32(BUFFERS))
            plgpu.barrier_wait(filled.at[slot])

            def multiply(products):
                plgpu.wgmma(products, keys.at[slot], q.transpose((1, 0)))
                return products[...]

            s = jnp.maximum(pl.run_scoped(multiply, plgpu.ACC((TILE, heads), jnp.float32)), 0.0)
            s = (s * jax.lax.broadcast_in_dim(weights, s.shape, [1])).sum(axis=1)
            plgpu.wait_smem_to_gmem(0)  # the scores before are written
            scores[...] = s
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(scores, out_ref.at[block(i)])
            pl.when(i + BUFFERS < count)(lambda: copy(i + BUFFERS, slot))

        plgpu.wait_smem_to_gmem(0)


def fits(q: Array, w: Array, keys: Stored, *others: Any, **settings: Any) -> bool:
    """Whether one token of each sequence chooses, and keys are as the kernel's tiles."""
    _, length, heads, dim = q.shape
    alike = keys.scales is None and keys.rows.dtype == q.dtype and keys.rows.shape[-1] == dim
    return length == 1 and alike and keys.rows.shape[2] % TILE == heads % 16 == dim % 16 == 0


def fits_chosen(
    queries: Sequence[Array], keys: Sequence[Stored], values: Stored, ids: Array, **settings: Any
) -> bool:
    """Whether one token of each sequence reads latents, a multiple of the kernel's tiles."""
    return ids.shape[1] == 1 and ids.shape[2] % TILE == 0 and is_latent(queries, keys, values, ids)


def add() -> None:
    """Enter the table as "hopper"."""
    how = dict(platforms=("cuda",), dtypes=("bfloat16",), one_device=True, why_not=why_not)
    of_indexer = partial(indexer.index_choose, score=index_scores)
    table.add("index_choose", table.Implementation("hopper", of_indexer, fits=fits, **how))
    of_rows = partial(sparse_attention, attend=latent_attention)
    table.add("sparse_attention", table.Implementation("hopper", of_rows, fits=fits_chosen, **how))
