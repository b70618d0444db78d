"""Which keys of people's chats the chat template does not read."""

import itertools
from collections import Counter
from typing import Any

from dsv3_jax.chat.examples import contents, encode
from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import DataConfig
from dsv3_jax.data.text_files import visible

_LOOKED_AT = 1000  # first records
_SAMPLED = 20  # records of each key that are encoded without it
# Keys of records that may hold messages; keys of messages that are always read.
_LISTS = ("messages", "conversations", "prompt", "question", "completion")
_READ = {"role", "content", "from", "value", "weight"}


def unread_keys(cfg: DataConfig, text: TextSettings) -> Counter[str]:
    """Count the records whose messages have a key that changes no token; `tools` is one, too.

    The first 1,000 records are looked at, so that large files take no more time. A key is read if
    it changes one of the first 20 records that have it.

    Args: text: of the model, as `load_examples`.
    Returns: numbers of records by key. Bad records count for none.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> turns = [{"role": "user", "content": "hi", "name": "Ann"}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "chats.jsonl")
        ...     _ = file.write_text(json.dumps({"messages": turns}))
        ...     unread_keys(DataConfig(paths=(str(file),), format="chat"), plain_settings())
        Counter({'name': 1})
    """
    read = set(_READ)
    found: Counter[str] = Counter()
    records = contents(cfg.paths, cfg.text_column)
    for record, *_ in itertools.islice(records, min(_LOOKED_AT, cfg.max_documents or _LOOKED_AT)):
        keys = _keys_of(record) - read
        ids = _ids_of(record, text, cfg) if keys else None
        if ids is None:
            continue
        for key in sorted(keys):
            found[key] += 1
            if found[key] <= _SAMPLED and _ids_of(_without(record, key), text, cfg) != ids:
                read.add(key)
                del found[key]
    return found


def unread_line(cfg: DataConfig, text: TextSettings) -> str:
    """Name the keys of `unread_keys` on a line; "" if there is none."""
    found = unread_keys(cfg, text)
    named = ", ".join(f"{visible(key, 40)} ({n:,})" for key, n in found.items())
    hint = '; give functions as "tools"' if "functions" in found else ""
    return named and (
        f"keys that the chat template does not read, in the first {_LOOKED_AT:,} records: "
        f"{named}{hint}"
    )


def _keys_of(record: dict[str, Any]) -> set[str]:
    """The keys of a record's messages that have a value, and the record's own lists of functions.

    `functions` is OpenAI's older name of tools, which no template reads.
    """
    lists = [record[name] for name in _LISTS if isinstance(record.get(name), list)]
    turns = [turn for turns in lists for turn in turns if isinstance(turn, dict)]
    keys = {key for turn in turns for key, value in turn.items() if value}
    return keys | {key for key in ("tools", "functions") if record.get(key)}


def _ids_of(record: dict[str, Any], text: TextSettings, cfg: DataConfig) -> list[int] | None:
    """The ids of a record; None for a bad one."""
    try:
        return encode(record, text, prompts=cfg.prompts)[0]
    except ValueError:
        return None


def _without(value: Any, key: str) -> Any:
    """A copy of nested data whose objects lack a key."""
    if isinstance(value, dict):
        return {name: _without(item, key) for name, item in value.items() if name != key}
    return [_without(item, key) for item in value] if isinstance(value, list) else value
