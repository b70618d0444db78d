"""Objects in a bucket, gs:// or s3://, by TensorStore's key-value stores, without a file system.

An object is replaced whole. A write may ask that the object still is the one that was read: the
bucket compares generations, so of two writers one gets `Changed`. Credentials are those that
TensorStore finds: of Google's application default, or of AWS's chain.
"""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_URL = re.compile(r"(gs|s3):/+([^/]+)/*(.*?)/*")
# A bucket that does not answer is reported after half a minute.
_RETRIES = {"max_retries": 7, "initial_delay": "500ms", "max_delay": "8s"}


class Changed(OSError):
    """An object is no longer the one that was read: another process has written it."""


def url_of(place: str | os.PathLike) -> str | None:
    """The URL of a place in a bucket; None for a path. A `Path` has lost one of the slashes.

    Example:
        >>> from pathlib import Path
        >>> url_of("runs/a"), url_of("gs://bucket/runs/a/"), url_of(Path("s3://bucket/runs/a"))
        (None, 'gs://bucket/runs/a', 's3://bucket/runs/a')
    """
    found = _URL.fullmatch(os.fspath(place))
    return found and f"{found[1]}://{found[2]}/{found[3]}".rstrip("/")


class Bucket:
    """The objects whose names begin with a URL.

    All methods raise OSError, which names the object and the bucket's reason.
    """

    def __init__(self, url: str):
        import tensorstore  # late: commands that read no bucket do without it

        kind, name, path = _URL.fullmatch(url).groups()  # type: ignore[union-attr]
        self.url = url
        # JSON of TensorStore: where the objects are
        driver = "gcs" if kind == "gs" else kind
        spec = {"driver": driver, "bucket": name, "path": path and f"{path}/"}
        # For other servers of S3: TensorStore does not read AWS's variable.
        if kind == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL")):
            region = os.environ.get("AWS_REGION", "us-east-1")
            spec |= {"endpoint": endpoint, "aws_region": region}
        self._spec = spec
        context = tensorstore.Context({f"{driver}_request_retries": _RETRIES})
        self._store = self._ask("opened", "", tensorstore.KvStore.open, spec, context=context)

    def spec(self, path: str) -> dict[str, Any]:
        """Where the objects under a path are, as TensorStore's JSON."""
        return self._spec | {"path": f"{self._spec['path']}{path}/"}

    def read(self, name: str) -> tuple[bytes | None, bytes]:
        """Read an object. Returns: its content, None if it is absent; its generation, for `write`.

        An absent bucket has no objects.
        """
        found = self._ask("read", name, self._store.read, name)
        return found.value if found.state == "value" else None, found.stamp.generation

    def write(self, name: str, data: bytes | None, if_equal: bytes | None = None) -> bytes:
        """Write an object, or delete it (None).

        Args: if_equal: only if the object has this generation; an absent one has one, too.
        Returns: the new generation.
        Raises: Changed if it has another one.
        """
        written = self._ask("written", name, self._store.write, name, data, if_equal=if_equal)
        if written.generation:
            return written.generation

        # The answer to a write that succeeded may be lost; its repetition is refused.
        found, generation = self.read(name)
        if found != data:
            raise Changed(f"{self.url}/{name} was changed by another process")
        return generation

    def names(self, path: str = "") -> list[str]:
        """List objects, under a path or all. Some servers list a new one late."""
        listed = self._ask("listed", "", self._store.list)
        names = (name.decode(errors="replace") for name in listed)
        return sorted(name for name in names if name.startswith(path and f"{path}/"))

    def delete(self, path: str) -> None:
        """Delete all objects under a path that are listed."""
        # Not TensorStore's `delete_range`: a server that ignores ranges would lose all.
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: self.write(name, None), self.names(path)))

    def _ask(self, done: str, name: str, ask: Callable, *args: Any, **options: Any) -> Any:
        try:
            return ask(*args, **options).result()
        except Exception as error:  # TensorStore raises ValueError and others
            reason = " ".join(str(error).split())[:200]
            raise OSError(f"{self.url}/{name} cannot be {done}: {reason}") from error
