"""Plots that several studies share. `draw_…` writes a picture; the others add to axes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from experiments.lab.claims import Verdict, table_of
from experiments.lab.pooling import noise_for
from experiments.lab.results import Key, Results, write_figure
from experiments.lab.statistics import Noise, compare


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
    style_axes(ax, "", f"difference with its 95 % interval{', ' + units.pop() if len(units) == 1 else ''}", "")
    figure.suptitle(title, fontsize=11)  # as wide as the picture: the claims leave the axes little room
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(verdicts)), [v.claim.text for v in verdicts], fontsize=9)
    ax.invert_yaxis()
    if verdicts:
        figure.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=5, loc="outside lower center")
    write_figure(figure, path)


FARTHEST = 8.0  # half intervals; what lies beyond is drawn there as an arrow


def draw_all_verdicts(by_study: Mapping[str, Sequence[Mapping]], path: Path) -> None:
    """Write a forest plot of the claims of all studies, in units of each one's 95 % interval.

    A claim's difference is turned to the direction that the papers expect (see `claims.as_json`), and divided by the
    half width of its interval. Beyond 1 the interval excludes 0; a bar reaches 1 to each side of its dot.

    Args: by_study: verdicts as `claims.as_json` returns them, by study.
    """
    count = sum(len(verdicts) for verdicts in by_study.values())
    figure = Figure(figsize=(10.5, 1.5 + 0.27 * (count + len(by_study))), layout="constrained")
    ax = figure.add_subplot()
    row, names, answers = 0, list[tuple[int, str, bool]](), dict[str, int]()
    for study, verdicts in by_study.items():
        names.append((row, study, True))
        row += 1
        for verdict in verdicts:
            # Without any spread, a difference is beyond all intervals.
            place = verdict["difference"] / (verdict["half"] or 1e-9)
            colour = ANSWER_COLOURS[verdict["answer"]]
            shown = float(np.clip(place, -FARTHEST, FARTHEST))
            if shown == place:
                ax.plot([place - 1, place + 1], [row, row], color=colour, linewidth=2)
            ax.plot([shown], [row], "o" if shown == place else "<>"[place > 0], color=colour, markersize=6)
            if verdict["published"] is not None and verdict["half"]:
                published = np.clip(verdict["published"] / verdict["half"], -FARTHEST, FARTHEST)
                ax.plot([published], [row], "D", color="black", markersize=4.5, fillstyle="none")
            names.append((row, verdict["claim"], False))
            answers[verdict["answer"]] = answers.get(verdict["answer"], 0) + 1
            row += 1
    total = ", ".join(f"{n} {answer}" for answer, n in answers.items())
    style_axes(
        ax,
        "",
        "← against the papers      half widths of the 95 % interval      as published →",
        "",
    )
    figure.suptitle(f"{count} claims: {total}", fontsize=12)  # as wide as the picture
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks([r for r, *_ in names], [text for _, text, _ in names], fontsize=8.5)
    for label, (_, _, heading) in zip(ax.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if heading else "normal")
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(row - 0.4, -0.6)
    ax.set_xlim(-FARTHEST - 0.5, FARTHEST + 0.5)
    for answer in answers:
        ax.plot([], [], "o-", color=ANSWER_COLOURS[answer], label=answer)
    ax.plot([], [], "D", color="black", fillstyle="none", linestyle="none", label="published value")
    figure.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=5, loc="outside lower center")
    write_figure(figure, path)


def draw_by_size(
    path: Path, results: Results, verdicts: Sequence[Verdict], series: Mapping[str, str], title: str, unit: str
) -> None:
    """Write a picture of claims that are made at several sizes: differences with their intervals by total parameters.

    Args: series: how the names of a series' variants begin, by its label.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.add_subplot()
    for i, (label, start) in enumerate(series.items()):
        found = [v for v in verdicts if v.claim.variant.startswith(start)]
        sizes = [results.records(v.claim.variant)[0]["parameters"]["total"] / 1e6 for v in found]
        means, halves = [v.difference.mean for v in found], [v.difference.half for v in found]
        apart = [size * (1 + 0.03 * i) for size in sizes]
        ax.errorbar(apart, means, yerr=halves, fmt="o-", color=f"C{i}", capsize=4, label=label)
        if i == 0:
            ax.set_xscale("log")
            ax.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
            ax.minorticks_off()
    ax.axhline(0, color="0.5", linewidth=0.8)
    style_axes(ax, title, "parameters, millions", unit)
    ax.legend(frameon=False)
    write_figure(figure, path)


