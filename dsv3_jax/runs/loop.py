"""The training loop: batches in, a run folder out. The same call resumes where the run stopped.

A run folder holds run.json (the configuration), checkpoints/, metrics.jsonl (a line every
`log_every` steps and one each evaluation), load.jsonl (each expert's load and bias, at some of
those steps), with GRPO answers.jsonl (some answers of each step), tensorboard/, and two pictures,
routing.png and training.png. A start takes these steps:

    0. several processes (see `mesh.processes`) agree on one run, and its text is read
       (`runs.prepare`); from here the first alone prints and writes
    1. the folder is locked and claimed, or found to be this run's; another run's is refused, and
       one that another process writes to (`lock`)
    2. the last whole checkpoint is restored, or that of a given step: parameters, optimizer, router
       bias, step and data position. Later checkpoints are renamed (`Checkpoints.rewind`)
    3. metrics, load and answers after that step are dropped: they will be written again
    4. without a checkpoint, training begins at step 0 from the run's seed, from another run's
       weights if `start` names one, or on another's trunk if `trunk` does: then the multi-token
       heads alone are trained. With `lora`, the weights of `start` are frozen, and low-rank
       adapters are trained
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh

from dsv3_jax.config import RunConfig, check_kind, to_dict
from dsv3_jax.data.batches import Batches, Source
from dsv3_jax.host.lock import FolderLock, acquire
from dsv3_jax.host.mirror import fetched, mirror_of
from dsv3_jax.host.signals import asked_to_stop
from dsv3_jax.mesh import processes, sharding
from dsv3_jax.report.metrics_files import LOAD_FILE, AnswersFile, JsonLines, MetricsFile
from dsv3_jax.report.progress import Progress
from dsv3_jax.report.speed import Speed
from dsv3_jax.runs.answers import Answers
from dsv3_jax.runs.callbacks import Callback, KeepOrigin, KeepText
from dsv3_jax.runs.chats import Chats, for_epochs, read_chats
from dsv3_jax.runs.checkpoint import Checkpoints, open_checkpoints
from dsv3_jax.runs.folder import check_place, claim, made_from
from dsv3_jax.runs.prepare import (
    FitOptions,
    Prepared,
    check_devices,
    kernels_of,
    make_job,
    read_inputs,
)
from dsv3_jax.runs.start import Start, begin, on_trunk, on_weights, open_start
from dsv3_jax.runs.steps import Files, FitResult, NonFiniteLoss, Training
from dsv3_jax.training.state import Job
from dsv3_jax.training.transformation import Transform

__all__ = [
    "Callback", "Chats", "FitResult", "NonFiniteLoss", "Start",
    "fit", "for_epochs", "on_trunk", "on_weights", "open_start", "read_chats",
]  # fmt: skip


def fit(  # noqa: PLR0913 - the contract
    run: RunConfig,
    out: str | Path,
    *,
    mesh: Mesh | None = None,
    step: int | None = None,
    stop_after: int | None = None,
    quiet: bool = False,
    report: bool = True,
    profile: tuple[int, int] | None = None,
    optimizer: Transform = None,
    source: Source | None = None,
    start: Start | None = None,
    chats: Chats | None = None,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train a run in folder `out`; the same call again resumes it.

    Args:
        run: what to train. Its execution may change from call to call.
        out: the run's folder, made if absent, or gs://BUCKET/PATH or s3://BUCKET/PATH.
        mesh: devices to shard the run over, from `sharding.make_mesh`. None means a single device.
            The same run may resume on another mesh. If it has several processes, all make this
            call, with one shared `out`.
        step: resume from the checkpoint of this step, and rename later ones. None means the newest
            that is whole.
        stop_after: save and return once this step is reached, as after SIGTERM; at once if an
            earlier call has reached it. With several updates of GRPO, once the batch of this step
            is used up.
        quiet: True prints nothing.
        report: False leaves out what only readers need: MFU, for which a matrix product is timed,
            the order-2 model and the pictures. Thus short runs end some seconds earlier.
        profile: (START, STOP): write a trace of these steps into `profile/` of the folder, which
            TensorBoard (XProf) and Perfetto open. The parts of a step have names: MLA or GQA,
            router, experts, heads, loss, optimizer.
        optimizer: any optax transformation, in place of the run's own optimizer. It must not count
            on more than (gradients, state, parameters), and sees nested dicts of arrays, the
            parameters that train. Learning rate, schedule and weight decay are its own. The run's
            `clip_norm` clips the gradients that it gets, and a step that is not finite does not
            change its state. Its checkpoints resume with a transformation whose state has the same
            types and shapes. The caller keeps the learning rate and other numbers.
        source: data to train and to measure on, in place of the text that `run.data` names. A
            resumed run needs it again. Its token ids must be ids of `run.data.tokenizer`. None
            means the text.
        start: the run's `start` or `trunk`, from `open_start`, of which `on_weights` or `on_trunk`
            made the run. None means that `fit` opens it if it needs it.
        chats: the run's chats, from `read_chats`. None means that `fit` reads them.
        callbacks: called at the start and the end and for each row of metrics and checkpoint, see
            `Callback`. If one raises, the run is saved and the error is raised.
    Raises:
        ValueError: another run's folder, unreadable data, a tokenizer larger than the vocabulary, a
            start or trunk of another model, or a loss that is not finite (NonFiniteLoss); the last
            good checkpoint stays. ConfigError: batch or experts that cannot be sharded over the
            mesh, kernels that the devices do not have, or processes that disagree on what to train.
        FolderInUse (a ValueError): another process trains in the folder.
        DamagedCheckpoint (a ValueError): the checkpoint of `step`, or every one, is damaged.
        OSError: a checkpoint cannot be written; the ones before stay. Or the folder was moved or
            deleted.

    >>> import pathlib, tempfile
    >>> import dsv3_jax as ds
    >>> with tempfile.TemporaryDirectory() as name:
    ...     text = pathlib.Path(name, "text")
    ...     text.mkdir()
    ...     for i in range(20):
    ...         _ = (text / f"{i}.txt").write_text(f"document {i} is short. " * 9)
    ...     run = ds.recipe("tiny")
    ...     model = ds.replace(run.model, num_layers=1, mtp_depth=0)
    ...     sizes = dict(seq_len=32, batch_size=2, val_fraction=0.3)
    ...     data = ds.replace(run.data, paths=(str(text),), **sizes)
    ...     run = ds.replace(run, model=model, data=data, steps=2, eval_batches=1)
    ...     ds.train.fit(run, pathlib.Path(name, "run"), quiet=True).step
    2
    """
    check_kind("run", run, RunConfig)
    if start is not None:
        check_kind("start", start, Start)
    if chats is not None:
        check_kind("chats", chats, Chats)
    if profile is not None and profile[0] >= run.steps:  # steps count from 0
        raise ValueError(f"profile={profile} begins after the last of steps={run.steps}")

    out = processes.by_each(lambda: fetched(out))
    # What later commands need of the start is kept in the run's folder.
    kept: list[Callback] = [KeepOrigin()]
    if run.data.format == "chat" and source is None:
        start, chats = start_and_chats(run, out, start, chats)
    if chats is not None:
        kept.append(KeepText(chats.text))
    options = FitOptions(
        mesh=mesh, step=step, stop_after=stop_after, quiet=quiet, report=report, profile=profile,
        optimizer=optimizer, source=source, start=start, chats=chats,
        callbacks=(*kept, *callbacks),
    )  # fmt: skip

    # The loop. A step is yielded once it is complete, with what follows it.
    with open_training(run, out, options) as training:
        for done in training.steps():
            if done.logged:
                training.log(done)
            if done.evaluate:
                training.evaluate()
            if done.save:
                training.save()
        return training.finish()


