"""Induction: rows are Markov chains of their own, whose next token must be read off earlier ones.

    row   x_1 … x_T,   x_t ~ P(x_{t−m} … x_{t−1}),   the row's P has lines of Dirichlet(α, …, α)
    asked every token after the first m

Nothing of a row's P is in the weights. A model that counts the row's tokens alone stays at
`bits_of_order(0)`. To reach the optimum, it must find earlier places of the last token, or of the
last m tokens, and count what came next. An induction head does so. With order m = 2 the last two
tokens are a name. The optimum is the mean of the posterior,

    p(x_t = j | x_{t−m} … x_{t−1} = c) = (n_cj + α) / (n_c + Sα),   n the counts in the row so far.

Its bits are measured on the held-out rows. The difficulty is the number of lines of P, S^m.
Source: arXiv 2402.11004, where small models pass from the counts of tokens to those of pairs in a
sudden step.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from experiments.lab.tasks.task import Rows, Task, bits_of, require_alphabet, rows_of

MEASURED = 2048  # held-out rows on which predictors are measured


@dataclass(frozen=True)
class Chains(Task):
    """Chains of S states and order m."""

    name = "chains"

    states: int = 4  # S
    order: int = 1  # m
    tokens: int = 64  # T
    alpha: float = 0.2  # of the Dirichlet distribution; near 0 each line has one likely token

    def __post_init__(self):
        require_alphabet(states=self.states)
        if not 0 < self.order < self.tokens:
            raise ValueError(f"order={self.order} is not from 1 to below tokens={self.tokens}")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} is not positive")

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def chance_bits(self) -> float:
        return bits_of(self.states)

    @property
    def best_bits(self) -> float:
        return self.bits_of_order(self.order)

    @property
    def bits_without_pairs(self) -> float:
        """Mean bits of an asked token for a model that looks back one token less."""
        return self.bits_of_order(self.order - 1)

    def bits_of_order(self, order: int) -> float:
        """Mean bits of an asked token by counts of what followed a row's last `order` tokens.

        For the chain's own order it is the optimum; a smaller one has the same α.
        """
        return _bits_of_order(self, order)

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        lines = self.states**self.order
        below = rng.dirichlet([self.alpha] * self.states, size=(count, lines)).cumsum(axis=-1)
        tokens = np.zeros((count, self.tokens), np.int64)
        tokens[:, : self.order] = rng.integers(self.states, size=(count, self.order))
        drawn, row = rng.random((count, self.tokens)), np.arange(count)
        for t in range(self.order, self.tokens):
            line = _line(tokens[:, t - self.order : t], self.states)
            passed = drawn[:, t, None] > below[row, line, :-1]  # the last bound is 1
            tokens[:, t] = passed.sum(axis=1)
        answers = np.broadcast_to(np.arange(self.tokens) >= self.order, tokens.shape)
        return rows_of(tokens, answers)


def _line(last: np.ndarray, states: int) -> np.ndarray:
    """The index of the line of P that the last tokens [rows, m] choose."""
    line = np.zeros(len(last), np.int64)
    for column in last.T:
        line = line * states + column
    return line


@cache
def _bits_of_order(task: Chains, order: int) -> float:
    tokens = task.held_out(MEASURED).tokens.astype(np.int64)
    row = np.arange(len(tokens))
    counts = np.full((len(tokens), task.states**order, task.states), task.alpha)
    nats = 0.0
    for t in range(order, task.tokens):
        line = _line(tokens[:, t - order : t], task.states)
        seen, new = counts[row, line], tokens[:, t]
        if t >= task.order:
            nats -= np.log(seen[row, new] / seen.sum(axis=1)).sum()
        counts[row, line, new] += 1
    return nats / (len(tokens) * (task.tokens - task.order)) / np.log(2)
