"""Progress of a run, a generation or a conversion: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from dsv3_jax.report.units import format_duration

T = TypeVar("T")


def text_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """A terminal on which text appears as it is: `[b]` is no markup, `:smile:` no picture, and numbers have no colour.

    Example:
        >>> text_console().print("[b] :smile: 1")
        [b] :smile: 1
    """
    return Console(quiet=quiet, stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


class Progress:
    """Training progress: a line with loss, tokens/s and MFU. Use it in a `with` statement.

    Args: steps: of the run; quiet: print nothing.

    Example:
        >>> with Progress(steps=2) as progress:  # on no terminal
        ...     progress.update(1, {"loss": 5.5})
        step 1  loss 5.500
    """

    def __init__(self, steps: int, *, quiet: bool = False):
        self._console = text_console(quiet=quiet)
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, line="")
        self._steps, self._first = steps, (0, 0.0)  # the step and time of the first update

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, sentence: str) -> None:
        """Print a line that stays above the live line."""
        self._console.print(sentence)

    def update(self, step: int, row: dict) -> None:
        """Show the metrics of a training step; `row` as in metrics.jsonl."""
        line = f"loss {row['loss']:.3f}"
        if "mtp_loss" in row:
            line += "  mtp " + " ".join(f"{x:.3f}" for x in row["mtp_loss"])
        if "max_vio" in row:
            line += f"  MaxVio {row['max_vio']:.2f}"
        if "tokens_per_s" in row:
            line += f"  {row['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in row:
            line += f"  MFU {row['mfu']:.0%}"
        self._bar.update(self._task, completed=step, line=line)
        if not self._console.is_terminal:
            self.say(f"step {step}  {line}{self._remaining(step)}")

    def _remaining(self, step: int) -> str:
        """How long the remaining steps will take, as measured since the first update, which came after compiling."""
        now, (first, since) = time.perf_counter(), self._first
        if not since:
            self._first = step, now
        if not since or step == self._steps:
            return ""
        return f"  {format_duration((self._steps - step) * (now - since) / max(step - first, 1))} left"

    def show_evaluation(self, step: int, row: dict) -> None:
        """Print the metrics of an evaluation; `row` as in metrics.jsonl."""
        self.say(f"step {step}  validation: " + _format_evaluation(row))

    def show_result(self, evaluation: dict, order2: float | None, out: Path, pictures: Sequence[Path]) -> None:
        """Print the last lines of a run.

        Args:
            evaluation: metrics of the last evaluation.
            order2: bits a byte of an order-2 byte model of the same text. None means that there is none.
            out: the run's folder.
            pictures: that were drawn.
        """
        bits = evaluation["val_bits_per_byte"]
        against = "" if order2 is None else f", against {order2:.3f} of an order-2 byte model of the same text"
        self.say(f"validation bits a byte: {bits:.3f}{against}")
        for name, value in evaluation.get("bits_per_byte_by_domain", {}).items():
            self.say(f"  {name:10s} {value:.3f}")
        drawn = f"pictures: {', '.join(map(str, pictures))}; " if pictures else ""
        self.say(f"{drawn}numbers: {out / 'metrics.jsonl'}")


class LiveText:
    """Generated text as it arrives, with a live line of decoding speed. Use it in a `with` statement.

    On a terminal the line is below the text. Elsewhere the text goes to stdout, and the acceptance of drafts to stderr.

    Args: prompt: the text that is shown first.

    Example:
        >>> with LiveText("To be") as live:  # on no terminal
        ...     live.append(" or not to be")
        To be or not to be
    """

    def __init__(self, prompt: str):
        self._console, self._text, self._line = text_console(), prompt, ""
        self._has_drafts = False
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible")
        if not self._console.is_terminal:
            print(prompt, end="", flush=True)

    def __enter__(self) -> "LiveText":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
            return
        print(flush=True)
        if self._has_drafts:
            print(self._line, file=sys.stderr)

    def append(self, text: str) -> None:
        """Show the next part of the text."""
        self._text += text
        self._show(text)

    def show_speed(self, acceptance: list[float], tokens_a_step: float, tokens_per_s: float, steps: int) -> None:
        """Update the live line.

        Args:
            acceptance: share of accepted drafts by draft position; empty without drafts.
            tokens_a_step: mean over the decoding steps.
            steps: decoding steps so far; 0 shows nothing.
        """
        if not steps:
            return
        self._has_drafts = bool(acceptance)
        self._line = f"{tokens_per_s:,.0f} tokens/s"
        if acceptance:
            shares = " ".join(f"{a:.0%}" for a in acceptance)
            self._line = f"drafts accepted: {shares}; {tokens_a_step:.2f} tokens a step, {self._line}"
        self._show("")

    def _show(self, text: str) -> None:
        if self._console.is_terminal:
            self._live.update(Group(Text(self._text), Text(self._line, style="dim")), refresh=True)
        else:
            print(text, end="", flush=True)


def _format_evaluation(row: dict) -> str:
    text = f"loss {row['val_loss']:.3f}, {row['val_bits_per_byte']:.3f} bits a byte"
    if "max_vio_global" in row:
        text += f", MaxVio_global {row['max_vio_global']:.2f}"
    if "max_vio_training_mix" in row:
        text += f" ({row['max_vio_training_mix']:.2f} on the training mix)"
    if "max_vio_mtp" in row:
        text += f", of the heads {row['max_vio_mtp']:.2f}"
    if row.get("mtp_acceptance"):
        text += ", MTP acceptance " + " ".join(f"{x:.0%}" for x in row["mtp_acceptance"])
    return text


def track(items: Iterable[T], total: int, name: str) -> Iterator[T]:
    """Yield the items, with a progress bar on stderr if that is a terminal.

    Example:
        >>> list(track("abc", 3, "letters"))
        ['a', 'b', 'c']
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total, description=name)


@contextmanager
def transfer(name: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Show a progress bar of bytes on stderr if that is a terminal.

    Args: name: text before the bar; total: bytes of the transfer; quiet: show nothing.
    Returns: in a `with` statement, a function that adds to the bytes done.

    Example:
        >>> with transfer("saving", 1000) as advance:
        ...     advance(400)
    """
    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)
