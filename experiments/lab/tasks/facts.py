"""Facts to store: (a, b) → c at random, with nothing to infer; what is learnt is in the weights.

    row    a b c,   a ∈ 1…A, b ∈ 1…B, c = table[a, b] drawn once from 2^bits answers
    loss   −log2 p(c | a, b), asked at c alone
    known  bits − loss, for each of the A·B facts; a model stores A·B·(bits − loss) bits

The difficulty is the number of facts. The optimum is 0 bits: all facts are seen in training, and
held-out rows are the facts themselves.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.lab.tasks.task import Rows, Task, bits_of, require_alphabet, rows_of


@dataclass(frozen=True)
class Facts(Task):
    """A·B facts of some bits each. First and second tokens share ids, and differ by position."""

    name = "facts"

    firsts: int = 128  # A
    seconds: int = 128  # B
    bits: int = 6
    table_seed: int = 0

    def __post_init__(self):
        require_alphabet(keys=max(self.firsts, self.seconds), answers=2**self.bits)

    @property
    def length(self) -> int:
        return 3

    @property
    def chance_bits(self) -> float:
        return bits_of(2**self.bits)

    @cached_property
    def table(self) -> np.ndarray:
        """The answers, [A, B]."""
        return np.random.default_rng(self.table_seed).integers(
            2**self.bits, size=(self.firsts, self.seconds)
        )

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        return self._rows(rng.integers(self.firsts * self.seconds, size=count))

    def held_out(self, count: int) -> Rows:
        """Return the first facts in a fixed random order, each once, or all of them."""
        order = np.random.default_rng(self.table_seed).permutation(self.firsts * self.seconds)
        return self._rows(order[:count])

    def _rows(self, facts: np.ndarray) -> Rows:
        first, second = np.divmod(facts, self.seconds)
        answer = max(self.firsts, self.seconds) + self.table[first, second]
        tokens = np.stack([first, second, answer], axis=1)
        return rows_of(tokens, np.broadcast_to(np.arange(3) == 2, tokens.shape))
