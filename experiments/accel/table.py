"""The table of the figures: each against its bound, and the bars that it must reach."""

from pathlib import Path
from typing import NamedTuple

from dsv3_jax.planning.devices import ACCELERATORS
from experiments import cards
from experiments.markdown import markdown_table

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
    "step": ("v2_lite", "speed"),
    "decode": ("v2_lite", "speed"),
}


class Row(NamedTuple):
    """A figure of the table, judged."""

    part: str
    figure: dict
    bound: str  # with its unit and name
    ratio: float | None
    verdict: str  # the bar, and whether it is met
    missed: bool  # the bar was not reached, or could not be measured


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
        value, unit = figure["value"], figure.get("unit", "")
        against = figure.get("against", "")
        words, instead = BOUNDS.get(against, ("", ""))
        if against not in bounds and instead and figure.get("bound") != instead:
            words, against = BOUNDS[instead][0], instead
        bound = bounds.get(against)
        ratio = value / bound if bound and value is not None else None

        # An implementation that would be chosen, and fails.
        missed = "(chosen)" in figure["name"] and figure.get("why", "").startswith("failed")
        verdict, bar = "", BARS.get(figure.get("bar", ""))
        if bar and (bar.everywhere or (kind == H100 and not results["toy"])):
            of_ratio = bar.of == "ratio"
            found = ratio if of_ratio else value
            missed = found is None or (found < bar.limit if bar.sign == "≥" else found > bar.limit)
            limit = f"{bar.limit:.2f}" if of_ratio else scaled(bar.limit, unit)
            verdict = f"{bar.sign} {limit} {'MISSED' if missed else 'met'}"
        bound = f"{scaled(bound, unit)} {words}" if bound else ""
        rows.append(Row(part, figure, bound, ratio, verdict, missed))
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


def cells(row: Row) -> list[str]:
    """Return a figure's cells of the table."""
    figure = row.figure
    name = figure["name"] + (f" ({figure['note']})" if "note" in figure else "")
    if figure["value"] is None:
        return [row.part, f"{name}: {figure['why']}", "–", "", "", row.verdict]
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    value = scaled(figure["value"], figure.get("unit", ""))
    return [row.part, name, value, row.bound, ratio, row.verdict]


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
            text = scaled(value, row.figure.get("unit", "")) + share
            found.setdefault(CARDS[row.part], {})[name] = text
    kind, versions = results["card"]["kind"], results["card"]["versions"]
    for (model, task), figures in found.items():
        command = "python experiments/accel/run.py"
        cards.write_card(folder, model, task, kind, command, figures, versions)


def report(results: dict, path: Path, asked: list[str]) -> int:
    """Print the table, what is missing and the verdict; return the exit code."""
    card, rows, parts = results["card"], rows_of(results), results["parts"]
    print(f"{card['kind']}, " + ", ".join(f"{name} {v}" for name, v in card["versions"].items()))
    header = ["part", "figure", "value", "bound", "ratio", "bar"]
    print(f"\n{markdown_table(header, list(map(cells, rows)))}\n")
    whys = {name: parts[name]["why"] if name in parts else "the time was over" for name in asked}
    left = [name for name in asked if whys[name]]
    for name in left:
        print(f"{name}: {whys[name]}")
    if left:
        print(f"What is left: --parts {' '.join(left)}")
    if results["toy"]:
        print("Toy sizes: these figures show that the parts work, and say nothing of speed.")
    elif card["kind"] != H100:
        print(f"No bars of speed are set for {card['kind']}: read the ratios.")
    missed = [row.figure for row in rows if row.missed]
    for figure in missed:
        why = figure.get("why") or figure.get("note", "")
        print(f"MISSED: {figure['name']}{f' ({why})' if why else ''}")
    print(f"written to {path}")
    return int(bool(missed) or any(part["why"].startswith("failed") for part in parts.values()))
