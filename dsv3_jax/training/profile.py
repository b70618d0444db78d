"""A trace of some training steps, which TensorBoard (XProf) and Perfetto open."""

import re
from pathlib import Path

import jax

FOLDER = "profile"


class Profile:
    """Traces steps START to STOP - 1 of a run into `profile/` of its folder; without steps it does nothing.

    The parts of a step have names: MLA or GQA, router, experts, heads, loss, optimizer.

    Args:
        steps: (START, STOP), counted from 0.
        out: the run's folder.

    Example:
        >>> with Profile(None, "runs/demo") as profile:
        ...     profile.reach(0)
        False
    """

    def __init__(self, steps: tuple[int, int] | None, out: str | Path):
        self.first, self._end = steps or (-1, -1)
        self.folder, self._running = Path(out) / FOLDER, False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        if self._running:
            self._stop()

    def reach(self, step: int) -> bool:
        """Begin or end the trace before a step. Returns: whether it ended: the steps before must be complete by then.

        A run that resumes inside the range begins there.
        """
        if self._running and step >= self._end:
            self._stop()
            return True
        if not self._running and self.first <= step < self._end:
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._running = True
        return False

    def ends_at(self, step: int) -> bool:
        """Whether the trace ends before this step."""
        return self._running and step >= self._end

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()


def parse_steps(text: str) -> tuple[int, int]:
    """Read START:STOP.

    Raises: ValueError when it is none, or no step is between them.

    Example:
        >>> parse_steps("10:13")
        (10, 13)
    """
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"profile={text!r} is not START:STOP, two steps of which the first is smaller, as 10:13")
    return int(match[1]), int(match[2])
