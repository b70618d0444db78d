"""`dsv3 train --report NAME …`: callbacks that send a run's metrics to another program."""

import importlib.util
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax.config import RunConfig, to_dict
from dsv3_jax.host.files import read_text, write_atomic
from dsv3_jax.report.metrics_files import flat
from dsv3_jax.report.progress import text_console
from dsv3_jax.runs.callbacks import Callback

ID_FILE = "wandb_id"  # in a run's folder: with it, a run that resumes continues in W&B
_MAX_ID = 200  # bytes


class Wandb(Callback):
    """Sends each row to Weights & Biases, as its environment variables say: project, mode, place.

    Raises: ModuleNotFoundError without the package wandb.
    """

    def __init__(self) -> None:
        import wandb

        self._wandb = wandb

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        file = out / ID_FILE
        if not file.exists():
            write_atomic(file, uuid.uuid4().hex + "\n")
        own = read_text(file, _MAX_ID).strip()
        self._wandb.init(id=own, resume="allow", name=out.name, config=to_dict(run))

    def on_step(self, row: dict[str, Any]) -> None:
        self._wandb.log(flat(row), step=row["step"])

    on_evaluation = on_step

    def finish(self, failed: bool) -> None:
        """End the run there, and wait until it has all rows."""
        self._wandb.finish(exit_code=int(failed))


class TensorBoard(Callback):
    """Says how to look at the files that each run writes for TensorBoard."""

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        first = "" if importlib.util.find_spec("tensorboard") else "pip install tensorboard; "
        text_console().print(f"to look at it: {first}tensorboard --logdir {out}")


TRACKERS = {"wandb": Wandb, "tensorboard": TensorBoard}


@contextmanager
def trackers(names: Sequence[str]) -> Iterator[list[Callback]]:
    """Make the callbacks, and end what W&B has begun, however training ends.

    Raises: ModuleNotFoundError if the program of one is not installed.
    """
    made = [TRACKERS[name]() for name in dict.fromkeys(names)]
    failed = True
    try:
        yield made
        failed = False
    finally:
        for tracker in made:
            if isinstance(tracker, Wandb):
                tracker.finish(failed)
