"""Which implementation of each op runs where: the only file that knows platforms.

An op of `ops/` has several implementations, the rows of TABLE, in order of preference. `Kernels` is
the table for one target: `kernels("product", x, w)` runs the first row that serves the platform,
the dtype, the mesh and the shapes. A row of plain XLA serves all of them, and rows after it run
only if they are named. A new device is a folder beside this file and its rows in TABLE. Kernels
that are elsewhere enter it by `add`.

`prepare` compiles the C++ kernels before anything is traced. While a program is traced nothing is
asked of the process, except whether a mesh of several devices is in use: some kernels run on one
device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from dsv3_jax.config import ConfigError, Execution
from dsv3_jax.kernels import low_precision, verdicts
from dsv3_jax.kernels.cpu import attention as cpu_attention
from dsv3_jax.kernels.cpu import blocks, calls, library
from dsv3_jax.kernels.cpu import experts as cpu_experts
from dsv3_jax.kernels.cpu import products as cpu_products
from dsv3_jax.kernels.gpu import attention as gpu_attention
from dsv3_jax.kernels.gpu import grouped_product as gpu_products
from dsv3_jax.kernels.gpu import tokamax_library
from dsv3_jax.kernels.tpu import attention as tpu_attention
from dsv3_jax.kernels.tpu import cache_rows as tpu_cache_rows
from dsv3_jax.kernels.tpu import grouped_product as tpu_products
from dsv3_jax.ops import (
    adamw,
    attention,
    cached_attention,
    cross_entropy,
    dispatch,
    embedding,
    grouped_product,
    indexer,
    mla,
    products,
    rope,
    sparse_attention,
)

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
GPUS, ACCELERATORS = ("cuda", "rocm"), ("cuda", "rocm", "tpu")
SMALL_BATCH = 64  # rows beyond which a CPU product costs more than reading its weight
MANY_ROWS = 256  # rows that no decoding step on a GPU has, as a rule
# bytes of a weight below which XLA multiplies a single row faster, on two AVX2 cores
LARGE_WEIGHT = 1 << 18
# on average, up to which a GPU reads an expert's weights for each row by itself
ROWS_OF_AN_EXPERT = 4
# bytes of a layer's matrix that a GPU's cache does not hold: each row reads it from memory
LARGE_EXPERTS = 32 << 20
# numbers of an array from which the C++ optimizer, on all threads, is faster than XLA
LARGE_UPDATE = 1 << 16
# ops on float32 arrays, whatever the compute dtype
IN_FLOAT32 = ("embedding", "exact_product", "optimizer")


@dataclass(frozen=True)
class Implementation:
    """One row of the table."""

    name: str
    run: Callable  # with the op's signature
    platforms: tuple[str, ...] = PLATFORMS
    # of the op's first array, in a kernel that is written by hand; (): any, in XLA
    dtypes: tuple[str, ...] = ()
    one_device: bool = False  # not on a mesh of several
    # the op's arguments? None: all. If not, the next row is taken
    fits: Callable[..., bool] | None = None
    # a library, a compiler or a chip that is missing; "" if none is
    why_not: Callable[["Target"], str] | None = None
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
    rows = ROWS_OF_AN_EXPERT if in_cache else 1 / 4  # more are of an expert that others read
    many = expert_ids.size > rows * w_gate.shape[0]
    return many and gpu_products.fits(x, expert_ids, gates, w_gate)


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


_cpp = partial(
    Implementation,
    "cpu",
    platforms=("cpu",),
    dtypes=("float32",),
    one_device=True,
    fits=_all_float32,
    why_not=lambda target: library.why_not(),
)
_xla = partial(Implementation, "xla")
_loops = partial(Implementation, "blocks", platforms=("cpu",))
_cuda = partial(Implementation, platforms=("cuda",), dtypes=("bfloat16",))
_by_mosaic = partial(_cuda, fits=gpu_products.fits, why_not=gpu_products.why_not)
_mosaic, _mosaic_but_dw = partial(_by_mosaic, "mosaic"), partial(_by_mosaic, "mosaic_but_dw")
# megablox does not say which of a mesh's axes its results vary along, so `shard_map` refuses it.
_megablox = partial(
    Implementation,
    "megablox",
    platforms=("tpu",),
    dtypes=("bfloat16",),
    one_device=True,
    fits=tpu_products.fits,
)
_ragged_on_tpu = partial(Implementation, "ragged_dot", platforms=("tpu",))
# Products in 8 bits, by XLA on every platform. GPUs and TPUs multiply bfloat16 instead of float32
# if it holds the rounded numbers exactly. XLA can multiply e4m3 numbers as they are for an H100.
# But a scale for each 128 of them then needs a sum in memory for each. By arithmetic that allows at
# most 107 TFLOP/s at 3.35 TB/s, far below bfloat16's.
_RECIPES = (low_precision.FP8, low_precision.FP8_UE8M0, low_precision.MXFP8)
_IN_BFLOAT16 = tuple(recipe.in_bfloat16 for recipe in _RECIPES if recipe.in_bfloat16 != recipe)


def _low_precision(
    run: Callable, argument: str = "recipe", make: Callable = lambda recipe: recipe
) -> tuple:
    """The rows of an op's recipes. Args: make: of a recipe, gives `argument` of `run`."""
    return tuple(
        Implementation(
            recipe.name, partial(run, **{argument: make(recipe)}), platforms, precision=recipe.name
        )
        for recipes, platforms in ((_IN_BFLOAT16, ACCELERATORS), (_RECIPES, PLATFORMS))
        for recipe in recipes
    )


