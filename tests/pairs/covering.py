"""Rows in which each two values of the factors meet, as far as the package allows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import combinations

Row = dict[str, str]  # factor → value
Pair = frozenset[tuple[str, str]]  # of two (factor, value)


def refusal(plan: Callable[..., object], row: Row, *args: object) -> str | None:
    """The sentence by which the package refuses a row. None means that it accepts it."""
    try:
        plan(row, *args)
    except ValueError as error:
        sentence = str(error)
        assert sentence and "\n" not in sentence, f"no sentence: {sentence!r}"
        return sentence
    return None


def pairs_of(rows: Iterable[Row]) -> set[Pair]:
    """The pairs of values that meet in rows."""
    return {frozenset(two) for row in rows for two in combinations(row.items(), 2)}


def cover(
    factors: Mapping[str, Mapping[str, object]],
    bases: Sequence[Row],
    refusal: Callable[[Row], str | None],
) -> tuple[list[Row], list[Row]]:
    """Make rows that the package accepts, in which each two values meet, and rows for each refusal.

    Args:
        bases: complete rows. Two values are refused if all bases with them are.
        refusal: why the package refuses a row. None means that it accepts it.
    Returns: (rows that train or decode, rows that are refused).
    """
    known = cache(lambda items: refusal(dict(items)))
    accepted, refused, met = [], [], set[Pair]()
    for (a, of_a), (b, of_b) in combinations(factors.items(), 2):
        for pair in ({a: x, b: y} for x in of_a for y in of_b):
            if frozenset(pair.items()) in met:
                continue
            rows = [base | pair for base in bases]
            row = next((row for row in rows if known(tuple(row.items())) is None), None)
            if row is None:
                nearest = max(bases, key=lambda base: len(base.items() & pair.items()))
                refused.append(nearest | pair)
                continue

            # Change each of the other values where that lets more new pairs meet.
            for name in (name for name in factors if name not in pair):
                others = [row | {name: value} for value in factors[name]]
                others.sort(key=lambda row: -len(pairs_of([row]) - met))
                row = next(new for new in others if new == row or known(tuple(new.items())) is None)
            accepted.append(row)
            met |= pairs_of([row])
    return accepted, refused
