"""Products of sorted rows, each group of rows with its own matrix: y_i = x_i w_{group of i}.

Rows are sorted by group, such as an expert's. Group g has `counts[g]` rows, after group g - 1's.
Here G counts these groups, and K and N are the widths of a matrix. A backend has three
functions, the product and its two gradients, because a kernel for one is no kernel for the others:

    forward  y [m, N] = x [m, K] · w [K, N] of each row's group
    dx       x' [m, K] = y' [m, N] · wᵀ
    dw       w' [G, K, N] = xᵀ y' over each group's rows

Rows after the last group belong to no group. Their results are undefined, and their inputs must be
finite. They may cost time all the same.

RAGGED_DOT is XLA's, a grouped kernel on TPU. On other platforms every group multiplies every row.
Other backends are in `kernels/`; they compute a part of a block more for each group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

from dsv3_jax.ops.sort_by_expert import sort_by_expert


@dataclass(frozen=True)
class GroupedProduct:
    """A backend: the product and its gradients."""

    name: str
    forward: Callable[..., Array]  # (x [m, K], w [G, K, N], counts [G]) -> [m, N] in x's dtype
    dx: Callable[..., Array]  # (dy [m, N], w [G, K, N], counts [G]) -> [m, K] in dy's dtype
    # (x [m, K], dy [m, N], counts [G], dtype) -> [G, K, N], accumulated in float32
    dw: Callable[..., Array]
    row_multiple: int = 1  # m must be a multiple of it
    sort: Callable = sort_by_expert  # or what gives the same
    casts: bool = True  # w must have the rows' dtype; False: it is taken in its own


# XLA's ragged_dot

_FORWARD = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
_DX = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
_DW = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def ragged_dot(x: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.forward` by `jax.lax.ragged_dot_general`."""
    return _ragged(x, w, counts, _FORWARD, x.dtype)


def ragged_dot_dx(dy: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.dx` likewise."""
    return _ragged(dy, w, counts, _DX, dy.dtype)


def ragged_dot_dw(x: Array, dy: Array, counts: Array, dtype: Any) -> Array:
    """`GroupedProduct.dw` likewise."""
    return _ragged(x, dy, counts, _DW, dtype)


def _ragged(a: Array, b: Array, counts: Array, numbers: Any, dtype: Any) -> Array:
    return jax.lax.ragged_dot_general(a, b, counts, numbers, preferred_element_type=dtype)


RAGGED_DOT = GroupedProduct("ragged_dot", ragged_dot, ragged_dot_dx, ragged_dot_dw)
