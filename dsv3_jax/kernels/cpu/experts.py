"""Routed experts by the C++ kernels: the grouped SwiGLU with its gradient, and decoding."""

from typing import Any

import jax
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.ops.sort_by_expert import SortedRows, sort_by_expert

decode_experts = calls.decode_experts


def grouped_swiglu(
    x: Float[Array, "n D"],
    expert_ids: Int[Array, "n K"],
    gates: Float[Array, "n K"],
    w_gate: Float[Array, "E D F"],
    w_up: Float[Array, "E D F"],
    w_down: Float[Array, "E F D"],
    **settings: Any,
) -> Float[Array, "n D"]:
    """Compute `ops.dispatch.grouped_swiglu` in float32; its settings change nothing here."""
    return _grouped(x, gates, (w_gate, w_up, w_down), sort_by_expert(expert_ids, w_gate.shape[0]))


def _forward(x, gates, experts, p: SortedRows, keep: bool):
    return calls.experts_swiglu(x, gates, p, experts, keep=keep)


@jax.custom_vjp
def _grouped(x, gates, experts, p):
    return _forward(x, gates, experts, p, keep=False)[0]


def _grouped_fwd(*primals):
    frozen = not any(w.perturbed for w in primals[2])
    args = jax.tree.map(
        lambda a: a.value, primals, is_leaf=lambda a: isinstance(a, CustomVJPPrimal)
    )
    y, *kept = _forward(*args, keep=True)
    # by its structure: numbers would be traced
    return y, (args, tuple(kept), () if frozen else (None,))


def _grouped_bwd(saved, dy):
    (x, gates, experts, p), kept, trained = saved
    dx, d_gates, d_experts = calls.experts_swiglu_gradients(
        x, gates, p, experts, kept, dy, frozen=not trained
    )
    return dx, d_gates, d_experts if trained else None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd, symbolic_zeros=True)