def plot_differences(ax: Axes, results: Results, key: str, title: str, unit: str) -> None:
    """Plot each variant's difference to the first variant: a dot per seed, their mean with its 95 % interval.

    The interval is that of the noise that the study's claims are judged by.
    """
    first, *others = results.variants
    noise = _noise(results, key)
    for row, variant in enumerate(others):
        values = results.paired(variant, first, key)
        if not len(values):
            continue
        colour = colour_of(results, variant)
        ax.plot(values, np.full(len(values), row), "o", color=colour, alpha=0.45, markersize=5, markeredgewidth=0)
        table = table_of(results, key)
        found = compare(table[variant], table[first], noise) if noise else None
        half = 0.0 if found is None else found.half
        ax.errorbar([values.mean()], [row], xerr=[half], fmt="|", color=colour, markersize=14, linewidth=2, capsize=4)
    style_axes(ax, title, f"difference to {first}, {unit}\ndots: seeds, bars: 95 % interval", "")
    ax.axvline(0, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(others)), others)
    ax.set_ylim(max(len(others), 1) - 0.5, -0.5)


def _noise(results: Results, key: str) -> Noise | None:
    """Return the noise that the study's claims are judged by, or None for one seed or one variant."""
    try:
        noise = noise_for(results, results.path.parent.parent)(key)
    except ValueError:
        return None
    return noise if noise.dof else None


def colour_of(results: Results, variant: str) -> str:
    """Return a variant's colour, the same in every picture of its study."""
    return f"C{results.variants.index(variant) % 10}"


def plot_curves(
    ax: Axes, results: Results, name: str, title: str, unit: str, only: Collection[str] | None = None
) -> None:
    """Plot a metric over training steps for each variant: mean over seeds, shaded from minimum to maximum.

    Args: name: of the curve. only: the variants to plot; None means all.
    """
    for variant in results.variants:
        if only is not None and variant not in only:
            continue
        steps, values = results.curve(variant, name)
        colour = colour_of(results, variant)
        ax.plot(steps, values.mean(0), label=variant, color=colour, linewidth=1.4)
        ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    style_axes(ax, title, "step", unit)
    bottom, top = ax.get_ylim()
    ax.set_ylim(top=top + 0.3 * (top - bottom))  # space for the legend above the curves
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def plot_strengths(
    ax: Axes, results: Results, names: Sequence[str], x: Key, y: Key, colour: str, label: str, *, filled: bool = True
) -> None:
    """Join the strengths of one rule by a line, means over seeds; the strongest, the last, has the largest dot."""
    places, heights = ([results.values(name, key).mean() for name in names] for key in (x, y))
    ax.plot(places, heights, "-", color=colour, linewidth=1.2)
    sizes, face = 30 * (1 + np.arange(len(names))), colour if filled else "none"
    ax.scatter(places, heights, sizes, facecolors=face, edgecolors=colour, label=label or None)


def draw_loss_by_cost(
    results: Results, path: Path, cost: str | Callable[[Results, str], float], label: str, title: str
) -> None:
    """Write a picture of validation loss against a cost on a logarithmic axis: dots are seeds, a circle their mean.

    Args:
        cost: the key of a measured number, averaged over seeds; or a function (results, variant) → number.
        label: of the cost's axis.
    """
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    ax = figure.add_subplot()
    costs = []
    noise = _noise(results, "val_loss")
    for variant in results.variants:
        x = cost(results, variant) if callable(cost) else float(results.values(variant, cost).mean())
        losses = results.values(variant, "val_loss")
        colour = colour_of(results, variant)
        ax.plot(np.full(len(losses), x), losses, ".", color=colour, alpha=0.6)
        # Of differences between variants: the seeds' common effect is left out.
        half = noise.sd * stats.t.ppf(0.975, noise.dof) / np.sqrt(len(losses)) if noise else 0.0
        ax.errorbar([x], [losses.mean()], yerr=[half], fmt="o", color=colour, markersize=9, capsize=4, label=variant)
        costs.append(x)
    style_axes(ax, title, label, "validation loss, nats per token; bars: 95 % interval")
    ax.set_xscale("log")
    ax.set_xticks(sorted(set(costs)), [f"{c:,.4g}" for c in sorted(set(costs))])
    ax.minorticks_off()
    figure.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=4, loc="outside lower center")
    write_figure(figure, path)
