"""Attention on the CPU: the C++ kernels, and block sizes for the XLA loops."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.kernels.xla import cached_blocks
from dsv3_jax.ops.attention import RESULTS, repeat_heads, scaled
from dsv3_jax.ops.cached_attention import Stored

# numbers of the cache visited at a time: 256 KB, measured best on two AVX-512 cores
BLOCK_ELEMENTS = 1 << 16


def causal_attention(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T G X"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    maxima: bool = False,
) -> Float[Array, "B T H V"] | tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Compute `ops.attention.causal_attention` by C++, with `maxima` `attention_and_maxima`."""
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
    out, largest = _attend(scaled(q, scale), k, v, segment_ids)
    return (out, jax.lax.stop_gradient(largest).swapaxes(1, 2)) if maxima else out


@jax.custom_vjp
def _attend(q, k, v, segment_ids):
    out, _, largest = calls.causal_attention(q, k, v, segment_ids)
    return out, largest


def _attend_fwd(q, k, v, segment_ids):
    out, lse, largest = calls.causal_attention(q, k, v, segment_ids)
    out, lse = checkpoint_name((out, lse), RESULTS)
    return (out, largest), (q, k, v, segment_ids, out, lse)


def _attend_bwd(saved, d_results):
    dq, dk, dv = calls.causal_attention_gradients(*saved, d_results[0])
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def cached_attention_in_blocks(
    queries: Sequence[Array], keys: Sequence[Stored], values: Stored, *args, **settings
):
    """Compute `ops.cached_attention.cached_attention` in blocks that stay in a core's cache."""
    block = max(cached_blocks.block_rows(keys, values, BLOCK_ELEMENTS), 64)
    return cached_blocks.cached_attention_in_blocks(
        queries, keys, values, *args, block=block, **settings
    )


def write_rows(stored: Any, new: Any, layer: Int[Array, ""], first: Int[Array, " B"]) -> Any:
    """Compute `ops.cached_attention.write_rows` sequence by sequence.

    XLA's scatter works in place too, but takes 1.5 µs for 32 rows of 160 numbers; this loop takes
    0.7, on two cores.
    """
    zero = jnp.zeros((), jnp.int32)

    def put_one(b, stored):
        def one(old, new):
            new = jax.lax.dynamic_slice_in_dim(new, b, 1, 0)[None]
            return jax.lax.dynamic_update_slice(old, new, (layer, b, zero, first[b], zero))

        return jax.tree.map(one, stored, new)

    written = jax.lax.fori_loop(0, first.shape[0], put_one, stored)
    # Without the barrier XLA fuses a row's update with each of its readers, and copies all slots.
    return jax.lax.optimization_barrier(written)
