"""Signals handled for a while, then as before."""

import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP = (signal.SIGTERM, signal.SIGINT)
# by SIGTERM: Python drops what a handler raises in a garbage collector's callback
terminated = threading.Event()


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
def cpu_limit(seconds: float, late: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `late(number, frame)`, which raises, once the process has spent these seconds of CPU.

    Only in the main thread: in another one nothing bounds the time.

    Example:
        >>> def late(number, frame):
        ...     raise TimeoutError("too long")
        >>> with cpu_limit(0.01, late):
        ...     while True:
        ...         pass
        Traceback (most recent call last):
            ...
        TimeoutError: too long
    """
    main = threading.current_thread() is threading.main_thread()
    with handled(late, signal.SIGVTALRM):
        try:
            if main:
                # The timer repeats: the code within may catch the first exception.
                signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)
            yield
        finally:
            if main:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)


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

    # A thread answers at once; Python runs the handler only after XLA has returned.
    heard, sent = socket.socketpair()
    sent.setblocking(False)
    threading.Thread(target=_answer, args=(heard,), daemon=True).start()
    with sent, handled(note, *STOP):
        if terminated.is_set():  # before, but the exception was lost
            raise SystemExit(128 + signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():
            yield asked
            return

        # Only the main thread can have signals written to a socket.
        before = signal.set_wakeup_fd(sent.fileno())
        try:
            yield asked
        finally:
            signal.set_wakeup_fd(before)


def _answer(heard: socket.socket) -> None:
    """Say at once that a signal has come: its handler waits until XLA has ended a step."""
    with heard:
        while number := heard.recv(1):
            if number[0] in STOP:
                print(
                    "stopping when this step, or its compilation, is complete",
                    file=sys.stderr,
                    flush=True,
                )
