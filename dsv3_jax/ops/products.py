"""Products with a weight: as training has them, and of the few rows that decoding has.

A step of decoding spends its time in reading weights. On CPUs with a compiler a few float32 rows are multiplied by the
native kernel, which reads a weight once, as it lies, on all threads: XLA's products of more than one row copy it into
an order of their own first. A single row with a small weight is XLA's, too.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.kernels.cpu import calls

FEW_ROWS = 64  # beyond them the products cost more than reading what they are with
LARGE = 1 << 18  # bytes of a weight below which XLA's products of a single row are faster


def product(x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """x w over the last `axes` axes of x, which are the first of w; in x's dtype."""
    return jnp.tensordot(x, w.astype(x.dtype), axes)


def few_rows_product(x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """`product`, by the kernel that suits a few rows of x where they are few. Takes no gradient."""
    depth, lead = math.prod(w.shape[:axes]), x.shape[: x.ndim - axes]
    if not _serves(math.prod(lead), x, w):
        return product(x, w, axes)
    y = calls.few_rows_product(x.reshape(-1, depth), w.reshape(depth, -1))
    return y.reshape(*lead, *w.shape[axes:])


def swiglu(
    x: Float[Array, "*n D"], w_gate: Float[Array, "D F"], w_up: Float[Array, "D F"], w_down: Float[Array, "F D"]
) -> Float[Array, "*n D"]:
    """(silu(x w_gate) ⊙ (x w_up)) w_down, in x's dtype."""
    return product(jax.nn.silu(product(x, w_gate)) * product(x, w_up), w_down)


def few_rows_swiglu(
    x: Float[Array, "*n D"], w_gate: Float[Array, "D F"], w_up: Float[Array, "D F"], w_down: Float[Array, "F D"]
) -> Float[Array, "*n D"]:
    """`swiglu`, likewise. Takes no gradient."""
    if not _serves(x.size // x.shape[-1], x, w_gate):
        return swiglu(x, w_gate, w_up, w_down)
    return calls.few_rows_swiglu(x.reshape(-1, x.shape[-1]), w_gate, w_up, w_down).reshape(x.shape)


def few_rows_by_heads(
    x: Float[Array, "*n H K"], w: Float[Array, "H _ _"], *, turned: bool = False
) -> Float[Array, "*n H N"]:
    """Each head's rows with its own matrix: x[…, h] w[h], w [H, K, N]; `turned`: x[…, h] w[h]ᵀ, w [H, N, K].

    By the kernel that suits few rows where they are few. Takes no gradient.
    """
    rows = math.prod(x.shape[:-2])
    if _serves(rows, x, w):
        y = calls.few_rows_by_heads(x.reshape(-1, *x.shape[-2:]), w, turned=turned)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    return jnp.einsum("...hk,hnk->...hn" if turned else "...hk,hkn->...hn", x, w.astype(x.dtype))


def _serves(rows: int, x: Array, w: Array) -> bool:
    few = rows <= FEW_ROWS and (rows > 1 or w.nbytes >= LARGE)
    return few and calls.serves(x.dtype, w.dtype)
