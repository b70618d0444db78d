"""Text of numbers, and the tables of README.md."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.lab.results import Number, Results
from experiments.markdown import markdown_table

MINUS = "−"


def format_number(value: float, digits: int, *, sign: bool = False) -> str:
    """Format a number with a true minus sign, and with a plus sign if `sign` is set."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)


def mean_spread(values: np.ndarray, digits: int = 3, *, sign: bool = False) -> str:
    """Format mean ± sample standard deviation over seeds; one seed has no spread.

    "–" if a seed lacks the number, which NaN says.

    >>> mean_spread(np.array([1.0, 2.0, 3.0]), 2), mean_spread(np.array([-0.5]), 1, sign=True)
    ('2.00 ± 1.00', '−0.5')
    >>> mean_spread(np.array([1.0, np.nan]))
    '–'
    """
    if not len(values) or np.isnan(values).any():
        return "–"
    spread = f" ± {format_number(float(np.std(values, ddof=1)), digits)}" if len(values) > 1 else ""
    return format_number(float(np.mean(values)), digits, sign=sign) + spread


@dataclass(frozen=True)
class Column:
    """A column of a study's table: mean and spread over the seeds of one measured number."""

    title: str
    # for `Results.values`; or a function (results, variant) → values, which is no `Number`
    key: str | Number | Callable[[Results, str], np.ndarray]
    digits: int = 3
    scale: float = 1.0
    # add a column of paired differences to the first variant; needs a name or a `Number`
    paired: bool = False
    # more such columns, against these variants
    against: tuple[str, ...] = ()


def results_table(results: Results, columns: Sequence[Column], names: Sequence[str] = ()) -> str:
    """Return a Markdown table with a row for each variant that has runs.

    Args: names: of the variants; default: all.
    """
    header = ["variant", "parameters (active)", "cache bytes per token"]
    for column in columns:
        header.append(column.title)
        header += [f"against {name}, paired" for name in _references(results, column)]
    rows = []
    for variant in [name for name in names if name in results.runs] or results.variants:
        size = results.records(variant)[0]["parameters"]
        row = [variant, f"{size['total']:,} ({size['active']:,})", f"{size['cache_bytes']:,}"]
        for column in columns:
            row += _cells(results, variant, column)
        rows.append(row)
    return markdown_table(header, rows)


def _cells(results: Results, variant: str, column: Column) -> Iterator[str]:
    key = column.key
    try:
        if isinstance(key, str | Number):
            values = results.values(variant, key)
        else:
            values = key(results, variant)
    except (KeyError, IndexError):  # some variants lack some numbers, or runs that they need
        yield "–"
        return
    yield mean_spread(values * column.scale, column.digits)
    if not isinstance(key, str | Number):
        return
    for reference in _references(results, column):
        if reference == variant or reference not in results.runs:
            yield ""
            continue
        yield mean_spread(
            results.paired(variant, reference, key) * column.scale, column.digits, sign=True
        )


def _references(results: Results, column: Column) -> tuple[str, ...]:
    """Return the variants that a column's differences refer to."""
    return (results.variants[0],) * column.paired + column.against
