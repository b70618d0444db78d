"""The table that every campaign fills: what was tried, and how often the project fell short."""

from collections import Counter, defaultdict

# Column: what it counts. All but the first are to be 0.
COLUMNS = {
    "tried": "inputs, or events such as a kill",
    "tracebacks": "an error that is no sentence, or a crash",
    "hangs": "no answer within the limit",
    "memory": "more memory than the limit",
    "silent": "accepted, although it is known to be wrong",
    "half-written": "a failure that leaves files, or a part of a result at its place",
    "not resumed": "training that ends, although a checkpoint is whole",
    "sentences": "a message over 500 characters, or with control codes",
}


class Table:
    """Counts by campaign.

    Example:
        >>> table = Table()
        >>> table.add("config.json", [])
        >>> table.add("config.json", ["hangs"])
        >>> table.fell_short
        1
    """

    def __init__(self) -> None:
        self._rows: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, campaign: str, faults: list[str]) -> None:
        """Count one trial and its faults, which are names of columns."""
        unknown = set(faults) - COLUMNS.keys()
        assert not unknown, unknown
        self._rows[campaign].update(["tried", *faults])

    @property
    def fell_short(self) -> int:
        """Number of faults in all campaigns."""
        return sum(count for row in self._rows.values() for column, count in row.items() if column != "tried")

    def __str__(self) -> str:
        total: Counter[str] = Counter()
        for row in self._rows.values():
            total.update(row)
        lines = ["| campaign | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
        for name, row in [*self._rows.items(), ("all", total)]:
            lines.append(f"| {name} | " + " | ".join(f"{row[column]:,}" for column in COLUMNS) + " |")
        return "\n".join(lines)
