"""The page of all studies, experiments/README.md: a table and a picture of their verdicts."""

import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.lab.drawing import ANSWER_COLOURS, style_axes
from experiments.lab.results import BEGIN, Results, replace_block, write_figure
from experiments.lab.tables import format_number, markdown_table

MOST = 30.0  # halves of an interval that are told apart in the picture


def write(experiments: Path) -> None:
    """Rewrite the table of README.md and verdicts.png, if the file exists and has the markers."""
    page = experiments / "README.md"
    if page.exists() and BEGIN in page.read_text():
        replace_block(page, overview_table(experiments))
        draw(experiments)


def draw(experiments: Path) -> None:
    """Write verdicts.png: a row a study, a dot a claim.

    The axis is a claim's difference over half of its 95 % interval. Right of 0 is what the papers
    lead to expect.
    """
    done = [folder for folder in folders(experiments) if (folder / "results.json").exists()]
    figure = Figure(figsize=(9.0, 1.2 + 0.2 * len(done)), layout="constrained")
    ax = figure.add_subplot()
    ax.axvspan(-1, 1, color="0.94", zorder=0)
    ax.axvline(0, color="0.5", linewidth=0.8)
    for row, folder in enumerate(done):
        for verdict in Results(folder / "results.json").about.get("verdicts", ()):
            if verdict["half"]:
                place = np.clip(verdict["difference"] / verdict["half"], -MOST, MOST)
                colour = ANSWER_COLOURS[verdict["answer"]]
                ax.plot([place], [row], "o", color=colour, markersize=6, alpha=0.75, mew=0)
    unit = "difference / half of its 95 % interval; right of 0: as the papers lead to expect"
    style_axes(ax, "", unit, "")
    ax.set_xscale("symlog", linthresh=3.0)
    ticks = (-MOST, -10, -3, -1, 0, 1, 3, 10, MOST)
    ax.set_xticks(ticks, [format_number(tick, 0) for tick in ticks])
    ax.set_yticks(range(len(done)), [folder.name.replace("_", " ") for folder in done], fontsize=8)
    ax.set_ylim(len(done) - 0.5, -0.5)
    marks = [
        Line2D([], [], marker="o", ls="", color=colour, label=answer)
        for answer, colour in ANSWER_COLOURS.items()
    ]
    figure.legend(handles=marks, frameon=False, fontsize=9, ncols=4, loc="outside upper center")
    write_figure(figure, experiments / "verdicts.png")


def overview_table(experiments: Path) -> str:
    """Return a Markdown table with a row for each study; some are marked "not run yet"."""
    rows = []
    for folder in folders(experiments):
        link = f"[{folder.name.replace('_', ' ')}]({folder.name}/README.md)"
        path = folder / "results.json"
        if not path.exists():
            rows.append([link, title(folder), "not run yet"])
            continue
        results = Results(path)
        rows.append([link, results.about["question"], verdict(folder)])
    return markdown_table(["study", "question", "verdict"], rows)


def folders(experiments: Path) -> list[Path]:
    """Return the folders of all studies, in their order."""
    return sorted(path.parent for path in experiments.glob("[0-9][0-9]_*/study.py"))


def with_results(experiments: Path) -> list[Path]:
    """Return the folders of the studies that have been run."""
    return [folder for folder in folders(experiments) if (folder / "results.json").exists()]


def title(folder: Path) -> str:
    """Return the question of a study: the first line of its README.md."""
    page = folder / "README.md"
    return page.read_text().partition("\n")[0].lstrip("# ") if page.exists() else ""


def headline(folder: Path) -> str:
    """Return the first sentence of a study's verdict, without links; its question if it has none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     page = Path(name, "README.md")
    ...     _ = page.write_text("# Why?\\n## Verdict\\n**By 0.1, see [05](../05/README.md). No.**")
    ...     headline(Path(name))
    'By 0.1, see 05'
    """
    if (text := verdict(folder)) == "pending":
        return title(folder)
    first = re.split(r"\.\s(?=[A-Z0-9])", text)[0]
    return re.sub(r"\[(.+?)\]\(.+?\)", r"\1", first)


def verdict(folder: Path) -> str:
    """Return the bold text that begins "## Verdict" in README.md; links are of the folder above."""
    page = folder / "README.md"
    text = page.read_text().partition("## Verdict")[2] if page.exists() else ""
    bold = re.match(r"\s*\*\*(.+?)\*\*", text, re.DOTALL)  # it may span lines
    return " ".join(bold[1].split()).rstrip(".").replace("](../", "](") if bold else "pending"
