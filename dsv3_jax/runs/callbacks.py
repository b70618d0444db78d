"""What `fit` calls while it trains, and the files that it keeps of a run's start."""

from pathlib import Path
from typing import Any

from dsv3_jax.chat.text_settings import TEMPLATE_FILE, TextSettings, copy_to_run
from dsv3_jax.config import RunConfig
from dsv3_jax.hf.places import find
from dsv3_jax.host.mirror import fetched
from dsv3_jax.runs.convert import keep_origin


class Callback:
    """The methods that `fit` calls while it trains; each does nothing by default.

    Only the first of several processes calls them. A callback gets plain numbers and paths, never
    the state, so it cannot change the run. It is called between two steps, and training waits for
    it.

    An error in `on_start` ends `fit` before the first step. After an error elsewhere the callback
    is not called again. Training stops as after SIGTERM: the step that runs is completed and saved.
    Then `fit` raises the error, and the same call resumes.

    Example:
        >>> class Losses(Callback):
        ...     def __init__(self):
        ...         self.seen = []
        ...
        ...     def on_step(self, row):
        ...         self.seen.append((row["step"], row["loss"]))
        >>> losses = Losses()
        >>> losses.on_step({"step": 10, "loss": 5.5, "lr": 1e-3})  # as `fit(…, callbacks=[losses])`
        >>> losses.seen
        [(10, 5.5)]
    """

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        """Training begins or resumes after `step` steps, in folder `out`."""

    def on_step(self, row: dict[str, Any]) -> dict[str, float] | None:
        """A row of training metrics is there, which metrics.jsonl gets: every `log_every` steps.

        On accelerators later steps may have started by then.

        Returns: numbers by name that join the row, or None. The callbacks after it see them.
        """

    def on_evaluation(self, row: dict[str, Any]) -> dict[str, float] | None:
        """A row of validation metrics is there; as `on_step`."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """The state after `step` steps is being saved, and complete before the next begins."""

    def on_end(self, result: Any) -> None:
        """`fit` is about to return this `FitResult`. Not called if it raises."""


class KeepOrigin(Callback):
    """Keeps what `dsv3 convert` needs of the released folder that a run's start or trunk is of."""

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        place = run.start or run.trunk
        if place is not None and step == 0:  # later the other run may be gone
            keep_origin(find(fetched(place)), out)


class KeepText(Callback):
    """Writes the files by which `dsv3 chat` and `dsv3 convert` read text, if they are not there."""

    def __init__(self, text: TextSettings):
        self._text = text

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        if not (out / TEMPLATE_FILE).exists():
            place = run.start or run.trunk
            assert place is not None
            copy_to_run(find(fetched(place)), out, self._text)
