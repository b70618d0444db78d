"""Three small tasks made from program text: close a bracket, recall a name, choose a keyword.

They are made from a run's own held-out documents, so nothing is downloaded and the model has not
seen the text. The right choice is always the text's own.
"""

import json
import keyword
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

from dsv3_jax.host.files import atomic_folder
from dsv3_jax.scores.tasks import CORE_FILE

_WINDOW = 240  # characters of a query, at most: about 100 tokens of the demo's vocabulary
_WORDS = 30  # that a query of names is looked for in
_CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
_KEYWORDS = ("class", "def", "else", "for", "from", "if", "import", "raise", "return", "with")
_PAIR = re.compile(r"[(\[{<]([^()\[\]{}<>]{4,80})[)\]}>]")
# a word, and a name after it
_FOLLOWED = re.compile(r"\b([A-Za-z_]\w*)(?=(\W{1,3})([A-Za-z_]\w{3,}))")
_LINE = re.compile(rf"^ +({'|'.join(_KEYWORDS)})\b", re.MULTILINE)


def write_tasks(
    folder: str | Path, documents: Sequence[str], *, rows: int = 200, seed: int = 0
) -> None:
    """Write a folder of tasks made from documents: brackets, names, keywords; at most `rows` each.

    Raises: ValueError when no document has the text of any task; OSError when the folder exists,
        unless it is empty.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.scores.tasks import read_tasks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tasks(folder, ["x = call(some, arguments)"])
        ...     [task] = read_tasks(folder)
        >>> task.label, task.rows[0].options[task.rows[0].gold]
        ('brackets', ('x = call(some, arguments', ')'))
    """
    rng = random.Random(seed)
    entries = []
    with atomic_folder(folder) as part:
        for label, find in (("brackets", _brackets), ("names", _names), ("keywords", _keywords)):
            by_answer = defaultdict(list)
            for text in documents:
                for end, answer, others in find(text):
                    query = text[max(end - _WINDOW, 0) : end]
                    by_answer[answer].append((query, answer, sorted(others)))

            # In turns from all answers, so that none is right much more often than others.
            turns = zip_longest(*(rng.sample(pile, len(pile)) for pile in by_answer.values()))
            drawn = [row for row in chain.from_iterable(turns) if row][:rows]

            # The answer among three wrong choices, in a random order.
            lines = []
            for query, answer, others in drawn:
                choices = rng.sample([answer, *rng.sample(others, 3)], 4)
                row = {"query": query, "choices": choices, "gold": choices.index(answer)}
                lines.append(json.dumps(row) + "\n")
            if lines:
                file = f"{label}.jsonl"
                (part / file).write_text("".join(lines))
                entries.append({"label": label, "dataset_uri": file, "continuation_delimiter": ""})
        if not entries:
            raise ValueError(
                f"the {len(documents)} documents have no bracket, name or keyword to ask for"
            )
        (part / CORE_FILE).write_text(json.dumps({"icl_tasks": entries}, indent=1))  # JSON is YAML


_Found = Iterator[tuple[int, str, set[str]]]  # where a query ends, its answer, and wrong choices


def _brackets(text: str) -> _Found:
    for match in _PAIR.finditer(text):
        if (closing := match[0][-1]) == _CLOSING[match[0][0]]:
            yield match.end(1), closing, set(_CLOSING.values()) - {closing}


def _names(text: str) -> _Found:
    """A name that followed the same word and signs before, against names that never follow them."""
    found = list(_FOLLOWED.finditer(text))
    keys = [match.groups() for match in found]

    # All names that follow a word and signs, anywhere in the text: none of them is a wrong choice.
    followers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for word, signs, name in keys:
        followers[word, signs].add(name)

    for i, (word, signs, name) in enumerate(keys):
        end = found[i].start(3)
        first = max(i - _WORDS, 0)
        if keys[i] not in keys[first:i] or keyword.iskeyword(name):
            continue
        # The same three must be in what the model sees, and three other names to choose from.
        near = [match.groups() for match in found[first:i] if match.start() >= end - _WINDOW]
        others = {other for *_, other in near if not keyword.iskeyword(other)}
        others -= followers[word, signs]
        if keys[i] in near and len(others) >= 3:
            yield end, name, others


def _keywords(text: str) -> _Found:
    if "\ndef " in text or "\nimport " in text:  # Python
        for match in _LINE.finditer(text):
            yield match.start(1), match[1], set(_KEYWORDS) - {match[1]}
