"""Multi-head latent attention: the algebra of its two equal forms.

Training and prefill expand the latent into keys and values for each head. Decoding absorbs the up-projections into the
query and the output instead, so every head reads one cached row [c_kv, k_rope] a token.
Source: DeepSeek-V2 report, section 2.1; the released reference's "naive" and "absorb" paths.

The up-projections have the released order, [H, N, C] and [H, V, C], so both forms multiply with them as they are.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.cached_attention import Stored, cached_attention
from dsv3_jax.ops.products import product_by_head


def expand(
    c_kv: Float[Array, "B T C"], k_rope: Float[Array, "B T R"], w_uk: Float[Array, "H N C"], w_uv: Float[Array, "H V C"]
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H V"]]:
    """Expand latents into each head's keys [k_nope, k_rope], K = N + R, and values; k_rope is repeated.

    Example:
        >>> c_kv, k_rope = jnp.array([[[2.0]]]), jnp.array([[[5.0]]])  # one token, C = R = 1
        >>> k, v = expand(c_kv, k_rope, w_uk=jnp.array([[[1.0]], [[3.0]]]), w_uv=jnp.array([[[4.0]], [[0.0]]]))
        >>> k.tolist(), v.tolist()  # of two heads
        ([[[[2.0, 5.0], [6.0, 5.0]]]], [[[[8.0], [0.0]]]])
    """
    w_uk, w_uv = w_uk.astype(c_kv.dtype), w_uv.astype(c_kv.dtype)
    k_nope = jnp.einsum("btc,hnc->bthn", c_kv, w_uk)
    return join_keys(k_nope, k_rope), jnp.einsum("btc,hvc->bthv", c_kv, w_uv)


def join_keys(k_nope: Float[Array, "B T H N"], k_rope: Float[Array, "B T R"]) -> Float[Array, "B T H K"]:
    """The keys of each head, [k_nope, k_rope]; k_rope is repeated.

    Example:
        >>> join_keys(jnp.array([[[[1.0], [2.0]]]]), jnp.array([[[5.0]]])).tolist()
        [[[[1.0, 5.0], [2.0, 5.0]]]]
    """
    k_heads = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, k_heads], axis=-1)


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
) -> Float[Array, "B T H V"]:
    """Causal MLA with keys and values for each head: softmax(scale · (q_nope·k_nope + q_rope·k_rope)) v.

    Args:
        q_nope, q_rope: the query's halves, q_rope rotated.
        c_kv, k_rope: normed latent, and the rotated key that all heads share.
        w_uk, w_uv: up-projections.
        scale, segment_ids: see `causal_attention`.

    Example:
        >>> q, c_kv, one = jnp.zeros((1, 2, 1, 1)), jnp.array([[[1.0], [3.0]]]), jnp.ones((1, 1, 1))
        >>> expanded(q, q, c_kv, jnp.zeros((1, 2, 1)), one, one, scale=1.0).ravel()  # equal scores: means of the values
        Array([1., 2.], dtype=float32)
    """
    k, v = expand(c_kv, k_rope, w_uk, w_uv)
    return causal_attention(jnp.concatenate([q_nope, q_rope], axis=-1), k, v, scale=scale, segment_ids=segment_ids)


def absorbed(
    q_nope: Float[Array, "B T H N"],
    q_rope: Float[Array, "B T H R"],
    latents: Stored,
    k_rope: Stored,
    last: Int[Array, "B T"],
    w_uk: Float[Array, "H N C"],
    w_uv: Float[Array, "H V C"],
    *,
    scale: float,
) -> Float[Array, "B T H V"]:
    """MLA in latent space; keys and values for each head are never formed.

    scores = q_nope W_uk · c_kv + q_rope · k_rope;  out = (softmax(scale · scores) · c_kv) W_uvᵀ

    Args:
        q_nope, q_rope: queries of T tokens.
        latents, k_rope: the cache, with one head; it has the rows of the T tokens too.
        last: the last cached row that each query may see.
        scale: see `cached_attention`.

    Example:
        >>> rows = jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)  # c_kv of two tokens
        >>> q, one = jnp.zeros((1, 1, 1, 1)), jnp.ones((1, 1, 1))
        >>> absorbed(q, q, Stored(rows, None), Stored(rows, None), jnp.array([[1]]), one, one, scale=1.0)  # the mean
        Array([[[[2.]]]], dtype=float32)
    """
    batch, length, heads, _ = q_nope.shape
    queries = [q.reshape(batch, 1, length * heads, -1) for q in (product_by_head(q_nope, w_uk), q_rope)]
    out = cached_attention(queries, [latents, k_rope], latents, jnp.repeat(last, heads, axis=1), scale=scale)
    return product_by_head(out.reshape(batch, length, heads, -1), w_uv, transposed=True)
