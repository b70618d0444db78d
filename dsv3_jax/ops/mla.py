"""Multi-head latent attention, in its two equal forms.

Training and prefill expand the latent into per-head keys and values. Decoding absorbs the up-projections into
the query and the output instead, so that every head reads one cached row [c_kv, k_rope] a token.
Source: DeepSeek-V2 report, section 2.1; the released reference's "naive" and "absorb" paths.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.ops.attention import causal_attention


def expanded(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    w_uk: Float[Array, "C H N"],
    w_uv: Float[Array, "C H V"],
    *,
    scale: float,
    segment_ids: Int[Array, "B T"] | None = None,
    summed: bool = False,
) -> Float[Array, "B T H V"]:
    """Causal MLA with per-head keys and values: softmax(scale · (q_nope·k_nope + q_rope·k_rope)) v.

    Args:
        q_nope, q_rope: the query's halves, q_rope rotated.
        c_kv, k_rope: normed latent, and the rotated key shared by all heads.
        w_uk, w_uv: up-projections.
        summed: add two products; otherwise the halves are concatenated and k_rope repeated for each head, which
            is one larger product a head.
    """
    k_nope = jnp.einsum("btc,chn->bthn", c_kv, w_uk)
    v = jnp.einsum("btc,chv->bthv", c_kv, w_uv)
    if summed:
        return causal_attention(q_nope, k_nope, v, scale=scale, q_rope=q_rope, k_rope=k_rope, segment_ids=segment_ids)
    k_heads = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
    return causal_attention(
        jnp.concatenate([q_nope, q_rope], axis=-1),
        jnp.concatenate([k_nope, k_heads], axis=-1),
        v,
        scale=scale,
        segment_ids=segment_ids,
    )


def absorbed(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    cache: Float[Array, "B S CR"],
    valid: Bool[Array, "B T S"],
    w_uk: Float[Array, "C H N"],
    w_uv: Float[Array, "C H V"],
    *,
    scale: float,
    summed: bool = False,
) -> Float[Array, "B T H V"]:
    """MLA in latent space; per-head keys and values are never formed.

    scores = [q_nope W_ukᵀ, q_rope] · [c_kv, k_rope];  out = (softmax(scale · scores) · c_kv) W_uv

    Args:
        q_nope, q_rope: queries of the T tokens being decoded.
        cache: rows [c_kv, k_rope] of S = capacity tokens, the T new ones written in already.
        valid: which cached rows each query may see; at least one each.
        summed: add two products, otherwise one product of the concatenated halves.
    """
    latent_dim = w_uk.shape[0]
    c_kv = cache[..., :latent_dim]
    q_latent = jnp.einsum("bthn,chn->bthc", q_nope, w_uk)
    wide = np.promote_types(q_nope.dtype, np.float32)
    if summed:
        scores = jnp.einsum("bthc,bsc->bths", q_latent, c_kv, preferred_element_type=wide) + jnp.einsum(
            "bthr,bsr->bths", q_rope, cache[..., latent_dim:], preferred_element_type=wide
        )
    else:
        q = jnp.concatenate([q_latent, q_rope], axis=-1)
        scores = jnp.einsum("bthd,bsd->bths", q, cache, preferred_element_type=wide)
    scores = jnp.where(valid[:, :, None], scores * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q_nope.dtype)
    out = jnp.einsum("bths,bsc->bthc", weights, c_kv)
    return jnp.einsum("bthc,chv->bthv", out, w_uv)
