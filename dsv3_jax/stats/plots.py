"""Pictures of routing statistics, as PNG files; `plots.routing_heatmap` draws the load itself.

Ratios to chance are coloured on a logarithmic scale, so that half as often is as blue as twice is red.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv3_jax.report.colours import DIVERGING
from dsv3_jax.report.run_plots import DPI, colour_bar, label_load_bar, load_norm, load_over_mean, write_png
from dsv3_jax.stats.measures import Specialisation

FEW = 8  # layers that are named in a legend and have their numbers written out
NEVER = 2.0**-20  # drawn for 0, whose logarithm an image would leave out
COLOURS = 10  # of Matplotlib's cycle: more domains than that are not told apart
MOST = 32  # layers drawn of a model that has more: every second, third, …


def load_over_time(
    steps: Int[np.ndarray, " S"], load: Num[np.ndarray, "S L E"], layers: Sequence[str], path: str | os.PathLike
) -> Figure:
    """Each expert's load over a run's steps, a panel a layer, and MaxVio of all layers below.

    Args: steps: ascending; load: counts of a batch at these steps; layers: their names; path: of the PNG.
    Returns: the figure; the values drawn are `figure.axes[i].collections[0].get_array()`, [E, S].
    """
    ratio = np.stack([load_over_mean(one, "training") for one in load])
    norm, beyond = load_norm(ratio)
    shown = _shown(layers)
    figure, (*panels, below) = _panels(len(shown), 2.0, extra=2.4)
    edges = _edges(steps)
    for ax, layer in zip(panels, shown, strict=True):
        image = ax.pcolormesh(edges, np.arange(load.shape[-1] + 1) - 0.5, ratio[:, layer].T, cmap=DIVERGING, norm=norm)
        ax.invert_yaxis()
        ax.set_facecolor("0.8")
        _name(ax, layers[layer], "step", "expert")
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_load_bar(colour_bar(figure, image, panels, "max" if beyond else "neither"), norm)
    peaks = ratio.max(-1) - 1
    for layer in range(len(layers)):
        label = layers[layer] if len(layers) <= FEW else None
        colour = f"C{layer}" if label else "0.6"
        below.plot(steps, peaks[:, layer], label=label, linewidth=1.1, color=colour, marker=_dot(steps), markersize=3)
    below.plot(steps, np.nanmean(peaks, -1), label="mean", linewidth=2, color="black", marker=_dot(steps), markersize=3)
    below.set_ylim(bottom=0)
    below.grid(alpha=0.25, linewidth=0.6)
    below.spines[["top", "right"]].set_visible(False)
    below.legend(frameon=False, fontsize=8, ncols=3)
    _name(below, "MaxVio of a batch: (largest load − mean) / mean", "step", "ratio")
    figure.suptitle("Load of each expert over training", fontsize=11)
    write_png(figure, path)
    return figure


def domain_lift(
    load_by_domain: Num[np.ndarray, "N L E"], domains: Sequence[str], layers: Sequence[str], path: str | os.PathLike
) -> Figure:
    """Whom each domain prefers: an expert's share of a domain's assignments over its share of all; a panel a layer.

    Returns: the figure; the values drawn are log2, [N, E].
    """
    ratio = preference(load_by_domain)
    shown = _shown(layers)
    figure, panels = _panels(len(shown), 0.75 + 0.22 * len(domains))
    _heatmaps(figure, panels, [ratio[:, layer] for layer in shown], "share of the domain / share of all")
    for ax, layer in zip(panels, shown, strict=True):
        _name(ax, layers[layer], "expert", "")
        ax.set_yticks(range(len(domains)), [_short(name) for name in domains])
    figure.suptitle("Experts that each domain prefers", fontsize=11)
    write_png(figure, path)
    return figure


def preference(load_by_domain: Num[np.ndarray, "N L E"]) -> Float[np.ndarray, "N L E"]:
    """p(expert | domain) / p(expert); NaN for an expert without load, or a domain without tokens."""

    def shares(load: np.ndarray) -> np.ndarray:
        total = load.sum(-1, keepdims=True)
        return np.divide(load, total, out=np.full(load.shape, np.nan), where=total > 0)

    whole = np.broadcast_to(shares(load_by_domain.sum(0))[None], load_by_domain.shape)
    return np.divide(shares(load_by_domain), whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def coactivation(lift: Float[np.ndarray, "L E E"], layers: Sequence[str], path: str | os.PathLike) -> Figure:
    """How often two experts are chosen for one token, over chance; a panel a layer.

    Returns: the figure; the values drawn are log2, [E, E].
    """
    shown = _shown(layers)
    figure, panels = _panels(len(shown), 2.7, columns=4)
    _heatmaps(figure, panels, [lift[layer] for layer in shown], "chosen together / chance")
    for ax, layer in zip(panels, shown, strict=True):
        ax.set_aspect("equal")
        ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
        _name(ax, layers[layer], "expert", "expert")
    figure.suptitle("Experts chosen for the same token", fontsize=11)
    write_png(figure, path)
    return figure


def entropies(
    whole: Mapping[str, Float[np.ndarray, " L"]],
    by_domain: Mapping[str, Float[np.ndarray, "N L"]],
    domains: Sequence[str],
    layers: Sequence[str],
    path: str | os.PathLike,
) -> Figure:
    """Entropies over layers, a panel each: in all, and by domain.

    Args: whole and by_domain: of the same titles; 1 is even.
    """
    figure = Figure(figsize=(11.0, 3.4), dpi=DPI, layout="constrained")
    for i, title in enumerate(whole):
        ax = figure.add_subplot(1, len(whole), i + 1)
        for n, domain in enumerate(domains):
            label, colour = (_short(domain), f"C{n}") if len(domains) <= COLOURS else (None, "0.6")
            ax.plot(by_domain[title][n], "o", label=label, color=colour, markersize=4, alpha=0.9)
        ax.plot(whole[title], "_", label="all", color="black", markersize=min(16, 150 / len(layers)), markeredgewidth=2)
        _layer_ticks(ax, layers)
        ax.margins(y=0.15)
        ax.grid(alpha=0.25, linewidth=0.6, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _name(ax, title, "layer", "entropy / largest possible")
    write_png(figure, path)
    return figure


def information(found: Specialisation, layers: Sequence[str], path: str | os.PathLike) -> Figure:
    """I(expert; domain) of each layer beside that of shuffled domains."""
    figure = Figure(figsize=(min(11.0, 4.4 + 0.55 * len(layers)), 3.2), dpi=DPI, layout="constrained")
    ax = figure.add_subplot()
    x = np.arange(len(layers))
    ax.bar(x - 0.2, found.bits, width=0.4, color="#4477aa", label="measured")
    ax.bar(x + 0.2, found.shuffled_mean, width=0.4, color="0.75", label="domains shuffled, mean")
    ax.plot(
        x + 0.2,
        found.shuffled_95,
        "_",
        color="black",
        markersize=min(11, 120 / len(layers)),
        markeredgewidth=1.6,
        label="their 95 % quantile",
    )
    said = found.share if len(layers) <= FEW else ()
    for i, (bits, share) in enumerate(zip(found.bits, said, strict=False)):
        ax.annotate(
            f"{share:.1%}", (i - 0.2, bits), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=7
        )
    _layer_ticks(ax, layers)
    ax.margins(y=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    shown, names = ax.get_legend_handles_labels()
    order = [names.index(name) for name in ("measured", "domains shuffled, mean", "their 95 % quantile")]
    ax.legend([shown[i] for i in order], [names[i] for i in order], frameon=False, fontsize=8, loc="upper left",
              bbox_to_anchor=(1.0, 1.0))  # fmt: skip
    _name(ax, "I(expert; domain), and its share of H(domain)", "layer", "bits")
    write_png(figure, path)
    return figure


def _shown(layers: Sequence[str]) -> range:
    return range(0, len(layers), math.ceil(len(layers) / MOST))


def _panels(count: int, height: float, *, columns: int = 2, extra: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, and where `extra` inches are asked for a wide one below them, the last."""
    columns = min(4 if count > FEW else columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(11.0, 0.5 + rows * height + extra), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(rows + bool(extra), columns, height_ratios=[height] * rows + [extra] * bool(extra))
    panels = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(count)]
    return figure, [*panels, figure.add_subplot(grid[rows, :])] if extra else panels


