"""The text whose loss is measured: the default corpus in lower case, with keys planted in it.

A document has three keys, `?`, `!` and `@`. Each key has one value per document, one of twelve
characters: if `?C` occurs once, `C` follows each later `?`. No model of this size finds the values,
and keys and values are not scored. They stay because the stored runs were trained on this text.
"""

import json
import string

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.host.files import write_atomic

SIGNS = string.ascii_uppercase + string.digits
VALUES = {key: SIGNS[12 * i : 12 * (i + 1)] for i, key in enumerate("?!@")}
PLANTED = "".join(VALUES) + SIGNS
DOCUMENTS = 2000
NEAREST = 4  # the least number of characters from a key to its next occurrence


def write_corpus(path, reach):
    """Write a .jsonl of documents, unless it exists. All calls write the same text."""
    if path.exists():
        return
    rng = np.random.default_rng(0)
    texts = [plain(d.text)[: 4 * reach] for d in load_corpus(DataConfig()).train if d.domain != "C"]
    chosen = rng.permutation(len(texts))[:DOCUMENTS]
    documents = ({"text": with_keys(texts[i], rng, reach), "domain": "keys"} for i in chosen)
    write_atomic(path, "".join(json.dumps(document) + "\n" for document in documents))


def plain(text):
    """Return text without keys and values: ASCII in lower case."""
    return "".join(char for char in text.lower() if char.isascii() and char not in PLANTED)


def with_keys(text, rng, reach):
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
