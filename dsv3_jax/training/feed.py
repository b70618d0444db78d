"""Batches on the way to the devices, the next one while a step still runs."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from dsv3_jax.data.batches import Batch
from dsv3_jax.data.source import Batches


class Feed:
    """Takes batches from a source and puts them on devices, at most one ahead of the step that reads it.

    Args:
        batches: the source.
        put: puts a batch on the devices.

    Example:
        >>> import itertools
        >>> feed = Feed(itertools.count(), lambda batch: print("put", batch) or batch)
        >>> first = feed.take()  # and start a step with it
        put 0
        >>> feed.look_ahead()  # while the step runs
        put 1
        >>> feed.take()
        1
    """

    def __init__(self, batches: Batches | Any, put: Callable[[Batch | Any], dict[str, Array] | Any]):
        self._batches, self._put = batches, put
        self._ahead: Any = None

    def take(self) -> dict[str, Array] | Any:
        """Return the next batch on the devices."""
        arrays, self._ahead = self._ahead, None
        return self._place() if arrays is None else arrays

    def look_ahead(self) -> None:
        """Make the batch that `take` will return."""
        self._ahead = self._place()

    def position(self) -> dict[str, Any]:
        """Return the position of the batch that `take` will return next, as plain JSON.

        It is that of the source, so no batch may have been made ahead.
        """
        assert self._ahead is None
        return self._batches.get_state()

    def _place(self) -> Any:
        return self._put(next(self._batches))
