"""Results of a study: results.json, and text of numbers.

results.json holds, by variant and seed, the numbers of a finished run and the run's identity
(`fingerprints`). A run is missing, and is made, if its result does not have the identity that the
study asks for. Results of different identities are never shown together.
"""

import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.host.files import write_atomic
from experiments.lab.fingerprints import Identity

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file, atomically."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    write_atomic(path, data.getvalue())


Key = str | Callable[[Mapping], Any]


@dataclass(frozen=True)
class Number:
    """A number of a run, with the unit and the digits that claims about it are shown with.

    >>> share = Number("share", "%", 1, scale=100)
    >>> share({"share": 0.25}), (share - "half")({"share": 0.25, "half": 12.5})
    (25.0, 12.5)
    """

    key: Key
    unit: str
    digits: int = 2
    scale: float = 1.0

    def __call__(self, numbers: Mapping) -> Any:
        found = lookup(numbers, self.key)
        return found if self.scale == 1 else found * self.scale

    def __sub__(self, other: Key) -> "Number":
        """Return the difference to another number of the same run."""
        return Number(
            lambda numbers: self(numbers) - lookup(numbers, other), self.unit, self.digits
        )


def shown_with(key: Key) -> tuple[str, int]:
    """Return a number's unit and digits: a `Number`'s own, or those of a loss in nats."""
    return (key.unit, key.digits) if isinstance(key, Number) else ("nats", 3)


class MissingRuns(KeyError):
    """A table or a picture needs runs that are not there."""

    def __str__(self) -> str:
        return self.args[0]


