"""Chat examples for fine-tuning: token ids, and which of them are targets of the losses.

The first of these that a record has says what its targets are. It may have further keys:

    messages, or ShareGPT's conversations   the assistant's tokens, by the chat template
    prompt, completion     two lists of messages: the assistant's tokens of the completion; or two
                           strings, without the template: the completion and a document's end
    prompt, answer         a task: messages, or a text, which is a user's turn, or by
                           `DataConfig.prompts` a text that the answer continues. The prompt may
                           also be named "question" (GSM8K) or "messages"
    instruction, output    Alpaca's, with or without an input: a turn of the user, and the
                           assistant's tokens
    text                   a document: all of its tokens, and its end

A record with messages may also have `tools`, JSON schemas of functions, or their JSON as a text.
Any record may have a `domain`.
"""

import contextlib
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.chat.forms import as_task, is_answer, turns_of, usual, with_system
from dsv3_jax.chat.messages import read_tools
from dsv3_jax.chat.sandbox import UnsafeTemplate
from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import DataConfig, replace
from dsv3_jax.data.batches import Source
from dsv3_jax.data.corpus import fingerprint_of, split
from dsv3_jax.data.packing import PackedRows, Piece
from dsv3_jax.data.text_files import rows_of_path, visible

KEYS = (
    "messages", "conversations", "system", "prompt", "question", "completion", "answer",
    "instruction", "input", "output", "text",
)  # fmt: skip
_STEP = 64  # of the lengths of rows
Check = Callable[[dict[str, Any], str], None]  # (record, location); raises for a task of no use


class Example(NamedTuple):
    """An example as a model learns it."""

    ids: Int32[np.ndarray, " n"]
    targets: Bool[np.ndarray, " n"]
    # of a record with an answer: what a model is asked. None: it asks nothing
    prompt: Int32[np.ndarray, " m"] | None

    @property
    def digest(self) -> bytes:
        """A hash of what is learnt: other keys of the record, such as an id, do not count."""
        return _hash(self.ids.tobytes() + self.targets.tobytes())

    @property
    def side(self) -> bytes:
        """The hash that decides the side of the split.

        Tasks that differ in the answer alone are on one side.
        """
        return self.digest if self.prompt is None else _hash(self.prompt.tobytes())

    def first(self, size: int) -> "Example":
        """The example with its first `size` tokens alone."""
        return self._replace(ids=self.ids[:size], targets=self.targets[:size])


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


class Task(NamedTuple):
    """A record with an answer, as a model is asked it."""

    prompt: Int32[np.ndarray, " m"]
    record: dict[str, Any]
    location: str  # for errors


Loaded = tuple[Source, list[Task], list[Task]]  # tasks to train on; held-out ones


def load_examples(cfg: DataConfig, text: TextSettings, longest: int | None = None) -> Source:
    """Read and encode the examples of `cfg.paths`, and split them by a hash of each.

    Equal examples are on the same side, and so are tasks with equal prompts. An example's domain is
    the one it states, else the name of its file. Rows hold whole examples. Those with more than T
    tokens, or without a target, are left out, and so are bad records: those that are none of the
    forms above, or whose messages the chat template refuses. The summary counts and names them.

    Args:
        text: of the model that is fine-tuned: tokenizer, special tokens, chat template.
        longest: choose T up to this: the smallest multiple of 64 that holds 99 % of the examples.
            None means `cfg.seq_len`.
    Raises: ValueError with the file and line of what is not JSON, or of a bad record with
        `bad_records="refuse"`. Also if there is no example, or too few for two sides.
        UnsafeTemplate for a template that exceeds its limits.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> records = [{"prompt": "1+1=", "completion": c} for c in "23"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "sums.jsonl")
        ...     _ = file.write_text("\\n".join(map(json.dumps, records)))
        ...     cfg = DataConfig(paths=(str(file),), format="chat", seq_len=8, batch_size=1)
        ...     source = load_examples(cfg, plain_settings())
        >>> next(source.train_batches())["loss_mask"].astype(int).tolist()
        [[0, 0, 0, 0, 1, 1, 0, 0]]
        >>> print(source.summary.replace("; ", ";\\n"))
        examples: 1 to train on, 1 held out;
        6 tokens, 2 of them targets;
        1 rows of 8
    """
    return _loaded(cfg, text, longest)[0]


def load_tasks(cfg: DataConfig, text: TextSettings, check: Check, *, whole: bool = False) -> Loaded:
    """As `load_examples`, for a model that writes answers itself.

    A given answer is not learnt, so it may be empty, and of a long one the held-out rows measure
    the beginning.

    Args:
        check: raises ValueError for a record that cannot be a task, which makes it a bad one.
        whole: keep all keys of a record, also of Parquet and datasets.
    Returns: the source, whose held-out rows measure the model; the tasks to train on; the held-out
        ones, in an order by their content.
    """
    return _loaded(cfg, text, None, check, whole)


