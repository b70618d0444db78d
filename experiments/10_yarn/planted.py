"""Text with keys planted in it, and rows that ask for them: what a small model can learn to retrieve.

In a document a capital letter is a key and the digit behind it its value: where `Q7` stood once, `7` follows each
later `Q`. The text around is the default corpus's in small letters, without digits; documents share no values.
"""

import json
import os
import re
import string
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data import load_corpus

KEYS, VALUES = string.ascii_uppercase, string.digits
CHANCE = 1 / len(VALUES)
DOCUMENTS, LENGTH = 2000, 2048  # characters of text of a document, before keys
GAP = 6  # characters of text between two keys, on average


def plain(text: str) -> str:
    """Text without keys and values: small letters, no digits, ASCII."""
    return "".join(char for char in text.lower() if char.isascii() and char not in VALUES)


def without_keys(text: str) -> str:
    """What a document of the corpus was before keys were planted."""
    return re.sub(f"[{KEYS}][{VALUES}]", "", text)


def with_keys(text: str, rng: np.random.Generator, but: str = "") -> str:
    """`text` with keys and their values strewn in; no key that is in `but`.

    Keys occur by Zipf's law: from one occurrence to the next it is a few characters, or a few hundred.
    """
    values = rng.choice(list(VALUES), len(KEYS))
    weights = np.array([key not in but for key in KEYS]) / rng.permutation(1.0 + np.arange(len(KEYS)))
    here = rng.random(len(text)) < 1 / GAP
    chosen = rng.choice(len(KEYS), len(text), p=weights / weights.sum())
    return "".join(
        f"{char}{KEYS[key]}{values[key]}" if planted else char
        for char, key, planted in zip(text, chosen, here, strict=True)
    )


def question(text: str, length: int, distance: int, rng: np.random.Generator) -> str:
    """A row of `length` characters whose last is the value of the key before it, planted once, `distance` before.

    Other keys stand all around it. The place gives way by a few characters where it would cut one of them.

    Args: text: without keys, of at least `length` characters.
    """
    key, value = rng.choice(list(KEYS)), rng.choice(list(VALUES))
    row = with_keys(text[:length], rng, but=key)[: length - 2]
    if row[-1] in KEYS:  # its value was cut off
        row = row[:-1] + " "
    free = [i for i in range(len(row) - 1) if not set(row[i : i + 2]) & set(KEYS + VALUES)]
    place = min(free, key=lambda i: abs(i - (length - 2 - distance)))
    return f"{row[:place]}{key}{value}{row[place + 2 :]}{key}{value}"


def write_corpus(path: Path, seed: int = 0) -> None:
    """A .jsonl of documents, the same for every call; nothing is done where it is there."""
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    texts = [plain(d.text)[:LENGTH] for d in load_corpus(DataConfig()).train if d.domain != "C"]
    chosen = rng.permutation(len(texts))[:DOCUMENTS]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text("".join(json.dumps({"text": with_keys(texts[i], rng), "domain": "keys"}) + "\n" for i in chosen))
    part.replace(path)
