"""A private folder of compiled libraries: only this user's own, whole files come out of it.

A library is code that runs with the user's rights. So the folder must be the user's and closed to others, and each
library is compared with the SHA-256 in its manifest, NAME.json, before it is loaded. A library that was cut, emptied or
replaced does not match, and is compiled again. Both files are complete on the disk before they get their names.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_BUILD = "build-"  # prefix of the folders that a library is built in


class NotPrivate(OSError):
    """The cache folder cannot be used; the message says why."""


def cache_folder() -> Path:
    """Return the user's cache folder, which is created if it is absent.

    Raises: NotPrivate if there is no home, it cannot be created, or others own it or may write to it.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3_jax"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        raise NotPrivate(f"there is no cache folder: {error}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise NotPrivate(f"{folder} is not a folder")
    if status.st_uid != os.geteuid():
        raise NotPrivate(f"{folder} belongs to another user")
    if status.st_mode & 0o022:
        raise NotPrivate(f"{folder} can be written by others: delete it, because its files may be theirs")
    if status.st_mode & 0o055:
        folder.chmod(0o700)
    return folder


def find_whole(folder: Path, name: str) -> Path | None:
    """Return the path of a library whose content is that of its manifest; None if it must be compiled.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     find_whole(Path(folder), "kernels.so") is None
        True
    """
    path = folder / name
    try:
        for file in (path, _manifest(path)):
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
        expected = json.loads(_manifest(path).read_bytes())
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError, RecursionError):
        return None
    return path if isinstance(expected, dict) and expected.get("sha256") == found else None


def keep(built: Path, folder: Path, name: str, facts: dict[str, str]) -> Path:
    """Move a built file into the folder under its name, with its manifest.

    Args: facts: what the content depends on, to be written into the manifest.
    """
    path = folder / name
    digest = hashlib.sha256(built.read_bytes()).hexdigest()
    manifest = built.with_name(_manifest(built).name)
    manifest.write_text(json.dumps({"sha256": digest, "size": built.stat().st_size} | facts, indent=1) + "\n")
    for file in (built, manifest):
        file.chmod(0o600)
        _sync(file)
    manifest.replace(_manifest(path))  # first: a library without its own manifest is not loaded
    built.replace(path)
    _sync(folder)
    return path


@contextlib.contextmanager
def build_folder(folder: Path) -> Iterator[Path]:
    """Make a folder to build in. One process at a time: the others wait, and then find what it built.

    Raises: NotPrivate if the folder is read-only.
    """
    if not os.access(folder, os.W_OK | os.X_OK):
        raise NotPrivate(f"{folder} is read-only")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks: two processes may build the same
            lock = stack.enter_context((folder / "build.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            for dead in folder.glob(f"{_BUILD}*"):  # of a process that was killed: this one alone builds now
                shutil.rmtree(dead, ignore_errors=True)
        yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=_BUILD, dir=folder)))


def _manifest(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
