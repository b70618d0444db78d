"""Plots that several studies share. `draw_…` writes a picture; the others add to axes."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D

from experiments.lab.claims import Claim, Verdict, difference_of, noise_within, table_of
from experiments.lab.results import Key, Results, write_figure
from experiments.lab.statistics import TooFewSeeds


def style_axes(ax: Axes, title: str, x: str, y: str) -> None:
    """Set title, axis labels and the lab's grid."""
    ax.set_title(title, fontsize=11)
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def set_title(figure: Figure, results: Results) -> None:
    """Set the study's answer as the title."""
    figure.suptitle(textwrap.fill(results.title, 110), fontsize=11)


def _make_logarithmic(ax: Axes, ticks: Sequence[float]) -> None:
    """Make the x axis logarithmic, with these ticks alone.

    Before plotting: for a single number a logarithmic axis finds no limits afterwards.
    """
    ax.set_xscale("log")
    ax.set_xticks(ticks, [f"{tick:,.4g}" for tick in ticks])
    ax.set_xticks([], minor=True)


ANSWER_COLOURS = {"yes": "C2", "no": "C3", "too small to tell here": "0.45", "no verdict": "0.75"}
VARIANT_COLOUR = "C0"
# of the picture of claims and variants: inches of its width and of rows with labels of 8 points
WIDTH, CLAIM_INCHES, VARIANT_INCHES = 9.0, 0.42, 0.3


def claims_and_variants(
    key: Key | Mapping[str, tuple[str, Key]] = "val_loss",
    label: str = "validation loss, nats per token",
    *,
    shown: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ticks: Sequence[float] = (),
    linear: float | None = None,
) -> Callable[[Results, Path], None]:
    """Return a study's `draw`: its claims, beside one number by variant.

    Claims have their differences, 95 % intervals, answers and published values, one axis a unit.
    Variants have a dot a seed, and the mean with its 95 % interval.

    Args:
        key: the number of the variants; or rows of other numbers, name → (variant, number).
        label: the number's name and unit.
        shown: from the number to its axis, as np.exp where `key` is a logarithm.
        ticks: make the variants' axis logarithmic, with these ticks.
        linear: axes are linear up to here, and logarithmic beyond it, so that intervals of small
            and large numbers are seen.
    """

    def draw(results: Results, path: Path) -> None:
        rows = _rows(results, key)
        verdicts: Sequence[Verdict] = results.verdicts
        height = max(
            CLAIM_INCHES * len(verdicts) + 0.5 * len({v.claim.unit for v in verdicts}),
            VARIANT_INCHES * len(rows) + 0.5,
        )
        figure = Figure(figsize=(WIDTH, height + 0.9), layout="constrained")
        set_title(figure, results)
        # Claims have the longer names.
        ratios = (5, 4) if rows else (1,)
        parts = figure.subfigures(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
        _plot_claims(parts[0], verdicts, linear)
        if rows:
            ax = parts[1].add_subplot()
            if ticks:
                _make_logarithmic(ax, ticks)
            for row, (variant, number) in enumerate(rows.values()):
                half = half_interval(results, variant, 0.0, number)
                _plot_row(ax, results.values(variant, number), row, half, shown)
            style_axes(ax, "", f"{textwrap.fill(label, 38)}\ndots: seeds, bars: 95 % interval", "")
            _finish_rows(ax, list(rows), 24, linear)
        write_figure(figure, path)

    return draw


def _rows(results: Results, key: Key | Mapping[str, tuple[str, Key]]) -> dict[str, tuple[str, Key]]:
    """Return name → (variant, number) of the rows that have results."""
    named = key if isinstance(key, Mapping) else {name: (name, key) for name in results.variants}
    return {name: row for name, row in named.items() if row[0] in table_of(results, row[1])}


def _plot_claims(figure: FigureBase, verdicts: Sequence[Verdict], linear: float | None) -> None:
    """Plot claims in rows, with an axis for each unit, and the legend of their answers."""
    by_unit: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_unit.setdefault(verdict.claim.unit, []).append(verdict)
    if not by_unit:
        return
    rows = [len(some) for some in by_unit.values()]
    axes = figure.subplots(len(rows), height_ratios=rows, squeeze=False)[:, 0]
    for ax, (unit, some) in zip(axes, by_unit.items(), strict=True):
        for row, v in enumerate(some):
            colour = ANSWER_COLOURS[v.answer]
            ax.plot(v.difference.interval, [row, row], color=colour, linewidth=2)
            ax.plot([v.difference.mean], [row], "o", color=colour, markersize=6)
            if v.claim.published is not None:
                ax.plot([v.claim.published], [row], "D", color="black", fillstyle="none")
        ax.axvline(0, color="0.5", linewidth=0.8)
        style_axes(ax, "", f"difference, {unit}" if unit else "difference", "")
        _finish_rows(ax, [v.claim.text for v in some], 42, linear)
    marks = [
        Line2D([], [], marker="o", color=ANSWER_COLOURS[given], label=given)
        for given in dict.fromkeys(v.answer for v in verdicts)
    ]
    if any(v.claim.published is not None for v in verdicts):
        marks.append(
            Line2D([], [], marker="D", color="black", fillstyle="none", ls="", label="published")
        )
    figure.legend(handles=marks, frameon=False, fontsize=9, ncols=5, loc="outside lower left")


def _finish_rows(ax: Axes, names: Sequence[str], width: int, linear: float | None) -> None:
    """Name the rows 0, 1, … from the top, in lines of at most `width` characters.

    Args: linear: see `claims_and_variants`; for an axis that reaches three times as far.
    """
    ax.set_yticks(
        range(len(names)), [textwrap.fill(name, width, break_on_hyphens=False) for name in names]
    )
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    ax.tick_params(labelsize=8)
    ax.xaxis.label.set_fontsize(9)
    if linear is not None and max(np.abs(ax.get_xlim())) > 3 * linear:
        ax.set_xscale("symlog", linthresh=linear)
        ax.autoscale(axis="x")
        ax.xaxis.set_major_formatter("{x:g}")
    elif ax.get_xscale() == "linear":
        ax.locator_params("x", nbins=5)


def _plot_row(
    ax: Axes,
    values: np.ndarray,
    row: float,
    half: float,
    shown: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Plot a dot per seed, their mean, and its interval of ± half.

    Args: shown: from the numbers to the axis, as np.exp where the noise is that of logarithms.
    """
    mean, dots = values.mean(), shown(values)
    low, middle, high = shown(np.array([mean - half, mean, mean + half])).tolist()
    bars = [[middle - low], [high - middle]]
    ax.plot(dots, [row] * len(dots), "o", color=VARIANT_COLOUR, alpha=0.45, ms=5, mew=0)
    ax.plot([middle], [row], "|", color=VARIANT_COLOUR, markersize=14, markeredgewidth=2)
    ax.errorbar([middle], [row], xerr=bars, color=VARIANT_COLOUR, linewidth=2, capsize=4)


def half_interval(results: Results, variant: str, against: str | float, key: Key) -> float:
    """Return half of the 95 % interval of a difference, as a claim has it; 0 for one seed."""
    noise, table = results.noise or noise_within(results), table_of(results, key)
    try:
        return difference_of(Claim("", variant, against, key), table, noise).half
    except TooFewSeeds:
        return 0.0
