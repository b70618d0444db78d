"""The checksums of a checkpoint's files, by which damage is found before they are read.

The file checksums.json of a checkpoint lists the size and CRC-32 of all others, and is complete
before the checkpoint gets its name. A CRC-32 finds each flipped bit and each burst of up to 32
bits; other damage passes once in 4 billion. It does not stop an attacker.
"""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsv3_jax.host.files import open_file, read_json, sync

MANIFEST = "checksums.json"
# Orbax completes its two later; nothing reads them
LATE = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")


def write_manifest(folder: Path) -> None:
    """Write the manifest of a checkpoint's folder whose other files are complete; sync them all."""
    (folder / MANIFEST).write_text(json.dumps(_checksums(folder), indent=0) + "\n")
    sync(*folder.rglob("*"), folder)


def find_damage(folder: Path) -> str:
    """Describe the first file of a checkpoint that is not as it was written; "" if all are.

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
        expected = read_json(folder / MANIFEST)
        sizes = {name: of[0] for name, of in expected.items() if isinstance(of, list) and of}
        found = _checksums(folder, sizes)
    except (OSError, ValueError) as error:
        remedy = (
            "; the guide to training says how to make another" if MANIFEST in str(error) else ""
        )
        return f"a file is not readable: {error}{remedy}"

    # The first by name of the files that differ, are absent, or were added.
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = (
                "damaged: its size or checksum is not the one that was written"
                if name in found
                else "absent"
            )
            return f"file={str(folder / name)!r} is {what}"
    return ""


def _checksums(folder: Path, sizes: dict[str, Any] | None = None) -> dict[str, list[int]]:
    """Name → [size, CRC-32] of a checkpoint's files.

    Names that begin with a dot belong to other programs, as a file server.

    Args: sizes: those that are expected; a file of another size is not read, for it may be of any
        size.
    """

    def fail(error: OSError) -> None:  # else a folder that cannot be listed would seem to be empty
        raise error

    paths = (
        Path(top, name)
        for top, _, names in os.walk(folder, onerror=fail)
        for name in names
        if name[0] != "."
    )
    names = sorted({path.relative_to(folder).as_posix() for path in paths}.difference(LATE))

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
