"""Load a released model: its tensors, one at a time, into stacked and sharded parameters."""

import math
from collections import defaultdict
from collections.abc import Callable
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

# The released tensors that fill a parameter, each with the number of its slice there.
Sources = list[tuple[Entry, int]]
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

    On a CPU, peak memory is that of the parameters plus less than a gigabyte. For another device,
    the host holds one parameter at a time. With a mesh, each host reads only the tensors of its
    shards.

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
            `layers.Packed`: for training beside them, not for decoding.
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
) -> Transformer:
    """Load the model of a folder that is open. Arguments and errors as `load`."""
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
    sources = _sources(folder)
    flat = {
        path: variable.replace(_form(folder, sources[path], path, variable, dtype, packed))
        for path, variable in nnx.to_flat_state(state)
    }
    shardings = dict(nnx.to_flat_state(state_sharding(nnx.from_flat_state(flat), mesh)))

    # 3. One parameter after the other: the host holds no second one.
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(flat))
    with transfer("loading", total, quiet=quiet) as advance:
        for path, variable in flat.items():
            wanted = variable.get_value()
            where = shardings[path].get_value()
            read = _read_packed if isinstance(wanted, Packed) else _read_plain
            value = read(folder, sources[path], wanted, where)
            flat[path] = variable.replace(value)
            advance(sum(x.nbytes for x in jax.tree.leaves(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _sources(folder: ReleasedFolder) -> dict[tuple, Sources]:
    """Return the released tensors of each parameter; copies of others are not read."""
    sources: dict[tuple, Sources] = defaultdict(list)
    for entry in folder.entries.values():
        if entry.copy_of is None:
            for part, param_slice in enumerate(entry.slices):
                sources[param_slice.path].append((entry, part))
    return sources


def _form(
    folder: ReleasedFolder,
    sources: Sources,
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
    needed = [folder.own_dtype(entry) for entry, _ in sources]
    widest = max(needed, key=lambda own: own.itemsize, default=READABLE_DTYPES[0])
    return jax.ShapeDtypeStruct(variable.shape, dtype or widest)


def _packed_form(folder: ReleasedFolder, sources: Sources, lead: tuple[int, ...]) -> Packed | None:
    """Return the form of a parameter whose matrices are all packed in the same way, else None."""
    kinds = {tuple((x.shape, x.dtype) for x in folder.packed(entry) or ()) for entry, _ in sources}
    if len(kinds) != 1 or kinds == {()}:
        return None
    [kind] = kinds
    return Packed(*(jax.ShapeDtypeStruct((*lead, *shape), own) for shape, own in kind))


def _read_plain(
    folder: ReleasedFolder, sources: Sources, wanted: jax.ShapeDtypeStruct, where: Any
) -> jax.Array:
    """Read a parameter of floats onto its devices."""
    return _to_devices(
        lambda entry: entry.split(folder.read(entry, wanted.dtype)), sources, wanted, where
    )


def _read_packed(folder: ReleasedFolder, sources: Sources, wanted: Packed, where: Packed) -> Packed:
    """Read both parts of a packed parameter onto their devices."""

    def numbers(entry: Entry) -> list[np.ndarray]:
        folder.read(entry, BF16)  # refuses NaN and Inf
        return [_packed(folder, entry).numbers]

    def scales(entry: Entry) -> list[np.ndarray]:
        return [_packed(folder, entry).scales]

    return Packed(
        _to_devices(numbers, sources, wanted.numbers, where.numbers),
        _to_devices(scales, sources, wanted.scales, where.scales),
    )


def _packed(folder: ReleasedFolder, entry: Entry) -> Packed:
    packed = folder.packed(entry)
    assert packed is not None, entry.name  # its form says so
    return packed


def _to_devices(
    parts: Callable[[Entry], list[np.ndarray]],
    sources: Sources,
    wanted: jax.ShapeDtypeStruct,
    where: Any,
) -> jax.Array:
    """Read a parameter, shard by shard. `parts` and `sources`: as `_read_shard`."""
    shards: dict[str, np.ndarray] = {}  # a replicated parameter is read once for all devices

    def shard(index: Any) -> np.ndarray:
        if str(index) not in shards:
            shards[str(index)] = _read_shard(parts, sources, wanted, index)
        return shards[str(index)]

    return jax.block_until_ready(jax.make_array_from_callback(wanted.shape, where, shard))


def _read_shard(
    parts: Callable[[Entry], list[np.ndarray]],
    sources: Sources,
    wanted: jax.ShapeDtypeStruct,
    shard: tuple[slice, ...],
) -> np.ndarray:
    """Read one shard of a parameter.

    Args:
        parts: reads a released tensor, as slices of our parameters.
        sources: the released tensors that fill the parameter.
        wanted: the parameter's shape and dtype.
        shard: a slice for each of its axes.
    """
    ranges = [range(*s.indices(n)) for s, n in zip(shard, wanted.shape, strict=True)]

    # Zeros remain where a router has no bias, or a layer no indexer.
    out = _zeros([len(r) for r in ranges], wanted.dtype)
    for entry, part in sources:
        # The layer, and the expert, whose matrix this is: other hosts' are not read.
        indices = entry.slices[part].indices
        if all(i in r for i, r in zip(indices, ranges, strict=False)):
            place = tuple(i - r.start for i, r in zip(indices, ranges, strict=False))
            out[place] = parts(entry)[part][shard[len(indices) :]]
    return out


def _zeros(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Allocate zeros aligned so that XLA's CPU client takes them without a copy, unlike NumPy's."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