def start_and_chats(
    run: RunConfig, out: str | Path, start: Start | None, chats: Chats | None
) -> tuple[Start | None, Chats | None]:
    """Read a run's chats, if it has some that are not read yet, and open its start for that."""
    if run.data.format != "chat":
        return start, None
    processes.agree({"run": to_dict(run)})
    chats = processes.by_each(lambda: chats or read_chats(run, out, start))
    return start or chats.start, chats


@contextmanager
def open_training(run: RunConfig, out: Path, options: FitOptions) -> Iterator["Training"]:
    """Prepare a run, lock its folder, and restore its last checkpoint or make a new state."""
    processes.by_first(lambda: check_place(out))
    job = make_job(run, options)
    check_devices(job)
    ready = read_inputs(job, out, options)
    with (
        Progress(run.steps, quiet=options.quiet or not processes.is_first()) as progress,
        _only_writer(ready, out) as lock,
        open_checkpoints(out, job.run, optimizer=options.optimizer) as checkpoints,
        asked_to_stop() as asked,
        sharding.use_mesh(options.mesh),
    ):
        batches = _batches_of(ready, options.start)
        held_out = ready.source.val_batches(job.run.eval_batches)
        if not held_out:  # of a caller's source; the first evaluation would come too late
            raise ValueError("the source holds out no row, so there is nothing to measure on")
        speed = Speed(job.run, _devices_that_add_up(job) if options.report else 0)

        # The state and the position of the data belong together: both of one checkpoint, or new.
        sentences = [lock.sentence, *checkpoints.rewind(options.step)]
        restored = checkpoints.restore(job.mesh)
        if restored is None:
            state, sentence = begin(job, ready.start)
        else:
            state, position = restored
            _set_position(batches, position, int(state.step), checkpoints)
            checkpoint = f"the checkpoint of step {int(state.step)}"
            sentence = f"resumed from {checkpoint} in {checkpoints.folder}"

        # Rows of later steps are dropped: they will be written again.
        step = int(state.step)
        first = processes.is_first()
        metrics = MetricsFile(out, step, read_only=not first)
        loads = JsonLines(out / LOAD_FILE, step, read_only=not first)
        answers = AnswersFile(out, step, job.run, read_only=ready.tasks is None)
        sentences += [metrics.sentence, loads.sentence, answers.sentence, sentence]

        training = Training(
            ready, options, Files(out, lock, checkpoints, metrics, loads, answers), progress, asked,
            state, batches, held_out, speed,
            step=step, resumed_from=None if restored is None else step,
            callbacks=list(options.callbacks) if first else [],
        )  # fmt: skip
        training.say_and_call(sentences)
        yield training


