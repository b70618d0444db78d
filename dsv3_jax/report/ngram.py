"""An order-2 model of bytes: the cost of the next byte when only the two bytes before it are known.

A language model that does not beat this baseline has learned less than a table of counts.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, Int


class Order2:
    """Interpolated Witten-Bell smoothing, from two bytes of context down to none and to uniform.

    P(c | h) = (n(h c) + t(h) P(c | h')) / (n(h) + t(h))

    h' is h without its first byte, n counts, and t(h) is the number of distinct bytes seen after h.
    For a context that was never seen, P(c | h) = P(c | h'). Two zero bytes, which are not scored,
    precede each document.

    Args: train: the documents' bytes.
    Raises: ValueError when they are empty.
    Source: Witten and Bell, 1991; Chen and Goodman, 1998, section 2.5.

    Example:
        >>> model = Order2([b"abcabc"])
        >>> bits, num_bytes = model.bits([b"abc"])
        >>> num_bytes, bits < 3 * 8
        (3, True)
    """

    def __init__(self, train: Iterable[bytes]):
        grams = _trigrams(train)
        if not len(grams):
            raise ValueError(
                "the order-2 model has no training bytes; give it a document that is not empty"
            )

        # Counts of c after a b, and from their sums those of c after b, and of c.
        counts = np.bincount(grams, minlength=256**3).astype(np.int32)
        pairs = counts.reshape(256, 256, 256).sum(0)  # [b, c]
        single = pairs.sum(0)[None]  # [1, c]

        # Each order leans on the one below, and the lowest on uniform bytes.
        order0 = _interpolate(single, np.full((1, 256), 1 / 256))
        self._order1 = _interpolate(pairs, np.broadcast_to(order0, (256, 256)))
        self._counts = counts.reshape(256**2, 256)
        self._num_seen = self._counts.sum(1)
        self._num_distinct = np.count_nonzero(self._counts, axis=1)

    def probabilities(self, grams: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Return P(c | a b) of each trigram a·256² + b·256 + c."""
        context, byte = np.divmod(grams, 256)
        lower = self._order1[context % 256, byte]
        seen = self._num_seen[context]
        distinct = self._num_distinct[context]
        mixed = (self._counts[context, byte] + distinct * lower) / np.maximum(seen + distinct, 1)
        return np.where(seen > 0, mixed, lower)

    def bits(self, documents: Iterable[bytes]) -> tuple[float, int]:
        """Return (the documents' cost in bits, the number of their bytes)."""
        grams = _trigrams(documents)
        return -float(np.log2(self.probabilities(grams)).sum()), len(grams)


def _trigrams(documents: Iterable[bytes]) -> Int[np.ndarray, " n"]:
    """Return a·256² + b·256 + c for each byte c of each document and the two bytes before it."""
    documents = list(documents)
    joined = b"".join(b"\0\0" + document for document in documents)
    stream = np.frombuffer(joined, np.uint8).astype(np.int32)
    if not len(stream):
        return stream
    grams = (stream[:-2] << 16) | (stream[1:-1] << 8) | stream[2:]

    # Trigram i ends at byte i + 2 of the stream. Those that end in a document's two zeros are
    # dropped.
    starts = np.cumsum([len(d) + 2 for d in documents])[:-1]
    scored = np.ones(len(grams), bool)
    scored[starts - 2] = False
    scored[starts - 1] = False
    return grams[scored]


def _interpolate(
    counts: Int[np.ndarray, "n 256"], lower: Float64[np.ndarray, "n 256"]
) -> Float64[np.ndarray, "n 256"]:
    """Mix counts of n contexts with the lower order's probabilities, which unseen ones keep."""
    seen = counts.sum(1, keepdims=True)
    distinct = np.count_nonzero(counts, axis=1, keepdims=True)
    mixed = (counts + distinct * lower) / np.maximum(seen + distinct, 1)
    return np.where(seen > 0, mixed, lower)
