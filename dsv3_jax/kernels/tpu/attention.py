"""Attention on TPUs: JAX's splash attention, and the blocks of attention to a cache.

Splash is a flash attention that skips the blocks above the diagonal. Forward and backward are Pallas kernels: scores
stay in the core's memory. Keys and values of fewer heads than the queries' are read as they are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops import cached_attention
from dsv3_jax.ops.attention import RESULTS, scaled

LARGEST_BLOCK = 1024  # rows of a block; the fastest in its authors' timings on v5p and v6e, of lengths 1024 to 8192
AT_A_TIME = 640  # keys whose scores are computed at once, at most; float32 scores then fit a v5p's 16 MB of scratch
MIN_WIDTH = 64  # of a head: below, most of a product's 128 columns are padding
MIN_LENGTH = 128  # of a sequence: a block of fewer rows would be mostly padding
CACHE_BLOCK = 512  # rows of a cache that are visited at a time, at most
CACHE_NUMBERS = 1 << 23  # numbers of these rows, in all sequences: 16 MB in bfloat16, of 64 to 128 of a core's memory


def fits(q: Array, k: Array, v: Array, **settings) -> bool:
    """Whether heads are wide and sequences long enough that the kernel is faster than XLA."""
    alike = q.dtype == k.dtype == v.dtype
    return alike and min(q.shape[-1], v.shape[-1]) >= MIN_WIDTH and q.shape[1] >= MIN_LENGTH


def causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H V"]:
    """Compute `ops.attention.causal_attention` by splash attention.

    Scores and their softmax are float32. Any length is padded to a multiple of a block inside.

    Args: interpret: run the kernels' Python on any device, slowly, for tests.
    """
    # Imported here, because importing it takes long and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    batch, length, heads, _ = q.shape
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    block, at_a_time = block_sizes(length)
    padded = length + -length % block
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=at_a_time,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=at_a_time,
        # Two backward kernels, not the fused one: its partial dq take memory by the square of the length.
        block_q_dq=block,
        block_kv_dq=block,
    )
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESULTS,
        interpret=interpret,
    )

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), constant_values=-1)
    segments = splash.SegmentIds(segment_ids, segment_ids)
    out = jax.vmap(attend)(heads_first(scaled(q, scale)), heads_first(k), heads_first(v), segments)
    return out.swapaxes(1, 2)[:, :length]


def block_sizes(length: int) -> tuple[int, int]:
    """(Rows and columns of a block, columns whose scores are computed at once) for sequences of that length.

    The fewest blocks of at most LARGEST_BLOCK rows, and as small as that number allows, so that little is padding.

    Example:
        >>> block_sizes(4096), block_sizes(1100), block_sizes(130)
        ((1024, 512), (640, 640), (256, 256))
    """
    rows = -(-length // -(-length // LARGEST_BLOCK))
    step = 128 if rows <= AT_A_TIME else 256  # so that a large block can be halved into multiples of 128
    block = rows + -rows % step
    return block, block if block <= AT_A_TIME else block // 2


def fits_in_blocks(queries: Sequence[Array], keys: Sequence, values: cached_attention.Stored, *others, **settings):
    """Whether a cache has more rows than a block."""
    return values.rows.shape[2] > CACHE_BLOCK


def cached_attention_in_blocks(queries: Sequence[Array], keys: Sequence, values: cached_attention.Stored, *args, **how):
    """Compute `ops.cached_attention.cached_attention` in blocks, each read once into the core's memory."""
    block = min(max(cached_attention.block_rows(keys, values, CACHE_NUMBERS), 16), CACHE_BLOCK)
    return cached_attention.cached_attention_in_blocks(queries, keys, values, *args, block=block, take_out=True, **how)
