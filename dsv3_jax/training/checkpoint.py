"""Checkpoints with Orbax: complete or not there at all, written in the background, the last few kept.

Each holds the training state (parameters, router bias, optimizer, step), the data position and the run's
configuration. Orbax writes into a temporary folder and renames it, so a run killed at any moment leaves the checkpoint
before. It moves an old one into the folder "deleted" before the files go, so none is half there either. The next
start deletes the remains of a dead run. Checkpoints are independent of the mesh.

A checkpoint is compared with its checksums (see `checksums`) before it is read. A reader refuses a damaged one, because
results must be of the step that was asked for. Training resumes from the newest one that is whole (`rewind`).
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from dsv3_jax.cluster import processes
from dsv3_jax.config import OPTAX, RunConfig, replace, run_from_dict, to_dict
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.mesh import sharding
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training import held_save, lora
from dsv3_jax.training.checksums import MARK, has_manifest, write_manifest
from dsv3_jax.training.orbax_noise import silence
from dsv3_jax.training.run_folder import difference, read_run
from dsv3_jax.training.step import Job, TrainState, abstract_state, model_of
from dsv3_jax.training.whole_steps import WholeSteps

LATE_WRITES_S = 1.0  # TensorStore's threads end their writes after Orbax has given a save up
DELETED = "deleted"  # subfolder of checkpoints beyond `run.keep`, until their files are deleted


class SaveFailed(OSError):
    """A checkpoint could not be written; the ones before are complete."""


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return a folder's identity, which a move keeps. None means that there is no folder at this place."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Checkpoints:
    """The checkpoints of one run folder. Use as a context: leaving it waits for what is still being written.

    Args:
        read_only: nothing is written or deleted: the run may be training elsewhere.
        optimizer: of a run that a transformation trains. Only a restore with its state needs it.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> run = ds.replace(ds.recipe("tiny"), model=ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0))
        >>> state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract_state(Job(run)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Checkpoints(folder, run) as checkpoints:
        ...         checkpoints.save(state, {"piece": 0}, wait=True)
        ...         state, position = checkpoints.restore()
        >>> int(state.step), position
        (0, {'piece': 0})
    """

    def __init__(
        self,
        folder: str | Path,
        run: RunConfig,
        *,
        read_only: bool = False,
        optimizer: optax.GradientTransformation | None = None,
    ):
        silence()  # Orbax's errors are raised, too
        self.folder, self.run = Path(folder).absolute() / "checkpoints", run
        self._optimizer, self._read_only = optimizer, read_only
        self._saving: int | None = None  # the step of the last `save`
        self._has_saved = False  # since old checkpoints were last deleted
        self._clock, self._is_held = held_save.Clock(), False
        self._whole = WholeSteps(self.folder)
        # lightweight_initialize: Orbax would read each checkpoint's metadata, which may be damaged.
        if read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True, save_interval_steps=0, create=False, lightweight_initialize=True
            )
        else:
            self._delete_old()  # what an earlier process left
            options = ocp.CheckpointManagerOptions(
                max_to_keep=run.keep,
                todelete_subdir=DELETED,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                lightweight_initialize=True,
                # Process 0 calls it when all files of all processes are complete, before the folder is renamed.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._place = _identity(self.folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if not self._is_held:  # a held save would hold `close`, too
                with self._named_errors():
                    self._wait()
                    self._manager.close()
            self._delete_old(last=True)
        except SaveFailed:
            for part in self._parts():
                shutil.rmtree(part, ignore_errors=True)
            if kind is None:  # otherwise the error that ends the run says more
                raise
        finally:
            self._leave_nothing_elsewhere()

    def _leave_nothing_elsewhere(self) -> None:
        """Delete what Orbax made at the old place of a run folder that was moved or deleted while it saved.

        Only where there is nothing else: somebody may have put another folder there.
        """
        if self._read_only or jax.process_index() > 0 or _identity(self.folder) == self._place:
            return
        until = time.monotonic() + LATE_WRITES_S
        while time.monotonic() < until:
            if self._holds_only_the_last_save():
                shutil.rmtree(self.folder.parent, ignore_errors=True)
            time.sleep(0.05)

    def _holds_only_the_last_save(self) -> bool:
        with suppress(OSError):  # it changes meanwhile
            known = {self.folder / DELETED, self.folder / str(self._saving)}
            alone = {*self.folder.parent.iterdir()} <= {self.folder}
            return alone and {*self.folder.iterdir()} <= known.union(self._parts())
        return False

    @property
    def latest(self) -> int | None:
        """Step of the last complete checkpoint; None before the first."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any], *, wait: bool = False) -> None:
        """Save a state and the data position, in the background unless `wait`.

        Raises: OSError if the disk has no room for it or an earlier save failed (the checkpoints before stay). The
            first of several processes decides, and the others raise its sentence as ValueError.
        """
        step = int(state.step)
        if step == self.latest:
            return
        self._delete_old()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        processes.by_first(lambda: self._check_room(size))  # one that refused alone would leave the others waiting
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(data),
            config=ocp.args.JsonSave(to_dict(self.run)),
        )
        with self._named_errors():
            self._wait()  # for the save before
            self._saving, self._has_saved = step, True
            self._manager.save(step, args=args, custom_metadata=MARK)
            if wait:
                self._wait()

    def _wait(self) -> None:
        try:
            held_save.wait(self._manager.is_saving_in_progress, self._written, self._clock)
        except TimeoutError:
            self._is_held = True
            raise
        self._manager.wait_until_finished()  # raises its error

    def _parts(self) -> Iterator[Path]:
        """The temporary folder of the last save, while it is written."""
        return self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")

    def _written(self) -> Iterator[Path]:
        return (path for part in self._parts() for path in part.rglob("*"))

    def check_save(self) -> None:
        """Raise the error of a save in the background, if it has failed.

        Raises: SaveFailed.
        """
        if not self._manager.is_saving_in_progress():
            with self._named_errors():
                self._wait()
            if self._has_saved:  # not at each step: a file system may be far away
                self._delete_old()
                self._has_saved = False

    def _delete_old(self, *, last: bool = False) -> None:
        """Delete the checkpoints that Orbax has moved away, and their folder unless it may still move one there."""
        if self._read_only or jax.process_index() > 0:
            return
        for path in self.folder.glob(f"{DELETED}/*"):
            shutil.rmtree(path, ignore_errors=True)
        if last:
            with suppress(OSError):
                (self.folder / DELETED).rmdir()

    def _write_manifest(self) -> None:
        # Another thread of Orbax writes its metadata, which the manifest repeats; no public method waits for it.
        self._manager._non_blocking_metadata_store.wait_until_finished()
        write_manifest(next(self._parts(), self.folder / str(self._saving)))

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name what failed where a save ends in an error of Orbax or TensorStore, of whatever type."""
        try:
            yield
        except Exception as error:
            if jax.process_count() > 1 and processes.is_connection_error(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise SaveFailed(
                f"the checkpoint of step {self._saving} cannot be written to {self.folder}: {reason}; the checkpoints "
                "before are complete"
            ) from error

    def _check_room(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < size + (64 << 20):
            raise OSError(
                f"no room for a checkpoint of {size / 1e6:.0f} MB in {self.folder}: {free / 1e6:.0f} MB are free"
            )

    def rewind(self, step: int | None = None) -> list[str]:
        """Choose the checkpoint that training resumes from, and rename all later ones.

        Damaged ones become `N.damaged`, others `N.superseded`. These folders are not read again, and may be deleted.

        Args: step: None means the newest checkpoint that is whole.
        Returns: sentences to print; none if the last checkpoint is chosen.
        Raises: ValueError if `step` has no checkpoint or a damaged one, or no checkpoint is whole.
        """
        sentences = self._whole.rewind(self._manager.all_steps(), step)
        if sentences:
            self._manager.reload()
        return sentences

    def restore(
        self, mesh: Mesh | None = None, step: int | None = None, *, optimizer: bool = True
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Read a complete checkpoint: the state and the data position; None if there is none yet.

        Args:
            mesh: shards the state, whatever mesh it was saved on. None means a single device.
            step: None means the last.
            optimizer: False is for readers. It leaves the optimizer's state out, whose arrays are placeholders, and
                merges LoRA's adapters into the weights.
        Raises: ValueError if the checkpoint is damaged (DamagedCheckpoint), does not fit the run's configuration, or
            there is none of `step`.
        """
        if self.latest is None:
            return None
        step = self._whole.require(self.latest if step is None else step, self._manager.all_steps())
        self._check_config(step)
        target = abstract_state(Job(self.run, optimizer=self._optimizer))
        where = sharding.state_sharding(target, mesh, fsdp=self.run.execution.layout.fsdp)
        target = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), target, where)
        if not optimizer:
            target = replace(target, opt=jax.tree.map(lambda _: ocp.PLACEHOLDER, target.opt))
        # A reader does not know the state of a transformation, and leaves it out.
        unknown = not optimizer and self.run.optim.name.startswith(OPTAX)
        item: Any = {"params": target.params, "bias": target.bias, "step": target.step} if unknown else target
        # Not StandardRestore, which refuses placeholders; and a manager takes one kind of arguments for an item.
        state = ocp.args.PyTreeRestore(
            item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=unknown
        )
        found = self._read(step, state=state, data=ocp.args.JsonRestore())
        if optimizer:
            return found.state, found.data
        held = TrainState(**found.state, opt=()) if unknown else found.state
        return replace(held, params=lora.merge(self.run.lora, held.params)), found.data

    def _read(self, step: int, **items: Any) -> Any:
        """Read items of a checkpoint.

        Raises: ValueError. The cause is the configuration if the checkpoint has checksums, because they were compared.
        """
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            checked = has_manifest(self.folder / str(step))
            if checked and not isinstance(error, ValueError | KeyError | TypeError):
                raise
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            damaged = "" if checked else ", or is damaged: it has no checksums"
            raise ValueError(
                f"step={step}: the checkpoint in {self.folder} is not of the model that its configuration describes"
                f"{damaged}"
            ) from error

    def _check_config(self, step: int) -> None:
        # First: a restore of other shapes fails half-way and leaves Orbax's tasks behind.
        saved = run_from_dict(self._read(step, config=ocp.args.JsonRestore()).config)
        if "bytes" not in (saved.data.tokenizer, self.run.data.tokenizer):
            # The folder has one tokenizer, but may have been elsewhere when this was saved.
            saved = replace(saved, data=replace(saved.data, tokenizer=self.run.data.tokenizer))
        different = difference(saved, self.run)
        if different:
            key, a, b = different
            raise ValueError(f"{key}={b!r} is not that of the checkpoint of step {step} in {self.folder}, {a!r}")


