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
from typing import Any

# a file of Orbax's code or its temporary folder, or TensorStore's words
_OF_ORBAX = re.compile("orbax.checkpoint|tensorstore_spec")


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
        lambda record: not _OF_ORBAX.search(logging.Formatter().format(record))
    )
    hook = sys.unraisablehook

    def report(found: Any) -> None:
        closed = repr(found.exc_value) == "RuntimeError('Event loop is closed')"
        if not closed and not _OF_ORBAX.search("".join(traceback.format_tb(found.exc_traceback))):
            hook(found)

    sys.unraisablehook = report
