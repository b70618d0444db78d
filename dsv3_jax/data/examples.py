"""Chat examples for fine-tuning: token ids, which of them are targets of the losses, and rows of whole examples.

A record has one of these, by which its targets are found:

    messages              a conversation: the assistant's tokens, by the chat template
    prompt, completion    two lists of messages: the assistant's tokens of the completion; or two strings, without the
                          template: the completion and the end of a document
    text                  a document: all of its tokens, and its end

A record of messages may also have `tools`, JSON schemas of functions. Any record may have a `domain`.
"""

import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import Batch, Piece, check_position, check_rows, pack
from dsv3_jax.data.corpus import fingerprint_of, held_out, json_lines, parquet_rows, user_files
from dsv3_jax.data.hub import dataset_rows, is_dataset, parts_of
from dsv3_jax.data.text_settings import TextSettings
from dsv3_jax.files import check_regular

KEYS = ("messages", "prompt", "completion", "text")
_OPEN_ROWS = 64  # rows that may still be filled: more waste less padding, and search longer
_SAY_EVERY = 5.0  # seconds


class Example(NamedTuple):
    """Tokens of one example, and which of them are targets."""

    tokens: Int32[np.ndarray, " n"]
    loss_mask: Bool[np.ndarray, " n"]
    domain: int


@dataclass(frozen=True)
class Examples:
    """Examples of both sides of the split: a `Source` of batches.

    Attributes:
        domains: names in order of first appearance.
        fingerprint: a hash of the training examples in their order.
        too_long: number of examples left out because they have more than T tokens.
        without_target: number of examples left out because no token of theirs is a target.

    Example:
        >>> one = Example(np.array([5, 6, 7], np.int32), np.array([False, True, True]), domain=0)
        >>> examples = Examples((one,) * 3, (one,), ("chat",), "", 0, 0, DataConfig(seq_len=8, batch_size=1))
        >>> batch = next(examples.train_batches())
        >>> batch["tokens"].tolist(), batch["segment_ids"].tolist()
        ([[5, 6, 7, 5, 6, 7, 0, 0]], [[1, 1, 1, 2, 2, 2, 0, 0]])
        >>> batch["loss_mask"].astype(int).tolist()
        [[0, 1, 1, 0, 1, 1, 0, 0]]
    """

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    domains: tuple[str, ...]
    fingerprint: str
    too_long: int
    without_target: int
    cfg: DataConfig

    def describe(self) -> str:
        """Return a sentence on the examples, and one on those that are left out."""
        tokens = sum(len(e.tokens) for e in self.train)
        wanted = sum(int(e.loss_mask.sum()) for e in self.train)
        steps = self.rows_per_epoch() / self.cfg.batch_size
        said = (
            f"examples: {len(self.train):,} to train on, {len(self.val):,} held out; {tokens:,} tokens, {wanted:,} of "
            f"them targets; one pass takes {steps:,.1f} steps"
        )
        left_out = [
            f"{count:,} {what}"
            for count, what in (
                (self.too_long, f"longer than seq_len={self.cfg.seq_len}"),
                (self.without_target, "without an assistant's turn"),
            )
            if count
        ]
        return said + (f"; left out: {', '.join(left_out)}" if left_out else "")

    def rows_per_epoch(self) -> int:
        """Return the number of rows that the first pass over the training examples fills."""
        return len(epoch_rows(self.train, self.cfg, 0))

    def train_batches(self, rows: Sequence[int] | np.ndarray | None = None) -> "ExampleBatches":
        """Iterate over endless training batches. Args: rows: as in `batches.train_batches`."""
        return ExampleBatches(self, np.arange(self.cfg.batch_size) if rows is None else np.asarray(rows))

    def val_batches(self, num_batches: int) -> list[Batch]:
        """Return the held-out examples in batches, at most `num_batches`; the last may end in rows of padding."""
        size = self.cfg.batch_size
        rows = _fill([len(e.tokens) for e in self.val], self.cfg.seq_len)[: num_batches * size]
        rows += [[]] * (-len(rows) % size)
        made = [_row([(i, self.val[i]) for i in row], self.cfg) for row in rows]
        return [stack(made[i : i + size]) for i in range(0, len(made), size)]


