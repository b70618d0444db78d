"""Attention to a latent cache on TPUs, in Pallas: each cached row is read once.

One grid step multiplies a block of a sequence's rows with all of its queries, twice, from VMEM. The running softmax is
that of `ops.cached_attention`. Blocks beyond a sequence's last row are neither read nor multiplied, so the cost follows
what each sequence holds. A layer is read in place, out of a stack as well. 8-bit rows are widened in VMEM.
It compiles for v5p and v6e, and has not run on a TPU yet.

tokamax's MLA kernel is not used. Its cache has pages of packed rows, [pages, S / packing, packing, X], so each step
would copy the cache. And its 8-bit rows have one scale for all.

Pallas is imported when it is used: it takes a second.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import choose
from dsv3_jax.ops.attention import scaled
from experiments.accel.kernels.packed import Packed, in_the_table, is_latent

BLOCK = 512  # rows of a grid step: 655 KB of V3's in bfloat16, twice for double buffering
LANES = 128


def latent_attention(
    q: Float[Array, "B 1 Q K"],
    stored: Packed,
    layer: Int[Array, ""],
    last: Int[Array, "B Q"],
    *,
    parts: tuple[int, int],
    scale: float,
    block: int = BLOCK,
    interpret: bool = False,
) -> Float[Array, "B 1 Q V"]:
    """Compute `cached_attention` for packed rows: the keys, whose first `parts[0]` are the values.

    Takes no gradient.

    Args:
        block: rows of a grid step, a multiple of 128 or all of the cache's.
        interpret: run on the CPU, to test.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    _, batch, _, capacity, width = stored.rows.shape
    queries, block = q.shape[2], min(block, capacity)
    q = jnp.pad(scaled(q[:, 0], scale), ((0, 0), (0, 0), (0, width - q.shape[-1])))
    ends = last.max(axis=1) + 1  # rows of each sequence that some query sees
    prefetched = (jnp.asarray(layer, jnp.int32).reshape(1), ends.astype(jnp.int32))

    def block_of(b, i, layer, ends):
        return jnp.minimum(i, (ends[b] - 1) // block)  # a block that was read already is not read again

    in_specs = [
        pl.BlockSpec((None, queries, width), lambda b, i, layer, ends: (b, 0, 0)),
        pl.BlockSpec((None, queries, 1), lambda b, i, layer, ends: (b, 0, 0)),
        pl.BlockSpec(
            (None, None, None, block, width), lambda b, i, layer, ends: (layer[0], b, 0, block_of(b, i, layer, ends), 0)
        ),
    ]
    args = [q, last[..., None], stored.rows]
    if stored.scales is not None:
        # [S, 2] to [2, S], as a row's scores are; TPUs keep it so anyway.
        args.append(stored.scales[:, :, 0].swapaxes(2, 3))
        in_specs.append(
            pl.BlockSpec(
                (None, None, 2, block), lambda b, i, layer, ends: (layer[0], b, 0, block_of(b, i, layer, ends))
            )
        )
    value_width = parts[0] if parts[0] % LANES == 0 else width  # cut at a lane's border, or afterwards
    itemsize = stored.rows.dtype.itemsize
    out = pl.pallas_call(
        partial(_kernel, block=block, capacity=capacity, first_part=parts[0], eight_bits=stored.scales is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, pl.cdiv(capacity, block)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((None, queries, value_width), lambda b, i, layer, ends: (b, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((queries, value_width), jnp.float32),
                pltpu.VMEM((queries, 1), jnp.float32),
                pltpu.VMEM((queries, 1), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, queries, value_width), q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * queries * capacity * (width + value_width),
            transcendentals=batch * queries * capacity,
            bytes_accessed=batch * capacity * width * itemsize + 2 * q.size * q.dtype.itemsize,
        ),
        interpret=interpret,
    )(*prefetched, *args)
    return out[:, None, :, : parts[0]]


def _kernel(layer, ends, q, last, rows, *refs, block: int, capacity: int, first_part: int, eight_bits: bool):
    from jax.experimental import pallas as pl

    *scales, out, total, top, weight = refs
    i, end = pl.program_id(1), ends[pl.program_id(0)]
    # By default a TPU rounds float32 operands of a product to bfloat16.
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    value_width = out.shape[1]

    def dot(a, b, contracted):
        dims = (((1,), (contracted,)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    @pl.when(i == 0)
    def _start():
        total[...] = jnp.zeros_like(total)
        top[...] = jnp.full_like(top, -jnp.inf)
        weight[...] = jnp.zeros_like(weight)

    @pl.when(i * block < end)
    def _visit():
        keys = rows[...].astype(jnp.float32).astype(q.dtype) if eight_bits else rows[...].astype(q.dtype)
        if capacity % block:  # the last block ends beyond the cache, and what is there may not be finite
            slot = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, 1), 0)
            keys = jnp.where(slot < capacity, keys, jnp.zeros((), keys.dtype))
        if not eight_bits:
            s = dot(q[...], keys, 1)
        elif first_part % LANES == 0:
            s = dot(q[:, :first_part], keys[:, :first_part], 1) * scales[0][0:1]
            s += dot(q[:, first_part:], keys[:, first_part:], 1) * scales[0][1:2]
        else:  # a product for each part, with zeros in place of the other
            first = jax.lax.broadcasted_iota(jnp.int32, q.shape, 1) < first_part
            zero = jnp.zeros((), q.dtype)
            s = dot(jnp.where(first, q[...], zero), keys, 1) * scales[0][0:1]
            s += dot(jnp.where(first, zero, q[...]), keys, 1) * scales[0][1:2]
        slot = i * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        s = jnp.where(slot <= last[...], s, -jnp.inf)
        new_top = jnp.maximum(top[...], s.max(axis=1, keepdims=True))  # finite from the first block: all see row 0
        p = jnp.exp(s - new_top)
        keep = jnp.exp(top[...] - new_top)
        top[...] = new_top
        weight[...] = weight[...] * keep + p.sum(axis=1, keepdims=True)
        if eight_bits:
            p = p * jnp.where(slot < capacity, scales[0][0:1], 0.0)
        total[...] = total[...] * keep + dot(p.astype(q.dtype), keys[:, :value_width], 0)

    @pl.when(i == pl.num_programs(1) - 1)
    def _finish():
        out[...] = (total[...] / weight[...]).astype(out.dtype)


def add() -> None:
    """Enter the table as "latent"."""
    run = in_the_table(latent_attention, multiple=128)
    row = choose.Implementation("latent", run, ("tpu",), ("bfloat16",), one_device=True, fits=is_latent)
    choose.add("cached_attention", row)
