"""Text with keys planted in it, and rows that ask for them: what a small model can learn to retrieve.

In a document a capital letter is a key and the digit behind it its value: where `Q7` stood once, `7` follows each
later `Q`. The text around is the default corpus's in small letters, without digits; documents share no values.
"""

import json
import os
import string
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data import load_corpus

KEYS, VALUES = string.ascii_uppercase, string.digits
CHANCE = 1 / len(VALUES)
DOCUMENTS, LENGTH = 2000, 2048
GAP = 6  # characters of text between two keys, on average


def plain(text: str) -> str:
    """Text without keys and values: small letters, no digits."""
    return text.lower().translate(str.maketrans("", "", VALUES))


def planted(text: str, rng: np.random.Generator, without: str = "") -> str:
    """`text` with keys and their values strewn in, but the keys `without`.

    Keys occur by Zipf's law, so that from one occurrence to the next it is a few characters or a few hundred.
    """
    values = rng.choice(list(VALUES), len(KEYS))
    weights = np.array([0.0 if key in without else 1.0 for key in KEYS])
    weights /= rng.permutation(1 + np.arange(len(KEYS)))
    places = rng.random(len(text)) < 1 / GAP
    chosen = rng.choice(len(KEYS), len(text), p=weights / weights.sum())
    return "".join(
        f"{char}{KEYS[key]}{values[key]}" if here else char
        for char, key, here in zip(text, chosen, places, strict=True)
    )


def write_corpus(path: Path, seed: int = 0) -> None:
    """A .jsonl of documents, the same for every call; nothing is done where it is there."""
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    texts = [plain(d.text)[:LENGTH] for d in load_corpus(DataConfig()).train if d.domain != "C"]
    chosen = rng.permutation(len(texts))[:DOCUMENTS]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text("".join(json.dumps({"text": planted(texts[i], rng), "domain": "keys"}) + "\n" for i in chosen))
    part.replace(path)
