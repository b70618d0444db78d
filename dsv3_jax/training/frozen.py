"""Heads on a frozen trunk: all but the multi-token heads comes from another run's last checkpoint, and stays as it is.

The run that is made stands on its own: its checkpoints hold the whole model, see `source`.
"""

from pathlib import Path

from jax.sharding import Mesh

from dsv3_jax.config import RunConfig, replace
from dsv3_jax.data import tokenizer
from dsv3_jax.training import warm_start
from dsv3_jax.training.step import TrainState, init_state

MTP_KEYS = ("mtp_depth", "mtp_kind", "mtp_input")  # of a model: they are no business of the trunk's


def on_trunk(run: RunConfig, trunk: str | Path, out: str | Path | None = None) -> RunConfig:
    """A recipe with a trunk's model and data in the place of its own; what heads to train is a diff of that.

    Args: as `source.model_and_data`. Raises: ValueError when the trunk holds no run.
    """
    run = warm_start.model_and_data(run, trunk, out)
    if run.model.mtp_depth == 0:
        run = replace(run, model=replace(run.model, mtp_depth=1))
    return replace(run, trunk=str(trunk))


def check(run: RunConfig, words: tokenizer.Tokenizer) -> RunConfig:
    """The run whose trunk a run takes. `words`: the tokenizer of the latter.

    Raises: ValueError when that folder holds no run or no checkpoint, or is of another model or other tokens.
    """
    assert run.trunk is not None
    return warm_start.fitting(run.trunk, run, words, "trunk", MTP_KEYS)


def start(run: RunConfig, words: tokenizer.Tokenizer, mesh: Mesh | None = None) -> tuple[TrainState, int]:
    """Fresh heads on the trunk's last checkpoint, and the step of that. Raises: as `check`."""
    found = check(run, words)
    assert run.trunk is not None
    trunk = warm_start.last_state(run.trunk, found, mesh)
    return init_state(run, mesh, trunk), int(trunk.step)
