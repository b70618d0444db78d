"""Pictures of routing statistics as PNG files; `run_plots.routing_heatmap` draws the load itself.

Ratios to chance have a logarithmic colour scale: half as often is as blue as twice as often is red.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Num
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dsv3_jax.report.colours import DIVERGING, MEANINGS
from dsv3_jax.report.run_plots import DPI, colour_bar, label_load_bar, load_norm, load_over_mean, shortened, write_png
from dsv3_jax.stats import findings
from dsv3_jax.stats.measures import Specialisation, domain_preference

FEW = 8  # up to so many layers are named in the legend and have their numbers written out
NEVER = 2.0**-20  # drawn in place of 0, which has no logarithm
NUM_COLOURS = 10  # in Matplotlib's colour cycle: more domains than that are drawn in one grey
# "information" of stats.json → meaning of its colour, name, and marker.
KINDS = (
    ("token", "token", "token", "o"),
    ("domain", "domain", "domain", "s"),
    ("domain_given_token", "given", "domain, once the token is known", "D"),
)
MOST = 32  # panels in a picture: of a model with more layers, every second, third, … is drawn


def load_over_time(
    steps: Int[np.ndarray, " S"], load: Num[np.ndarray, "S L E"], layers: Sequence[str], path: str | os.PathLike
) -> Figure:
    """Draw each expert's load over training, one panel a layer, and MaxVio of all layers below.

    Args:
        steps: ascending.
        load: assignments of one batch at each step.
        layers: their names.
        path: the PNG file to write.
    Returns: the figure; `figure.axes[i].collections[0].get_array()` holds the values drawn, [E, S].

    Example:
        >>> import tempfile
        >>> steps, load = np.array([10, 20]), np.array([[[3, 1]], [[2, 2]]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = load_over_time(steps, load, ["layer 0"], f"{folder}/load.png")
        >>> figure.axes[0].collections[0].get_array().tolist()  # over the mean, [E, S]
        [[1.5, 1.0], [0.5, 1.0]]
    """
    ratio = np.stack([load_over_mean(batch_load, "training") for batch_load in load])
    norm, beyond = load_norm(ratio)
    shown = _shown(layers)
    figure, (*panels, below) = _panels(len(shown), 2.0, extra=2.4)
    edges = _edges(steps)
    for ax, layer in zip(panels, shown, strict=True):
        image = ax.pcolormesh(edges, np.arange(load.shape[-1] + 1) - 0.5, ratio[:, layer].T, cmap=DIVERGING, norm=norm)
        ax.invert_yaxis()
        ax.set_facecolor("0.8")
        _label_axes(ax, layers[layer], "step", "expert")
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    label_load_bar(colour_bar(figure, image, panels, "max" if beyond else "neither"), norm)
    max_vio = ratio.max(-1) - 1
    marker = "o" if len(steps) == 1 else ""  # a line of one point is invisible
    for layer in range(len(layers)):
        label = layers[layer] if len(layers) <= FEW else None
        colour = f"C{layer}" if label else "0.6"
        below.plot(steps, max_vio[:, layer], label=label, linewidth=1.1, color=colour, marker=marker, markersize=3)
    below.plot(steps, np.nanmean(max_vio, -1), label="mean", linewidth=2, color="black", marker=marker, markersize=3)
    below.set_ylim(bottom=0)
    below.grid(alpha=0.25, linewidth=0.6)
    below.spines[["top", "right"]].set_visible(False)
    below.legend(frameon=False, fontsize=8, ncols=3)
    _label_axes(below, "MaxVio of a batch: (largest load − mean) / mean", "step", "ratio")
    figure.suptitle(findings.max_vio_over_time(steps, max_vio), fontsize=11)
    write_png(figure, path)
    return figure


def domain_lift(
    load_by_domain: Num[np.ndarray, "N L E"], domains: Sequence[str], layers: Sequence[str], path: str | os.PathLike
) -> Figure:
    """Draw p(expert | domain) / p(expert), one panel a layer; see `measures.domain_preference`.

    Args: load_by_domain: assignments; path: the PNG file to write.
    Returns: the figure; `figure.axes[i].images[0].get_array()` holds log2 of the ratio, [N, E].

    Example:
        >>> import tempfile
        >>> load = np.array([[[3, 1]], [[1, 3]]])  # 2 domains, 1 layer, 2 experts
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = domain_lift(load, ["code", "prose"], ["layer 0"], f"{folder}/domains.png")
        >>> (2 ** figure.axes[0].images[0].get_array()).round(1).tolist()
        [[1.5, 0.5], [0.5, 1.5]]
    """
    ratio = domain_preference(load_by_domain)
    shown = _shown(layers)
    figure, panels = _panels(len(shown), 0.75 + 0.22 * len(domains))
    _heatmaps(figure, panels, [ratio[:, layer] for layer in shown], "share of the domain / share of all")
    for ax, layer in zip(panels, shown, strict=True):
        _label_axes(ax, layers[layer], "expert", "")
        ax.set_yticks(range(len(domains)), [shortened(name) for name in domains])
    figure.suptitle(findings.domain_preference(ratio, domains, layers), fontsize=11)
    write_png(figure, path)
    return figure


def coactivation(lift: Float[np.ndarray, "L E E"], layers: Sequence[str], path: str | os.PathLike) -> Figure:
    """Draw how often two experts are chosen for one token, over chance, one panel a layer; see `measures.lift`.

    Args: path: the PNG file to write.
    Returns: the figure; `figure.axes[i].images[0].get_array()` holds log2 of the lift, [E, E].

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = coactivation(np.array([[[np.nan, 2.0], [2.0, np.nan]]]), ["layer 0"], f"{folder}/pairs.png")
        >>> figure.axes[0].images[0].get_array().tolist()  # log2 of the lift
        [[None, 1.0], [1.0, None]]
    """
    shown = _shown(layers)
    figure, panels = _panels(len(shown), 2.7, columns=4)
    _heatmaps(figure, panels, [lift[layer] for layer in shown], "chosen together / chance")
    for ax, layer in zip(panels, shown, strict=True):
        ax.set_aspect("equal")
        ax.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        _label_axes(ax, layers[layer], "expert", "expert")
    figure.suptitle(findings.pair(findings.largest_entry(lift), layers), fontsize=11)
    write_png(figure, path)
    return figure


def entropies(
    overall: Mapping[str, Float[np.ndarray, " L"]],
    by_domain: Mapping[str, Float[np.ndarray, "N L"]],
    domains: Sequence[str],
    layers: Sequence[str],
    path: str | os.PathLike,
) -> Figure:
    """Draw entropies over the layers, of all tokens and of each domain, one panel a title.

    Args:
        overall: title → entropy of all tokens, over its maximum; 1 is even.
        by_domain: the same titles → entropy of each domain's tokens.
        path: the PNG file to write.
    Returns: the figure.

    Example:
        >>> import tempfile
        >>> overall, by_domain = {"Gates": np.array([0.9])}, {"Gates": np.array([[0.8], [1.0]])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = entropies(overall, by_domain, ["code", "prose"], ["layer 0"], f"{folder}/entropy.png")
        >>> figure.axes[0].get_title()
        'Gates'
    """
    figure = Figure(figsize=(11.0, 3.4), dpi=DPI, layout="constrained")
    for i, title in enumerate(overall):
        ax = figure.add_subplot(1, len(overall), i + 1)
        for n, domain in enumerate(domains):
            label, colour = (shortened(domain), f"C{n}") if len(domains) <= NUM_COLOURS else (None, "0.6")
            ax.plot(by_domain[title][n], "o", label=label, color=colour, markersize=4, alpha=0.9)
        ax.plot(
            overall[title], "_", label="all", color="black", markersize=min(16, 150 / len(layers)), markeredgewidth=2
        )
        _layer_ticks(ax, layers)
        ax.set_ylim(0, 1.04)  # all of it: a part would make a thousandth look like a finding
        ax.grid(alpha=0.25, linewidth=0.6, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _label_axes(ax, title, "layer", "entropy / largest possible")
    figure.suptitle(findings.evenness(overall), fontsize=11)
    write_png(figure, path)
    return figure


def information(
    result: Specialisation,
    layers: Sequence[str],
    path: str | os.PathLike,
    measured: Mapping[str, Any] | None = None,
) -> Figure:
    """Draw I(expert; domain) of each layer beside that of shuffled domains, and beside what the token tells.

    Args:
        path: the PNG file to write.
        measured: "information" of stats.json; None draws the domain alone.
    Returns: the figure; the bars of its first panel are `result.bits`, then `result.shuffled_mean`.

    Example:
        >>> import tempfile
        >>> from dsv3_jax.stats.measures import specialisation
        >>> from dsv3_jax.stats.routing_stats import RoutingStats
        >>> stats = RoutingStats.from_loads(np.array([[[4, 0]], [[0, 4]]]), np.array([0, 1]), ["code", "prose"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = information(specialisation(stats, draws=2), ["layer 0"], f"{folder}/information.png")
        >>> [float(bar.get_height()) for bar in figure.axes[0].patches]  # 1 bit, as after any swap of domains
        [1.0, 1.0]
    """
    panels = 1 if measured is None else 2
    figure = Figure(figsize=(min(11.0, (5.6 + 0.5 * len(layers)) * panels), 3.9), dpi=DPI, layout="constrained")
    ax = figure.add_subplot(1, panels, 1)
    x = np.arange(len(layers))
    ax.bar(x - 0.2, result.bits, width=0.4, color=_colour("domain"), label="measured; share of H(domain)")
    ax.bar(x + 0.2, result.shuffled_mean, width=0.4, color=_colour("chance"), label="domains shuffled, mean")
    size = min(11, 120 / len(layers))
    ax.plot(x + 0.2, result.shuffled_95, "_", color="black", markersize=size, markeredgewidth=1.6,
            label="their 95 % quantile")  # fmt: skip
    if len(layers) <= FEW:
        for i, (bits, share) in enumerate(zip(result.bits, result.share, strict=True)):
            ax.annotate(f"{share:.1%}", (i - 0.2, bits), (0, 2), textcoords="offset points", ha="center", va="bottom",
                        fontsize=7)  # fmt: skip
    ax.margins(y=0.12)
    _label_axes(ax, "What the domain tells about the expert", "layer", "bits")
    drawn = [ax]
    if measured is not None:
        both = figure.add_subplot(1, panels, 2)
        for shift, (key, meaning, name, marker) in enumerate(KINDS, start=-1):
            low, high = (np.array(measured[f"{key}_{end}"], np.float64) for end in ("low", "high"))
            middle = np.array(measured[key], np.float64)
            both.errorbar(x + 0.15 * shift, middle, np.maximum([middle - low, high - middle], 0), fmt=marker,
                          color=_colour(meaning), label=name, markersize=4, capsize=2, linewidth=1.2)  # fmt: skip
        both.set_ylim(bottom=min(0.0, both.get_ylim()[0]))
        _label_axes(both, "Token and domain, less what chance gives; 95 % of resampled documents", "layer", "bits")
        drawn.append(both)
    for panel in drawn:
        _layer_ticks(panel, layers)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    known = measured or {}
    figure.suptitle(
        findings.information(*(findings.of_trunk(known[key], layers) for key, *_ in KINDS))
        if known
        else findings.domains(result.bits, result.shuffled_95, layers),
        fontsize=11 if panels > 1 else 8,
    )
    write_png(figure, path)
    return figure


def _colour(meaning: str) -> str:
    return MEANINGS[meaning][0]


def _shown(layers: Sequence[str]) -> range:
    """Select at most MOST layers, evenly spaced."""
    return range(0, len(layers), math.ceil(len(layers) / MOST))


def _panels(count: int, height: float, *, columns: int = 2, extra: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Create a figure of `count` panels, `height` inches each; `extra` inches add a wide panel below, the last one."""
    columns = min(4 if count > FEW else columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(11.0, 0.5 + rows * height + extra), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(rows + bool(extra), columns, height_ratios=[height] * rows + [extra] * bool(extra))
    panels = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(count)]
    return figure, [*panels, figure.add_subplot(grid[rows, :])] if extra else panels


def _heatmaps(figure: Figure, panels: Sequence[Axes], ratios: Sequence[np.ndarray], label: str) -> None:
    """Draw ratios on one logarithmic scale, which ends at their 98th percentile, but within 2 and 8 times chance.

    Ratios beyond the end have the last colour, such as two experts that are never chosen together.
    """
    logs = [np.log2(np.maximum(ratio, NEVER)) for ratio in ratios]
    sizes = np.abs(np.concatenate([log.ravel() for log in logs]))
    finite = sizes[np.isfinite(sizes)]
    end = float(np.clip(np.percentile(finite, 98), 1.0, 3.0)) if finite.size else 1.0
    for ax, log in zip(panels, logs, strict=True):
        image = ax.imshow(log, cmap=DIVERGING, norm=Normalize(-end, end), aspect="auto", interpolation="nearest")
        ax.set_facecolor("0.8")
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    beyond = "both" if (sizes[~np.isnan(sizes)] > end).any() else "neither"
    bar = colour_bar(figure, image, panels, beyond)
    top = math.floor(end)
    bar.set_ticks([float(power) for power in range(-top, top + 1)])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{2.0**y:.3g}"))
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=8)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Put borders half-way between steps, and the outer two at the same distance from the outer steps."""
    if len(steps) == 1:
        return steps[0] + np.array([-0.5, 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middle[0]], middle, [2 * steps[-1] - middle[-1]]])


def _layer_ticks(ax: Axes, layers: Sequence[str]) -> None:
    each = math.ceil(len(layers) / 16)
    ticks = [*range(0, len(layers) - each, each), len(layers) - 1]
    ax.set_xticks(ticks, [layers[i].removeprefix("layer ") for i in ticks])
    ax.set_xlim(-0.6, len(layers) - 0.4)


def _label_axes(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=8)
    ax.set_ylabel(y, fontsize=8)
    ax.tick_params(labelsize=7)
