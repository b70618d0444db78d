"""Pictures of a study: what most of them need."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lab.results import Results, write_figure


def panel(ax: Axes, title: str, x: str, y: str) -> None:
    """The lab's look of a panel."""
    ax.set_title(title, fontsize=11)
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def differences(results: Results, path: Path, key: str = "val_loss", title: str = "Validation loss") -> None:
    """Each variant's difference to the first, a dot a seed and a bar for the mean."""
    figure = Figure(figsize=(7.5, 0.9 + 0.42 * len(results.variants)), layout="constrained")
    dots_by_variant(figure.add_subplot(), results, key, f"{title} against {results.variants[0]}", "nats a token")
    write_figure(figure, path)


def dots_by_variant(ax: Axes, results: Results, key: str, title: str, unit: str) -> None:
    """The same within a picture: the first variant on top, left of zero is less."""
    first = results.variants[0]
    for row, variant in enumerate(results.variants):
        values = results.paired(variant, first, key)
        if not len(values):
            continue
        ax.plot(values, np.full(len(values), row), "o", color=f"C{row % 10}", alpha=0.6, markersize=6)
        ax.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color=f"C{row % 10}", linewidth=2.5)
    panel(ax, title, f"difference, {unit}: a dot is a seed, the bar their mean", "")
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(results.variants)), results.variants)
    ax.invert_yaxis()


def curves(ax: Axes, results: Results, name: str, title: str, unit: str, only: Collection[str] | None = None) -> None:
    """A curve of every variant over the steps, or of those named: mean over seeds, a shade from least to most."""
    for i, variant in enumerate(results.variants):
        if only is not None and variant not in only:
            continue
        steps, values = results.curve(variant, name)
        ax.plot(steps, values.mean(0), label=variant, color=f"C{i % 10}", linewidth=1.4)
        ax.fill_between(steps, values.min(0), values.max(0), color=f"C{i % 10}", alpha=0.15, linewidth=0)
    panel(ax, title, "step", unit)
    bottom, top = ax.get_ylim()
    ax.set_ylim(top=top + 0.3 * (top - bottom))  # room for the legend above the curves
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def against(results: Results, path: Path, x: str | Callable[[Results, str], float], label: str, title: str) -> None:
    """Validation loss against something that a variant costs, on a logarithmic axis: dots are seeds, a ring the mean.

    Args: x: a measured number's name, whose mean over seeds is taken, or (results, variant) → number. label: of x.
    """
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    ax = figure.add_subplot()
    places = []
    for i, variant in enumerate(results.variants):
        at = x(results, variant) if callable(x) else float(results.values(variant, x).mean())
        losses = results.values(variant, "val_loss")
        ax.plot(np.full(len(losses), at), losses, ".", color=f"C{i % 10}", alpha=0.6)
        ax.plot([at], [losses.mean()], "o", color=f"C{i % 10}", markersize=11, fillstyle="none", label=variant)
        places.append(at)
    panel(ax, title, label, "validation loss, nats a token")
    ax.set_xscale("log")
    ax.set_xticks(sorted(set(places)), [f"{p:,.4g}" for p in sorted(set(places))])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    write_figure(figure, path)