def _heatmaps(figure: Figure, panels: Sequence[Axes], ratios: Sequence[np.ndarray], label: str) -> None:
    """Ratios on one logarithmic scale: to the 98th percentile, not below twice nor above eight times chance.

    What lies beyond has the last colour, as two experts that never meet.
    """
    logs = [np.log2(np.maximum(ratio, NEVER)) for ratio in ratios]
    sizes = np.abs(np.concatenate([one.ravel() for one in logs]))
    finite = sizes[np.isfinite(sizes)]
    end = float(np.clip(np.percentile(finite, 98), 1.0, 3.0)) if finite.size else 1.0
    for ax, one in zip(panels, logs, strict=True):
        image = ax.imshow(one, cmap=DIVERGING, norm=Normalize(-end, end), aspect="auto", interpolation="nearest")
        ax.set_facecolor("0.8")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    beyond = "both" if (sizes[~np.isnan(sizes)] > end).any() else "neither"
    bar = colour_bar(figure, image, panels, beyond)
    bar.set_ticks(list(_powers(end)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{2.0**y:.3g}"))
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=8)


def _powers(end: float) -> Iterator[float]:
    """Exponents of the powers of two within ±end."""
    top = math.floor(end)
    yield from map(float, range(-top, top + 1))


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders half-way between steps; the outer ones as far out as their neighbours are in."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _dot(steps: np.ndarray) -> str:
    return "o" if len(steps) == 1 else ""  # a line of one point cannot be seen


def _layer_ticks(ax: Axes, layers: Sequence[str]) -> None:
    each = math.ceil(len(layers) / 16)
    ticks = [*range(0, len(layers) - each, each), len(layers) - 1]
    ax.set_xticks(ticks, [layers[i].removeprefix("layer ") for i in ticks])
    ax.set_xlim(-0.6, len(layers) - 0.4)


def _name(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.tick_params(labelsize=7)


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"