_BY_PRODUCTS = (
    _mosaic(partial(dispatch.grouped_swiglu, product=gpu_products.MOSAIC)),
    _ragged_on_tpu(partial(dispatch.grouped_swiglu, product=tpu_products.RAGGED_DOT)),
    Implementation(
        "row_blocks", partial(dispatch.grouped_swiglu, product=grouped_product.ROW_BLOCKS), GPUS
    ),
)

TABLE: dict[str, tuple[Implementation, ...]] = {
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
        Implementation("large_blocks", partial(_attend, large=True), ACCELERATORS),
        _xla(_attend),
    ),
    "cached_attention": (
        _cpp(calls.cached_attention, fits=_cached),
        _loops(cpu_attention.cached_attention_in_blocks),
        Implementation(
            "blocks",
            tpu_attention.cached_attention_in_blocks,
            ("tpu",),
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
        Implementation(
            "large_blocks", partial(indexer.choose, most=attention.LARGE_SCORES), ACCELERATORS
        ),
        _xla(indexer.choose),
    ),
    "sparse_attention": (
        Implementation(
            "large_blocks",
            partial(sparse_attention.sparse_attention, most=attention.LARGE_SCORES),
            ACCELERATORS,
        ),
        _xla(sparse_attention.sparse_attention),
    ),
    "grouped_swiglu": (
        _cpp(cpu_experts.grouped_swiglu),
        _loops(blocks.blocks_swiglu),
        _megablox(partial(dispatch.grouped_swiglu, product=tpu_products.MEGABLOX)),
        _BY_PRODUCTS[0],
        _mosaic_but_dw(partial(dispatch.grouped_swiglu, product=gpu_products.MOSAIC_BUT_DW)),
        *_BY_PRODUCTS[1:],
        Implementation("ragged_dot", dispatch.grouped_swiglu),
        Implementation("dense", dispatch.dense_swiglu),
        *_low_precision(dispatch.grouped_swiglu, "product", low_precision.grouped),
    ),
    "decode_experts": (
        _cpp(cpu_experts.decode_experts),
        _xla(dispatch.decode_experts, ("cpu",)),
        replace(_BY_PRODUCTS[0], fits=_shared_experts),
        Implementation("by_row", dispatch.decode_by_row, GPUS, fits=_few_choices),
        *_BY_PRODUCTS[1:],
    ),
    "product": (
        _cpp(cpu_products.product, fits=_few_rows),
        Implementation(
            "two_rows", partial(products.in_two_rows, products.product), GPUS, fits=_one_row
        ),
        _xla(products.product),
        *_low_precision(low_precision.product),
    ),
    "exact_product": (_cpp(cpu_products.product, fits=_few_rows), _xla(products.exact_product)),
    "swiglu": (
        _cpp(cpu_products.swiglu, fits=_few_rows),
        Implementation("one_pass", products.swiglu_in_one_pass, GPUS, fits=_many_rows),
        Implementation(
            "two_rows", partial(products.in_two_rows, products.swiglu), GPUS, fits=_one_row
        ),
        _xla(products.swiglu),
        *_low_precision(low_precision.swiglu),
    ),
    "product_by_head": (
        _cpp(cpu_products.product_by_head, fits=partial(_few_rows, axes=2)),
        _xla(products.product_by_head),
    ),
    # tokamax has a kernel for TPUs. It computes the logits twice, these rows once, and it does not
    # tell whether a target is the argmax, which the metrics count.
    "cross_entropy": (
        Implementation("by_memory", cross_entropy.cross_entropy_by_memory, ACCELERATORS),
        _xla(cross_entropy.chunked_cross_entropy),
    ),
    "embedding": (
        Implementation("in_order", embedding.look_up_in_order, GPUS),
        _xla(embedding.look_up),
    ),
    "optimizer": (
        _cpp(
            calls.adamw,
            fits=lambda p, *rest, **settings: p.size >= LARGE_UPDATE and _all_float32(p, *rest),
        ),
        _xla(adamw.adamw_update),
    ),
    "rotate_last": (
        Implementation("by_product", tpu_attention.rotate_last, ("tpu",), ("bfloat16",)),
        _xla(rope.rotate_last),
    ),
    "expand": (
        Implementation("one_product", tpu_attention.expand, ("tpu",), ("bfloat16",)),
        Implementation("in_place", mla.expand_in_place, GPUS),
        _xla(mla.expand),
        *_low_precision(low_precision.expand),
    ),
    "capacity_swiglu": (
        _xla(dispatch.capacity_swiglu),
        *_low_precision(
            dispatch.capacity_swiglu,
            "product",
            lambda recipe: partial(low_precision.product_by_expert, recipe=recipe),
        ),
    ),
}


