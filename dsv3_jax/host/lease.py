"""One writer for a run in a bucket: a lock object, whose holder renews it every minute.

Each write of it asks that nobody else has written it meanwhile. A lock that was not renewed for ten
minutes is taken over, and at once if its process was of this machine and has ended. So a holder
that finds another's lock, as after a long sleep of its machine, must not write any more.
"""

import json
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsv3_jax.host.bucket import Bucket, Changed
from dsv3_jax.host.files import parse_json
from dsv3_jax.host.lock import LOCK_FILE, FolderInUse, FolderLock, describe, record

RENEWED, EXPIRES = 60, 600  # seconds
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # tells machines of one name apart


class Lease(FolderLock):
    """The right to write to a run in a bucket, until it is closed.

    Raises: FolderInUse, which names the process that holds it; OSError.
    """

    def __init__(self, bucket: Bucket):
        super().__init__()
        self._bucket = bucket
        self._record = record() | {"boot": _BOOT.read_text().strip() if _BOOT.exists() else ""}
        data, generation = bucket.read(LOCK_FILE)
        if other := describe(data or b""):
            if not self._has_ended(parse_json(data or b"")):
                raise FolderInUse(
                    f"out={bucket.url!r} is in use by {other}; wait for it, or stop it; "
                    f"its lock ends {EXPIRES // 60} minutes after it does"
                )
            self.sentence = f"the lock of {other} is taken over: it has ended"
        self._write(generation)

        # Beside the training: a save may take longer than a lock lives.
        self._one = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._keep, daemon=True).start()

    def _has_ended(self, other: dict[str, Any]) -> bool:
        renewed = other.get("renewed")
        if not isinstance(renewed, float) or time.time() - renewed > EXPIRES:
            return True
        here = all(other.get(key) == self._record[key] for key in ("host", "boot"))
        return here and _BOOT.exists() and not Path("/proc", str(other["pid"])).exists()

    def _write(self, generation: bytes) -> None:
        now = time.time()
        content = json.dumps(self._record | {"renewed": now}).encode()
        self._generation = self._bucket.write(LOCK_FILE, content, generation)
        self._renewed = now

    def check(self) -> None:
        """Check that this process still is the writer; renew a lock that is a minute old.

        Raises: OSError when another process has taken it over, or the bucket has not answered for
            five minutes.
        """
        with self._one:
            age = time.time() - self._renewed
            if age < RENEWED:
                return
            try:
                self._write(self._generation)
            except OSError as error:
                if isinstance(error, Changed) or age > EXPIRES / 2:
                    raise OSError(f"this process is no longer the writer: {error}") from error

    def _keep(self) -> None:
        while not self._closed.wait(RENEWED):
            with suppress(OSError):  # the next `check` of the training raises it
                self.check()

    def close(self) -> None:
        """Delete the lock, unless it is another's by now."""
        self._closed.set()
        with suppress(OSError), self._one:
            self._bucket.write(LOCK_FILE, None, self._generation)
