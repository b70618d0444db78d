"""The lightning indexer of sparse attention: which k tokens a query attends to, and its teacher.

    score_ts = Σ_i w_ti · I^-1/2 · relu(X^-1/2 q_ti · k_s),  in float32, for tokens s that t may see

All heads of attention share the k tokens of the largest scores. A few queries are scored at a time,
so memory grows with length, not with its square.
Source: DeepSeek-V3.2 report, section 2.1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import MAX_SCORES, scaled
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.dtypes import sum_dtype
from dsv3_jax.ops.quantize import dequantize_rows, quantize_rows


def index_choose(
    q: Float[Array, "B T I X"],
    w: Float[Array, "B T I"],
    keys: Stored,
    last: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    k: int,
    most: int = MAX_SCORES,
    score: Callable[..., Array] | None = None,
) -> Int[Array, "B T k"]:
    """Choose the k slots of the largest scores for each query, best first; a tie goes to the lower.

    Args:
        q, w: index queries, and the weights of their heads.
        keys: index keys of S ≥ k slots and one head.
        last: the last slot that each query may see.
        segment_ids: a query sees its own segment only, and slots are its tokens; None means one
            segment.
        most: scores of heads that are held at a time.
        score: computes `index_scores`. None means that function.
    Returns: int32. A query that sees fewer than k slots has -1 after them.

    Example:
        >>> q, w, last = jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1)), jnp.array([[0, 1, 2]])
        >>> keys = Stored(jnp.array([5.0, 9.0, 7.0]).reshape(1, 1, 3, 1), None)
        >>> index_choose(q, w, keys, last, k=2)[0].tolist()
        [[0, -1], [1, 0], [1, 2]]
    """
    rows, scales = jax.tree.map(lambda x: x[:, 0], keys)
    slots = rows.shape[1]

    def one(q: Array, w: Array, last: Array, segment: Array | None) -> Array:
        scores_BS = (score or index_scores)(q, w, rows, scales)
        scores_BS = jnp.where(scores_BS == 0, 0.0, scores_BS)  # a sort may put -0 below 0
        seen_BS = visible(slots, last, segment, segment_ids)
        best, ids = jax.lax.top_k(jnp.where(seen_BS, scores_BS, -jnp.inf), k)
        return jnp.where(best == -jnp.inf, -1, ids)

    held = q.shape[0] * q.shape[2] * slots  # scores of one query a sequence
    return by_query(one, most // held, q, w, last, segment_ids)


def index_scores(
    q: Float[Array, "B I X"],
    w: Float[Array, "B I"],
    rows: Array,
    scales: Float[Array, "B S 1"] | None = None,
) -> Float[Array, "B S"]:
    """Score one query a sequence on S index keys [B, S, X], which may end in zeros; in float32.

    Args: scales: of keys in 8 bits. A scale is positive, so it may wait until after the ReLU.
    """
    heads, dim = q.shape[1:]
    wide = sum_dtype(q.dtype)
    q = jnp.pad(scaled(q, dim**-0.5), [(0, 0), (0, 0), (0, rows.shape[-1] - dim)])
    products_BIS = jnp.einsum("bix,bsx->bis", q, rows.astype(q.dtype), preferred_element_type=wide)

    w = scaled(w.astype(wide), heads**-0.5)
    scores_BS = jnp.einsum("bi,bis->bs", w, jax.nn.relu(products_BIS))
    return scores_BS if scales is None else scores_BS * scales[..., 0].astype(wide)


def visible(
    slots: int,
    last: Int[Array, " B"],
    segment: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B S"] | None,
) -> Array:
    """bool [B, S]: the slots that one query of each sequence may see."""
    seen = jnp.arange(slots, dtype=jnp.int32)[None] <= last[:, None]
    if segment is None or segment_ids is None:
        return seen
    return seen & (segment_ids == segment[:, None])


def by_query(f: Callable, block: int, *queries: Any) -> Any:
    """Compute f of one query a sequence, for all queries [B, T, …]: `block` of them at once.

    If there are several blocks, the backward pass computes each again.
    """
    by_time = jax.tree.map(_swapped, queries)
    length = jax.tree.leaves(queries)[0].shape[1]
    block = max(block, 1)

    if length == 1:
        only = jax.tree.map(lambda x: x[0], by_time)
        made = jax.tree.map(lambda x: x[None], f(*only))
    elif length <= block:
        made = jax.vmap(f)(*by_time)
    else:
        made = jax.lax.map(jax.checkpoint(lambda x: f(*x)), by_time, batch_size=block)
    return jax.tree.map(_swapped, made)


def _swapped(x: Array) -> Array:
    return x.swapaxes(0, 1)


def divergence(  # noqa: PLR0913 - two distributions
    q: Float[Array, "B T I X"],
    w: Float[Array, "B T I"],
    index_keys: Float[Array, "B S X"],
    queries: Sequence[Float[Array, "B T H _"]],
    keys: Sequence[Float[Array, "B S _"]],
    ids: Int[Array, "B T k"] | None,
    last: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float,
) -> Float[Array, "B T"]:
    """What the indexer learns from: a query's KL(p ‖ softmax(score)), p attention's mean of heads.

    Takes a gradient in q, w and index_keys only.

    Args:
        queries, keys: of attention; all heads share the keys. Scores are the sum of the products.
        ids: the tokens that both distributions are over, from `index_choose`; None means all that a
            query may see.
        last, segment_ids: as in `index_choose`.

    Example:
        >>> one = jnp.zeros((1, 2, 1, 1))  # equal scores on both sides
        >>> w, last = one[..., 0], jnp.array([[0, 1]])
        >>> divergence(one, w, one[..., 0], [one], [one[..., 0]], None, last, scale=1.0)
        Array([[0., 0.]], dtype=float32)
    """
    queries, keys = jax.lax.stop_gradient((tuple(queries), tuple(keys)))
    wide = sum_dtype(q.dtype)
    slots = index_keys.shape[1]

    def one(
        q: Array,
        w: Array,
        queries: tuple[Array, ...],
        ids: Array | None,
        last: Array,
        segment: Array | None,
    ) -> Array:
        # The tokens that both distributions are over: all that are seen, or the chosen ones.
        of_indexer, of_attention = index_keys, keys
        seen_BS = visible(slots, last, segment, segment_ids)
        if ids is not None:
            seen_BS = ids >= 0
            place = jnp.maximum(ids, 0)[..., None]
            of_indexer, of_attention = jax.tree.map(
                lambda x: jnp.take_along_axis(x, place, 1), (index_keys, keys)
            )

        # p: attention's weights, the mean over its heads.
        logits_BHS = sum(
            jnp.einsum("bhx,bsx->bhs", scaled(a, scale), b, preferred_element_type=wide)
            for a, b in zip(queries, of_attention, strict=True)
        )
        weights_BHS = jax.nn.softmax(jnp.where(seen_BS[:, None], logits_BHS, -jnp.inf), axis=-1)
        p_BS = weights_BHS.mean(1)

        # The indexer's distribution i: the softmax of its scores.
        scores_BS = index_scores(q, w, of_indexer)
        log_i_BS = jax.nn.log_softmax(jnp.where(seen_BS, scores_BS, -jnp.inf), axis=-1)

        # p ln(p / i), which is 0 where p is 0.
        positive = seen_BS & (p_BS > 0)
        log_p_BS = jnp.log(jnp.where(positive, p_BS, 1.0))
        difference = log_p_BS - jnp.where(seen_BS, log_i_BS, 0.0)
        return jnp.where(positive, p_BS * difference, 0.0).sum(-1)

    # Scores of one query a sequence.
    heads = max(q.shape[2], queries[0].shape[2])
    held = q.shape[0] * heads * (slots if ids is None else ids.shape[2])
    return by_query(one, MAX_SCORES // held, q, w, queries, ids, last, segment_ids)


def round_rotated(x: Float[Array, "*n X"], power_of_two: bool) -> Float[Array, "*n X"]:
    """Rotate by a Hadamard matrix times X^-1/2, and round rows to e4m3, as the released code does.

    Rotating queries and keys changes no product. The gradient is that of the rotation alone.

    Args: power_of_two: scales are powers of two (UE8M0).

    Example:
        >>> round_rotated(jnp.array([3.0, 1.0]), power_of_two=False).round(2)  # (4, 2) / √2
        Array([2.83, 1.41], dtype=float32)
    """
    hadamard = np.full((1, 1), x.shape[-1] ** -0.5)
    while len(hadamard) < x.shape[-1]:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rotated = jnp.einsum("...x,xy->...y", x, jnp.asarray(hadamard, x.dtype))

    rows, scales = quantize_rows(rotated, jnp.float8_e4m3fn)
    if power_of_two:
        scales = jnp.exp2(jnp.ceil(jnp.log2(scales)))
        rows = (rotated / scales.astype(x.dtype)).astype(jnp.float8_e4m3fn)

    # The rounded numbers, with the gradient of the rotated ones.
    return rotated + jax.lax.stop_gradient(dequantize_rows(rows, scales, x.dtype) - rotated)
