"""Tasks in JSON lines, in the form of DCLM's CORE: a folder of files to rows, and rows to prompts.

Each line of a file is a row, and its keys say of which kind the task is:

    multiple_choice     {"query": "2+2 =", "choices": ["4", "5"], "gold": 0}
    schema              {"context_options": ["A saw B;", "B saw A;"], "continuation": "A was seen",
                         "gold": 1}
    language_modeling   {"context": "one two", "continuation": "three"}

A folder may have a `core.yaml`, as DCLM's bundle. It then says which files are tasks, how many
examples a prompt begins with, and what separates a context from its continuation. Chance levels are
read from `eval_meta_data.csv`.
"""

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.data.text_files import json_lines
from dsv3_jax.host.files import read_text

TASK_KINDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("continuation", "context_options", "gold"),
    "language_modeling": ("context", "continuation"),
}
CORE_FILE, CHANCE_FILE, DATA_FOLDER = "core.yaml", "eval_meta_data.csv", "eval_data"
_MAX_LINE = 2**23  # bytes
_MAX_LABEL = 100  # letters


class Question(NamedTuple):
    """A question: texts of which one is right.

    Attributes: options: pairs (context, continuation); gold: index of the right one.
    """

    options: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """Rows of one kind, and how prompts are made of them.

    Attributes:
        label: its name.
        kind: a key of `TASK_KINDS`.
        rows: in an order that a fixed seed draws, so that the first N are a fair part.
        shots: answered rows before each prompt.
        delimiter: between context and continuation.
        chance: accuracy of a blind guess.

    Example:
        >>> two = Question((("1+1", "2"), ("1+1", "3")), gold=0)
        >>> three = Question((("1+2", "2"), ("1+2", "3")), gold=1)
        >>> task = Task("sums", "multiple_choice", (two, three), 1, delimiter="=", chance=0.5)
        >>> task.prompts(0)
        ['1+2=3\\n\\n1+1=2', '1+2=3\\n\\n1+1=3']
    """

    label: str
    kind: str
    rows: tuple[Question, ...]
    shots: int
    delimiter: str
    chance: float

    def prompts(self, i: int) -> list[str]:
        """Return the texts of a row's options.

        The row number draws the examples, and never the row itself.

        Source: nanochat's CORE, whose seeds and separators these are.
        """
        drawn = random.Random(1234 + i).sample(range(len(self.rows) - 1), self.shots)
        shots = [self.rows[j + (j >= i)] for j in drawn]
        before = "".join(f"{self._text(row.options[row.gold])}\n\n" for row in shots)
        return [before + self._text(option) for option in self.rows[i].options]

    def _text(self, option: tuple[str, str]) -> str:
        context, continuation = option
        if self.kind == "language_modeling" and self.delimiter:
            context = context.strip()  # some of DCLM's contexts end with a space
        return context + self.delimiter + continuation


def read_tasks(folder: str | Path, shots: int | None = None) -> list[Task]:
    """Read the tasks of a folder: those of its core.yaml, else its files *.jsonl.

    Args: shots: examples before each prompt. None means as core.yaml says, else 0.
    Raises: ValueError that names the file and line of a row that is of no kind, of another kind
        than the first, or without a right answer; or for a folder without tasks, a task with too
        few rows for its examples, and one whose rows leave nothing to choose.

    Example:
        >>> import tempfile
        >>> row = '{"context": "one two", "continuation": "three"}'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "count.jsonl").write_text(row)
        ...     [task] = read_tasks(folder)
        >>> task.label, task.kind, task.prompts(0)
        ('count', 'language_modeling', ['one two three'])
    """
    root = Path(folder)
    if (root / CORE_FILE).exists():
        entries = _entries(root / CORE_FILE)
    else:
        entries = [
            {"label": file.stem, "dataset_uri": file.name} for file in sorted(root.glob("*.jsonl"))
        ]
    if not entries:
        raise ValueError(f"tasks={str(folder)!r} has neither a {CORE_FILE} nor a file *.jsonl")

    # A task with several numbers of examples is as many tasks.
    chances = _chances(root / CHANCE_FILE)
    tasks: list[Task] = []
    for entry in entries:
        for task in _tasks_of(root, entry, chances, shots):
            if any((one.label, one.shots) == (task.label, task.shots) for one in tasks):
                raise ValueError(
                    f"{root / CORE_FILE} has task {task.label!r} with shots={task.shots} twice"
                )
            tasks.append(task)
    return tasks


