"""A run's metrics as JSON lines and for TensorBoard; each expert's load in a second file."""

import json
import math
import reprlib
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.host.files import naming, never_through_a_link, read_bytes, write_atomic
from dsv3_jax.report.units import shortened

METRICS_FILE, LOAD_FILE, ANSWERS_FILE = "metrics.jsonl", "load.jsonl", "answers.jsonl"
# about so many steps of a run log their load, or answers: a large model's are tens of kilobytes
LOAD_ROWS = 1000
# of such a step's answers: groups, answers of each, characters of a text
GROUPS, ANSWERS, CHARACTERS = 2, 8, 4000
_MAX_FILE = 2 << 30  # bytes
_AXES = {"mtp_loss": 1, "mtp_acceptance": 1, "load": 2, "bias": 2}  # other metrics are one number
_TEXTS = ("prompt", "answer")
_OBJECTS = ("kernels", "bits_per_byte_by_domain", "max_vio_by_domain")


class JsonLines:
    """A file of JSON lines, each with a "step".

    Args:
        path: the file; created if absent.
        after: the step of the restored checkpoint. Later rows are dropped, because the resumed run
            writes them again.
        read_only: write nothing. Only one of several processes writes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rows = JsonLines(Path(folder, LOAD_FILE), after=0)
        ...     rows.write({"step": 1, "load": [[3, 1]]})
        ...     read_rows(Path(folder, LOAD_FILE))
        [{'step': 1, 'load': [[3, 1]]}]
    """

    def __init__(self, path: Path, after: int, *, read_only: bool = False):
        self._path = path
        self._read_only = read_only
        self.sentence = ""  # to print: which lines were no rows and are dropped
        if read_only:
            return
        rows, bad = parse_rows(path)
        self.sentence = describe_bad(path, bad, len(rows))
        kept = [row for row in rows if row["step"] <= after]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: dict) -> None:
        """Add a row; it must have a "step"."""
        if self._read_only:
            return
        with naming(self._path), open(self._path, "a", opener=never_through_a_link) as file:
            file.write(json.dumps(row) + "\n")


def load_every(run: RunConfig) -> int:
    """Steps between two rows of load.jsonl: a multiple of `log_every`.

    Example:
        >>> import dsv3_jax as ds
        >>> load_every(ds.replace(ds.recipe("tiny"), steps=50_000, log_every=20))
        40
    """
    return run.log_every * max(1, run.steps // (LOAD_ROWS * run.log_every))


def load_row(step: int, found: dict[str, Any]) -> dict[str, Any]:
    """A row of load.jsonl: the load, and the bias after the step where a rule moves it.

    Example:
        >>> bias = np.array([[-0.001, 0.001]], np.float32)
        >>> load_row(10, {"load": np.array([[3.0, 1.0]]), "bias": bias})
        {'step': 10, 'load': [[3, 1]], 'bias': [[-0.001, 0.001]]}
    """
    row: dict[str, Any] = {"step": step, "load": np.asarray(found["load"]).astype(int).tolist()}
    if "bias" in found:
        row["bias"] = [
            [float(f"{x:.6g}") for x in layer] for layer in np.asarray(found["bias"]).tolist()
        ]
    return row


def numbers_beside(row: dict[str, Any], found: Any) -> dict[str, int | float]:
    """The numbers that a callback has found, as they can join a row.

    Raises: ValueError for what is no finite number, or has the name of another metric.

    Example:
        >>> numbers_beside({"step": 10, "loss": 5.5}, {"norm": np.float32(0.5)})
        {'norm': 0.5}
    """
    if not isinstance(found, dict):
        raise ValueError(f"a callback returns {reprlib.repr(found)}, not a dict of numbers by name")
    for name, value in found.items():
        if not isinstance(name, str) or name in {*row, *_AXES, *_OBJECTS}:
            raise ValueError(f"a callback's metric {name!r} is no name, or another metric's")
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"a callback's metric {name}={reprlib.repr(value)} is no finite number"
            )
    return {name: x if type(x) is int else float(x) for name, x in found.items()}


