"""Checkpoints with Orbax: whole or not there at all, written beside training, the last few kept.

Each holds the training state (parameters, router bias, optimizer, step), the data position and the run's
configuration. Orbax writes into a temporary folder and renames it, so a run killed at any moment leaves the
checkpoint before; what a dead run left half-written is cleaned away on the next start.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from dsv3_jax.cluster import processes
from dsv3_jax.config import Layout, ModelConfig, RunConfig, first_difference, from_dict, replace, to_dict
from dsv3_jax.data import tokenizer
from dsv3_jax.mesh import sharding
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training.step import TrainState, abstract_state, model_of


class Checkpoints:
    """The checkpoints of one run folder. Use as a context: leaving it waits for what is still being written.

    With `read_only` nothing is written, and nothing cleaned away: the run may be going on elsewhere.
    """

    def __init__(self, folder: str | Path, run: RunConfig, *, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what goes wrong is raised, too
        self.folder, self.run = Path(folder).absolute() / "checkpoints", run
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=run.keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the last whole checkpoint; None before the first."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any], *, wait: bool = False) -> None:
        """Save a state and the data position, in the background unless `wait`.

        Raises: OSError when the disk has no room for it (the checkpoints before stay); of several processes the first
            decides, and the others raise its sentence as ValueError.
        """
        step = int(state.step)
        if step == self.latest:
            return
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        processes.by_first(lambda: self._see_room(size))  # who refused alone would leave the others waiting in the save
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(to_dict(self.run)),
        )
        self._manager.save(step, args=args)
        if wait:
            self._manager.wait_until_finished()

    def _see_room(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < size + (64 << 20):
            raise OSError(
                f"no room for a checkpoint of {size / 1e6:.0f} MB in {self.folder}: {free / 1e6:.0f} MB are free"
            )

    def restore(self, mesh: Mesh | None = None, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
        """A whole checkpoint's state and data position, the last one's or that of `step`; None when there is none.

        The state comes to lie where the mesh wants it, whatever mesh it was saved on; without one on a single device.

        Raises: ValueError when the checkpoint does not fit the run's configuration, or there is none of `step`.
        """
        if self.latest is None:
            return None
        steps = self._manager.all_steps()
        if step is not None and step not in steps:
            kept = ", ".join(map(str, sorted(steps)))
            raise ValueError(f"there is no checkpoint of step {step} in {self.folder}: there are those of {kept}")
        step = self.latest if step is None else step
        self._check_config(step)
        target = abstract_state(self.run)
        where = sharding.state_sharding(target, mesh, fsdp=self.run.model.layout.fsdp)
        target = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), target, where)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=args)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} is another model's than its configuration says"
            ) from error
        return found.state, found.data

    def _check_config(self, step: int) -> None:
        # First, for a restore of other shapes fails half-way and leaves Orbax's tasks behind.
        found = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
        different = difference(from_dict(RunConfig, found), self.run)
        if different:
            key, a, b = different
            raise ValueError(f"the checkpoint of step {step} in {self.folder} was saved with {key} {a!r}, not {b!r}")


RUN_FILE, TOKENIZER_FILE = "run.json", "tokenizer.json"


def read_run(folder: str | Path) -> RunConfig:
    """The configuration of a run folder.

    Raises: ValueError when the folder holds no run, or its configuration cannot be read.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no {RUN_FILE} in it")
    try:
        return from_dict(RunConfig, json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def claim(folder: str | Path, run: RunConfig) -> None:
    """Make a run folder, or find it to be this very run's.

    A tokenizer.json may be there already. The configuration must be the one the folder was made with, key by key.

    Raises: ValueError when the folder is another run's, or holds other things.
    """
    folder = Path(folder)
    if (folder / RUN_FILE).exists():
        different = difference(read_run(folder), run)
        if different:
            key, a, b = different
            raise ValueError(f"{folder} holds another run: its {key} is {a!r}, not {b!r}; choose another --out")
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder to write a run into")
    if folder.exists() and any(path.name not in (TOKENIZER_FILE, RUN_FILE + ".part") for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no {RUN_FILE}; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (RUN_FILE + ".part")
    part.write_text(json.dumps(to_dict(run), indent=1))
    part.rename(folder / RUN_FILE)


def difference(a: RunConfig, b: RunConfig) -> tuple[str, Any, Any] | None:
    """As `first_difference`, of what makes a run this one: on which mesh and how it lies there changes no result."""
    plain, other = (to_dict(replace(run, model=replace(run.model, layout=Layout()))) for run in (a, b))
    return first_difference(plain, other)


def load_model(
    folder: str | Path, mesh: Mesh | None = None, *, step: int | None = None
) -> tuple[Transformer, ModelConfig, RunConfig, int]:
    """The model of a run's checkpoint, the last or that of `step`: (model, its configuration, the run, the step).

    Args: mesh: where it comes to lie, whatever it was trained on; None is a single device.
    Raises: ValueError when the folder holds no run, no checkpoint yet, or none of `step`, or (ConfigError) its model
        does not fit the mesh.
    """
    run = read_run(folder)
    if mesh is not None:
        sharding.check_model(mesh, run.model)
    with Checkpoints(folder, run, read_only=True) as checkpoints:
        found = checkpoints.restore(mesh, step)
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint yet")
    state, _ = found
    return model_of(run.model, state), run.model, run, int(state.step)


def load_draft(folder: str | Path, run: RunConfig, mesh: Mesh | None = None) -> Transformer:
    """The model of another run's last checkpoint, to draft for a model of `run`, on the mesh that this one lies on.

    Raises: ValueError as `load_model`, and when the other's tokenizer gives ids another meaning.
    """
    model, _, other, _ = load_model(folder, mesh)
    if not tokenizer.load(run.data.tokenizer).same_ids(tokenizer.load(other.data.tokenizer)):
        raise ValueError(f"the draft run {folder} has another tokenizer: its ids mean other text")
    return model
