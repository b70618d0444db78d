"""Causal attention whose memory grows with length, not with its square.

Queries and keys are cut into blocks, and only pairs of blocks on or below the diagonal are visited; each pair's
scores live for one step of a loop. The softmax over a row is put together from its blocks by running maxima and
sums (arXiv 2112.05682, 2205.14135). The backward pass visits the same pairs again from the saved row sums.
Key and value widths may differ, as in MLA (192 and 128 in V3).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.cpu import calls


def causal_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    *,
    scale: float,
    q_rope: Float[Array, "B T H R"] | None = None,
    k_rope: Float[Array, "B T R"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    block: int | None = None,
) -> Float[Array, "B T H V"]:
    """softmax(scale · q kᵀ, over earlier tokens of the same segment) v, softmax in float32 (float64 stays).

    Args:
        q, k, v: queries, keys, values.
        scale: what scores are multiplied by.
        q_rope, k_rope: a second pair of features whose product is added to the score; its keys are shared by
            all heads and never repeated for each.
        segment_ids: tokens see their own segment only; None is one segment.
        block: rows and columns visited at a time; None: the native kernel where it serves, else 128, and more in long
            texts of few heads and sequences.
    Returns: [B, T, H, V] in v's dtype.
    """
    batch, length, heads, _ = q.shape
    if q_rope is None and block is None and calls.serves(q.dtype, k.dtype, v.dtype):
        ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
        return _attend_natively(q * jnp.asarray(scale, q.dtype), k, v, ids)
    if q_rope is None or k_rope is None:
        q_rope = jnp.zeros((batch, length, heads, 0), q.dtype)
        k_rope = jnp.zeros((batch, length, 0), k.dtype)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    block = min(block or _block(batch * heads, length), length)
    pad = -length % block

    def heads_first(x):
        return jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)

    k_rope = jnp.pad(k_rope, ((0, 0), (0, pad), (0, 0)))
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, pad)), constant_values=-1)
    # The scale goes on the queries: a [T, K] product in place of a [T, T] one.
    q, q_rope = q * jnp.asarray(scale, q.dtype), q_rope * jnp.asarray(scale, q_rope.dtype)
    out = _attend(heads_first(q), heads_first(q_rope), heads_first(k), k_rope, heads_first(v), segment_ids, block)
    return out.swapaxes(1, 2)[:, :length]


@jax.custom_vjp
def _attend_natively(q, k, v, segment_ids):
    return calls.causal_attention(q, k, v, segment_ids)[0]


def _attend_natively_fwd(q, k, v, segment_ids):
    out, lse = calls.causal_attention(q, k, v, segment_ids)
    return out, (q, k, v, segment_ids, out, lse)


def _attend_natively_bwd(saved, d_out):
    return *calls.causal_attention_gradients(*saved, d_out), None


_attend_natively.defvjp(_attend_natively_fwd, _attend_natively_bwd)


def _block(products: int, length: int) -> int:
    """Larger blocks multiply faster, until one visit's scores are too many for a cache; 8 MB measured best."""
    block = 128
    while 16 * block <= length and products * (2 * block) ** 2 <= 1 << 21:
        block *= 2
    return block


def _pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """The block pairs (query, key) on and below the diagonal, a query's diagonal first.

    On its diagonal a row always sees itself, so the running maximum is finite from the first visit.
    """
    pairs = [(i, j) for i in range(blocks) for j in range(i, -1, -1)]
    return np.array([p[0] for p in pairs], np.int32), np.array([p[1] for p in pairs], np.int32)


def _rows(x: Array, index, block: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)


def _scores(q, q_rope, k, k_rope, seg_q, seg_k, i, j, block):
    """Masked scores [B, H, block, block] of one pair, in float32 or wider."""
    wide = np.promote_types(q.dtype, np.float32)
    s = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=wide)
    if q_rope.shape[-1]:
        s = s + jnp.einsum("bhtr,bsr->bhts", q_rope, k_rope, preferred_element_type=wide)
    t = i * block + jnp.arange(block, dtype=jnp.int32)
    u = j * block + jnp.arange(block, dtype=jnp.int32)
    seen = (t[:, None] >= u[None, :])[None] & (seg_q[:, :, None] == seg_k[:, None, :])
    return jnp.where(seen[:, None], s, -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, q_rope, k, k_rope, v, seg, block):
    return _attend_fwd(q, q_rope, k, k_rope, v, seg, block)[0]


