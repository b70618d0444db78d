"""Pictures of a run's routing and metrics as PNG files.

Figures are created without pyplot, so no global state changes and no window opens. A viewer may
follow a picture during a run, because each file is replaced in one step.
"""

import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from dsv3_jax.host.files import write_atomic
from dsv3_jax.report.colours import DIVERGING, MEANINGS

DPI = 150

# Panels of `training_curves`: title, unit of the y axis, and (metric, name, meaning of its colour)
# of each curve.
PANELS = (
    ("Loss", "nats a token", (
        ("loss", "train", "this"), ("mtp_loss", "train, MTP", "heads"),
        ("val_loss", "validation", "validation"),
    )),
    ("Reward", "mean", (
        ("reward", "train, sampled", "this"), ("val_reward", "held out, likeliest", "validation"),
    )),
    ("Validation", "bits a byte", (("val_bits_per_byte", "validation", "validation"),)),
    ("MaxVio: (largest load − mean) / mean", "ratio", (
        ("max_vio", "batch", "this"), ("max_vio_mtp", "heads", "heads"),
        ("max_vio_global", "validation set", "validation"),
    )),
    ("Learning rate", "learning rate", (("lr", "train", "this"),)),
    ("Gradient norm, before clipping", "L2 norm", (("grad_norm", "train", "this"),)),
    ("Speed", "tokens a second", (("tokens_per_s", "train", "this"),)),
    ("Tokens with a near tie of experts", "share", (("near_ties", "train", "this"),)),
    ("MTP drafts accepted", "share", (("mtp_acceptance", "head", "heads"),)),
    ("Tokens sent to other devices", "copies a token", (
        ("tokens_sent", "train", "this"), ("tokens_sent_far", "to other nodes", "heads"),
    )),
)  # fmt: skip
# Few, so they have a marker
OF_EVALUATIONS = {
    "val_loss", "val_bits_per_byte", "val_reward", "max_vio_global", "max_vio_mtp",
    "mtp_acceptance",
}  # fmt: skip
# A panel with one of these starts at 0.
FROM_ZERO = {
    "max_vio", "lr", "grad_norm", "tokens_per_s", "near_ties", "mtp_acceptance", "tokens_sent",
}  # fmt: skip
# Not drawn. Any other number in a row, such as a new metric of layers, has its own panel.
NOT_DRAWN = {
    "step", "feature_loss", "balance_loss", "accuracy", "dropped", "wire_bytes", "load_entropy",
    "load_gini", "load_min", "load_max", "max_vio_training_mix", "mfu",
}  # fmt: skip
LINES = ("-", "--", ":", "-.")  # of the multi-token heads, one after another


