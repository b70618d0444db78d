"""Checksums of a checkpoint's files: written with each checkpoint, compared before it is read.

The file checksums.json in a step's folder lists every file with its size and CRC-32. A CRC-32 finds each flipped bit
and each burst of up to 32 bits; other damage passes once in 4 billion. It is no protection from an attacker.

CRC-32 and not a cryptographic hash, for its speed. One core of an Intel Xeon with AVX-512 does 67 GB/s by zlib-ng and
3.6 by Python's zlib, whose numbers are the same; SHA-256 reaches 1.3 and BLAKE2b 0.6. Copying a file out of the page
cache takes longer (8.7 GB/s), so a save maps its files. Checksums take 3.7 % of a save's CPU time with zlib-ng
and 10.5 % without, in the background (experiments/bench/checkpoint.py).
"""

import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

try:
    from zlib_ng.zlib_ng import crc32  # the same numbers by the processor's vector instructions
except ImportError:
    from zlib import crc32

MANIFEST = "checksums.json"
MARK = {"checksums": MANIFEST}  # in Orbax's own metadata: a checkpoint with this mark must have the manifest
# Orbax writes these two at the very end, after the manifest. Restoring reads neither.
METADATA, COMMIT = "_CHECKPOINT_METADATA", "commit_success.txt"
COMMIT_TIME = "commit_timestamp_nsecs"  # the key of METADATA that is then set
NEEDED = ("config/metadata", "data/metadata", "state/_METADATA")  # of checkpoints that have no manifest
PIECE = 32 << 20  # bytes of a file that have a CRC-32 of their own; a multiple of mmap.ALLOCATIONGRANULARITY
THREADS = 2  # that read pieces of a file at the same time
_CHUNK = 1 << 18  # bytes that are read at once: they stay in the core's cache for the checksum


class DamagedCheckpoint(ValueError):
    """A checkpoint's files are not as they were written; the message names the first bad file."""


def write_manifest(folder: Path) -> None:
    """Write the manifest of a step's folder whose other files are complete."""
    files = {name: [path.stat().st_size, _checksum(path, mapped=True)] for name, path in sorted(_files(folder))}
    content = {"files": files, "metadata": _metadata(folder)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=0) + "\n")


def has_manifest(folder: Path) -> bool:
    """Whether a step's folder has checksums; older versions wrote none."""
    return (folder / MANIFEST).is_file()


def find_damage(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """List what is wrong with a step's folder, a clause for each bad file; [] if all is as it was written.

    Without a manifest only the presence of the main files is checked.

    Args: share: (i, n) computes the checksums of every n-th file only, from the i-th.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = Path(name)
        ...     _ = (folder / METADATA).write_text("{}"), (folder / "data").write_text("0123")
        ...     write_manifest(folder)
        ...     _ = find_damage(folder) == [], (folder / "data").write_text("0124")
        ...     [text.replace(name, "8") for text in find_damage(folder)]
        ["file='8/data' is damaged: its checksum is not the one that was written"]
    """
    try:
        metadata = _metadata(folder)
        if not has_manifest(folder):
            needed = NEEDED if metadata.get("custom_metadata") != MARK else (MANIFEST,)
            return [_bad(folder / name, "absent") for name in needed if not (folder / name).is_file()]
        expected = _read_manifest(folder)
    except DamagedCheckpoint as error:
        return [str(error)]
    damage = []
    if metadata != expected["metadata"]:
        damage.append(_bad(folder / METADATA, "damaged: it is not what was written"))
    found = dict(_files(folder))
    for name in sorted(expected["files"].keys() - found.keys()):
        damage.append(_bad(folder / name, "absent"))
    for i, name in enumerate(sorted(found)):
        if name not in expected["files"]:
            damage.append(_bad(found[name], "not a file of this checkpoint"))
        elif text := _difference(found[name], expected["files"][name], i % share[1] == share[0]):
            damage.append(_bad(found[name], text))
    return damage


def _difference(path: Path, expected: list[int], compare_content: bool) -> str:
    """Return the fault of one file; "" means that it has none."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        if status.st_size != expected[0]:
            return f"damaged: its size is {status.st_size:,} bytes instead of {expected[0]:,}"
        if compare_content and _checksum(path) != expected[1]:
            return "damaged: its checksum is not the one that was written"
    except OSError as error:
        return f"not readable: {error.strerror}"
    return ""


def _bad(path: Path, text: str) -> str:
    return f"file={str(path)!r} is {text}"


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files of a step's folder by their names in it, without those that are written after the manifest.

    Links and devices count, too. Names that begin with a dot are other programs', as those of a file server.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            inside = path.relative_to(folder).as_posix()
            if inside not in (MANIFEST, METADATA, COMMIT) and not name.startswith("."):
                yield inside, path


def _metadata(folder: Path) -> dict[str, Any]:
    """Orbax's metadata of a checkpoint, without the time that is set last."""
    values = _read_object(folder / METADATA)
    values.pop(COMMIT_TIME, None)
    return values


def _read_manifest(folder: Path) -> dict[str, Any]:
    values = _read_object(folder / MANIFEST)
    files = values.get("files")
    entries = list(files.values()) if isinstance(files, dict) else [None]
    if not all(isinstance(e, list) and len(e) == 2 and all(type(x) is int for x in e) for e in entries):
        raise DamagedCheckpoint(_bad(folder / MANIFEST, "damaged: it lists no checksums"))
    return {"files": files, "metadata": values.get("metadata")}


def _read_object(path: Path) -> dict[str, Any]:
    """Raises: DamagedCheckpoint if the file holds no JSON object."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise DamagedCheckpoint(_bad(path, "not a regular file"))
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedCheckpoint(_bad(path, "absent")) from None
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(_bad(path, "damaged: it is not JSON")) from None
    if not isinstance(values, dict):
        raise DamagedCheckpoint(_bad(path, "damaged: it is no JSON object"))
    return values


def _checksum(path: Path, mapped: bool = False) -> int:
    """The CRC-32 of the CRC-32s of a file's pieces, which threads compute at the same time.

    Args: mapped: as of `_crc32`.
    """
    size = path.stat().st_size
    if size <= PIECE:
        crcs = [_crc32(path, 0, mapped)]
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            crcs = list(pool.map(partial(_crc32, path, mapped=mapped), range(0, size, PIECE)))
    return crc32(b"".join(crc.to_bytes(4, "little") for crc in crcs))


def _crc32(path: Path, start: int, mapped: bool) -> int:
    """The CRC-32 of the piece of a file that begins at `start`.

    Args: mapped: map the file into memory instead of copying it, which takes 0.6 times the CPU. Only for files that
        this process has just written. A mapped file that is cut, or whose disk fails, ends the process by SIGBUS.
    """
    value, left, buffer = 0, PIECE, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        size = min(PIECE, os.fstat(file.fileno()).st_size - start)
        if mapped and size > 0:
            with suppress(OSError), mmap(file.fileno(), size, access=ACCESS_READ, offset=start) as view:
                return crc32(view)
        file.seek(start)  # also on file systems that cannot map
        while left and (size := file.readinto(buffer[: min(left, _CHUNK)])):
            value, left = crc32(buffer[:size], value), left - size
    return value
