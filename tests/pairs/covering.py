"""Rows in which each two values of the factors meet, as far as the package allows."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations

from allpairspy import AllPairs

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
    names = list(factors)
    known = cache(lambda items: refusal(dict(items)))

    def refused_by(row: Row) -> str | None:
        return known(tuple(row.items()))

    def completed(some: Row) -> Row | None:
        return next((base | some for base in bases if refused_by(base | some) is None), None)

    def may_be(values: Sequence[str]) -> bool:
        """Whether the first values of a row can still become an accepted row."""
        return completed(dict(zip(names, values, strict=False))) is not None

    def with_more(row: Row, pair: Pair) -> Row:
        """Change each of the other values where that lets more new pairs meet."""
        for name in (name for name in names if name not in dict(pair)):
            others = [row | {name: value} for value in factors[name]]
            others.sort(key=lambda row: -len(pairs_of([row]) - met))
            row = next(new for new in others if new == row or refused_by(new) is None)
        return row

    rows = AllPairs([list(values) for values in factors.values()], may_be)
    accepted = [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]
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
        accepted.append(with_more(row, pair))
        met |= pairs_of(accepted[-1:])
    return accepted, refused


def _all_pairs(factors: Mapping[str, Mapping[str, object]]) -> Iterator[Pair]:
    for (a, of_a), (b, of_b) in combinations(factors.items(), 2):
        yield from (frozenset([(a, x), (b, y)]) for x in of_a for y in of_b)
