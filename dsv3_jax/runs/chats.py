"""A run on chats: its examples by a model's template, and what it keeps to be chatted with."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dsv3_jax.chat.examples import load_examples
from dsv3_jax.chat.text_settings import TEMPLATE_FILE, TextSettings, copy_to_run, with_template
from dsv3_jax.config import ConfigError, RunConfig, replace, to_dict
from dsv3_jax.data.batches import Source
from dsv3_jax.hf.places import find
from dsv3_jax.mesh import processes
from dsv3_jax.runs.answers import with_answers
from dsv3_jax.runs.folder import RUN_FILE
from dsv3_jax.runs.open_model import load_text
from dsv3_jax.runs.prepare import Callback
from dsv3_jax.runs.start import open_start
from dsv3_jax.training.schedules import learning_rate

EPOCHS = 2.0  # passes over chat examples. Source: DeepSeek-V3 report, section 5.1
# sum of learning rates below which training on chats warns: 20 steps at 5e-6; weights are near 1e-2
TEACHES = 1e-4


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
