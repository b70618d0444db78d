"""The table of implementations: for each op of `ops/`, who computes it on which platform.

The rows of an op are in order of preference. The first one runs that serves the platform, the
dtype, the mesh and the shapes. A row of plain XLA serves all of them, and rows after it run only if
they are named. A new device is a folder beside this file, its rows in TABLE and its row in DEVICES.
Kernels that are elsewhere enter TABLE by `add`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.kernels import low_precision
from dsv3_jax.kernels.cpu import attention as cpu_attention
from dsv3_jax.kernels.cpu import calls, expert_loops, library
from dsv3_jax.kernels.cpu import experts as cpu_experts
from dsv3_jax.kernels.cpu import products as cpu_products
from dsv3_jax.kernels.gpu import attention as gpu_attention
from dsv3_jax.kernels.gpu import grouped_product as gpu_products
from dsv3_jax.kernels.gpu import tokamax_library
from dsv3_jax.kernels.tpu import attention as tpu_attention
from dsv3_jax.kernels.tpu import cache_rows as tpu_cache_rows
from dsv3_jax.kernels.tpu import grouped_product as tpu_products
from dsv3_jax.kernels.xla import flat_rows
from dsv3_jax.kernels.xla.by_memory import cross_entropy_by_memory
from dsv3_jax.kernels.xla.by_row import decode_by_row
from dsv3_jax.kernels.xla.in_order import look_up_in_order
from dsv3_jax.kernels.xla.in_place import expand_in_place
from dsv3_jax.kernels.xla.one_pass import swiglu_in_one_pass
from dsv3_jax.kernels.xla.row_blocks import ROW_BLOCKS
from dsv3_jax.kernels.xla.two_rows import in_two_rows
from dsv3_jax.ops import (
    adamw,
    attention,
    cached_attention,
    cross_entropy,
    dispatch,
    embedding,
    indexer,
    mla,
    products,
    rope,
    sparse_attention,
)
from dsv3_jax.ops.grouped_product import GroupedProduct

# Devices


@dataclass(frozen=True)
class Device:
    """What differs between platforms beside their kernels."""

    # a scan over layers loses much time in copies of what its backward pass reads
    scan_copies: bool = False
    # XLA reads a layer's chosen experts out of the stack of all, without a copy; on a TPU the
    # grouped product needs a separate array
    slices_experts: bool = False
    # a grouped product's gradient is faster by experts that are transposed before; under fsdp each
    # device transposes its part, before they are gathered
    turns_experts: bool = False
    # attention to a cache reads empty slots, because it has no loop that ends before them
    reads_all_slots: bool = False
    # rows of a cache are padded to a multiple of it: TPUs transpose rows of fewer lanes
    cache_row_multiple: int = 1


DEVICES = {
    "cpu": Device(scan_copies=True),
    "cuda": Device(slices_experts=True, reads_all_slots=True),
    "rocm": Device(slices_experts=True, reads_all_slots=True),
    "tpu": Device(turns_experts=True, cache_row_multiple=128),
}
PLATFORMS = tuple(DEVICES)
GPUS = ("cuda", "rocm")
ACCELERATORS = (*GPUS, "tpu")
# ops on float32 arrays, whatever the compute dtype
IN_FLOAT32 = ("embedding", "exact_product", "optimizer")

# Rows


@dataclass(frozen=True)
class Implementation:
    """One row of the table."""

    name: str
    run: Callable  # with the op's signature
    platforms: tuple[str, ...] = PLATFORMS
    # of the op's first array, in a kernel that is written by hand; (): any, in XLA
    dtypes: tuple[str, ...] = ()
    one_device: bool = False  # not on a mesh of several
    # whether it serves these arguments of the op; if not, the next row runs. None means that it
    # serves all
    fits: Callable[..., bool] | None = None
    # of a `choose.Target`: a library, a compiler or a chip that is missing; "" if none is
    why_not: Callable[[Any], str] | None = None
    precision: str = "none"  # Execution.precision that it computes in

    def serves(self, dtype: str, devices: int) -> bool:
        """Whether it computes in a dtype on so many devices."""
        return (not self.dtypes or dtype in self.dtypes) and (devices == 1 or not self.one_device)

    def of(self, op: str) -> str:
        """Its name beside others, as `kernels` takes it, with the precision if it has one."""
        return f"{op}={self.name}{'' if self.precision == 'none' else f' in {self.precision}'}"

    @property
    def made_for(self) -> str:
        """A sentence on what `serves` asks."""
        dtypes = " or ".join(self.dtypes) or "any dtype"
        return f"for {dtypes}{' on one device' if self.one_device else ''}"


# What rows ask of an op's arguments, see `Implementation.fits`

SMALL_BATCH = 64  # rows beyond which a CPU product costs more than reading its weight
MANY_ROWS = 256  # rows that no decoding step on a GPU has, as a rule
LARGE_WEIGHT = 1 << 18  # bytes below which XLA multiplies a row faster, on two AVX2 cores
# rows of an expert, on average, up to which a GPU reads its weights once for each row
ROWS_OF_AN_EXPERT = 4
# bytes of a layer's matrix that a GPU's cache does not hold: each row reads it from memory
LARGE_EXPERTS = 32 << 20
# numbers of an array from which the C++ optimizer, on all threads, is faster than XLA
LARGE_UPDATE = 1 << 16


def _all_float32(*arrays: Any, **settings: Any) -> bool:
    floats = (a for a in jax.tree.leaves(arrays) if jnp.issubdtype(a.dtype, jnp.floating))
    return all(a.dtype == jnp.float32 for a in floats)


def _cached(queries: Any, keys: Any, values: Any, *others: Any, **settings: Any) -> bool:
    return all(stored.rows.dtype.name in calls.CACHE_DTYPES for stored in (*keys, values))


def _few_rows(x: Array, *weights: Array, axes: int = 1, **settings: Any) -> bool:
    rows = x.size // max(math.prod(x.shape[x.ndim - axes :]), 1)
    few = rows <= SMALL_BATCH and (rows > 1 or weights[0].nbytes >= LARGE_WEIGHT)
    return few and _all_float32(x, *weights)


def _one_row(x: Array, *weights: Array, axes: int = 1, **settings: Any) -> bool:
    return x.size == math.prod(x.shape[x.ndim - axes :])


def _in_batches(x: Array, *weights: Array, axes: int = 1, **settings: Any) -> bool:
    """Whether rows have several axes, as batch and length."""
    return x.ndim - axes > 1


def _many_rows(x: Array, *weights: Array, **settings: Any) -> bool:
    """Whether rows are not those of a decoding step, which has no gradient."""
    return x.size >= MANY_ROWS * x.shape[-1]


def _few_choices(
    x: Array, expert_ids: Array, gates: Array, w_gate: Array, *others: Array, **settings: Any
) -> bool:
    return expert_ids.size <= ROWS_OF_AN_EXPERT * w_gate.shape[0]


def _shared_experts(
    x: Array, expert_ids: Array, gates: Array, w_gate: Array, *others: Array, **settings: Any
) -> bool:
    """Whether Mosaic saves more than its launches cost: it reads each chosen expert once."""
    in_cache = w_gate.size * w_gate.dtype.itemsize <= LARGE_EXPERTS
    # From memory, a single row saves a read if another one shares its expert.
    rows = ROWS_OF_AN_EXPERT if in_cache else 1 / 4
    many = expert_ids.size > rows * w_gate.shape[0]
    return many and gpu_products.fits(x, expert_ids, gates, w_gate)


def _large_update(p: Array, *others: Any, **settings: Any) -> bool:
    return p.size >= LARGE_UPDATE and _all_float32(p, *others)


# Forms of several rows


def _attend(q: Array, k: Array, v: Array, *, maxima: bool = False, **settings: Any) -> Any:
    """Plain XLA's attention. With `maxima`: as `ops.attention.attention_and_maxima`."""
    both = attention.attention_and_maxima(q, k, v, **settings)
    return both if maxima else both[0]


