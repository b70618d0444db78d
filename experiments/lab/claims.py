"""Claims of a study, and their verdicts: yes, no, too small to tell here, or no verdict."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from experiments.lab.results import Key, Number, Results, lookup, shown_with
from experiments.lab.statistics import (
    Difference,
    Noise,
    Table,
    TooFewSeeds,
    estimate,
    holm,
    paired,
    pool,
    share_bound,
    smallest_visible,
)
from experiments.lab.tables import format_number, markdown_table

LOSS = "val_loss"  # the number that all studies of a recipe have
LOSS_PRIOR, PRIOR = 40, 5  # d0 of the loss and of other numbers, see `statistics`
FEW = 8  # degrees of freedom; a claim with fewer is named below its table

Expected = Literal["lower", "higher", "equal", "none"]
Answer = Literal["yes", "no", "too small to tell here", "no verdict"]


@dataclass(frozen=True)
class Claim:
    """A claim: a number of `variant` is lower or higher than `against`'s, or equal within `margin`.

    Attributes:
        text: the claim, as a sentence that "yes" agrees to.
        against: another variant, or a constant such as a chance level.
        key: the number, see `Results.values`. It is a loss in nats, or a `Number` that has another
            unit. Differences of shares are in logits, see `logit`.
        expect: what the papers lead to expect. "none": they expect no direction, so the claim's
            text is what a lower number means.
        stake: the name of the manipulation check that the claim needs, in `Study.stakes`. "" means
            that the claim is about the subject itself.
        margin: for "equal": the largest difference that counts as equal.
        published: the papers' difference in the same unit, if there is one.
        questions: of a share in points: that it rests on, in a run. Then half of the interval is
            at least what these questions tell if none is wrong, see `share_bound`.
    """

    text: str
    variant: str
    against: str | float
    key: Key = "val_loss"
    expect: Expected = "lower"
    stake: str = ""
    margin: float = 0.0
    published: float | None = None
    questions: int = 0

    def __post_init__(self):
        if self.expect not in get_args(Expected):
            words = ", ".join(get_args(Expected))
            raise ValueError(f"expect={self.expect!r} of claim={self.text!r} is not one of {words}")

    @property
    def compared(self) -> tuple[str, ...]:
        """The variants that it is about: two, or one if it is against a constant."""
        return (self.variant, self.against) if isinstance(self.against, str) else (self.variant,)

    @property
    def unit(self) -> str:
        """The unit of the number."""
        return shown_with(self.key)[0]

    @property
    def digits(self) -> int:
        """The decimals that differences are shown with."""
        return shown_with(self.key)[1]


@dataclass(frozen=True)
class Stake:
    """A manipulation check: what it costs to take a study's subject away, paired by seed.

    Attributes:
        text: what is taken away, as in "routed experts off".
        variant: the one without the subject, or a constant such as a chance level.
        against: the one with the subject, or a constant.
        key: the number that is higher without the subject, as for a claim.
        cost: (results) → the cost by seed, where it is no such difference.
    """

    text: str
    variant: str | float = 0.0
    against: str | float = 0.0
    key: Key = LOSS
    cost: Callable[[Results], np.ndarray] | None = None

    def by_seed(self, results: Results) -> np.ndarray:
        """Return the cost by seed. Raises: KeyError or IndexError if it is not measured."""
        if self.cost is not None:
            return self.cost(results)
        return results.paired(self.variant, self.against, self.key)


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
    cost: Difference | None  # None: not measured, or from one seed

    @property
    def passed(self) -> bool:
        """Whether the cost's own 95 % interval is above 0."""
        return self.cost is not None and self.cost.interval[0] > 0

    @property
    def sentence(self) -> str:
        """One sentence on the outcome."""
        stake, (unit, digits) = self.stake, shown_with(self.stake.key)
        if self.cost is None:
            return (
                f"Manipulation check, {stake.text}: not measured, "
                "so claims that need it get no verdict."
            )
        cost, low, high = (format_number(x, digits) for x in (self.cost.mean, *self.cost.interval))
        outcome = "passed"
        if not self.passed:
            outcome = "not above 0, so claims that need it get no verdict"
        return (
            f"Manipulation check, {stake.text}: costs {cost} ({low} to {high}) {unit}, "
            f"n = {self.cost.seeds}: {outcome}."
        )