def _batches_of(ready: Prepared, start: Start | None) -> Batches:
    """The batches that the run trains on; of its rows this process reads its own share."""
    if ready.tasks is not None:
        return Answers(ready.job, ready.tasks, ready.start or start)
    mesh = ready.job.mesh
    # None means all
    rows = None if mesh is None else processes.rows_held(mesh, ready.job.run.data.batch_size)
    return ready.source.train_batches(rows)


def _devices_that_add_up(job: Job) -> int:
    """A machine's CPU devices share its cores; others add up."""
    if job.mesh is None or job.its_kernels().target.platform == "cpu":
        return jax.process_count()
    return job.mesh.size


def _set_position(batches: Batches, position: dict, step: int, checkpoints: Checkpoints) -> None:
    if not position:
        place = checkpoints.folder.parent
        raise ValueError(
            f"out={str(place)!r} holds a converted model, which has read no text: "
            "train in another folder, with this one as --start"
        )
    try:
        batches.set_state(position)
    except ValueError as error:
        raise ValueError(f"step={step} in {checkpoints.folder}: {error}") from error


@contextmanager
def _only_writer(ready: Prepared, out: Path) -> Iterator[FolderLock]:
    """Lock and claim the run folder: process 0 has the lock, others one always in order."""
    job = ready.job
    checker = "" if ready.tasks is None else ready.tasks.checker.fingerprint()
    made = made_from(ready.source.fingerprint, ready.tokenizer.fingerprint, checker)
    locks = [FolderLock()]
    mirror = mirror_of(out)

    def lock() -> None:
        out.mkdir(parents=True, exist_ok=True)
        locks.append(stack.enter_context(acquire(out) if mirror is None else mirror.writing()))
        claim(out, job.run, kernels_of(job), made, ready.tokenizer)
        if mirror is not None:
            mirror.put()

    with ExitStack() as stack:
        processes.by_first(lock)
        yield locks[-1]
