"""Causal attention whose memory grows with length, not with its square.

Queries and keys are cut into blocks. Only pairs of blocks on or below the diagonal are visited, and each pair's scores
live for one step of a loop. Running maxima and sums put a row's softmax together from its blocks (arXiv 2112.05682,
2205.14135). The backward pass visits the same pairs again, from the saved row sums. Key and value widths may differ,
as in MLA (192 and 128 in V3).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

RESULTS = "attention"  # name, for `jax.checkpoint`, of what the gradient needs of the forward pass: output, log-sums
MAX_SCORES = 1 << 21  # numbers in the scores of one pair of blocks: 8 MB in float32
LARGE_SCORES = 1 << 25  # the same for devices with more memory, where starting a product costs more: 128 MB in float32


def causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
) -> Float[Array, "B T H V"]:
    """Attend to earlier tokens of the same segment: softmax(scale · q kᵀ) v, softmax in float32 (float64 stays).

    Args:
        q: queries of H heads.
        k, v: keys and values of G heads; H is a multiple of G, and each serves H / G query heads in a row.
        scale: factor of the scores, see `scaled`.
        segment_ids: a token sees its own segment only; None means one segment.
        block: rows and columns visited at a time. None means 128, and more in long texts with few heads and sequences.
    Returns: [B, T, H, V] in v's dtype.

    Example:
        >>> q, v = jnp.zeros((1, 3, 1, 1)), jnp.array([[[[0.0]], [[2.0]], [[7.0]]]])
        >>> causal_attention(q, q, v, scale=1.0).ravel()  # equal scores: means of the values so far
        Array([0., 1., 3.], dtype=float32)
    """
    return attention_and_maxima(q, k, v, scale=scale, segment_ids=segment_ids, block=block)[0]


def attention_and_maxima(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attend as `causal_attention`, and return each row's largest score too, which the softmax has kept anyway.

    The largest scores take no gradient. They are float32 (float64 stays).

    Example:
        >>> q, k = jnp.array([[[[1.0]], [[2.0]]]]), jnp.array([[[[5.0]], [[3.0]]]])
        >>> attention_and_maxima(q, k, k, scale=1.0)[1].ravel()  # 1 · 5; the larger of 2 · 5 and 2 · 3
        Array([ 5., 10.], dtype=float32)
    """
    length, heads = q.shape[1:3]
    q, k, segment_ids, block = _in_blocks(q, k, scale, segment_ids, block)
    out, top = _attend(q, k, _heads_first(repeat_heads(v, heads), block), segment_ids, block)
    return out.swapaxes(1, 2)[:, :length], jax.lax.stop_gradient(top).swapaxes(1, 2)[:, :length]


def row_maxima(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
) -> Float[Array, "B T H"]:
    """Compute each row's largest score by a product of its own, a third of attention's forward FLOPs or more.

    For use beside a kernel that does not return what its softmax keeps. Takes no gradient.

    Example:
        >>> q, k = jnp.array([[[[1.0]], [[2.0]]]]), jnp.array([[[[5.0]], [[3.0]]]])
        >>> row_maxima(q, k, scale=1.0).ravel()
        Array([ 5., 10.], dtype=float32)
    """
    batch, length, heads, _ = q.shape
    q, k, seg, block = _in_blocks(*jax.lax.stop_gradient((q, k)), scale, segment_ids, block)

    def visit(top, pair):
        i, j = pair
        q_i, k_j, seg_i, seg_j = (_rows(x, n, block, a) for x, n, a in ((q, i, 2), (k, j, 2), (seg, i, 1), (seg, j, 1)))
        new = jnp.maximum(_rows(top, i, block, 2), _scores(q_i, k_j, seg_i, seg_j, i, j, block).max(-1))
        return jax.lax.dynamic_update_slice_in_dim(top, new, i * block, 2), None

    top = jnp.full((batch, heads, q.shape[2]), -jnp.inf, np.promote_types(q.dtype, np.float32))
    top, _ = jax.lax.scan(visit, top, _pairs(q.shape[2] // block))
    return top.swapaxes(1, 2)[:, :length]


def _in_blocks(q, k, scale, segment_ids, block):
    """(Scaled queries and keys [B, H, T, K], segments [B, T], the block), padded to whole blocks."""
    batch, length, heads, _ = q.shape
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    block = min(block or _block(batch * heads, length), length)
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, -length % block)), constant_values=-1)
    return _heads_first(scaled(q, scale), block), _heads_first(repeat_heads(k, heads), block), segment_ids, block


def _heads_first(x, block):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).swapaxes(1, 2)


