"""A profiler's trace of some steps of a run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax


class StepTrace:
    """A trace of the steps from `first` up to `end`; as a context, it ends with the training.

    Args:
        folder: to write to.
        steps: (first, end). None means that nothing is traced.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, StepTrace(Path(folder), (1, 2)) as trace:
        ...     for step in range(3):
        ...         with trace.of_step(step):
        ...             pass  # start the step
        ...         trace.close_at(step + 1)
        ...     print(*(path.name for path in Path(folder, "plugins").iterdir()))
        profile
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder = folder
        self._first, self._end = steps or (0, 0)
        self._begun = False
        self._open = ExitStack()

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """Name a step, and begin the trace with the first that belongs to it."""
        if not self._begun and self._first <= step < self._end:  # a run may resume between the two
            self._begun = True
            self._open.enter_context(jax.profiler.trace(self._folder, create_perfetto_trace=True))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def close_at(self, step: int) -> None:
        """End the trace if `step` steps are complete and no further one belongs to it."""
        if step == self._end:
            self._open.close()
