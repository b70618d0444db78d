"""Products with a weight, in the dtype of the activations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """Multiply x with w over the last `axes` axes of x, which are the first of w.

    Returns: x w in x's dtype.
    """
    return jnp.tensordot(x, w.astype(x.dtype), axes)


def swiglu(
    x: Float[Array, "*n D"], w_gate: Float[Array, "D F"], w_up: Float[Array, "D F"], w_down: Float[Array, "F D"]
) -> Float[Array, "*n D"]:
    """Compute (silu(x w_gate) ⊙ (x w_up)) w_down in x's dtype. Source: arXiv 2002.05202."""
    return product(jax.nn.silu(product(x, w_gate)) * product(x, w_up), w_down)


def product_by_head(
    x: Float[Array, "*n H K"], w: Float[Array, "H _ _"], *, transposed: bool = False
) -> Float[Array, "*n H N"]:
    """Multiply each head's rows with that head's matrix.

    Returns: x[…, h] w[h] with w [H, K, N]; `transposed`: x[…, h] w[h]ᵀ with w [H, N, K].
    """
    return jnp.einsum("...hk,hnk->...hn" if transposed else "...hk,hkn->...hn", x, w.astype(x.dtype))
