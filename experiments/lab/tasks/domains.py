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
        return self.rows(rng, np.broadcast_to(domain, (count,)))

    def rows(self, rng: np.random.Generator, domains: np.ndarray) -> Rows:
        """Draw a row of each given domain, int [n]."""
        count, domain = len(domains), domains[:, None]
        x = rng.integers(self.words, size=(count, self.pairs))
        y = self.maps[domain, x]
        y = np.where(rng.random(y.shape) < self.noise, rng.integers(self.words, size=y.shape), y)
        words = np.stack([x, y], axis=2).reshape(count, -1)
        tokens = np.concatenate([self.words + domain, words], axis=1)
        place = np.arange(self.length)
        return rows_of(
            tokens, np.broadcast_to((place > 0) & (place % 2 == 0), tokens.shape), domain
        )


@dataclass(frozen=True)
class ShiftingDomains(Domains):
    """The same domains in training batches whose mix changes after some batches.

    p_d = 1/D in each of the first `even` batches. Then F favoured domains have the share s, evenly,
    and the others have the rest. They are the first F, and after each `block` batches the next F.
    """

    name = "shifting domains"

    even: int = 400  # batches before the mix changes
    favoured: int = 4  # F, domains at a time
    share: float = 0.5  # s, of the favoured domains together
    block: int | None = None  # batches with the same favoured domains; None: they do not change

    def __post_init__(self):
        super().__post_init__()
        if self.together:
            raise ValueError("together=True leaves no mix to shift; use favoured=1 and share=1")
        if not 0 < self.favoured < self.count:
            raise ValueError(f"favoured={self.favoured} is not 1 … {self.count - 1} domains")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} is not in [0, 1]")
        if self.even < 0:
            raise ValueError(f"even={self.even} is no number of batches from 0")
        if self.block is not None and self.block < 1:
            raise ValueError(
                f"block={self.block} is no number of batches; it is 1 or more, or None"
            )

    def mix(self, batch: int) -> np.ndarray:
        """Return p [D], the share of each domain in a training batch, which counts from 0."""
        if batch < self.even:
            return np.full(self.count, 1 / self.count)
        turn = 0 if self.block is None else (batch - self.even) // self.block
        favoured = (turn * self.favoured + np.arange(self.favoured)) % self.count
        p = np.full(self.count, (1 - self.share) / (self.count - self.favoured))
        p[favoured] = self.share / self.favoured
        return p

    def sample_at(self, batch: int, rng: np.random.Generator, count: int) -> Rows:
        return self.rows(rng, rng.choice(self.count, size=count, p=self.mix(batch)))

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        """Draw rows of the first batch after the change."""
        return self.sample_at(self.even, rng, count)

    def held_out(self, count: int) -> Rows:
        """Return rows of all domains evenly."""
        rng = np.random.default_rng(HELD_OUT)
        return self.rows(rng, rng.integers(self.count, size=count))
