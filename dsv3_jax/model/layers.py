"""The small parts: norms and SwiGLU."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.model.context import Context
from dsv3_jax.model.parameters import param
from dsv3_jax.model.stack import NORMS


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in float32, over the last axis.

    Example:
        >>> RMSNorm(2, eps=0.0)(jnp.array([1.0, 7.0]))  # the root of the mean square is 5
        Array([0.2, 1.4], dtype=float32)
    """

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), decay=False)  # takes no weight decay
        self.eps = eps

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        factor = checkpoint_name(
            jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps), NORMS
        )
        scale = self.scale[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * factor * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / √(variance + 1e-6) · scale + bias, in float32, over the last axis.

    Example:
        >>> LayerNorm(2)(jnp.array([1.0, 3.0])).round(3)
        Array([-1.,  1.], dtype=float32)
    """

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), decay=False)
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32), decay=False)

    def __call__(self, x: Float[Array, "*n X"]) -> Float[Array, "*n X"]:
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        scale, bias = (
            v[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
            for v in (self.scale, self.bias)
        )

        # Once x is centred, its variance is the mean of its squares.
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (wide * scale + bias).astype(x.dtype)


class SwiGLU(nnx.Module):
    """(silu(x w_gate) ⊙ (x w_up)) w_down.

    Example:
        >>> from dsv3_jax.model.context import from_zero, make_context
        >>> from dsv3_jax.presets import preset
        >>> ffn = SwiGLU(4, 16, std=0.02, rngs=nnx.Rngs(0))
        >>> ffn(jnp.ones((1, 2, 4)), make_context(preset("tiny"), from_zero(1, 2))).shape
        (1, 2, 4)
    """

    def __init__(self, dim: int, hidden: int, std: float, *, rngs: nnx.Rngs):
        self.w_gate = param(rngs, (dim, hidden), ("dim", "hidden"), std)
        self.w_up = param(rngs, (dim, hidden), ("dim", "hidden"), std)
        self.w_down = param(rngs, (hidden, dim), ("hidden", "dim"), std)

    def __call__(self, x: Float[Array, "*n D"], ctx: Context) -> Float[Array, "*n D"]:
        return ctx.run("swiglu", x, self.w_gate[...], self.w_up[...], self.w_down[...])
