"""Many keys at once: M pairs are planted, then each is asked for; the load on a cache row.

    row   p(k_1, v_1) … p(k_M, v_M)   q(k_π1) a(v_π1) … q(k_πM) a(v_πM),   π a permutation

As `retrieval`, but a model must tell all M keys apart at once. So the width of keys, latents and
heads matters. The difficulty is M. The optimum is 0 bits.
"""

from dataclasses import dataclass

import numpy as np

from experiments.lab.tasks.task import Rows, Task, bits_of, require_alphabet, rows_of


@dataclass(frozen=True)
class ManyKeys(Task):
    """M of K keys, with one of V values each."""

    name = "many_keys"

    planted: int = 16  # M
    keys: int = 48  # K
    values: int = 4  # V

    def __post_init__(self):
        require_alphabet(pairs=self.keys * self.values, questions=self.keys, answers=self.values)
        if not 1 <= self.planted <= self.keys:
            raise ValueError(f"planted={self.planted} is not from 1 to keys={self.keys}")

    @property
    def length(self) -> int:
        return 3 * self.planted

    @property
    def chance_bits(self) -> float:
        return bits_of(self.values)

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        keys = rng.permuted(np.tile(np.arange(self.keys), (count, 1)), axis=1)[:, : self.planted]
        values = rng.integers(self.values, size=keys.shape)
        order = rng.permuted(np.tile(np.arange(self.planted), (count, 1)), axis=1)
        asked, given = (np.take_along_axis(x, order, axis=1) for x in (keys, values))
        pairs = self.keys * self.values
        questions = np.stack([pairs + asked, pairs + self.keys + given], axis=2).reshape(count, -1)
        tokens = np.concatenate([keys * self.values + values, questions], axis=1)
        place = np.arange(self.length)
        answers = (place >= self.planted) & ((place - self.planted) % 2 == 1)
        return rows_of(tokens, np.broadcast_to(answers, tokens.shape))