def causal_attention_in_large_blocks(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H V"]:
    """Compute `causal_attention` in few large steps: as many rows a block as LARGE_SCORES allows.

    The gradient has about four arrays of that size at a time.
    """
    return maxima_in_large_blocks(q, k, v, scale=scale, segment_ids=segment_ids)[0]


def maxima_in_large_blocks(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Compute `attention_and_maxima` in few large steps, as `causal_attention_in_large_blocks`."""
    batch, length, heads, _ = q.shape
    block = large_block(batch * heads, length)
    return attention_and_maxima(q, k, v, scale=scale, segment_ids=segment_ids, block=block)


def large_block(products: int, length: int) -> int:
    """Rows of a block whose scores, in so many products, are at most LARGE_SCORES numbers; at least 128."""
    block = 128
    while block < length and products * (2 * block) ** 2 <= LARGE_SCORES:
        block *= 2
    return block


def scaled(q: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """Multiply queries by the scale in float32 or wider, and round the product once to their dtype.

    Scaling the queries takes fewer products than scaling the scores. A scale that is rounded to bfloat16 first would
    change all scores by the same factor: V3's 0.135234 would become 0.134766, which is 0.35 % less.
    """
    wide = np.promote_types(q.dtype, np.float32)
    return (q.astype(wide) * jnp.asarray(scale, wide)).astype(q.dtype)


def repeat_heads(x: Float[Array, "B T G _"], heads: int) -> Float[Array, "B T H _"]:
    """Repeat key or value heads, each `heads` / G times in a row: one for each query head."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def _block(products: int, length: int) -> int:
    """Rows of a block. Larger blocks multiply faster, as long as one visit's scores stay small."""
    block = 128
    while 16 * block <= length and products * (2 * block) ** 2 <= MAX_SCORES:
        block *= 2
    return block


def _pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Block pairs (query, key) on and below the diagonal; a query's diagonal pair comes first.

    A row always sees itself there, so its running maximum is finite from the first visit.
    """
    pairs = [(i, j) for i in range(blocks) for j in range(i, -1, -1)]
    return np.array([p[0] for p in pairs], np.int32), np.array([p[1] for p in pairs], np.int32)


def _rows(x: Array, index, block: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _scores(q, k, seg_q, seg_k, i, j, block):
    """Masked scores [B, H, block, block] of one pair, in float32 or wider."""
    wide = np.promote_types(q.dtype, np.float32)
    s = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=wide)
    t = i * block + jnp.arange(block, dtype=jnp.int32)
    u = j * block + jnp.arange(block, dtype=jnp.int32)
    seen = (t[:, None] >= u[None, :])[None] & (seg_q[:, :, None] == seg_k[:, None, :])
    return jnp.where(seen[:, None], s, -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, seg, block):
    return _attend_fwd(q, k, v, seg, block)[0]


def _attend_fwd(q, k, v, seg, block):
    batch, heads, length, _ = q.shape
    wide = np.promote_types(q.dtype, np.float32)
    out = jnp.zeros((batch, heads, length, v.shape[-1]), wide)
    top = jnp.full((batch, heads, length), -jnp.inf, wide)
    total = jnp.zeros((batch, heads, length), wide)

    def visit(carry, pair):
        out, top, total = carry
        i, j = pair
        s = _scores(
            _rows(q, i, block, 2), _rows(k, j, block, 2), _rows(seg, i, block, 1), _rows(seg, j, block, 1), i, j, block
        )
        old_top = _rows(top, i, block, 2)
        new_top = jnp.maximum(old_top, s.max(-1))
        p = jnp.exp(s - new_top[..., None])
        keep = jnp.exp(old_top - new_top)
        o = _rows(out, i, block, 2) * keep[..., None] + jnp.einsum(
            "bhts,bhsv->bhtv", p.astype(v.dtype), _rows(v, j, block, 2), preferred_element_type=wide
        )
        t = _rows(total, i, block, 2) * keep + p.sum(-1)
        start = i * block
        return (
            jax.lax.dynamic_update_slice_in_dim(out, o, start, 2),
            jax.lax.dynamic_update_slice_in_dim(top, new_top, start, 2),
            jax.lax.dynamic_update_slice_in_dim(total, t, start, 2),
        ), None

    (out, top, total), _ = jax.lax.scan(visit, (out, top, total), _pairs(length // block))
    out, lse = checkpoint_name(((out / total[..., None]).astype(v.dtype), top + jnp.log(total)), RESULTS)
    return (out, top), (q, k, v, seg, out, lse)


def _attend_bwd(block, saved, d_results):
    q, k, v, seg, out, lse = saved
    d_out, _ = d_results  # the maxima take no gradient
    wide = np.promote_types(q.dtype, np.float32)
    delta = (d_out.astype(wide) * out.astype(wide)).sum(-1)  # the softmax's own term, a number a row
    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))

    def visit(grads, pair):
        dq, dk, dv = grads
        i, j = pair
        q_i, do_i, k_j, v_j = (_rows(x, n, block, 2) for x, n in ((q, i), (d_out, i), (k, j), (v, j)))
        s = _scores(q_i, k_j, _rows(seg, i, block, 1), _rows(seg, j, block, 1), i, j, block)
        p = jnp.exp(s - _rows(lse, i, block, 2)[..., None])
        dp = jnp.einsum("bhtv,bhsv->bhts", do_i, v_j, preferred_element_type=wide)
        ds = (p * (dp - _rows(delta, i, block, 2)[..., None])).astype(q.dtype)
        p = p.astype(v.dtype)

        def add(total, index, spec, a, b):
            part = _rows(total, index, block, 2) + jnp.einsum(spec, a, b, preferred_element_type=wide)
            return jax.lax.dynamic_update_slice_in_dim(total, part, index * block, 2)

        dq = add(dq, i, "bhts,bhsd->bhtd", ds, k_j)
        dk = add(dk, j, "bhts,bhtd->bhsd", ds, q_i)
        dv = add(dv, j, "bhts,bhtv->bhsv", p, do_i)
        return (dq, dk, dv), None

    grads, _ = jax.lax.scan(visit, start, _pairs(q.shape[2] // block))
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_attend.defvjp(_attend_fwd, _attend_bwd)
