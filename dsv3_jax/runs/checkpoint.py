"""Checkpoints with Orbax: complete or not there, written in the background, the last few kept.

Each holds the training state (parameters, router bias, optimizer, step), the data position and the
run's configuration. Orbax writes into a temporary folder and renames it, so a run killed at any
moment leaves the checkpoint before. An old one is renamed before its files are deleted, so none is
half there either. The next start deletes the remains of a dead run. Checkpoints are independent of
the mesh.

A checkpoint is compared with its checksums before it is read. Of several processes each reads its
share of the files, when the checkpoint is complete and when it is compared. A reader refuses a
damaged one, because results must be of the step that was asked for. Training resumes from the
newest one that is whole (`Checkpoints.rewind`).
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from dsv3_jax.config import RunConfig, replace
from dsv3_jax.host.files import check_name, read_json, sync
from dsv3_jax.host.mirror import fetched, mirror_of
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.mesh import processes, sharding
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.runs.bucket_checkpoint import InBucket
from dsv3_jax.runs.checksums import ARRAYS, find_damage, write_manifest
from dsv3_jax.runs.folder import check_registered, read_run
from dsv3_jax.runs.orbax_noise import silence
from dsv3_jax.runs.saved_state import from_orbax, read_state, to_save
from dsv3_jax.training.state import Job, TrainState, model_of
from dsv3_jax.training.transformation import Transform

PART = ".orbax-checkpoint-tmp"  # in the name of a checkpoint's folder until it is complete
REMAINS = (f"*{PART}*", "*.deleted")  # of a save that failed; of checkpoints beyond `run.keep`


class SaveFailed(OSError):
    """A checkpoint could not be written; the ones before are complete."""


class DamagedCheckpoint(ValueError):
    """A checkpoint's files are not as they were written; the message names the first bad file."""


