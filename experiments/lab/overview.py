"""experiments/README.md's table of all studies, made from their results.json and the verdicts of their README.md."""

import re
from pathlib import Path

from experiments.lab.results import BEGIN, Results, markdown, put_between


def write(experiments: Path) -> None:
    """Make the table anew, where there is a README.md with a place for it."""
    page = experiments / "README.md"
    if page.exists() and BEGIN in page.read_text():
        put_between(page, table(experiments))


def table(experiments: Path) -> str:
    """Markdown: a row for each study, also those without results yet."""
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
            + [results.told("date"), results.told("commit")]
        )
    return markdown(["study", "question", "published", "ours", "verdict", "date", "commit"], rows)


def title(folder: Path) -> str:
    """The first line of a study's README.md: its question."""
    page = folder / "README.md"
    return page.read_text().partition("\n")[0].lstrip("# ") if page.exists() else ""


def verdict(folder: Path) -> str:
    """The bold words that a study's last section, "## Verdict", begins with."""
    page = folder / "README.md"
    text = page.read_text().partition("## Verdict")[2] if page.exists() else ""
    found = re.match(r"\s*\*\*(.+?)\*\*", text, re.DOTALL)  # they may go over a line's end
    return " ".join(found[1].split()).rstrip(".") if found else "to come"