def _loaded(
    cfg: DataConfig,
    text: TextSettings,
    longest: int | None,
    check: Check | None = None,
    whole: bool = False,
) -> Loaded:
    """Read the examples. Args: check, whole: as `load_tasks`, for the tasks, too."""
    examples = []
    bad: list[str] = []  # why records cannot be learnt from
    found = contents(cfg.paths, cfg.text_column, whole)
    for record, domain, location in itertools.islice(found, cfg.max_documents):
        try:
            example = read_example(record, text, location, cfg.prompts)
            task = _task_of(example, record, location, check) if check else None
            examples.append((example, domain, task))
        except ValueError as error:
            if cfg.bad_records == "refuse" or isinstance(error.__cause__, UnsafeTemplate):
                raise
            bad.append(str(error))
    if longest is not None and examples:
        cfg = replace(cfg, seq_len=_row_length([example for example, *_ in examples], longest))

    # Keep those that can be trained on; count the others by their reason.
    kept: list[Example] = []
    domains: list[str] = []
    tasks: list[Task | None] = []
    counts = Counter({"that cannot be learnt from": len(bad)} if bad else {})
    for example, domain, task in examples:
        if check is not None:
            # No answer that is given is learnt: it may be long, or nothing.
            example = example.first(cfg.seq_len)
        elif len(example.ids) > cfg.seq_len:
            counts[f"longer than seq_len={cfg.seq_len}"] += 1
            continue
        elif not example.targets[1:].any():  # no token predicts the first one
            counts["without an assistant's turn"] += 1
            continue
        kept.append(example)
        domains.append(domain)
        tasks.append(task)

    left_out = "; left out: " + (", ".join(f"{n:,} {what}" for what, n in counts.items()) or "none")
    if not kept:
        left_out += f", the first: {bad[0]}" if bad else ""
        if not counts:
            left_out = ": there is no record of JSON, JSONL or Parquet in them"
        raise ValueError(f"data.paths={list(cfg.paths)} give no example to train on{left_out}")

    # Tasks with one prompt share a side; their digests differ.
    numbers = {domain: i for i, domain in enumerate(dict.fromkeys(domains))}
    pieces = [
        Piece(example.ids, numbers[domain], i, example.targets)
        for i, (example, domain) in enumerate(zip(kept, domains, strict=True))
    ]
    train, val, _ = split(pieces, [example.side for example in kept], cfg.val_fraction)

    # Whole examples are packed in a random order that the seed decides.
    order = np.random.default_rng(cfg.seed).permutation(len(train)).tolist()
    rows = PackedRows((train[i] for i in order), cfg.seq_len, whole=True)
    of_domain = [[p for p in val if p.domain == i] for i in numbers.values()]

    summary = f"examples: {len(train):,} to train on, {len(val):,} held out"
    if check is None:  # else prompts are drawn one by one, and no row is read
        num_tokens = sum(len(piece.tokens) for piece in train)
        num_targets = sum(int(p.loss_mask.sum()) for p in train if p.loss_mask is not None)
        summary += (
            f"; {num_tokens:,} tokens, {num_targets:,} of them targets; "
            f"{len(rows):,} rows of {cfg.seq_len:,}"
        )

    named = [f"left out: {visible(reason, 300)}" for reason in bad[:3]]
    source = Source(
        cfg,
        tuple(numbers),
        fingerprint_of(kept[piece.document].digest for piece in train),
        "\n".join([summary + (left_out if counts else ""), *named]),
        train=lambda: [rows],
        held_out=lambda: [
            PackedRows(pieces, cfg.seq_len, whole=True) for pieces in of_domain if pieces
        ],
        examples=len(train),
    )

    # Held-out tasks are not in the file's order: the first of them are a fair part.
    both = train, sorted(val, key=lambda piece: kept[piece.document].digest)
    asked, held_out = ([task for p in side if (task := tasks[p.document])] for side in both)
    return source, asked, held_out


def _task_of(example: Example, record: dict[str, Any], location: str, check: Check) -> Task:
    """The task of a record. Raises: ValueError for one without a prompt, or that fails `check`."""
    check(record, location)
    if example.prompt is None or not len(example.prompt):
        raise ValueError(f"{location} has an empty prompt")
    return Task(example.prompt, record, location)