def kept_maxima(run: Callable) -> Callable:
    """A library's attention, which keeps its maxima to itself: one more product finds them."""

    def attend(q: Array, k: Array, v: Array, *, maxima: bool = False, **settings: Any) -> Any:
        out = run(q, k, v, **settings)
        return (out, attention.row_maxima(q, k, **settings, large=True)) if maxima else out

    return attend


_xla = partial(Implementation, "xla")
_on_cpu = partial(Implementation, platforms=("cpu",))
_loops = partial(_on_cpu, "blocks")
_large_blocks = partial(Implementation, "large_blocks", platforms=ACCELERATORS)
_cpp = partial(
    _on_cpu,
    "cpu",
    dtypes=("float32",),
    one_device=True,
    fits=_all_float32,
    why_not=lambda target: library.why_not(),
)
# on a mesh rows stay apart: its axes may shard the length beside the batch
_flat_rows = partial(_on_cpu, "flat_rows", one_device=True, fits=_in_batches)
_cuda = partial(Implementation, platforms=("cuda",), dtypes=("bfloat16",))
_two_rows = partial(Implementation, "two_rows", platforms=GPUS, fits=_one_row)

# Experts by grouped products, see `ops.grouped_product`. megablox does not say which of a mesh's
# axes its results vary along, so `shard_map` refuses it.


