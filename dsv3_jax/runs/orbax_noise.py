"""Silence for what Orbax prints beside the error that it raises.

When one write or read of a checkpoint fails, as on a full disk, Orbax raises its error and closes
its event loop. TensorStore's threads still report the others to that loop, a traceback each.
asyncio logs each failed one, and Python prints those that nobody awaits. Pages of text surround the
one sentence that says what happened.
"""

import logging
import re
import sys
import traceback
from functools import cache
from types import TracebackType


@cache
def silence() -> None:
    """Suppress only these messages. Safe to call more than once.

    Example:
        >>> silence()
        >>> logging.getLogger("absl").isEnabledFor(logging.ERROR)
        False
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's own logger
    logging.getLogger("asyncio").addFilter(
        lambda record: (
            not _is_of_orbax(record.getMessage(), record.exc_info[2] if record.exc_info else None)
        )
    )
    hook = sys.unraisablehook
    closed = "RuntimeError('Event loop is closed')"
    sys.unraisablehook = lambda found: (
        None
        if repr(found.exc_value) == closed or _is_of_orbax("", found.exc_traceback)
        else hook(found)
    )


def _is_of_orbax(message: str, trace: TracebackType | None) -> bool:
    """By a file of its code or its temporary folder, or by TensorStore's words."""
    text = message + "".join(traceback.format_tb(trace))
    return re.search("orbax.checkpoint|tensorstore_spec", text) is not None
