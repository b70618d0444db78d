"""Load a released folder: mapped tensors, one at a time, into stacked and sharded parameters."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, Execution, replace
from dsv3_jax.hf import int4
from dsv3_jax.hf.config_json import config_from_dict
from dsv3_jax.hf.families import WRAPPERS, text_config
from dsv3_jax.hf.files import CONFIG, StoredTensor, open_folder, read_tensor
from dsv3_jax.hf.fp8 import E4M3, dequantize
from dsv3_jax.hf.places import find
from dsv3_jax.hf.table import BLOCK, SCALE_SUFFIX, Entry, entries
from dsv3_jax.kernels import choose
from dsv3_jax.mesh.sharding import state_sharding
from dsv3_jax.model.layers import Packed
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.report.progress import text_console, transfer

BF16 = np.dtype(ml_dtypes.bfloat16)
READABLE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BF16)
_ALIGNMENT = 64  # bytes
# tensors of the model that may be absent: those of its MTP layers, or those that an error counts
_MAX_ABSENT = 20_000
_MAX_LISTED = 20  # wrong tensors that an error names
_EMBED = "model.embed_tokens.weight"
# Prefixes of the language model in a wrapper's names, and names of the wrapper's vision parts,
# which are not read.
_PREFIXES = ("", "language_model.")
_BESIDE = re.compile(r"(model\.)?(vision\w*|mm_projector|multi_modal_projector)\.")
# transformers 5.24 saves a wrapper's layers under this name
_BLOCKS = re.compile(r"model\.blocks\.(?=\d)")
# Old files repeat what rope_theta gives; transformers does not read it either.
_INV_FREQ = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class ReleasedFolder:
    """A released folder whose tensors match its configuration; tensors are read one at a time.

    Args:
        place: the folder, a hub snapshot, or a hub id in the local cache; see `places.find`.
        mtp: False leaves the MTP layers out. They are left out too where the files have none.
        allow_nonfinite: accept NaN and Inf.
        allow_unknown_keys: pass over keys of config.json that are not known.
    Attributes:
        notes: sentences on what is not read or bounded, for the user.
    Raises: ValueError (ConfigError) as `load`, except for the values of weights.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract(cfg))  # all are 1
        >>> with tempfile.TemporaryDirectory() as path:
        ...     ds.hf.save(model, path, fp8=True, quiet=True)
        ...     folder = ReleasedFolder(path)
        >>> folder.cfg.dim, folder.stored["model.norm.weight"].shape
        (128, (128,))
    """

    def __init__(
        self,
        place: str | Path,
        *,
        mtp: bool = True,
        allow_nonfinite: bool = False,
        allow_unknown_keys: bool = False,
    ):
        self.path = find(place)
        self.allow_nonfinite = allow_nonfinite
        self.config, stored = open_folder(self.path)
        self.notes: list[str] = []
        try:
            cfg = config_from_dict(self.config, allow_unknown_keys=allow_unknown_keys)
        except ConfigError as error:
            raise ConfigError(f"{self.path / CONFIG}: {error}") from error
        self.stored = self._of_the_language_model(stored)
        quantization = text_config(self.config).get("quantization_config") or {}
        packed = quantization.get("quant_method") == int4.METHOD
        # numbers of a 4-bit weight with one scale
        self._group = int4.group_size(quantization) if packed else 0
        # A model that needs far more tensors than there are is refused before they are listed:
        # numbers of layers and experts may be anything.
        most = len(self.stored) + _MAX_ABSENT
        all_entries = list(itertools.islice(entries(cfg), most + 1))
        if len(all_entries) > most:
            raise ValueError(
                f"{self.path} does not match its {CONFIG}: the files hold {len(self.stored)} "
                f"tensors, and num_layers={cfg.num_layers}, num_experts={cfg.num_experts}, "
                f"mtp_depth={cfg.mtp_depth} need more than {most}"
            )
        heads = [e for e in all_entries if e.mtp and not e.copy_of]
        if mtp and heads and not any(self.stored.keys() & self._wanted(e).keys() for e in heads):
            mtp = False
            self.notes.append(
                f"{CONFIG} names {cfg.mtp_depth} MTP layers, and the files have none: loaded "
                "without"
            )
        self.entries = {e.name: e for e in all_entries if mtp or not e.mtp}
        self.cfg = cfg if mtp else replace(cfg, mtp_depth=0)
        self._check_tensors(all_entries)
        self._check_copies()

    def _of_the_language_model(self, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The tensors by DeepSeek's names, without those that this model does not compute with."""
        prefix = next((p for p in _PREFIXES if p + _EMBED in stored), "")
        named = {
            name.removeprefix(prefix): tensor
            for name, tensor in stored.items()
            if not _BESIDE.match(name)
        }
        if self.config.get("model_type") in WRAPPERS:
            named = {_BLOCKS.sub("model.layers.", name): tensor for name, tensor in named.items()}
        if len(named) < len(stored):
            self.notes.append(f"{len(stored) - len(named)} tensors of pictures are not read")
        named = {name: tensor for name, tensor in named.items() if not _INV_FREQ.fullmatch(name)}
        return named

    @property
    def four_bits(self) -> bool:
        """Whether some weights are of 4 bits."""
        return self._group > 0

    def own_dtype(self, entry: Entry) -> np.dtype:
        """The dtype that needs no wider copy: float32 of float32 and float16, else bfloat16.

        That rounds the products of FP8 or 4-bit numbers and their scales.
        """
        stored = self.stored[next(iter(self._wanted(entry)))].dtype
        return READABLE_DTYPES[0] if stored in READABLE_DTYPES[:2] else BF16

    def read(self, entry: Entry, dtype: np.dtype) -> np.ndarray:
        """Read one released tensor, dequantized, in `dtype` (float32 or bfloat16).

        Raises: ValueError naming file and tensor for NaN or Inf.
        """
        name, *rest = self._wanted(entry)
        stored = self.stored[name]
        value = read_tensor(stored)
        if rest:
            scales = np.array(read_tensor(self.stored[rest[0]]))
            fp8 = stored.dtype == E4M3
            value = (
                dequantize(value, scales)
                if fp8
                else int4.unpack(value, scales, entry.shape, self._group)
            )
        if not self.allow_nonfinite and not (finite := np.isfinite(value)).all():
            raise ValueError(f"{stored.file} holds {np.sum(~finite)} NaN or Inf in {entry.name}")
        return value.astype(dtype, copy=False)

    def packed(self, entry: Entry) -> Packed | None:
        """A feed-forward matrix [in, out] as stored, in FP8 or 4 bits; None for other tensors.

        None also if the last group of inputs with one scale is not whole.
        """
        name, *rest = self._wanted(entry)
        fp8 = self.stored[name].dtype == E4M3
        if (
            not rest
            or ".mlp." not in name
            or entry.shape[1] % (BLOCK if fp8 else math.lcm(self._group, 2))
        ):
            return None
        numbers, scales = (read_tensor(self.stored[x]) for x in (name, *rest))
        if fp8:  # a scale for each output
            return Packed(numbers.T, np.repeat(scales, BLOCK, axis=0)[: len(numbers)].T)
        return Packed(numbers.view(np.uint8)[:, : entry.shape[1] // 2].T, scales.T)

    def _wanted(self, entry: Entry) -> dict[str, tuple[tuple[int, ...], tuple[np.dtype, ...]]]:
        """The one or two tensors that store a released tensor: name → (shape, possible dtypes)."""
        name = entry.name
        stored = self.stored.get(entry.name)
        if entry.quantized and stored is not None and stored.dtype == E4M3:
            return {
                name: (entry.shape, (E4M3,)),
                name + SCALE_SUFFIX: (entry.scale_shape, READABLE_DTYPES[:1]),
            }
        if entry.quantized and self._group and name + int4.PACKED in self.stored:
            packed, scales = int4.shapes(entry.shape, self._group)
            return {
                name + int4.PACKED: (packed, (np.dtype(np.int32),)),
                name + int4.SCALE: (scales, READABLE_DTYPES),
            }
        return {name: (entry.shape, READABLE_DTYPES)}

    def _check_tensors(self, all_entries: list[Entry]) -> None:
        """Raises: ValueError that lists all missing, unknown and wrong tensors (shape or dtype)."""
        wrong = []
        known = set()
        for entry in all_entries:
            wanted = self._wanted(entry)
            known |= {*wanted, entry.name + int4.SHAPE}
            for name, (shape, dtypes) in wanted.items() if entry.name in self.entries else ():
                stored = self.stored.get(name)
                if stored is None:
                    wrong += [] if entry.copy_of else [f"{name} is missing"]
                elif stored.shape != shape or stored.dtype not in dtypes:
                    actual = (
                        f"{name} in {stored.file.name} is {stored.dtype.name} {list(stored.shape)}"
                    )
                    wrong.append(f"{actual}, not {dtypes[0].name} {list(shape)}")
        wrong += [
            f"{name} in {self.stored[name].file.name} is unknown"
            for name in self.stored.keys() - known
        ]
        if wrong:
            more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
            listed = "; ".join(sorted(wrong)[:_MAX_LISTED])
            raise ValueError(
                f"{self.path} does not match its {CONFIG}, {len(wrong)} tensors: {listed}{more}"
            )

    def _check_copies(self) -> None:
        """Raises: ValueError when a copied tensor differs: this model has only one of the two."""
        for entry in self.entries.values():
            if entry.copy_of is None or entry.name not in self.stored:
                continue
            copy, original = (
                read_tensor(self.stored[name]) for name in (entry.name, entry.copy_of)
            )
            for start in range(0, len(copy), 4096):  # by rows: no second array of the tensor's size
                left, right = (
                    tensor[start : start + 4096].astype(np.float32) for tensor in (copy, original)
                )
                if not np.array_equal(left, right, equal_nan=True):
                    raise ValueError(
                        f"{self.stored[entry.name].file} holds {entry.name} that differs from "
                        f"{entry.copy_of}, but this model uses one tensor for both"
                    )


def load(
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
    dtype = None if dtype is None else np.dtype(dtype)
    if dtype not in (None, np.float32, BF16):
        raise ValueError(f"dtype={dtype.name} is not supported; use float32 or bfloat16")
    folder = ReleasedFolder(
        path, mtp=mtp, allow_nonfinite=allow_nonfinite, allow_unknown_keys=allow_unknown_keys
    )
    if not quiet:
        for note in folder.notes:
            text_console(stderr=True).print(f"{folder.path}: {note}")
    narrow = (dtype or folder.own_dtype(folder.entries[_EMBED])) == BF16
    execution = Execution(compute_dtype="bfloat16" if narrow else "float32", kernels=kernels)
    prepared = choose.prepare(execution, mesh=mesh)
    graphdef, state = nnx.split(abstract(folder.cfg, execution, prepared))
    flat = dict(nnx.to_flat_state(state))
    sources: dict[tuple, list[tuple[Entry, int]]] = defaultdict(list)
    for entry in folder.entries.values():
        if entry.copy_of is None:
            for part, param_slice in enumerate(entry.slices):
                sources[param_slice.path].append((entry, part))

    def form(path: tuple, variable: nnx.Variable) -> Any:
        """The shape and dtype of a parameter, or both of what is packed."""
        kinds = {
            tuple((x.shape, x.dtype) for x in folder.packed(entry) or ())
            for entry, _ in sources[path]
            if packed
        }
        if len(kinds) == 1 and (kind := kinds.pop()):
            lead = variable.shape[:-2]
            return Packed(*(jax.ShapeDtypeStruct((*lead, *shape), own) for shape, own in kind))
        # none for indexers that no layer has
        owns = [folder.own_dtype(entry) for entry, _ in sources[path]]
        own = dtype or max(owns, key=lambda own: own.itemsize, default=READABLE_DTYPES[0])
        exact = isinstance(variable, RouterBias) or path[-1] == "w_router"
        return jax.ShapeDtypeStruct(variable.shape, READABLE_DTYPES[0] if exact else own)

    def array(path: tuple, wanted: jax.ShapeDtypeStruct, where: Any, field: str = "") -> jax.Array:
        """Read a parameter, or a field of a packed one."""
        shards: dict[str, np.ndarray] = {}  # a replicated parameter is read once for all devices

        def parts(entry: Entry) -> list[np.ndarray]:
            if not field:
                return entry.split(folder.read(entry, wanted.dtype))
            if field == "numbers":
                folder.read(entry, BF16)  # refuses NaN and Inf
            return [getattr(folder.packed(entry), field)]

        def shard(index):
            if str(index) not in shards:
                shards[str(index)] = _read_shard(parts, sources[path], wanted, index)
            return shards[str(index)]

        return jax.block_until_ready(jax.make_array_from_callback(wanted.shape, where, shard))

    flat = {path: variable.replace(form(path, variable)) for path, variable in flat.items()}
    shardings = dict(nnx.to_flat_state(state_sharding(nnx.from_flat_state(flat), mesh)))
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(flat))
    with transfer("loading", total, quiet=quiet) as advance:
        for path, variable in flat.items():
            wanted = variable.get_value()
            where = shardings[path].get_value()
            if isinstance(wanted, Packed):
                value = Packed(*map(partial(array, path), wanted, where, Packed._fields))
            else:
                value = array(path, wanted, where)
            flat[path] = variable.replace(value)
            advance(sum(x.nbytes for x in jax.tree.leaves(value)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _read_shard(
    parts: Callable[[Entry], list[np.ndarray]],
    sources: list[tuple[Entry, int]],
    wanted: jax.ShapeDtypeStruct,
    shard: tuple[slice, ...],
) -> np.ndarray:
    """Read one shard of a parameter.

    Args:
        parts: reads a released tensor, as slices of our parameters.
        sources: the released tensors that fill the parameter, each with the number of its slice
            there.
        wanted: the parameter's shape and dtype.
        shard: a slice for each of its axes.
    """
    ranges = [range(*s.indices(n)) for s, n in zip(shard, wanted.shape, strict=True)]
    # Zeros remain where a router has no bias, or a layer no indexer.
    out = _zeros([len(r) for r in ranges], wanted.dtype)
    for entry, part in sources:
        indices = entry.slices[part].indices
        if all(i in r for i, r in zip(indices, ranges, strict=False)):
            value = parts(entry)[part]
            place = tuple(i - r.start for i, r in zip(indices, ranges, strict=False))
            out[place] = value[shard[len(indices) :]]
    return out


def _zeros(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Allocate zeros aligned so that XLA's CPU client takes them without a copy, unlike NumPy's."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
