"""Save a model as a folder that `transformers` loads, tensor by tensor; a failure leaves none."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from dsv3_jax.hf import tensor_files
from dsv3_jax.hf.config_writing import config_to_dict, left_out
from dsv3_jax.hf.fp8 import quantize
from dsv3_jax.hf.released_folder import BF16, ReleasedFolder
from dsv3_jax.hf.tensor_names import SCALE_SUFFIX, entries, tensor_table
from dsv3_jax.host.files import atomic_folder
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.report.progress import text_console, transfer

SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "bfloat16")


# a released tensor by name, in the released layout and any float dtype
ReadTensor = Callable[[str], np.ndarray]


def cast(
    read: ReadTensor, table: tensor_files.TensorTable, *, allow_nonfinite: bool
) -> Iterator[np.ndarray]:
    """Read a table's tensors, in its order and dtypes; an FP8 tensor's scales come after it.

    Args:
        read: reads a tensor in any float dtype.
        table: name → (shape, dtype name), as `tensor_table`.
        allow_nonfinite: accept NaN and Inf, except in FP8.
    Raises: ValueError naming a tensor that holds NaN or Inf.

    Example:
        >>> table = {"norm": ((2,), "bfloat16")}
        >>> tensors = cast(lambda name: np.ones(2, np.float32), table, allow_nonfinite=False)
        >>> [tensor.dtype.name for tensor in tensors]
        ['bfloat16']
    """
    for name, (_, dtype) in table.items():
        if name.endswith(SCALE_SUFFIX):
            continue  # written with its tensor
        value = read(name)

        # e4m3 has no infinity, and a NaN would spoil the scale of its block.
        fp8 = dtype not in DTYPES
        if (fp8 or not allow_nonfinite) and not np.isfinite(value).all():
            reason = ", which FP8 cannot represent" if fp8 else "; allow_nonfinite=True accepts it"
            raise ValueError(f"{name} holds NaN or Inf{reason}")

        if fp8:
            yield from quantize(value.astype(np.float32, copy=False))
        else:
            yield value.astype(dtype, copy=False)


def model_tensors(model: Transformer) -> ReadTensor:
    """Return a function that reads a model's parameters by released name.

    Raises: ValueError for a parameter that is sharded over hosts.

    Example:
        >>> import jax
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> ones = lambda x: jax.numpy.ones(x.shape, x.dtype)
        >>> model = jax.tree.map(ones, abstract(cfg))  # all weights are 1
        >>> read = model_tensors(model)
        >>> read("model.layers.0.self_attn.q_a_proj.weight").shape
        (64, 128)
    """
    entry_of = {e.name: e for e in entries(model.cfg)}
    arrays = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    for path, array in arrays.items():
        if not array.is_fully_addressable:
            raise ValueError(
                f"parameter {'.'.join(map(str, path))} is sharded over hosts; gather it before "
                "saving"
            )

    def part(path: tuple, index: tuple[int, ...]) -> np.ndarray:
        array = arrays[path]
        [device, *others] = array.devices()
        if others or device.platform != "cpu":
            return np.asarray(array[index])
        return np.asarray(array)[index]  # a view of the CPU's memory

    def read(name: str) -> np.ndarray:
        entry = entry_of[name]
        return entry.join([part(*param_slice) for param_slice in entry.slices])

    return read


def folder_tensors(folder: ReleasedFolder) -> ReadTensor:
    """Return a function that reads a folder's tensors; an absent copy is read from its original."""

    def read(name: str) -> np.ndarray:
        entry = folder.entries[name]
        if name not in folder.stored and entry.copy_of:
            entry = folder.entries[entry.copy_of]
        stored = folder.stored.get(entry.name)  # None: of 4 bits
        exact = BF16 if stored is not None and stored.dtype == BF16 else np.dtype(np.float32)
        return folder.read(entry, exact)

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
        model: its router is "sigmoid" (written as DeepSeek-V3) or "softmax" (as V2). MTP layers are
            written with their copies of embedding and head, as released.
        path: a folder that is absent or empty.
        fp8: write linear weights in FP8 with a scale for each 128 × 128 block, and the rest in
            bfloat16 or `dtype`.
        shard_bytes: a shard holds at most so many bytes of tensors, or one tensor.
        dtype: float32 or bfloat16. Default: the embedding's. The correction bias is always float32.
        allow_nonfinite: write NaN and Inf as they are; never in FP8.
        quiet: show no progress bar, and no sentence about a setting that is lost.
    Raises:
        ConfigError: the released format cannot express the configuration.
        ValueError: `path` is taken, the disk has no room, a weight (named) holds NaN or Inf, or
            shard_bytes is below 1.

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
    config, table, read = released_parts(model, fp8, dtype)
    tensors = cast(read, table, allow_nonfinite=allow_nonfinite)
    write_released(path, config, table, tensors, shard_bytes, quiet=quiet)
    if lost := left_out(model.cfg):
        text_console(quiet=quiet, stderr=True).print(lost)


def released_parts(
    model: Transformer, fp8: bool, dtype: Any
) -> tuple[dict[str, Any], tensor_files.TensorTable, ReadTensor]:
    """Return config.json, the table, and a function that reads a tensor of a model.

    Arguments and errors as `save`.


    Example:
        >>> import jax
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> ones = lambda x: jax.numpy.ones(x.shape, x.dtype)
        >>> model = jax.tree.map(ones, abstract(cfg))  # all weights are 1
        >>> config, table, read = released_parts(model, fp8=False, dtype=None)
        >>> config["hidden_size"], table["model.norm.weight"], read("model.norm.weight").shape
        (128, ((128,), 'float32'), (128,))
    """
    name = np.dtype(dtype or ("bfloat16" if fp8 else model.embed[...].dtype)).name
    if name not in DTYPES:
        raise ValueError(f"dtype={name} is not supported; use {' or '.join(DTYPES)}")
    config = config_to_dict(model.cfg, fp8=fp8, dtype=name)
    return config, tensor_table(model.cfg, fp8, dtype=name), model_tensors(model)


def write_released(
    path: str | Path,
    config: dict[str, Any],
    table: tensor_files.TensorTable,
    tensors: Iterable[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
    *,
    quiet: bool,
    texts: Mapping[str, bytes] | None = None,
) -> None:
    """Write a released folder of a table's tensors, and the files of `texts` by name.

    Raises: ValueError as `save`.
    """
    if shard_bytes < 1:
        raise ValueError(
            f"shard_bytes={shard_bytes} is below 1; give the bytes that a shard may hold"
        )
    total = tensor_files.table_bytes(table)
    tensor_files.check_new(Path(path), total)

    # The folder gets its name when all is written.
    with atomic_folder(path) as folder, transfer("saving", total, quiet=quiet) as advance:

        def counted() -> Iterator[np.ndarray]:
            for tensor in tensors:
                advance(tensor.nbytes)
                yield tensor

        tensor_files.write_shards(folder, table, shard_bytes, counted())
        tensor_files.write_json(folder / tensor_files.CONFIG, config)
        for name, content in (texts or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
