"""A model out into a released folder, which `transformers` loads: a tensor at a time, whole or not there at all."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from dsv3_jax.hf import files
from dsv3_jax.hf.config_json import config_to_dict
from dsv3_jax.hf.fp8 import quantize
from dsv3_jax.hf.reading import BF16, Folder, is_finite
from dsv3_jax.hf.table import SCALE, entries, tensor_table
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.report.progress import transfer

SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "bfloat16")


Read = Callable[[str], np.ndarray]  # a released tensor by its name, in the released layout and any float dtype


class Tensors:
    """Released tensors by name in a table's dtypes, from whatever `read` has them in."""

    def __init__(self, read: Read, table: files.Table, allow_nonfinite: bool):
        self._read, self._table, self._allow = read, table, allow_nonfinite
        self._scale: tuple[str, np.ndarray] = ("", np.empty(0))

    def __call__(self, name: str) -> np.ndarray:
        """The tensor, or the scales of the FP8 tensor that was asked for last, in the table's dtype.

        Raises: ValueError naming a tensor that has NaN or Inf.
        """
        if name == self._scale[0]:
            return self._scale[1]
        dtype = self._table[name][1]
        value = self._read(name)
        fp8 = dtype not in DTYPES
        if (fp8 or not self._allow) and not is_finite(value):
            raise ValueError(f"{name} holds NaN or Inf" + (", which FP8 cannot" if self._allow else ""))
        if not fp8:
            value = value.astype(np.float32 if dtype == "float32" else BF16, copy=False)
            if not self._allow and not is_finite(value):
                raise ValueError(f"{name} does not fit in {dtype}: it would hold Inf")
            return value
        numbers, scales = quantize(value.astype(np.float32, copy=False))
        self._scale = (name + SCALE, scales)
        return numbers


def from_model(model: Transformer) -> Read:
    """A model's parameters. Raises: ValueError for one that is spread over hosts."""
    known = {e.name: e for e in entries(model.cfg)}
    arrays = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    for path, array in arrays.items():
        if not array.is_fully_addressable:
            raise ValueError(f"parameter {'.'.join(map(str, path))} is spread over hosts: gather it to save")
    on_cpu: dict[tuple, np.ndarray] = {}

    def part(path: tuple, index: tuple[int, ...]) -> np.ndarray:
        array = arrays[path]
        devices = array.devices()
        if len(devices) > 1 or next(iter(devices)).platform != "cpu":
            return np.asarray(array[index])
        if path not in on_cpu:
            on_cpu[path] = np.asarray(array)  # no copy
        return on_cpu[path][index]

    def read(name: str) -> np.ndarray:
        entry = known[name]
        return entry.layout.join([part(place.path, place.at) for place in entry.places])

    return read


def from_folder(folder: Folder) -> Read:
    """Another released folder's tensors; a copy that was not written is read where its original stands."""

    def read(name: str) -> np.ndarray:
        entry = folder.entries[name]
        if name not in folder.stored and entry.copy_of:
            entry = folder.entries[entry.copy_of]
        stored = folder.stored[entry.name].dtype
        return folder.read(entry, stored if stored in (BF16, np.float32) else np.dtype(np.float32))

    return read


def save(
    model: Transformer,
    path: str | Path,
    fp8: bool = False,
    shard_bytes: int = SHARD_BYTES,
    *,
    dtype: Any = None,
    allow_nonfinite: bool = False,
    quiet: bool = False,
) -> None:
    """Write a model as a released folder: config.json, shards of safetensors and their index.

    Written into a temporary folder beside `path`, which is renamed at the end: a failure leaves nothing.

    Args:
        model: any whose router is "sigmoid" (written as DeepSeek-V3) or "softmax" (as V2). MTP layers are written
            with their copies of embedding and head, as released.
        path: a folder that is not there yet, or is empty.
        fp8: linear weights in FP8 with a scale for each 128 × 128 block; the rest in bfloat16 unless `dtype` is given.
        shard_bytes: a shard holds at most so many bytes, or one tensor.
        dtype: float32 or bfloat16; None is the embedding's own. The correction bias is float32 always.
        allow_nonfinite: write NaN and Inf as they are (never in FP8).
        quiet: no progress bar.
    Raises:
        ConfigError: a configuration that the released format cannot say.
        ValueError: `path` is taken, the disk has no room, a weight is NaN or Inf (named), `shard_bytes` below 1.
    """
    write(path, *written_as(model, fp8, dtype, allow_nonfinite), shard_bytes, quiet=quiet)


def written_as(
    model: Transformer, fp8: bool, dtype: Any, allow_nonfinite: bool
) -> tuple[dict[str, Any], files.Table, Tensors]:
    """config.json, table and tensors that `write` makes a model's folder of. Arguments and errors as `save`."""
    name = np.dtype(dtype or ("bfloat16" if fp8 else model.embed[...].dtype)).name
    table = tensor_table(model.cfg, fp8, dtype=name)
    return config_to_dict(model.cfg, fp8=fp8, dtype=name), table, Tensors(from_model(model), table, allow_nonfinite)


def write(
    path: str | Path,
    config: dict[str, Any],
    table: files.Table,
    tensors: Tensors,
    shard_bytes: int,
    *,
    quiet: bool,
    beside: Iterable[Path] = (),
) -> None:
    """A released folder of a table's tensors, with copies of the files `beside`. Raises: ValueError as `save` does."""
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} is below 1")
    if config["torch_dtype"] not in DTYPES:
        raise ValueError(f"dtype={config['torch_dtype']} is not one of {', '.join(DTYPES)}")
    total = files.table_bytes(table)
    with files.new_folder(path, total) as folder, transfer("saving", total, quiet=quiet) as advance:

        def read(name: str) -> np.ndarray:
            tensor = tensors(name)
            advance(tensor.nbytes)
            return tensor

        files.write_shards(folder, table, shard_bytes, read)
        files.write_json(folder / files.CONFIG, config)
        for file in beside:
            shutil.copyfile(file, folder / file.name)