def _experts_by(product: GroupedProduct) -> Callable:
    return partial(dispatch.grouped_swiglu, product=product)


_mosaic = partial(_cuda, fits=gpu_products.fits, why_not=gpu_products.why_not)
_MOSAIC = _mosaic("mosaic", _experts_by(gpu_products.MOSAIC))
_MOSAIC_BUT_DW = _mosaic("mosaic_but_dw", _experts_by(gpu_products.MOSAIC_BUT_DW))
_MEGABLOX = Implementation(
    "megablox",
    _experts_by(tpu_products.MEGABLOX),
    platforms=("tpu",),
    dtypes=("bfloat16",),
    one_device=True,
    fits=tpu_products.fits,
)
_RAGGED_ON_TPU = Implementation("ragged_dot", _experts_by(tpu_products.RAGGED_DOT), ("tpu",))
_ROW_BLOCKS = Implementation("row_blocks", _experts_by(ROW_BLOCKS), GPUS)

# Products in 8 bits, by XLA on every platform. GPUs and TPUs multiply bfloat16 instead of float32
# if it holds the rounded numbers exactly. XLA can multiply e4m3 numbers as they are for an H100: by
# arithmetic at most at 107 TFLOP/s, far below bfloat16's, as each 128 of them need a sum in memory.
_RECIPES = (low_precision.FP8, low_precision.FP8_UE8M0, low_precision.MXFP8)
_IN_BFLOAT16 = tuple(recipe.in_bfloat16 for recipe in _RECIPES if recipe.in_bfloat16 != recipe)


def _in_8_bits(
    run: Callable, argument: str = "recipe", make: Callable = lambda recipe: recipe
) -> tuple[Implementation, ...]:
    """The rows of an op's recipes. Args: make: of a recipe, gives `argument` of `run`."""

    def row(recipe: low_precision.Recipe, platforms: tuple[str, ...]) -> Implementation:
        computed = partial(run, **{argument: make(recipe)})
        return Implementation(recipe.name, computed, platforms, precision=recipe.name)

    in_bfloat16 = (row(recipe, ACCELERATORS) for recipe in _IN_BFLOAT16)
    return (*in_bfloat16, *(row(recipe, PLATFORMS) for recipe in _RECIPES))


def _by_expert(recipe: low_precision.Recipe) -> Callable:
    return partial(low_precision.product_by_expert, recipe=recipe)


# The table

