"""Chat examples for fine-tuning: token ids, and which of them are targets of the losses.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import Source
from dsv3_jax.data.corpus import fingerprint_of, held_out, json_lines, parquet_rows, user_files
from dsv3_jax.data.hub import dataset_rows, is_dataset, parts_of
from dsv3_jax.data.packing import Packed, Piece
from dsv3_jax.files import check_regular

KEYS = ("messages", "prompt", "completion", "text")
_MAX_DOMAIN = 200  # characters of a domain's name
_SAY_EVERY = 5.0  # seconds


def load_examples(cfg: DataConfig, text: TextSettings, quiet: bool = True) -> Source:
    """Read and encode the examples of `cfg.paths`, and split them by a hash of each.

    Equal examples are on the same side. An example's domain is the one it states, else the name of its file. Rows hold
    whole examples. Those with more than T tokens, or without a target, are left out.

    Args:
        text: of the model that is fine-tuned: tokenizer, special tokens, chat template.
        quiet: print nothing; otherwise a line every few seconds.
    Raises: ValueError with the file and line of a record that is none of those above, or whose messages the chat
        template refuses. Also if there is no example, or too few for two sides.

    Example:
        >>> import json, tempfile
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> records = [{"prompt": "1+1=", "completion": c} for c in "23"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "sums.jsonl")
        ...     _ = file.write_text("\\n".join(map(json.dumps, records)))
        ...     cfg = DataConfig(paths=(str(file),), format="chat", seq_len=8, batch_size=1)
        ...     source = load_examples(cfg, plain_settings())
        >>> next(source.train_batches())["loss_mask"].astype(int).tolist()
        [[0, 0, 0, 0, 1, 1, 0, 0]]
        >>> source.summary
        'examples: 1 to train on, 1 held out; 6 tokens, 2 of them targets; one pass takes 1.0 steps'
    """
    if not cfg.paths:
        raise ValueError("data.paths is empty, and format='chat' has no default text; name JSONL or Parquet files")
    domains: dict[str, int] = {}
    pieces: list[Piece] = []
    digests: list[bytes] = []
    left_out = {f"longer than seq_len={cfg.seq_len}": 0, "without an assistant's turn": 0}
    too_long, without_target = left_out
    said = time.monotonic()
    for record, domain, location in itertools.islice(contents(cfg.paths, cfg.text_column), cfg.max_documents):
        ids, targets = encode(record, text, location)
        tokens, mask = np.array(ids, np.int32), np.array(targets, bool)
        if len(tokens) > cfg.seq_len:
            left_out[too_long] += 1
        elif not mask[1:].any():
            left_out[without_target] += 1
        else:
            digests.append(hashlib.blake2b(tokens.tobytes() + mask.tobytes(), digest_size=8).digest())
            pieces.append(Piece(tokens, domains.setdefault(domain, len(domains)), len(pieces), mask))
        if not quiet and time.monotonic() - said > _SAY_EVERY:
            said = time.monotonic()
            print(f"encoded {len(pieces):,} examples …", flush=True)
    if not pieces:
        raise ValueError(
            f"data.paths={list(cfg.paths)} give no example to train on: {left_out[too_long]} are {too_long}, "
            f"{left_out[without_target]} have no assistant's turn"
        )
    is_val = held_out(digests, cfg.val_fraction)
    train, val = ([p for p, v in zip(pieces, is_val, strict=True) if v is side] for side in (False, True))
    if not train:
        raise ValueError(
            f"val_fraction={cfg.val_fraction} leaves no example for training: there are {len(pieces)}; add some"
        )
    order = np.random.default_rng(cfg.seed).permutation(len(train)).tolist()
    rows = Packed((train[i] for i in order), cfg.seq_len, whole=True)
    of_domain = [[p for p in val if p.domain == i] for i in domains.values()]
    num_targets = sum(int(piece.loss_mask.sum()) for piece in train if piece.loss_mask is not None)
    also = ", ".join(f"{count:,} {what}" for what, count in left_out.items() if count)
    return Source(
        cfg,
        tuple(domains),
        fingerprint_of(digest for digest, v in zip(digests, is_val, strict=True) if not v),
        f"examples: {len(train):,} to train on, {len(val):,} held out; {sum(len(p.tokens) for p in train):,} tokens, "
        f"{num_targets:,} of them targets; one pass takes {len(rows) / cfg.batch_size:,.1f} steps"
        + (f"; left out: {also}" if also else ""),
        lambda: [rows],
        lambda: [Packed(found, cfg.seq_len, whole=True) for found in of_domain if found],
    )


def encode(record: dict[str, Any], text: TextSettings, location: str = "the record") -> tuple[list[int], list[bool]]:
    """Return the ids of a record, and which of them are targets.

    Raises: ValueError naming the location.

    Example:
        >>> from dsv3_jax.chat.text_settings import plain_settings
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


def contents(paths: tuple[str, ...], text_column: str) -> Iterator[tuple[Any, str, str]]:
    """Yield (record, domain, location) of the examples of some paths, as `dsv3 data tokenize` reads them."""
    for location, record, name in itertools.chain.from_iterable(records_of(path, text_column) for path in paths):
        domain = record.get("domain") or name
        yield record, "".join(c if c.isprintable() else "\ufffd" for c in domain), location


def records_of(path: str, column: str = "text") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (location, record, name of the file) of one of `DataConfig.paths`.

    Args: column: another name of "messages", or of "text" where it holds a string.
    """
    keys = KEYS if column == "text" else (column,)
    for location, record, name in _records_of(path, keys):
        if not isinstance(record, dict):
            raise ValueError(f"{location}, is not an object")
        if not isinstance(domain := record.get("domain"), str | None) or len(domain or "") > _MAX_DOMAIN:
            raise ValueError(f'{location}: "domain" is {domain!r:.60}, not a string of {_MAX_DOMAIN} or less')
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
