"""Which implementation of each op runs where: the only file that knows platforms.

An op of `ops/` has several implementations. TABLE lists them in order of preference, and plain XLA comes last and fits
always. `Kernels` is the table for one target. Modules get it once and call its methods. The first row that serves the
target, the dtypes and the shapes runs. A new device is a folder beside this file and its rows in TABLE.

`prepare` compiles the C++ kernels before anything is traced. While a program is traced nothing is asked of the process,
except whether a mesh of several devices is in use: the C++ kernels run on one device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import OPTAX, ConfigError, Execution
from dsv3_jax.kernels import low_precision
from dsv3_jax.kernels.cpu import attention as cpu_attention
from dsv3_jax.kernels.cpu import blocks, calls, library
from dsv3_jax.kernels.cpu import experts as cpu_experts
from dsv3_jax.kernels.cpu import products as cpu_products
from dsv3_jax.kernels.gpu import attention as gpu_attention
from dsv3_jax.kernels.gpu import fp8 as gpu_fp8
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
    mla,
    products,
)
from dsv3_jax.ops.cached_attention import Stored

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
GPUS, ACCELERATORS = ("cuda", "rocm"), ("cuda", "rocm", "tpu")
SMALL_BATCH = 64  # rows beyond which a CPU product costs more than reading its weight
LARGE_WEIGHT = 1 << 18  # bytes of a weight below which XLA multiplies a single row faster, on two AVX2 cores
ROWS_OF_AN_EXPERT = 4  # on average, up to which a GPU reads an expert's weights for each row by itself
LARGE_UPDATE = 1 << 16  # numbers of an array from which the C++ optimizer, on all threads, is faster than XLA


def _always(*arrays: Array, **settings: Any) -> bool:
    return True


@dataclass(frozen=True)
class Implementation:
    """One row of the table."""

    name: str
    run: Callable
    platforms: tuple[str, ...] = PLATFORMS
    serves: Callable[..., bool] = _always  # the arrays' dtypes? If not, forcing this row is an error
    made_for: str = "for other arrays"  # what `serves` asks, in words: "for float32 on one device"
    fits: Callable[..., bool] = _always  # the arrays' shapes? If not, the next row is taken
    by_hand: bool = False  # not compiled by XLA: left out by kernels="xla"
    by_name: bool = False  # never chosen by "auto"
    precision: str = "none"  # Execution.precision that it computes in
    why_not: Callable[["Target"], str] | None = None  # a library, a compiler or a chip that is missing; "" if none is
    only: str = ""  # the one compute dtype that it serves, for reports; "" means any, or C++
    alone: bool = False  # it serves one device, for reports
    slow: str = ""  # why it is slow on GPUs, in words
    with_maxima: Callable | None = None  # of attention: the same, and each row's largest score at no further product


def _on_one_device() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _float32_on_one_device(*arrays: Array) -> bool:
    return all(a.dtype == jnp.float32 for a in arrays) and _on_one_device()


def _bfloat16_on_one_device(x: Array, *weights: Array) -> bool:
    """megablox does not say which of a mesh's axes its results vary along, so `shard_map` refuses it."""
    return x.dtype == jnp.bfloat16 and _on_one_device()


def _cached(q: Array, rows: Array) -> bool:
    return _float32_on_one_device(q) and rows.dtype.name in calls.CACHE_DTYPES


def _few_rows(x: Array, w: Array, axes: int = 1) -> bool:
    rows = x.size // max(_size(x.shape[x.ndim - axes :]), 1)
    return rows <= SMALL_BATCH and (rows > 1 or w.nbytes >= LARGE_WEIGHT)


def _few_choices(gates: Array, w_gate: Array) -> bool:
    return gates.size <= ROWS_OF_AN_EXPERT * w_gate.shape[0]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


_cpp = partial(
    Implementation,
    "cpu",
    platforms=("cpu",),
    serves=_float32_on_one_device,
    made_for="for float32 on one device",
    by_hand=True,
    why_not=lambda target: library.why_not(),
)
_loops = partial(Implementation, "blocks", platforms=("cpu",))
_xla = partial(Implementation, "xla")

