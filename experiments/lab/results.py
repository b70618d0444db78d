"""Results of a study: results.json, statistics over seeds, and the table of README.md.

results.json holds, by variant and seed, the numbers of a finished run and the fingerprint of its configuration. A run
is missing, and is made again, if its fingerprint is not the one that the study asks for.
"""

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from dsv3_jax.config import Execution, RunConfig, replace
from dsv3_jax.files import write_atomic

ABOVE = "the row above"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
MINUS = "−"


def fingerprint(run: RunConfig) -> str:
    """Return twelve hex digits that identify a run's configuration, without its kernels and layout on devices.

    Keys with default values are left out, so that a new key of a later version changes no fingerprint. Keys that have
    moved keep their first place, so that finished runs keep theirs.
    """
    changed = _non_defaults(replace(run, execution=Execution()))
    model = changed.setdefault("model", {})
    for name in ("compute_dtype", "remat", "precision"):
        if (value := getattr(run.execution, name)) != getattr(Execution(), name):
            model[name] = value
    if "capacity_factor" in model:
        model["dispatch"] = "capacity"
        if model["capacity_factor"] == 1.25:
            del model["capacity_factor"]
    return hashlib.blake2b(json.dumps(changed, sort_keys=True).encode(), digest_size=6).hexdigest()


def _non_defaults(config) -> dict:
    """Return the keys of a configuration that differ from their default."""
    changed = {}
    for key in dataclasses.fields(config):
        value = getattr(config, key.name)
        default = key.default_factory() if key.default_factory is not dataclasses.MISSING else key.default
        if value != default:
            changed[key.name] = _non_defaults(value) if dataclasses.is_dataclass(value) else value
    return changed


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    write_atomic(path, data.getvalue())


class Results:
    """The finished runs of a study: `runs[variant][seed]` is a record. Seeds are strings, as JSON keys are.

    A record has `fingerprint`, `numbers` (name → number, list or dict), `curves` (name → [steps, values]), `parameters`
    (total, active, cache_bytes), `steps`, `seconds`, `date`, `commit`, `machine`.
    """

    def __init__(self, path: Path, about: Mapping | None = None):
        self.path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.runs: dict[str, dict[str, dict]] = stored.pop("runs", {})
        self.about = stored | dict(about or {})

    def has(self, variant: str, seed: int, expected: str) -> bool:
        """Return whether the run exists and has the expected fingerprint."""
        return self.runs.get(variant, {}).get(str(seed), {}).get("fingerprint") == expected

    def add(self, variant: str, seed: int, record: dict) -> None:
        """Add a run, and write the file."""
        self.runs.setdefault(variant, {})[str(seed)] = record
        self.write()

    def keep(self, expected: Mapping[tuple[str, int], str]) -> None:
        """Drop every run without its expected fingerprint, and sort the variants in the order of `expected`.

        Args: expected: fingerprints by (variant, seed).
        """
        kept: dict[str, dict[str, dict]] = {}
        for (variant, seed), mark in expected.items():
            if self.has(variant, seed, mark):
                kept.setdefault(variant, {})[str(seed)] = self.runs[variant][str(seed)]
        order = dict.fromkeys(variant for variant, _ in expected)
        self.runs = {variant: kept[variant] for variant in order if variant in kept}

    def forget(self, keys: Collection[tuple[str, int]]) -> None:
        """Drop the runs of these (variant, seed). The next `add` writes the file."""
        for variant, seed in keys:
            self.runs.get(variant, {}).pop(str(seed), None)
        self.runs = {variant: seeds for variant, seeds in self.runs.items() if seeds}

    def provenance(self, key: str) -> str:
        """Return all distinct values of the records' `date`, `commit` or `machine`, sorted."""
        return ", ".join(sorted({record[key] for name in self.variants for record in self.records(name)}))

    def seeds(self) -> list[int]:
        """Return the seeds that have at least one run, ascending."""
        return sorted({int(seed) for runs in self.runs.values() for seed in runs})

    def write(self) -> None:
        """Write the file with one line per run, so that its diff is readable."""
        outer = json.dumps(self.about | {"runs": "@"}, indent=1, ensure_ascii=False)
        variants = []
        for variant, seeds in self.runs.items():
            records = {seed: json.dumps(_rounded(record), ensure_ascii=False) for seed, record in seeds.items()}
            lines = (f"   {json.dumps(seed)}: {record}" for seed, record in records.items())
            variants.append(f"  {json.dumps(variant)}: {{\n" + ",\n".join(lines) + "\n  }")
        text = outer.replace('"@"', "{\n" + ",\n".join(variants) + "\n }")
        write_atomic(self.path, (text + "\n").encode())

    @property
    def variants(self) -> list[str]:
        """The variants with at least one finished run, in the study's order."""
        return list(self.runs)

    def records(self, variant: str) -> list[dict]:
        """Return the records of a variant, by ascending seed."""
        return [self.runs[variant][seed] for seed in sorted(self.runs[variant], key=int)]

    def values(self, variant: str, key: str) -> np.ndarray:
        """Return a number over the seeds, float64 [seeds, …].

        Args: key: the number's name; `a/b` selects within dicts and lists.
        Raises: KeyError for a number that was not measured.
        """
        return np.array([_lookup(record["numbers"], key) for record in self.records(variant)], np.float64)

    def paired(self, variant: str, first: str, key: str) -> np.ndarray:
        """Return `variant` − `first` for each seed that both have, float64 [seeds].

        The seed's effect on both variants cancels.
        """
        seeds = sorted(self.runs[variant].keys() & self.runs[first].keys(), key=int)
        both = [[_lookup(self.runs[name][seed]["numbers"], key) for seed in seeds] for name in (variant, first)]
        return np.subtract(*np.array(both, np.float64).reshape(2, len(seeds)))

    def curve(self, variant: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps [n], values [seeds, n]) of a curve."""
        curves = [record["curves"][name] for record in self.records(variant)]
        return np.array(curves[0][0]), np.array([values for _, values in curves], np.float64)


def _lookup(numbers, key: str):
    for part in key.split("/"):
        numbers = numbers[int(part)] if isinstance(numbers, list) else numbers[part]
    return numbers


def _rounded(value):
    """Round numbers to six significant digits; the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def thin_curves(rows: Sequence[Mapping], names: Sequence[str], points: int = 50) -> dict[str, list]:
    """Return curves of metrics, name → [steps, values], with at most `points` points each.

    Each point is the mean over a range of steps. Its step is the last of the range.
    """
    curves = {}
    for name in names:
        pairs = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
        parts = np.array_split(np.array(pairs, np.float64), min(points, len(pairs))) if pairs else []
        if parts:
            curves[name] = [[int(p[-1, 0]) for p in parts], [float(p[:, 1].mean()) for p in parts]]
    return curves


