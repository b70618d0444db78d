"""The table of all studies in experiments/README.md, made from each study's results.json and README.md."""

import re
from pathlib import Path

from experiments.lab.results import BEGIN, Results, replace_block
from experiments.lab.tables import markdown_table


def write(experiments: Path) -> None:
    """Rewrite the table in README.md, if the file exists and has the markers."""
    page = experiments / "README.md"
    if page.exists() and BEGIN in page.read_text():
        replace_block(page, overview_table(experiments))


def overview_table(experiments: Path) -> str:
    """Return a Markdown table with a row for each study; studies without results are marked "not run yet"."""
    rows = []
    for script in sorted(experiments.glob("[0-9][0-9]_*/run.py")):
        folder = script.parent
        link = f"[{folder.name.replace('_', ' ')}]({folder.name}/README.md)"
        path = folder / "results.json"
        if not path.exists():
            rows.append([link, title(folder), "", "not run yet", "", "", ""])
            continue
        results = Results(path)
        about = results.about
        rows.append(
            [link, about["question"], about["published"], about.get("ours", ""), verdict(folder)]
            + [results.provenance("date"), results.provenance("commit")]
        )
    return markdown_table(["study", "question", "published", "ours", "verdict", "date", "commit"], rows)


def title(folder: Path) -> str:
    """Return the question of a study: the first line of its README.md."""
    page = folder / "README.md"
    return page.read_text().partition("\n")[0].lstrip("# ") if page.exists() else ""


def verdict(folder: Path) -> str:
    """Return the bold text at the start of the section "## Verdict" of a study's README.md."""
    page = folder / "README.md"
    text = page.read_text().partition("## Verdict")[2] if page.exists() else ""
    bold = re.match(r"\s*\*\*(.+?)\*\*", text, re.DOTALL)  # it may span lines
    return " ".join(bold[1].split()).rstrip(".") if bold else "pending"
