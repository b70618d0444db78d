"""Two hops over stored maps: c = g_j(f_i(a)), whose parts are trained as facts of their own.

    first map    a i b x   b = f_i(a), asked at b
    second map   x b j c   c = g_j(b), asked at c
    two hops     a i j c   c = g_j(f_i(a)), asked at c; b is not in the row

There are M maps of each kind. All are permutations of N entities, drawn once, so (i, j) tells
nothing of c. A share of the N·M² triples (a, i, j) is held out. Both of their parts, f_i at a and
g_j at f_i(a), are trained as facts, and within other triples. A model that only stores triples
knows nothing of a held-out one. To answer it, a model looks up b, and then c at b: the second step
needs the first.

The difficulty is N, M, and the number of triples for each fact, M/2. The optimum is 0 bits, also
for held-out triples, as all maps can be known.
Source: arXiv 2405.15071, where held-out triples are answered long after seen ones, and the sooner
the more triples there are for each fact.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from experiments.lab.tasks.task import HELD_OUT, Rows, Task, bits_of, require_alphabet, rows_of

KINDS = ("first map", "second map", "seen", "held out")  # the last two: triples
FIRST, SEEN, UNSEEN = 0, 2, 3


@dataclass(frozen=True)
class TwoHops(Task):
    """N entities a, b and c, with tokens of their own, and M maps of each kind."""

    name = "two_hops"

    entities: int = 16  # N
    maps: int = 32  # M
    triples: float = 0.75  # share of rows with two hops in training; the others are of single maps
    unseen: float = 0.125  # share of triples that is held out
    table_seed: int = 0

    def __post_init__(self):
        require_alphabet(entities=3 * self.entities, maps=2 * self.maps, blank=1)
        if not 0 <= self.triples <= 1:
            raise ValueError(f"triples={self.triples} is not a share from 0 to 1")
        seen, unseen = self.split
        if not len(seen) or not len(unseen):
            raise ValueError(
                f"unseen={self.unseen} holds {len(unseen)} of {len(seen) + len(unseen)} "
                "triples out; some must be seen, and some held out"
            )

    @property
    def length(self) -> int:
        return 4

    @property
    def domains(self) -> tuple[str, ...]:
        return KINDS

    @property
    def chance_bits(self) -> float:
        return bits_of(self.entities)

    @cached_property
    def tables(self) -> np.ndarray:
        """f and g, [2, M, N]."""
        ordered = np.tile(np.arange(self.entities), (2, self.maps, 1))
        return np.random.default_rng(self.table_seed).permuted(ordered, axis=2)

    @cached_property
    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Triples as indices into [N, M, M]: the seen ones and the held-out ones."""
        count = self.entities * self.maps**2
        order = np.random.default_rng([self.table_seed, HELD_OUT]).permutation(count)
        unseen = max(round(self.unseen * count), 0)
        return order[unseen:], order[:unseen]

    def sample(self, rng: np.random.Generator, count: int) -> Rows:
        single = rng.integers(SEEN, size=count)
        kind = np.where(rng.random(count) < self.triples, SEEN, single)
        return self._rows(kind, rng.choice(self.split[0], size=count))

    def held_out(self, count: int) -> Rows:
        """Return rows of all kinds in turn. Only triples of the last kind are not in training."""
        rng = np.random.default_rng(HELD_OUT)
        kind = np.arange(count) % len(KINDS)
        seen, unseen = (rng.choice(triples, size=count) for triples in self.split)
        return self._rows(kind, np.where(kind == UNSEEN, unseen, seen))

    def _rows(self, kind: np.ndarray, triple: np.ndarray) -> Rows:
        """Return rows of some kinds; those of a single map are about a part of their triple."""
        n, m = self.entities, self.maps
        a, i, j = np.unravel_index(triple, (n, m, m))
        b = self.tables[0, i, a]
        c = self.tables[1, j, b]

        # Entities a, b and c, maps f and g, and the blank have ids of their own, in this order.
        b, c, f, g = n + b, 2 * n + c, 3 * n + i, 3 * n + m + j
        blank = np.full_like(a, 3 * n + 2 * m)
        layouts = ((a, f, b, blank), (blank, b, g, c), (a, f, g, c), (a, f, g, c))  # as KINDS
        tokens = np.stack([np.stack(row, axis=1) for row in layouts])[kind, np.arange(len(kind))]
        answers = np.arange(self.length) == np.where(kind == FIRST, 2, 3)[:, None]
        return rows_of(tokens, answers, kind[:, None])
