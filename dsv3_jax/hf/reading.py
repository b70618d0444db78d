"""Load a released folder: memory-mapped tensors, one at a time, into stacked and sharded parameters."""

import itertools
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, Execution, ModelConfig, replace
from dsv3_jax.hf import int4
from dsv3_jax.hf.config_json import config_from_dict
from dsv3_jax.hf.families import WRAPPERS, family_of, text_config
from dsv3_jax.hf.files import CONFIG, StoredTensor, TensorReader, open_folder
from dsv3_jax.hf.fp8 import E4M3, dequantize
from dsv3_jax.hf.places import find
from dsv3_jax.hf.table import SCALE_SUFFIX, Entry, entries
from dsv3_jax.kernels import choose
from dsv3_jax.mesh.sharding import state_sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.ops import rope
from dsv3_jax.report.progress import transfer

BF16 = np.dtype(ml_dtypes.bfloat16)
READABLE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BF16)
_ALIGNMENT = 64  # bytes
_MAX_ABSENT = 20_000  # tensors of the model that may be absent: those of its MTP layers, or those that an error counts
_MAX_LISTED = 20  # wrong tensors that an error names
_EMBED = "model.embed_tokens.weight"
# Prefixes of the language model in a wrapper's names, and names of the wrapper's vision parts, which are not read.
_PREFIXES = ("", "language_model.")
_BESIDE = re.compile(r"(model\.)?(vision\w*|mm_projector|multi_modal_projector)\.")
_BLOCKS = re.compile(r"model\.blocks\.(?=\d)")  # transformers 5.24 saves a wrapper's layers under this name
_INV_FREQ = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_INDEXER = re.compile(r"model\.layers\.\d+\.self_attn\.indexer\.")


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
        >>> model = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract(cfg))  # all weights are 1
        >>> with tempfile.TemporaryDirectory() as path:
        ...     ds.hf.save(model, path, fp8=True, quiet=True)
        ...     folder = ReleasedFolder(path)
        >>> folder.cfg.dim, folder.is_fp8, folder.stored["model.norm.weight"].shape
        (128, True, (128,))
    """

    def __init__(
        self, place: str | Path, *, mtp: bool = True, allow_nonfinite: bool = False, allow_unknown_keys: bool = False
    ):
        self.path, self.allow_nonfinite = find(place), allow_nonfinite
        self.config, stored = open_folder(self.path)
        self.notes: list[str] = []
        try:
            cfg = config_from_dict(self.config, allow_unknown_keys=allow_unknown_keys)
        except ConfigError as error:
            raise ConfigError(f"{self.path / CONFIG}: {error}") from error
        self._tensor = TensorReader()
        self.stored = self._of_the_language_model(stored, cfg)
        # A model that needs far more tensors than there are is refused before they are listed: numbers of layers and
        # experts may be anything.
        most = len(self.stored) + _MAX_ABSENT
        all_entries = list(itertools.islice(entries(cfg), most + 1))
        if len(all_entries) > most:
            raise ValueError(
                f"{self.path} does not match its {CONFIG}: the files hold {len(self.stored)} tensors, and num_layers="
                f"{cfg.num_layers}, num_experts={cfg.num_experts}, mtp_depth={cfg.mtp_depth} need more than {most}"
            )
        needed = [e.name for e in all_entries if e.mtp and not e.copy_of]
        if mtp and needed and not any(name in self.stored or name + int4.PACKED in self.stored for name in needed):
            mtp = False
            layers = f"{cfg.mtp_depth} MTP layer{'s' if cfg.mtp_depth > 1 else ''}"
            self.notes.append(f"{CONFIG} names {layers}, and the files have none: loaded without")
        self.entries = {e.name: e for e in all_entries if mtp or not e.mtp}
        self.cfg = cfg if mtp else replace(cfg, mtp_depth=0)
        self._left_out = set() if mtp else {e.name for e in all_entries if e.mtp}
        self._check_tensors()
        self._check_copies()

    def _of_the_language_model(self, stored: dict[str, StoredTensor], cfg: ModelConfig) -> dict[str, StoredTensor]:
        """The tensors by DeepSeek's names, without those that are not part of this model's computation.

        Raises: ValueError when stored rotary frequencies are not those of config.json.
        """
        prefix = next((p for p in _PREFIXES if p + _EMBED in stored), "")
        named = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if not _BESIDE.match(name)}
        if self.config.get("model_type") in WRAPPERS:
            named = {_BLOCKS.sub("model.layers.", name): tensor for name, tensor in named.items()}
        if len(named) < len(stored):
            self.notes.append(f"{len(stored) - len(named)} tensors of pictures are not read")
        own = rope.frequencies(cfg.rope_head_dim, cfg.rope_theta, cfg.yarn)
        for name in [name for name in named if _INV_FREQ.fullmatch(name)]:
            tensor = named.pop(name)
            # Files round them to their own dtype.
            rtol = 1e-2 if tensor.dtype == BF16 else 1e-4
            if tensor.shape != own.shape or not np.allclose(self._tensor(tensor).astype(np.float32), own, rtol=rtol):
                raise ValueError(f"{tensor.file} holds {name}, which is not what rope_theta={cfg.rope_theta} gives")
        family = family_of(text_config(self.config))
        if family.indexer:
            named = {name: tensor for name, tensor in named.items() if not _INDEXER.match(name)}
            self.notes.append(
                f"index_topk={cfg.max_positions}: exact in texts of up to {cfg.max_positions:,} tokens; longer ones "
                "need the indexer, which this package does not have"
            )
        return named

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.stored.values())

    @property
    def is_fp8(self) -> bool:
        return any(stored.dtype == E4M3 for stored in self.stored.values())

    def read(self, entry: Entry, dtype: np.dtype) -> np.ndarray:
        """Read one released tensor, dequantized, in `dtype` (float32 or bfloat16).

        Raises: ValueError naming file and tensor for NaN or Inf.
        """
        if entry.name + int4.PACKED in self.stored:
            packed, scales = (np.array(self._tensor(self.stored[entry.name + s])) for s in (int4.PACKED, int4.SCALE))
            self._check_finite(entry, scales)
            rows, columns = entry.shape
            return int4.unpack(packed, scales, (rows, columns)).astype(dtype)
        stored = self.stored[entry.name]
        raw = self._tensor(stored)
        if stored.dtype == E4M3:
            scales = np.array(self._tensor(self.stored[entry.name + SCALE_SUFFIX]))
            value = dequantize(raw, scales)
            # Checking before the cast suffices: bfloat16 has float32's range.
            self._check_finite(entry, value)
            return value.astype(dtype)
        self._check_finite(entry, raw)
        if stored.dtype == BF16 and dtype == np.float32:  # float32 is bfloat16 followed by 16 zero bits
            return np.left_shift(raw.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
        return raw.astype(dtype, copy=False)

    def _check_finite(self, entry: Entry, value: np.ndarray) -> None:
        if self.allow_nonfinite or is_finite(value):
            return
        count = int(np.sum(~np.isfinite(value.astype(np.float32))))
        file = (self.stored.get(entry.name) or self.stored[entry.name + int4.SCALE]).file
        raise ValueError(f"{file} holds {count} NaN or Inf in {entry.name}")

    def _check_tensors(self) -> None:
        """Raises: ValueError that lists all tensors that are missing, unknown, or of a wrong shape or dtype."""
        wrong, known = [], set(self._left_out) | {name + SCALE_SUFFIX for name in self._left_out}
        for entry in self.entries.values():
            stored = self.stored.get(entry.name)
            known.add(entry.name)
            if entry.name + int4.PACKED in self.stored:
                known |= {entry.name + suffix for suffix in (int4.PACKED, int4.SCALE, int4.SHAPE)}
                wrong += self._wrong_int4(entry)
                continue
            if stored is None:
                if entry.copy_of is None:
                    wrong.append(f"{entry.name} is missing")
                continue
            dtypes = READABLE_DTYPES if not entry.quantized else (*READABLE_DTYPES, E4M3)
            if stored.shape != entry.shape or stored.dtype not in dtypes:
                wrong.append(f"{_describe(stored, entry.name)}, not {list(entry.shape)}")
            elif stored.dtype == E4M3:
                known.add(entry.name + SCALE_SUFFIX)
                scale = self.stored.get(entry.name + SCALE_SUFFIX)
                if scale is None:
                    wrong.append(f"{entry.name + SCALE_SUFFIX} is missing")
                elif (scale.shape, scale.dtype) != (entry.scale_shape, np.float32):
                    description = _describe(scale, entry.name + SCALE_SUFFIX)
                    wrong.append(f"{description}, not float32 {list(entry.scale_shape)}")
        wrong += [f"{name} in {self.stored[name].file.name} is unknown" for name in self.stored.keys() - known]
        if wrong:
            more = f" and {len(wrong) - _MAX_LISTED} more" if len(wrong) > _MAX_LISTED else ""
            listed = "; ".join(sorted(wrong)[:_MAX_LISTED])
            raise ValueError(f"{self.path} does not match its {CONFIG}, {len(wrong)} tensors: {listed}{more}")

    def _wrong_int4(self, entry: Entry) -> list[str]:
        """Return the faults of a 4-bit weight's tensors; empty if there are none."""
        name, (rows, columns) = entry.name, entry.shape
        packed, scales = self.stored[name + int4.PACKED], self.stored.get(name + int4.SCALE)
        if not entry.quantized:
            return [f"{name} in {packed.file.name} is packed in 4 bits, but is no linear weight"]
        if scales is None:
            return [f"{name + int4.SCALE} is missing"]
        wrong = []
        if (packed.shape, packed.dtype) != ((rows, -(-columns // int4.IN_ONE)), np.int32):
            wrong.append(_describe(packed, name + int4.PACKED) + f", not int32 for {list(entry.shape)}")
        if (
            scales.dtype not in READABLE_DTYPES
            or len(scales.shape) != 2
            or scales.shape[0] != rows
            or not scales.shape[1]
            or columns % scales.shape[1]
        ):
            wrong.append(_describe(scales, name + int4.SCALE) + f", not scales of groups of {list(entry.shape)}")
        return wrong

    def _check_copies(self) -> None:
        """Raises: ValueError when a tensor differs from the one that it repeats: this model has only one of them."""
        for entry in self.entries.values():
            if entry.copy_of is None or entry.name not in self.stored:
                continue
            original = self.entries[entry.copy_of]
            for start in range(0, entry.shape[0], 4096):  # by rows: no second array of the tensor's size
                rows = slice(start, start + 4096)
                left, right = (self._tensor(self.stored[n])[rows] for n in (entry.name, original.name))
                if not np.array_equal(left.astype(np.float32), right.astype(np.float32), equal_nan=True):
                    raise ValueError(
                        f"{self.stored[entry.name].file} holds {entry.name} that differs from {original.name}, "
                        f"but this model uses one tensor for both"
                    )


def _describe(stored: StoredTensor, name: str) -> str:
    return f"{name} in {stored.file.name} is {stored.dtype.name} {list(stored.shape)}"


def is_finite(value: np.ndarray) -> bool:
    """Say whether no number is NaN or Inf.

    Example:
        >>> is_finite(np.array([1.0, 2.0])), is_finite(np.array([1.0, np.nan]))
        (True, False)
    """
    if value.dtype == BF16:  # bits of the exponent: much faster than the dtype's own functions
        bits = value.view(np.uint16)
        return not bool(((bits & np.uint16(0x7F80)) == 0x7F80).any())
    return bool(np.isfinite(value).all())


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
) -> Transformer:
    """Load a released model: config.json and safetensors of float32, bfloat16, float16, FP8 or 4 bits.

    On a CPU, peak memory is that of the parameters plus less than a gigabyte. For another device, the host holds one
    parameter at a time. With a mesh, each host reads only the tensors of its shards.

    Args:
        path: a folder, a snapshot of the hub's cache, or a hub id that is in this cache (organisation/name). No file
            outside it is read; nothing is downloaded.
        dtype: dtype of parameters and computation, float32 or bfloat16. The router's weight and bias stay float32.
        mesh: shards parameters as `sharding.state_sharding`. None means the default device.
        mtp: False leaves the MTP layers out. They are left out too, with a line, where the files have none.
        allow_nonfinite: accept NaN and Inf.
        allow_unknown_keys: pass over keys of config.json that are not known.
        kernels: as `Execution.kernels`.
        quiet: show no progress bar, and no line about what is not read. Without a terminal there is no bar.
    Raises:
        ConfigError: config.json describes another kind of model.
        ValueError: a file is absent, truncated, outside the folder, or differs from its header. Tensors are missing,
            unknown, or of another shape or dtype (listed together). A tensor holds NaN or Inf (named with its file).

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
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, BF16):
        raise ValueError(f"dtype={dtype.name} is not supported; use float32 or bfloat16")
    folder = ReleasedFolder(path, mtp=mtp, allow_nonfinite=allow_nonfinite, allow_unknown_keys=allow_unknown_keys)
    if not quiet:
        for note in folder.notes:
            print(f"{folder.path}: {note}", file=sys.stderr, flush=True)
    execution = Execution(compute_dtype=dtype.name, kernels=kernels)
    prepared = choose.prepare(execution, mesh=mesh)
    graphdef, state = nnx.split(abstract(folder.cfg, execution, prepared))
    flat = dict(nnx.to_flat_state(state))
    shardings = dict(nnx.to_flat_state(state_sharding(state, mesh)))
    sources: dict[tuple, list[tuple[Entry, int]]] = defaultdict(list)
    for entry in folder.entries.values():
        if entry.copy_of is None:
            for part, param_slice in enumerate(entry.slices):
                sources[param_slice.path].append((entry, part))
    filled = {}
    with transfer("loading", sum(v.size for v in flat.values()) * dtype.itemsize, quiet=quiet) as advance:
        for path, variable in flat.items():
            keep_float32 = isinstance(variable, RouterBias) or path[-1] == "w_router"
            param_dtype = np.dtype(np.float32) if keep_float32 else dtype
            shape = tuple(variable.shape)
            shards: dict[str, np.ndarray] = {}  # a replicated parameter is read once for all devices

            def shard(index, path=path, shape=shape, param_dtype=param_dtype, shards=shards):
                if str(index) not in shards:
                    shards[str(index)] = _read_shard(folder, sources[path], shape, index, param_dtype)
                return shards[str(index)]

            array = jax.make_array_from_callback(shape, shardings[path].get_value(), shard)
            filled[path] = variable.replace(jax.block_until_ready(array))
            advance(variable.size * dtype.itemsize)
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _read_shard(
    folder: ReleasedFolder,
    sources: list[tuple[Entry, int]],
    shape: tuple[int, ...],
    shard: tuple[slice, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """Read one shard of a parameter.

    Args:
        sources: the released tensors that fill the parameter, each with the number of its slice there.
        shape: the parameter's.
        shard: a slice for each of its axes.
    """
    ranges = [range(*s.indices(n)) for s, n in zip(shard, shape, strict=True)]
    out = _zeros([len(r) for r in ranges], dtype)  # zeros remain where the released router has no bias
    for entry, part in sources:
        indices = entry.slices[part].indices
        if all(i in r for i, r in zip(indices, ranges, strict=False)):
            value = entry.layout.split(folder.read(entry, dtype))[part]
            out[tuple(i - r.start for i, r in zip(indices, ranges, strict=False))] = value[shard[len(indices) :]]
    return out


def _zeros(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Allocate zeros at an address that XLA's CPU client takes over without a copy; NumPy aligns to 16 bytes only."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)
