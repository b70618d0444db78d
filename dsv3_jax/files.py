"""Files and folders that other programs see complete or not at all.

Content goes to a temporary name in the same folder, `.NAME.….part`, which is then renamed. A killed process leaves the
old file or folder as it was. Its temporary one remains and can be deleted.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # end of every temporary name


def write_atomic(path: str | os.PathLike, data: str | bytes) -> None:
    """Write a file in one step: a reader sees the old content or the new one, never a part.

    A device or pipe such as /dev/stdout cannot be renamed over; it is written directly.

    Args:
        path: the file. Parent folders are created, and a link to a file stays a link.
        data: text is written as UTF-8 with its line ends unchanged.
    Raises: OSError when the file cannot be written; the old one is kept.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder) / "runs" / "note.txt", "complete")
        ...     print((Path(folder) / "runs" / "note.txt").read_text())
        complete
    """
    path, content = Path(path).resolve(), data.encode() if isinstance(data, str) else data
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary folder that becomes `path` when the block ends.

    An exception deletes the temporary folder and leaves `path` as it was.

    Args:
        path: the folder to create. It must be absent or empty unless `overwrite` is set. Parent folders are created.
        overwrite: replace an existing folder. It is renamed away first: a process killed between the two renames
            leaves it as `.NAME.….part.old`.
    Raises: OSError when `path` cannot be created, or holds files and `overwrite` is not set.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with atomic_folder(Path(root) / "run") as folder:
        ...         _ = (folder / "a.txt").write_text("complete")
        ...         print((Path(root) / "run").exists())
        ...     print((Path(root) / "run" / "a.txt").read_text())
        False
        complete
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
    old = part.with_name(part.name + ".old")
    try:
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o777 & ~mask)  # mkdtemp gives access to the owner only; mkdir follows the umask
        yield part
        if overwrite and path.exists():
            path.rename(old)
        part.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