class Results:
    """The finished runs of a study: `runs[variant][seed]` is a record. Seeds are strings.

    A record has the identity's `config`, `corpus`, `tokenizer` and `recipe`; `numbers` (name →
    number, list or dict), `curves` (name → [steps, values]), `parameters` (total, active,
    cache_bytes), `steps`, `seconds`, `date`, `commit` and `dirty` of the training code, `machine`.
    Records without `recipe` are of recipe 1.

    Attributes:
        stored: all that results.json holds, one record for a variant and seed.
        runs: what is shown: results of the asked identities, or all while there are none of these.
        names: hash `keys` of records → names of their settings.
        not_run: the variants that `select` was asked for and that have no result.
        is_current: whether `runs` are of the identities that `select` was asked for.
        begun: variant → the one whose run it continues, or whose frozen trunk it has.
        title: of pictures: the study's answer, or its question.
        noise, verdicts: what `Study.judge` judged by, and found; pictures show them.
    """

    def __init__(self, path: Path, about: Mapping | None = None):
        self.path = path
        try:
            values = dict(json.loads(path.read_text())) if path.exists() else {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"path={str(path)!r} is no file of results: {error}") from None
        self.stored: dict[str, dict[str, dict]] = values.pop("runs", {})
        self.names: dict[str, list[str]] = {
            keys: names.split() for keys, names in values.pop("settings", {}).items()
        }
        self.runs = self.stored
        self.not_run: list[str] = []
        self.is_current = False
        self.about = values | dict(about or {})
        self.title: str = self.about.get("question", "")
        self.begun: Mapping[str, str] = {}
        self.noise: Callable[..., Any] | None = None
        self.verdicts: Sequence[Any] = ()

    @property
    def recipe(self) -> int | None:
        """The recipe of the results that are shown."""
        records = (record for name in self.runs for record in self.records(name))
        return max((record.get("recipe", 1) for record in records), default=None)

    def has(self, variant: str, seed: int, identity: Identity) -> bool:
        """Return whether the run exists and is the asked one."""
        return identity.matches(self.stored.get(variant, {}).get(str(seed), {}), self.names)

    def remember(self, identity: Identity) -> None:
        """Keep the names of an identity's settings, so that later versions can compare results."""
        self.names.setdefault(identity.keys, sorted(identity.settings))

    def add(self, variant: str, seed: int, record: dict) -> None:
        """Add a run in the place of an older one, and write the file.

        Numbers are rounded here, so a table is the same now and after the file is read again.
        """
        self.stored.setdefault(variant, {})[str(seed)] = rounded(record)
        self.write()

    def select(self, asked: Mapping[tuple[str, int], Identity]) -> None:
        """Show results of the asked identities, in their order. Without any, show all."""
        runs: dict[str, dict[str, dict]] = {name: {} for name, _ in asked}
        for (name, seed), identity in asked.items():
            if self.has(name, seed, identity):
                runs[name][str(seed)] = self.stored[name][str(seed)]
        self.not_run = [name for name, seeds in runs.items() if not seeds]
        runs = {name: seeds for name, seeds in runs.items() if seeds}
        self.is_current = bool(runs)
        self.runs = runs or self.stored

    def forget(self, keys: Collection[tuple[str, int]]) -> None:
        """Drop the runs of these (variant, seed), and write the file."""
        for variant, seed in keys:
            self.stored.get(variant, {}).pop(str(seed), None)
        self.stored = {variant: seeds for variant, seeds in self.stored.items() if seeds}
        self.write()

    def provenance(self, key: str) -> str:
        """Return all distinct values of the records' `date`, `commit` or `machine`, sorted."""
        values = {
            record[key] + (" with changes" if key == "commit" and record.get("dirty") else "")
            for name in self.variants
            for record in self.records(name)
        }
        return ", ".join(sorted(values))

    def seeds(self) -> list[int]:
        """Return the seeds that have at least one run, ascending."""
        return sorted({int(seed) for runs in self.runs.values() for seed in runs})

    def write(self) -> None:
        """Write the file with one line per run, so that its diff is readable."""
        settings: dict[str, dict[str, str]] = {}
        if self.names:
            settings["settings"] = {keys: " ".join(names) for keys, names in self.names.items()}
        outer = json.dumps(self.about | settings | {"runs": "@"}, indent=1, ensure_ascii=False)
        variants = []
        for variant, seeds in self.stored.items():
            lines = (
                f"   {json.dumps(s)}: {json.dumps(r, ensure_ascii=False)}" for s, r in seeds.items()
            )
            variants.append(f"  {json.dumps(variant)}: {{\n" + ",\n".join(lines) + "\n  }")
        head, _, tail = outer.rpartition('"@"')
        text = head + "{\n" + ",\n".join(variants) + "\n }" + tail + "\n"
        write_atomic(self.path, text.encode())

    @property
    def variants(self) -> list[str]:
        """The variants with at least one finished run, in the study's order."""
        return list(self.runs)

    def records(self, variant: str) -> list[dict]:
        """Return the records of a variant, by ascending seed. Raises: MissingRuns."""
        return [self.runs[variant][seed] for seed in self.seeds_of(variant)]

    def values(self, variant: str, key: Key) -> np.ndarray:
        """Return a number over the seeds, float64 [seeds, …].

        Args: key: the number's name; `a/b` selects within dicts and lists. Or a function of a
            record's numbers.
        Raises: KeyError for a number that was not measured; MissingRuns, which is one, for a
            variant without runs.
        """
        return np.array(
            [lookup(record["numbers"], key) for record in self.records(variant)], np.float64
        )

    def paired(self, variant: str | float, first: str | float, key: Key) -> np.ndarray:
        """Return `variant` − `first` for each seed that both have, float64 [seeds].

        The seed's effect on both variants cancels. One of them may be a constant. Raises: as
        `values`.
        """
        if not isinstance(variant, str):
            return variant - self.values(str(first), key)
        if not isinstance(first, str):
            return self.values(variant, key) - first
        seeds = self.common_seeds(variant, first)
        both = [
            [lookup(self.runs[name][seed]["numbers"], key) for seed in seeds]
            for name in (variant, first)
        ]
        return np.subtract(*np.array(both, np.float64).reshape(2, len(seeds)))

    def common_seeds(self, variant: str, other: str) -> list[str]:
        """Return the seeds that two variants share, ascending.

        Raises: MissingRuns if a variant has no run.
        """
        there = self.seeds_of(other)
        return [seed for seed in self.seeds_of(variant) if seed in there]

    def difference(self, variant: str, first: str, key: Key) -> float:
        """Return the mean of `paired`. Raises: as `values`; MissingRuns without a common seed."""
        found = self.paired(variant, first, key)
        if not len(found):
            raise MissingRuns(f"{variant!r} and {first!r} have no seed in common")
        return float(found.mean())

    def seeds_of(self, variant: str) -> list[str]:
        """Return a variant's seeds, ascending. Raises: MissingRuns if it has no run."""
        if variant not in self.runs:
            raise MissingRuns(f"no run of {variant!r}")
        return sorted(self.runs[variant], key=int)

    def curve(self, variant: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps [n], values [seeds, n]) of a curve."""
        curves = [record["curves"][name] for record in self.records(variant)]
        return np.array(curves[0][0]), np.array([values for _, values in curves], np.float64)


def lookup(numbers, key: Key):
    """Return a number of a record's numbers, see `Results.values`."""
    if callable(key):
        return key(numbers)
    for part in key.split("/"):
        numbers = numbers[int(part)] if isinstance(numbers, list) else numbers[part]
    return numbers


def rounded(value):
    """Round numbers to six significant digits; the rest is noise, or the order of a sum.

    >>> rounded({"half": 0.12225890139402114, "seeds": [1.0, 2]})
    {'half': 0.122259, 'seeds': [1.0, 2]}
    """
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def thin_curves(rows: Sequence[Mapping], names: Sequence[str], points: int = 50) -> dict[str, list]:
    """Return curves of metrics, name → [steps, values], with at most `points` points each.

    Each point is the mean over a range of steps. Its step is the last of the range.
    """
    curves = {}
    for name in names:
        pairs = [
            (row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))
        ]
        parts = (
            np.array_split(np.array(pairs, np.float64), min(points, len(pairs))) if pairs else []
        )
        if parts:
            curves[name] = [[int(p[-1, 0]) for p in parts], [float(p[:, 1].mean()) for p in parts]]
    return curves


def replace_block(path: Path, text: str) -> None:
    """Replace the text between the results' markers of a file.

    Raises: ValueError if the file does not contain each marker once and in order.
    """
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest:
        raise ValueError(
            f"path={str(path)!r} does not contain {BEGIN} and then {END}, each once; "
            "add these markers"
        )
    write_atomic(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())
