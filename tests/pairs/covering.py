"""Rows in which each two values of the factors meet, as far as the package allows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from allpairspy import AllPairs

Row = dict[str, str]  # factor → value
Pair = frozenset[tuple[str, str]]  # of two (factor, value)


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
    names = list(factors)

    def completed(some: Row) -> Row | None:
        return next((base | some for base in bases if refusal(base | some) is None), None)

    def may_be(values: Sequence[str]) -> bool:
        """Whether the first values of a row can still become an accepted row."""
        return completed(dict(zip(names, values, strict=False))) is not None

    accepted = [
        dict(zip(names, row, strict=True))
        for row in AllPairs([list(f) for f in factors.values()], may_be)
    ]
    accepted = [row for row in accepted if len(row) == len(names)]
    # AllPairs ends early where values are refused, and leaves pairs out.
    met, refused = pairs_of(accepted), []
    for pair in _all_pairs(factors):
        if pair in met:
            continue
        row = completed(dict(pair))
        if row is None:
            nearest = max(bases, key=lambda base: len(base.items() & pair))
            refused.append(nearest | dict(pair))
            continue
        row = _with_more(row, pair, met, factors, refusal)
        accepted.append(row)
        met |= pairs_of([row])
    return accepted, refused


def _all_pairs(factors: Mapping[str, Mapping[str, object]]) -> Iterator[Pair]:
    for (a, of_a), (b, of_b) in combinations(factors.items(), 2):
        yield from (frozenset([(a, x), (b, y)]) for x in of_a for y in of_b)


def _with_more(
    row: Row,
    pair: Pair,
    met: set[Pair],
    factors: Mapping[str, Mapping[str, object]],
    refusal: Callable,
) -> Row:
    """Change each of the other values where that lets more new pairs meet."""

    def gain(row: Row) -> int:
        return len(pairs_of([row]) - met)

    for name in (name for name in factors if name not in dict(pair)):
        better = sorted((row | {name: value} for value in factors[name]), key=gain, reverse=True)
        row = next(new for new in better if new == row or refusal(new) is None)
    return row
