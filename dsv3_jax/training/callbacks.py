"""Callbacks: what else happens while a run trains, for example a tracker that gets its metrics."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.cluster import processes
from dsv3_jax.config import RunConfig


class Callback:
    """The methods that `fit` calls while it trains; each does nothing by default.

    Only the first of several processes calls them. A callback gets plain numbers and paths, never the state, so it
    cannot change the run. It is called between two steps, and training waits for it.

    An error in `on_start` ends `fit` before the first step. After an error elsewhere the callback is not called again.
    Training stops as after SIGTERM: the step that runs is completed and saved. Then `fit` raises the error, and the
    same call resumes.

    Example:
        >>> class Losses(Callback):
        ...     def __init__(self):
        ...         self.seen = []
        ...
        ...     def on_step(self, row):
        ...         self.seen.append((row["step"], row["loss"]))
        >>> losses = Losses()
        >>> losses.on_step({"step": 10, "loss": 5.5, "lr": 1e-3})  # `fit(run, out, callbacks=[losses])` does this
        >>> losses.seen
        [(10, 5.5)]
    """

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        """Training begins or resumes after `step` steps, in folder `out`."""

    def on_step(self, row: dict[str, Any]) -> None:
        """A row of training metrics was written, see metrics.jsonl: every `log_every` steps, in their order.

        On accelerators later steps may have started by then.
        """

    def on_evaluation(self, row: dict[str, Any]) -> None:
        """A row of validation metrics was written."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """The state after `step` steps is being saved into `folder`. It is complete before the next one begins."""

    def on_end(self, result: Any) -> None:
        """`fit` is about to return this `FitResult`. Not called if it raises."""


class Callbacks:
    """Calls callbacks in their order, and keeps the first error.

    Raises: ValueError for an object that is no `Callback`.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ValueError(f"callbacks holds {callback!r}, which is no dsv3_jax.train.Callback")
        self._callbacks = list(callbacks) if processes.is_first() else []
        self._stop: Callable[[], None] = lambda: None
        self.error: Exception | None = None

    def start(self, run: RunConfig, out: Path, step: int, stop: Callable[[], None]) -> None:
        """Call `on_start`.

        Args: stop: is called after an error of a later call, to ask the loop to save and to stop.
        Raises: the error of `on_start`.
        """
        self._stop = stop
        for callback in self._callbacks:
            callback.on_start(run, out, step)

    def step(self, row: dict[str, Any]) -> None:
        """Call `on_step`."""
        self._call(lambda callback: callback.on_step(dict(row)))

    def evaluation(self, row: dict[str, Any]) -> None:
        """Call `on_evaluation`."""
        self._call(lambda callback: callback.on_evaluation(dict(row)))

    def checkpoint(self, step: int, folder: Path) -> None:
        """Call `on_checkpoint`."""
        self._call(lambda callback: callback.on_checkpoint(step, folder))

    def end(self, result: Any) -> None:
        """Raise the first error of a callback, if there is one; else call `on_end`. Raises: its error, too."""
        if self.error is None:
            self._call(lambda callback: callback.on_end(result))
        if self.error is not None:
            raise self.error

    def _call(self, call: Callable[[Callback], None]) -> None:
        for callback in list(self._callbacks):
            try:
                call(callback)
            except Exception as error:
                self._callbacks.remove(callback)
                self.error = self.error or error
                self._stop()
