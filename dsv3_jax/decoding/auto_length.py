"""`draft_length="auto"`: the host chooses how many drafts a step makes, between compiled parts of some tokens.

    A_p   share of tried drafts p that were accepted, with one more that is: lengths that are little tried are tried
    E(J)  1 + A_1 + … + A_J, tokens of a step
    t(J)  seconds of a step, the median of its last parts; until J has run, those of the next shorter length

The largest E(J) / t(J) is chosen. What was accepted and timed is forgotten slowly, so that a length that lost is tried
again. The longer a length has run, the longer are its parts.

The choice depends on past parts alone, so sampled text keeps its distribution. With a drafter that samples, a seed's
text depends on the choices, and these on the clock.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mtp import HEADS

SHORTEST, LONGEST = 8, 512  # tokens of a part
HALF_LIFE = 1024  # tokens after which a part weighs half
LEAST = 1  # tokens of a length, so weighed, whose time is forgotten
FIRST = 64.0  # tokens of a text's first part, at most
OTHER_TEXTS = 16  # tried drafts that earlier requests weigh, at most


def draft_lengths(draft: Any, cfg: ModelConfig) -> tuple[int, ...]:
    """The lengths to choose from, with 0 for plain steps.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> draft_lengths("mtp", preset("tiny")), draft_lengths("lookup", preset("tiny"))
        ((0, 1, 2, 4), (0, 1, 2, 4, 8))
    """
    if draft == "lookup":
        return 0, 1, 2, 4, 8
    if draft != "mtp":
        return 0, 1, 2, 4
    least = cfg.mtp_depth if HEADS[cfg.mtp_kind].remembers else 1  # such a head must read every position
    most = 4 if cfg.head_kind.reads_tokens else cfg.mtp_depth
    return tuple(sorted({0, least, *(n for n in (1, 2, 4) if least <= n <= most)}))


class LengthChoice:
    """What parts of each length have shown, and the choice of the next.

    Example:
        >>> choice = LengthChoice((0, 1, 2))
        >>> choice.next()  # drafts a step, tokens
        (1, 8)
        >>> choice.add(1, steps=4, rows=4, accepted=[4], seconds=0.6)
        >>> choice.next()
        (0, 8)
        >>> choice.add(0, steps=8, rows=8, accepted=[], seconds=0.8)
        >>> choice.next()
        (2, 8)
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = lengths
        self.seconds = {length: deque[float](maxlen=5) for length in lengths}  # of a step
        self.start = dict.fromkeys(lengths, 0.0)  # seconds of a part of one step
        self.accepted, self.tried = np.zeros((2, lengths[-1]))
        self.tokens = dict.fromkeys(lengths, 0.0)

    def next(self) -> tuple[int, int]:
        """(Drafts a step, tokens) of the next part."""
        expected = np.cumsum([1.0, *np.minimum.accumulate((self.accepted + 1) / (self.tried + 1))])
        worth, cost = {}, 0.0
        for length in self.lengths:
            cost = median(self.seconds[length] or [cost])
            worth[length] = expected[length] / max(cost, 1e-9)
            if length and not self.seconds[length]:
                break
        best = max(worth, key=worth.__getitem__)
        for length in (0, self.lengths[1]):
            if not self.seconds[length]:
                best = length
        return best, int(np.clip(self.tokens[best], SHORTEST, LONGEST))

    def add(self, length: int, steps: int, rows: int, accepted: np.ndarray | Sequence[int], seconds: float) -> None:
        """Remember a part of at least one step.

        Args: rows: steps of sequences that were not done. accepted: drafts, by position.
        """
        tokens = steps * (1 + sum(accepted) / max(rows, 1))
        fade = 0.5 ** (tokens / HALF_LIFE)
        self.accepted *= fade
        self.tried *= fade
        for other in self.lengths:
            self.tokens[other] *= fade
            if self.tokens[other] < LEAST:  # it was too long ago: the machine may have been slow
                self.seconds[other].clear()
        # A part's start and its first step, with cold caches, take the host as long as some steps of a small model.
        start = self.start[length]
        own = (seconds - start) / max(steps - (start > 0), 1)
        self.seconds[length].append(max(own, seconds / steps / 2))
        self.accepted[:length] += accepted[:length]
        self.tried[:length] += rows
        self.tokens[length] += tokens

    def begin_text(self) -> None:
        """Let the texts before weigh little in the next, whose first parts are short."""
        factor = min(1.0, OTHER_TEXTS / max(*self.tried, 1.0))
        self.accepted *= factor
        self.tried *= factor
        self.tokens = {length: min(tokens, FIRST) for length, tokens in self.tokens.items()}
