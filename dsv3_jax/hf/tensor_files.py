"""Folders of safetensors files: mapped after a check of their headers, written tensor by tensor.

The safetensors package checks the headers. It cannot read FP8 into NumPy, and writing with it holds
a complete shard in memory, so this module maps and writes the bytes. Nothing is unpickled.
Source: the safetensors format's description (a header of names, dtypes, shapes and offsets that
    leave no hole).
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dsv3_jax.host.files import check_writable, open_file, parse_json, read_json, write_atomic

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
STORED_DTYPES = {  # the format's name → NumPy's dtype
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}
# NumPy's name → the format's name
_FORMAT_NAMES = {dtype.name: name for name, dtype in STORED_DTYPES.items()}
# bytes of config.json; lists of layers that are not quantized take half a megabyte
MAX_CONFIG = 8_000_000


class StoredTensor(NamedTuple):
    """File, dtype, shape and offset of a stored tensor."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def file_inside(folder: Path, name: object, *, under: str = "") -> Path:
    """Return the path of a file directly in a folder, or in its folder `under`.

    A hub snapshot holds links to `blobs/` in the same repository; they are followed.

    Raises: ValueError when the name contains a path, or is a link that leads elsewhere out of the
        folder.

    Example:
        >>> file_inside(Path("v3"), "config.json").as_posix()
        'v3/config.json'
        >>> file_inside(Path("v3"), "../secret")
        Traceback (most recent call last):
            ...
        ValueError: v3 names a file '../secret', which is not a plain file name in that folder
    """
    # without NUL and surrogates
    plain = isinstance(name, str) and name.isprintable() and Path(name).name == name
    if not isinstance(name, str) or not plain or name in ("", ".", "..") or "\\" in name:
        raise ValueError(
            f"{folder} names a file {name!r}, which is not a plain file name in that folder"
        )

    # Links are followed, but not out of the folder; a snapshot's lead to its repository's blobs.
    path = folder / under / name
    try:
        there, own = path.resolve(), folder.resolve()
    except RuntimeError as error:  # in older Pythons
        raise ValueError(f"{path} is a link that leads to itself") from error
    inside = [own, own.parent.parent / "blobs"] if own.parent.name == "snapshots" else [own]
    if not any(there.is_relative_to(place) for place in inside):
        raise ValueError(
            f"{path} is a link out of its folder; replace it by the file, as cp -rL does"
        )
    return path


def open_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Read config.json and the headers of a folder; no tensor is read.

    Returns: (config.json, name → stored tensor).
    Raises: ValueError naming the file, and the tensor if any. A file is absent, truncated, or a
        link out of the folder; or a header does not describe its file.

    Example:
        >>> import tempfile
        >>> table = {"norm": ((2,), "float32")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, CONFIG), {"hidden_size": 2})
        ...     write_shards(Path(folder), table, 1000, [np.ones(2, np.float32)])
        ...     config, stored = open_folder(folder)
        >>> config, stored["norm"].shape
        ({'hidden_size': 2}, (2,))
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not os.path.lexists(folder / CONFIG):
        raise ValueError(f"{folder} has no {CONFIG}")
    config = read_json(file_inside(folder, CONFIG), MAX_CONFIG)

    # A single file is preferred to an index, as in transformers.
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return config, read_header(file_inside(folder, SINGLE))
    if not (folder / INDEX).exists():
        raise ValueError(
            f"{folder} has neither {SINGLE} nor {INDEX}; other formats are not supported"
        )
    return config, _read_index(folder)


