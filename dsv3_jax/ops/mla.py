"""Multi-head latent attention has two equal forms.

    expanded  k = [c_kv W_ukᵀ, k_rope], v = c_kv W_uvᵀ;  out = softmax(scale · q · k) v
    absorbed  scores = (q_nope W_uk) · c_kv + q_rope · k_rope;
              out = (softmax(scale · scores) · c_kv) W_uvᵀ

Training and prefill expand the latent into keys and values for each head. Decoding absorbs the
up-projections into the query and the output instead, so every head reads one cached row [c_kv,
k_rope] a token: see `model.attention.MLA`.
Source: DeepSeek-V2 report, section 2.1; the released reference's "naive" and "absorb" paths.

The up-projections have the released order, [H, N, C] and [H, V, C], so both forms multiply with
them as they are.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def expand(
    c_kv: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    w_uk: Float[Array, "H N C"],
    w_uv: Float[Array, "H V C"],
) -> tuple[Float[Array, "B T H X"], Float[Array, "B T H V"]]:
    """Expand latents into a head's keys [k_nope, k_rope], X = N + R, and values; k_rope repeats.

    Example:
        >>> c_kv, k_rope = jnp.array([[[2.0]]]), jnp.array([[[5.0]]])  # one token, C = R = 1
        >>> w_uk, w_uv = jnp.array([[[1.0]], [[3.0]]]), jnp.array([[[4.0]], [[0.0]]])
        >>> k, v = expand(c_kv, k_rope, w_uk, w_uv)
        >>> k.tolist(), v.tolist()  # of two heads
        ([[[[2.0, 5.0], [6.0, 5.0]]]], [[[[8.0], [0.0]]]])
    """
    w_uk, w_uv = w_uk.astype(c_kv.dtype), w_uv.astype(c_kv.dtype)
    k_nope = jnp.einsum("btc,hnc->bthn", c_kv, w_uk)
    return join_keys(k_nope, k_rope), jnp.einsum("btc,hvc->bthv", c_kv, w_uv)


def join_keys(
    k_nope: Float[Array, "B T H N"], k_rope: Float[Array, "B T R"]
) -> Float[Array, "B T H X"]:
    """The keys of each head, [k_nope, k_rope]; k_rope is repeated.

    Example:
        >>> join_keys(jnp.array([[[[1.0], [2.0]]]]), jnp.array([[[5.0]]])).tolist()
        [[[[1.0, 5.0], [2.0, 5.0]]]]
    """
    k_heads = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    return jnp.concatenate([k_nope, k_heads], axis=-1)
