"""Routed experts by the C++ kernels: the grouped SwiGLU with its gradient, and the stack's gradient without zeros.

JAX begins the gradient of a stack as zeros. Here it begins uninitialised, and each layer overwrites its part: gigabytes
of zeros need not be written and read. `open_stack` fills in the zeros of layers that were never called.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.ops import expert_stack
from dsv3_jax.ops.expert_stack import Experts, ExpertStack, GradCarry, mark_written
from dsv3_jax.ops.sort_by_expert import SortedRows, sort_by_expert


def grouped_swiglu(
    x: Float[Array, "n D"], expert_ids: Int[Array, "n K"], gates: Float[Array, "n K"], stack: ExpertStack
) -> tuple[Float[Array, "n D"], ExpertStack]:
    """Compute `ops.dispatch.grouped_swiglu`. Arguments and results as there, in float32."""
    p = sort_by_expert(expert_ids, stack.num_experts)
    if stack.grad is None:
        return _forward(x, gates, stack.weights, p, stack.layer, keep=False)[0], stack
    grad = stack.grad.consume()
    y, carry, written = _grouped(x, gates, stack.weights, grad.carry, grad.written, p, stack.layer)
    return y, replace(stack, grad=GradCarry(carry, written))


def _forward(x, gates, weights, p: SortedRows, layer, keep: bool):
    return calls.experts_swiglu(x, gates, p.order, p.row, p.counts, weights, layer, keep=keep)


@jax.custom_vjp
def _grouped(x, gates, weights, carry, written, p, layer):
    return _forward(x, gates, weights, p, layer, keep=False)[0], carry, written


def _grouped_fwd(x, gates, weights, carry, written, p, layer):
    y, *kept = _forward(x, gates, weights, p, layer, keep=True)
    return (y, carry, written), (x, gates, weights, p, layer, tuple(kept))


def _grouped_bwd(saved, cotangents):
    x, gates, weights, p, layer, kept = saved
    dy, d_carry, d_written = cotangents
    layer = jnp.asarray(layer)  # under jax.checkpoint a constant comes back as a bare literal
    dx, d_gates, d_carry = calls.experts_swiglu_gradients(
        x, gates, p.order, p.row, p.counts, weights, layer, kept, dy, d_carry, d_written
    )
    return dx, d_gates, None, Experts(*d_carry), mark_written(d_written, layer), None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def open_stack(weights: Experts, *, frozen: bool = False) -> ExpertStack:
    """A stack that takes a gradient, at layer 0; see `ops.expert_stack.open_stack`."""
    stack = expert_stack.open_stack(weights, frozen=frozen)
    return stack if frozen else replace(stack, grad=GradCarry(*_carry(weights)))


@jax.custom_vjp
def _carry(weights):
    return weights, jnp.zeros(weights.w_gate.shape[:1], jnp.float32)


_carry.defvjp(lambda weights: (_carry(weights), None), lambda _, gradient: (Experts(*calls.zero_unwritten(*gradient)),))


def close_stack(x: Array, stack: ExpertStack) -> Array:
    """Return x, and begin the stack's gradient uninitialised; see `ops.expert_stack.close_stack`."""
    if stack.grad is None:
        return x
    grad = stack.grad.consume()
    return _begin_gradient(x, grad.carry, grad.written)


@jax.custom_vjp
def _begin_gradient(x, carry, written):
    return x


def _begin_gradient_bwd(saved, dx):
    carry, written = saved
    return dx, Experts(*calls.uninitialized_like(*carry)), jnp.zeros_like(written)


_begin_gradient.defvjp(lambda x, carry, written: (x, (carry, written)), _begin_gradient_bwd)


def decode_experts(
    x: Float[Array, "n D"], expert_ids: Int[Array, "n K"], gates: Float[Array, "n K"], stack: ExpertStack
) -> Float[Array, "n D"]:
    """Compute `ops.dispatch.decode_experts` in float32. Takes no gradient."""
    w = stack.weights
    return calls.decode_experts(x, expert_ids, gates, w.w_gate, w.w_up, w.w_down, stack.layer)
