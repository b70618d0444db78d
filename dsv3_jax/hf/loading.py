"""Load a released model: its tensors, one at a time, into stacked and sharded parameters."""

import math
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import Execution
from dsv3_jax.hf.released_folder import BF16, EMBED, READABLE_DTYPES, ReleasedFolder
from dsv3_jax.hf.tensor_names import Entry
from dsv3_jax.kernels import choose
from dsv3_jax.mesh.sharding import state_sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.parameters import Packed
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.report.progress import text_console, transfer

MAX_THREADS = min(16, os.cpu_count() or 1)  # that read and dequantize, each one tensor at a time
_ALIGNMENT = 64  # bytes


def load(  # noqa: PLR0913 - what to accept, each by name
    path: str | Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    *,
    mtp: bool = True,
    allow_nonfinite: bool = False,
    allow_unknown_keys: bool = False,
    kernels: str = "auto",
    quiet: bool = False,
    packed: bool = False,
) -> Transformer:
    """Load a released model: config.json and safetensors of float32, (b)float16, FP8 or 4 bits.

    On a CPU, peak memory is that of the parameters plus one tensor for each of up to 16 threads.
    For another device, the host holds one parameter at a time. With a mesh, each process reads only
    the tensors of its shards, and each of these once.

    Args:
        path: a folder, a snapshot of the hub's cache, or a hub id that is in this cache
            (organisation/name). No file outside it is read; nothing is downloaded.
        dtype: dtype of parameters and computation, float32 or bfloat16. The router's weight and
            bias stay float32. None means each parameter's own in the files, bfloat16 for FP8 and 4
            bits; the embedding's for computation.
        mesh: shards parameters as `sharding.state_sharding`. None means the default device.
        mtp: False leaves the MTP layers out. They are left out too, with a line, where the files
            have none.
        allow_nonfinite: accept NaN and Inf.
        allow_unknown_keys: pass over keys of config.json that are not known.
        kernels: as `Execution.kernels`.
        quiet: show no progress bar, and no line about what is not read. Without a terminal there is
            no bar.
        packed: with dtype None, feed-forward matrices in FP8 and 4 bits stay so, see
            `model.parameters.Packed`: for training beside them, not for decoding.
    Raises:
        ConfigError: config.json describes another kind of model.
        ValueError: a file is absent, truncated, outside the folder, or differs from its header.
            Tensors are missing, unknown, or of another shape or dtype (listed together). A tensor
            holds NaN or Inf (named with its file).

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ds.hf.save(model, folder, quiet=True)
        ...     loaded = ds.hf.load(folder, quiet=True)
        >>> bool((loaded.embed[...] == model.embed[...]).all())
        True
    """
    folder = ReleasedFolder(
        path, mtp=mtp, allow_nonfinite=allow_nonfinite, allow_unknown_keys=allow_unknown_keys
    )
    return load_weights(folder, dtype, mesh, kernels=kernels, quiet=quiet, packed=packed)


def load_weights(
    folder: ReleasedFolder,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    *,
    kernels: str = "auto",
    quiet: bool = False,
    packed: bool = False,
    fsdp: bool = False,
) -> Transformer:
    """Load the model of a folder that is open. Arguments and errors as `load`.

    Args: fsdp: shard parameters along "data" too, as `Layout.fsdp`.
    """
    dtype = None if dtype is None else np.dtype(dtype)
    if dtype not in (None, np.float32, BF16):
        raise ValueError(f"dtype={dtype.name} is not supported; use float32 or bfloat16")
    if not quiet:
        for note in folder.notes:
            text_console(stderr=True).print(f"{folder.path}: {note}")

    # 1. The model without its arrays.
    narrow = (dtype or folder.own_dtype(folder.entries[EMBED])) == BF16
    execution = Execution(compute_dtype="bfloat16" if narrow else "float32", kernels=kernels)
    prepared = choose.prepare(execution, mesh=mesh)
    graphdef, state = nnx.split(abstract(folder.cfg, execution, prepared))

    # 2. What each parameter is read from, how it is kept, and which device has which part of it.
    groups = _groups(folder, nnx.to_flat_state(state))
    sources = {path: group for paths, group in groups.items() for path in paths}
    flat = {
        path: variable.replace(_form(folder, sources[path], path, variable, dtype, packed))
        for path, variable in nnx.to_flat_state(state)
    }
    where = dict(nnx.to_flat_state(state_sharding(nnx.from_flat_state(flat), mesh, fsdp=fsdp)))

    # 3. One parameter after the other, each by several threads: the host holds no second one.
    total = sum(math.prod(entry.shape) for group in groups.values() for entry in group)
    with transfer("loading", total, quiet=quiet) as done, ThreadPoolExecutor(MAX_THREADS) as pool:
        for paths, group in groups.items():
            forms = {path: flat[path].get_value() for path in paths}
            parts = {
                path: jax.tree.map(Parts, form, where[path].get_value())
                for path, form in forms.items()
            }
            for count in pool.map(partial(_read, folder, forms, parts), group):
                done(count)
            for path in paths:
                value = jax.tree.map(Parts.whole, parts.pop(path))
                flat[path] = flat[path].replace(jax.block_until_ready(value))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _groups(folder: ReleasedFolder, flat: Any) -> dict[tuple[tuple, ...], list[Entry]]:
    """Return parameters with the released tensors that fill them; copies of others are not read.

    A group is one parameter, or two whose parts are in the same tensors, as keys and values. A
    router without a bias, or indexers that no layer uses, have no tensor.
    """
    groups: dict[tuple[tuple, ...], list[Entry]] = defaultdict(list)
    for entry in folder.entries.values():
        if entry.copy_of is None:
            groups[tuple(part.path for part in entry.slices)].append(entry)
    filled = {path for paths in groups for path in paths}
    return groups | {(path,): [] for path, _ in flat if path not in filled}