_in_bfloat16 = partial(
    Implementation, serves=gpu_products.in_bfloat16, made_for="for bfloat16", only="bfloat16", by_hand=True
)
_attention = partial(_in_bfloat16, platforms=("cuda",), serves=gpu_attention.in_bfloat16)
_on_hopper = partial(_in_bfloat16, platforms=("cuda",), fits=gpu_products.fits)
_mosaic = partial(_on_hopper, "mosaic", why_not=gpu_products.why_not)
_tokamax = partial(_on_hopper, "tokamax", by_name=True, why_not=tokamax_library.why_not)
_hopper = partial(_on_hopper, "hopper", by_name=True, why_not=gpu_products.why_not_hopper)
_megablox = partial(
    _in_bfloat16,
    "megablox",
    platforms=("tpu",),
    serves=_bfloat16_on_one_device,
    made_for="for bfloat16 on one device",
    fits=tpu_products.fits,
    alone=True,
)
_ragged_on_tpu = partial(Implementation, "ragged_dot", platforms=("tpu",))
_row_blocks = partial(
    Implementation, "row_blocks", platforms=GPUS, slow="it multiplies one block of rows after the other"
)
# Products in 8 bits, by XLA on every platform. GPUs and TPUs multiply bfloat16 instead of float32 if it holds the
# rounded numbers exactly. XLA can multiply e4m3 numbers as they are for an H100. But a scale for each 128 of them then
# needs a sum in memory for each. By arithmetic that allows at most 107 TFLOP/s at 3.35 TB/s, far below bfloat16's. The
# project's kernel for Hopper scales in registers.
_RECIPES = (low_precision.FP8, low_precision.FP8_UE8M0, low_precision.MXFP8)
_IN_BFLOAT16 = tuple(recipe.in_bfloat16 for recipe in _RECIPES if recipe.in_bfloat16 != recipe)


def _low_precision(run: Callable, **by_recipe: Callable[[low_precision.Recipe], Any]) -> tuple[Implementation, ...]:
    """The rows of an op's recipes. Args: by_recipe: makes an argument of `run`; none means `recipe` itself."""
    by_recipe = by_recipe or {"recipe": lambda recipe: recipe}
    return tuple(
        Implementation(
            recipe.name,
            partial(run, **{name: make(recipe) for name, make in by_recipe.items()}),
            platforms,
            precision=recipe.name,
        )
        for recipes, platforms in ((_IN_BFLOAT16, ACCELERATORS), (_RECIPES, PLATFORMS))
        for recipe in recipes
    )


def _hopper_fp8(op: str, run: Callable) -> tuple[Implementation, ...]:
    """The rows of an op whose products multiply e4m3 numbers on Hopper."""
    return tuple(
        Implementation(
            "hopper",
            partial(run, recipe=replace(recipe, scaled_product=gpu_fp8.scaled_product)),
            ("cuda",),
            lambda *arrays: _on_one_device(),
            "for one device",
            gpu_fp8.FITS[op],
            by_hand=True,
            by_name=True,
            alone=True,
            precision=recipe.name,
            why_not=gpu_products.why_not_hopper,
        )
        for recipe in _RECIPES
        if recipe.tile == gpu_fp8.BLOCK
    )


def _rounded_before(row: Callable[..., Implementation], run: Callable, product: Any) -> tuple[Implementation, ...]:
    """The rows of a grouped product in bfloat16 that multiplies the rounded operands of each recipe."""
    return tuple(
        row(partial(run, product=low_precision.grouped(recipe, product)), precision=recipe.name)
        for recipe in _IN_BFLOAT16
    )


_every_row = partial(
    Implementation, "ragged_dot", by_name=True, slow="XLA multiplies every row with every expert there"
)

