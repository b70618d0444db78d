"""Folders of safetensors files: read by memory map after their headers are checked, written a tensor at a time.

The safetensors package cannot read FP8 into NumPy, and holds a whole shard in memory to write it; the format is a
length, a JSON header and bytes, so both stand here. Nothing is ever unpickled.
Source: the safetensors format's description (a header of names, dtypes, shapes and offsets that leave no hole).
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind}{size}": np.dtype(f"{kind.lower()}{size // 8}") for kind in "IU" for size in (8, 16, 32, 64)},
    "BOOL": np.dtype(bool),
}
NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_KEEP = 256 << 20  # bytes read through one map before it is made anew, so that its pages do not add up


class Stored(NamedTuple):
    """Where a tensor stands."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: Path) -> Any:
    """Raises: ValueError when the file is absent, no JSON, or has a key twice."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return made


def inside(folder: Path, name: object) -> Path:
    """The file of that name in the folder itself.

    Raises: ValueError when the name is a path, or a link that leads out of the folder.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{folder} names a file {name!r}, which is not a plain file name of that folder")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link out of its folder: copy the file itself there (cp -rL does)")
    return path


def open_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """config.json, and where each tensor of a folder stands. Reads headers alone.

    Raises: ValueError naming the file (and tensor) when something is absent, a link out of the folder, or a header
        that is cut or does not describe its file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    config = read_json(inside(folder, CONFIG))
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds a {type(config).__name__}, not an object")
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():  # before an index, as transformers has it
        return config, read_header(inside(folder, SINGLE))
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX} (other formats are not read)")
    return config, _read_index(folder)


def _read_index(folder: Path) -> dict[str, Stored]:
    index = read_json(inside(folder, INDEX))
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    found: dict[str, Stored] = {}
    for name in sorted(set(map(str, where.values()))):
        for tensor, stored in read_header(inside(folder, name)).items():
            if where.get(tensor, name) != name or tensor in found:
                other = found[tensor].file.name if tensor in found else where[tensor]
                raise ValueError(f"{stored.file} holds {tensor}, which the index places in {other}")
            found[tensor] = stored
    for tensor, name in where.items():
        if tensor not in found:
            raise ValueError(f"{folder / str(name)} does not hold {tensor}, which the index places there")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """Where each tensor of a safetensors file stands.

    Raises: ValueError when the file is absent or cut, or its header does not describe it exactly.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > _MAX_HEADER:
            raise ValueError(f"{path} is cut or no safetensors file: a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a header that is not an object")
    header.pop("__metadata__", None)
    found = {name: _described(path, name, entry, 8 + length, size) for name, entry in header.items()}
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if stored.start != end:
            raise ValueError(f"{path}: {name} begins at byte {stored.start}, where byte {end} is next")
        end = stored.start + stored.nbytes
    if end != size:
        raise ValueError(f"{path} has {size} bytes, its header describes {end}")
    return found


def _described(path: Path, name: str, entry: Any, data: int, size: int) -> Stored:
    try:
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("its numbers must be 0 or more")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} describes {name} wrongly ({error}): {str(entry)[:200]}") from error
    stored = Stored(path, dtype, shape, data + start)
    if stop - start != stored.nbytes or data + stop > size:
        raise ValueError(
            f"{path} describes {name} as {entry['dtype']} {list(shape)} in bytes {start} to {stop}, of a file with "
            f"{size - data} bytes of data"
        )
    return stored


class Maps:
    """Tensors of checked files by memory map, one file open at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._bytes, self._read = np.empty(0, np.uint8), 0

    def __call__(self, stored: Stored) -> np.ndarray:
        """The tensor, read-only, in its own dtype; no byte is read before it is used."""
        if stored.nbytes == 0:
            return np.empty(stored.shape, stored.dtype)
        if stored.file != self._path or self._read > _KEEP:
            self._path, self._read = stored.file, 0
            self._bytes = np.memmap(stored.file, np.uint8, mode="r")
        self._read += stored.nbytes
        raw = self._bytes[stored.start : stored.start + stored.nbytes]
        return np.asarray(raw).view(stored.dtype).reshape(stored.shape)


@contextmanager
def new_folder(path: str | Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` at the end, and goes away on any failure.

    Raises: ValueError when `path` is there already, its parent is absent, or the disk has no room for `nbytes`.
    """
    path = Path(path)
    check_new(path, nbytes)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)  # as mkdir has it; mkdtemp is for its owner alone
        yield part
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_new(path: Path, nbytes: int) -> None:
    """Raises: ValueError as `new_folder` does."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise ValueError(f"{path} is there already: choose another place")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}, where {path.name} is to be made, is not a folder")
    free = shutil.disk_usage(path.parent).free
    if free < nbytes + (64 << 20):
        raise ValueError(f"no room for {nbytes / 1e6:,.0f} MB in {path.parent}: {free / 1e6:,.0f} MB are free")


Table = dict[str, tuple[tuple[int, ...], str]]


def table_bytes(table: Table) -> int:
    """Bytes of all tensors of a table of (shape, dtype name)."""
    return sum(math.prod(shape) * DTYPES[NAMES[dtype]].itemsize for shape, dtype in table.values())


def write_shards(folder: Path, table: Table, shard_bytes: int, read: Callable[[str], np.ndarray]) -> None:
    """Write every tensor of a table into shards of at most `shard_bytes` (or one tensor), with their index.

    `read(name)` gives a tensor in the table's shape and dtype; it is called once each, in the table's order.
    """
    shards: list[Table] = [{}]
    filled = 0
    for name, (shape, dtype) in table.items():
        nbytes = table_bytes({name: (shape, dtype)})
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (shape, dtype)
        filled += nbytes
    where = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        where.update(dict.fromkeys(shard, file))
        _write_file(folder / file, shard, read)
    write_json(folder / INDEX, {"metadata": {"total_size": table_bytes(table)}, "weight_map": where})


def _write_file(path: Path, shard: Table, read: Callable[[str], np.ndarray]) -> None:
    # The widest dtypes first, so that every tensor begins at a multiple of its own width.
    width = {name: DTYPES[NAMES[dtype]].itemsize for name, (_, dtype) in shard.items()}
    order = sorted(shard, key=lambda name: -width[name])  # stable: all else in the order of layers
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = shard[name]
        start, end = end, end + math.prod(shape) * width[name]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in shard:
            tensor = np.ascontiguousarray(read(name))
            assert (tensor.shape, tensor.dtype.name) == shard[name], name
            file.seek(8 + len(raw) + header[name]["data_offsets"][0])
            file.write(tensor.reshape(-1).view(np.uint8).data)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
