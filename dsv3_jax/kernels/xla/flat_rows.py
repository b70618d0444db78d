"""Products of rows that make one matrix, for the gradients of XLA on a CPU.

A weight's gradient is a sum over all rows. Over one axis of rows XLA multiplies in place. Over two,
batch and length, it first writes a transposed copy of the gradient that comes in: training took
twice as long in these products. The numbers are the same.
"""

import math

from jaxtyping import Array, Float

from dsv3_jax.ops import mla, products


def product(x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
    """Compute `ops.products.product`."""
    depth = math.prod(w.shape[:axes])
    y = products.product(x.reshape(-1, depth), w.reshape(depth, -1))
    return y.reshape(*x.shape[: x.ndim - axes], *w.shape[axes:])


def swiglu(
    x: Float[Array, "*n D"],
    w_gate: Float[Array, "D F"],
    w_up: Float[Array, "D F"],
    w_down: Float[Array, "F D"],
) -> Float[Array, "*n D"]:
    """Compute `ops.products.swiglu`."""
    return products.swiglu(x.reshape(-1, x.shape[-1]), w_gate, w_up, w_down).reshape(x.shape)


def expand(
    c_kv: Float[Array, "B T C"],
    k_rope: Float[Array, "B T R"],
    w_uk: Float[Array, "H N C"],
    w_uv: Float[Array, "H V C"],
) -> tuple[Float[Array, "B T H X"], Float[Array, "B T H V"]]:
    """Compute `ops.mla.expand`."""
    k_nope = product(c_kv, w_uk.transpose(2, 0, 1))
    return mla.join_keys(k_nope, k_rope), product(c_kv, w_uv.transpose(2, 0, 1))
