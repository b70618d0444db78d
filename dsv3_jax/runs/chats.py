"""A run on chats: its examples by its model's template, and with GRPO what the model is asked."""

import math
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.chat.checkers import Checker
from dsv3_jax.chat.examples import load_examples, load_tasks
from dsv3_jax.chat.text_settings import TEMPLATE_FILE, TextSettings, with_template
from dsv3_jax.config import ConfigError, RunConfig, replace
from dsv3_jax.data.batches import Source
from dsv3_jax.host.mirror import fetched
from dsv3_jax.presets import sft_sized
from dsv3_jax.report.unread_keys import unread_line
from dsv3_jax.runs.answers import Tasks, tasks_of
from dsv3_jax.runs.folder import RUN_FILE
from dsv3_jax.runs.open_model import load_text
from dsv3_jax.runs.start import Start, open_start


class Chats(NamedTuple):
    """The chats of a run, read."""

    text: TextSettings  # how the run's model reads and ends text
    source: Source  # rows of the examples
    tasks: Tasks | None  # with GRPO: what the model answers
    start: Start | None  # whose template encodes them. None means that the run's own files do


def read_chats(
    run: RunConfig, out: str | Path, start: Start | None = None, *, fit_rows: bool = False
) -> Chats:
    """Read a run's chats by its own files once it has begun, else by its start's.

    Args:
        start: the run's start or trunk, opened. None means that it is opened if it is needed.
        fit_rows: choose the length of the rows by the examples, at most the model's context.
    Raises: ConfigError without a start or trunk; ValueError when there is no template, or a file
        cannot be read. With GRPO, as `tasks_of`.
    """
    # A run that has begun reads its own copies: its start may be gone.
    out = fetched(out)
    if (out / RUN_FILE).exists() and (out / TEMPLATE_FILE).exists():
        start = None
        text = with_template(load_text(out), None, run.data.template)
    elif (place := run.start or run.trunk) is None:
        raise ConfigError(
            "data.format='chat' fine-tunes a model: name it with start, as in --start MODEL"
        )
    else:
        start = start or open_start(place)
        text = with_template(start.text, run.data.chat_template, run.data.template)

    # With GRPO the model writes the answers: an example is a prompt, with a record to check by.
    unread = unread_line(run.data, text)
    if run.grpo.group:
        checker = Checker(run.grpo.checker)
        found = load_tasks(run.data, text, checker.look_at, whole=checker.is_own)
        source, asked, held_out = found
        tasks = tasks_of(run, text, asked, held_out, source.fingerprint)
        source = _saying(source, unread, tasks.summary)
        return Chats(text, source, tasks, start)

    source = load_examples(run.data, text, run.model.max_positions if fit_rows else None)
    return Chats(text, _saying(source, unread), None, start)


def _saying(source: Source, *lines: str) -> Source:
    """The source with more lines in its summary; empty ones are left out."""
    return replace(source, summary="\n".join(filter(None, [source.summary, *lines])))


def for_epochs(
    run: RunConfig,
    out: str | Path,
    epochs: float | None = None,
    start: Start | None = None,
    *,
    fit_rows: bool = False,
    given: Container[str] = (),
) -> tuple[RunConfig, Chats]:
    """Set the steps of a run on chats to passes over its examples.

    Args:
        epochs: number of passes. None means by the number of examples, see `presets.sft_sized`.
        start, fit_rows: as `read_chats`.
        given: settings that `sft_sized` leaves as they are.
    Returns: the run, and its chats, which `fit` takes.
    Raises: ValueError as `read_chats`; ConfigError for epochs that are not positive.
    """
    if epochs is not None and not (math.isfinite(epochs) and epochs > 0):
        raise ConfigError(f"epochs={epochs} is not positive")
    chats = read_chats(run, out, start, fit_rows=fit_rows)
    source = chats.source
    rows = source.rows_per_epoch()
    run, passes, sentence = sft_sized(
        replace(run, data=source.cfg), source.examples, rows, given, epochs
    )

    # An epoch is as many rows as the examples fill, and a step takes B of them.
    steps = max(1, math.ceil(passes * rows / run.data.batch_size))
    source = _saying(replace(source, cfg=run.data), sentence)
    return replace(run, steps=steps), chats._replace(source=source)