TABLE: dict[str, tuple[Implementation, ...]] = {
    "causal_attention": (
        _cpp(cpu_attention.causal_attention, with_maxima=cpu_attention.attention_and_maxima),
        Implementation(
            "splash",
            tpu_attention.causal_attention,
            platforms=("tpu",),
            serves=tpu_attention.serves,
            made_for="for float32 or bfloat16",
            fits=tpu_attention.fits,
            by_hand=True,
        ),
        _attention(
            "tokamax", gpu_attention.tokamax_attention, fits=gpu_attention.fits, why_not=tokamax_library.why_not
        ),
        _attention(
            "cudnn", gpu_attention.cudnn_attention, fits=gpu_attention.fits_cudnn, why_not=gpu_attention.why_not_cudnn
        ),
        Implementation(
            "large_blocks",
            partial(attention.causal_attention, large=True),
            platforms=ACCELERATORS,
            with_maxima=partial(attention.attention_and_maxima, large=True),
        ),
        _xla(attention.causal_attention, with_maxima=attention.attention_and_maxima),
    ),
    "cached_attention": (
        _cpp(calls.cached_attention, serves=_cached),
        _loops(cpu_attention.cached_attention_in_blocks),
        _xla(cached_attention.cached_attention),
    ),
    "write_rows": (
        _loops(cpu_attention.write_rows),
        Implementation("select", tpu_cache_rows.write_rows, platforms=("tpu",)),
        _xla(cached_attention.write_rows),
    ),
    "grouped_swiglu": (
        _cpp(cpu_experts.grouped_swiglu),
        _loops(blocks.blocks_swiglu),
        _mosaic(partial(dispatch.grouped_swiglu, product=gpu_products.MOSAIC)),
        _tokamax(partial(dispatch.grouped_swiglu, product=gpu_products.TOKAMAX)),
        _hopper(partial(dispatch.grouped_swiglu, product=gpu_products.HOPPER_PRODUCTS)),
        _megablox(partial(dispatch.grouped_swiglu, product=tpu_products.MEGABLOX)),
        _ragged_on_tpu(partial(dispatch.grouped_swiglu, product=tpu_products.RAGGED_DOT)),
        _row_blocks(partial(dispatch.grouped_swiglu, product=grouped_product.ROW_BLOCKS)),
        _every_row(dispatch.grouped_swiglu),
        Implementation("dense", dispatch.dense_swiglu, by_name=True),
        *_rounded_before(_mosaic, dispatch.grouped_swiglu, gpu_products.MOSAIC),
        *_rounded_before(_megablox, dispatch.grouped_swiglu, tpu_products.MEGABLOX),
        *_rounded_before(_ragged_on_tpu, dispatch.grouped_swiglu, tpu_products.RAGGED_DOT),
        *_low_precision(dispatch.grouped_swiglu, product=low_precision.grouped),
    ),
    "decode_experts": (
        _cpp(cpu_experts.decode_experts),
        _xla(dispatch.decode_experts, platforms=("cpu",)),
        Implementation("by_row", dispatch.decode_by_row, platforms=GPUS, fits=_few_choices),
        _mosaic(partial(dispatch.grouped_swiglu, product=gpu_products.MOSAIC)),
        _tokamax(partial(dispatch.grouped_swiglu, product=gpu_products.TOKAMAX)),
        _hopper(partial(dispatch.grouped_swiglu, product=gpu_products.HOPPER_PRODUCTS)),
        _ragged_on_tpu(partial(dispatch.grouped_swiglu, product=tpu_products.RAGGED_DOT)),
        _row_blocks(partial(dispatch.grouped_swiglu, product=grouped_product.ROW_BLOCKS)),
        *_low_precision(dispatch.grouped_swiglu, product=low_precision.grouped),
    ),
    "product": (
        _cpp(cpu_products.product, fits=_few_rows),
        *_hopper_fp8("product", low_precision.product),
        *_low_precision(low_precision.product),
        _xla(products.product),
    ),
    "exact_product": (_cpp(cpu_products.product, fits=_few_rows), _xla(products.exact_product)),
    "swiglu": (
        _cpp(cpu_products.swiglu, fits=_few_rows),
        *_hopper_fp8("swiglu", low_precision.swiglu),
        *_low_precision(low_precision.swiglu),
        _xla(products.swiglu),
    ),
    "product_by_head": (_cpp(cpu_products.product_by_head, fits=_few_rows), _xla(products.product_by_head)),
    # tokamax has a kernel for TPUs. It computes the logits twice, these rows once, and it does not tell whether a
    # target is the argmax, which the metrics count.
    "cross_entropy": (
        Implementation("by_memory", cross_entropy.cross_entropy_by_memory, ACCELERATORS),
        _xla(cross_entropy.chunked_cross_entropy),
    ),
    "embedding": (Implementation("in_order", embedding.look_up_in_order, GPUS), _xla(embedding.look_up)),
    "optimizer": (_cpp(calls.adamw, fits=lambda p, *_: p.size >= LARGE_UPDATE), _xla(adamw.adamw_update)),
    "expand": (*_hopper_fp8("expand", low_precision.expand), *_low_precision(low_precision.expand), _xla(mla.expand)),
    "capacity_swiglu": (
        *_low_precision(dispatch.capacity_swiglu, product=lambda r: partial(low_precision.product_by_expert, recipe=r)),
        _xla(dispatch.capacity_swiglu),
    ),
}


