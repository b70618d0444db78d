"""The stored figures: results.json has rows of figures by case and name."""

import json
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
Rows = Iterator[tuple[str, dict]]  # what a case yields: figures with their name


def load() -> dict[str, dict[str, dict]]:
    """Return the stored rows by case and name."""
    return json.loads(RESULTS.read_text())


def save(case: str, name: str, row: dict) -> None:
    """Store a row, with the machine, in place of one with the same name."""
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, jax {version('jax')}"
    )
    everything = load()
    everything.setdefault(case, {})[name] = row | {"machine": machine}
    RESULTS.write_text(json.dumps(everything, indent=1, ensure_ascii=False) + "\n")


def table(rows: dict[str, dict]) -> str:
    """Return a Markdown table.

    >>> print(table({"ours": {"ms": 12.34567, "tokens": 5120}, "theirs": {"ms": 1234.5}}))
    |  | ms | tokens |
    | --- | --- | --- |
    | ours | 12.3 | 5,120 |
    | theirs | 1,234 |  |
    """
    head = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [["", *head], ["---"] * (len(head) + 1)]
    lines += [[name, *(_text(row.get(key, "")) for key in head)] for name, row in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value) -> str:
    """Format a number with three digits or, from 100 on, without a fraction."""
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
