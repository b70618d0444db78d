"""The page of all studies, experiments/README.md: a table of their verdicts."""

import re
from pathlib import Path

from experiments.lab.results import BEGIN, Results, replace_block
from experiments.lab.tables import markdown_table


def write(experiments: Path) -> None:
    """Rewrite the table of README.md, if the file exists and has the markers."""
    page = experiments / "README.md"
    if page.exists() and BEGIN in page.read_text():
        replace_block(page, overview_table(experiments))


def overview_table(experiments: Path) -> str:
    """Return a Markdown table with a row for each study; some are marked "not run yet"."""
    rows = []
    for folder in folders(experiments):
        link = f"[{folder.name.replace('_', ' ')}]({folder.name}/README.md)"
        path = folder / "results.json"
        if not path.exists():
            rows.append([link, title(folder), "not run yet", ""])
            continue
        results = Results(path)
        rows.append([link, results.about["question"], verdict(folder), str(results.recipe)])
    return markdown_table(["study", "question", "verdict", "recipe"], rows)


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


def verdict(folder: Path) -> str:
    """Return the bold text that begins "## Verdict" in README.md; links are of the folder above."""
    page = folder / "README.md"
    text = page.read_text().partition("## Verdict")[2] if page.exists() else ""
    bold = re.match(r"\s*\*\*(.+?)\*\*", text, re.DOTALL)  # it may span lines
    return " ".join(bold[1].split()).rstrip(".").replace("](../", "](") if bold else "pending"