def routing_heatmap(
    load,
    path: str | os.PathLike,
    *,
    domain_loads: Mapping | None = None,
    first_layer: int = 0,
    mtp_blocks: int = 0,
) -> Figure:
    """Draw layers × experts, coloured by load / mean load: white is even, red above, blue below.

    MaxVio of each layer is beside its row. The colour scale ends at 2, or at the 99th percentile if
    that is larger. So one hot expert does not bleach the others; larger values have the last
    colour, and the colour bar has a tip. A layer without load is grey.

    Args:
        load: assignments [L, E] of the sparse layers, any real dtype.
        path: the PNG file to write; its folder is created.
        domain_loads: domain name → assignments [L, E]; each has a small panel with the same
            colours.
        first_layer: number of the first row's layer: dense layers before it count.
        mtp_blocks: number of MTP blocks, which are the last rows.
    Returns: the figure; `figure.axes[i].images[0].get_array()` holds the values drawn, the main
        panel first.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = routing_heatmap([[3, 1], [2, 2]], f"{folder}/load.png")
        >>> figure.axes[0].images[0].get_array().tolist()
        [[1.5, 0.5], [1.0, 1.0]]
    """
    overall = load_over_mean(load)
    trunk = overall.shape[0] - mtp_blocks
    names = [
        f"layer {first_layer + i}" if i < trunk else f"MTP {i - trunk + 1}"
        for i in range(overall.shape[0])
    ]
    domains = {name: load_over_mean(part) for name, part in (domain_loads or {}).items()}

    # One scale for all panels: white at the mean load.
    values = np.concatenate([part[np.isfinite(part)] for part in (overall, *domains.values())])
    top = max(2.0, float(np.percentile(values, 99))) if values.size else 2.0
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top)

    # A wide panel above, and up to four small ones a row below it.
    num_layers = overall.shape[0]
    columns = min(max(len(domains), 1), 4)
    rows = math.ceil(len(domains) / columns)
    main_height = 0.7 + 0.14 * max(num_layers, 10)
    small_height = 0.5 + 0.05 * max(num_layers, 16)
    figure = Figure(
        figsize=(11.0, 0.6 + main_height + rows * small_height), dpi=DPI, layout="constrained"
    )
    grid = figure.add_gridspec(
        1 + rows, columns, height_ratios=[main_height] + [small_height] * rows
    )

    # All domains together, with each layer's MaxVio beside its row.
    main = figure.add_subplot(grid[0, :])
    image = _draw_load(main, overall, norm, names)
    main.set_title(load_finding(load, names), fontsize=11)
    main.text(
        1.008, 1.0, "MaxVio", transform=main.transAxes, fontsize=7, va="bottom", weight="bold"
    )
    for layer, peak in enumerate(overall.max(-1)):
        max_vio = "no load" if np.isnan(peak) else f"{peak - 1:.2f}"
        main.text(
            1.008, layer, max_vio, transform=main.get_yaxis_transform(), fontsize=6.5, va="center"
        )

    # Each domain in the same colours.
    for i, (name, part) in enumerate(domains.items()):
        ax = figure.add_subplot(grid[1 + i // columns, i % columns])
        _draw_load(ax, part, norm, names)
        peaks = part.max(-1)
        mean = f"mean MaxVio {np.nanmean(peaks) - 1:.2f}" if np.isfinite(peaks).any() else "no load"
        short = name if len(name) <= 16 else name[:15] + "…"
        ax.set_title(f"{short} ({mean})", fontsize=9)

    beyond = bool(values.size and values.max() > top)
    extend = "max" if beyond else "neither"
    bar = figure.colorbar(
        image, ax=figure.axes, pad=0.01, fraction=0.05, aspect=main_height / 0.18, extend=extend
    )
    bar.set_label("load / mean load", fontsize=8)
    bar.set_ticks(
        [0.0, 0.5, 1.0, *(t for t in MaxNLocator(4).tick_values(1.0, top) if 1.0 < t <= top)]
    )
    write_png(figure, path)
    return figure


def _draw_load(ax: Axes, ratio: np.ndarray, norm: TwoSlopeNorm, names: Sequence[str]):
    """Draw `ratio` [L, E] as an image, layer 0 on top."""
    image = ax.imshow(ratio, cmap=DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
    ax.set_facecolor("0.8")  # shows through where a layer has no load
    ax.tick_params(labelsize=7)
    ax.set_xlabel("expert", fontsize=8)
    ax.set_ylabel("layer", fontsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.yaxis.set_major_formatter(
        lambda y, _: dict(enumerate(names)).get(round(y), "").removeprefix("layer ")
    )
    return image


def training_curves(metrics: Sequence[Mapping], path: str | os.PathLike) -> Figure:
    """Draw a run's metrics over its steps, a panel each: see `PANELS`.

    Args:
        metrics: rows of metrics.jsonl: `step`, and any of the metrics in `PANELS`. If two rows have
            the same step, as after a resume, the later one is drawn. A panel without values is left
            out.
        path: the PNG file to write; its folder is created.
    Returns: the figure.
    Raises: ValueError if no row has a step and a metric of `PANELS`.

    Example:
        >>> import tempfile
        >>> rows = [{"step": 1, "loss": 5.5}, {"step": 2, "loss": 5.1}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = training_curves(rows, f"{folder}/run.png")
        >>> [ax.get_title() for ax in figure.axes]
        ['Loss']
    """
    # A metric that has no panel yet gets one of its own.
    known = NOT_DRAWN | {key for _, _, curves in PANELS for key, *_ in curves}
    new = dict.fromkeys(
        key for row in metrics for key, x in row.items() if key not in known and type(x) is float
    )
    panels = []
    for title, unit, curves in (*PANELS, *((key, "", ((key, "train", "this"),)) for key in new)):
        drawn = [
            curve
            for key, label, meaning in curves
            for curve in _curves(metrics, key, label, meaning)
        ]
        if drawn:
            panels.append((title, unit, {key for key, *_ in curves}, drawn))
    if not panels:
        raise ValueError(f"none of the {len(metrics)} rows has a step and a metric to draw")

    steps = [step for _, _, _, drawn in panels for curve in drawn for step in curve[0]]
    margin = max(0.02 * (max(steps) - min(steps)), 0.5)

    # Three or four columns, whichever leaves fewer empty places.
    columns = min(len(panels), min((4, 3), key=lambda number: -len(panels) % number))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=DPI, layout="constrained")
    for i, (title, unit, keys, drawn) in enumerate(panels):
        ax = figure.add_subplot(rows, columns, i + 1)
        for x, y, style in drawn:
            ax.plot(x, y, markersize=3.5, linewidth=1.2, **style)
        ax.set(title=title, xlabel="step", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        ax.set_xlim(min(steps) - margin, max(steps) + margin)  # the same in all panels
        if keys & FROM_ZERO:
            ax.set_ylim(0, 1 if "mtp_acceptance" in keys else None)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        if len(drawn) > 1:
            ax.legend(frameon=False, fontsize=8)
    write_png(figure, path)
    return figure


def _curves(
    metrics: Sequence[Mapping], key: str, label: str, meaning: str
) -> Iterator[tuple[list, list, dict]]:
    """Yield ascending steps, values and style of a metric's curves: one, or one for each head."""
    by_step = {
        row["step"]: row[key] for row in metrics if "step" in row and row.get(key) not in (None, [])
    }
    steps = sorted(by_step)
    lists = [value if isinstance(value := by_step[step], list) else [value] for step in steps]
    # a line of one point is invisible
    marker = "o" if key in OF_EVALUATIONS or len(steps) == 1 else ""
    for k, values in enumerate(zip(*lists, strict=True)):
        name = label if len(lists[0]) == 1 else f"{label} {k + 1}"
        style = {
            "label": name,
            "marker": marker,
            "color": MEANINGS[meaning][0],
            "linestyle": LINES[k % len(LINES)],
        }
        yield steps, [float(value) for value in values], style


def load_over_mean(load) -> np.ndarray:
    """Divide each layer's load by its mean: float64 [L, E]; NaN for a layer without load.

    Args: load: assignments [L, E], any real dtype.

    Example:
        >>> load_over_mean([[1, 3], [0, 0]])
        array([[0.5, 1.5],
               [nan, nan]])
    """
    load = np.asarray(load, np.float64)
    mean = load.mean(-1, keepdims=True)
    return np.divide(load, mean, out=np.full_like(load, np.nan), where=mean > 0)


def load_finding(counts, layers: Sequence[str]) -> str:
    """Say which layer and expert are the least even.

    Args: counts: assignments [L, E]; layers: their names.

    Example:
        >>> sentence = load_finding([[3, 1], [2, 2]], ["layer 3", "layer 4"])
        >>> print(sentence.replace("; ", ";\\n"))
        Expert 0 of layer 3 gets 1.50 × the mean load, the most of all;
        MaxVio is 0.25 in the median layer.
    """
    ratio = load_over_mean(counts)
    peaks = ratio.max(-1)  # NaN for a layer without load
    if np.isnan(peaks).all():
        return "No token was counted."
    layer = int(np.nanargmax(peaks))
    return (
        f"Expert {ratio[layer].argmax()} of {layers[layer]} gets {peaks[layer]:.2f} × the mean "
        f"load, the most of all; MaxVio is {np.nanmedian(peaks) - 1:.2f} in the median layer."
    )


def write_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as a PNG file in one step: a reader never sees a part.

    Names of runs and domains are drawn as they are: `$` begins no formula, and a character that the
    font does not have is an empty box without a warning.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_png(Figure(figsize=(1, 1)), f"{folder}/empty.png")
        ...     pathlib.Path(folder, "empty.png").read_bytes()[1:4]
        b'PNG'
    """
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())
