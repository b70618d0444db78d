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
    for context, byte in [
        (b"th", b"e"),
        (b"\0\0", b"a"),
        (b"\0\0", b"z"),
        (b"zz", b"e"),
        (b"zt", b"h"),
        (b"\xc3\xa9", b"\n"),
    ]:
        gram = np.array([context[0] << 16 | context[1] << 8 | byte[0]])
        expected = witten_bell(TRAIN, context, byte[0])
        np.testing.assert_allclose(model.probabilities(gram), expected, rtol=1e-12)  # rounding of a few operations


def test_documents_are_scored_independently():
    """A document is never context for another, and the zeros before each cost nothing."""
    model = Order2(TRAIN)
    together = model.bits(TRAIN)
    apart = [model.bits([d]) for d in TRAIN]
    assert together[1] == sum(count for _, count in apart) == sum(map(len, TRAIN))
    np.testing.assert_allclose(together[0], sum(bits for bits, _ in apart), rtol=1e-12)  # order of a sum


def test_noise_costs_8_bits():
    """And up to one more, because a byte seen once gets half the weight."""
    noise = np.random.default_rng(0).integers(256, size=(2, 50_000), dtype=np.uint8)
    bits, size = Order2([noise[0].tobytes()]).bits([noise[1].tobytes()])
    assert 8.0 < bits / size < 9.0
    with pytest.raises(ValueError, match="no training bytes"):
        Order2([])