def add(op: str, row: Implementation) -> None:
    """Add a row to an op, after all others, so that it runs only if it is named.

    Example:
        >>> add("product", Implementation("mine", products.product))
        >>> Kernels(Target("cpu", "product=mine"))("product", jnp.ones(2), jnp.ones(2)).item()
        2.0
        >>> TABLE["product"] = TABLE["product"][:-1]
    """
    TABLE[op] += (row,)


@dataclass(frozen=True)
class Target:
    """The platform that a program is compiled for, and its kernels.

    Raises: ConfigError for an unknown platform or kernel.

    Example:
        >>> Target("cpu", "auto,product=xla").forced("product").name
        'xla'
    """

    platform: str  # of the devices that the program is compiled for: one of PLATFORMS
    kernels: str = "auto"  # Execution.kernels
    # a GPU's compute capability, such as "9.0"; a TPU's kind, such as "TPU v5p"; "" if not known
    chip: str = ""
    precision: str = "none"  # Execution.precision

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ConfigError(f"platform={self.platform!r} is not one of {', '.join(PLATFORMS)}")
        base, by_op = self.asked
        names = {op: dict.fromkeys(row.name for row in rows) for op, rows in TABLE.items()}
        if base not in (known := {"auto", *(name for of_op in names.values() for name in of_op)}):
            raise ConfigError(f"kernels={base!r} is not one of {', '.join(sorted(known))}")
        for op, name in by_op.items():
            if op not in TABLE:
                raise ConfigError(
                    f"kernels={op}={name}: {op!r} is not one of the ops {', '.join(TABLE)}"
                )
            if name not in names[op]:
                raise ConfigError(
                    f"kernels={op}={name}: {name!r} is not one of {', '.join(names[op])}"
                )

    @property
    def asked(self) -> tuple[str, dict[str, str]]:
        """(The name for all ops, the names for single ones)."""
        words = self.kernels.split(",")
        base = "auto" if "=" in words[0] else words.pop(0)
        return base, dict(word.split("=") for word in words)

    def name_of(self, op: str) -> str:
        """The row of an op asked for by name; "" if the choice is free or there is none."""
        base, by_op = self.asked
        name = by_op.get(op) or ("" if base == "xla" else base)
        return name if any(row.name == name for row in TABLE[op]) else ""

    def here(self, op: str) -> list[Implementation]:
        """The rows of an op for the platform and the precision, or without one if it has none."""
        precisions = {row.precision for row in TABLE[op]}
        precision = self.precision if self.precision in precisions else "none"
        rows = (row for row in TABLE[op] if self.platform in row.platforms)
        return [row for row in rows if row.precision == precision]

    def forced(self, op: str) -> Implementation | None:
        """The row of `here` that is asked for by name; None if the choice is free."""
        return next((row for row in self.here(op) if row.name == self.name_of(op)), None)

    def rows(self, op: str) -> list[Implementation]:
        """The rows of an op that may run, in order: to the first that serves everything."""
        xla_only = self.asked[0] == "xla" and not self.name_of(op)
        rows = [row for row in self.here(op) if not (xla_only and row.dtypes)]
        forced = self.forced(op)
        last = next(i for i, row in enumerate(rows) if not (row.dtypes or row.fits or row.why_not))
        others = [row for row in rows[: last + 1] if row is not forced]
        return others if forced is None else [forced, *others]


