"""The routed experts of all layers in one stack, and how their gradient is collected.

The matrices of all layers are three arrays [L, E, …], and a layer is an index, so a loop over layers copies no expert.
But the gradient of an array that a loop closes over is a whole stack from every layer, added up. So a second view of
the stack, its `grad_carry`, passes through every layer, in and out. Nothing reads it. Its cotangent passes through the
same layers backward, and each layer writes its own part there.

The cotangent of `written` says which layers' parts hold numbers: a layer whose flag is 0 is overwritten, one whose flag
is 1 is added to. So the gradient may begin uninitialised (see kernels/cpu/experts.py), and it is right however often
the loop calls a layer: once, twice, or never.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dsv3_jax.ops.varying import varying


class Experts(NamedTuple):
    """Matrices of routed experts. L layers (or none: one layer), E experts, D width, F hidden width."""

    w_gate: Array  # [L, E, D, F]
    w_up: Array  # [L, E, D, F]
    w_down: Array  # [L, E, F, D]


@partial(jax.tree_util.register_dataclass, data_fields=["carry", "written"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class GradCarry:
    """Takes a stack's gradient. Each value is used once: a layer consumes one and returns the next."""

    # Not annotated more closely: JAX rebuilds it with shapes and placeholders.
    carry: Any  # Experts: the stack again, or its first 0 layers if it is frozen; never read
    written: Any  # float32 [L]: zeros; its cotangent is 1 where the carry's cotangent holds numbers

    def consume(self) -> "GradCarry":
        """Mark this value as used.

        Raises: ValueError if it was used before: the gradient of one of the two uses would be lost.
        """
        if "_used" in self.__dict__:
            raise ValueError(
                "grad_carry of the expert stack is used twice: give each layer the stack of the one before"
            )
        object.__setattr__(self, "_used", True)
        return self


@partial(jax.tree_util.register_dataclass, data_fields=["weights", "grad", "layer"], meta_fields=[])
@dataclass(frozen=True)
class ExpertStack:
    """Weights, gradient carry and current layer of a stack of routed experts.

    A loop over layers closes over the stack and carries `stack.grad`:

        stack = open_stack(weights)
        def layer(carry, index):
            x, grad = carry
            y, stack_after = grouped_swiglu(x, ids, gates, stack.at(index, grad))
            return (x + y, stack_after.grad), None
        (x, grad), _ = jax.lax.scan(layer, (x, stack.grad), jnp.arange(L))
        x = close_stack(x, stack.at(0, grad))
    """

    weights: Any  # Experts [L, …]: read; takes no gradient
    grad: GradCarry | None  # None: read-only, for decoding
    layer: Any  # int32 []

    def at(self, layer: Int[Array, ""] | int, grad: GradCarry | None = None) -> "ExpertStack":
        """The stack at one of its layers, with the gradient carry that the layer before returned."""
        return replace(self, layer=jnp.asarray(layer, jnp.int32), grad=grad)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weights.w_gate.shape[1]


def read_only(weights: Experts) -> ExpertStack:
    """A stack for decoding: it takes no gradient.

    Example:
        >>> w = jnp.ones((3, 2, 1, 1))  # 3 layers of 2 experts
        >>> stack = read_only(Experts(w, w, w))
        >>> stack.num_experts, stack.grad is None
        (2, True)
    """
    return ExpertStack(weights, None, jnp.zeros((), jnp.int32))


def open_stack(weights: Experts, *, frozen: bool = False) -> ExpertStack:
    """A stack that takes a gradient, at layer 0.

    Args: frozen: the weights take none, only what the experts read. The carry then has no layers, and layers write
        nothing to it.

    Example:
        >>> def use_layer_1(w):
        ...     stack = open_stack(Experts(w, w, w))
        ...     one, stack = take_layer(stack.at(1, stack.grad))
        ...     return close_stack(one.w_up.sum(), stack)
        >>> jax.grad(use_layer_1)(jnp.ones((3, 1, 1, 1))).ravel()
        Array([0., 1., 0.], dtype=float32)
    """
    written = jnp.zeros(weights.w_gate.shape[:1], jnp.float32)
    carry = jax.tree.map(lambda w: w[:0], weights) if frozen else weights
    return ExpertStack(jax.lax.stop_gradient(weights), GradCarry(carry, written), jnp.zeros((), jnp.int32))