IN_FLOAT32 = ("embedding", "exact_product", "optimizer")  # ops on float32 arrays, whatever the compute dtype


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
    chip: str = ""  # a GPU's compute capability, such as "9.0"; a TPU's kind, such as "TPU v5p"; "" if not known
    precision: str = "none"  # Execution.precision

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ConfigError(f"platform={self.platform!r} is not one of {', '.join(PLATFORMS)}")
        base, by_op = self.asked
        names = {row.name for rows in TABLE.values() for row in rows}
        if base not in ("auto", *names):
            raise ConfigError(f"kernels={base!r} is not one of auto, {', '.join(sorted(names))}")
        for op, name in by_op.items():
            if op not in TABLE:
                raise ConfigError(f"kernels={op}={name}: {op!r} is not one of the ops {', '.join(TABLE)}")
            if name not in (known := dict.fromkeys(row.name for row in TABLE[op])):
                raise ConfigError(f"kernels={op}={name}: {name!r} is not one of {', '.join(known)}")
        for op in TABLE:
            row = self.forced(op)
            if row is not None and self.platform not in row.platforms:
                raise ConfigError(
                    f"kernels={row.name!r} is not available for {self.platform}: {op} has it for "
                    f"{', '.join(row.platforms)} only; use 'auto' or 'xla'"
                )
            if row is not None and row.precision != self.precision_of(op):
                raise ConfigError(
                    f"kernels={row.name!r} does not compute {op} in precision={self.precision_of(op)!r}; "
                    f"use 'auto' or 'xla'"
                )

    def precision_of(self, op: str) -> str:
        """The precision that an op is computed in: "none" for ops that stay in the compute dtype or wider."""
        return self.precision if any(row.precision == self.precision for row in TABLE[op]) else "none"

    @property
    def asked(self) -> tuple[str, dict[str, str]]:
        """(The name for all ops, the names for single ones)."""
        words = self.kernels.split(",")
        base = "auto" if "=" in words[0] else words.pop(0)
        return base, dict(word.split("=") for word in words)

    def forced(self, op: str) -> Implementation | None:
        """The row of an op that is asked for by name; None if the choice is free."""
        base, by_op = self.asked
        name = by_op.get(op) or ("" if base == "xla" else base)
        rows = [row for row in TABLE[op] if row.name == name]
        here = [row for row in rows if self.platform in row.platforms]
        in_precision = [row for row in here if row.precision == self.precision_of(op)]
        return next(iter([*in_precision, *here, *rows]), None)

    @property
    def in_compute_dtype(self) -> "Target":
        """The same without 8-bit products, and without the names of kernels that compute nothing else."""
        if self.precision == "none":
            return self
        base, by_op = self.asked
        if base not in ("auto", "xla"):
            base, by_op = "auto", dict.fromkeys(TABLE, base) | by_op
        known = {op: {row.name for row in TABLE[op] if row.precision == "none"} for op in TABLE}
        names = [f"{op}={name}" for op, name in by_op.items() if name in known[op]]
        return replace(self, kernels=",".join([base, *names]), precision="none")

    def rows(self, op: str) -> list[Implementation]:
        """The rows of an op that may run, in order."""
        free = self.asked[0] != "xla" or op in self.asked[1]
        precision = self.precision_of(op)
        rows = [row for row in TABLE[op] if self.platform in row.platforms and row.precision == precision]
        rows = [row for row in rows if not row.by_name and (free or not row.by_hand)]
        forced = self.forced(op)
        return rows if forced is None else [forced, *(row for row in rows if row is not forced)]


