"""Plots that several studies share. `draw_…` writes a picture; the others add to axes."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lab.claims import Verdict
from experiments.lab.results import Results, write_figure


def style_axes(ax: Axes, title: str, x: str, y: str) -> None:
    """Set title, axis labels and the lab's grid."""
    ax.set_title(title, fontsize=11)
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def draw_differences(results: Results, path: Path, key: str = "val_loss", title: str = "Validation loss") -> None:
    """Write a picture of each variant's difference to the first variant."""
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(results.variants)), layout="constrained")
    plot_differences(figure.add_subplot(), results, key, f"{title} against {results.variants[0]}", "nats per token")
    write_figure(figure, path)


ANSWER_COLOURS = {"yes": "C2", "no": "C3", "too small to tell here": "0.45", "no verdict": "0.75"}


def draw_forest(path: Path, verdicts: Sequence[Verdict], title: str) -> None:
    """Write a picture of a study's claims: each difference with its 95 % interval, and the published value."""
    figure = Figure(figsize=(9.0, 1.6 + 0.4 * max(len(verdicts), 1)), layout="constrained")
    ax = figure.add_subplot()
    units = {v.claim.unit for v in verdicts}
    for row, v in enumerate(verdicts):
        low, high = v.difference.interval
        colour = ANSWER_COLOURS[v.answer]
        ax.plot([low, high], [row, row], color=colour, linewidth=2)
        ax.plot([v.difference.mean], [row], "o", color=colour, markersize=7)
        if v.claim.published is not None:
            ax.plot([v.claim.published], [row], "D", color="black", markersize=5, fillstyle="none")
    if any(v.claim.published is not None for v in verdicts):
        ax.plot([], [], "D", color="black", fillstyle="none", linestyle="none", label="published")
    for answer in dict.fromkeys(v.answer for v in verdicts):
        ax.plot([], [], "o-", color=ANSWER_COLOURS[answer], label=answer)
    style_axes(ax, title, f"difference with its 95 % interval{', ' + units.pop() if len(units) == 1 else ''}", "")
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(verdicts)), [v.claim.text for v in verdicts], fontsize=9)
    ax.invert_yaxis()
    if verdicts:
        figure.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=5, loc="outside lower center")
    write_figure(figure, path)


def plot_differences(ax: Axes, results: Results, key: str, title: str, unit: str) -> None:
    """Plot each variant's difference to the first variant: a dot per seed, a bar for their mean."""
    first = results.variants[0]
    for row, variant in enumerate(results.variants):
        values = results.paired(variant, first, key)
        if not len(values):
            continue
        ax.plot(values, np.full(len(values), row), "o", color=f"C{row % 10}", alpha=0.6, markersize=6)
        ax.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color=f"C{row % 10}", linewidth=2.5)
    style_axes(ax, title, f"difference, {unit}: a dot is a seed, a bar their mean", "")
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(results.variants)), results.variants)
    ax.invert_yaxis()


def plot_curves(
    ax: Axes, results: Results, name: str, title: str, unit: str, only: Collection[str] | None = None
) -> None:
    """Plot a metric over training steps for each variant: mean over seeds, shaded from minimum to maximum.

    Args: name: of the curve. only: the variants to plot; None means all.
    """
    for i, variant in enumerate(results.variants):
        if only is not None and variant not in only:
            continue
        steps, values = results.curve(variant, name)
        ax.plot(steps, values.mean(0), label=variant, color=f"C{i % 10}", linewidth=1.4)
        ax.fill_between(steps, values.min(0), values.max(0), color=f"C{i % 10}", alpha=0.15, linewidth=0)
    style_axes(ax, title, "step", unit)
    bottom, top = ax.get_ylim()
    ax.set_ylim(top=top + 0.3 * (top - bottom))  # space for the legend above the curves
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def draw_loss_by_cost(
    results: Results, path: Path, cost: str | Callable[[Results, str], float], label: str, title: str
) -> None:
    """Write a picture of validation loss against a cost on a logarithmic axis: dots are seeds, a ring their mean.

    Args:
        cost: the key of a measured number, averaged over seeds; or a function (results, variant) → number.
        label: of the cost's axis.
    """
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    ax = figure.add_subplot()
    costs = []
    for i, variant in enumerate(results.variants):
        x = cost(results, variant) if callable(cost) else float(results.values(variant, cost).mean())
        losses = results.values(variant, "val_loss")
        ax.plot(np.full(len(losses), x), losses, ".", color=f"C{i % 10}", alpha=0.6)
        ax.plot([x], [losses.mean()], "o", color=f"C{i % 10}", markersize=11, fillstyle="none", label=variant)
        costs.append(x)
    style_axes(ax, title, label, "validation loss, nats per token")
    ax.set_xscale("log")
    ax.set_xticks(sorted(set(costs)), [f"{c:,.4g}" for c in sorted(set(costs))])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    write_figure(figure, path)
