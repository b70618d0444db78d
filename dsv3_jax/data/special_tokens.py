"""Special tokens by the small files of a folder: names by role, and the ids that end a text."""

import os
from pathlib import Path
from typing import Any

from dsv3_jax.host.files import read_json

# files of settings beside a tokenizer
CONFIG_FILE, SPECIALS_FILE = "tokenizer_config.json", "special_tokens_map.json"
MAX_IDS = 2**22  # of a tokenizer; the largest released one has 262,144
TOKEN_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def named_specials(folder: Path) -> dict[str, str]:
    """Return the special tokens that a folder's files name, by role: bos_token, eos_token, …

    They come from tokenizer_config.json. The older special_tokens_map.json counts if
    tokenizer_config.json has no added_tokens_decoder.

    Raises: ValueError when a file is not JSON, or a name is not text.
    Source: transformers, `PreTrainedTokenizerBase._from_pretrained`.
    """
    said = read_object(folder / CONFIG_FILE)
    if "added_tokens_decoder" not in said:
        said |= read_object(folder / SPECIALS_FILE)

    names = {}
    for role, value in said.items():
        # A token may be an object: its name, and how text around it is treated.
        value = value.get("content") if isinstance(value, dict) else value
        if role in TOKEN_ROLES and value is not None and not isinstance(value, str):
            raise ValueError(
                f"{folder / CONFIG_FILE} has {role}={value!r}, which is not the name of a token"
            )
        # Models add further roles, as image_token.
        if role.endswith("_token") and isinstance(value, str):
            names[role] = value
    return names


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file as `read_json`; an absent file is an empty object."""
    return read_json(path) if os.path.lexists(path) else {}


def end_ids(folder: Path, name: str, key: str = "eos_token_id") -> list[int]:
    """Return `eos_token_id`, or another key, of a file such as config.json: none, one or several.

    Raises: ValueError when it is neither an id nor a list of ids.
    """
    values = read_object(folder / name)
    inner = values.get("text_config")  # a wrapper's, of its language model
    value = inner.get(key) if isinstance(inner, dict) else None
    value = values.get(key) if value is None else value
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < MAX_IDS for i in ids):
        raise ValueError(
            f"{folder / name} has {key}={value!r}, which is neither an id nor a list of ids"
        )
    return ids
