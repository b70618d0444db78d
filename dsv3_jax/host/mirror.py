"""A run in a bucket: a copy of its small files on this machine, and an index of all it has.

The object index.json names the files and the checkpoints. It is written last, whole, and only if it
still is what this process wrote or read. So a checkpoint is complete or absent, and no listing of
the bucket decides. Files that grow are kept in the copy and put whole with each checkpoint.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from dsv3_jax.host.bucket import Bucket, url_of
from dsv3_jax.host.files import PART, parse_json
from dsv3_jax.host.lease import Lease
from dsv3_jax.host.lock import LOCK_FILE

INDEX = "index.json"
# `version` counts its writes, `starts` the processes that wrote to the run. `files` are names;
# `steps` and `aside` say which folder a checkpoint is in that is read, or was set aside.
EMPTY: dict[str, Any] = {"version": 0, "starts": 0, "files": [], "steps": {}, "aside": {}}
_mirrors: dict[str, "Mirror"] = {}  # of this process, by URL


class Mirror:
    """A run in a bucket, with the copy of its files in `folder` until this process ends."""

    def __init__(self, url: str):
        self.bucket = Bucket(url)
        root = tempfile.mkdtemp(prefix="dsv3-")
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        self.folder = Path(root).resolve() / url.replace("://", "/")
        self.folder.mkdir(parents=True)
        self._lock: Lease | None = None  # while this process writes
        self._index = EMPTY
        self._there: dict[str, tuple[int, int]] = {}  # size and time of files as they were put

    def index(self) -> dict[str, Any]:
        """What the run has, as `EMPTY`: the writer's own, or read again.

        Raises: ValueError if the object is no index; OSError if it cannot be read.
        """
        if self._lock is not None:
            return self._index
        data, self._generation = self.bucket.read(INDEX)
        try:
            found = EMPTY if data is None else parse_json(data)
            right = all(type(found[key]) is type(value) for key, value in EMPTY.items())
            right &= all(map(str.isdecimal, found["steps"]))
            paths = [(self.folder / name).resolve() for name in found["files"]]
            right &= all(path.is_relative_to(self.folder) for path in paths)
        except (ValueError, KeyError, TypeError):
            right = False
        if not right:
            raise ValueError(f"file='{self.bucket.url}/{INDEX}' is damaged, or no run's")
        return found

    def change(self, **changes: Any) -> None:
        """Write the index with other values. Raises: OSError, Changed if another process did."""
        index = self._index | changes | {"version": self._index["version"] + 1}
        data = json.dumps(index, indent=1).encode()
        self._generation = self.bucket.write(INDEX, data, self._generation)
        self._index = index

    def fetch(self) -> None:
        """Bring the copy up to date, unless this process writes to it."""
        index = self.index()
        for name in index["files"] if index["version"] != self._index["version"] else ():
            data = self.bucket.read(name)[0]
            if data is None:
                raise ValueError(f"file='{self.bucket.url}/{name}' is absent")
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self._there[name] = _state(path)
        self._index = index

    def put(self, **changes: Any) -> None:
        """Put the files that changed into the bucket, and then the index, with other values."""
        assert self._lock is not None
        self._lock.check()
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and path.suffix != PART and self._there.get(name) != _state(path):
                state = _state(path)  # before it is read: what is appended meanwhile is put later
                self.bucket.write(name, path.read_bytes())
                self._there[name] = state
        self.change(files=sorted(self._there), **changes)

    @contextmanager
    def writing(self) -> Iterator[Lease]:
        """Be the run's only writer. What the copy has at the end is put into the bucket.

        Raises: FolderInUse; ValueError if the bucket has other objects there; OSError.
        """
        with closing(Lease(self.bucket)) as lock:
            self.fetch()
            if self._index is EMPTY and {*self.bucket.names()} - {LOCK_FILE}:
                raise ValueError(
                    f"out={self.bucket.url!r} holds other files and no {INDEX}; choose another "
                    "--out"
                )
            self._lock = lock
            try:
                self.change(starts=self._index["starts"] + 1)
                yield lock
                self.put()
            except BaseException:
                with suppress(OSError):  # the first error says more
                    self.put()
                raise
            finally:
                self._lock = None


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def fetched(place: str | Path) -> Path:
    """The folder of a run on this machine: `place`, or for a URL the copy, up to date.

    Raises: OSError if the bucket cannot be read; ValueError if its run is damaged.

    Example:
        >>> fetched("runs/a")
        PosixPath('runs/a')
    """
    url = url_of(place)
    if url is None:
        return Path(place)
    if url not in _mirrors:
        _mirrors[url] = Mirror(url)
    _mirrors[url].fetch()
    return _mirrors[url].folder


def mirror_of(folder: Path) -> Mirror | None:
    """The run in a bucket that a folder is the copy of; None for any other folder."""
    return next((mirror for mirror in _mirrors.values() if mirror.folder == folder), None)


def with_urls(text: str) -> str:
    """A text that names runs in a bucket by their URLs, not by the copies' paths."""
    for url, mirror in _mirrors.items():
        text = text.replace(str(mirror.folder), url)
    return text