def close_stack(x: Array, stack: ExpertStack) -> Array:
    """Return x, the output of the loop over a stack's layers, and end the use of the stack.

    Raises: ValueError if the stack was used after the loop returned it.

    Example:
        >>> w = jnp.ones((1, 1, 1, 1))
        >>> stack = open_stack(Experts(w, w, w))
        >>> close_stack(jnp.ones(1), stack)
        Array([1.], dtype=float32)
        >>> take_layer(stack)
        Traceback (most recent call last):
            ...
        ValueError: grad_carry of the expert stack is used twice: give each layer the stack of the one before
    """
    if stack.grad is not None:
        stack.grad.consume()
    return x


def take_layer(stack: ExpertStack) -> tuple[Experts, ExpertStack]:
    """Copy one layer's matrices [E, …] out of the stack; their gradient goes to the stack's carry.

    Returns: (the layer's matrices, the stack for the next use).

    Example:
        >>> w = jnp.array([5.0, 6.0, 7.0]).reshape(3, 1, 1, 1)  # 3 layers
        >>> one, _ = take_layer(read_only(Experts(w, w, w)).at(1))
        >>> one.w_gate
        Array([[[6.]]], dtype=float32)
    """
    if stack.grad is None:
        return _slice_layer(stack.weights, stack.layer), stack
    grad = stack.grad.consume()
    one, carry, written = _take_layer(stack.weights, grad.carry, grad.written, stack.layer)
    return one, replace(stack, grad=GradCarry(carry, written))


def _slice_layer(weights: Experts, layer: Array) -> Experts:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, layer, 0, keepdims=False), weights)


@jax.custom_vjp
def _take_layer(weights, carry, written, layer):
    return _slice_layer(weights, layer), carry, written


def _take_layer_fwd(weights, carry, written, layer):
    return _take_layer(weights, carry, written, layer), layer


def _take_layer_bwd(layer, cotangents):
    d_one, d_carry, d_written = cotangents
    layer = jnp.asarray(layer)  # under jax.checkpoint a constant comes back as a bare literal

    return None, add_layer(d_carry, d_one, d_written, layer), mark_written(d_written, layer), None


_take_layer.defvjp(_take_layer_fwd, _take_layer_bwd)


def add_layer(d_carry: Experts, d_one: Experts, d_written: Array, layer: Array) -> Experts:
    """Write or add one layer's gradient [E, …] to the stack's; a frozen stack's stays empty.

    On a mesh that shards the batch further than the experts, each device has a part of it: the parts are summed here.
    """

    def add(total, part):
        if total.shape[0] == 0:
            return total
        apart = varying(part) - varying(total)
        part = jax.lax.psum(part, tuple(apart)) if apart else part
        part = part + so_far(jax.lax.dynamic_index_in_dim(total, layer, 0, keepdims=False), d_written, layer)
        return jax.lax.dynamic_update_index_in_dim(total, part.astype(total.dtype), layer, 0)

    return jax.tree.map(add, d_carry, d_one)


def so_far(part: Array, d_written: Array, layer: Array) -> Array:
    """A layer's part of the gradient if it holds numbers, zeros if it is uninitialised.

    Example:
        >>> part, written = jnp.array([5.0]), jnp.array([1.0, 0.0])
        >>> so_far(part, written, jnp.int32(0)), so_far(part, written, jnp.int32(1))
        (Array([5.], dtype=float32), Array([0.], dtype=float32))
    """
    return jnp.where(d_written[layer] > 0, part, jnp.zeros((), part.dtype))


def mark_written(d_written: Array, layer: Array) -> Array:
    """The flags after a layer's part has been written.

    Example:
        >>> mark_written(jnp.zeros(3), jnp.int32(1))
        Array([0., 1., 0.], dtype=float32)
    """
    return d_written.at[layer].set(1.0)