@dataclass(frozen=True)
class Kernels:
    """The ops of a target. Call it with an op of TABLE and the op's own arguments, see `ops/`.

    Hashable, so modules hold it as a static value. Made by `prepare`.

    Example:
        >>> Kernels(Target("cpu", "xla"))("product", jnp.ones(2), jnp.ones(2)).item()
        2.0
    """

    target: Target
    missing: tuple[tuple[str, str], ...] = ()  # (implementation, why it cannot run here)
    # (`Implementation.of`, what `dsv3 info --check` found wrong on this chip)
    wrong: tuple[tuple[str, str], ...] = ()

    def __call__(self, op: str, *args: Any, **settings: Any) -> Any:
        return self.pick(op, *args, **settings).run(*args, **settings)

    def pick(self, op: str, *args: Any, **settings: Any) -> Implementation:
        """The row that runs an op for these arguments.

        Raises: ConfigError if a row was asked for by name and does not serve the dtype or the mesh.
        """
        mesh = jax.sharding.get_abstract_mesh()
        dtype = jax.tree.leaves(args)[0].dtype.name
        devices = 1 if mesh.empty else mesh.size
        if self.target.forced(op) is not None:
            self._check(op, dtype, devices)
        for row in self._available(op):
            if row.serves(dtype, devices) and (row.fits is None or row.fits(*args, **settings)):
                return row
        raise AssertionError(f"{op} has no row that always fits")

    def _available(self, op: str) -> list[Implementation]:
        """The rows that can run. One that is wrong here runs only if named, or if no other can."""
        rows = [row for row in self.target.rows(op) if row.name not in dict(self.missing)]
        kept = (self.target.forced(op), rows[-1])
        return [row for row in rows if row.of(op) not in dict(self.wrong) or row in kept]

    def _check(self, op: str, dtype: str, devices: int) -> None:
        """Refuse a row that is asked for by name, where it cannot run."""
        target = self.target
        name = self.target.name_of(op)
        row = self.target.forced(op)
        if not name:
            return
        if row is None:
            rows = ", ".join(dict.fromkeys(row.name for row in target.here(op)))
            where = f"on {target.platform} in precision={target.precision!r}"
            reason = f"is not available {where}: {op} has {rows}"
        elif name in dict(self.missing):
            reason = f"is not available here: {dict(self.missing)[name]}"
        elif not row.serves(dtype, devices):
            reason = f"does not serve {op} in {dtype} with devices={devices}: it is {row.made_for}"
        else:
            return
        raise ConfigError(f"kernels={target.kernels!r} {reason}; use 'auto' or 'xla'")

    @property
    def in_compute_dtype(self) -> "Kernels":
        """The same without 8-bit products: for the output head, and for decoding."""
        return replace(self, target=replace(self.target, precision="none"))

    @property
    def cache_row_multiple(self) -> int:
        """Rows of a cache are padded to a multiple of it: TPUs transpose rows of fewer lanes."""
        return 128 if self.target.platform == "tpu" else 1

    @property
    def slices_experts(self) -> bool:
        """Whether XLA reads a layer's chosen experts out of the stack of all, without a copy.

        On a TPU the grouped product needs a separate array.
        """
        return self.target.platform in GPUS

    @property
    def turns_experts(self) -> bool:
        """Whether a grouped product's gradient is faster by experts that are transposed before.

        A TPU's. Under fsdp each device transposes its part, before they are gathered.
        """
        return self.target.platform == "tpu" and self.target.precision == "none"

    @property
    def reads_all_slots(self) -> bool:
        """Whether attention to a cache reads empty slots: a GPU's has no loop that ends before."""
        return self.target.platform in GPUS

    @property
    def scan_copies(self) -> bool:
        """Whether a scan over layers loses much time in copies of what its backward pass reads."""
        return self.target.platform == "cpu"

    def chosen(self, dtype: Any = "float32", devices: int = 1) -> dict[str, str]:
        """The implementation of each op for large arrays of a dtype on so many devices, by name.

        Example:
            >>> Kernels(Target("cpu", "xla")).chosen()["product"]
            'xla'
        """
        dtypes = {op: "float32" if op in IN_FLOAT32 else jnp.dtype(dtype).name for op in TABLE}
        return {
            op: next(r.name for r in self._available(op) if r.serves(dtypes[op], devices))
            for op in TABLE
        }

    def describe(self, dtype: Any = "float32", devices: int = 1) -> str:
        """One short line on what runs; `dsv3 info PRESET --kernels` lists it by op.

        Example:
            >>> Kernels(Target("tpu", "xla"), (("tokamax", "it is not installed"),)).describe()
            'kernels for tpu: large_blocks, blocks, select, ragged_dot, xla, by_memory'
        """
        names = dict.fromkeys(self.chosen(dtype, devices).values())
        line = f"kernels for {self.target.platform}: {', '.join(names)}"
        wanted = {row.name for op in TABLE for row in self.target.rows(op)}
        lacking = [name for name, _ in self.missing if name in wanted]
        line += f"; without {', '.join(lacking)}: see `dsv3 info tiny --kernels`" if lacking else ""
        wrong = (f"; not {name}, which is wrong here: {reason}" for name, reason in self.wrong)
        return line + "".join(wrong)


