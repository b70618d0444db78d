"""A run's numbers: a line of JSON each, and the same to TensorBoard; and each expert's load, in a file of its own."""

import json
from pathlib import Path

METRICS_FILE, LOAD_FILE = "metrics.jsonl", "load.jsonl"


class Rows:
    """A file of JSON lines, each with a "step"; rows after step `after` are dropped first: they will be made again.

    With `read_only` nothing is written: of several processes one writes.
    """

    def __init__(self, path: Path, after: int, *, read_only: bool = False):
        self._path, self._read_only = path, read_only
        if read_only:
            return
        kept = [row for row in self.rows() if row["step"] <= after]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept))
        part.rename(path)

    def write(self, row: dict) -> None:
        """Add a row; it must have a "step"."""
        if self._read_only:
            return
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        """All rows so far."""
        return read_rows(self._path)


class Metrics(Rows):
    """The metrics of a run folder, also for TensorBoard."""

    def __init__(self, folder: Path, after: int, *, read_only: bool = False):
        super().__init__(folder / METRICS_FILE, after, read_only=read_only)
        self._board = None
        if not read_only:
            from tensorboardX import SummaryWriter  # here: it imports torch, where there is one

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def write(self, row: dict) -> None:
        """Add a row; it must have a "step"."""
        super().write(row)
        if self._board is None:
            return
        for name, value in _flat(row):
            self._board.add_scalar(name, value, row["step"])
        self._board.flush()

    def close(self) -> None:
        """Write out what TensorBoard's writer still holds."""
        if self._board is not None:
            self._board.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, none where it is absent; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _flat(row: dict, prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for key, value in row.items():
        if key == "step":
            continue
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            flat += [(f"{prefix}{key}/{i}", v) for i, v in enumerate(value)]
        else:
            flat.append((prefix + key, value))
    return flat
