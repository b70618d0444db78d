"""Pictures of routing and of a run, as PNG files.

Figures are made without pyplot, so that nothing global is touched and no window opens; a file is written whole or
not at all (a temporary one beside it, then renamed), so that a viewer may follow it while a run goes on.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsv3_jax.report.colours import DIVERGING

DPI = 150

# Panels of `training_curves`: title, unit of the y axis, and for each curve its metric, its name and its marker
# (evaluations are few: they are dots on their line).
PANELS = (
    ("Loss", "nats a token", (("loss", "train", ""), ("mtp_loss", "train, MTP", ""), ("val_loss", "validation", "o"))),
    ("Validation", "bits a byte", (("val_bits_per_byte", "validation", "o"),)),
    (
        "MaxVio: (largest load − mean) / mean",
        "ratio",
        (("max_vio", "batch", ""), ("max_vio_global", "validation set", "o")),
    ),
    ("Learning rate", "learning rate", (("lr", "train", ""),)),
    ("Gradient norm, before clipping", "L2 norm", (("grad_norm", "train", ""),)),
    ("Speed", "tokens a second", (("tokens_per_s", "train", ""),)),
    ("MTP drafts accepted", "share", (("mtp_acceptance", "head", "o"),)),
)
FROM_ZERO = {"max_vio", "lr", "grad_norm", "tokens_per_s", "mtp_acceptance"}  # a panel with one of these starts at 0


def routing_heatmap(
    load,
    path: str | os.PathLike,
    *,
    title: str = "Routed load",
    domain_loads: Mapping | None = None,
    mtp_blocks: int = 0,
) -> Figure:
    """Layers × experts, coloured by load / mean load of the layer: white is even, red above, blue below.

    MaxVio of each layer stands beside its row. Colours end at 2, or at the 99th percentile if that is more; what lies
    beyond has the last colour (the colour bar then has a tip), so that one hot expert does not bleach the others.
    A layer without any load is grey.

    Args:
        load: counts [L, E] of the sparse layers, any real dtype.
        path: of the PNG; its folder is made.
        title: of the picture.
        domain_loads: domain name → counts [L, E]; each gets a small panel with the same colours.
        mtp_blocks: how many of the last rows are MTP blocks', and named so.
    Returns: the figure; the values drawn are `figure.axes[i].images[0].get_array()`, the main panel first.
    Raises: ValueError if a load is not [L, E] with E ≥ 2, is negative or not finite, or differs in shape.
    """
    whole = load_over_mean(load, title)
    domains = {name: load_over_mean(part, name) for name, part in (domain_loads or {}).items()}
    for name, part in domains.items():
        if part.shape != whole.shape:
            raise ValueError(f"load of {name!r} has shape {part.shape}, the whole has {whole.shape}")
    norm, beyond = load_norm(np.stack([whole, *domains.values()]))

    num_layers = whole.shape[0]
    columns = min(max(len(domains), 1), 4)
    rows = math.ceil(len(domains) / columns)
    main_height, small_height = 0.7 + 0.14 * max(num_layers, 10), 0.5 + 0.05 * max(num_layers, 16)
    figure = Figure(figsize=(11.0, 0.6 + main_height + rows * small_height), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[main_height] + [small_height] * rows)

    main = figure.add_subplot(grid[0, :])
    image = _draw_load(main, whole, norm)
    main.set_title(title, fontsize=11)
    _label_axes(main, left=True)
    main.yaxis.set_major_formatter(lambda y, _: _row_name(y, num_layers - mtp_blocks))
    beside = main.get_yaxis_transform()  # x in axes, y in layers
    main.text(1.008, 1.0, "MaxVio", transform=main.transAxes, fontsize=7, va="bottom", weight="bold")
    for layer, peak in enumerate(whole.max(-1)):
        word = "no load" if np.isnan(peak) else f"{peak - 1:.2f}"
        main.text(1.008, layer, word, transform=beside, fontsize=6.5, va="center")
    for i, (name, part) in enumerate(domains.items()):
        ax = figure.add_subplot(grid[1 + i // columns, i % columns])
        _draw_load(ax, part, norm)
        peaks = part.max(-1)
        mean = f"mean MaxVio {np.nanmean(peaks) - 1:.2f}" if np.isfinite(peaks).any() else "no load"
        ax.set_title(f"{name} ({mean})", fontsize=9)
        _label_axes(ax, left=i % columns == 0)
        ax.yaxis.set_major_formatter(lambda y, _: _row_name(y, num_layers - mtp_blocks))
    label_load_bar(colour_bar(figure, image, figure.axes, "max" if beyond else "neither"), norm)
    write_png(figure, path)
    return figure


def training_curves(metrics: Sequence[Mapping], path: str | os.PathLike) -> Figure:
    """The curves of a run over its steps: loss, bits a byte, MaxVio, learning rate, gradient norm, speed, acceptance.

    Args:
        metrics: rows as training logs them: `step`, and any of the metrics in `PANELS`; where a step occurs again,
            as after a resumed run, the later row stands. A panel without a value is left out.
        path: of the PNG; its folder is made.
    Returns: the figure.
    Raises: ValueError if no row has a step and a known metric.
    """
    panels = []
    for title, unit, curves in PANELS:
        drawn = [
            (name, marker, key, steps, values)
            for key, label, marker in curves
            for name, steps, values in _series(metrics, key, label)
        ]
        if drawn:
            panels.append((title, unit, drawn))
    if not panels:
        raise ValueError(f"none of the {len(metrics)} rows has a step and a metric to draw")
    steps_seen = [step for _, _, drawn in panels for curve in drawn for step in curve[3]]
    first, last = min(steps_seen), max(steps_seen)
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=DPI, layout="constrained")
    for i, (title, unit, drawn) in enumerate(panels):
        ax = figure.add_subplot(rows, columns, i + 1)
        for j, (label, marker, _, steps, values) in enumerate(drawn):
            marker = "o" if len(steps) == 1 else marker  # a line of one point cannot be seen
            ax.plot(steps, values, label=label, marker=marker, markersize=3.5, linewidth=1.2, color=f"C{j}")
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        margin = max(0.02 * (last - first), 0.5)
        ax.set_xlim(first - margin, last + margin)  # the same in all panels
        if any(key in FROM_ZERO for _, _, key, _, _ in drawn):
            ax.set_ylim(bottom=0)
        if drawn[0][2] == "mtp_acceptance":
            ax.set_ylim(0, 1)
        if drawn[0][2] == "lr":
            ax.ticklabel_format(axis="y", scilimits=(0, 0))
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        if len(drawn) > 1:
            ax.legend(frameon=False, fontsize=8)
    write_png(figure, path)
    return figure


def load_over_mean(load, name: str) -> np.ndarray:
    """load [L, E] → float64 [L, E], each layer divided by its mean; NaN where a layer has no load."""
    load = np.asarray(load, np.float64)
    if load.ndim != 2 or load.shape[0] < 1 or load.shape[1] < 2:
        raise ValueError(f"load of {name!r} has shape {load.shape}, not [layers, experts]")
    if not np.isfinite(load).all() or load.min() < 0:
        raise ValueError(f"load of {name!r} holds {load[~(load >= 0) | np.isinf(load)][0]}, which is not a count")
    mean = load.mean(-1, keepdims=True)
    return np.divide(load, mean, out=np.full_like(load, np.nan), where=mean > 0)


def load_norm(ratio: np.ndarray) -> tuple[TwoSlopeNorm, bool]:
    """Colours of load / mean load, and whether some lie beyond the last: see `routing_heatmap`."""
    values = ratio[np.isfinite(ratio)]
    top = max(2.0, float(np.percentile(values, 99))) if values.size else 2.0
    return TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top), bool(values.size and values.max() > top)


def colour_bar(figure: Figure, image, axes: Sequence[Axes], extend: str):
    """A colour bar beside these axes: 0.18 inches wide whatever its height, its tips 0.12 long."""
    height = figure.get_figheight()
    return figure.colorbar(
        image, ax=axes, pad=0.01, fraction=0.05, aspect=height / 0.18, extend=extend, extendfrac=0.12 / height
    )


def label_load_bar(bar, norm: TwoSlopeNorm) -> None:
    """Ticks of a colour bar of load / mean load."""
    bar.set_label("load / mean load", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    top = float(norm.vmax or 1.0)  # its type leaves room for none
    ticks = [t for t in MaxNLocator(4).tick_values(1.0, top) if 1.0 < t <= top]
    bar.set_ticks([0.0, 0.5, 1.0, *ticks])


def _draw_load(ax, ratio: np.ndarray, norm: TwoSlopeNorm):
    """`ratio` [L, E] as an image, layer 0 on top."""
    image = ax.imshow(ratio, cmap=DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
    ax.set_facecolor("0.8")  # shows through where a layer has no load
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(12 if ratio.shape[0] > 16 else 16, integer=True))
    return image


def _row_name(row: float, trunk: int) -> str:
    return f"{row:.0f}" if row < trunk else f"MTP {row - trunk + 1:.0f}"


def _label_axes(ax, *, left: bool) -> None:
    ax.tick_params(labelsize=7)
    ax.set_xlabel("expert", fontsize=8)
    if left:
        ax.set_ylabel("sparse layer", fontsize=8)


def _series(metrics: Sequence[Mapping], key: str, label: str) -> Iterator[tuple[str, list[int], list[float]]]:
    """Name, steps (ascending) and values of a metric's curves, over the rows that have it: one a multi-token head."""
    found = {row["step"]: row[key] for row in metrics if "step" in row and row.get(key) not in (None, [])}
    steps = sorted(found)
    values = [found[step] if isinstance(found[step], list) else [found[step]] for step in steps]
    for k, column in enumerate(zip(*values, strict=True), start=1):
        yield label if len(values[0]) == 1 else f"{label} {k}", steps, [float(value) for value in column]


def write_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