def _form(
    folder: ReleasedFolder,
    sources: list[Entry],
    path: tuple,
    variable: nnx.Variable,
    dtype: np.dtype | None,
    packed: bool,
) -> Any:
    """Return the shape and dtype of a parameter, or of both parts of what stays packed."""
    if packed and (form := _packed_form(folder, sources, variable.shape[:-2])) is not None:
        return form

    # A choice of experts is exact: near ties would be decided by rounding.
    if isinstance(variable, RouterBias) or path[-1] == "w_router":
        return jax.ShapeDtypeStruct(variable.shape, READABLE_DTYPES[0])

    # The widest that a source needs. A model may have indexers that no layer uses: no source.
    needed = [folder.own_dtype(entry) for entry in sources]
    widest = max(needed, key=lambda own: own.itemsize, default=READABLE_DTYPES[0])
    return jax.ShapeDtypeStruct(variable.shape, dtype or widest)


def _packed_form(
    folder: ReleasedFolder, sources: list[Entry], lead: tuple[int, ...]
) -> Packed | None:
    """Return the form of a parameter whose matrices are all packed in the same way, else None."""
    kinds = {tuple((x.shape, x.dtype) for x in folder.packed(entry) or ()) for entry in sources}
    if len(kinds) != 1 or kinds == {()}:
        return None
    [kind] = kinds
    return Packed(*(jax.ShapeDtypeStruct((*lead, *shape), own) for shape, own in kind))


class Parts:
    """The parts of an array that this process's devices hold, filled by one tensor after another.

    Args:
        wanted: the array's shape and dtype.
        where: its sharding. A part that several devices hold is here once.
    """

    def __init__(self, wanted: jax.ShapeDtypeStruct, where: jax.sharding.Sharding):
        self._shape = wanted.shape
        self._where = where
        self._ranges: dict[str, list[range]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        for index in where.addressable_devices_indices_map(wanted.shape).values():
            assert index is not None
            key = str(index)
            sides = zip(index, wanted.shape, strict=True)
            self._ranges[key] = [range(*side.indices(size)) for side, size in sides]

            # Zeros remain where a router has no bias, or a layer no indexer.
            lengths = [len(side) for side in self._ranges[key]]
            self._arrays[key] = _zeros(lengths, wanted.dtype)

    def holding(self, indices: tuple[int, ...]) -> list[str]:
        """The parts that hold some of the matrix of a layer, or of its expert."""
        return [
            key
            for key, ranges in self._ranges.items()
            if all(i in side for i, side in zip(indices, ranges, strict=False))
        ]

    def fill(self, indices: tuple[int, ...], values: np.ndarray) -> None:
        """Write the matrix of a layer, or of its expert, into all parts that hold some of it."""
        for key in self.holding(indices):
            ranges = self._ranges[key]
            place = tuple(i - side.start for i, side in zip(indices, ranges, strict=False))
            rest = tuple(slice(side.start, side.stop) for side in ranges[len(indices) :])
            self._arrays[key][place] = values[rest]

    def whole(self) -> jax.Array:
        """The array on its devices."""
        return jax.make_array_from_callback(
            self._shape, self._where, lambda index: self._arrays[str(index)]
        )


def _read(
    folder: ReleasedFolder, forms: dict[tuple, Any], parts: dict[tuple, Any], entry: Entry
) -> int:
    """Read a released tensor, if this process holds some of it, into the parts of its parameters.

    Args:
        forms: by path, a shape and dtype, or `Packed` of two.
        parts: the same of `Parts`.
    Returns: its number of values.
    """
    count = math.prod(entry.shape)

    # Both parts of a packed matrix lie alike, so the first one says what is held.
    first = [jax.tree.leaves(parts[part.path])[0] for part in entry.slices]
    if not any(p.holding(s.indices) for p, s in zip(first, entry.slices, strict=True)):
        return count

    # Once for all parameters; a packed one stays packed, and its NaN and Inf are refused, too.
    form = forms[entry.slices[0].path]
    stays = isinstance(form, Packed)
    values = folder.read(entry, BF16 if stays else form.dtype)
    found = [folder.packed(entry)] if stays else entry.split(values)

    # Into each parameter that it fills.
    for part, value in zip(entry.slices, found, strict=True):
        jax.tree.map(lambda p, v, at=part.indices: p.fill(at, v), parts[part.path], value)
    return count


def _zeros(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Allocate zeros aligned so that XLA's CPU client takes them without a copy, unlike NumPy's."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
