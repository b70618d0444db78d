"""Training as users call it: a run may begin with a released model, and be fine-tuned on chats."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dsv3_jax.chat.examples import load_examples
from dsv3_jax.chat.text_settings import TEMPLATE_FILE, TextSettings, copy_to_run, with_template
from dsv3_jax.cluster import processes
from dsv3_jax.config import ConfigError, RunConfig, check_kind, replace, to_dict
from dsv3_jax.data.batches import Source
from dsv3_jax.grpo import with_answers
from dsv3_jax.hf import reading
from dsv3_jax.hf.conversion import keep_origin
from dsv3_jax.hf.open_model import find_released, load_text, released_run
from dsv3_jax.hf.places import find
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.schedules import learning_rate
from dsv3_jax.training import loop, warm_start
from dsv3_jax.training.loop import FitResult, NonFiniteLoss
from dsv3_jax.training.prepare import Callback
from dsv3_jax.training.run_folder import RUN_FILE, read_run
from dsv3_jax.training.step import Job

__all__ = ["Callback", "FitResult", "NonFiniteLoss", "fit", "for_epochs", "open_start"]

EPOCHS = 2.0  # passes over chat examples. Source: DeepSeek-V3 report, section 5.1
# sum of learning rates below which training on chats warns: 20 steps at 5e-6; weights are near 1e-2
TEACHES = 1e-4


def fit(run: RunConfig, out: str | Path, **options: Any) -> FitResult:
    """Train a run in folder `out`; the same call again resumes it.

    Args:
        run: what to train. Its execution may change from call to call.
        out: the run's folder, made if absent.
        mesh: devices to shard the run over, from `sharding.make_mesh`. None means a single device.
            The same run may resume on another mesh. If it has several processes, all make this
            call, with one shared `out`.
        step: resume from the checkpoint of this step, and rename later ones. None means the newest
            that is whole.
        stop_after: save and return once this step is reached, as after SIGTERM.
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
    if run.data.format == "chat" and options.get("source") is None:
        chats = chats_of(run, out)
        options |= chats | {"callbacks": [*chats["callbacks"], *options.get("callbacks", ())]}
    options["callbacks"] = [KeepOrigin(), *options.get("callbacks", ())]
    return loop.fit(run, out, **{"open_start": open_start} | options)


def chats_of(
    run: RunConfig, out: str | Path, read: tuple[TextSettings, Source] | None = None
) -> dict[str, Any]:
    """Read a run's chats. Returns: options of `fit`.

    Call it before `keep_memory`, which hides what a template takes.

    Args: read: what `for_epochs` has read of them. None means that they are read now.
    Raises: ValueError as `open_chats`.
    """
    processes.agree({"run": to_dict(run)})
    text, examples = processes.by_each(lambda: read or open_chats(run, out))
    if run.grpo.group:
        examples = with_answers(run, text, examples, open_start)
    examples = replace(examples, summary=f"{examples.summary}\n{_outlook(run)}")
    return {"source": examples, "callbacks": [KeepText(text)]}


def open_start(place: str, out: str | Path | None = None) -> warm_start.Start:
    """Open a run or a released model to begin with.

    Args: out: a folder to train in. If the other is gone but training in `out` has begun, the
        settings are its own.
    Raises: ValueError when there is neither, or no checkpoint yet.
    """
    try:
        if (Path(place) / RUN_FILE).is_file():
            return warm_start.open_run(place)
        folder = reading.ReleasedFolder(find_released(place))
        run = released_run(folder.path, folder.cfg)
    except ValueError:
        if out is None or not (Path(out) / RUN_FILE).is_file():
            raise
        return warm_start.Start(
            str(place), read_run(out), False, lambda job: open_start(place).load(job)
        )

    def load(job: Job) -> tuple[Transformer, str]:
        keep = job.run.freezes
        return reading.load(folder.path, None if keep else jnp.float32, job.mesh, packed=keep), ""

    return warm_start.Start(str(folder.path), run, True, load, four_bits=folder.four_bits)


def open_chats(
    run: RunConfig, out: str | Path, *, fit_rows: bool = False
) -> tuple[TextSettings, Source]:
    """Read how a run reads chats, and its examples: by its own files once begun, else its start's.

    Args: fit_rows: choose the length of the rows by the examples, at most the model's context.
    Raises: ConfigError without a start; ValueError when there is no template, or a file cannot be
        read.
    """
    if (Path(out) / RUN_FILE).exists() and (Path(out) / TEMPLATE_FILE).exists():
        text = with_template(load_text(out), None, run.data.template)
    elif run.start is None:
        raise ConfigError(
            "data.format='chat' fine-tunes a model: name it with start, as in --start MODEL"
        )
    else:
        text = with_template(load_text(run.start), run.data.chat_template, run.data.template)
    longest = run.model.max_positions if fit_rows else None
    return text, load_examples(run.data, text, longest, keep=run.grpo.group > 0)


def _outlook(run: RunConfig) -> str:
    """Say how far the run's steps can move a weight: about the learning rate each."""
    moved = float(learning_rate(run.optim, run.steps, jnp.arange(run.steps)).sum())
    steps = f"{run.steps:,} steps of {run.data.batch_size} rows"
    line = f"{steps} move a weight by at most about {moved:.0e}"
    if moved >= TEACHES:
        return line
    return (
        f"{line}, which hardly teaches anything: "
        f"raise --optim.learning-rate={run.optim.learning_rate:g} or --epochs, "
        f"or lower --data.batch-size={run.data.batch_size} "
        f"or --optim.warmup-steps={run.optim.warmup_steps}"
    )


class KeepText(Callback):
    """Writes the files by which `dsv3 chat` and `dsv3 convert` read text, if they are not there."""

    def __init__(self, text: TextSettings):
        self._text = text

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        if not (out / TEMPLATE_FILE).exists():
            assert run.start is not None
            copy_to_run(find(run.start), out, self._text)


class KeepOrigin(Callback):
    """Keeps what `dsv3 convert` needs of the released folder that a run's start or trunk is of."""

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        place = run.start or run.trunk
        if place is not None and step == 0:  # later the other run may be gone
            keep_origin(find(place), out)


def for_epochs(
    run: RunConfig, out: str | Path, epochs: float = EPOCHS, *, fit_rows: bool = False
) -> tuple[RunConfig, tuple[TextSettings, Source]]:
    """Set the steps of a run on chats to `epochs` passes over its examples.

    Args: fit_rows: choose the length of the rows, too, as `open_chats`.
    Returns: the run, and what `open_chats` has read.
    Raises: ValueError as `open_chats`; ConfigError for epochs that are not positive.
    """
    if not (math.isfinite(epochs) and epochs > 0):
        raise ConfigError(f"epochs={epochs} is not positive")
    read = open_chats(run, out, fit_rows=fit_rows)
    steps = max(1, math.ceil(epochs * read[1].rows_per_epoch() / run.data.batch_size))
    return replace(run, data=read[1].cfg, steps=steps), read