def _row_length(examples: list[Example], longest: int) -> int:
    """Return a multiple of `_STEP` that holds 99 % of the examples, and is at most `longest`."""
    lengths = sorted(len(example.ids) for example in examples)
    nearly_all = lengths[math.ceil(0.99 * len(examples)) - 1]
    return min(-(-nearly_all // _STEP) * _STEP, longest)


def read_example(
    record: dict[str, Any], text: TextSettings, location: str, prompts: str = "turn"
) -> Example:
    """Encode a record. Args: prompts: as `DataConfig.prompts`. Raises: ValueError as `encode`."""
    ids, targets = encode(record, text, location, prompts)
    with located(location):
        prompt = None if record.get("answer") is None else asked_ids(as_task(record, prompts), text)
    return Example(
        np.array(ids, np.int32),
        np.array(targets, bool),
        None if prompt is None else np.array(prompt, np.int32),
    )


def encode(
    record: dict[str, Any], text: TextSettings, location: str = "the record", prompts: str = "turn"
) -> tuple[list[int], list[bool]]:
    """Return the ids of a record, and which of them are targets.

    Args: prompts: as `DataConfig.prompts`.
    Raises: ValueError naming the location.

    Example:
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> encode({"prompt": "1+1=", "completion": "2"}, plain_settings())
        ([49, 43, 49, 61, 50, 256], [False, False, False, False, True, True])
    """
    record = as_task(record, prompts)
    has = {key for key in KEYS if record.get(key) is not None}
    with located(location):
        # A conversation, a prompt with its completion, or a document: the first that it is.
        turns = turns_of(record)
        tools = read_tools(record.get("tools"))
        if turns is not None:
            rendered = text.chat.render(usual(turns, text), tools=tools, assistant_mask=True)
            return rendered.ids, rendered.mask
        if has >= {"prompt", "completion"}:
            return _completion(record["prompt"], record["completion"], tools, text)
        if isinstance(record.get("text"), str):
            ids = [*text.encode(record["text"]), text.tokenizer.eos_id]
            return ids, [True] * len(ids)

    if "text" in has:
        raise ValueError(f"{location}: text={record['text']!r} is not text")
    forms = (
        "messages, conversations, prompt and completion, prompt and answer, "
        "instruction and output, or text"
    )
    raise ValueError(f"{location} has {', '.join(sorted(record)) or 'nothing'}; give it {forms}")


@contextlib.contextmanager
def located(location: str) -> Iterator[None]:
    """Begin the sentence of a ValueError with a location."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error


def asked_ids(task: dict[str, Any], text: TextSettings) -> list[int] | None:
    """The ids after which a model answers a task, encoded without the answer; None for no question.

    For messages they are what `dsv3 chat` feeds. Of a conversation, the last answer is the one that
    is asked for.
    """
    task = with_system(task)
    turns = usual(turns_of(task), text)
    if isinstance(turns, list):
        asked = turns[:-1] if turns and is_answer(turns[-1]) else turns
    else:
        asked = usual(task.get("prompt"), text)

    # Messages end with what opens an answer; a text is continued as it is.
    if isinstance(asked, list):
        tools = read_tools(task.get("tools"))
        return text.chat.render(asked, tools=tools, add_generation_prompt=True).ids
    if isinstance(asked, str):
        return [*_begin(text), *text.tokenizer.encode_with_specials(asked)[0]]
    return None


def _completion(
    prompt: Any, completion: Any, tools: Any, text: TextSettings
) -> tuple[list[int], list[bool]]:
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt, completion = usual(prompt, text), usual(completion, text)
        whole = text.chat.render([*prompt, *completion], tools=tools, assistant_mask=True)

        # The turns of the prompt are no targets, even an assistant's.
        before = len(text.chat.render(prompt, tools=tools, any_order=True).ids) if prompt else 0
        return whole.ids, [m and i >= before for i, m in enumerate(whole.mask)]

    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(
            f"prompt={prompt!r:.60} and completion={completion!r:.60} are not two texts or two "
            "lists of messages"
        )

    # Both are encoded as one text. A token that crosses their border is a target.
    ids, spans = text.tokenizer.encode_with_specials(prompt + completion)
    first = _begin(text)
    mask = [end > len(prompt) for _, end in spans]
    return [*first, *ids, text.tokenizer.eos_id], [*(False for _ in first), *mask, True]


def _begin(text: TextSettings) -> list[int]:
    """BOS, where the model's texts begin with it."""
    first = text.encode("")
    return first[:1] if first and first[0] != text.tokenizer.eos_id else []


def contents(
    paths: tuple[str, ...], column: str, whole: bool = False
) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (record, domain, location) of the examples of some paths.

    Args:
        column: another name of "messages", or of "text" where it holds a string.
        whole: as `rows_of_path`.
    """
    keys = KEYS if column == "text" else (column,)
    for path in paths:
        for location, record, domain in rows_of_path(path, keys, chats=True, whole=whole):
            # A column of the user's name holds messages, or a text, in place of the usual keys.
            if column != "text":
                if record.get(column) is None:
                    raise ValueError(f"{location}, has no {column!r}; it has {sorted(record)}")
                key = "text" if isinstance(record[column], str) else "messages"
                unused = {*KEYS, column} - {"answer", "system"}
                others = {name: record[name] for name in record if name not in unused}
                record = others | {key: record[column]}
            yield record, domain, location