def _tasks_of(
    root: Path, entry: dict[str, Any], chances: dict[str, float], shots: int | None
) -> Iterator[Task]:
    """Yield the tasks of an entry of core.yaml, one for each number of examples."""
    label = entry["label"]
    file = root / entry["dataset_uri"]
    if not (label + entry["dataset_uri"]).isprintable() or len(label) > _MAX_LABEL:
        raise ValueError(
            f"{root} has a task {label!r:.80}: a name has one line, and up to {_MAX_LABEL} letters"
        )
    # DCLM's bundle has its files in a folder.
    kind, rows = _read(file if file.exists() else root / DATA_FOLDER / entry["dataset_uri"])
    delimiter = entry.get("continuation_delimiter")
    if delimiter is None:
        delimiter = "" if _has_space(rows) else " "

    # A blind guess hits one of the options, and never a whole continuation.
    blind = 0.0
    if kind != "language_modeling":
        blind = sum(1 / len(row.options) for row in rows) / len(rows)
    chance = chances.get(label, blind)
    if chance == 1:
        raise ValueError(
            f"{file} has one text in the {TASK_KINDS[kind][1]} of each row: a blind guess is "
            "always right"
        )

    counts = entry.get("num_fewshot", 0) if shots is None else shots
    for count in counts if counts and isinstance(counts, list) else [counts]:
        if type(count) is not int or not 0 <= count < len(rows):
            raise ValueError(
                f"shots={count!r} is no number of examples for {file}, which has {len(rows)} rows"
            )
        yield Task(label, kind, rows, count, delimiter, chance)


def _has_space(rows: Sequence[Question]) -> bool:
    """Whether the rows bring the white space between context and continuation."""
    pairs = [pair for row in rows for pair in row.options]
    return all(a[-1:].isspace() for a, _ in pairs) or all(b[:1].isspace() for _, b in pairs)


def _entries(core: Path) -> list[dict[str, Any]]:
    import yaml

    try:
        entries = [
            {"continuation_delimiter": " "} | entry
            for entry in yaml.safe_load(read_text(core))["icl_tasks"]
        ]
        texts = ("label", "dataset_uri", "continuation_delimiter")
        if not all(isinstance(entry[key], str) for entry in entries for key in texts):
            raise ValueError(f"one of {', '.join(texts)} is not a text")
    except Exception as error:  # the readers of YAML's tags raise many kinds
        raise ValueError(
            f"{core} has no list icl_tasks with a label and a dataset_uri for each: {error}"
        ) from error
    return entries


def _chances(file: Path) -> dict[str, float]:
    """Chance levels by label, of a table whose numbers are percent."""
    if not file.exists():
        return {}
    try:
        table = list(csv.DictReader(read_text(file).splitlines()))
        chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in table}
        if not all(0 <= chance < 1 for chance in chances.values()) or len(chances) < len(table):
            raise ValueError(
                "a random baseline is below 0 or not below 100 percent, or a task has two"
            )
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f'{file} is no table with "Eval Task" and "Random baseline" in percent: {error}'
        ) from error
    return chances


def _read(file: Path) -> tuple[str, tuple[Question, ...]]:
    """The kind, which the first row has, and the rows of a file."""
    kind = ""
    rows = []
    try:
        # The first row says the kind; later rows must have its keys, too.
        for where, record in json_lines(file, _MAX_LINE):
            keys = record.keys() if isinstance(record, dict) else set()
            kind = kind or next((name for name in TASK_KINDS if keys >= set(TASK_KINDS[name])), "")
            if not kind or not keys >= set(TASK_KINDS[kind]):
                forms = "; or ".join(
                    ", ".join(TASK_KINDS[name]) for name in ([kind] if kind else TASK_KINDS)
                )
                raise ValueError(f"{where}, is no object with the keys {forms}")
            rows.append(_row(record, kind, where))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    if not rows:
        raise ValueError(f"{file} holds no row")

    # The same order for everybody, so that the first N rows are the same ones.
    random.Random(1337).shuffle(rows)
    return kind, tuple(rows)


def _row(record: dict[str, Any], kind: str, where: str) -> Question:
    # A key with one text, and a key with several; a continuation is the only one of its kind.
    one, several, *_ = TASK_KINDS[kind]
    if kind == "language_modeling":
        texts, gold = [record[several]], 0
    else:
        texts, gold = record[several], record["gold"]
    if not isinstance(texts, list) or type(gold) is not int or not 0 <= gold < len(texts):
        raise ValueError(
            f"{where}: gold={gold!r:.80} is not the index of one of {several}={texts!r:.80}"
        )

    # In a schema the contexts differ, else the continuations.
    options = [(text, record[one]) if kind == "schema" else (record[one], text) for text in texts]
    for context, continuation in options:
        if not isinstance(context, str) or not isinstance(continuation, str) or not continuation:
            raise ValueError(
                f"{where}: {context!r:.80} and {continuation!r:.80} are not a text and one to "
                "follow it"
            )
    return Question(tuple(options), gold)
