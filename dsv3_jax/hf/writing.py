"""Save a model as a released folder that `transformers` loads, one tensor at a time; a failure leaves no folder."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from dsv3_jax.hf import files
from dsv3_jax.hf.config_json import config_to_dict
from dsv3_jax.hf.fp8 import quantize
from dsv3_jax.hf.reading import BF16, ReleasedFolder, is_finite
from dsv3_jax.hf.table import SCALE_SUFFIX, entries, tensor_table
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.report.progress import transfer

SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "bfloat16")


ReadTensor = Callable[[str], np.ndarray]  # a released tensor by name, in the released layout and any float dtype


class CastTensors:
    """Released tensors by name in a table's dtypes.

    Args:
        read: reads a tensor in any float dtype.
        table: name → (shape, dtype name), as `tensor_table`.
        allow_nonfinite: accept NaN and Inf, except in FP8.

    Example:
        >>> table = {"norm": ((2,), "bfloat16")}
        >>> tensors = CastTensors(lambda name: np.ones(2, np.float32), table, allow_nonfinite=False)
        >>> tensors("norm").dtype.name
        'bfloat16'
    """

    def __init__(self, read: ReadTensor, table: files.Table, allow_nonfinite: bool):
        self._read, self._table, self._allow_nonfinite = read, table, allow_nonfinite
        self._last_scale: tuple[str, np.ndarray] = ("", np.empty(0))

    def __call__(self, name: str) -> np.ndarray:
        """Return a tensor in the table's dtype; the scales of an FP8 tensor only directly after that tensor.

        Raises: ValueError naming a tensor that holds NaN or Inf.
        """
        if name == self._last_scale[0]:
            return self._last_scale[1]
        dtype = self._table[name][1]
        value = self._read(name)
        fp8 = dtype not in DTYPES
        if (fp8 or not self._allow_nonfinite) and not is_finite(value):
            reason = ", which FP8 cannot represent" if fp8 else "; allow_nonfinite=True accepts it"
            raise ValueError(f"{name} holds NaN or Inf{reason}")
        if not fp8:
            value = value.astype(np.float32 if dtype == "float32" else BF16, copy=False)
            if not self._allow_nonfinite and not is_finite(value):
                raise ValueError(f"{name} does not fit in dtype={dtype}: it becomes Inf; use float32")
            return value
        numbers, scales = quantize(value.astype(np.float32, copy=False))
        self._last_scale = (name + SCALE_SUFFIX, scales)
        return numbers


def model_tensors(model: Transformer) -> ReadTensor:
    """Return a function that reads a model's parameters by released name.

    Raises: ValueError for a parameter that is sharded over hosts.

    Example:
        >>> import jax
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), abstract(cfg))  # all weights are 1
        >>> read = model_tensors(model)
        >>> read("model.layers.0.self_attn.q_a_proj.weight").shape
        (64, 128)
    """
    entry_of = {e.name: e for e in entries(model.cfg)}
    arrays = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    for path, array in arrays.items():
        if not array.is_fully_addressable:
            raise ValueError(f"parameter {'.'.join(map(str, path))} is sharded over hosts; gather it before saving")
    on_cpu: dict[tuple, np.ndarray] = {}

    def part(path: tuple, index: tuple[int, ...]) -> np.ndarray:
        array = arrays[path]
        devices = array.devices()
        if len(devices) > 1 or next(iter(devices)).platform != "cpu":
            return np.asarray(array[index])
        if path not in on_cpu:
            on_cpu[path] = np.asarray(array)  # a view of the CPU's memory
        return on_cpu[path][index]

    def read(name: str) -> np.ndarray:
        entry = entry_of[name]
        return entry.layout.join([part(*param_slice) for param_slice in entry.slices])

    return read


def folder_tensors(folder: ReleasedFolder) -> ReadTensor:
    """Return a function that reads a folder's tensors; an absent copy is read from its original."""

    def read(name: str) -> np.ndarray:
        entry = folder.entries[name]
        if name not in folder.stored and entry.copy_of:
            entry = folder.entries[entry.copy_of]
        stored = folder.stored.get(entry.name)  # None: of 4 bits
        dtype = stored.dtype if stored is not None and stored.dtype == BF16 else np.dtype(np.float32)
        return folder.read(entry, dtype)

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
    """Save a model as a released folder: config.json, shards of safetensors and their index.

    Files go to a temporary folder that is renamed at the end, so a failure leaves no folder.

    Args:
        model: its router is "sigmoid" (written as DeepSeek-V3) or "softmax" (as V2). MTP layers are written with
            their copies of embedding and head, as released.
        path: a folder that is absent or empty.
        fp8: write linear weights in FP8 with a scale for each 128 × 128 block, and the rest in bfloat16 or `dtype`.
        shard_bytes: a shard holds at most so many bytes of tensors, or one tensor.
        dtype: float32 or bfloat16. Default: the embedding's. The correction bias is always float32.
        allow_nonfinite: write NaN and Inf as they are; never in FP8.
        quiet: show no progress bar.
    Raises:
        ConfigError: the released format cannot express the configuration.
        ValueError: `path` is taken, the disk has no room, a weight (named) holds NaN or Inf, or shard_bytes is below 1.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     ds.hf.save(ds.Transformer(cfg, rngs=nnx.Rngs(0)), folder, fp8=True, quiet=True)
        ...     for file in sorted(Path(folder).iterdir()):
        ...         print(file.name)
        config.json
        model-00001-of-00001.safetensors
        model.safetensors.index.json
    """
    write_released(path, *prepare(model, fp8, dtype, allow_nonfinite), shard_bytes, quiet=quiet)


def prepare(
    model: Transformer, fp8: bool, dtype: Any, allow_nonfinite: bool
) -> tuple[dict[str, Any], files.Table, CastTensors]:
    """Return config.json, table and tensors of a model for `write_released`. Arguments and errors as `save`.

    Example:
        >>> import jax
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), abstract(cfg))  # all weights are 1
        >>> config, table, tensors = prepare(model, fp8=False, dtype=None, allow_nonfinite=False)
        >>> config["hidden_size"], table["model.norm.weight"], tensors("model.norm.weight").shape
        (128, ((128,), 'float32'), (128,))
    """
    name = np.dtype(dtype or ("bfloat16" if fp8 else model.embed[...].dtype)).name
    table = tensor_table(model.cfg, fp8, dtype=name)
    tensors = CastTensors(model_tensors(model), table, allow_nonfinite)
    return config_to_dict(model.cfg, fp8=fp8, dtype=name), table, tensors


def write_released(
    path: str | Path,
    config: dict[str, Any],
    table: files.Table,
    tensors: CastTensors,
    shard_bytes: int,
    *,
    quiet: bool,
    extra_files: Mapping[str, Path] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a released folder of a table's tensors, with copies of `extra_files`, and files of `texts`, both by name.

    Raises: ValueError as `save`.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes={shard_bytes} is below 1; give the bytes that a shard may hold")
    if config["torch_dtype"] not in DTYPES:
        raise ValueError(f"dtype={config['torch_dtype']} is not supported; use {' or '.join(DTYPES)}")
    total = files.table_bytes(table)
    with files.new_folder(path, total) as folder, transfer("saving", total, quiet=quiet) as advance:

        def read(name: str) -> np.ndarray:
            tensor = tensors(name)
            advance(tensor.nbytes)
            return tensor

        files.write_shards(folder, table, shard_bytes, read)
        files.write_json(folder / files.CONFIG, config)
        for name, file in (extra_files or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
