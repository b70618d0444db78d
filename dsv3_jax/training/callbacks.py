"""Callbacks: what else happens while a run trains, for example a tracker that gets its metrics."""

from pathlib import Path
from typing import Any

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