# (number, the compared variants) → its noise; without variants, that of independent runs
NoiseOf = Callable[..., Noise]


def table_of(results: Results, key: Key) -> Table:
    """Return the numbers of all variants that have it, variant → seed → number; not NaN."""
    table: dict[str, dict[int, float]] = {}
    for variant, seeds in results.runs.items():
        for seed, record in seeds.items():
            try:
                number = float(lookup(record["numbers"], key))
            except (KeyError, IndexError, TypeError):  # some variants lack some numbers
                continue
            if not np.isnan(number):
                table.setdefault(variant, {})[int(seed)] = number
    return table


def distinct(table: Table, compared: Sequence[str] = ()) -> Table:
    """Leave out variants whose numbers are another's, as heads on one trunk: they are one run."""
    kept: dict[str, Mapping[int, float]] = {}
    for variant in (*compared, *table):
        if variant in compared or table[variant] not in kept.values():
            kept[variant] = table[variant]
    return kept


def _root(variant: str, begun: Mapping[str, str]) -> str:
    return _root(begun[variant], begun) if variant in begun else variant


def related(begun: Mapping[str, str], compared: Sequence[str]) -> bool:
    """Return whether two variants are compared that begin with the same run. Args: see below."""
    return len(compared) == 2 and len({_root(variant, begun) for variant in compared}) == 1


def independent(table: Table, begun: Mapping[str, str], compared: Sequence[str] = ()) -> Table:
    """Return the variants whose differences are of the kind of the compared ones.

    Variants that continue one parent, or are measured on it, are near copies. Two of them have
    their parent's other children for their kind, and relatives of two generations have none. All
    others have one variant of each family: the compared one, or the first.

    Args: begun: variant → its parent.

    >>> table, begun = {"a": {}, "b": {}, "c": {}, "d": {}}, {"b": "a", "c": "a", "d": "c"}
    >>> [list(independent(table, begun, pair)) for pair in (("b", "c"), ("c", "a"), ())]
    [['b', 'c'], ['c', 'a'], ['a']]
    """
    if related(begun, compared):
        parent = begun.get(compared[0])
        siblings = parent is not None and begun.get(compared[1]) == parent
        kind = [v for v in table if siblings and begun.get(v) == parent]
        return {variant: table[variant] for variant in kind or compared}

    chosen: dict[str, str] = {}  # the variant that counts for a family
    for variant in (*compared, *table):
        chosen.setdefault(_root(variant, begun), variant)
    return {variant: table[variant] for variant in chosen.values()}


def logit(key: Key, questions: int, whole: float = 100.0) -> Number:
    """Return a number of a run: ln(right / wrong), each with half a question more.

    Args: key: the share, of `whole`; questions: that it rests on.

    >>> [round(logit("x", 1000)({"x": share}), 2) for share in (50.0, 90.0, 100.0)]
    [0.0, 2.19, 7.6]
    """

    def found(numbers: Mapping) -> float:
        share = float(lookup(numbers, key)) / whole
        return float(np.log((share * questions + 0.5) / ((1 - share) * questions + 0.5)))

    return Number(found, "logits")


def ln(key: Key, unit: str, least: float = 0.0) -> Number:
    """Return a number of a run: the logarithm of another one, or of `least`.

    Its noise is alike where that of the number itself grows with the number.

    Args: unit: of the number, as "steps"; that of the logarithm is "ln steps".

    >>> ln("steps/-1", "steps")({"steps": [2, math.e]}), ln("lost", "%", least=1)({"lost": 0.0})
    (1.0, 0.0)
    """
    return Number(lambda numbers: math.log(max(lookup(numbers, key), least)), f"ln {unit}".strip())


def percent_of(logits: np.ndarray) -> np.ndarray:
    """Return the shares, in percent, that logits are of.

    >>> percent_of(np.array([0.0])).tolist()
    [50.0]
    """
    return 100 / (1 + np.exp(-logits))


def noise_within(results: Results) -> NoiseOf:
    """Return a function that pools a number's noise over the variants of one study."""

    def noise(key: Key, compared: Sequence[str] = ()) -> Noise:
        table = distinct(table_of(results, key), compared)
        return pool([independent(table, results.begun, compared)], compared)

    return noise


