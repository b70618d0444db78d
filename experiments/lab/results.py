"""What a study found: results.json, statistics over seeds, and the table that README.md shows.

results.json holds, by variant and seed, the numbers of a finished run and the fingerprint of its configuration: what
has another fingerprint than the study now asks for is missing, and is made again.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from dsv3_jax.config import Layout, RunConfig, replace

ABOVE = "the row above"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
MINUS = "−"


def fingerprint(run: RunConfig) -> str:
    """Twelve hex digits of what a run is: how it lies on devices makes no difference.

    Keys at their default are left out, so that a key that a later version adds changes no fingerprint.
    """
    plain = replace(run, model=replace(run.model, layout=Layout()))
    words = json.dumps(_changed(plain), sort_keys=True)
    return hashlib.blake2b(words.encode(), digest_size=6).hexdigest()


def _changed(config) -> dict:
    """A configuration's keys that are not at their default."""
    found = {}
    for key in dataclasses.fields(config):
        value = getattr(config, key.name)
        usual = key.default_factory() if key.default_factory is not dataclasses.MISSING else key.default
        if value != usual:
            found[key.name] = _changed(value) if dataclasses.is_dataclass(value) else value
    return found


def write_whole(path: Path, data: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_figure(figure: Figure, path: Path) -> None:
    """A picture as a PNG file, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    write_whole(path, data.getvalue())


class Results:
    """The finished runs of a study: `runs[variant][seed]` is a record, with seeds as strings, as JSON wants them.

    A record: `fingerprint`, `numbers` (name → number, list or dict), `curves` (name → [steps, values]), `parameters`
    (total, active, cache_bytes), `steps`, `seconds`, `date`, `commit`, `machine`.
    """

    def __init__(self, path: Path, about: Mapping | None = None):
        self.path = path
        kept = json.loads(path.read_text()) if path.exists() else {}
        self.runs: dict[str, dict[str, dict]] = kept.pop("runs", {})
        self.about = kept | dict(about or {})

    def has(self, variant: str, seed: int, mark: str) -> bool:
        """Whether the run is there, with that fingerprint."""
        return self.runs.get(variant, {}).get(str(seed), {}).get("fingerprint") == mark

    def add(self, variant: str, seed: int, record: dict) -> None:
        """Take in a run, and write the file."""
        self.runs.setdefault(variant, {})[str(seed)] = record
        self.write()

    def keep(self, marks: Mapping[tuple[str, int], str]) -> None:
        """Forget what is not among the given fingerprints by (variant, seed); what stays comes into their order."""
        kept: dict[str, dict[str, dict]] = {}
        for (variant, seed), mark in marks.items():
            if self.has(variant, seed, mark):
                kept.setdefault(variant, {})[str(seed)] = self.runs[variant][str(seed)]
        order = dict.fromkeys(variant for variant, _ in marks)
        self.runs = {variant: kept[variant] for variant in order if variant in kept}

    def forget(self, keys: Collection[tuple[str, int]]) -> None:
        """Leave out the runs of these (variant, seed); the file is written with the next one that is taken in."""
        for variant, seed in keys:
            self.runs.get(variant, {}).pop(str(seed), None)
        self.runs = {variant: seeds for variant, seeds in self.runs.items() if seeds}

    def told(self, key: str) -> str:
        """What the records say of their `date`, `commit` or `machine`: all that differ, ascending."""
        return ", ".join(sorted({record[key] for name in self.variants for record in self.records(name)}))

    def seeds(self) -> list[int]:
        """Seeds of which there is a run, ascending."""
        return sorted({int(seed) for runs in self.runs.values() for seed in runs})

    def write(self) -> None:
        """Write the file, a line for each run, so that a diff of it can be read."""
        whole = json.dumps(self.about | {"runs": "@"}, indent=1, ensure_ascii=False)
        variants = []
        for variant, seeds in self.runs.items():
            records = {seed: json.dumps(_rounded(record), ensure_ascii=False) for seed, record in seeds.items()}
            lines = (f"   {json.dumps(seed)}: {record}" for seed, record in records.items())
            variants.append(f"  {json.dumps(variant)}: {{\n" + ",\n".join(lines) + "\n  }")
        text = whole.replace('"@"', "{\n" + ",\n".join(variants) + "\n }")
        write_whole(self.path, (text + "\n").encode())

    @property
    def variants(self) -> list[str]:
        """Variants with at least one finished run, in the study's order."""
        return list(self.runs)

    def records(self, variant: str) -> list[dict]:
        """The records of a variant, by ascending seed."""
        return [self.runs[variant][seed] for seed in sorted(self.runs[variant], key=int)]

    def values(self, variant: str, key: str) -> np.ndarray:
        """A number over the seeds, float64 [seeds, …]; `a/b` reaches into lists and dicts.

        Raises: KeyError for a number that was not measured.
        """
        return np.array([_reach(record["numbers"], key) for record in self.records(variant)], np.float64)

    def paired(self, variant: str, first: str, key: str) -> np.ndarray:
        """`variant` − `first` for each seed that both have: what the seed does to both falls out. float64 [seeds]."""
        seeds = sorted(self.runs[variant].keys() & self.runs[first].keys(), key=int)
        both = [[_reach(self.runs[name][seed]["numbers"], key) for seed in seeds] for name in (variant, first)]
        return np.subtract(*np.array(both, np.float64).reshape(2, len(seeds)))

    def curve(self, variant: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [n], values [seeds, n]) of a curve."""
        curves = [record["curves"][name] for record in self.records(variant)]
        return np.array(curves[0][0]), np.array([values for _, values in curves], np.float64)


def _reach(numbers, key: str):
    for part in key.split("/"):
        numbers = numbers[int(part)] if isinstance(numbers, list) else numbers[part]
    return numbers


def _rounded(value):
    """Numbers to six digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def thinned(rows: Sequence[Mapping], names: Sequence[str], points: int = 50) -> dict[str, list]:
    """Curves of metrics rows, name → [steps, values], each of at most `points` points: means of as many stretches."""
    curves = {}
    for name in names:
        found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        parts = np.array_split(np.array(found, np.float64), min(points, len(found))) if found else []
        if parts:
            curves[name] = [[int(p[-1, 0]) for p in parts], [float(p[:, 1].mean()) for p in parts]]
    return curves


# Words and tables


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """A number as readers expect it: a true minus, and a plus where a difference is meant."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)


def mean_spread(values: np.ndarray, digits: int = 3, *, sign: bool = False) -> str:
    """Mean ± sample standard deviation over seeds; a single seed has no spread.

    >>> mean_spread(np.array([1.0, 2.0, 3.0]), 2), mean_spread(np.array([-0.5]), 1, sign=True)
    ('2.00 ± 1.00', '−0.5')
    """
    if not len(values):
        return "–"
    spread = f" ± {number(float(np.std(values, ddof=1)), digits)}" if len(values) > 1 else ""
    return number(float(np.mean(values)), digits, sign=sign) + spread


@dataclass(frozen=True)
class Column:
    """A column of a study's table: a measured number, mean and spread over the seeds."""

    title: str
    key: str | Callable[[Results, str], np.ndarray]  # of `Results.values`, or (results, variant) → values
    digits: int = 3
    scale: float = 1.0
    paired: bool = False  # beside it the difference to the first variant, seed by seed; for a `key` that is a name
    against: tuple[str, ...] = ()  # the same to these variants, too; ABOVE is the row above


def table(results: Results, columns: Sequence[Column]) -> str:
    """Markdown: a row for each variant."""
    header = ["variant", "parameters (active)", "cache bytes a token"]
    for column in columns:
        header += [column.title] + [f"against {name or results.variants[0]}, paired" for name in _others(column)]
    rows = []
    for variant in results.variants:
        size = results.records(variant)[0]["parameters"]
        row = [variant, f"{size['total']:,} ({size['active']:,})", f"{size['cache_bytes']:,}"]
        for column in columns:
            row += _cells(results, variant, column)
        rows.append(row)
    return markdown(header, rows)


def _cells(results: Results, variant: str, column: Column) -> Iterator[str]:
    if callable(column.key):
        yield mean_spread(column.key(results, variant) * column.scale, column.digits)
        return
    try:
        yield mean_spread(results.values(variant, column.key) * column.scale, column.digits)
    except (KeyError, IndexError):  # not every variant has every number
        yield "–"
        return
    above = dict(zip(results.variants[1:], results.variants, strict=False))
    for name in _others(column):
        other = above.get(variant, variant) if name == ABOVE else name or results.variants[0]
        if other == variant or other not in results.runs:
            yield ""
            continue
        difference = results.paired(variant, other, column.key) * column.scale
        words = mean_spread(difference, column.digits, sign=True)
        yield f"**{words}**" if told_apart(difference) else words


def _others(column: Column) -> tuple[str, ...]:
    """The variants that a column's differences are to; an empty word is the first variant."""
    return (("",) if column.paired else ()) + column.against


def told_apart(differences: np.ndarray, level: float = 0.95) -> bool:
    """Whether 0 lies outside the differences' confidence interval: Student's t over the seeds.

    Of three seeds the interval of 95 % is 2.5 standard deviations to each side of the mean.

    >>> told_apart(np.array([1.0, 1.1, 0.9])), told_apart(np.array([1.0, 2.0, -0.5])), told_apart(np.array([1.0]))
    (True, False, False)
    """
    count = len(differences)
    if count < 2:
        return False
    half = stats.t.ppf((1 + level) / 2, count - 1) * np.std(differences, ddof=1) / np.sqrt(count)
    return bool(abs(np.mean(differences)) > half)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put_between(path: Path, text: str) -> None:
    """Replace what a file holds between the results' markers.

    Raises: ValueError where they are not there, once and in order.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest:
        raise ValueError(f"{path} has no place for results: it must hold {BEGIN} and after it {END}, each once")
    write_whole(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())