def _attend_fwd(q, q_rope, k, k_rope, v, seg, block):
    batch, heads, length, _ = q.shape
    wide = np.promote_types(q.dtype, np.float32)
    out = jnp.zeros((batch, heads, length, v.shape[-1]), wide)
    top = jnp.full((batch, heads, length), -jnp.inf, wide)
    total = jnp.zeros((batch, heads, length), wide)

    def visit(carry, pair):
        out, top, total = carry
        i, j = pair
        q_i, qr_i, seg_i = (_rows(x, i, block, a) for x, a in ((q, 2), (q_rope, 2), (seg, 1)))
        k_j, kr_j, v_j, seg_j = (_rows(x, j, block, a) for x, a in ((k, 2), (k_rope, 1), (v, 2), (seg, 1)))
        s = _scores(q_i, qr_i, k_j, kr_j, seg_i, seg_j, i, j, block)
        old_top = _rows(top, i, block, 2)
        new_top = jnp.maximum(old_top, s.max(-1))
        p = jnp.exp(s - new_top[..., None])
        keep = jnp.exp(old_top - new_top)
        o = _rows(out, i, block, 2) * keep[..., None] + jnp.einsum(
            "bhts,bhsv->bhtv", p.astype(v.dtype), v_j, preferred_element_type=wide
        )
        t = _rows(total, i, block, 2) * keep + p.sum(-1)
        at = i * block
        return (
            jax.lax.dynamic_update_slice_in_dim(out, o, at, 2),
            jax.lax.dynamic_update_slice_in_dim(top, new_top, at, 2),
            jax.lax.dynamic_update_slice_in_dim(total, t, at, 2),
        ), None

    (out, top, total), _ = jax.lax.scan(visit, (out, top, total), _pairs(length // block))
    out = (out / total[..., None]).astype(v.dtype)
    return out, (q, q_rope, k, k_rope, v, seg, out, top + jnp.log(total))


def _attend_bwd(block, saved, d_out):
    q, q_rope, k, k_rope, v, seg, out, lse = saved
    wide = np.promote_types(q.dtype, np.float32)
    delta = (d_out.astype(wide) * out.astype(wide)).sum(-1)  # the softmax's own term, a number a row
    start = tuple(jnp.zeros(x.shape, wide) for x in (q, q_rope, k, k_rope, v))

    def visit(grads, pair):
        dq, dqr, dk, dkr, dv = grads
        i, j = pair
        q_i, qr_i, do_i = (_rows(x, i, block, 2) for x in (q, q_rope, d_out))
        k_j, kr_j, v_j = _rows(k, j, block, 2), _rows(k_rope, j, block, 1), _rows(v, j, block, 2)
        s = _scores(q_i, qr_i, k_j, kr_j, _rows(seg, i, block, 1), _rows(seg, j, block, 1), i, j, block)
        p = jnp.exp(s - _rows(lse, i, block, 2)[..., None])
        dp = jnp.einsum("bhtv,bhsv->bhts", do_i, v_j, preferred_element_type=wide)
        ds = (p * (dp - _rows(delta, i, block, 2)[..., None])).astype(q.dtype)
        p = p.astype(v.dtype)

        def add(total, index, axis, spec, a, b):
            part = _rows(total, index, block, axis) + jnp.einsum(spec, a, b, preferred_element_type=wide)
            return jax.lax.dynamic_update_slice_in_dim(total, part, index * block, axis)

        dq = add(dq, i, 2, "bhts,bhsd->bhtd", ds, k_j)
        dk = add(dk, j, 2, "bhts,bhtd->bhsd", ds, q_i)
        dv = add(dv, j, 2, "bhts,bhtv->bhsv", p, do_i)
        if q_rope.shape[-1]:
            dqr = add(dqr, i, 2, "bhts,bsr->bhtr", ds, kr_j)
            dkr = add(dkr, j, 1, "bhts,bhtr->bsr", ds, qr_i)
        return (dq, dqr, dk, dkr, dv), None

    grads, _ = jax.lax.scan(visit, start, _pairs(q.shape[2] // block))
    return *(g.astype(x.dtype) for g, x in zip(grads, (q, q_rope, k, k_rope, v), strict=True)), None


_attend.defvjp(_attend_fwd, _attend_bwd)
