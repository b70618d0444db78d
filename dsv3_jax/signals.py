"""Signals handled for a while, then as before."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def handled(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    """Call `handler(number, frame)` for these signals within the context.

    Only the main thread can receive signals: in another one nothing changes.

    Example:
        >>> with handled(lambda number, frame: print("asked to stop"), signal.SIGTERM):
        ...     signal.raise_signal(signal.SIGTERM)
        asked to stop
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def deferred(*numbers: signal.Signals) -> Iterator[None]:
    """Let these signals wait until the context ends.

    Example:
        >>> with handled(lambda number, frame: print("asked to stop"), signal.SIGTERM):
        ...     with deferred(signal.SIGTERM):
        ...         signal.raise_signal(signal.SIGTERM)
        ...         print("saved")
        saved
        asked to stop
    """
    received: list[int] = []
    with handled(lambda number, frame: received.append(number), *numbers):
        yield
    if received:
        signal.raise_signal(received[0])


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM or SIGINT sets within the context; a second SIGINT interrupts at once.

    Example:
        >>> with asked_to_stop() as asked:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     asked.is_set()
        True
    """
    asked = threading.Event()

    def note(number: int, frame: Any) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    with handled(note, *STOP):
        yield asked