def judge(
    results: Results, claims: Sequence[Claim], stakes: Mapping[str, Stake], noise_of: NoiseOf
) -> tuple[list[Verdict], list[Check]]:
    """Judge all claims whose runs are there; Holm's correction is over these.

    Returns: verdicts in the claims' order, and the manipulation checks.
    """
    checks = {name: _check(stake, results) for name, stake in stakes.items()}
    judged: list[tuple[Claim, Difference]] = []
    for claim in claims:
        table = table_of(results, claim.key)
        if not table.keys() >= set(claim.compared):
            continue
        try:
            judged.append((claim, difference_of(claim, table, noise_of)))
        except TooFewSeeds:
            continue
    adjusted = holm([found.p(claim.margin) for claim, found in judged])
    verdicts = []
    for (claim, found), p in zip(judged, adjusted, strict=True):
        visible = smallest_visible(found.error, found.dof, len(judged))
        check = checks.get(claim.stake)
        reason = "" if check is None or check.passed else check.sentence
        answer: Answer = "no verdict" if reason else answer_to(claim, found, p)
        verdicts.append(Verdict(claim, answer, found, p, visible, reason))
    return verdicts, list(checks.values())


def difference_of(claim: Claim, table: Table, noise_of: NoiseOf) -> Difference:
    """Return a claim's difference, whose variance is shrunk to that of its kind.

    Raises: TooFewSeeds.
    """
    noise = noise_of(claim.key, claim.compared)
    if isinstance(claim.against, str):
        differences = paired(table[claim.variant], table[claim.against])
        variance, dof = 2 * noise.sd**2, noise.dof
    else:
        differences = [value - claim.against for value in table[claim.variant].values()]
        variance, dof = noise.within_sd**2, noise.within_dof
    prior = LOSS_PRIOR if claim.key == LOSS else PRIOR
    asked = claim.questions * len(differences)
    least = 100 * share_bound(asked) if asked else 0.0
    return estimate(differences, variance, dof, prior, least)


def answer_to(claim: Claim, found: Difference, adjusted_p: float) -> Answer:
    """Return yes or no where the difference tells, else "too small to tell here".

    A difference in the expected direction is a yes if its corrected p is below 0.05, one in the
    other direction a no. For "equal" the p is that of a difference of `margin`: a yes is within the
    margin, a no beyond it.
    """
    if adjusted_p >= 0.05:
        return "too small to tell here"
    if claim.expect == "equal":
        return "yes" if abs(found.mean) < claim.margin else "no"
    return "yes" if (found.mean > 0) == (claim.expect == "higher") else "no"


def _check(stake: Stake, results: Results) -> Check:
    """Check by the paired cost's own interval."""
    try:
        return Check(stake, estimate(stake.by_seed(results).tolist()))
    except (KeyError, IndexError, TooFewSeeds):
        return Check(stake, None)


def verdict_table(
    verdicts: Sequence[Verdict], checks: Sequence[Check], begun: Mapping[str, str]
) -> str:
    """Return Markdown: a row for each claim, then sentences on what the verdicts rest on.

    They name the manipulation checks, claims on few seeds, and claims on copies of one run.

    Args: begun: variant → its parent.
    """
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
                f"{v.difference.seeds} ({int(v.difference.dof + 1e-9)})",
                format_p(v.adjusted_p),
                format_number(v.visible, digits),
                f"**{v.answer}**",
            ]
        )
    header = ["claim", "difference (95 % interval)", "seeds (d.o.f.)"]
    header += ["p (Holm)", "visible here", "verdict"]
    sentences = [check.sentence for check in checks]
    if few := sum(v.difference.dof < FEW for v in verdicts):
        sentences.append(
            f"{few} of {len(verdicts)} claims rest on fewer than {FEW} degrees of freedom (d.o.f.)."
        )
    if copies := sum(related(begun, v.claim.compared) for v in verdicts):
        sentences.append(
            f"{copies} of {len(verdicts)} claims compare runs that share a parent: "
            "they are not independent, and their noise is that of such pairs."
        )
    return "\n\n".join([markdown_table(header, rows), *sentences])


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
        return difference if claim.expect == "higher" else -difference

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