class AnswersFile(JsonLines):
    """Some answers of a run of GRPO; other arguments as in `JsonLines`.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = AnswersFile(Path(folder), 0, ds.recipe("tiny"))
        ...     file.keep(1, [[{"prompt": "1+1=", "answer": "2", "reward": 1.0}]])
        ...     read_rows(Path(folder, ANSWERS_FILE))
        [{'step': 1, 'prompt': '1+1=', 'answer': '2', 'reward': 1.0}]
    """

    def __init__(self, folder: Path, after: int, run: RunConfig, *, read_only: bool = False):
        super().__init__(folder / ANSWERS_FILE, after, read_only=read_only)
        updates = run.grpo.updates
        self._every = updates * max(1, run.steps // (LOAD_ROWS * updates))

    def keep(self, step: int, groups: Sequence[Sequence[dict]]) -> None:
        """Write some of the answers that a step learns from, if it is the first to use them.

        A long run has rows of some steps only, and a long text loses its middle.

        Args: groups: the answers to each prompt: "prompt", "answer" and "reward" of each.
        """
        if (step - 1) % self._every:
            return
        for group in groups[:GROUPS]:
            for answer in group[:ANSWERS]:
                texts = {key: shortened(answer[key], CHARACTERS) for key in _TEXTS}
                self.write({"step": step} | texts | {"reward": answer["reward"]})


class MetricsFile(JsonLines):
    """A run's metrics, also written for TensorBoard; other arguments as in `JsonLines`."""

    def __init__(self, folder: Path, after: int, *, read_only: bool = False):
        super().__init__(folder / METRICS_FILE, after, read_only=read_only)
        self._board = None if read_only else _Board(folder / "tensorboard", after + 1)

    def write(self, row: dict) -> None:
        """Add a row; it must have a "step"."""
        super().write(row)
        if self._board is not None:
            self._board.write(row["step"], flat(row))


class _Board:
    """A file of TensorBoard events: those from `first_step` on replace the ones of files before.

    tensorboardX's `SummaryWriter` has a thread, which prints a traceback when the disk is full.
    Here each row is appended at once, and closing the file raises that error.
    """

    def __init__(self, folder: Path, first_step: int):
        # imported late: it imports torch if torch is installed
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import register_writer_factory

        register_writer_factory("append", SimpleNamespace(open=_open_to_append))
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}"
        self._path = f"append:{folder / name}"

        start = SessionLog(status=SessionLog.START)
        self._add({"file_version": "brain.Event:2"}, {"step": first_step, "session_log": start})

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        self._add(*({"step": step, "summary": scalar(*number)} for number in numbers.items()))

    def _add(self, *events: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter

        with closing(RecordWriter(self._path)) as records:
            for event in events:
                records.write(Event(wall_time=time.time(), **event).SerializeToString())


def _open_to_append(path: str) -> BinaryIO:
    return open(path.removeprefix("append:"), "ab", opener=never_through_a_link)


def read_rows(path: Path) -> list[dict]:
    """Read a file of JSON lines; an absent one has no rows, and lines that are none are skipped.

    Example:
        >>> read_rows(Path("no/such/metrics.jsonl"))
        []
    """
    return parse_rows(path)[0]


def parse_rows(path: Path) -> tuple[list[dict], list[int]]:
    """Read a file of JSON lines, each an object with a "step" and with metrics of their types.

    Lists, and the matrices of loads and biases, must have the shape of the first ones in the file.

    Returns: (the rows, numbers of the other lines from 1). A last line that a crash has cut off is
        in neither.
    Raises: ValueError for a pipe, a device or a folder of that name, and for more than 2 GiB.

    Example:
        >>> import tempfile
        >>> text = '{"step": 1}\\n12\\n\\n{"step": 2}\\n{"st'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, METRICS_FILE).write_text(text)
        ...     parse_rows(Path(folder, METRICS_FILE))
        ([{'step': 1}, {'step': 2}], [2, 3])
    """
    try:
        lines = read_bytes(path, _MAX_FILE).split(b"\n")
    except FileNotFoundError:
        return [], []
    rows, bad = [], []
    shapes: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(lines, 1):
        found = _parse(line)
        if found is not None and all(
            shapes.get(key, shape) == shape for key, shape in found[1].items()
        ):
            shapes |= found[1]
            rows.append(found[0])
        elif number < len(lines):  # the last is cut off, or empty
            bad.append(number)
    return rows, bad


def describe_bad(path: Path, bad: Sequence[int], rows: int) -> str:
    """Name the lines of a file that are no rows in a sentence; "" if there are none.

    Example:
        >>> describe_bad(Path("metrics.jsonl"), [2, 3], 9)
        'file=metrics.jsonl: lines 2, 3 are no rows and are passed over; the other 9 are kept'
    """
    if not bad:
        return ""
    numbers = ", ".join(map(str, bad[:5])) + ", …" * (len(bad) > 5)
    return (
        f"file={path}: lines {numbers} are no rows and are passed over; the other {rows} are kept"
    )


def _parse(line: bytes) -> tuple[dict, dict[str, tuple[int, ...]]] | None:
    """A line's row, and the shapes of its lists; None if it holds no row."""
    try:
        row = json.loads(line)
        if (
            not isinstance(row, dict)
            or type(row.get("step")) is not int
            or not 0 <= row["step"] < 1 << 63
        ):
            return None
        return row, {key: shape for key, value in row.items() if (shape := _shape(key, value))}
    except (ValueError, RecursionError):
        return None


def _shape(key: str, value: Any) -> tuple[int, ...]:
    """The shape of a metric as a list or matrix; () of a number, a text, an object or [].

    Raises: ValueError for something else than the numbers that a metric of this name has.
    """
    if value == [] or (key in _OBJECTS and isinstance(value, dict)):
        return ()
    if key in _TEXTS and isinstance(value, str):
        return ()
    array = np.array(value)
    is_number = array.dtype.kind in ("iu" if key == "load" else "iuf")
    if not is_number or array.ndim != _AXES.get(key, 0) or (key == "load" and array.min() < 0):
        raise ValueError(f"{key} is no metric")
    return array.shape


def flat(row: dict) -> dict[str, float]:
    """A row's numbers by name, as "mtp_loss/0" for the parts of a list or an object.

    Example:
        >>> flat({"step": 9, "loss": 5.5, "mtp_loss": [6.0]})
        {'loss': 5.5, 'mtp_loss/0': 6.0}
    """
    found: dict[str, Any] = {}
    for key, value in row.items():
        parts = dict(enumerate(value)) if isinstance(value, list) else value
        found |= (
            {f"{key}/{part}": x for part, x in parts.items()}
            if isinstance(parts, dict)
            else {key: parts}
        )
    return {name: x for name, x in found.items() if name != "step" and type(x) in (int, float)}
