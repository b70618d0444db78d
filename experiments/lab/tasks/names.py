"""Induction over two-token names: once a row has said a name, its first token tells the second one.

    names  N pairs (x, y) of a row: the x are N different of P, each y is one of P
    row    x_1 … x_T; at each place both tokens of a name with probability ρ, else one of W words
    asked  every token after the first

Nothing of a row's pairs is in the weights. A model that knows which names the row has said can tell
the next first token from words. The second token needs more: a model must find an earlier place of
the first one, and read what followed. An induction head does so. With all tokens asked a small
model learns it, with the second ones alone it does not in reasonable time. The difficulty is the
number of names and of words. The optimum, with s names said before:

    p(w) = (1 − ρ) / W
    p(x) = ρ / N if x was said before, else ρ (N − s) / N / (P − s)
    p(y | x) = 1 if x was said before, else 1 / P

Its bits are measured on the held-out rows.
Source: arXiv 2404.19737, figure 7, which puts names of two tokens into children's stories.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from experiments.lab.tasks.task import Rows, Task, bits_of, require_alphabet, rows_of

MEASURED = 2048  # held-out rows on which predictors are measured


@dataclass(frozen=True)
class Names(Task):
    """N names of two tokens in rows of T tokens."""

    name = "names"

    names: int = 4  # N
    tokens: int = 64  # T
    share: float = 0.8  # ρ, of names among places
    parts: int = 8  # P, alphabet of first tokens, and of second ones
    words: int = 4  # W

    def __post_init__(self):
        require_alphabet(firsts=self.parts, seconds=self.parts, words=self.words)
        if not 0 < self.names <= self.parts:
            raise ValueError(
                f"names={self.names} is not from 1 to parts={self.parts}, "
                "the first tokens that differ"
            )
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} is not above 0 and at most 1")

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def chance_bits(self) -> float:
        return bits_of(2 * self.parts + self.words)

    @property
    def best_bits(self) -> float:
        return _measured_bits(self)[0]

    @property
    def bits_without_pairs(self) -> float:
        """Mean bits of a token if each second token is taken evenly from those that were said."""
        return _measured_bits(self)[1]

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        firsts = rng.permuted(np.tile(np.arange(self.parts), (count, 1)), axis=1)
        seconds = self.parts + rng.integers(self.parts, size=(count, self.names))
        is_name = rng.random((count, self.tokens)) < self.share
        said = rng.integers(self.names, size=(count, self.tokens))
        word = 2 * self.parts + rng.integers(self.words, size=(count, self.tokens))
        tokens, row = np.zeros((count, self.tokens), np.int64), np.arange(count)
        inside = np.zeros(count, bool)  # the token before was the first one of a name
        for t in range(self.tokens):
            place = np.where(is_name[:, t], firsts[row, said[:, t]], word[:, t])
            tokens[:, t] = np.where(inside, seconds[row, said[:, t - 1]], place)
            inside = ~inside & is_name[:, t]
        return rows_of(tokens, np.broadcast_to(np.arange(self.tokens) > 0, tokens.shape))


@cache
def _measured_bits(task: Names) -> tuple[float, float]:
    """The bits of the optimum, and of the same without knowledge of pairs."""
    tokens = task.held_out(MEASURED).tokens.astype(np.int64)
    row, parts, names = np.arange(len(tokens)), task.parts, task.names
    # The token before was a first one; it was said before that.
    inside, again = np.zeros((2, len(tokens)), bool)
    known = np.zeros((len(tokens), parts), bool)  # first tokens that were said
    seconds = np.zeros((len(tokens), parts))  # of how many of these names each is the second token
    nats = np.zeros(2)
    for t, token in enumerate(tokens.T):
        said, part = known.sum(axis=1), token % parts
        is_first = ~inside & (token < parts)
        new = (names - said) / names / np.maximum(parts - said, 1)
        of_place = np.where(
            is_first, task.share * np.where(known[row, part], 1 / names, new), 1 - task.share
        )
        of_place[token >= 2 * parts] /= task.words
        evenly = seconds[row, part] / np.maximum(seconds.sum(axis=1), 1)
        for i, of_second in enumerate((1.0, evenly)):
            p = np.where(inside, np.where(again, of_second, 1 / parts), of_place)
            nats[i] -= np.log(p).sum() if t else 0
        np.add.at(seconds, (row[inside & ~again], part[inside & ~again]), 1)
        again = known[row, part] & is_first
        known[row[is_first], part[is_first]] = True
        inside = is_first
    best, without = nats / (len(tokens) * (task.tokens - 1)) / np.log(2)
    return float(best), float(without)