TABLE: dict[str, tuple[Implementation, ...]] = {
    # Attention
    "causal_attention": (
        _cpp(cpu_attention.causal_attention),
        Implementation(
            "splash",
            kept_maxima(tpu_attention.causal_attention),
            platforms=("tpu",),
            dtypes=("float32", "bfloat16"),
            fits=tpu_attention.fits,
        ),
        _cuda(
            "tokamax",
            kept_maxima(gpu_attention.tokamax_attention),
            fits=gpu_attention.fits,
            why_not=tokamax_library.why_not,
        ),
        _cuda(
            "cudnn",
            kept_maxima(gpu_attention.cudnn_attention),
            fits=gpu_attention.fits_cudnn,
            why_not=gpu_attention.why_not_cudnn,
        ),
        _large_blocks(partial(_attend, large=True)),
        _xla(_attend),
    ),
    "cached_attention": (
        _cpp(calls.cached_attention, fits=_cached),
        _loops(cpu_attention.cached_attention_in_blocks),
        Implementation(
            "blocks",
            tpu_attention.cached_attention_in_blocks,
            platforms=("tpu",),
            fits=tpu_attention.fits_in_blocks,
        ),
        _xla(cached_attention.cached_attention),
    ),
    "write_rows": (
        _cpp(calls.write_rows, dtypes=calls.CACHE_DTYPES, fits=None),
        _loops(cpu_attention.write_rows),
        Implementation("select", tpu_cache_rows.write_rows, ("tpu",)),
        _xla(cached_attention.write_rows),
    ),
    "index_choose": (
        _large_blocks(partial(indexer.index_choose, most=attention.LARGE_SCORES)),
        _xla(indexer.index_choose),
    ),
    "sparse_attention": (
        _large_blocks(partial(sparse_attention.sparse_attention, most=attention.LARGE_SCORES)),
        _xla(sparse_attention.sparse_attention),
    ),
    "rotate_last": (
        Implementation("by_product", tpu_attention.rotate_last, ("tpu",), ("bfloat16",)),
        _xla(rope.rotate_last),
    ),
    "expand": (
        Implementation("one_product", tpu_attention.expand, ("tpu",), ("bfloat16",)),
        Implementation("in_place", expand_in_place, GPUS),
        _flat_rows(flat_rows.expand),
        _xla(mla.expand),
        *_in_8_bits(low_precision.expand),
    ),
    # Experts
    "grouped_swiglu": (
        _cpp(cpu_experts.grouped_swiglu),
        _loops(expert_loops.grouped_swiglu),
        _MEGABLOX,
        _MOSAIC,
        _MOSAIC_BUT_DW,
        _RAGGED_ON_TPU,
        _ROW_BLOCKS,
        Implementation("ragged_dot", dispatch.grouped_swiglu),
        Implementation("dense", dispatch.dense_swiglu),
        *_in_8_bits(dispatch.grouped_swiglu, "product", low_precision.grouped),
    ),
    "decode_experts": (
        _cpp(cpu_experts.decode_experts),
        _xla(dispatch.decode_experts, ("cpu",)),
        replace(_MOSAIC, fits=_shared_experts),
        Implementation("by_row", decode_by_row, GPUS, fits=_few_choices),
        _RAGGED_ON_TPU,
        _ROW_BLOCKS,
    ),
    "capacity_swiglu": (
        _xla(dispatch.capacity_swiglu),
        *_in_8_bits(dispatch.capacity_swiglu, "product", _by_expert),
    ),
    # Linear layers
    "product": (
        _cpp(cpu_products.product, fits=_few_rows),
        _two_rows(partial(in_two_rows, products.product)),
        _flat_rows(flat_rows.product),
        _xla(products.product),
        *_in_8_bits(low_precision.product),
    ),
    "exact_product": (_cpp(cpu_products.product, fits=_few_rows), _xla(products.exact_product)),
    "swiglu": (
        _cpp(cpu_products.swiglu, fits=_few_rows),
        Implementation("one_pass", swiglu_in_one_pass, GPUS, fits=_many_rows),
        _two_rows(partial(in_two_rows, products.swiglu)),
        _flat_rows(flat_rows.swiglu),
        _xla(products.swiglu),
        *_in_8_bits(low_precision.swiglu),
    ),
    "product_by_head": (
        _cpp(cpu_products.product_by_head, fits=partial(_few_rows, axes=2)),
        _xla(products.product_by_head),
    ),
    # The ends of the model, and the optimizer. tokamax's kernel of the loss, for TPUs, computes the
    # logits twice and does not tell whether a target is the argmax, which the metrics count.
    "embedding": (
        Implementation("in_order", look_up_in_order, GPUS),
        _xla(embedding.look_up),
    ),
    "cross_entropy": (
        Implementation("by_memory", cross_entropy_by_memory, ACCELERATORS),
        _xla(cross_entropy.chunked_cross_entropy),
    ),
    "optimizer": (_cpp(calls.adamw, fits=_large_update), _xla(adamw.adamw_update)),
}


def add(op: str, row: Implementation) -> None:
    """Add a row to an op, after all others, so that it runs only if it is named.

    Example:
        >>> from dsv3_jax.kernels.choose import Kernels, Target
        >>> add("product", Implementation("mine", products.product))
        >>> Kernels(Target("cpu", "product=mine"))("product", jnp.ones(2), jnp.ones(2)).item()
        2.0
        >>> TABLE["product"] = TABLE["product"][:-1]
    """
    TABLE[op] += (row,)
