"""A tokenizer's file that anybody may have written: opened, checked, tried, and turned into a table of bytes."""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from dsv3_jax.data.special_tokens import MAX_IDS
from dsv3_jax.files import MAX_JSON, check_regular

# Letters, spaces, digits and signs in runs that make an ambiguous pattern search for very long.
PROBE = f"to be, or not: é 漢字 🙂\n{'a' * 64}! {' ' * 64}x {'1' * 64}- {'=' * 64}é{'ab ' * 32}\n\n"


@contextmanager
def sentences(file: Path, what: str) -> Iterator[None]:
    """Turn what a library raises into a ValueError: bare exceptions, and panics, which are no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"tokenizer={str(file)!r} {what}: {error}") from error


def open_json(file: Path) -> tokenizers.Tokenizer:
    check_regular(file, MAX_JSON)
    with sentences(file, "cannot be read"):
        return tokenizers.Tokenizer.from_file(str(file))


def check_ids(file: Path, ids: Iterable[int], eos: int) -> None:
    """Raises: ValueError for ids that a table of all ids would take too much memory for, or an end of document that is
    none of them."""
    largest = max(ids, default=-1)
    if largest >= MAX_IDS:
        raise ValueError(f"tokenizer={str(file)!r} has id {largest}; ids up to {MAX_IDS - 1} are supported")
    if eos > largest:
        raise ValueError(f"tokenizer={str(file)!r} ends documents with id {eos}, but its ids end at {largest}")


def names_of_ids(file: Path, added: object) -> dict[int, str]:
    """Read `added_tokens_decoder` of a tokenizer_config.json: id → name."""
    names: dict[int, str] = {}
    for i, token in added.items() if isinstance(added, dict) else ():
        name = token.get("content") if isinstance(token, dict) else token
        if not re.fullmatch(r"[0-9]{1,7}", i) or int(i) >= MAX_IDS or not isinstance(name, str):
            raise ValueError(
                f"{file} has added_tokens_decoder[{i!r}]={token!r}, which is no id with the name of a token"
            )
        names[int(i)] = name
    return names


def is_byte_level(inner: tokenizers.Tokenizer) -> bool:
    """Say whether tokens represent bytes by GPT-2's characters."""
    return '"ByteLevel"' in json.dumps(json.loads(inner.to_str())["decoder"])


def bytes_by_id(inner: tokenizers.Tokenizer, byte_level: bool, special_ids: set[int]) -> list[bytes]:
    """Return the bytes of every id; specials and unused ids have none."""
    vocab = inner.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values()) + 1)
    added = inner.get_added_tokens_decoder()
    byte_of = byte_by_character()
    for token, i in vocab.items():
        if i in special_ids or (i in added and added[i].special):
            continue
        if i in added:  # an added token is plain text
            table[i] = token.encode("utf-8")
        elif byte_level:
            # As in the library: a token with another character is its own text.
            known = all(c in byte_of for c in token)
            table[i] = bytes(byte_of[c] for c in token) if known else token.encode("utf-8")
        elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
            table[i] = bytes([int(match[1], 16)])
        else:
            table[i] = token.replace("▁", " ").encode("utf-8")
    return table


def byte_by_character() -> dict[str, int]:
    """Return the byte of each of GPT-2's characters: printable bytes are unchanged, the others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}
