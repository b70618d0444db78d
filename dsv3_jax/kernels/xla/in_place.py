"""Keys of heads whose shared rotated part is written into the product's result."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.ops.mla import expand


@jax.custom_vjp
def expand_in_place(
    c_kv: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    w_uk: Float[Array, "H N C"],
    w_uv: Float[Array, "H V C"],
) -> tuple[Float[Array, "B T H X"], Float[Array, "B T H V"]]:
    """Compute `ops.mla.expand` with keys as wide as X from the product on, for a GPU.

    The product's last R columns are zeros, and the GPU then writes k_rope alone. The gradient is
    that of `expand`, whose products are not wider.
    """
    nope_dim = w_uk.shape[1]
    wide = jnp.pad(w_uk, ((0, 0), (0, k_rope.shape[-1]), (0, 0)))
    k, v = (jnp.einsum("btc,hkc->bthk", c_kv, w.astype(c_kv.dtype)) for w in (wide, w_uv))
    return k.at[..., nope_dim:].set(k_rope[:, :, None]), v


def _expand_fwd(*args):
    return expand_in_place(*args), args


def _expand_bwd(args, d):
    return jax.vjp(expand, *args)[1](d)


expand_in_place.defvjp(_expand_fwd, _expand_bwd)
