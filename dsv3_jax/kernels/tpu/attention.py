"""Attention on TPUs: JAX's splash attention, and the blocks of attention to a cache.

Splash is a flash attention that skips the blocks above the diagonal. Forward and backward are
Pallas kernels: scores stay in the core's memory. Keys and values of fewer heads than the queries'
are read as they are. Queries and keys are made without cutting or joining arrays.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.xla import cached_blocks
from dsv3_jax.ops.attention import QUERIES, RESULTS, scaled
from dsv3_jax.ops.cached_attention import Stored

# rows of a block; the fastest in its authors' timings on v5p and v6e, of lengths 1024 to 8192
LARGEST_BLOCK = 1024
# keys whose scores are computed at once, at most; float32 scores then fit a v5p's 16 MB of scratch
AT_A_TIME = 640
MIN_WIDTH = 64  # of a head: below, most of a product's 128 columns are padding
MIN_LENGTH = 128  # of a sequence: a block of fewer rows would be mostly padding
CACHE_BLOCK = 512  # rows of a cache that are visited at a time, at most
# numbers of these rows, in all sequences: 16 MB in bfloat16, of 64 to 128 of a core's memory
CACHE_NUMBERS = 1 << 23


def fits(q: Array, k: Array, v: Array, **settings) -> bool:
    """Whether heads are wide and sequences long enough that the kernel is faster than XLA."""
    alike = q.dtype == k.dtype == v.dtype
    return alike and min(q.shape[-1], v.shape[-1]) >= MIN_WIDTH and q.shape[1] >= MIN_LENGTH


def causal_attention(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T G X"],
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
        # Two backward kernels, not the fused one: its partial dq take the square of the length.
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
    q = checkpoint_name(heads_first(scaled(q, scale)), QUERIES)
    out = jax.vmap(attend)(q, heads_first(k), heads_first(v), segments)
    return out.swapaxes(1, 2)[:, :length]


def rotate_last(
    x: Float[Array, "B T H X"], cos: Array, sin: Array, *, interleaved: bool
) -> Float[Array, "B T H X"]:
    """Compute `ops.rope.rotate_last` in bfloat16: a product with signs swaps each pair, exactly.

    So no array is cut where a register's columns do not end, which would take as long as several
    passes over it.
    """
    width = x.shape[-1]
    half = cos.shape[-1]
    rest = width - 2 * half

    # The columns of each pair (a, b), and the matrix that turns it into (-b, a).
    places = rest + np.arange(2 * half)
    first, second = places.reshape(half, 2).T if interleaved else places.reshape(2, half)
    signs = np.zeros((width, width), np.float32)
    signs[second, first] = -1
    signs[first, second] = 1

    # The angles of both numbers of a pair. The numbers before the pairs turn by none.
    copies = np.zeros((half, width), np.float32)
    copies[np.arange(half), first] = 1
    copies[np.arange(half), second] = 1

    def spread(of_pairs: Array, of_rest: float) -> Array:
        both = jnp.dot(of_pairs, copies, precision=jax.lax.Precision.HIGHEST)  # exact
        unturned = np.where(np.arange(width) < rest, np.float32(of_rest), 0)
        return both + unturned.reshape(1, 1, 1, -1)

    # Heads first, as the kernel wants them. Without the constraint XLA on a mesh makes queries with
    # the positions last, and copies them for the product.
    x_BHTX = with_layout_constraint(x.swapaxes(1, 2), Layout((0, 1, 2, 3)))
    cos_B1TX = spread(cos, 1.0).swapaxes(1, 2)
    sin_B1TX = spread(sin, 0.0).swapaxes(1, 2)
    turned_BHTX = _turn(x_BHTX, cos_B1TX, sin_B1TX, jnp.asarray(signs, x.dtype))
    return turned_BHTX.swapaxes(1, 2)


@jax.custom_vjp
def _turn(x: Array, cos: Array, sin: Array, signs: Array) -> Array:
    swapped = jnp.dot(x, signs, preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def _turn_back(angles: tuple[Array, Array, Array], d: Array) -> tuple[Any, ...]:
    cos, sin, signs = angles
    return _turn(d, cos, -sin, signs), None, None, None


_turn.defvjp(lambda x, *angles: (_turn(x, *angles), angles), _turn_back)


def expand(
    c_kv: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    w_uk: Float[Array, "H N C"],
    w_uv: Float[Array, "H V C"],
) -> tuple[Float[Array, "B T H X"], Float[Array, "B T H V"]]:
    """Compute `ops.mla.expand`: one product makes the keys, and its matrix hands k_rope on."""
    rope_dim = k_rope.shape[-1]
    heads, _, latent = w_uk.shape

    # A head's matrix: W_uk on c_kv, and the identity on k_rope.
    identity = jnp.eye(rope_dim, latent + rope_dim, latent, dtype=c_kv.dtype)
    identity = jnp.broadcast_to(identity, (heads, *identity.shape))
    on_latent = jnp.pad(w_uk.astype(c_kv.dtype), ((0, 0), (0, 0), (0, rope_dim)))
    w_k = jnp.concatenate([on_latent, identity], axis=1)

    both = jnp.concatenate([c_kv, k_rope], axis=-1)
    k = jnp.einsum("btc,hkc->bthk", both, w_k)
    return k, jnp.einsum("btc,hvc->bthv", c_kv, w_uv.astype(c_kv.dtype))


def block_sizes(length: int) -> tuple[int, int]:
    """(Rows and columns of a block, columns whose scores are computed at once), by length.

    The fewest blocks of at most LARGEST_BLOCK rows, and as small as that number allows, so that
    little is padding.

    Example:
        >>> block_sizes(4096), block_sizes(1100), block_sizes(130)
        ((1024, 512), (640, 640), (256, 256))
    """
    rows = -(-length // -(-length // LARGEST_BLOCK))
    # so that a large block can be halved into multiples of 128
    step = 128 if rows <= AT_A_TIME else 256
    block = rows + -rows % step
    return block, block if block <= AT_A_TIME else block // 2


def fits_in_blocks(queries: Sequence[Array], keys: Sequence, values: Stored, *others, **settings):
    """Whether a cache has more rows than a block."""
    return values.rows.shape[2] > CACHE_BLOCK


def cached_attention_in_blocks(
    queries: Sequence[Array], keys: Sequence, values: Stored, *args, **how
):
    """Compute `ops.cached_attention.cached_attention` in blocks, read once into core memory."""
    block = min(max(cached_blocks.block_rows(keys, values, CACHE_NUMBERS), 16), CACHE_BLOCK)
    return cached_blocks.cached_attention_in_blocks(
        queries, keys, values, *args, block=block, take_out=True, **how
    )
