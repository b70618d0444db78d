"""Attention to a latent cache on TPUs, in Pallas: each cached row is read once.

One grid step multiplies a block of a sequence's rows with all of its queries, twice, from VMEM. The
running softmax is that of `ops.cached_attention`. Blocks beyond a sequence's last row are neither
read nor multiplied, so the cost follows what each sequence holds. 8-bit rows are widened in VMEM.
It compiles for v5p and v6e, and has not run on a TPU yet.

tokamax's MLA kernel is not used. Its cache has pages of packed rows, [pages, S / packing, packing,
X], so each step would copy the cache. And its 8-bit rows have one scale for all.

Pallas is imported when it is used: it takes a second.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import table
from dsv3_jax.ops.attention import scaled
from dsv3_jax.ops.cached_attention import Stored
from experiments.accel.kernels.gpu_latent_attention import is_latent

BLOCK = 512  # rows of a grid step: 655 KB of V3's in bfloat16, twice for double buffering


def latent_attention(
    queries: Sequence[Float[Array, "B 1 Q _"]],
    keys: Sequence[Stored],
    values: Stored,
    last: Int[Array, "B Q"],
    *,
    scale: float,
    block: int = BLOCK,
) -> Float[Array, "B 1 Q V"]:
    """Compute `ops.cached_attention.cached_attention` for latents, which are the values, and keys.

    Takes no gradient.

    Args:
        block: rows of a grid step, a multiple of 128 or all of the cache's.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, _, capacity, width = values.rows.shape
    count, block = queries[0].shape[2], min(block, capacity)
    rows = [key.rows for key in keys]
    queries = [
        jnp.pad(scaled(q[:, 0], scale), ((0, 0), (0, 0), (0, x.shape[-1] - q.shape[-1])))
        for q, x in zip(queries, rows, strict=True)
    ]
    # They are [B, 1, 1, S], as scores are.
    scales = [key.scales.swapaxes(2, 3) for key in keys if key.scales is not None]
    ends = (last.max(axis=1) + 1).astype(jnp.int32)  # rows of each sequence that some query sees

    def of_queries(width: int) -> Any:
        return pl.BlockSpec((None, count, width), lambda b, i, ends: (b, 0, 0))

    def block_of(b, i, ends):
        # A block that was read already is not read again.
        return jnp.minimum(i, (ends[b] - 1) // block)

    in_specs = [of_queries(x.shape[-1]) for x in (*queries, last[..., None])]
    in_specs += [
        pl.BlockSpec(
            (None, None, block, x.shape[-1]), lambda b, i, ends: (b, 0, block_of(b, i, ends), 0)
        )
        for x in rows
    ]
    in_specs += [
        pl.BlockSpec((None, None, 1, block), lambda b, i, ends: (b, 0, 0, block_of(b, i, ends)))
        for _ in scales
    ]
    every = sum(x.shape[-1] for x in rows)
    out = pl.pallas_call(
        partial(_kernel, block=block, capacity=capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(capacity, block)),
            in_specs=in_specs,
            out_specs=of_queries(width),
            scratch_shapes=[pltpu.VMEM((count, columns), jnp.float32) for columns in (width, 1, 1)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, count, width), queries[0].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * count * capacity * (every + width),
            transcendentals=batch * count * capacity,
            bytes_accessed=sum(x.nbytes for x in (*rows, *queries, queries[0])),
        ),
    )(ends, *queries, last[..., None], *rows, *scales)
    return out[:, None]


def _kernel(ends, q_latent, q_key, last, latents, rotated, *refs, block: int, capacity: int):
    from jax.experimental import pallas as pl

    *scales, out, total, top, weight = refs
    i, end = pl.program_id(1), ends[pl.program_id(0)]
    # By default a TPU rounds float32 operands of a product to bfloat16.
    precision = jax.lax.Precision.HIGHEST if q_latent.dtype == jnp.float32 else None

    def dot(a, b, contracted):
        dims = (((1,), (contracted,)), ((), ()))
        return jax.lax.dot_general(
            a, b, dims, precision=precision, preferred_element_type=jnp.float32
        )

    @pl.when(i == 0)
    def _start():
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, -jnp.inf)
        weight[...] = jnp.zeros_like(weight)

    @pl.when(i * block < end)
    def _visit():
        s, blocks = jnp.zeros((), jnp.float32), []
        for n, (q, rows) in enumerate(((q_latent, latents), (q_key, rotated))):
            keys = rows[...].astype(jnp.float32) if scales else rows[...]
            keys = keys.astype(q.dtype)
            # The last block ends beyond the cache, and what is there may not be finite.
            if capacity % block:
                slot = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
                keys = jnp.where(slot < capacity, keys, jnp.zeros((), keys.dtype))
            s += dot(q[...], keys, 1) * (scales[n][...] if scales else 1.0)
            blocks.append(keys)
        slot = i * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        s = jnp.where(slot <= last[...], s, -jnp.inf)
        # It is finite from the first block: all see row 0.
        new_top = jnp.maximum(top[...], s.max(axis=1, keepdims=True))
        p = jnp.exp(s - new_top)
        keep = jnp.exp(top[...] - new_top)
        top[...] = new_top
        weight[...] = weight[...] * keep + p.sum(axis=1, keepdims=True)
        if scales:
            p = p * jnp.where(slot < capacity, scales[0][...], 0.0)
        total[...] = total[...] * keep + dot(p.astype(blocks[0].dtype), blocks[0], 0)

    @pl.when(i == pl.num_programs(1) - 1)
    def _finish():
        out[...] = (total[...] / weight[...]).astype(out.dtype)


def add() -> None:
    """Enter the table as "latent"."""
    row = table.Implementation(
        "latent", latent_attention, ("tpu",), ("bfloat16",), one_device=True, fits=is_latent
    )
    table.add("cached_attention", row)