class ExampleBatches(Iterator[Batch]):
    """Iterator of `Examples.train_batches`: pass after pass, each in an order of its own.

    Its state is a pass and a row of it, so that every process has the same, and another number of processes can resume.

    Example:
        >>> one = Example(np.array([5, 6, 7], np.int32), np.array([False, True, True]), domain=0)
        >>> examples = Examples((one,) * 3, (one,), ("chat",), "", 0, 0, DataConfig(seq_len=8, batch_size=1))
        >>> batches = examples.train_batches()
        >>> _, state = next(batches), batches.get_state()
        >>> state["epoch"], state["row"]
        (0, 1)
    """

    def __init__(self, examples: Examples, rows: np.ndarray):
        cfg = examples.cfg
        check_rows(rows, cfg)
        self._examples, self._rows, self._cfg = examples, rows, cfg
        self._source = {"corpus": examples.fingerprint, "seed": cfg.seed, "seq_len": cfg.seq_len}
        self._seek(0, 0)

    def __next__(self) -> Batch:
        rows: list[list[int]] = []
        while len(rows) < self._cfg.batch_size:
            taken = self._packed[self._row : self._row + self._cfg.batch_size - len(rows)]
            rows += taken
            self._row += len(taken)
            if self._row == len(self._packed):
                self._seek(self._epoch + 1, 0)
        train = self._examples.train
        return stack([_row([(i, train[i]) for i in rows[r]], self._cfg) for r in self._rows])

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch as plain JSON."""
        return {**self._source, "epoch": self._epoch, "row": self._row}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from a state of `get_state`.

        Raises: ValueError when the state belongs to other examples, another seed or sequence length.
        """
        check_position(self._source, state)
        self._seek(state["epoch"], state["row"])

    def _seek(self, epoch: int, row: int) -> None:
        self._epoch, self._row = epoch, row
        self._packed = epoch_rows(self._examples.train, self._cfg, epoch)


def epoch_rows(examples: Sequence[Example], cfg: DataConfig, epoch: int) -> list[list[int]]:
    """Return the rows of one pass over examples in an order of its own: the indices of each row's examples.

    Example:
        >>> one = Example(np.arange(3, dtype=np.int32), np.ones(3, bool), domain=0)
        >>> rows = epoch_rows([one] * 3, DataConfig(seq_len=6), epoch=0)
        >>> len(rows), sorted(i for row in rows for i in row)
        (2, [0, 1, 2])
    """
    order = np.random.default_rng([cfg.seed % 2**32, epoch]).permutation(len(examples))
    return [[int(order[i]) for i in row] for row in _fill([len(examples[i].tokens) for i in order], cfg.seq_len)]


