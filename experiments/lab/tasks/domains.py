"""A mixture of domains whose experts are known: each domain has its own random map from x to y.

    row    d  x_1 y_1  x_2 y_2 …,   y_i = map_d[x_i], or with probability `noise` any of n
    asked  each y

Domains share the tokens x and y but no knowledge. So the right division of the work is one expert
(or group of experts) for each domain: I(expert; domain) = log2 D bits at one expert a token. The
difficulty is D · n, the number of pairs to know. The optimum is the noise's entropy: with
q = 1 − noise + noise/n and r = noise/n,

    −q log2 q − (n − 1) r log2 r
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from experiments.lab.tasks.task import HELD_OUT, Rows, Task, bits_of, require_alphabet, rows_of


@dataclass(frozen=True)
class Domains(Task):
    """D domains with n words each."""

    name = "domains"

    count: int = 4  # D
    words: int = 64  # n
    pairs: int = 8  # of a row
    noise: float = 0.0
    together: bool = False  # in training, all rows of a batch are of one domain
    table_seed: int = 0

    def __post_init__(self):
        require_alphabet(domains=self.count, words=self.words)
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise={self.noise} is not in [0, 1)")

    @property
    def length(self) -> int:
        return 1 + 2 * self.pairs

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(f"domain {i}" for i in range(self.count))

    @property
    def chance_bits(self) -> float:
        return bits_of(self.words)

    @property
    def best_bits(self) -> float:
        other = self.noise / self.words
        right = 1 - self.noise + other
        wrong = (self.words - 1) * other * math.log2(other) if other else 0.0
        return -right * math.log2(right) - wrong

    @cached_property
    def maps(self) -> np.ndarray:
        """map_d[x], [D, n]."""
        return np.random.default_rng(self.table_seed).integers(
            self.words, size=(self.count, self.words)
        )

    def held_out(self, count: int) -> Rows:
        """Return rows of all domains, also where training has one domain a batch."""
        return replace(self, together=False).sample(np.random.default_rng(HELD_OUT), count)

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        domain = rng.integers(self.count, size=1 if self.together else count)
        domain = np.broadcast_to(domain[:, None], (count, 1))
        x = rng.integers(self.words, size=(count, self.pairs))
        y = self.maps[domain, x]
        y = np.where(rng.random(y.shape) < self.noise, rng.integers(self.words, size=y.shape), y)
        words = np.stack([x, y], axis=2).reshape(count, -1)
        tokens = np.concatenate([self.words + domain, words], axis=1)
        place = np.arange(self.length)
        return rows_of(
            tokens, np.broadcast_to((place > 0) & (place % 2 == 0), tokens.shape), domain
        )
