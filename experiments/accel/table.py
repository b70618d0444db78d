"""The table of the figures: each against its bound, and the bars that it must reach."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from dsv3_jax.planning.devices import ACCELERATORS
from experiments import cards

H100 = "NVIDIA H100 80GB HBM3"
# JAX's names of devices whose data sheet `dsv3 plan --device` knows
SHEETS = {
    H100: "h100", "NVIDIA H800": "h800", "TPU v5p": "v5p", "TPU v5": "v5p",
    "TPU v5e": "v5e", "TPU v5 lite": "v5e", "TPU v6e": "v6e", "TPU v6 lite": "v6e",
}  # fmt: skip


class Bar(NamedTuple):
    """A limit that a figure must reach: on an H100, or everywhere, at toy sizes too."""

    limit: float
    of: str = "ratio"  # "ratio" to the figure's bound, or "value"
    sign: str = "≥"
    everywhere: bool = False


BARS = {
    "layer": Bar(0.70),
    "attention forward": Bar(0.60),
    "attention both": Bar(0.45),
    "mfu": Bar(0.40),
    "decode": Bar(2.0e12, "value"),
    "drafts": Bar(1.4, "value"),
    "equal": Bar(0, "value", "≤", everywhere=True),
    "right": Bar(1, "value", "≤", everywhere=True),
}
# The bounds that a figure's `against` names: (words for the table, the bound if this is unknown)
BOUNDS = {
    "product": ("matrix product", ""),
    "copy": ("copy", ""),
    "sheet flops": ("data sheet", "product"),
    "sheet bytes": ("data sheet", ""),
    "planned memory": ("planned", ""),
}
# part → model and task of its card
CARDS = {
    "right": ("kernels", "conformance"),
    "layer": ("v3", "speed"),
    "attention": ("v3", "speed"),
    "grouped": ("v3", "speed"),
    "step": ("v2_lite", "speed"),
    "decode": ("v2_lite", "speed"),
}


@dataclass(frozen=True)
class Row:
    """A figure of the table, judged."""

    part: str
    figure: dict
    bound: float | None
    bound_name: str
    bar: Bar | None  # None: no bar is set for this device

    @property
    def unit(self) -> str:
        return self.figure.get("unit", "")

    @property
    def ratio(self) -> float | None:
        value = self.figure["value"]
        return value / self.bound if self.bound and value is not None else None

    @property
    def missed(self) -> bool:
        """The bar was not reached, or could not be measured."""
        if self.bar is None:
            return False
        found = self.ratio if self.bar.of == "ratio" else self.figure["value"]
        over = found is not None and found - self.bar.limit
        return found is None or (over < 0 if self.bar.sign == "≥" else over > 0)

    @property
    def verdict(self) -> str:
        """The bar and whether it is met, as text."""
        if self.bar is None:
            return ""
        of_ratio, limit = self.bar.of == "ratio", self.bar.limit
        text = f"{limit:.2f}" if of_ratio else scaled(limit, self.unit)
        return f"{self.bar.sign} {text} {'MISSED' if self.missed else 'met'}"


def rows_of(results: dict) -> list[Row]:
    """Compare all figures with their bounds and bars."""
    kind = results["card"]["kind"]
    figures = [(name, f) for name, part in results["parts"].items() for f in part["figures"]]
    bounds = {f["bound"]: f["value"] for _, f in figures if "bound" in f}
    if kind in SHEETS:
        sheet = ACCELERATORS[SHEETS[kind]]
        bounds |= {"sheet flops": sheet.flops, "sheet bytes": sheet.memory_bandwidth}
    rows = []
    for part, figure in figures:
        against = figure.get("against", "")
        words, instead = BOUNDS.get(against, ("", ""))
        if against not in bounds and instead and figure.get("bound") != instead:
            words, against = BOUNDS[instead][0], instead
        bar = BARS.get(figure.get("bar", ""))
        if bar and not bar.everywhere and (kind != H100 or results["toy"]):
            bar = None
        rows.append(Row(part, figure, bounds.get(against), words, bar))
    return rows


def scaled(value: float, unit: str) -> str:
    """Write a value with its unit, at four significant digits.

    >>> scaled(798.4e12, "FLOP/s"), scaled(0.00123, "s"), scaled(0, "ids")
    ('798.4 TFLOP/s', '1.23 ms', '0')
    """
    if unit in ("FLOP/s", "B/s", "B"):
        prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6))
        prefix, scale = next(((p, s) for p, s in prefixes if value >= s), ("", 1.0))
        return f"{value / scale:.4g} {prefix}{unit}"
    if unit == "s":
        return f"{value:.4g} s" if value >= 1 else f"{1e3 * value:.4g} ms"
    if unit == "times":
        return f"{value:.2f} times"
    return f"{value:,.0f}{' tokens/s' if unit == 'tokens/s' else ''}"


def table_of(rows: list[Row]) -> Table:
    """Lay the rows out, by part."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("part", "figure", "value", "bound", "ratio", "bar"):
        justify = "right" if name in ("value", "bound", "ratio") else "left"
        table.add_column(name, justify=justify, no_wrap=name != "figure", overflow="fold")
    before = ""
    for row in rows:
        if before and row.part != before:
            table.add_section()
        value, note = row.figure["value"], row.figure.get("note")
        name = row.figure["name"] + (f" ({note})" if note else "")
        bound = f"{scaled(row.bound, row.unit)} {row.bound_name}" if row.bound else ""
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        cells = (name, "" if value is None else scaled(value, row.unit), bound, ratio)
        if value is None:
            cells = (f"{name}: {row.figure['why']}", "–", "", "")
        table.add_row(row.part if row.part != before else "", *cells, row.verdict)
        before = row.part
    return table


