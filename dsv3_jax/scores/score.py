"""Score a model on tasks: accuracy against chance, with intervals, as DCLM's CORE.

An option's score is its log-probability a token. Of several options the one with the largest score
is the answer. A single continuation is right if each of its tokens is the likeliest one.

    centred = (accuracy - chance) / (1 - chance)        CORE = the mean of centred over tasks

Source: DCLM, arXiv 2406.11794, and nanochat's CORE, for how prompts are cut into context and
    continuation.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import check_kind
from dsv3_jax.decoding.likelihood import loglikelihood
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.report.progress import transfer
from dsv3_jax.scores.tasks import Task, read_tasks

_AT_ONCE = 128  # rows between two movements of the progress bar
_Z = 1.959964  # of a 95 % interval

Interval = tuple[float, float]


@dataclass(frozen=True)
class Score:
    """A model's score on one task.

    Attributes:
        label, kind, shots, chance: as `Task`.
        rows: number of rows that were scored.
        cut: of these, the rows whose prompt lost its beginning, since it is longer than the model's
            max_positions.
        accuracy, interval: with Wilson's 95 % interval.
        centred, centred_interval: 0 is a blind guess, 1 is perfect.
    """

    label: str
    kind: str
    shots: int
    rows: int
    cut: int
    chance: float
    accuracy: float
    interval: Interval
    centred: float
    centred_interval: Interval


@dataclass(frozen=True)
class Scores:
    """A model's scores on the tasks of a folder, and their mean.

    Attributes: core, core_interval: the mean of centred accuracies, with its 95 % interval for
        independent tasks.
    """

    tasks: tuple[Score, ...]
    core: float
    core_interval: Interval


def score_tasks(
    model: Transformer,
    text: TextSettings,
    folder: str | Path,
    *,
    shots: int | None = None,
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Scores:
    """Score a model on all tasks of a folder.

    All files are read and checked before the first task is scored.

    Args:
        text: how the model reads text, as `ds.load_text` returns it.
        folder: of JSON lines, see `scores.tasks`.
        shots: examples before each prompt. None means as the folder's core.yaml says, else 0.
        limit: rows of each task, at most. None means all.
        say: is given each line of a table as its task is done. None means silence.
    Raises: ValueError as `read_tasks`, for limit < 1, and for a model whose log-probabilities are
        not finite.

    Example:
        >>> import jax, tempfile, dsv3_jax as ds
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> zeros = lambda x: jax.numpy.zeros(x.shape, x.dtype)
        >>> model = jax.tree.map(zeros, abstract(cfg))  # it knows nothing
        >>> row = '{"query": "1+1=", "choices": ["2", "3"], "gold": 1}'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "sums.jsonl").write_text(row)
        ...     scores = ds.score_tasks(model, plain_settings(), folder)
        >>> scores.tasks[0].accuracy, scores.core  # equal options: the first one is the answer
        (0.0, -1.0)
    """
    check_kind("model", model, Transformer)
    check_kind("text", text, TextSettings)
    check_kind("folder", folder, str | Path)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit={limit!r} is not an int of 1 or above")
    say = say or (lambda line: None)
    tasks = read_tasks(folder, shots)

    # A line of the table as soon as its task is done.
    width = max(len(task.label) for task in tasks)
    say(f"{'task':{width}}  shots   rows  accuracy  95 % interval   chance  centred")
    scores = []
    for task in tasks:
        score = _score(model, text, task, limit)
        scores.append(score)
        low, high = score.interval
        line = (
            f"{task.label:{width}}  {task.shots:5d}  {score.rows:5,d}  {score.accuracy:8.3f}  "
            f"{low:.3f} to {high:.3f}  {task.chance:6.3f}  {score.centred:7.3f}"
        )
        if score.cut:
            line += f"  ({score.cut:,} prompts cut to {model.cfg.max_positions:,} tokens)"
        say(line)

    count = len(scores)
    core = sum(score.centred for score in scores) / count
    # Distances from a mean to its parts' intervals' ends add as squares (Zou and Donner, 2008).
    below = math.hypot(*(score.centred - score.centred_interval[0] for score in scores)) / count
    above = math.hypot(*(score.centred_interval[1] - score.centred for score in scores)) / count
    say(
        f"mean of centred accuracies (CORE): {core:.3f}, 95 % interval {core - below:.3f} to "
        f"{core + above:.3f}"
    )
    return Scores(tuple(scores), core, (core - below, core + above))


def _score(model: Transformer, text: TextSettings, task: Task, limit: int | None) -> Score:
    """Score a model on the first rows of a task."""
    rows = len(task.rows[:limit])
    right = 0
    cut = 0
    # Parts of nearly equal size: a small rest would be compiled again.
    at_once = math.ceil(rows / max(rows // _AT_ONCE, 1))
    with transfer(task.label, rows) as advance:
        for first in range(0, rows, at_once):
            # The options of all rows of a part in one call.
            part = range(first, min(first + at_once, rows))
            found = [pairs_of(task, i, text, model.cfg.max_positions) for i in part]
            results = iter(loglikelihood(model, [pair for pairs, _ in found for pair in pairs]))

            # Each row takes as many results as it has options.
            for i, (pairs, shortened) in zip(part, found, strict=True):
                of_row = list(itertools.islice(results, len(pairs)))
                right += _is_right(task, i, pairs, of_row)
                cut += shortened
            advance(len(part))

    accuracy = right / rows
    low, high = wilson(right, rows)
    return Score(
        task.label,
        task.kind,
        task.shots,
        rows,
        cut,
        task.chance,
        accuracy,
        interval=(low, high),
        centred=_centred(accuracy, task.chance),
        centred_interval=(_centred(low, task.chance), _centred(high, task.chance)),
    )


def _is_right(
    task: Task,
    i: int,
    pairs: list[tuple[list[int], list[int]]],
    results: list[tuple[float, bool]],
) -> bool:
    """Say whether the answer to a row is right, by (nats, is greedy) of each option."""
    means = [nats / len(more) for (_, more), (nats, _) in zip(pairs, results, strict=True)]
    if not np.isfinite(means).all():
        raise ValueError(f"task {task.label!r}: the model's log-probabilities are not finite")
    if task.kind == "language_modeling":
        return results[0][1]
    return means.index(max(means)) == task.rows[i].gold


def _centred(share: float, chance: float) -> float:
    return (share - chance) / (1 - chance)


def pairs_of(
    task: Task, i: int, text: TextSettings, longest: int
) -> tuple[list[tuple[list[int], list[int]]], bool]:
    """Encode a row's options as (context, continuation); say if any was cut to `longest`.

    Context and continuation are encoded together, because a token may be in both. The continuation
    begins where the options' tokens begin to differ. In a schema it is their common end. For a
    single continuation it begins where the tokens differ from the context's.

    Example:
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> from dsv3_jax.scores.tasks import Question
        >>> row = Question((("a", "bc"), ("a", "bd")), 0)
        >>> pairs_of(Task("t", "multiple_choice", (row,), 0, " ", 0.5), 0, plain_settings(), 4)
        ([([97, 32, 98], [99]), ([97, 32, 98], [100])], False)
    """
    prompts = task.prompts(i)
    options = [text.encode(prompt) for prompt in prompts]

    # Find the token at which each continuation begins.
    if task.kind == "schema":
        shared = _common([tokens[::-1] for tokens in options])
        starts = [len(tokens) - shared for tokens in options]
    elif task.kind == "language_modeling":
        context = prompts[0].removesuffix(task.rows[i].options[0][1])
        starts = [_common([*options, text.encode(context.rstrip() if task.delimiter else context)])]
    else:
        starts = [_common(options)] * len(options)

    # A prompt that is too long loses its beginning; one token of context and one after it remain.
    pairs = []
    cut = False
    for tokens, start in zip(options, starts, strict=True):
        start = min(start, len(tokens) - 1)  # one option may begin with another one
        if start == 0:  # the end of the document before is the context
            tokens = [text.tokenizer.eos_id, *tokens]
            start = 1
        excess = max(len(tokens) - longest, 0)
        start = max(start, excess + 1)
        cut = cut or excess > 0
        pairs.append((tokens[excess:start], tokens[start:]))
    return pairs, cut


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all sequences begin with."""
    columns = list(zip(*sequences, strict=False))
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), len(columns))


def wilson(right: int, rows: int) -> Interval:
    """Return Wilson's 95 % interval of a share.

    Example:
        >>> [round(end, 3) for end in wilson(8, 10)]
        [0.49, 0.943]
    """
    share = right / rows
    square = _Z**2 / rows
    middle = share + square / 2
    half = _Z * math.sqrt(share * (1 - share) / rows + square / rows / 4)
    return max((middle - half) / (1 + square), 0.0), min((middle + half) / (1 + square), 1.0)
