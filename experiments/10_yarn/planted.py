"""Text with keys planted in it, and rows that ask for them: what a small model learns to retrieve in a minute.

A document has three keys, `?`, `!` and `@`, and for each a value of its own, one of twelve signs: where `?C` stood
once, `C` follows each later `?`. The text around is the default corpus's in small letters, without any of these signs.
"""

import json
import os
import re
import string
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.batches import load_corpus

SIGNS = string.ascii_uppercase + string.digits
VALUES = {key: SIGNS[12 * i : 12 * (i + 1)] for i, key in enumerate("?!@")}
PLANTED = "".join(VALUES) + SIGNS
CHANCE = 1 / 12
DOCUMENTS = 2000
NEAREST = 4  # characters of text from a key to its next occurrence, at least; at most the reach, 4L
ROWS_LONG = 4  # a document's text, in reaches, before keys


def plain(text: str) -> str:
    """Text without keys and values: small letters, ASCII."""
    return "".join(char for char in text.lower() if char.isascii() and char not in PLANTED)


def without_keys(text: str) -> str:
    """What a document of the corpus was before keys were planted."""
    return re.sub(f"[{''.join(VALUES)}][{SIGNS}]", "", text)


def with_keys(text: str, rng: np.random.Generator, reach: int, but: str = "") -> str:
    """`text` with the keys and their values strewn in; not the keys in `but`.

    From a key to its next occurrence it is NEAREST to `reach` characters, evenly on a logarithmic scale.
    """
    pairs = [""] * len(text)  # what stands before each character
    for key, values in VALUES.items():
        pair, place = key + rng.choice(list(values)), rng.uniform(0, NEAREST)
        while key not in but and place < len(text):
            pairs[int(place)] += pair
            place += np.exp(rng.uniform(*np.log((NEAREST, reach))))
    return "".join(pair + char for pair, char in zip(pairs, text, strict=True))


def question(text: str, length: int, distance: int, rng: np.random.Generator, reach: int) -> str:
    """A row of `length` characters whose last is the value of the key before it, planted once, `distance` before.

    The other keys stand all around it. The place gives way by a few characters where it would cut one of them.

    Args: text: without keys, of at least `length` characters.
    """
    key = rng.choice(list(VALUES))
    pair = key + rng.choice(list(VALUES[key]))
    row = with_keys(text[:length], rng, reach, but=key)[: length - 2]
    if row[-1] in VALUES:  # its value was cut off
        row = row[:-1] + " "
    free = [i for i in range(len(row) - 1) if not set(row[i : i + 2]) & set(PLANTED)]
    place = min(free, key=lambda i: abs(i - (length - 2 - distance)))
    return row[:place] + pair + row[place + 2 :] + pair


def write_corpus(path: Path, reach: int, seed: int = 0) -> None:
    """A .jsonl of documents, the same for every call; nothing is done where it is there.

    Raises: ValueError where the corpus has no document that long.
    """
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    texts = [plain(d.text)[: ROWS_LONG * reach] for d in load_corpus(DataConfig()).train if d.domain != "C"]
    if max(map(len, texts)) < reach:
        raise ValueError(f"the corpus has no document of {reach} characters, which is four times the base's seq_len")
    chosen = rng.permutation(len(texts))[:DOCUMENTS]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(
        "".join(json.dumps({"text": with_keys(texts[i], rng, reach), "domain": "keys"}) + "\n" for i in chosen)
    )
    part.replace(path)
