"""Which checkpoints of a run are whole: their files are compared with their checksums, by all processes together."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from dsv3_jax.cluster import processes
from dsv3_jax.training.checksums import DamagedCheckpoint, find_damage


class WholeSteps:
    """The whole checkpoints in a folder. Each is checked once; all processes call the same methods together.

    Example:
        >>> WholeSteps(Path("run/checkpoints")).newest([]) is None
        True
    """

    def __init__(self, folder: Path):
        self._folder, self._checked = folder, set[int]()

    def damage(self, step: int) -> list[str]:
        """List what is wrong with a checkpoint's files. Processes share the work, and all get the same list."""
        if step in self._checked:
            return []
        found = find_damage(self._folder / str(step), (jax.process_index(), jax.process_count()))
        by_process = [json.loads(part) for part in processes.gather(json.dumps(found).encode())]
        damage = sorted({text for part in by_process for text in part})
        if not damage:
            self._checked.add(step)
        return damage

    def newest(self, steps: Sequence[int]) -> int | None:
        """Return the last of the steps whose checkpoint is whole; None if none is."""
        return next((step for step in sorted(steps, reverse=True) if not self.damage(step)), None)

    def require(self, step: int, steps: Sequence[int]) -> int:
        """Return `step`.

        Args: steps: all that have a checkpoint.
        Raises: ValueError if `step` has no checkpoint; DamagedCheckpoint if it is not whole.
        """
        if step not in steps:
            kept = ", ".join(map(str, sorted(steps))) or "no step"
            raise ValueError(f"step={step} has no checkpoint in {self._folder}; there are those of {kept}")
        if damage := self.damage(step):
            more = f", and {len(damage) - 1} more of its files" if len(damage) > 1 else ""
            whole = self.newest(steps)
            remedy = "no other checkpoint is whole" if whole is None else f"step {whole} is whole: use --step {whole}"
            raise DamagedCheckpoint(f"step={step}: {damage[0]}{more}; {remedy}")
        return step

    def rewind(self, steps: Sequence[int], step: int | None) -> list[str]:
        """Choose the checkpoint that training resumes from, and rename all later ones; see `Checkpoints.rewind`."""
        chosen = self.newest(steps) if step is None else self.require(step, steps)
        if chosen is None and steps:
            raise DamagedCheckpoint(
                f"{self.damage(max(steps))[0]}, and no other checkpoint in {self._folder} is whole; move the damaged "
                "folders away to train from the start"
            )
        sentences = []
        for later in sorted(other for other in steps if chosen is not None and other > chosen):
            damage = self.damage(later) if step is None else []
            aside = f"{later}.{'damaged' if damage else 'superseded'}"
            processes.by_first(partial(self._rename, later, aside))
            reason = damage[0] if damage else f"training resumes from step {step}"
            sentences.append(f"the checkpoint of step {later} is kept as {aside}: {reason}")
        return sentences

    def _rename(self, step: int, aside: str) -> None:
        shutil.rmtree(self._folder / aside, ignore_errors=True)
        (self._folder / str(step)).rename(self._folder / aside)
