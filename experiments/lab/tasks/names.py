"""Induction over two-token names: x y v, where v follows the name (x, y) of this row.

    names  N pairs (x, y) from X first and X second tokens; each x and each y is in several names
    row    names in random order, each followed by its value of the row: x y v  x' y' v'  x y v …
    asked  v of each occurrence after the first

One token before v does not say which name it is: y is shared, so a model must match both tokens. Plain induction (one
token back) reaches log2 of the values of names that share y, at best. The difficulty is the number of names in a row.
The optimum is 0 bits. The smallest models stay at plain induction: that of tests/test_lab_tasks.py is left with 1.06
bits after 3,000 steps.
"""

from dataclasses import dataclass

import numpy as np

from experiments.lab.tasks.task import Rows, Task, bits_of, require_alphabet, rows_of


@dataclass(frozen=True)
class Names(Task):
    """N names from a square of X × X pairs of tokens, with one of V values each, `repeats` occurrences a row."""

    name = "names"

    names: int = 4  # N
    side: int = 2  # X: first tokens of a row, and second tokens of a row
    parts: int = 32  # alphabet of firsts, and of seconds
    values: int = 16  # V
    repeats: int = 20  # occurrences in a row

    def __post_init__(self):
        require_alphabet(firsts=self.parts, seconds=self.parts, values=self.values)
        if not 1 <= self.names <= self.side**2 or self.side > self.parts:
            raise ValueError(
                f"names={self.names} and side={self.side} do not fit: names are pairs of side² from parts={self.parts}"
            )

    @property
    def length(self) -> int:
        return 3 * self.repeats

    @property
    def chance_bits(self) -> float:
        return bits_of(self.values)

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        def some(of: int, number: int) -> np.ndarray:
            return rng.permuted(np.tile(np.arange(of), (count, 1)), axis=1)[:, :number]

        firsts, seconds, pairs = (
            some(self.parts, self.side),
            some(self.parts, self.side),
            some(self.side**2, self.names),
        )
        values = rng.integers(self.values, size=(count, self.names))
        said = rng.integers(self.names, size=(count, self.repeats))
        pair = np.take_along_axis(pairs, said, axis=1)
        x, y = np.divmod(pair, self.side)
        x, y = np.take_along_axis(firsts, x, axis=1), np.take_along_axis(seconds, y, axis=1)
        v = np.take_along_axis(values, said, axis=1)
        tokens = np.stack([x, self.parts + y, 2 * self.parts + v], axis=2).reshape(count, -1)
        earlier = np.stack([(said[:, :i] == said[:, i : i + 1]).any(1) for i in range(self.repeats)], axis=1)
        answers = np.zeros((count, self.repeats, 3), bool)
        answers[:, :, 2] = earlier
        return rows_of(tokens, answers.reshape(count, -1))