class Checkpoints:
    """The checkpoints of one run folder. As a context, it waits at its end for what is written.

    Args:
        read_only: nothing is written or deleted: the run may be training elsewhere.
        optimizer: of a run that a transformation trains. Only a restore with its state needs it.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> run = ds.replace(ds.recipe("tiny"), model=cfg)
        >>> from dsv3_jax.training.state import abstract_state
        >>> shapes = abstract_state(Job(run))
        >>> state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
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
        optimizer: Transform = None,
    ):
        check_name(folder)
        self.folder = Path(folder).absolute() / "checkpoints"
        self.run = run
        self._optimizer = optimizer
        self._read_only = read_only
        self._saving: int | None = None  # the step of the last `save`
        self._pool = ThreadPoolExecutor(1)
        self._sealed: Future | None = None  # done when that step has its checksums
        self._damage = cache(self._find_damage)  # the files of a checkpoint are read once
        self._open()
        if not read_only:
            self._tidy()  # after an earlier process

    def _open(self) -> None:
        silence()  # Orbax's errors are raised, too
        # Process 0 calls back when the files of all processes are complete, before the renaming.
        options = ocp.AsyncOptions(post_finalization_callback=self._sync)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        if not self._read_only:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with self._named_errors():
                self._wait()
            self._tidy(self.run.keep)
        except SaveFailed:
            if kind is None:  # otherwise the error that ends the run says more
                raise
        finally:
            self._pool.shutdown()
            self._close()
            self._tidy()

    def _close(self) -> None:
        self._orbax.close()

    @property
    def latest(self) -> int | None:
        """Step of the last checkpoint; None before the first. Waits for one that is in writing."""
        with self._named_errors():
            self._wait()
        return max(steps_of(self.folder), default=None)

    def save(self, state: TrainState, data: dict[str, Any], *, wait: bool = False) -> None:
        """Save a state and the data position, in the background unless `wait`; keep `keep` of them.

        Raises: SaveFailed if it cannot be written, for want of room too, or an earlier save failed;
            the checkpoints before stay.
        """
        with self._named_errors():
            self._wait()  # raises the error of the save before
            self._tidy(self.run.keep)
        self._saving = int(state.step)
        with self._named_errors():
            self._begin(state, data)
            self._sealed = self._pool.submit(self._seal)
            if wait:
                self._wait()

    def _begin(self, state: TrainState, data: dict[str, Any]) -> None:
        """Copy a state to the host, and write it in the background."""
        self._orbax.save(self.folder / str(self._saving), args=to_save(state, data, self.run))

    def _wait(self) -> None:
        """Wait for the last save and its checksums. Raises: their error, once."""
        sealed, self._sealed = self._sealed, None
        if sealed is not None:
            sealed.result()

    def _seal(self) -> None:
        self._orbax.wait_until_finished()  # in all processes the checkpoint is complete then
        folder = self.folder / str(self._saving)
        write_manifest(folder, jax.process_index(), jax.process_count())

    def _sync(self) -> None:
        """Wait until all files of a checkpoint are on the disk, before it gets its name."""
        folder = next(self.folder.glob(f"{self._saving}{PART}*"), self.folder / str(self._saving))
        if not (folder / ARRAYS).is_file():
            raise OSError(f"Orbax has not written {ARRAYS}")
        sync(*folder.rglob("*"), folder)

    def _tidy(self, keep: int | None = None) -> None:
        """Delete remains of failed saves, and all checkpoints before the last `keep`, if given."""
        if self._read_only or not processes.is_first():
            return
        if keep is not None and (steps := steps_of(self.folder)):
            sync(self.folder)  # the new one's name, before an older one is deleted
            for step in steps[:-keep]:
                # so that none is half there
                (self.folder / str(step)).rename(self.folder / f"{step}.deleted")
        for pattern in REMAINS:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _named_errors(self) -> AbstractContextManager[None]:
        """Name what failed where a save ends in an error."""
        what = f"the checkpoint of step {self._saving} cannot be written to {self.folder}"
        return _named(SaveFailed, what, "; the checkpoints before are complete")

    def rewind(self, step: int | None = None) -> list[str]:
        """Choose the checkpoint that training resumes from, and rename all later ones.

        Damaged ones become `N.damaged`, others `N.superseded`. These folders are not read again,
        and may be deleted.

        Args: step: None means the newest checkpoint that is whole.
        Returns: sentences to print; none if the last checkpoint is chosen.
        Raises: ValueError if `step` has no checkpoint or a damaged one, or no checkpoint is whole.
        """
        steps = steps_of(self.folder)
        sentences = []
        if step is None:
            chosen = next((step for step in reversed(steps) if not self._damage(step)), None)
        else:
            chosen = self._require(step, steps)
        if chosen is None and steps:
            raise DamagedCheckpoint(
                f"{self._damage(steps[-1])}, and no other checkpoint in {self.folder} is whole; "
                "move the damaged folders away to train from the start"
            )

        # Later ones are set aside: training takes their steps again.
        for later in steps[steps.index(chosen) + 1 :] if chosen is not None else ():
            reason = self._damage(later) if step is None else f"training resumes from step {step}"
            aside = f"{later}.{'damaged' if step is None else 'superseded'}"
            processes.by_first(partial(self._rename, str(later), aside))
            sentences.append(f"the checkpoint of step {later} is kept as {aside}: {reason}")
        return sentences

    def _rename(self, name: str, aside: str) -> None:
        shutil.rmtree(self.folder / aside, ignore_errors=True)
        (self.folder / name).rename(self.folder / aside)

    def _find_damage(self, step: int) -> str:
        """As `find_damage`; each process reads its share, and all get the first by name."""
        share = jax.process_index(), jax.process_count()
        found = processes.gather(find_damage(self.folder / str(step), *share).encode())
        return min(filter(None, found), default=b"").decode()

    def _require(self, step: int, steps: list[int]) -> int:
        """Return `step`.

        Raises: ValueError if it is none of the steps that have a checkpoint; DamagedCheckpoint if
            it is not whole.
        """
        if step not in steps:
            kept = ", ".join(map(str, steps)) or "no step"
            raise ValueError(
                f"step={step} has no checkpoint in {self.folder}; there are those of {kept}"
            )
        if damage := self._damage(step):
            raise DamagedCheckpoint(
                f"step={step}: {damage}; `dsv3 runs check` says which checkpoints are whole"
            )
        return step

    def restore(
        self,
        mesh: Mesh | None = None,
        step: int | None = None,
        *,
        optimizer: bool = True,
        widen: bool = False,
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """Read a complete checkpoint: the state and the data position; None if there is none yet.

        Args:
            mesh: shards the state, whatever mesh it was saved on. None means a single device.
            step: None means the last; if a trainer deletes it while it is read, the last of then.
            optimizer: False is for readers. It leaves the optimizer's state out, and merges LoRA's
                adapters into the weights.
            widen: to float32, also of frozen weights. False means that these have the dtype that
                they were saved in.
        Raises: ValueError if the checkpoint is damaged (DamagedCheckpoint), does not fit the run's
            configuration, or there is none of `step`.
        """
        while steps := steps_of(self.folder):
            chosen = steps[-1] if step is None else step
            try:
                found = self._read_state(self._require(chosen, steps), mesh, optimizer, widen)
            except Exception:
                if chosen not in steps or chosen in steps_of(self.folder):
                    raise
            else:
                # otherwise some of its files may have been absent
                if chosen in steps_of(self.folder):
                    return found
        return None

    def _read_state(self, step: int, *how: Any) -> tuple[TrainState, dict[str, Any]]:
        with _named(ValueError, f"step={step}: the checkpoint in {self.folder} cannot be read"):
            return self._read(step, Job(self.run, optimizer=self._optimizer), *how)

    def _read(self, step: int, job: Job, *how: Any) -> tuple[TrainState, dict[str, Any]]:
        folder = self.folder / str(step)
        # Settings first: a restore of other shapes fails half-way and leaves Orbax's tasks behind.
        saved = read_json(folder / "config" / "metadata")
        position = read_json(folder / "data" / "metadata")
        restore = partial(from_orbax, self._orbax, folder)
        return read_state(restore, saved, job, *how), position


@contextmanager
def _named(kind: type[Exception], what: str, more: str = "") -> Iterator[None]:
    """Name what failed where Orbax or TensorStore raises an error, of any type."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and processes.is_connection_error(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise kind(f"{what}: {reason}{more}") from error


