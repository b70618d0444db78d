"""Saves that a clock holds up because it was set back.

TensorStore starts no thread while the time of day is before the start of its last one. So if somebody, NTP or a virtual
machine sets the clock back by an hour, a save may write nothing for an hour. No error is raised.
"""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

HELD_S = 30.0  # seconds without a written byte after which a save counts as held


class Clock:
    """How far the time of day is behind the latest one that was seen.

    Example:
        >>> Clock().behind()
        0.0
    """

    def __init__(self) -> None:
        self._latest = time.time()

    def behind(self) -> float:
        """Seconds; 0 unless the clock was set back and has not caught up."""
        now = time.time()
        self._latest = max(self._latest, now)
        return self._latest - now


def wait(is_saving: Callable[[], bool], files: Callable[[], Iterable[Path]], clock: Clock) -> None:
    """Wait for a save in the background.

    Args: files: lists what the save has written so far.
    Raises: TimeoutError if the clock is behind, and the save has written nothing for `HELD_S`.
    """
    written, since = -1, time.monotonic()
    while is_saving():
        if (behind := clock.behind()) < 1:
            written = -1
        elif (now := _bytes(files())) != written:
            written, since = now, time.monotonic()
        elif time.monotonic() - since > HELD_S:
            raise TimeoutError(
                f"the clock was set back and is {behind:,.0f} s behind; TensorStore waits until it has caught up"
            )
        time.sleep(0.01)


def _bytes(files: Iterable[Path]) -> int:
    total = 0
    for path in files:
        with suppress(OSError):  # it may be renamed meanwhile
            total += path.stat().st_size
    return total