@dataclass(frozen=True)
class Kernels:
    """The ops of a target: each method is an op of `ops/`, run by the first row of TABLE that serves its arguments.

    Hashable, so modules hold it as a static value. Made by `prepare`.

    Example:
        >>> Kernels(Target("cpu", "xla")).chosen()["product"]
        'xla'
    """

    target: Target
    missing: tuple[tuple[str, str], ...] | None = None  # (implementation, why it cannot run); None: nobody has asked

    def why_not(self, row: Implementation) -> str:
        """Why an implementation cannot run here, in words; "" if it can."""
        if row.why_not is None:
            return ""
        return "prepare() was not called" if self.missing is None else dict(self.missing).get(row.name, "")

    def pick(self, op: str, *arrays: Array, **settings: Any) -> Implementation:
        """The row that runs an op for arrays of those dtypes and shapes.

        Raises: ValueError if a row was asked for by name and does not serve the dtypes.
        """
        forced = self.target.forced(op)
        for row in self.target.rows(op):
            if self.why_not(row):
                continue
            if not row.serves(*arrays):
                if row is forced:
                    dtypes = ", ".join(dict.fromkeys(str(a.dtype) for a in arrays))
                    raise ValueError(
                        f"kernels={row.name!r} does not serve {op} in {dtypes} here: it is {row.made_for}; "
                        f"use 'auto' or 'xla'"
                    )
                continue
            if row.fits(*arrays, **settings):
                return row
        raise AssertionError(f"{op} has no row that always fits")

    @property
    def in_compute_dtype(self) -> "Kernels":
        """The same without 8-bit products: for the output head, and for decoding."""
        return replace(self, target=self.target.in_compute_dtype)

    # Attention

    def causal_attention(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G V"],
        *,
        scale: float,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T H V"]:
        """See `ops.attention.causal_attention`."""
        run = self.pick("causal_attention", q, k, v, packed=segment_ids is not None).run
        return run(q, k, v, scale=scale, segment_ids=segment_ids)

    def attention_and_maxima(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B T G K"],
        v: Float[Array, "B T G V"],
        *,
        scale: float,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
        """See `ops.attention.attention_and_maxima`.

        Libraries' kernels keep the maxima to themselves. Beside them `ops.attention.row_maxima` runs: one more product
        of queries and keys, in plain XLA.
        """
        row = self.pick("causal_attention", q, k, v, packed=segment_ids is not None)
        if row.with_maxima is not None:
            return row.with_maxima(q, k, v, scale=scale, segment_ids=segment_ids)
        maxima = attention.row_maxima(q, k, scale=scale, segment_ids=segment_ids, large=True)
        return row.run(q, k, v, scale=scale, segment_ids=segment_ids), maxima

    def cached_attention(
        self,
        queries: Sequence[Float[Array, "B G Q _"]],
        keys: Sequence[Stored],
        values: Stored,
        last: Int[Array, "B Q"],
        *,
        scale: float,
    ) -> Float[Array, "B G Q V"]:
        """See `ops.cached_attention.cached_attention`."""
        run = self.pick("cached_attention", queries[0], values.rows).run
        return run(queries, keys, values, last, scale=scale)

    def write_rows(self, stored: Any, new: Any, layer: Int[Array, ""], first: Int[Array, " B"]) -> Any:
        """See `ops.cached_attention.write_rows`."""
        return self.pick("write_rows", first).run(stored, new, layer, first)

    @property
    def cache_row_multiple(self) -> int:
        """Rows of a cache are padded to a multiple of it: TPUs transpose arrays whose rows do not fill 128 lanes."""
        return 128 if self.target.platform == "tpu" else 1

    @property
    def slices_experts(self) -> bool:
        """Whether XLA reads the chosen experts of a layer out of the stack of all, without a copy of the layer.

        On a TPU the grouped product wants an array of its own.
        """
        return self.target.platform in GPUS

    @property
    def scan_copies(self) -> bool:
        """Whether a scan over layers loses much time in copies, into stacks, of what its backward pass reads."""
        return self.target.platform == "cpu"

    # Routed experts

    def grouped_swiglu(
        self,
        x: Float[Array, "n D"],
        expert_ids: Int[Array, "n K"],
        gates: Float[Array, "n K"],
        w_gate: Float[Array, "E D F"],
        w_up: Float[Array, "E D F"],
        w_down: Float[Array, "E F D"],
    ) -> Float[Array, "n D"]:
        """See `ops.dispatch.grouped_swiglu`."""
        run = self.pick("grouped_swiglu", x, w_gate).run
        return run(x, expert_ids, gates.astype(x.dtype), w_gate, w_up, w_down)

    def capacity_swiglu(
        self,
        x: Float[Array, "n D"],
        expert_ids: Int[Array, "n K"],
        gates: Float[Array, "n K"],
        w_gate: Float[Array, "E D F"],
        w_up: Float[Array, "E D F"],
        w_down: Float[Array, "E F D"],
        *,
        factor: float,
    ) -> tuple[Float[Array, "n D"], Float[Array, ""]]:
        """See `ops.dispatch.capacity_swiglu`."""
        run = self.pick("capacity_swiglu", x, w_gate).run
        return run(x, expert_ids, gates, w_gate, w_up, w_down, factor=factor)

    def decode_experts(
        self,
        x: Float[Array, "n D"],
        expert_ids: Int[Array, "n K"],
        gates: Float[Array, "n K"],
        w_gate: Float[Array, "E D F"],
        w_up: Float[Array, "E D F"],
        w_down: Float[Array, "E F D"],
    ) -> Float[Array, "n D"]:
        """See `ops.dispatch.decode_experts`."""
        gates = gates.astype(x.dtype)
        run = self.pick("decode_experts", gates, w_gate).run
        return run(x, expert_ids, gates, w_gate, w_up, w_down)

    # Products with a weight

    def embedding(self, table: Float[Array, "W D"], tokens: Int[Array, "*n"]) -> Float[Array, "*n D"]:
        """See `ops.embedding.look_up`."""
        return self.pick("embedding", table, tokens).run(table, tokens)

    def product(self, x: Float[Array, "..."], w: Float[Array, "..."], axes: int = 1) -> Float[Array, "..."]:
        """See `ops.products.product`."""
        return self.pick("product", x, w, axes=axes).run(x, w, axes)

    def expand(
        self,
        c_kv: Float[Array, "B T C"],
        k_rope: Float[Array, "B T R"],
        w_uk: Float[Array, "H N C"],
        w_uv: Float[Array, "H V C"],
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H V"]]:
        """See `ops.mla.expand`."""
        return self.pick("expand", c_kv, w_uk, w_uv).run(c_kv, k_rope, w_uk, w_uv)

    def exact_product(self, x: Float[Array, "n D"], w: Float[Array, "D N"]) -> Float[Array, "n N"]:
        """See `ops.products.exact_product`."""
        return self.pick("exact_product", x, w).run(x, w)

    def swiglu(
        self,
        x: Float[Array, "*n D"],
        w_gate: Float[Array, "D F"],
        w_up: Float[Array, "D F"],
        w_down: Float[Array, "F D"],
    ) -> Float[Array, "*n D"]:
        """See `ops.products.swiglu`."""
        return self.pick("swiglu", x, w_gate).run(x, w_gate, w_up, w_down)

    def product_by_head(
        self, x: Float[Array, "*n H K"], w: Float[Array, "H _ _"], *, transposed: bool = False
    ) -> Float[Array, "*n H N"]:
        """See `ops.products.product_by_head`."""
        return self.pick("product_by_head", x, w, axes=2).run(x, w, transposed=transposed)

    # Training

    def cross_entropy(
        self, h: Float[Array, "n D"], w: Float[Array, "D W"], targets: Int[Array, " n"], mask: Bool[Array, " n"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """See `ops.cross_entropy.chunked_cross_entropy`."""
        return self.pick("cross_entropy", h, w).run(h, w, targets, mask)

    def adamw_update(
        self,
        p: Float[Array, "*n"],
        mu: Float[Array, "*n"],
        nu: Float[Array, "*n"],
        g: Float[Array, "*n"],
        numbers: Float[Array, "5"],
        **settings: float,
    ) -> tuple[Float[Array, "*n"], Float[Array, "*n"], Float[Array, "*n"]]:
        """See `ops.adamw.adamw_update`."""
        return self.pick("optimizer", p, mu, nu, g).run(p, mu, nu, g, numbers, **settings)

    # Reports

    def chosen(
        self, dtype: Any = "float32", devices: int = 1, moments: str = "float32", optimizer: str = "adamw"
    ) -> dict[str, str]:
        """The implementation of each op for large arrays of a dtype on so many devices, by name.

        Args:
            moments: dtype of the optimizer's means.
            optimizer: `OptimConfig.name`. The table's op is AdamW's update: Muon leaves some parameters to it, and
                optax's transformations none.

        Example:
            >>> kernels = Kernels(Target("cpu", "xla"))
            >>> [kernels.chosen(optimizer=name)["optimizer"] for name in ("adamw", "muon", "optax:lion")]
            ['xla', 'muon by xla, adamw by xla', 'optax:lion']
        """
        names, fixed = {}, dict.fromkeys(IN_FLOAT32, "float32") | {"optimizer": moments}
        for op in TABLE:
            float32 = jnp.dtype(fixed.get(op, dtype)) == jnp.float32
            for row in self.target.rows(op):
                serves = row.only in ("", jnp.dtype(dtype).name) and (devices == 1 or not row.alone)
                serves = serves and (row.name != "cpu" or (float32 and devices == 1))
                if serves and not self.why_not(row):
                    names[op] = row.name
                    break
        if optimizer == "muon":
            names["optimizer"] = f"muon by xla, adamw by {names['optimizer']}"
        elif optimizer.startswith(OPTAX):
            names["optimizer"] = optimizer
        return names

    def describe(
        self, dtype: Any = "float32", devices: int = 1, moments: str = "float32", optimizer: str = "adamw"
    ) -> str:
        """One line on what runs, and why others that were wanted do not."""
        by_name: dict[str, list[str]] = {}
        for op, name in self.chosen(dtype, devices, moments, optimizer).items():
            by_name.setdefault(name, []).append(op)
        parts = [f"{name}: {', '.join(ops)}" for name, ops in by_name.items()]
        for op, name in self.chosen(dtype, devices).items():
            row = next(row for row in self.target.rows(op) if row.name == name)
            if row.slow and self.target.platform in GPUS:
                parts.append(f"{op} is slow by {name}: {row.slow}")
        wanted = {row.name: row for op in TABLE for row in self.target.rows(op)}
        for name, row in wanted.items():
            if reason := self.why_not(row):
                parts.append(f"no C++ kernels, {reason}" if name == "cpu" else f"not {name}, {reason}")
        return f"kernels for {self.target.platform}: " + "; ".join(parts)


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


def _check_cpp(target: Target, dtype: str, devices: int) -> None:
    """Refuse C++ kernels that are asked for by name, where they cannot run."""
    for op in TABLE:
        row = target.forced(op)
        if row is None or row.name != "cpu":
            continue
        if devices > 1:
            raise ConfigError(
                f"kernels={target.kernels!r} is for one device, and the mesh has {devices}; use 'auto' or 'xla'"
            )
        if dtype != "float32" and op not in IN_FLOAT32:
            raise ConfigError(
                f"kernels={target.kernels!r} is for compute_dtype='float32', not {dtype!r}; use 'auto' or 'xla'"
            )


def prepare(
    execution: Execution | None = None, *, platform: str | None = None, chip: str = "", mesh: Mesh | None = None
) -> Kernels:
    """Choose the kernels of a target, and compile and load those in C++ if they may be used. Call it before tracing.

    Args:
        execution: says which kernels are asked for. Default: "auto".
        platform, chip: what is compiled for, see `Target`. None means that of `mesh`, see `platform_of`.
    Raises: ConfigError for kernels that the target does not have, that do not serve the dtype or the mesh, or that
        cannot be compiled here.

    Example:
        >>> prepare(Execution(kernels="xla")).chosen()["product"]
        'xla'
    """
    execution = execution or Execution()
    if platform is None:
        platform, chip = platform_of(mesh), _chip_of(_device_of(mesh))
    target = Target(platform, execution.kernels, chip, execution.precision)
    _check_cpp(target, execution.compute_dtype, 1 if mesh is None else mesh.size)
    rows = {row.name: row for op in TABLE for row in target.rows(op) if row.why_not is not None}
    missing = {name: reason for name, row in rows.items() if row.why_not and (reason := row.why_not(target))}
    for op in TABLE:
        row = target.forced(op)
        if row is not None and row.name in missing:
            raise ConfigError(
                f"kernels={target.kernels!r} is not available here: {missing[row.name]}; use 'auto' or 'xla'"
            )
    return Kernels(target, tuple(missing.items()))
