"""One-hop retrieval: a token carries a key and its value; later the key is asked for.

    planted   p(k, v), one token; each key once a row, with a value drawn for the row
    question  q(k) a(v): the answer is the value that was planted with k; asked at each a(v)

A single attention step answers: q(k) looks for p(k, ·) and copies its value. So what is measured is
reach: can a position be found at a distance that training did not have? Between planting and asking
there is nothing else than other keys' tokens. The difficulty is the length of a row. The optimum is
0 bits.
"""

from dataclasses import dataclass

import numpy as np

from experiments.lab.tasks.task import HELD_OUT, Rows, Task, bits_of, require_alphabet, rows_of


@dataclass(frozen=True)
class Retrieval(Task):
    """K keys with one of V values each, in rows of `tokens` tokens."""

    name = "retrieval"

    tokens: int = 64
    keys: int = 16
    values: int = 8

    def __post_init__(self):
        require_alphabet(planted=self.keys * self.values, questions=self.keys, answers=self.values)
        if self.tokens < 8:
            raise ValueError(f"tokens={self.tokens} is below 8: a row needs a key, and questions")

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def chance_bits(self) -> float:
        return bits_of(self.values)

    def _planted(self, key: np.ndarray | int, value: np.ndarray | int):
        return np.asarray(key) * self.values + value

    def _question(self, key):
        return self.keys * self.values + key

    def _answer(self, value):
        return self.keys * (self.values + 1) + value

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        tokens = np.empty((count, self.tokens), np.int64)
        answers = np.zeros((count, self.tokens), bool)
        for row in range(count):
            tokens[row], answers[row] = self._row(rng, self.tokens, range(self.keys))
        return rows_of(tokens, answers)

    def _row(self, rng: np.random.Generator, length: int, keys) -> tuple[np.ndarray, np.ndarray]:
        """Fill a row: each key is planted once, one at the start, and questions fill the rest.

        A key's time is log-uniform, so that short rows have several keys too.
        """
        order, count = rng.permutation(list(keys)), len(keys)
        values = rng.integers(self.values, size=self.keys)
        times = np.sort(np.exp(rng.uniform(0, np.log(length), size=count)))
        times[0] = 0
        tokens, answers = np.empty(length, np.int64), np.zeros(length, bool)
        pos = known = 0
        while pos < length:
            if (known < count and times[known] <= pos) or pos == length - 1:
                # A last single token holds no question: plant another key, or the last again.
                key = order[min(known, count - 1)]
                tokens[pos] = self._planted(key, values[key])
                known, pos = min(known + 1, count), pos + 1
                continue
            key = order[rng.integers(known)]
            tokens[pos : pos + 2] = self._question(key), self._answer(values[key])
            answers[pos + 1] = True
            pos += 2
        return tokens, answers

    def questions(self, length: int, distance: int, count: int) -> Rows:
        """Return rows of `length` that end with a question, planted `distance` before its answer.

        The other keys fill the row. No earlier question of this key gives its value away.

        Raises: ValueError for a distance that the row does not have.
        """
        if not 2 <= distance < length:
            raise ValueError(
                f"distance={distance} is not from 2 to {length - 1}, "
                f"within a row of length={length}"
            )
        rng = np.random.default_rng([HELD_OUT, length, distance])
        tokens, answers = np.empty((count, length), np.int64), np.zeros((count, length), bool)
        answers[:, -1] = True
        for row in range(count):
            key, value = int(rng.integers(self.keys)), int(rng.integers(self.values))
            others = [k for k in range(self.keys) if k != key]
            place = length - 1 - distance
            # Two fillings with the planted token between: a question of two tokens is never cut.
            before = self._row(rng, place, others)[0] if place else np.zeros(0, np.int64)
            between = (
                self._row(rng, distance - 2, others)[0] if distance > 2 else np.zeros(0, np.int64)
            )
            end = [self._question(key), self._answer(value)]
            tokens[row] = np.concatenate([before, [self._planted(key, value)], between, end])
        return rows_of(tokens, answers)