def _read_index(folder: Path) -> dict[str, StoredTensor]:
    file_of = read_json(file_inside(folder, INDEX)).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise ValueError(f"{folder / INDEX} has no weight_map")

    # Every tensor of the files has its row in the index, which names that file.
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(map(str, file_of.values()))):
        for tensor, stored in read_header(file_inside(folder, name)).items():
            if file_of.get(tensor, name) != name or tensor in tensors:
                other = tensors[tensor].file.name if tensor in tensors else file_of[tensor]
                raise ValueError(
                    f"{stored.file} holds {tensor}, which the index assigns to {other}"
                )
            tensors[tensor] = stored

    # And every row of the index has its tensor.
    for tensor, name in file_of.items():
        if tensor not in tensors:
            raise ValueError(
                f"{folder / str(name)} does not hold {tensor}, which the index assigns to it"
            )
    return tensors


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: name → stored tensor.

    Raises: ValueError when the file is absent or truncated, or its header does not describe it
        exactly.

    Example:
        >>> import tempfile
        >>> table = {"norm": ((2,), "float32")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_shards(Path(folder), table, 1000, [np.ones(2, np.float32)])
        ...     stored = read_header(Path(folder, "model-00001-of-00001.safetensors"))["norm"]
        >>> stored.dtype, stored.shape, stored.nbytes
        (dtype('float32'), (2,), 8)
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        with safe_open(path, "np"):  # checks that the tensors of the header fill the file
            pass
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            # This reader refuses a name given twice, of which safetensors takes the last.
            header = parse_json(file.read(length))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error

    # 8 bytes of length, the header, then the tensors at offsets from its end.
    header.pop("__metadata__", None)
    tensors = {}
    for name, fields in header.items():
        if fields["dtype"] not in STORED_DTYPES:
            raise ValueError(
                f"{path} holds {name} of dtype={fields['dtype']}, which is not supported"
            )
        start = 8 + length + fields["data_offsets"][0]
        tensors[name] = StoredTensor(
            path, STORED_DTYPES[fields["dtype"]], tuple(fields["shape"]), start
        )
    return tensors


def read_tensor(stored: StoredTensor) -> np.ndarray:
    """Map a tensor of a checked file, read-only, in its stored dtype.

    Bytes are read when they are used.


    Example:
        >>> import tempfile
        >>> table = {"norm": ((2,), "float32")}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_shards(Path(folder), table, 1000, [np.ones(2, np.float32)])
        ...     stored = read_header(Path(folder, "model-00001-of-00001.safetensors"))["norm"]
        ...     read_tensor(stored).tolist()
        [1.0, 1.0]
    """
    if stored.nbytes == 0:  # no map is empty
        return np.empty(stored.shape, stored.dtype)
    raw = np.memmap(stored.file, np.uint8, "r", stored.start, stored.nbytes)
    return np.asarray(raw).view(stored.dtype).reshape(stored.shape)


def check_new(path: Path, nbytes: int) -> None:
    """Check that a folder of `nbytes` can be created.

    Raises: ValueError when `path` is a URL, or exists and is not an empty folder, its parent is
        absent, or the disk has no room; OSError when it cannot be written.

    Example:
        >>> check_new(Path("no/such/v3"), nbytes=0)
        Traceback (most recent call last):
            ...
        ValueError: no/such is not a folder, so v3 cannot be created in it; create it first
    """
    check_writable(path, folders=True)
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ValueError(f"{path} exists and is not an empty folder; choose another path")
    if not path.parent.is_dir():
        raise ValueError(
            f"{path.parent} is not a folder, so {path.name} cannot be created in it; create it "
            "first"
        )
    free = shutil.disk_usage(path.parent).free
    if free < nbytes + (64 << 20):
        raise ValueError(
            f"{path.parent} has no room for {nbytes / 1e6:,.0f} MB: {free / 1e6:,.0f} MB are free"
        )


TensorTable = dict[str, tuple[tuple[int, ...], str]]  # as `tensor_table`


def table_bytes(table: TensorTable) -> int:
    """Add up the bytes of all tensors of a table of (shape, dtype name).

    Example:
        >>> table_bytes({"a": ((2, 3), "float32"), "b": ((4,), "bfloat16")})
        32
    """
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in table.values())


def write_shards(
    folder: Path, table: TensorTable, shard_bytes: int, tensors: Iterable[np.ndarray]
) -> None:
    """Write every tensor of a table into shards, with their index.

    Args:
        table: name → (shape, dtype name).
        shard_bytes: a shard holds at most so many bytes of tensors, or one tensor.
        tensors: those of the table, in its order; one is in memory at a time.

    Example:
        >>> import tempfile
        >>> table = {"a": ((2,), "float32"), "b": ((2,), "float32")}
        >>> tensors = [np.ones(2, np.float32)] * 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_shards(Path(folder), table, shard_bytes=8, tensors=tensors)
        ...     [file.name for file in sorted(Path(folder).glob("*.safetensors"))]
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    # Divide the table: a tensor that does not fit begins the next shard.
    shards: list[TensorTable] = [{}]
    shard_size = 0
    for name, (shape, dtype) in table.items():
        nbytes = table_bytes({name: (shape, dtype)})
        if shards[-1] and shard_size + nbytes > shard_bytes:
            shards.append({})
            shard_size = 0
        shards[-1][name] = (shape, dtype)
        shard_size += nbytes

    # The names hold the number of shards, so it is known before the first one is written.
    file_of = {}
    remaining = iter(tensors)
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        file_of.update(dict.fromkeys(shard, file))
        _write_file(folder / file, shard, remaining)
    write_json(
        folder / INDEX, {"metadata": {"total_size": table_bytes(table)}, "weight_map": file_of}
    )


def _write_file(path: Path, shard: TensorTable, tensors: Iterator[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0

    # The widest dtypes first, so that every tensor begins at a multiple of its item size.
    for name, (shape, dtype) in sorted(
        shard.items(), key=lambda row: -np.dtype(row[1][1]).itemsize
    ):
        start = end
        end = end + table_bytes({name: (shape, dtype)})
        header[name] = {
            "dtype": _FORMAT_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }

    # Spaces fill the header up to a multiple of eight, so that the tensors begin at one.
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)

    # Tensors come in the table's order, and each goes to its own offset.
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, row in shard.items():
            tensor = np.ascontiguousarray(next(tensors))
            assert (tensor.shape, tensor.dtype.name) == row, name
            file.seek(8 + len(raw) + header[name]["data_offsets"][0])
            file.write(tensor.reshape(-1).view(np.uint8).data)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as indented JSON.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(Path(folder, CONFIG), {"hidden_size": 7168})
        ...     print(Path(folder, CONFIG).read_text(), end="")
        {
          "hidden_size": 7168
        }
    """
    write_atomic(path, json.dumps(values, indent=2) + "\n")
