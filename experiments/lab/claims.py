"""Claims of a study, and their verdicts: yes, no, too small to tell here, or no verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.lab.results import Key, Results, lookup
from experiments.lab.statistics import (
    Difference,
    Noise,
    Table,
    against_constant,
    compare,
    holm,
    pool,
    smallest_visible,
)
from experiments.lab.tables import format_number, markdown_table

STAKE = 3  # least cost of taking a study's subject away, in units of the noise of a run

Answer = Literal["yes", "no", "too small to tell here", "no verdict"]


@dataclass(frozen=True)
class Claim:
    """A claim: a number of `variant` is lower or higher than `against`'s, or equal within `margin`.

    Attributes:
        text: the claim, as a sentence that "yes" agrees to.
        against: another variant, or a constant such as a chance level.
        key: the number, see `Results.values`.
        expect: what the papers lead to expect.
        margin: for "equal": the largest difference that counts as equal.
        stake: the name of the manipulation check that the claim needs, in `Study.stakes`. "" means
            that the claim is about the subject itself.
        published: the papers' difference in the same unit, if there is one.
    """

    text: str
    variant: str
    against: str | float
    key: Key = "val_loss"
    expect: Literal["lower", "higher", "equal"] = "lower"
    margin: float = 0.0
    unit: str = "nats"
    digits: int = 3
    stake: str = ""
    published: float | None = None


@dataclass(frozen=True)
class Stake:
    """A manipulation check: what it costs to take a study's subject away.

    Attributes:
        text: what is taken away, as in "routed experts off".
        cost: (results) → the cost by seed. An empty array means that it is not measured.
        key: the number that the cost is in; its noise is the yardstick.
    """

    text: str
    cost: Callable[[Results], np.ndarray]
    key: Key = "val_loss"
    unit: str = "nats"
    digits: int = 3


@dataclass(frozen=True)
class Verdict:
    """The answer to a claim, and the numbers that it rests on."""

    claim: Claim
    answer: Answer
    difference: Difference
    adjusted_p: float
    visible: float  # smallest difference that would have been seen with a power of 80 %
    reason: str  # why there is no verdict; else empty


@dataclass(frozen=True)
class Check:
    """A manipulation check's outcome."""

    stake: Stake
    cost: float | None  # None: not measured
    noise: float

    @property
    def passed(self) -> bool:
        """Whether the cost is at least STAKE times the noise."""
        return self.cost is not None and self.cost >= STAKE * self.noise

    @property
    def sentence(self) -> str:
        """One sentence on the outcome."""
        stake, digits = self.stake, self.stake.digits
        if self.cost is None:
            return (
                f"Manipulation check, {stake.text}: not measured, "
                "so claims that need it get no verdict."
            )
        cost, noise = (format_number(x, digits) for x in (self.cost, self.noise))
        outcome = "passed"
        if not self.passed:
            outcome = f"below {STAKE} × the noise, so claims that need it get no verdict"
        return (
            f"Manipulation check, {stake.text}: costs {cost} {stake.unit}, "
            f"noise of a run {noise}: {outcome}."
        )


# (number, the compared variants) → its noise; without variants, that of independent runs
NoiseOf = Callable[..., Noise]


def table_of(results: Results, key: Key) -> Table:
    """Return the numbers of all variants that have it, variant → seed → number."""
    table: dict[str, dict[int, float]] = {}
    for variant, seeds in results.runs.items():
        for seed, record in seeds.items():
            try:
                table.setdefault(variant, {})[int(seed)] = float(lookup(record["numbers"], key))
            except (KeyError, IndexError, TypeError):  # some variants lack some numbers
                continue
    return {variant: numbers for variant, numbers in table.items() if numbers}


def distinct(table: Table) -> Table:
    """Leave out variants whose numbers are another's, as heads on one trunk: they are one run."""
    kept: dict[str, Mapping[int, float]] = {}
    for variant, numbers in table.items():
        if numbers not in kept.values():
            kept[variant] = numbers
    return kept


def independent(table: Table, begun: Mapping[str, str], compared: Sequence[str] = ()) -> Table:
    """Leave out what counts runs more than once: variants that continue one parent are near copies.

    Two of them that are compared differ less than two independent runs, so their noise is that of
    such variants alone. Else one variant of each parent counts: the compared one, or the first.

    Args: begun: variant → its parent, whose weights it begins with.

    >>> table, begun = {"a": {}, "b": {}, "c": {}, "d": {}}, {"b": "a", "c": "a", "d": "a"}
    >>> [list(independent(table, begun, pair)) for pair in (("b", "c"), ("c", "a"), ())]
    [['b', 'c', 'd'], ['a', 'c'], ['a', 'b']]
    """
    parents = {begun.get(variant) for variant in compared}
    if len(compared) == 2 and len(parents) == 1 and None not in parents:
        return {
            variant: numbers for variant, numbers in table.items() if begun.get(variant) in parents
        }

    chosen: dict[tuple[str, bool], str] = {}  # the variant that counts
    for variant in (*compared, *table):
        chosen.setdefault((begun.get(variant, variant), variant in begun), variant)
    return {variant: numbers for variant, numbers in table.items() if variant in chosen.values()}


