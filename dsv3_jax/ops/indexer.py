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
from dsv3_jax.ops.quantize import dequantize_rows, quantize_rows


def choose(
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
    Returns: int32; -1 stands behind the slots of a query that sees fewer than k.

    Example:
        >>> q, w, last = jnp.ones((1, 3, 1, 1)), jnp.ones((1, 3, 1)), jnp.array([[0, 1, 2]])
        >>> keys = Stored(jnp.array([5.0, 9.0, 7.0]).reshape(1, 1, 3, 1), None)
        >>> choose(q, w, keys, last, k=2)[0].tolist()
        [[0, -1], [1, 0], [1, 2]]
    """
    rows, scales = jax.tree.map(lambda x: x[:, 0], keys)

    def one(q, w, last, segment):
        s = (score or index_scores)(q, w, rows, scales)
        s = jnp.where(s == 0, 0.0, s)  # a sort may put -0 below 0
        best, ids = jax.lax.top_k(
            jnp.where(visible(rows.shape[1], last, segment, segment_ids), s, -jnp.inf), k
        )
        return jnp.where(best == -jnp.inf, -1, ids)

    return by_query(one, most // (q.shape[0] * q.shape[2] * rows.shape[1]), q, w, last, segment_ids)


def index_scores(
    q: Float[Array, "B I X"],
    w: Float[Array, "B I"],
    rows: Array,
    scales: Float[Array, "B S 1"] | None = None,
) -> Float[Array, "B S"]:
    """Score one query a sequence on S index keys [B, S, X], which may end in zeros; in float32.

    Args: scales: of keys in 8 bits. A scale is positive, so it may wait until after the ReLU.
    """
    wide, (heads, dim) = np.promote_types(q.dtype, np.float32), q.shape[1:]
    q = jnp.pad(scaled(q, dim**-0.5), [(0, 0), (0, 0), (0, rows.shape[-1] - dim)])
    products = jnp.einsum("bix,bsx->bis", q, rows.astype(q.dtype), preferred_element_type=wide)
    s = jnp.einsum("bi,bis->bs", scaled(w.astype(wide), heads**-0.5), jax.nn.relu(products))
    return s if scales is None else s * scales[..., 0].astype(wide)


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

    The backward pass computes each block again.
    """
    by_time = jax.tree.map(lambda x: x.swapaxes(0, 1), queries)
    block = max(block, 1)
    length = jax.tree.leaves(queries)[0].shape[1]
    if length == 1:
        made = jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], by_time)))
    elif length <= block:
        made = jax.vmap(f)(*by_time)
    else:
        made = jax.lax.map(jax.checkpoint(lambda x: f(*x)), by_time, batch_size=block)
    return jax.tree.map(lambda x: x.swapaxes(0, 1), made)


def divergence(
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
        ids: the tokens that both distributions are over, from `choose`; None means all that a query
            may see.
        last, segment_ids: as in `choose`.

    Example:
        >>> one = jnp.zeros((1, 2, 1, 1))  # equal scores on both sides
        >>> w, last = one[..., 0], jnp.array([[0, 1]])
        >>> divergence(one, w, one[..., 0], [one], [one[..., 0]], None, last, scale=1.0)
        Array([[0., 0.]], dtype=float32)
    """
    queries, keys = jax.lax.stop_gradient((tuple(queries), tuple(keys)))
    wide = np.promote_types(q.dtype, np.float32)
    slots = index_keys.shape[1]

    def one(q, w, queries, ids, last, segment):
        some = index_keys
        own = keys
        seen = visible(slots, last, segment, segment_ids)
        if ids is not None:
            seen = ids >= 0
            place = jnp.maximum(ids, 0)[..., None]
            some, own = jax.tree.map(lambda x: jnp.take_along_axis(x, place, 1), (index_keys, keys))
        products = zip(queries, own, strict=True)
        logits = sum(
            jnp.einsum("bhx,bsx->bhs", scaled(a, scale), b, preferred_element_type=wide)
            for a, b in products
        )
        p = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1).mean(1)
        log_q = jax.nn.log_softmax(jnp.where(seen, index_scores(q, w, some), -jnp.inf), axis=-1)
        positive = seen & (p > 0)
        difference = jnp.log(jnp.where(positive, p, 1.0)) - jnp.where(seen, log_q, 0.0)
        return jnp.where(positive, p * difference, 0.0).sum(-1)

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
    return rotated + jax.lax.stop_gradient(dequantize_rows(rows, scales, x.dtype) - rotated)
