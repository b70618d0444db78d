"""The small parts: norm, SwiGLU, and layers stacked along a leading axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.mesh import sharding
from dsv3_jax.ops import products


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, *, exact: bool = False
) -> nnx.Param:
    """A float32 parameter drawn from a normal distribution of that standard deviation.

    `axes` names the last of its axes, by which `sharding.RULES` says how a mesh cuts it. What is `exact` is used in
    float32 whatever the compute dtype.
    """
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes, exact=exact)


class NormScale(nnx.Param):
    """A norm's scale: a parameter that takes no weight decay."""


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in float32, over the last axis."""

    def __init__(self, dim: int, eps: float):
        self.scale = NormScale(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class SwiGLU(nnx.Module):
    """(silu(x w_gate) ⊙ (x w_up)) w_down."""

    def __init__(self, dim: int, hidden: int, std: float, *, rngs: nnx.Rngs):
        self.w_gate = param(rngs, (dim, hidden), ("dim", "hidden"), std)
        self.w_up = param(rngs, (dim, hidden), ("dim", "hidden"), std)
        self.w_down = param(rngs, (hidden, dim), ("hidden", "dim"), std)

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return products.swiglu(x, self.w_gate[...], self.w_up[...], self.w_down[...])

    def decode(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """The same for a few rows. Takes no gradient."""
        return products.few_rows_swiglu(x, self.w_gate[...], self.w_up[...], self.w_down[...])


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """`count` like modules as one whose parameters carry a leading layer axis; None for none."""
    if count == 0:
        return None
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


def unstack(stacked: nnx.Module | None) -> list[nnx.State]:
    """The arrays of each of the modules that `stack` made one."""
    if stacked is None:
        return []
    state = nnx.state(stacked)
    count = jax.tree.leaves(state)[0].shape[0]
    return [jax.tree.map(lambda x, i=i: x[i], state) for i in range(count)]


def scan_stack(
    stacked: nnx.Module, body: Callable, carry, *, remat: str = "none", fsdp: bool = False, dtype: Any = None
):
    """`carry, y = body(module, carry, index)` for each module of a stack in turn; depth costs no compile time.

    Args:
        stacked: what `stack` made.
        remat: "none" keeps everything for the backward pass, "dots" the results of matrix products, "full" the
            carry alone.
        fsdp: a mesh cuts the weights along "data": a layer's are made whole in its turn, in `dtype`, and forgotten
            after it.
    Returns: (carry, ys stacked along a leading layer axis).
    """
    # Plain lax.scan over split state: nnx.scan has had silent faults with memory and sharding.
    graphdef, state = nnx.split(stacked)
    count = jax.tree.leaves(state)[0].shape[0]

    def step(carry, xs):
        layer, index = xs
        return body(nnx.merge(graphdef, sharding.whole(layer, fsdp=fsdp, dtype=dtype)), carry, index)

    if remat == "full":
        step = jax.checkpoint(step)
    elif remat == "dots":
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return jax.lax.scan(step, carry, (state, jnp.arange(count, dtype=jnp.int32)))