def _fill(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Put each length into the first of the open rows that has room; rows are opened as they are needed."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i, length in enumerate(lengths):
        first = max(0, len(rows) - _OPEN_ROWS)
        row = next((r for r in range(first, len(rows)) if room[r] >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(size)
        rows[row].append(i)
        room[row] -= length
    return rows


def _row(examples: Sequence[tuple[int, Example]], cfg: DataConfig) -> Batch:
    """Make one row [1, T] of examples with their numbers."""
    batch = pack([Piece(e.tokens, e.domain, i) for i, e in examples], 1, cfg)
    mask = np.zeros((1, cfg.seq_len), bool)
    if examples:
        found = np.concatenate([e.loss_mask for _, e in examples])
        mask[0, : len(found)] = found
    return batch | {"loss_mask": mask}


def stack(rows: Sequence[Batch]) -> Batch:
    """Join batches along their rows.

    Example:
        >>> a = np.ones((1, 2), np.int32)
        >>> row = Batch(tokens=a, segment_ids=a, positions=a, domains=a, documents=a)
        >>> stack([row, row])["tokens"].shape
        (2, 2)
    """
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}  # type: ignore[literal-required, return-value]


def load_examples(cfg: DataConfig, text: TextSettings, quiet: bool = True) -> Examples:
    """Read and encode the examples of `cfg.paths`, and split them by a hash of each.

    Equal examples are on the same side. An example's domain is the one it states, else the name of its file.

    Args:
        text: of the model that is fine-tuned: tokenizer, special tokens, chat template.
        quiet: print nothing; otherwise a line every few seconds.
    Raises: ValueError with the file and line of a record that is none of those above, or whose messages the chat
        template refuses. Also if there is no example, or too few for two sides.

    Example:
        >>> import json, tempfile
        >>> from dsv3_jax.data.text_settings import plain_settings
        >>> messages = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "chats.jsonl")
        ...     lines = [json.dumps({"messages": [*messages[:1], {"role": "assistant", "content": c}]}) for c in "23"]
        ...     _ = file.write_text("\\n".join(lines))
        ...     examples = load_examples(DataConfig(paths=(str(file),), format="chat"), plain_settings())
        >>> one = examples.train[0]
        >>> text = plain_settings().tokenizer.decode(one.tokens)
        >>> text[:16]
        'user\\n1+1\\nassista'
    """
    if not cfg.paths:
        raise ValueError("data.paths is empty, and format='chat' has no default text; name JSONL or Parquet files")
    domains: dict[str, int] = {}
    examples: list[Example] = []
    too_long = without_target = 0
    said = time.monotonic()
    records = itertools.chain.from_iterable(records_of(path, cfg.text_column) for path in cfg.paths)
    for location, record, name in itertools.islice(records, cfg.max_documents):
        tokens, mask = encode(record, text, location)
        if len(tokens) > cfg.seq_len:
            too_long += 1
        elif not any(mask[1:]):
            without_target += 1
        else:
            domain = domains.setdefault(record.get("domain") or name, len(domains))
            examples.append(Example(np.array(tokens, np.int32), np.array(mask, bool), domain))
        if not quiet and time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            print(f"encoded {len(examples):,} examples …", flush=True)
    if not examples:
        raise ValueError(
            f"data.paths={list(cfg.paths)} give no example to train on: {too_long} are longer than "
            f"seq_len={cfg.seq_len}, {without_target} have no assistant's turn"
        )
    digests = [hashlib.blake2b(e.tokens.tobytes() + e.loss_mask.tobytes(), digest_size=8).digest() for e in examples]
    is_val = held_out(digests, cfg.val_fraction)
    train = tuple(e for e, v in zip(examples, is_val, strict=True) if not v)
    if not train:
        raise ValueError(
            f"val_fraction={cfg.val_fraction} leaves no example for training: there are {len(examples)}; add some"
        )
    return Examples(
        train,
        tuple(e for e, v in zip(examples, is_val, strict=True) if v),
        tuple(domains),
        fingerprint_of(digest for digest, v in zip(digests, is_val, strict=True) if not v),
        too_long,
        without_target,
        cfg,
    )


def encode(record: dict[str, Any], text: TextSettings, location: str = "the record") -> tuple[list[int], list[bool]]:
    """Return the ids of a record, and which of them are targets.

    Raises: ValueError naming the location.

    Example:
        >>> from dsv3_jax.data.text_settings import plain_settings
        >>> encode({"prompt": "1+1=", "completion": "2"}, plain_settings())
        ([49, 43, 49, 61, 50, 256], [False, False, False, False, True, True])
    """
    keys = [key for key in KEYS if record.get(key) is not None]
    try:
        if keys == ["messages"]:
            rendered = text.chat.render(record["messages"], tools=record.get("tools"), assistant_mask=True)
            return rendered.ids, rendered.mask
        if keys == ["text"] and isinstance(record["text"], str):
            ids = [*text.encode(record["text"]), text.tokenizer.eos_id]
            return ids, [True] * len(ids)
        if keys == ["prompt", "completion"]:
            return _completion(record["prompt"], record["completion"], record.get("tools"), text)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    if keys in (["messages"], ["text"]):
        raise ValueError(f"{location}: {keys[0]}={record[keys[0]]!r} is not text")
    found = ", ".join(sorted(record)) or "nothing"
    raise ValueError(f"{location} has {found}; give it messages, or prompt and completion, or text")


def _completion(prompt: Any, completion: Any, tools: Any, text: TextSettings) -> tuple[list[int], list[bool]]:
    if isinstance(prompt, list) and isinstance(completion, list):
        whole = text.chat.render([*prompt, *completion], tools=tools, assistant_mask=True)
        # The turns of the prompt are no targets, even an assistant's.
        before = len(text.chat.render(prompt, tools=tools, any_order=True).ids) if prompt else 0
        return whole.ids, [m and i >= before for i, m in enumerate(whole.mask)]
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(
            f"prompt={prompt!r:.60} and completion={completion!r:.60} are not two texts or two lists of messages"
        )
    ids, spans = text.tokenizer.encode_with_specials(prompt + completion)
    first = text.encode("")  # BOS, where the model's texts begin with it
    first = first[:1] if first and first[0] != text.tokenizer.eos_id else []
    mask = [end > len(prompt) for _, end in spans]
    return [*first, *ids, text.tokenizer.eos_id], [*(False for _ in first), *mask, True]


def records_of(path: str, column: str = "text") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (location, record, name of the file) of one of `DataConfig.paths`.

    Args: column: another name of "messages", or of "text" where it holds a string.
    """
    keys = KEYS if column == "text" else (column,)
    for location, record, name in _records_of(path, keys):
        if not isinstance(record, dict):
            raise ValueError(f"{location}, is not an object")
        if not isinstance(record.get("domain"), str | None):
            raise ValueError(f'{location}: "domain" is {record["domain"]!r}, not a string')
        if column != "text":
            if record.get(column) is None:
                raise ValueError(f"{location}, has no {column!r}; it has {sorted(record)}")
            key = "text" if isinstance(record[column], str) else "messages"
            record = {key: record[column]} | {k: record[k] for k in ("tools", "domain") if k in record}
        yield location, record, name


def _records_of(path: str, keys: tuple[str, ...]) -> Iterator[tuple[str, Any, str]]:
    also = ("tools", "domain")
    if is_dataset(path):
        name = Path(parts_of(path)[0]).name
        return (yield from ((*row, name) for row in dataset_rows(path, needed=keys, also=also)))
    root = Path(path)
    if not root.exists():
        raise ValueError(f"path={path!r} does not exist")
    files = [f for f in user_files(root) if f.suffix.lower() in (".jsonl", ".parquet")] if root.is_dir() else [root]
    if not files:
        raise ValueError(f"path={path!r} holds no JSONL and no Parquet file")
    for file in files:
        check_regular(file)
        try:
            if file.suffix.lower() == ".parquet":
                found = parquet_rows(file, needed=keys, also=also)
            elif file.suffix.lower() == ".jsonl":
                found = json_lines(file)
            else:
                raise ValueError(f"{file} is neither JSONL nor Parquet, which format='chat' reads; it ends in neither")
            for location, record in found:
                yield location, record, file.stem
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from error
