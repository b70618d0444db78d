"""The page of all studies, experiments/README.md: a forest plot of all claims and a table of verdicts."""

import re
from pathlib import Path

from experiments.lab import drawing
from experiments.lab.results import BEGIN, Results, replace_block
from experiments.lab.tables import markdown_table

PICTURE = "verdicts.png"


def write(experiments: Path) -> None:
    """Rewrite picture and table of README.md, if the file exists and has the markers."""
    page = experiments / "README.md"
    if page.exists() and BEGIN in page.read_text():
        drawing.draw_all_verdicts(all_verdicts(experiments), experiments / PICTURE)
        replace_block(
            page, f"![Every claim, in the direction of the papers]({PICTURE})\n\n{overview_table(experiments)}"
        )


def all_verdicts(experiments: Path) -> dict[str, list[dict]]:
    """Return each study's verdicts as results.json keeps them, by the name of its folder."""
    found = {}
    for script in scripts(experiments):
        path = script.parent / "results.json"
        if path.exists() and (verdicts := Results(path).about.get("verdicts")):
            found[script.parent.name.replace("_", " ")] = verdicts
    return found


def overview_table(experiments: Path) -> str:
    """Return a Markdown table with a row for each study; studies without results are marked "not run yet"."""
    rows = []
    for script in scripts(experiments):
        folder = script.parent
        link = f"[{folder.name.replace('_', ' ')}]({folder.name}/README.md)"
        path = folder / "results.json"
        if not path.exists():
            rows.append([link, title(folder), "not run yet", ""])
            continue
        results = Results(path)
        rows.append([link, results.about["question"], verdict(folder), str(results.recipe)])
    return markdown_table(["study", "question", "verdict", "recipe"], rows)


def scripts(experiments: Path) -> list[Path]:
    """Return the run.py of all studies."""
    return sorted(experiments.glob("[0-9][0-9]_*/run.py"))


def title(folder: Path) -> str:
    """Return the question of a study: the first line of its README.md."""
    page = folder / "README.md"
    return page.read_text().partition("\n")[0].lstrip("# ") if page.exists() else ""


def verdict(folder: Path) -> str:
    """Return the bold text at the start of "## Verdict" in a study's README.md, with links from the folder above."""
    page = folder / "README.md"
    text = page.read_text().partition("## Verdict")[2] if page.exists() else ""
    bold = re.match(r"\s*\*\*(.+?)\*\*", text, re.DOTALL)  # it may span lines
    return " ".join(bold[1].split()).rstrip(".").replace("](../", "](") if bold else "pending"
