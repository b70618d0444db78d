"""An order-2 model of bytes: what a next byte costs when only the two before it are known.

A language model that does not beat this number has learned less than a table of counts.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float64, Int


class Order2:
    """Interpolated Witten-Bell, from two bytes of context down to none and to the even distribution.

    P(c | h) = (n(h c) + t(h) P(c | h')) / (n(h) + t(h)), h' is h without its first byte,
    n counts, t(h) is the number of distinct bytes seen after h; where h was never seen, P(c | h) = P(c | h').
    A document begins as if two zero bytes stood before it; these are not scored.

    Args: train: the documents' bytes.
    Raises: ValueError when they are empty.
    Source: Witten and Bell, 1991; Chen and Goodman, 1998, section 2.5.
    """

    def __init__(self, train: Iterable[bytes]):
        grams = _trigrams(train)
        if not len(grams):
            raise ValueError("the order-2 model has no training bytes")
        self._counts = np.bincount(grams, minlength=256**3).astype(np.int32).reshape(256**2, 256)
        pairs = self._counts.reshape(256, 256, 256).sum(0)  # [b, c]
        order0 = _mix(pairs.sum(0)[None], np.full((1, 256), 1 / 256))
        self._order1 = _mix(pairs, np.broadcast_to(order0, (256, 256)))
        self._seen = self._counts.sum(1)
        self._kinds = np.count_nonzero(self._counts, axis=1)

    def probabilities(self, grams: Int[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """P(c | a b) of each gram a·256² + b·256 + c."""
        context, byte = np.divmod(grams, 256)
        lower = self._order1[context % 256, byte]
        seen, kinds = self._seen[context], self._kinds[context]
        mixed = (self._counts[context, byte] + kinds * lower) / np.maximum(seen + kinds, 1)
        return np.where(seen > 0, mixed, lower)

    def bits(self, documents: Iterable[bytes]) -> tuple[float, int]:
        """Bits that the documents cost, and their bytes."""
        grams = _trigrams(documents)
        return -float(np.log2(self.probabilities(grams)).sum()), len(grams)


def order2_bits_per_byte(train: Iterable[bytes], val: Iterable[bytes]) -> float:
    """Bits a byte of `val` under `Order2` fitted on `train`; both are documents' bytes.

    Raises: ValueError when either is empty.
    """
    bits, count = Order2(train).bits(val)
    if not count:
        raise ValueError("the order-2 model has no bytes to score")
    return bits / count


def _trigrams(documents: Iterable[bytes]) -> Int[np.ndarray, " n"]:
    """a·256² + b·256 + c for each byte c of each document and the two before it."""
    documents = list(documents)
    stream = np.frombuffer(b"".join(b"\0\0" + d for d in documents), np.uint8).astype(np.int32)
    if not len(stream):
        return stream
    grams = (stream[:-2] << 16) | (stream[1:-1] << 8) | stream[2:]
    # gram i ends at byte i + 2 of the stream: leave out those that end in a document's two zeros
    begins = np.cumsum([len(d) + 2 for d in documents])[:-1]
    kept = np.ones(len(grams), bool)
    kept[begins - 2] = kept[begins - 1] = False
    return grams[kept]


def _mix(counts: Int[np.ndarray, "n 256"], lower: Float64[np.ndarray, "n 256"]) -> Float64[np.ndarray, "n 256"]:
    """One step of interpolation, for rows of contexts; a row never seen is the lower order's."""
    seen, kinds = counts.sum(1, keepdims=True), np.count_nonzero(counts, axis=1, keepdims=True)
    mixed = (counts + kinds * lower) / np.maximum(seen + kinds, 1)
    return np.where(seen > 0, mixed, lower)