class BucketCheckpoints(InBucket, Checkpoints):
    """The checkpoints of a run in a bucket; arguments as `Checkpoints`."""


def open_checkpoints(folder: str | Path, run: RunConfig, **options: Any) -> Checkpoints:
    """The checkpoints of a run's folder, or of the run in a bucket that the folder is a copy of."""
    kind = Checkpoints if mirror_of(Path(folder)) is None else BucketCheckpoints
    return kind(folder, run, **options)


def steps_of(folder: Path) -> list[int]:
    """The steps in a folder of checkpoints, in order, by their names; none if there is no folder.

    Raises: OSError if the folder cannot be listed.

    Example:
        >>> steps_of(Path("nowhere"))
        []
    """
    mirror = mirror_of(folder.parent)
    if mirror is not None:
        return sorted(map(int, mirror.index()["steps"]))
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


class Loaded(NamedTuple):
    """A model out of a run folder."""

    model: Transformer
    run: RunConfig
    step: int  # of its checkpoint


def load_run(
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    step: int | None = None,
    kernels: str | None = None,
    widen: bool = False,
) -> Loaded:
    """Load the model of a run's checkpoint, without optimizer state.

    Its weights are float32. Those that were frozen in bfloat16 stay so if the run computes in
    bfloat16.

    Args:
        mesh: shards the model, whatever it was trained on. None means a single device.
        step: None means the last.
        kernels: as `Execution.kernels`. None means the run's own.
        widen: all weights are float32, to be trained.
    Raises: ValueError if the folder holds no run, no checkpoint yet, or none of `step`, or
        (ConfigError) its model does not fit the mesh, its devices do not have the kernels, or its
        router, rule or attention is not registered.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.runs.folder import claim
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> run = ds.replace(ds.recipe("tiny"), model=cfg)
        >>> from dsv3_jax.training.state import abstract_state
        >>> shapes = abstract_state(Job(run))
        >>> state = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), shapes)
        >>> with tempfile.TemporaryDirectory() as folder:  # what `ds.train.fit` writes
        ...     _ = claim(folder, run)
        ...     with Checkpoints(folder, run) as checkpoints:
        ...         checkpoints.save(state, {}, wait=True)
        ...     model, run, step = ds.load_run(folder)
        >>> step, model.cfg.num_layers
        (0, 1)
    """
    folder = fetched(folder)
    run = read_run(folder)
    check_registered(run, folder)
    if kernels is not None:
        run = replace(run, execution=replace(run.execution, kernels=kernels))
    if mesh is not None:
        sharding.check_model(mesh, run.model)
    prepared = prepare(run.execution, mesh=mesh)
    widen |= run.execution.compute_dtype == "float32"
    with open_checkpoints(folder, run, read_only=True) as checkpoints:
        found = checkpoints.restore(mesh, step, optimizer=False, widen=widen)
    if found is None:
        raise ValueError(
            f"folder={str(folder)!r} holds no checkpoint yet; training writes the first"
        )
    return Loaded(model_of(Job(run, mesh, prepared), found[0]), run, int(found[0].step))
