"""Products with a weight, in the dtype of the activations; the router's is exact float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def product(x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """Multiply x with w over the last `axes` axes of x, which are the first of w.

    Returns: x w in x's dtype.

    Example:
        >>> product(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0], [0.0, 3.0]]))
        Array([1., 6.], dtype=float32)
    """
    return jnp.tensordot(x, w.astype(x.dtype), axes)


def exact_product(x: Float[Array, "n D"], w: Float[Array, "D N"]) -> Float[Array, "n N"]:
    """Multiply x with w in complete float32 precision, in the gradient too.

    An accelerator's default for float32 is shorter: TF32 on a GPU, one bfloat16 pass on a TPU. Two
    experts whose scores differ by less than that would change places.

    Returns: x w in x's dtype.
    """
    return jnp.dot(x, w.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)


def swiglu(
    x: Float[Array, "*n D"],
    w_gate: Float[Array, "D F"],
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
) -> Float[Array, "*n D"]:
    """Compute (silu(x w_gate) ⊙ (x w_up)) w_down in x's dtype. Source: arXiv 2002.05202.

    Example:
        >>> one = jnp.ones((1, 1))
        >>> swiglu(one, 9 * one, one / 9, 5 * one).round(2)  # silu(9) is 9 to within 0.01 %
        Array([[5.]], dtype=float32)
    """
    return product(jax.nn.silu(product(x, w_gate)) * product(x, w_up), w_down)


def product_by_head(
    x: Float[Array, "*n H K"], w: Float[Array, "H _ _"], *, transposed: bool = False
) -> Float[Array, "*n H N"]:
    """Multiply each head's rows with that head's matrix.

    Returns: x[…, h] w[h] with w [H, K, N]; `transposed`: x[…, h] w[h]ᵀ with w [H, N, K].

    Example:
        >>> w = jnp.array([[[2.0, 3.0]], [[4.0, 5.0]]])  # two heads, K = 1, N = 2
        >>> product_by_head(jnp.array([[1.0], [10.0]]), w)
        Array([[ 2.,  3.],
               [40., 50.]], dtype=float32)
    """
    equation = "...hk,hnk->...hn" if transposed else "...hk,hkn->...hn"
    return jnp.einsum(equation, x, w.astype(x.dtype))
