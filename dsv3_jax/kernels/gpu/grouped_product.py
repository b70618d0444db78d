"""Grouped products on Hopper (H100, H200) in bfloat16, by the Mosaic kernels of JAX's wheel.

They round each expert's gradient to bfloat16 once, after a sum in float32.
"""

import importlib
import sys
from dataclasses import replace
from functools import cache
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import jax
from jaxtyping import Array

from dsv3_jax.kernels.xla.count_by_expert import count_by_expert
from dsv3_jax.kernels.xla.row_blocks import row_blocks_dw
from dsv3_jax.ops.grouped_product import GroupedProduct
from dsv3_jax.ops.varying import as_varying

# compute capability: the kernels use its matrix instructions, and no later chip has them
HOPPER = ("9.0", "9.0a")
CORES = 132  # of an H100 SXM, as JAX's kernels have it; a chip with fewer runs them in turns
STEP = 64  # columns: every width must be a multiple
ROWS = 128  # of a tile
FEW_ROWS = 32  # of a group on average, up to which tiles have half as many


def why_not_hopper(target: Any) -> str:
    """Why kernels for Hopper cannot run on a target; "" if they can.

    Args: target: a `kernels.choose.Target`, of which the chip is read.
    """
    if target.chip in HOPPER:
        return ""
    chip = f"the chip has {target.chip}" if target.chip else "the chip is not known"
    return f"its grouped products need compute capability 9.0 (H100, H200), and {chip}"


def why_not(target: Any) -> str:
    """The same of JAX's Mosaic kernels."""
    if reason := why_not_hopper(target):
        return reason
    try:
        _kernels()
    except Exception as error:  # they are examples, which may move or change between versions
        return f"this JAX does not have its grouped products ({type(error).__name__}: {error})"
    return ""


def fits(
    x: Array, expert_ids: Array, gates: Array, w_gate: Array, *others: Array, **settings
) -> bool:
    """Whether both widths of the experts are multiples of a tile's columns."""
    return all(size % STEP == 0 for size in w_gate.shape[-2:])


@cache
def _kernels() -> tuple[Any, Any]:
    """(ragged_dot, transposed_ragged_dot) of JAX's wheel.

    They import JAX's test utilities, which they do not use, and which take over the process's
    signals: an empty module is put in their place. The second asks the process's first device for
    its cores, but programs are compiled for a target that may not be here. So it is given a device
    with the cores that the first one assumes. Neither says which of a mesh's axes its result varies
    along: the functions below do.
    """
    folder, utilities = "jax.experimental.pallas.ops.gpu.", "jax._src.test_util"
    absent = utilities not in sys.modules
    if absent:
        sys.modules[utilities] = ModuleType(utilities)
    try:
        plain = importlib.import_module(folder + "ragged_dot_mgpu")
        transposed = importlib.import_module(folder + "transposed_ragged_dot_mgpu")
    finally:
        if absent:
            del sys.modules[utilities]
    there = SimpleNamespace(**{**vars(jax), "devices": lambda: [SimpleNamespace(core_count=CORES)]})
    function = transposed.transposed_ragged_dot
    elsewhere = FunctionType(
        function.__code__, {**vars(transposed), "jax": there}, function.__name__
    )
    elsewhere.__kwdefaults__ = function.__kwdefaults__
    return plain.ragged_dot, elsewhere


def _tiles(columns: int, rows: int = ROWS) -> dict[str, int]:
    """Settings of JAX's kernels: 131 KB of operands in flight, 32 KB of result."""
    block = 128 if columns % 128 == 0 else STEP
    # neighbours that share rows in the cache
    wide = next(n for n in (8, 4, 2, 1) if columns // block % n == 0)
    return dict(
        block_m=rows, block_n=block, block_k=STEP, max_concurrent_steps=4, grid_block_n=wide
    )


def mosaic(x: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.forward` by JAX's ragged_dot."""
    rows = ROWS // 2 if x.shape[0] <= FEW_ROWS * w.shape[0] else ROWS
    return as_varying(_kernels()[0](x, w, group_sizes=counts, **_tiles(w.shape[2], rows)), x, w)


def mosaic_dx(dy: Array, w: Array, counts: Array) -> Array:
    """`GroupedProduct.dx` by JAX's ragged_dot, which reads w transposed: no copy of the experts."""
    return as_varying(
        _kernels()[0](dy, w, group_sizes=counts, transpose_rhs=True, **_tiles(w.shape[1])), dy, w
    )


def mosaic_dw(x: Array, dy: Array, counts: Array, dtype: Any) -> Array:
    """`GroupedProduct.dw` by JAX's transposed_ragged_dot, rounded to bfloat16."""
    rows = 128 if x.shape[1] % 128 == 0 else STEP
    dw = _kernels()[1](x, dy, group_sizes=counts, **_tiles(dy.shape[1], rows))
    return as_varying(dw, x, dy).astype(dtype)


MOSAIC = GroupedProduct(
    "mosaic", mosaic, mosaic_dx, mosaic_dw, row_multiple=ROWS, sort=count_by_expert
)
# JAX has tested its kernel of dw on no GPU since January 2026. Where `dsv3 info --check` finds it
# wrong, XLA loops over blocks of rows for dw, and Mosaic computes the rest.
MOSAIC_BUT_DW = replace(MOSAIC, name="mosaic_but_dw", dw=row_blocks_dw)
