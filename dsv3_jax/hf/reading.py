"""A released folder into a model: a tensor at a time from memory-mapped files into stacked, sharded parameters."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, replace
from dsv3_jax.hf.config_json import config_from_dict
from dsv3_jax.hf.files import CONFIG, Maps, Stored, open_folder
from dsv3_jax.hf.fp8 import E4M3, dequantize
from dsv3_jax.hf.table import SCALE, Entry, entries
from dsv3_jax.mesh.sharding import state_sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.report.progress import transfer

BF16 = np.dtype(ml_dtypes.bfloat16)
READABLE = (np.dtype(np.float32), np.dtype(np.float16), BF16)
_SHOWN = 20  # of tensors that do not fit


class Folder:
    """A released folder whose tensors are known to fit its configuration; reads them one at a time.

    Args: path: the folder; mtp: False leaves the MTP layers out; allow_nonfinite: let NaN and Inf pass.
    Raises: ValueError (ConfigError) as `load` does, but for weights' values.
    """

    def __init__(self, path: str | Path, *, mtp: bool = True, allow_nonfinite: bool = False):
        self.path, self.allow_nonfinite = Path(path), allow_nonfinite
        self.config, self.stored = open_folder(path)
        try:
            cfg = config_from_dict(self.config)
        except ConfigError as error:
            raise ConfigError(f"{self.path / CONFIG}: {error}") from error
        self.entries = {e.name: e for e in entries(cfg) if mtp or not e.mtp}
        self.cfg = cfg if mtp else replace(cfg, mtp_depth=0)
        self._left_out = set() if mtp else {e.name for e in entries(cfg) if e.mtp}
        self._maps = Maps()
        self._check_tensors()
        self._check_copies()

    @property
    def nbytes(self) -> int:
        return sum(stored.nbytes for stored in self.stored.values())

    @property
    def is_fp8(self) -> bool:
        return any(stored.dtype == E4M3 for stored in self.stored.values())

    def read(self, entry: Entry, dtype: np.dtype) -> np.ndarray:
        """One released tensor, dequantized, in `dtype` (float32 or bfloat16).

        Raises: ValueError naming file and tensor for NaN or Inf.
        """
        stored = self.stored[entry.name]
        raw = self._maps(stored)
        if stored.dtype == E4M3:
            scales = np.array(self._maps(self.stored[entry.name + SCALE]))
            value = dequantize(raw, scales)
            # A finite product may round to Inf in nothing narrower than float32: bfloat16 has its range.
            self._check_finite(entry, value)
            return value.astype(dtype)
        self._check_finite(entry, raw)
        if stored.dtype == BF16 and dtype == np.float32:  # the same number with 16 zero bits behind it
            return np.left_shift(raw.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
        return raw.astype(dtype, copy=False)

    def _check_finite(self, entry: Entry, value: np.ndarray) -> None:
        if self.allow_nonfinite or is_finite(value):
            return
        bad = int(np.sum(~np.isfinite(value.astype(np.float32))))
        raise ValueError(f"{self.stored[entry.name].file} holds {bad} NaN or Inf in {entry.name}")

    def _check_tensors(self) -> None:
        wrong, known = [], set(self._left_out) | {name + SCALE for name in self._left_out}
        for entry in self.entries.values():
            stored = self.stored.get(entry.name)
            known.add(entry.name)
            if stored is None:
                if entry.copy_of is None:
                    wrong.append(f"{entry.name} is missing")
                continue
            fits = READABLE if not entry.quantized else (*READABLE, E4M3)
            if stored.shape != entry.shape or stored.dtype not in fits:
                wrong.append(f"{_spell(stored, entry.name)}, not {list(entry.shape)}")
            elif stored.dtype == E4M3:
                known.add(entry.name + SCALE)
                scale = self.stored.get(entry.name + SCALE)
                if scale is None:
                    wrong.append(f"{entry.name + SCALE} is missing")
                elif (scale.shape, scale.dtype) != (entry.scale_shape, np.float32):
                    wrong.append(f"{_spell(scale, entry.name + SCALE)}, not float32 {list(entry.scale_shape)}")
        wrong += [f"{name} of {self.stored[name].file.name} is not known" for name in self.stored.keys() - known]
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            hint = ""
            lacking = [e.name for e in self.entries.values() if e.mtp and not e.copy_of]
            if lacking and not any(name in self.stored for name in lacking):
                hint = " (no tensor of the MTP layers is there: mtp=False leaves them out)"
            listed = "; ".join(sorted(wrong)[:_SHOWN])
            raise ValueError(f"{self.path} does not fit its {CONFIG}, {len(wrong)} tensors: {listed}{more}{hint}")

    def _check_copies(self) -> None:
        """What this model shares must be the same in each place that it was written to."""
        for entry in self.entries.values():
            if entry.copy_of is None or entry.name not in self.stored:
                continue
            other = self.entries[entry.copy_of]
            for start in range(0, entry.shape[0], 4096):  # of rows: no copy of the whole
                rows = slice(start, start + 4096)
                mine, theirs = (self._maps(self.stored[n])[rows] for n in (entry.name, other.name))
                if not np.array_equal(mine.astype(np.float32), theirs.astype(np.float32), equal_nan=True):
                    raise ValueError(
                        f"{self.stored[entry.name].file} holds {entry.name} that is not {other.name}, which this "
                        f"model uses in its place"
                    )


def _spell(stored: Stored, name: str) -> str:
    return f"{name} of {stored.file.name} is {stored.dtype.name} {list(stored.shape)}"


def is_finite(value: np.ndarray) -> bool:
    """Whether no number is NaN or Inf."""
    if value.dtype == BF16:  # all ones in the exponent; far quicker than through the dtype's own functions
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
    quiet: bool = False,
) -> Transformer:
    """The model of a released folder: config.json and safetensors of float32, bfloat16, float16 or FP8.

    Peak memory is the parameters, the largest of them once more, and less than a gigabyte. With a mesh each host
    reads the tensors of its own shards alone.

    Args:
        path: the folder; nothing outside it is read.
        dtype: of the parameters, and what the model computes in: float32 or bfloat16. The router's weight and bias
            stay float32.
        mesh: where parameters lie, as `sharding.state_sharding` says; None is the default device.
        mtp: False leaves the MTP layers out.
        allow_nonfinite: take NaN and Inf as they are.
        quiet: no progress bar (there is none but on a terminal).
    Raises:
        ConfigError: config.json describes another kind of model.
        ValueError: files that are absent, cut, not what their headers say, or outside the folder; tensors that are
            missing, extra, of another shape or dtype (listed together); NaN or Inf, with file and tensor.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, BF16):
        raise ValueError(f"dtype={dtype.name} is not float32 or bfloat16")
    folder = Folder(path, mtp=mtp, allow_nonfinite=allow_nonfinite)
    cfg = replace(folder.cfg, compute_dtype=dtype.name)
    graphdef, state = nnx.split(abstract(cfg))
    flat = dict(nnx.to_flat_state(state))
    placed = dict(nnx.to_flat_state(state_sharding(state, mesh)))
    sources: dict[tuple, list[tuple[Entry, int]]] = defaultdict(list)
    for entry in folder.entries.values():
        if entry.copy_of is None:
            for part, place in enumerate(entry.places):
                sources[place.path].append((entry, part))
    filled = {}
    with transfer("loading", sum(v.size for v in flat.values()) * dtype.itemsize, quiet=quiet) as advance:
        for where, variable in flat.items():
            kept = np.dtype(np.float32) if isinstance(variable, RouterBias) or where[-1] == "w_router" else dtype
            shape = tuple(variable.shape)
            made: dict[str, np.ndarray] = {}  # a replicated parameter is read once for all devices

            def shard(index, where=where, shape=shape, kept=kept, made=made):
                if str(index) not in made:
                    made[str(index)] = _read_shard(folder, sources[where], shape, index, kept)
                return made[str(index)]

            array = jax.make_array_from_callback(shape, placed[where].get_value(), shard)
            filled[where] = variable.replace(jax.block_until_ready(array))
            advance(variable.size * dtype.itemsize)
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _read_shard(
    folder: Folder, sources: list[tuple[Entry, int]], shape: tuple[int, ...], index: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """The part `index` of a parameter, from the released tensors that stand in it."""
    ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
    out = np.zeros([len(r) for r in ranges], dtype)  # zeros: the bias of a router that has none
    for entry, part in sources:
        at = entry.places[part].at
        if all(i in r for i, r in zip(at, ranges, strict=False)):
            value = entry.layout.split(folder.read(entry, dtype))[part]
            inner = index[len(at) :]
            out[tuple(i - r.start for i, r in zip(at, ranges, strict=False))] = value[inner]
    return out
