"""Pictures of a run's routing and metrics as PNG files.

Figures are created without pyplot, so no global state changes and no window opens. A viewer may follow a picture during
a run, because each file is replaced in one step.
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

from dsv3_jax.files import write_atomic
from dsv3_jax.report.colours import DIVERGING, MEANINGS

DPI = 150

# Panels of `training_curves`: title, unit of the y axis, and (metric, name, marker) of each curve. Evaluations are few,
# so they have a marker.
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
    ("Tokens sent to other devices", "copies a token", (("tokens_sent", "train", ""),)),
)
# A panel with one of these starts at 0.
FROM_ZERO = {"max_vio", "lr", "grad_norm", "tokens_per_s", "mtp_acceptance", "tokens_sent"}
# Not drawn. Any other number in a row, such as a new metric of layers, has a panel of its own.
NOT_DRAWN = {
    "step", "feature_loss", "balance_loss", "accuracy", "dropped", "crossed", "wire_bytes", "load_entropy", "load_gini",
    "load_min", "load_max", "mfu",
}  # fmt: skip
LINES = ("-", "--", ":", "-.")  # of the multi-token heads, one after another
# A curve's name, or its beginning → its meaning.
CURVES = {"train, MTP": "heads", "head": "heads", "validation": "validation", "train": "this", "batch": "this"}
OLD_NAMES = {"tokens_sent": "crossed"}  # of metrics in the rows of older runs


def routing_heatmap(
    load,
    path: str | os.PathLike,
    *,
    title: str | None = None,
    domain_loads: Mapping | None = None,
    first_layer: int = 0,
    mtp_blocks: int = 0,
) -> Figure:
    """Draw layers × experts, coloured by load / mean load of the layer: white is even, red above, blue below.

    MaxVio of each layer is beside its row. The colour scale ends at 2, or at the 99th percentile if that is larger. So
    one hot expert does not bleach the others; larger values have the last colour, and the colour bar has a tip. A layer
    without load is grey.

    Args:
        load: assignments [L, E] of the sparse layers, any real dtype.
        path: the PNG file to write; its folder is created.
        title: of the picture; None means a sentence that names the expert with the largest load.
        domain_loads: domain name → assignments [L, E]; each has a small panel with the same colours.
        first_layer: number of the first row's layer: dense layers before it count.
        mtp_blocks: number of MTP blocks, which are the last rows.
    Returns: the figure; `figure.axes[i].images[0].get_array()` holds the values drawn, the main panel first.
    Raises: ValueError if a load is not [L, E], is negative or not finite, or differs in shape.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = routing_heatmap([[3, 1], [2, 2]], f"{folder}/load.png")
        >>> figure.axes[0].images[0].get_array().tolist()
        [[1.5, 0.5], [1.0, 1.0]]
    """
    overall = load_over_mean(load, title or "all text")
    trunk = overall.shape[0] - mtp_blocks
    names = [f"layer {first_layer + i}" if i < trunk else f"MTP {i - trunk + 1}" for i in range(overall.shape[0])]
    domains = {name: load_over_mean(part, name) for name, part in (domain_loads or {}).items()}
    for name, part in domains.items():
        if part.shape != overall.shape:
            raise ValueError(f"load of {name!r} has shape {part.shape}, but the load of all text has {overall.shape}")
    norm, beyond = load_norm(np.stack([overall, *domains.values()]))

    num_layers = overall.shape[0]
    columns = min(max(len(domains), 1), 4)
    rows = math.ceil(len(domains) / columns)
    main_height, small_height = 0.7 + 0.14 * max(num_layers, 10), 0.5 + 0.05 * max(num_layers, 16)
    figure = Figure(figsize=(11.0, 0.6 + main_height + rows * small_height), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[main_height] + [small_height] * rows)

    main = figure.add_subplot(grid[0, :])
    image = _draw_load(main, overall, norm)
    main.set_title(load_finding(load, names) if title is None else title, fontsize=11)
    _label_axes(main, left=True)
    main.yaxis.set_major_formatter(lambda y, _: _row_name(y, names))
    beside = main.get_yaxis_transform()  # x in axes, y in layers
    main.text(1.008, 1.0, "MaxVio", transform=main.transAxes, fontsize=7, va="bottom", weight="bold")
    for layer, peak in enumerate(overall.max(-1)):
        max_vio = "no load" if np.isnan(peak) else f"{peak - 1:.2f}"
        main.text(1.008, layer, max_vio, transform=beside, fontsize=6.5, va="center")
    for i, (name, part) in enumerate(domains.items()):
        ax = figure.add_subplot(grid[1 + i // columns, i % columns])
        _draw_load(ax, part, norm)
        peaks = part.max(-1)
        mean = f"mean MaxVio {np.nanmean(peaks) - 1:.2f}" if np.isfinite(peaks).any() else "no load"
        ax.set_title(f"{shortened(name)} ({mean})", fontsize=9)
        _label_axes(ax, left=i % columns == 0)
        ax.yaxis.set_major_formatter(lambda y, _: _row_name(y, names))
    label_load_bar(colour_bar(figure, image, figure.axes, "max" if beyond else "neither"), norm)
    write_png(figure, path)
    return figure


def training_curves(metrics: Sequence[Mapping], path: str | os.PathLike) -> Figure:
    """Draw a run's metrics over its steps, a panel each: see `PANELS`.

    Args:
        metrics: rows of metrics.jsonl: `step`, and any of the metrics in `PANELS`. If two rows have the same step, as
            after a resume, the later one is drawn. A panel without values is left out.
        path: the PNG file to write; its folder is created.
    Returns: the figure.
    Raises: ValueError if no row has a step and a metric of `PANELS`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figure = training_curves([{"step": 1, "loss": 5.5}, {"step": 2, "loss": 5.1}], f"{folder}/run.png")
        >>> [ax.get_title() for ax in figure.axes]
        ['Loss']
    """
    panels = []
    known = NOT_DRAWN | {key for _, _, curves in PANELS for key, *_ in curves}
    new = dict.fromkeys(key for row in metrics for key, x in row.items() if key not in known and type(x) is float)
    for title, unit, curves in (*PANELS, *((key, "", ((key, "train", ""),)) for key in new)):
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
            marker = "o" if len(steps) == 1 else marker  # a line of one point is invisible
            meaning = next(CURVES[name] for name in CURVES if label.startswith(name))
            style = LINES[sum(other[0].startswith("train, MTP") for other in drawn[:j]) % len(LINES)]
            ax.plot(
                steps,
                values,
                label=label,
                marker=marker,
                markersize=3.5,
                linewidth=1.2,
                color=MEANINGS[meaning][0],
                linestyle=style if meaning == "heads" else "-",
            )
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
    if finding := _last_validation(metrics):
        figure.suptitle(finding, fontsize=11)
    write_png(figure, path)
    return figure


def _last_validation(metrics: Sequence[Mapping]) -> str | None:
    """Say what the last evaluation measured; None without one."""
    rows = [row for row in metrics if "step" in row and isinstance(row.get("val_loss"), float)]
    if not rows:
        return None
    row = max(rows, key=lambda row: row["step"])
    bits = row.get("val_bits_per_byte")
    measured = f"{row['val_loss']:.3f} nats a token" + (f", {bits:.2f} bits a byte" if isinstance(bits, float) else "")
    return f"Validation at step {row['step']:,}: {measured}"


def shortened(name: str) -> str:
    """A domain's name of 16 characters at most.

    Example:
        >>> shortened("https://example.org/a")
        'https://example…'
    """
    return name if len(name) <= 16 else name[:15] + "…"


def load_over_mean(load, name: str) -> np.ndarray:
    """Divide each layer's load by its mean: load / mean load, float64 [L, E]; NaN for a layer without load.

    Args: load: assignments [L, E], any real dtype; name: what the load is of, for errors.
    Raises: ValueError if the load is not [L, E], is negative or not finite.

    Example:
        >>> load_over_mean([[1, 3], [0, 0]], "code")
        array([[0.5, 1.5],
               [nan, nan]])
    """
    load = np.asarray(load, np.float64)
    if load.ndim != 2 or not load.size:
        raise ValueError(f"load of {name!r} has shape {load.shape}, but must be [layers, experts]")
    if not np.isfinite(load).all() or load.min() < 0:
        raise ValueError(f"load of {name!r} holds {load[~(load >= 0) | np.isinf(load)][0]}, which is not a count")
    mean = load.mean(-1, keepdims=True)
    return np.divide(load, mean, out=np.full_like(load, np.nan), where=mean > 0)


def load_finding(counts, layers: Sequence[str]) -> str:
    """Say which layer and expert are the least even.

    Args: counts: assignments [L, E]; layers: their names.

    Example:
        >>> load_finding([[3, 1], [2, 2]], ["layer 3", "layer 4"])
        'Expert 0 of layer 3 gets 1.50 × the mean load, the most of all; MaxVio is 0.25 in the median layer.'
    """
    ratio = load_over_mean(counts, "all text")
    peaks = ratio.max(-1)  # NaN for a layer without load
    if np.isnan(peaks).all():
        return "No token was counted."
    layer = int(np.nanargmax(peaks))
    return (
        f"Expert {ratio[layer].argmax()} of {layers[layer]} gets {peaks[layer]:.2f} × the mean load, the most of all; "
        f"MaxVio is {np.nanmedian(peaks) - 1:.2f} in the median layer."
    )


def load_norm(ratio: np.ndarray) -> tuple[TwoSlopeNorm, bool]:
    """Return the colour scale of load / mean load, and whether some values exceed it: see `routing_heatmap`.

    Example:
        >>> norm, beyond = load_norm(np.array([[1.5, 0.5]]))
        >>> norm.vmax, beyond
        (2.0, False)
    """
    values = ratio[np.isfinite(ratio)]
    top = max(2.0, float(np.percentile(values, 99))) if values.size else 2.0
    return TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top), bool(values.size and values.max() > top)


def colour_bar(figure: Figure, image, axes: Sequence[Axes], extend: str):
    """Draw a colour bar beside these axes, always 0.18 inches wide, with tips 0.12 inches long."""
    height = figure.get_figheight()
    return figure.colorbar(
        image, ax=axes, pad=0.01, fraction=0.05, aspect=height / 0.18, extend=extend, extendfrac=0.12 / height
    )


def label_load_bar(bar, norm: TwoSlopeNorm) -> None:
    """Label a colour bar of load / mean load."""
    bar.set_label("load / mean load", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    top = float(norm.vmax or 1.0)  # vmax may be None by its type
    ticks = [t for t in MaxNLocator(4).tick_values(1.0, top) if 1.0 < t <= top]
    shown = [0.0, 0.5, 1.0, *ticks]
    bar.set_ticks(shown, labels=[f"{t:g}" for t in shown])


def _draw_load(ax, ratio: np.ndarray, norm: TwoSlopeNorm):
    """Draw `ratio` [L, E] as an image, layer 0 on top."""
    image = ax.imshow(ratio, cmap=DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
    ax.set_facecolor("0.8")  # shows through where a layer has no load
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(12 if ratio.shape[0] > 16 else 16, integer=True))
    return image


def _row_name(row: float, names: Sequence[str]) -> str:
    return names[round(row)].removeprefix("layer ") if 0 <= round(row) < len(names) else ""


def _label_axes(ax, *, left: bool) -> None:
    ax.tick_params(labelsize=7)
    ax.set_xlabel("expert", fontsize=8)
    if left:
        ax.set_ylabel("layer", fontsize=8)


def _series(metrics: Sequence[Mapping], key: str, label: str) -> Iterator[tuple[str, list[int], list[float]]]:
    """Yield the name, ascending steps and values of a metric's curves: one, or one for each multi-token head."""
    by_step = {}
    for row in metrics:
        value = row.get(key, row.get(OLD_NAMES.get(key)))
        if "step" in row and value not in (None, []):
            by_step[row["step"]] = value if isinstance(value, list) else [value]
    steps = sorted(by_step)
    values = [by_step[step] for step in steps]
    for k, column in enumerate(zip(*values, strict=True), start=1):
        yield label if len(values[0]) == 1 else f"{label} {k}", steps, [float(value) for value in column]


def write_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as a PNG file in one step: a reader sees the old file or the new one, never a part.

    Names of runs and domains are drawn as they are: `$` begins no formula, and a character that the font does not have
    is an empty box without a warning.

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
