"""`draft_length="auto"`: the host chooses how many drafts a step makes, between compiled parts of some tokens.

    A_p      share of steps that accept draft p in recent parts, with one more that accepts all: what is not tried pays
    E(J)     1 + A_1 + … + A_J, tokens of a step
    t(J)     seconds of a step; until J has run, those of the next shorter length

The largest E(J) / t(J) is chosen. Lengths are tried in their order, each after the one before. Older parts weigh less,
so that a length that did not pay is tried again when little is known of it. A trial costs about one plain step, for it
ends when even one more accepted step would not pay.

The choice depends on past parts alone, so sampled text keeps its distribution. With a drafter that samples, a seed's
text depends on the choices, and these on the clock.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.mtp import HEADS

SHORTEST, LONGEST = 4, 128  # tokens of a part
HALF_LIFE = 256  # tokens after which a part weighs half
FORGOTTEN = 4 * HALF_LIFE


class Part(NamedTuple):
    """Some steps of one length."""

    length: int
    steps: int
    rows: int  # steps of sequences that were not done
    accepted: Sequence[int]  # drafts, by position
    seconds: float

    @property
    def tokens(self) -> float:
        """Of a sequence, mean."""
        return self.steps * (1 + sum(self.accepted) / max(self.rows, 1))


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


def choose(parts: Sequence[Part], lengths: Sequence[int]) -> tuple[int, int]:
    """Choose the next part from those before: (its drafts a step, its tokens).

    Example:
        >>> right, plain = Part(1, 2, 2, [2], seconds=0.3), Part(0, 4, 4, [], seconds=0.8)
        >>> choose([], (0, 1, 2)), choose([right], (0, 1, 2)), choose([right, plain], (0, 1, 2))
        ((1, 4), (0, 4), (2, 4))
    """
    timed: dict[int, list[Part]] = {}
    ran, age = dict.fromkeys(lengths, 0.0), 0.0
    accepted, tried = np.ones(lengths[-1]), np.ones(lengths[-1])
    for part in reversed(parts):
        weight = 0.5 ** (age / HALF_LIFE)
        timed.setdefault(part.length, []).append(part)
        accepted[: part.length] += weight * np.asarray(part.accepted[: part.length])
        tried[: part.length] += weight * part.rows
        ran[part.length] += weight * part.tokens
        age += part.tokens
        if age > FORGOTTEN:
            break
    expected = np.cumsum([1.0, *np.minimum.accumulate(accepted / tried)])
    worth, cost = {}, 0.0
    for length in lengths:
        if length in timed:
            cost = _median([(part.seconds / part.steps, part.steps) for part in timed[length][:5]])
        worth[length] = expected[length] / max(cost, 1e-9)
        if length and length not in timed:
            break
    # A short measurement may be slow by chance. Plain steps, the safe choice, are measured longer before they lose.
    worth[0] *= 1 + SHORTEST / max(ran[0], SHORTEST)
    first = [length for length in (lengths[1], 0) if length not in timed]
    best = first[0] if first else max(worth, key=worth.__getitem__)
    return best, int(np.clip(ran[best], SHORTEST, LONGEST))


def _median(weighted: list[tuple[float, int]]) -> float:
    """Of values with weights: a machine's delay in one of five parts is left out."""
    ordered = sorted(weighted)
    total = np.cumsum([weight for _, weight in ordered])
    return ordered[int(np.searchsorted(total, total[-1] / 2))][0]
