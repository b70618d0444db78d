"""Multi-head latent attention, in its two equal forms.

Training and prefill expand the latent into per-head keys and values. Decoding absorbs the up-projections into
the query and the output instead, so that every head reads one cached row [c_kv, k_rope] a token.
Source: DeepSeek-V2 report, section 2.1; the released reference's "naive" and "absorb" paths.

The up-projections stand as [H, N, C] and [H, V, C], the released order: both forms then multiply with them as they lie.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.cached_attention import Stored, cached_attention
from dsv3_jax.ops.products import few_rows_by_heads


def expand(
    c_kv: Float[Array, "B T C"], k_rope: Float[Array, "B T R"], w_uk: Float[Array, "H N C"], w_uv: Float[Array, "H V C"]
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H V"]]:
    """Per-head keys [k_nope, k_rope], K = N + R, and values; k_rope is repeated for each head."""
    k_nope = jnp.einsum("btc,hnc->bthn", c_kv, w_uk)
    k_heads = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, k_heads], axis=-1), jnp.einsum("btc,hvc->bthv", c_kv, w_uv)


def expanded(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    c_kv: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    w_uk: Float[Array, "H N C"],
    w_uv: Float[Array, "H V C"],
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
    if summed:
        k_nope = jnp.einsum("btc,hnc->bthn", c_kv, w_uk)
        v = jnp.einsum("btc,hvc->bthv", c_kv, w_uv)
        return causal_attention(q_nope, k_nope, v, scale=scale, q_rope=q_rope, k_rope=k_rope, segment_ids=segment_ids)
    k, v = expand(c_kv, k_rope, w_uk, w_uv)
    return causal_attention(jnp.concatenate([q_nope, q_rope], axis=-1), k, v, scale=scale, segment_ids=segment_ids)


def absorbed(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    stored: Stored,
    layer: Int[Array, ""],
    last: Int[Array, "B T"],
    w_uk: Float[Array, "H N C"],
    w_uv: Float[Array, "H V C"],
    *,
    scale: float,
    summed: bool = False,
    block: int | None = None,
) -> Float[Array, "B T H V"]:
    """MLA in latent space; per-head keys and values are never formed.

    scores = [q_nope W_ukᵀ, q_rope] · [c_kv, k_rope];  out = (softmax(scale · scores) · c_kv) W_uv

    Args:
        q_nope, q_rope: queries of the T tokens being decoded.
        stored, layer: the cache, G = 1 and rows [c_kv, k_rope], the T new ones written in already; which layer of it.
        last: the last cached row that each query may see.
        summed: add two products, otherwise one product of the concatenated halves.
        block: rows visited at a time, see `cached_attention`.
    """
    batch, length, heads, _ = q_nope.shape
    q = jnp.concatenate([few_rows_by_heads(q_nope, w_uk), q_rope], axis=-1)
    out = cached_attention(
        q.reshape(batch, 1, length * heads, -1),
        stored,
        layer,
        jnp.repeat(last, heads, axis=1),
        parts=(w_uk.shape[-1], q_rope.shape[-1]),
        shared=True,
        scale=scale,
        summed=summed,
        block=block,
    )
    return few_rows_by_heads(out.reshape(batch, length, heads, -1), w_uv, turned=True)
