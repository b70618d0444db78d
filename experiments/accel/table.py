"""The table of the figures: each against its bound, and the bars that it must reach."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from dsv3_jax.planning.devices import ACCELERATORS
from experiments import cards

# JAX's names of devices whose data sheet `dsv3 plan --device` knows
SHEETS = {
    "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H800": "h800", "TPU v5p": "v5p", "TPU v5": "v5p",
    "TPU v5e": "v5e", "TPU v5 lite": "v5e", "TPU v6e": "v6e", "TPU v6 lite": "v6e",
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A limit that a figure must reach."""

    least: float | None = None
    most: float | None = None
    ratio: bool = True  # of the ratio to the figure's bound; False: of the value
    # the only device that it is set for; None: every one, toy sizes too
    kind: str | None = "NVIDIA H100 80GB HBM3"

    def text(self, unit: str) -> str:
        limit, sign = (self.most, "≤") if self.least is None else (self.least, "≥")
        return f"{sign} {limit:.2f}" if self.ratio else f"{sign} {scaled(limit or 0.0, unit)}"

    def is_met(self, value: float, ratio: float | None) -> bool:
        found = ratio if self.ratio else value
        return found is not None and (self.least or -math.inf) <= found <= (
            math.inf if self.most is None else self.most
        )


BARS = {
    "layer": Bar(0.70),
    "attention forward": Bar(0.60),
    "attention both": Bar(0.45),
    "mfu": Bar(0.40),
    "decode": Bar(2.0e12, ratio=False),
    "drafts": Bar(1.4, ratio=False),
    "equal": Bar(most=0, ratio=False, kind=None),
    "right": Bar(most=1, ratio=False, kind=None),
}
# The bounds that a figure's `against` names: (words for the table, the bound if this is unknown)
BOUNDS = {
    "product": ("matrix product", None),
    "copy": ("copy", None),
    "sheet flops": ("data sheet", "product"),
    "sheet bytes": ("data sheet", None),
    "planned memory": ("planned", None),
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
    def ratio(self) -> float | None:
        value = self.figure["value"]
        return value / self.bound if self.bound and value is not None else None

    @property
    def missed(self) -> bool:
        """The bar was not reached, or could not be measured."""
        value = self.figure["value"]
        return self.bar is not None and (value is None or not self.bar.is_met(value, self.ratio))


def rows_of(results: dict) -> list[Row]:
    """Compare all figures with their bounds and bars."""
    kind, bounds = results["card"]["kind"], {}
    if kind in SHEETS:
        sheet = ACCELERATORS[SHEETS[kind]]
        bounds |= {"sheet flops": sheet.flops, "sheet bytes": sheet.memory_bandwidth}
    figures = [
        (name, figure) for name, part in results["parts"].items() for figure in part["figures"]
    ]
    bounds |= {figure["bound"]: figure["value"] for _, figure in figures if "bound" in figure}
    rows = []
    for part, figure in figures:
        against = figure.get("against", "")
        if against and against not in bounds and figure.get("bound") != BOUNDS[against][1]:
            against = BOUNDS[against][1] or against
        bar = BARS.get(figure.get("bar", ""))
        if bar and bar.kind is not None and (bar.kind != kind or results["toy"]):
            bar = None
        rows.append(
            Row(part, figure, bounds.get(against), BOUNDS[against][0] if against else "", bar)
        )
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
        right = name in ("value", "bound", "ratio")
        table.add_column(
            name, justify="right" if right else "left", no_wrap=name != "figure", overflow="fold"
        )
    before = ""
    for row in rows:
        figure, unit = row.figure, row.figure.get("unit", "")
        if row.part != before and before:
            table.add_section()
        verdict = f"{row.bar.text(unit)} {'MISSED' if row.missed else 'met'}" if row.bar else ""
        name = figure["name"] + (f" ({figure['note']})" if "note" in figure else "")
        if figure["value"] is None:
            cells = (f"{name}: {figure['why']}", "–", "", "")
        else:
            bound = f"{scaled(row.bound, unit)} {row.bound_name}" if row.bound else ""
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            cells = (name, scaled(figure["value"], unit), bound, ratio)
        table.add_row(row.part if row.part != before else "", *cells, verdict)
        before = row.part
    return table


CARDS = {
    "right": ("kernels", "conformance"),
    "layer": ("v3", "speed"),
    "attention": ("v3", "speed"),
    "grouped": ("v3", "speed"),
    "step": ("v2_lite", "speed"),
    "decode": ("v2_lite", "speed"),
}


def write_cards(results: dict, folder: Path = cards.FOLDER) -> None:
    """Write a device's cards, by model and task. Wrong implementations count, and are named."""
    found: dict[tuple[str, str], dict[str, float | str]] = {}
    for row in rows_of(results):
        value, card = row.figure["value"], CARDS.get(row.part)
        if card and card[1] == "conformance":
            counts = found.setdefault(
                card, {"implementations that are wrong": 0, "that are right": 0}
            )
            counts["implementations that are wrong" if row.missed else "that are right"] += 1
            if row.missed:
                counts[row.figure["name"]] = row.figure.get("why") or row.figure["note"]
        elif card and value is not None:
            share = f", {row.ratio:.2f} of bound" if row.ratio else ""
            text = scaled(value, row.figure.get("unit", "")) + share
            found.setdefault(card, {})[row.figure["name"]] = text
    for (model, task), figures in found.items():
        command = "python experiments/accel/run.py"
        cards.write_card(
            folder,
            model,
            task,
            results["card"]["kind"],
            command,
            figures,
            results["card"]["versions"],
        )


def report(results: dict, path: Path) -> int:
    """Print the table, what is missing and the verdict; return the exit code."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
    card, rows = results["card"], rows_of(results)
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    console.print(f"{card['kind']}, {versions}", soft_wrap=True, markup=False)
    if card.get("driver"):
        console.print(f"driver: {card['driver']}", soft_wrap=True, markup=False)
    console.print(table_of(rows))
    ran = {name: part for name, part in results["parts"].items() if part["state"] != "done"}
    for name, part in ran.items():
        console.print(f"{name}: {part['why'] or 'stopped'}", soft_wrap=True, markup=False)
    if results["toy"]:
        console.print(
            "Toy sizes: these figures show that the parts work, and say nothing of speed."
        )
    elif not any(bar.kind == card["kind"] for bar in BARS.values()):
        console.print(
            f"No bars of speed are set for {card['kind']}: read the ratios.", markup=False
        )
    missed = [row for row in rows if row.missed]
    for row in missed:
        why = row.figure.get("why") or row.figure.get("note", "")
        console.print(
            f"MISSED: {row.figure['name']}{f' ({why})' if why else ''}",
            soft_wrap=True,
            markup=False,
        )
    console.print(f"written to {path}", soft_wrap=True, markup=False)
    return (
        1 if missed or any(part["state"] == "failed" for part in results["parts"].values()) else 0
    )
