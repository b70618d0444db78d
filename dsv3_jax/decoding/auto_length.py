"""`draft_length="auto"`: between compiled parts, the host chooses how many drafts a step makes.

    A_p   share of tried drafts p that were accepted, with one more that is: lengths that are
          little tried are tried
    E(J)  1 + A_1 + … + A_J, tokens of a step
    t(J)  seconds of a step, the least of its last parts and of longer lengths'; until J has run,
          the next shorter one's

The shortest length whose E(J) / t(J) is within 2 % of the largest is chosen. Now and then what the
others have shown is forgotten, so that they are tried again: after twice as many tokens each time
that this changes nothing.

The choice depends on past parts alone, so sampled text keeps its distribution. With a drafter that
samples, a seed's text depends on the choices, and these on the clock.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mtp import HEADS

TRIAL = 8  # tokens of a length's first part; a chosen length's parts grow
LONGEST_PLAIN, LONGEST_DRAFTED = 512, 128  # tokens of a part: accepted drafts may become fewer
HALF_LIFE = 128  # tried drafts after which an earlier one weighs half
SOONEST, LATEST = 512, 2048  # tokens after which other lengths are tried again


def draft_lengths(draft: Any, cfg: ModelConfig) -> tuple[int, ...]:
    """The lengths to choose from, with 0 for plain steps.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> draft_lengths("mtp", preset("tiny")), draft_lengths("lookup", preset("tiny"))
        ((0, 1, 2, 4), (0, 1, 2, 4, 8))
    """
    least = 1
    most = 8 if draft == "lookup" else 4
    if draft == "mtp":
        # such a head must read every position
        least = cfg.mtp_depth if HEADS[cfg.mtp_kind].remembers else 1
        most = 4 if cfg.head_kind.reads_tokens else cfg.mtp_depth
    return tuple(sorted({0, least, *(n for n in (1, 2, 4, 8) if least <= n <= most)}))


class LengthChoice:
    """Steps and accepted drafts of each length so far, and the choice of the next length.

    Example:
        >>> choice = LengthChoice((0, 1, 2))
        >>> choice.next()  # drafts a step, tokens
        (0, 8)
        >>> for _ in range(2):
        ...     choice.add(0, steps=8, tried=8, accepted=[], seconds=0.8)
        >>> choice.next()
        (1, 8)
        >>> choice.add(1, steps=4, tried=4, accepted=[4], seconds=0.6)
        >>> choice.next()
        (2, 8)
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = lengths
        self.best = 0
        self.start: dict[int, float] = {}  # seconds of a part without steps
        self.seconds = {length: deque[float](maxlen=5) for length in lengths}  # of a step
        self.accepted, self.tried = np.zeros((2, lengths[-1]))
        self.part = TRIAL
        self.known = 0.0
        self.patience = SOONEST

    def next(self) -> tuple[int, int]:
        """(Drafts a step, tokens) of the next part."""
        expected = np.cumsum([1.0, *np.minimum.accumulate((self.accepted + 1) / (self.tried + 1))])
        cost: list[float] = []
        for length in self.lengths:
            cost.append(min(self.seconds[length] or cost[-1:] or [0.0]))
            if length and not self.seconds[length]:
                break
        # A step does all that one with fewer drafts does, so that one takes no longer, whatever its
        # parts took.
        least = np.minimum.accumulate(cost[::-1])[::-1]
        worth = expected[list(self.lengths[: len(cost)])] / np.maximum(least, 1e-9)
        best = self.lengths[int(np.argmax(worth >= 0.98 * worth.max()))]
        # one slow part shall not make plain steps lose
        for length, parts in ((0, 2), (self.lengths[1], 1)):
            if len(self.seconds[length]) < parts:
                return length, TRIAL
        if not self.seconds[best]:
            return best, TRIAL
        if best != self.best:
            self.best = best
            self.part = TRIAL
            self.known = 0.0
            self.patience = SOONEST
        self.part = min(2 * self.part, LONGEST_DRAFTED if best else LONGEST_PLAIN)
        # others are tried within a text, too
        return best, min(self.part, int(self.patience - self.known) + 1)

    def add(
        self,
        length: int,
        steps: int,
        tried: int,
        accepted: np.ndarray | Sequence[int],
        seconds: float,
    ) -> None:
        """Remember a part.

        Args: tried, accepted: how many of the first drafts were tried, and by position how many
            were accepted.
        """
        self.seconds[length].append(max(seconds - self.start.get(length, 0.0), seconds / 2) / steps)
        fade = 0.5 ** (tried / HALF_LIFE)
        self.accepted[:length] = self.accepted[:length] * fade + accepted[:length]
        self.tried[:length] = self.tried[:length] * fade + tried
        self.known += steps * (1 + sum(accepted) / max(tried, 1))
        if self.known > self.patience:
            self.known = 0.0
            self.patience = min(2 * self.patience, LATEST)
            self.accepted[self.best :], self.tried[self.best :] = 0, 0
            for other in set(self.lengths) - {self.best}:
                self.seconds[other].clear()
