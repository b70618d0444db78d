"""Causal attention whose memory grows with length, not with its square.

Queries and keys are cut into blocks. Only pairs of blocks on or below the diagonal are visited, and
each pair's scores live for one step of a loop. Running maxima and sums put a row's softmax together
from its blocks (arXiv 2112.05682, 2205.14135). The backward pass visits the same pairs again, from
the saved row sums. Key and value widths may differ, as in MLA (192 and 128 in V3).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

# Names for `jax.checkpoint`.
RESULTS = "attention"  # what the gradient needs of the forward pass: output, log-sums
QUERIES = "queries"  # as a kernel reads them, where it has them in an order of its own
MAX_SCORES = 1 << 21  # numbers in the scores of one pair of blocks: 8 MB in float32
# the same for devices with more memory, where starting a product costs more: 128 MB in float32
LARGE_SCORES = 1 << 25


def causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
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
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
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
    out, top = _attend(q, k, _heads_first(repeat_heads(v, heads), block), segment_ids, block)
    return out.swapaxes(1, 2)[:, :length], jax.lax.stop_gradient(top).swapaxes(1, 2)[:, :length]


def row_maxima(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
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
    batch, length, heads, _ = q.shape
    q, k, seg, block = _in_blocks(*jax.lax.stop_gradient((q, k)), scale, segment_ids, block, large)

    def visit(top, pair):
        i = pair[0] * block
        new = jnp.maximum(_rows(top, i, block), _scores(q, k, seg, pair, block).max(-1))
        return jax.lax.dynamic_update_slice_in_dim(top, new, i, 2), None

    top = jnp.full((batch, heads, q.shape[2]), -jnp.inf, np.promote_types(q.dtype, np.float32))
    top, _ = jax.lax.scan(visit, top, _pairs(q.shape[2] // block))
    return top.swapaxes(1, 2)[:, :length]


def _in_blocks(q, k, scale, segment_ids, block, large):
    """(Scaled queries, keys [B, H, T, K], segments [B, T], the block), padded to whole blocks."""
    batch, length, heads, _ = q.shape
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    block = min(block or block_size(batch * heads, length, large=large), length)
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, -length % block)), constant_values=-1)
    return (
        _heads_first(scaled(q, scale), block),
        _heads_first(repeat_heads(k, heads), block),
        segment_ids,
        block,
    )


def _heads_first(x, block):
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
    wide = np.promote_types(q.dtype, np.float32)
    return (q.astype(wide) * jnp.asarray(scale, wide)).astype(q.dtype)


def repeat_heads(x: Float[Array, "B T G _"], heads: int) -> Float[Array, "B T H _"]:
    """Repeat key or value heads, each `heads` / G times in a row: one for each query head."""
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def _pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Block pairs (query, key) on and below the diagonal; a query's diagonal pair comes first.

    A row always sees itself there, so its running maximum is finite from the first visit.
    """
    pairs = [(i, j) for i in range(blocks) for j in range(i, -1, -1)]
    return np.array([p[0] for p in pairs], np.int32), np.array([p[1] for p in pairs], np.int32)


def _rows(x: Array, start: Array, block: int, axis: int = 2) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, block, axis)


def _scores(q, k, seg, pair, block):
    """Masked scores [B, H, block, block] of one pair of blocks, in float32 or wider."""
    i, j = (n * block for n in pair)
    wide = np.promote_types(q.dtype, np.float32)
    s = jnp.einsum(
        "bhtd,bhsd->bhts", _rows(q, i, block), _rows(k, j, block), preferred_element_type=wide
    )
    t, u = (start + jnp.arange(block, dtype=jnp.int32) for start in (i, j))
    same = _rows(seg, i, block, 1)[:, :, None] == _rows(seg, j, block, 1)[:, None, :]
    return jnp.where(((t[:, None] >= u[None, :])[None] & same)[:, None], s, -jnp.inf)


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
    keep = jnp.exp(top - new_top)
    return out * keep[..., None] + weighted(p), new_top, total * keep + p.sum(-1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, seg, block):
    return _attend_fwd(q, k, v, seg, block)[0]


def _attend_fwd(q, k, v, seg, block):
    shape = q.shape[:3]
    wide = np.promote_types(q.dtype, np.float32)

    def visit(carry, pair):
        i, j = (n * block for n in pair)

        def weighted(p):
            return jnp.einsum(
                "bhts,bhsv->bhtv",
                p.astype(v.dtype),
                _rows(v, j, block),
                preferred_element_type=wide,
            )

        old = tuple(_rows(x, i, block) for x in carry)
        new = softmax_step(old, _scores(q, k, seg, pair, block), weighted)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=2)
        return tuple(put(x, y) for x, y in zip(carry, new, strict=True)), None

    start = (
        jnp.zeros((*shape, v.shape[-1]), wide),
        jnp.full(shape, -jnp.inf, wide),
        jnp.zeros(shape, wide),
    )
    (out, top, total), _ = jax.lax.scan(visit, start, _pairs(shape[2] // block))
    out = (out / total[..., None]).astype(v.dtype)
    out, lse = checkpoint_name((out, top + jnp.log(total)), RESULTS)
    return (out, top), (q, k, v, seg, out, lse)


def _attend_bwd(block, saved, d_results):
    q, k, v, seg, out, lse = saved
    d_out, _ = d_results  # the maxima take no gradient
    wide = np.promote_types(q.dtype, np.float32)
    # the softmax's own term, a number a row
    delta = (d_out.astype(wide) * out.astype(wide)).sum(-1)

    def visit(grads, pair):
        dq, dk, dv = grads
        i, j = (n * block for n in pair)
        q_i, do_i, k_j, v_j = (
            _rows(x, start, block) for x, start in ((q, i), (d_out, i), (k, j), (v, j))
        )
        p = jnp.exp(_scores(q, k, seg, pair, block) - _rows(lse, i, block)[..., None])
        dp = jnp.einsum("bhtv,bhsv->bhts", do_i, v_j, preferred_element_type=wide)
        ds = (p * (dp - _rows(delta, i, block)[..., None])).astype(q.dtype)

        def add(total, start, spec, a, b):
            part = _rows(total, start, block) + jnp.einsum(spec, a, b, preferred_element_type=wide)
            return jax.lax.dynamic_update_slice_in_dim(total, part, start, 2)

        dq = add(dq, i, "bhts,bhsd->bhtd", ds, k_j)
        dk = add(dk, j, "bhts,bhtd->bhsd", ds, q_i)
        dv = add(dv, j, "bhts,bhtv->bhsv", p.astype(v.dtype), do_i)
        return (dq, dk, dv), None

    start = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    grads, _ = jax.lax.scan(visit, start, _pairs(q.shape[2] // block))
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), None


_attend.defvjp(_attend_fwd, _attend_bwd)