def last_step(folder: str | Path) -> int:
    """The step of the last checkpoint in a run's folder, by its name; 0 without one.

    Example:
        >>> last_step("nowhere")
        0
    """
    names = (path.name for path in (Path(folder) / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


class Loaded(NamedTuple):
    """A model out of a run folder."""

    model: Transformer
    run: RunConfig
    step: int  # of its checkpoint


def load_run(
    folder: str | Path, mesh: Mesh | None = None, *, step: int | None = None, kernels: str | None = None
) -> Loaded:
    """Load the model of a run's checkpoint, without optimizer state.

    Args:
        mesh: shards the model, whatever it was trained on. None means a single device.
        step: None means the last.
        kernels: as `Execution.kernels`. None means the run's own.
    Raises: ValueError if the folder holds no run, no checkpoint yet, or none of `step`, or (ConfigError) its model
        does not fit the mesh, or its devices do not have the kernels.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.training.run_folder import claim
        >>> run = ds.replace(ds.recipe("tiny"), model=ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0))
        >>> state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), abstract_state(Job(run)))
        >>> with tempfile.TemporaryDirectory() as folder:  # what `ds.train.fit` writes
        ...     _ = claim(folder, run)
        ...     with Checkpoints(folder, run) as checkpoints:
        ...         checkpoints.save(state, {}, wait=True)
        ...     model, run, step = ds.load_run(folder)
        >>> step, model.cfg.num_layers
        (0, 1)
    """
    run = read_run(folder)
    if kernels is not None:
        run = replace(run, execution=replace(run.execution, kernels=kernels))
    if mesh is not None:
        sharding.check_model(mesh, run.model, run.execution.layout)
    prepared = prepare(run.execution, mesh=mesh)
    with Checkpoints(folder, run, read_only=True) as checkpoints:
        found = checkpoints.restore(mesh, step, optimizer=False)
    if found is None:
        raise ValueError(f"folder={str(folder)!r} holds no checkpoint yet; training writes the first")
    state, _ = found
    return Loaded(model_of(Job(run, mesh, prepared), state), run, int(state.step))