def noise_within(results: Results) -> NoiseOf:
    """Return a function that pools a number's noise over the variants of one study."""

    def noise(key: Key, compared: Sequence[str] = ()) -> Noise:
        return pool([independent(distinct(table_of(results, key)), results.begun, compared)])

    return noise


def judge(
    results: Results, claims: Sequence[Claim], stakes: Mapping[str, Stake], noise_of: NoiseOf
) -> tuple[list[Verdict], list[Check]]:
    """Judge all claims whose runs are there; Holm's correction is over these.

    Returns: verdicts in the claims' order, and the manipulation checks.
    """
    checks = {}
    for name, stake in stakes.items():
        needing = [_compared(claim) for claim in claims if claim.stake == name]
        checks[name] = _check(stake, results, noise_of, needing[0] if needing else ())
    judged: list[tuple[Claim, Difference]] = []
    for claim in claims:
        table = table_of(results, claim.key)
        needed = [name for name in (claim.variant, claim.against) if isinstance(name, str)]
        if any(name not in table for name in needed):
            continue
        try:
            judged.append((claim, _difference(claim, table, noise_of(claim.key, _compared(claim)))))
        except ValueError:  # too few seeds
            continue
    adjusted = holm([found.p for _, found in judged])
    verdicts = []
    for (claim, found), p in zip(judged, adjusted, strict=True):
        visible = smallest_visible(found.error, found.dof, len(judged))
        check = checks.get(claim.stake)
        reason = "" if check is None or check.passed else check.sentence
        answer: Answer = "no verdict" if reason else answer_to(claim, found, p)
        verdicts.append(Verdict(claim, answer, found, p, visible, reason))
    return verdicts, list(checks.values())


def _compared(claim: Claim) -> tuple[str, ...]:
    return (claim.variant, claim.against) if isinstance(claim.against, str) else (claim.variant,)


def _difference(claim: Claim, table: Table, noise: Noise) -> Difference:
    if isinstance(claim.against, str):
        return compare(table[claim.variant], table[claim.against], noise)
    return against_constant(table[claim.variant], claim.against, noise)


def answer_to(claim: Claim, found: Difference, adjusted_p: float) -> Answer:
    """Return yes or no where the difference tells, else "too small to tell here".

    A difference in the expected direction is a yes if it is significant after the correction, one
    in the other direction a no. For "equal" the 95 % interval decides: yes within the margin, no
    outside of it.
    """
    low, high = found.interval
    if claim.expect == "equal":
        if -claim.margin <= low and high <= claim.margin:
            return "yes"
        outside = low > claim.margin or high < -claim.margin
        return "no" if outside and adjusted_p < 0.05 else "too small to tell here"
    if adjusted_p >= 0.05:
        return "too small to tell here"
    return "yes" if (found.mean < 0) == (claim.expect == "lower") else "no"


def _check(stake: Stake, results: Results, noise_of: NoiseOf, compared: Sequence[str]) -> Check:
    """Check by the noise of the variants that claims compare.

    The first of them is enough to know the kind.
    """
    try:
        cost = stake.cost(results)
    except (KeyError, IndexError):
        cost = np.zeros(0)
    try:
        noise = noise_of(stake.key, compared).sd
    except ValueError:
        noise = float("nan")
    if np.isnan(noise):  # one variant, or one seed
        return Check(stake, None, noise)
    return Check(stake, float(np.mean(cost)) if len(cost) else None, noise)


def verdict_table(verdicts: Sequence[Verdict], checks: Sequence[Check]) -> str:
    """Return Markdown: a row for each claim, and a sentence for each manipulation check."""
    rows = []
    for v in verdicts:
        digits = v.claim.digits
        mean, low, high = (
            format_number(x, digits, sign=True) for x in (v.difference.mean, *v.difference.interval)
        )
        rows.append(
            [
                v.claim.text,
                f"{mean} ({low} to {high}) {v.claim.unit}".strip(),
                str(v.difference.seeds),
                format_p(v.adjusted_p),
                format_number(v.visible, digits),
                f"**{v.answer}**",
            ]
        )
    header = ["claim", "difference (95 % interval)", "seeds", "p (Holm)", "visible here", "verdict"]
    return "\n\n".join([markdown_table(header, rows), *(check.sentence for check in checks)])


def format_p(p: float) -> str:
    """Format a p-value.

    >>> format_p(0.0312), format_p(2e-7)
    ('0.031', '< 0.001')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def as_json(verdict: Verdict) -> dict:
    """Return a verdict as results.json keeps it: differences that the papers expect are positive.

    A claim of "lower" is multiplied by −1. A claim of "equal" has what the margin leaves: m − |d|.
    Then in each case the interval is right of 0 for a yes, and left of it for a no.
    """
    claim = verdict.claim

    def turned(difference: float) -> float:
        if claim.expect == "equal":
            return claim.margin - abs(difference)
        return -difference if claim.expect == "lower" else difference

    return {
        "claim": claim.text,
        "answer": verdict.answer,
        "difference": turned(verdict.difference.mean),
        "half": verdict.difference.half,
        "unit": claim.unit,
        "p": verdict.adjusted_p,
        "visible": verdict.visible,
        "published": None if claim.published is None else turned(claim.published),
    }
