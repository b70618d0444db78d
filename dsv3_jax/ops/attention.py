"""Causal attention whose memory grows with length, not with its square.

Queries and keys are cut into blocks. Only pairs of blocks on or below the diagonal are visited, and
each pair's scores live for one step of a loop. Running maxima and sums put a row's softmax together
from its blocks (arXiv 2112.05682, 2205.14135). The backward pass visits the same pairs again, from
the saved row sums. Key and value widths may differ, as in MLA (192 and 128 in V3).

Letters, beside those of reference.py: t queries and s keys of one pair of blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.dtypes import sum_dtype

# Names for `jax.checkpoint`.
RESULTS = "attention"  # what the gradient needs of the forward pass: output, log-sums
QUERIES = "queries"  # as a kernel reads them, where it has them in an order of its own
MAX_SCORES = 1 << 21  # numbers in the scores of one pair of blocks: 8 MB in float32
# the same for devices with more memory, where starting a product costs more: 128 MB in float32
LARGE_SCORES = 1 << 25


def causal_attention(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T G X"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
    large: bool = False,
) -> Float[Array, "B T H V"]:
    """Attend to earlier tokens of a segment: softmax(scale · q kᵀ) v, in float32 (float64 stays).

    Args:
        q: queries of H heads.
        k, v: keys and values of G heads; H is a multiple of G, and each serves H / G query heads in
            a row.
        scale: factor of the scores, see `scaled`.
        segment_ids: a token sees its own segment only; None means one segment.
        block: rows and columns visited at a time. None means `block_size`.
        large: in few large steps, for devices where it costs more to start a product; see
            `block_size`.
    Returns: [B, T, H, V] in v's dtype.

    Example:
        >>> q, v = jnp.zeros((1, 3, 1, 1)), jnp.array([[[[0.0]], [[2.0]], [[7.0]]]])
        >>> jax.jit(partial(causal_attention, scale=1.0))(q, q, v).ravel()  # means of values so far
        Array([0., 1., 3.], dtype=float32)
    """
    return attention_and_maxima(
        q, k, v, scale=scale, segment_ids=segment_ids, block=block, large=large
    )[0]


def attention_and_maxima(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T G X"],
    v: Float[Array, "B T G V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
    large: bool = False,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Attend as `causal_attention`, and return each row's largest score, which the softmax keeps.

    The largest scores take no gradient. They are float32 (float64 stays).

    Example:
        >>> q, k = jnp.array([[[[1.0]], [[2.0]]]]), jnp.array([[[[5.0]], [[3.0]]]])
        >>> attention_and_maxima(q, k, k, scale=1.0)[1].ravel()  # 1 · 5; max(2 · 5, 2 · 3)
        Array([ 5., 10.], dtype=float32)
    """
    length, heads = q.shape[1:3]
    q, k, segment_ids, block = _in_blocks(q, k, scale, segment_ids, block, large)
    v = _heads_first(repeat_heads(v, heads), block)
    out, top = _attend(q, k, v, segment_ids, block)

    top = jax.lax.stop_gradient(top)
    return out.swapaxes(1, 2)[:, :length], top.swapaxes(1, 2)[:, :length]


