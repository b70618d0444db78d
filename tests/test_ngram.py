"""The order-2 byte model equals its equations, and scores documents apart."""

from collections import Counter

import numpy as np
import pytest

from dsv3_jax.report.ngram import Order2

TRAIN = [b"the cat sat on the mat. " * 3, b"", b"a", "naïve café\n".encode() * 4]


def witten_bell(documents, context, byte):
    """Compute the docstring's equation for one byte."""
    windows = [b"\0\0" + d for d in documents]
    if context is None:
        return 1 / 256
    n = len(context)
    # In lower orders the zeros before a document are context but never the predicted byte.
    after = Counter(w[i] for w in windows for i in range(2, len(w)) if w[i - n : i] == context)
    lower = witten_bell(documents, context[1:] if context else None, byte)
    if not after:
        return lower
    return (after[byte] + len(after) * lower) / (sum(after.values()) + len(after))


def test_equals_the_equations():
    model = Order2(TRAIN)
    # two bytes of context, and one
    for gram in (b"the", b"\0\0a", b"\0\0z", b"zze", b"zth", b"\xc3\xa9\n"):
        expected = witten_bell(TRAIN, gram[:2], gram[2])
        gram = np.array([int.from_bytes(gram, "big")])
        # rounding of a few operations
        np.testing.assert_allclose(model.probabilities(gram), expected, rtol=1e-12)


def test_documents_are_scored_independently():
    model = Order2(TRAIN)
    together = model.bits(TRAIN)
    apart = [model.bits([d]) for d in TRAIN]
    assert together[1] == sum(count for _, count in apart) == sum(map(len, TRAIN))
    # order of a sum
    np.testing.assert_allclose(together[0], sum(bits for bits, _ in apart), rtol=1e-12)
    with pytest.raises(ValueError, match="no training bytes"):
        Order2([])