def write_cards(results: dict, folder: Path = cards.FOLDER) -> None:
    """Write a device's cards, by model and task. Wrong implementations count, and are named."""
    found: dict[tuple[str, str], dict[str, float | str]] = {}
    counts: dict[str, float | str] = {"implementations that are wrong": 0, "that are right": 0}
    for row in (row for row in rows_of(results) if row.part in CARDS):
        value, name = row.figure["value"], row.figure["name"]
        if row.part == "right":
            found[CARDS["right"]] = counts
            counts[list(counts)[not row.missed]] += 1
            if row.missed:
                counts[name] = row.figure.get("why") or row.figure["note"]
        elif value is not None:
            share = f", {row.ratio:.2f} of bound" if row.ratio else ""
            found.setdefault(CARDS[row.part], {})[name] = scaled(value, row.unit) + share
    kind, versions = results["card"]["kind"], results["card"]["versions"]
    for (model, task), figures in found.items():
        command = "python experiments/accel/run.py"
        cards.write_card(folder, model, task, kind, command, figures, versions)


def report(results: dict, path: Path) -> int:
    """Print the table, what is missing and the verdict; return the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    card, rows, parts = results["card"], rows_of(results), results["parts"]

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    say(f"{card['kind']}, " + ", ".join(f"{name} {v}" for name, v in card["versions"].items()))
    if card.get("driver"):
        say(f"driver: {card['driver']}")
    console.print(table_of(rows))
    for name, part in parts.items():
        if part["state"] != "done":
            say(f"{name}: {part['why'] or 'stopped'}")
    if results["toy"]:
        say("Toy sizes: these figures show that the parts work, and say nothing of speed.")
    elif card["kind"] != H100:
        say(f"No bars of speed are set for {card['kind']}: read the ratios.")
    missed = [row.figure for row in rows if row.missed]
    for figure in missed:
        why = figure.get("why") or figure.get("note", "")
        say(f"MISSED: {figure['name']}{f' ({why})' if why else ''}")
    say(f"written to {path}")
    return int(bool(missed) or any(part["state"] == "failed" for part in parts.values()))