def row_maxima(
    q: Float[Array, "B T H X"],
    k: Float[Array, "B T G X"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
    large: bool = False,
) -> Float[Array, "B T H"]:
    """Compute each row's largest score by a product, a third of attention's forward FLOPs or more.

    For use beside a kernel that does not return what its softmax keeps. Takes no gradient.

    Example:
        >>> q, k = jnp.array([[[[1.0]], [[2.0]]]]), jnp.array([[[[5.0]], [[3.0]]]])
        >>> row_maxima(q, k, scale=1.0).ravel()
        Array([ 5., 10.], dtype=float32)
    """
    length = q.shape[1]
    q, k = jax.lax.stop_gradient((q, k))
    q, k, seg, block = _in_blocks(q, k, scale, segment_ids, block, large)

    def visit(top_BHT: Array, pair: tuple) -> tuple[Array, None]:
        start = pair[0] * block
        largest = _scores(q, k, seg, pair, block).max(-1)
        new = jnp.maximum(_rows(top_BHT, start, block), largest)
        return jax.lax.dynamic_update_slice_in_dim(top_BHT, new, start, 2), None

    top_BHT = jnp.full(q.shape[:3], -jnp.inf, sum_dtype(q.dtype))
    top_BHT, _ = jax.lax.scan(visit, top_BHT, _pairs(q.shape[2] // block))
    return top_BHT.swapaxes(1, 2)[:, :length]


def _in_blocks(
    q: Array, k: Array, scale: float, segment_ids: Array | None, block: int | None, large: bool
) -> tuple[Array, Array, Array, int]:
    """(Scaled queries, keys [B, H, T, X], segments [B, T], the block), padded to whole blocks."""
    batch, length, heads, _ = q.shape
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    block = min(block or block_size(batch * heads, length, large=large), length)

    q = _heads_first(scaled(q, scale), block)
    k = _heads_first(repeat_heads(k, heads), block)
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, -length % block)), constant_values=-1)
    return q, k, segment_ids, block


def _heads_first(x: Float[Array, "B T H _"], block: int) -> Float[Array, "B H _ _"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0))).swapaxes(1, 2)


def block_size(products: int, length: int, *, large: bool = False) -> int:
    """Rows of a block: 128, and more in long texts while the scores of one visit stay few.

    At most MAX_SCORES, and a sixteenth of the text, so that few scores beyond the diagonal are
    computed. If `large`, at most LARGE_SCORES.
    """
    block = 128
    most = LARGE_SCORES if large else MAX_SCORES
    longest = length - 1 if large else length // 16
    while block <= longest and products * (2 * block) ** 2 <= most:
        block *= 2
    return block


