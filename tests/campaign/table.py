"""The table that every campaign fills: what was tried, and how often the project fell short."""

import json
import time
from collections import Counter, defaultdict
from pathlib import Path

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

    Args:
        record: a file of JSON lines, one for each `add`. Its lines of the same seed are counted, too, so a campaign
            that was stopped resumes with its next trial. None means that nothing is kept.

    Example:
        >>> table = Table()
        >>> table.begin("inputs", 0)
        >>> table.add("config.json", [])
        >>> table.begin("inputs", 1)
        >>> table.add("config.json", ["hangs"])
        >>> table.fell_short, table.first("inputs"), table.first("kills")
        (1, 2, 0)
    """

    def __init__(self, record: Path | None = None, seed: int = 0) -> None:
        self._rows: dict[str, Counter[str]] = defaultdict(Counter)
        self._first: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._campaign, self._number, self._since = "", 0, time.monotonic()
        self._record, self._seed = record, seed
        for line in record.read_text().splitlines() if record is not None and record.exists() else ():
            row = json.loads(line)
            if row["seed"] == seed:
                self._count(row)

    def first(self, campaign: str) -> int:
        """The number of a campaign's first trial that was not tried yet."""
        return self._first[campaign]

    def seconds(self, campaign: str) -> float:
        """Seconds that a campaign's trials have taken, with those of its parts, such as "fuzz run.json"."""
        return sum(spent for name, spent in self._seconds.items() if name.split(" ")[0] == campaign)

    def begin(self, campaign: str, number: int) -> None:
        """Name the trial that the next `add` counts."""
        self._campaign, self._number, self._since = campaign, number, time.monotonic()

    def add(self, name: str, faults: list[str], count: int = 1) -> None:
        """Count `count` trials, of which the last has faults, which are names of columns."""
        unknown = set(faults) - COLUMNS.keys()
        assert not unknown, unknown
        row = {"campaign": self._campaign, "seed": self._seed, "number": self._number, "count": count}
        row |= {"name": name, "faults": faults, "seconds": round(time.monotonic() - self._since, 1)}
        self._count(row)
        if self._record is not None:
            with self._record.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _count(self, row: dict) -> None:
        self._rows[row["name"]].update({"tried": row["count"]})
        self._rows[row["name"]].update(row["faults"])
        self._first[row["campaign"]] = row["number"] + row["count"]
        self._seconds[row["campaign"]] += row["seconds"]

    @property
    def spent(self) -> float:
        """Seconds of all trials."""
        return sum(self._seconds.values())

    @property
    def tried(self) -> int:
        """Number of trials of all campaigns."""
        return sum(row["tried"] for row in self._rows.values())

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
