"""Products of a few rows with a weight, by the C++ kernels; their gradient is XLA's.

A step of decoding spends its time in reading weights. The kernels read a weight once, in place, on
all threads. XLA's products of more than one row first copy it into another order.
"""

import math

import jax
from jaxtyping import Array

from dsv3_jax.kernels.cpu import calls
from dsv3_jax.ops import products


def _with_gradient_of(op, kernel, static: tuple[int, ...] = ()):
    """`kernel` in the forward pass, and the gradient of `op`, which computes the same."""

    def fwd(*args):
        return call(*args), tuple(a for i, a in enumerate(args) if i not in static)

    def bwd(*args):
        settings = args[: len(static)]
        saved = args[-2]
        d = args[-1]
        return jax.vjp(lambda *arrays: op(*arrays, *settings), *saved)[1](d)

    call = jax.custom_vjp(kernel, nondiff_argnums=static)
    call.defvjp(fwd, bwd)
    return call


def _matmul(x: Array, w: Array, axes: int = 1) -> Array:
    depth = math.prod(w.shape[:axes])
    lead = x.shape[: x.ndim - axes]
    y = calls.small_batch_matmul(x.reshape(-1, depth), w.reshape(depth, -1))
    return y.reshape(*lead, *w.shape[axes:])


def _swiglu(x: Array, w_gate: Array, w_up: Array, w_down: Array) -> Array:
    rows = x.reshape(-1, x.shape[-1])
    return calls.small_batch_swiglu(rows, w_gate, w_up, w_down).reshape(x.shape)


def _by_head(x: Array, w: Array, transposed: bool = False) -> Array:
    y = calls.small_batch_by_head(x.reshape(-1, *x.shape[-2:]), w, transposed=transposed)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# `ops.products` of these names, in float32.
product = _with_gradient_of(products.product, _matmul, static=(2,))
swiglu = _with_gradient_of(products.swiglu, _swiglu)
product_by_head = _with_gradient_of(
    lambda x, w, transposed: products.product_by_head(x, w, transposed=transposed),
    _by_head,
    static=(2,),
)