def scaled(q: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """Multiply queries by the scale in float32 or wider, and round the product once to their dtype.

    Scaling the queries takes fewer products than scaling the scores. A scale that is rounded to
    bfloat16 first would change all scores by the same factor: V3's 0.135234 would become 0.134766,
    which is 0.35 % less.
    """
    wide = sum_dtype(q.dtype)
    return (q.astype(wide) * jnp.asarray(scale, wide)).astype(q.dtype)


def repeat_heads(x: Float[Array, "B T G _"], heads: int) -> Float[Array, "B T H _"]:
    """Repeat key or value heads, each `heads` / G times in a row: one for each query head."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def _pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Block pairs (query, key) on and below the diagonal; a query's diagonal pair comes first.

    A row always sees itself there, so its running maximum is finite from the first visit.
    """
    pairs = np.array([(i, j) for i in range(blocks) for j in range(i, -1, -1)], np.int32)
    return pairs[:, 0], pairs[:, 1]


def _rows(x: Array, start: Array, block: int, axis: int = 2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, block, axis)


def _scores(q: Array, k: Array, seg: Array, pair: tuple, block: int) -> Array:
    """Masked scores [B, H, t, s] of one pair of blocks, in float32 or wider."""
    i, j = (n * block for n in pair)
    q_BHtX = _rows(q, i, block)
    k_BHsX = _rows(k, j, block)
    wide = sum_dtype(q.dtype)
    scores_BHts = jnp.einsum("bhtd,bhsd->bhts", q_BHtX, k_BHsX, preferred_element_type=wide)

    # A token sees itself and earlier ones, of its own segment.
    places = jnp.arange(block, dtype=jnp.int32)
    earlier_ts = (i + places)[:, None] >= (j + places)[None, :]
    same_Bts = _rows(seg, i, block, 1)[:, :, None] == _rows(seg, j, block, 1)[:, None, :]
    return jnp.where((earlier_ts[None] & same_Bts)[:, None], scores_BHts, -jnp.inf)


def softmax_step(carry: tuple, s: Array, weighted: Callable[[Array], Array]) -> tuple:
    """Add a block of scores to a running softmax.

    Args:
        carry: (sum of weighted values [*n, V], largest score [*n], sum of weights [*n]) of the
            blocks so far.
        s: scores [*n, S]; a row's largest so far must be finite, or become so.
        weighted: the sum of the block's values by weights [*n, S].
    """
    out, top, total = carry
    new_top = jnp.maximum(top, s.max(-1))
    p = jnp.exp(s - new_top[..., None])
    # What is summed so far counts from the old largest score, and now counts from the new one.
    keep = jnp.exp(top - new_top)
    return out * keep[..., None] + weighted(p), new_top, total * keep + p.sum(-1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, seg: Array, block: int) -> tuple[Array, Array]:
    return _attend_fwd(q, k, v, seg, block)[0]


def _attend_fwd(
    q: Array, k: Array, v: Array, seg: Array, block: int
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    shape = q.shape[:3]
    wide = sum_dtype(q.dtype)

    def visit(carry: tuple, pair: tuple) -> tuple[tuple, None]:
        i, j = (n * block for n in pair)

        def weighted(p_BHts: Array) -> Array:
            p_BHts = p_BHts.astype(v.dtype)
            v_BHsV = _rows(v, j, block)
            return jnp.einsum("bhts,bhsv->bhtv", p_BHts, v_BHsV, preferred_element_type=wide)

        # Add the pair's scores to the softmax of the query block's rows.
        old = tuple(_rows(x, i, block) for x in carry)
        new = softmax_step(old, _scores(q, k, seg, pair, block), weighted)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=2)
        return tuple(put(x, y) for x, y in zip(carry, new, strict=True)), None

    # Per row: the weighted sum of values, the largest score, and the sum of weights.
    start = (
        jnp.zeros((*shape, v.shape[-1]), wide),
        jnp.full(shape, -jnp.inf, wide),
        jnp.zeros(shape, wide),
    )
    (out, top, total), _ = jax.lax.scan(visit, start, _pairs(shape[2] // block))

    # The gradient needs the output and the log-sums, and computes the scores again.
    out = (out / total[..., None]).astype(v.dtype)
    out, lse = checkpoint_name((out, top + jnp.log(total)), RESULTS)
    return (out, top), (q, k, v, seg, out, lse)


def _attend_bwd(
    block: int, saved: tuple[Array, ...], d_results: tuple[Array, Any]
) -> tuple[Array, Array, Array, None]:
    """With p the softmax: dv = pᵀ do, ds = p ⊙ (do vᵀ − δ), dq = ds k, dk = dsᵀ q."""
    q, k, v, seg, out, lse = saved
    d_out, _ = d_results  # the maxima take no gradient
    wide = sum_dtype(q.dtype)
    # The softmax's own term δ, a number a row.
    delta_BHT = (d_out.astype(wide) * out.astype(wide)).sum(-1)

    def visit(grads: tuple, pair: tuple) -> tuple[tuple, None]:
        dq, dk, dv = grads
        i, j = (n * block for n in pair)
        q_BHtX = _rows(q, i, block)
        do_BHtV = _rows(d_out, i, block)
        k_BHsX = _rows(k, j, block)
        v_BHsV = _rows(v, j, block)

        # The softmax again, from the saved log-sums, and its scores' gradient.
        scores_BHts = _scores(q, k, seg, pair, block)
        p_BHts = jnp.exp(scores_BHts - _rows(lse, i, block)[..., None])
        dp_BHts = jnp.einsum("bhtv,bhsv->bhts", do_BHtV, v_BHsV, preferred_element_type=wide)
        ds_BHts = (p_BHts * (dp_BHts - _rows(delta_BHT, i, block)[..., None])).astype(q.dtype)

        def add(total: Array, start: Array, equation: str, a: Array, b: Array) -> Array:
            part = jnp.einsum(equation, a, b, preferred_element_type=wide)
            new = _rows(total, start, block) + part
            return jax.lax.dynamic_update_slice_in_dim(total, new, start, 2)

        dq = add(dq, i, "bhts,bhsd->bhtd", ds_BHts, k_BHsX)
        dk = add(dk, j, "bhts,bhtd->bhsd", ds_BHts, q_BHtX)
        dv = add(dv, j, "bhts,bhtv->bhsv", p_BHts.astype(v.dtype), do_BHtV)
        return (dq, dk, dv), None

    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(visit, start, _pairs(q.shape[2] // block))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_fwd, _attend_bwd)
