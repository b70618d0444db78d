"""The text whose loss is measured: the default corpus in lower case, with keys planted in it.

A document has three keys, `?`, `!` and `@`. Each key has one value per document, one of twelve
characters: if `?C` occurs once, `C` follows each later `?`. No model of this size finds the values,
and keys and values are not scored. They stay because the stored runs were trained on this text.
"""

import json
import string
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.host.files import write_atomic

SIGNS = string.ascii_uppercase + string.digits
VALUES = {key: SIGNS[12 * i : 12 * (i + 1)] for i, key in enumerate("?!@")}
PLANTED = "".join(VALUES) + SIGNS
DOCUMENTS = 2000
# The least number of characters from a key to its next occurrence; the largest is the reach.
NEAREST = 4
ROWS_LONG = 4  # largest length of a document's text before keys are planted, in reaches


def plain(text: str) -> str:
    """Return text without keys and values: ASCII in lower case."""
    return "".join(char for char in text.lower() if char.isascii() and char not in PLANTED)


def with_keys(text: str, rng: np.random.Generator, reach: int) -> str:
    """Return `text` with keys and their values planted.

    The distance from a key to its next occurrence is NEAREST to `reach` characters, log-uniform.
    """
    pairs = [""] * len(text)  # what to insert before each character
    for key, values in VALUES.items():
        pair, pos = key + rng.choice(list(values)), rng.uniform(0, NEAREST)
        while pos < len(text):
            pairs[int(pos)] += pair
            pos += np.exp(rng.uniform(*np.log((NEAREST, reach))))
    return "".join(pair + char for pair, char in zip(pairs, text, strict=True))


def write_corpus(path: Path, reach: int, seed: int = 0) -> None:
    """Write a .jsonl of documents, unless it exists. All calls with one seed write the same text.

    Raises: ValueError if the corpus has no document of `reach` characters.
    """
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    texts = [
        plain(d.text)[: ROWS_LONG * reach]
        for d in load_corpus(DataConfig()).train
        if d.domain != "C"
    ]
    if max(map(len, texts)) < reach:
        raise ValueError(
            f"reach={reach} (4 × data.seq_len) is longer than every document; use a smaller "
            "data.seq_len"
        )
    chosen = rng.permutation(len(texts))[:DOCUMENTS]
    documents = ({"text": with_keys(texts[i], rng, reach), "domain": "keys"} for i in chosen)
    write_atomic(path, "".join(json.dumps(document) + "\n" for document in documents))