# Text and tables


def format_number(value: float, digits: int, *, sign: bool = False) -> str:
    """Format a number with a true minus sign, and with a plus sign if `sign` is set."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", MINUS)


def mean_spread(values: np.ndarray, digits: int = 3, *, sign: bool = False) -> str:
    """Format mean ± sample standard deviation over seeds; one seed has no spread.

    >>> mean_spread(np.array([1.0, 2.0, 3.0]), 2), mean_spread(np.array([-0.5]), 1, sign=True)
    ('2.00 ± 1.00', '−0.5')
    """
    if not len(values):
        return "–"
    spread = f" ± {format_number(float(np.std(values, ddof=1)), digits)}" if len(values) > 1 else ""
    return format_number(float(np.mean(values)), digits, sign=sign) + spread


@dataclass(frozen=True)
class Column:
    """A column of a study's table: mean and spread over the seeds of one measured number."""

    title: str
    key: str | Callable[[Results, str], np.ndarray]  # for `Results.values`, or a function (results, variant) → values
    digits: int = 3
    scale: float = 1.0
    paired: bool = False  # add a column of paired differences to the first variant; needs a `key` that is a name
    against: tuple[str, ...] = ()  # more such columns, against these variants; ABOVE means the row above


def results_table(results: Results, columns: Sequence[Column]) -> str:
    """Return a Markdown table with a row for each variant."""
    header = ["variant", "parameters (active)", "cache bytes per token"]
    for column in columns:
        header += [column.title] + [f"against {name or results.variants[0]}, paired" for name in _references(column)]
    rows = []
    for variant in results.variants:
        size = results.records(variant)[0]["parameters"]
        row = [variant, f"{size['total']:,} ({size['active']:,})", f"{size['cache_bytes']:,}"]
        for column in columns:
            row += _cells(results, variant, column)
        rows.append(row)
    return markdown_table(header, rows)


def _cells(results: Results, variant: str, column: Column) -> Iterator[str]:
    if callable(column.key):
        yield mean_spread(column.key(results, variant) * column.scale, column.digits)
        return
    try:
        yield mean_spread(results.values(variant, column.key) * column.scale, column.digits)
    except (KeyError, IndexError):  # some variants lack some numbers
        yield "–"
        return
    above = dict(zip(results.variants[1:], results.variants, strict=False))
    for name in _references(column):
        reference = above.get(variant, variant) if name == ABOVE else name or results.variants[0]
        if reference == variant or reference not in results.runs:
            yield ""
            continue
        difference = results.paired(variant, reference, column.key) * column.scale
        text = mean_spread(difference, column.digits, sign=True)
        yield f"**{text}**" if differs_from_zero(difference) else text


def _references(column: Column) -> tuple[str, ...]:
    """Return the variants that a column's differences refer to; "" means the first variant."""
    return (("",) if column.paired else ()) + column.against


def differs_from_zero(differences: np.ndarray, level: float = 0.95) -> bool:
    """Return whether the confidence interval of the mean excludes 0, by Student's t over the seeds.

    With three seeds, the 95 % interval reaches 2.5 standard deviations to each side of the mean.

    >>> differs_from_zero(np.array([1.0, 1.1, 0.9])), differs_from_zero(np.array([1.0, 2.0, -0.5]))
    (True, False)
    """
    count = len(differences)
    if count < 2:
        return False
    half = stats.t.ppf((1 + level) / 2, count - 1) * np.std(differences, ddof=1) / np.sqrt(count)
    return bool(abs(np.mean(differences)) > half)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_block(path: Path, text: str) -> None:
    """Replace the text between the results' markers of a file.

    Raises: ValueError if the file does not contain each marker once and in order.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest:
        raise ValueError(f"path={str(path)!r} does not contain {BEGIN} and then {END}, each once; add these markers")
    write_atomic(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())