def platform_of(mesh: Mesh | None = None) -> str:
    """The platform of a mesh's devices; None means JAX's default device.

    Example:
        >>> platform_of() in PLATFORMS
        True
    """
    return _platform_name(_device_of(mesh))


def _device_of(mesh: Mesh | None) -> Any:
    device = jax.config.jax_default_device if mesh is None else mesh.devices.flat[0]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device


def _chip_of(device: Any) -> str:
    """See `Target.chip`."""
    if device.platform == "gpu":
        return str(getattr(device, "compute_capability", ""))
    return device.device_kind if device.platform == "tpu" else ""


def _platform_name(device: Any) -> str:
    """JAX calls every GPU "gpu", and lowers for "cuda" or "rocm"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in getattr(device.client, "platform_version", "").lower() else "cuda"


def prepare(
    execution: Execution | None = None,
    *,
    platform: str | None = None,
    chip: str = "",
    mesh: Mesh | None = None,
) -> Kernels:
    """Choose a target's kernels; compile and load those in C++ it may use. Call before tracing.

    Args:
        execution: says which kernels are asked for. Default: "auto".
        platform, chip: what is compiled for, see `Target`. None means that of `mesh`, see
            `platform_of`.
    Raises: ConfigError for kernels that the target does not have, that do not serve the dtype or
        the mesh, or that cannot be compiled here.

    Example:
        >>> prepare(Execution(kernels="xla")).chosen()["product"]
        'xla'
    """
    execution = execution or Execution()
    if platform is None:
        platform = platform_of(mesh)
        chip = _chip_of(_device_of(mesh))
    target = Target(platform, execution.kernels, chip, execution.precision)
    rows = {
        row.name: row.why_not for op in TABLE for row in target.rows(op) if row.why_not is not None
    }
    missing = tuple((name, reason) for name, why_not in rows.items() if (reason := why_not(target)))
    kernels = Kernels(target, missing, tuple(verdicts.read(platform, chip).items()))
    for op in TABLE:
        dtype = "float32" if op in IN_FLOAT32 else execution.compute_dtype
        kernels._check(op, dtype, 1 if mesh is None else mesh.size)
    return kernels
