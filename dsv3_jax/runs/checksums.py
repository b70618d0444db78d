"""The checksums of a checkpoint's files, by which damage is found before they are read.

They are written once the checkpoint is complete, in files of their own that list the size and
CRC-32 of the others: checksums.json, or with several processes checksums.I-of-N.json, each the
share of one process. A checkpoint whose lists are not all there was not checked, and is read as it
is. A CRC-32 finds each flipped bit and each burst of up to 32 bits; other damage passes once in
4 billion. It does not stop an attacker.
"""

import json
import os
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsv3_jax.host.files import open_file, read_json, write_atomic

MANIFEST = "checksums.json"
# Orbax completes its two later; nothing reads them
LATE = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")
ARRAYS = "state/manifest.ocdbt"  # without it Orbax reads no array
_SHARE = re.compile(r"checksums\.(\d+)-of-(\d+)\.json")


def write_manifest(folder: Path, index: int = 0, count: int = 1) -> None:
    """Write the checksums of a complete checkpoint's files, or of one process's share of them."""
    name = MANIFEST if count == 1 else f"checksums.{index}-of-{count}.json"
    found = _checksums(folder, _names(folder)[index::count])
    write_atomic(folder / name, json.dumps(found, indent=0) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read all checksums of a checkpoint; None if they were not written to their end.

    Raises: OSError or ValueError if one of the files cannot be read.
    """
    names = os.listdir(folder)
    if MANIFEST in names:
        return read_json(folder / MANIFEST)
    shares = {name: int(found[2]) for name in names if (found := _SHARE.fullmatch(name))}
    if not shares or len(shares) != max(shares.values()):
        return None
    return {key: of for name in shares for key, of in read_json(folder / name).items()}


def find_damage(folder: Path, index: int = 0, count: int = 1) -> str:
    """Describe the first file of a checkpoint that is not as it was written; "" if all are.

    Args: index, count: of the files by size, check each `count`-th from `index`. The others are for
        other processes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = Path(name)
        ...     _ = (folder / "data").write_text("0123")
        ...     write_manifest(folder)
        ...     _ = find_damage(folder) == "", (folder / "data").write_text("0124")
        ...     find_damage(folder).replace(name, "8")
        "file='8/data' is damaged: its size or checksum is not the one that was written"
    """
    # The sizes come first: a file of another size is not read.
    try:
        expected = read_manifest(folder)
        if expected is None:
            return "" if (folder / ARRAYS).is_file() else f"file={str(folder / ARRAYS)!r} is absent"
        sizes = {name: of[0] for name, of in expected.items() if isinstance(of, list) and of}
        there = _names(folder)
        names = sorted([*there, *sorted(expected.keys() - set(there))][index::count])
        found = _checksums(folder, sorted({*names} & {*there}), sizes)
    except (OSError, ValueError) as error:
        remedy = "; the guide to training says how to make another"
        return f"a file is not readable: {error}{remedy if 'checksums.' in str(error) else ''}"

    # The first by name of the files that differ, are absent, or were added.
    for name in names:
        if expected.get(name) != found.get(name):
            damaged = "damaged: its size or checksum is not the one that was written"
            return f"file={str(folder / name)!r} is {damaged if name in found else 'absent'}"
    return ""


def _names(folder: Path) -> list[str]:
    """The files of a checkpoint that have checksums, the largest first: shares are of like size.

    Names that begin with a dot belong to other programs, as a file server.
    """

    def fail(error: OSError) -> None:  # else a folder that cannot be listed would seem to be empty
        raise error

    paths = (
        Path(top, name)
        for top, _, names in os.walk(folder, onerror=fail)
        for name in names
        if name[0] != "."
    )
    names = {path.relative_to(folder).as_posix() for path in paths}.difference(LATE)
    sizes = {name: (folder / name).stat().st_size for name in names if not _SHARE.fullmatch(name)}
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def _checksums(
    folder: Path, names: list[str], sizes: dict[str, Any] | None = None
) -> dict[str, list[int]]:
    """Name → [size, CRC-32] of a checkpoint's files.

    Args: sizes: those that are expected; a file of another size is not read, for it may be of any
        size.
    """
    # Threads: neither reading nor CRC-32 holds the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        found = pool.map(
            lambda name: _size_and_crc32(folder / name, sizes and sizes.get(name, -1)), names
        )
        return dict(zip(names, found, strict=True))


def _size_and_crc32(path: Path, expected: Any) -> list[int]:
    crc = 0
    with open_file(path) as file:
        size = path.stat().st_size
        while expected in (None, size) and (piece := file.read(1 << 20)):
            crc = zlib.crc32(piece, crc)
    return [size, crc]
