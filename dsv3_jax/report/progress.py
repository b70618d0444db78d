"""What a person sees of a run or a conversion: a live line on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterable, Iterator
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

T = TypeVar("T")


class Progress:
    """A progress line with loss, tokens a second and MFU. Use as a context."""

    def __init__(self, steps: int, *, quiet: bool = False):
        self._console = Console(quiet=quiet, highlight=False, soft_wrap=True)
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

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, sentence: str) -> None:
        """A line that stays."""
        self._console.print(sentence, markup=False)

    def update(self, step: int, row: dict) -> None:
        """Show a step's metrics."""
        line = f"loss {row['loss']:.3f}"
        if "mtp_loss" in row:
            line += "  mtp " + " ".join(f"{x:.3f}" for x in row["mtp_loss"])
        if "max_vio" in row:
            line += f"  MaxVio {row['max_vio']:.2f}"
        if "tokens_per_s" in row:
            line += f"  {row['tokens_per_s']:,.0f} tokens/s  MFU {row['mfu']:.0%}"
        self._bar.update(self._task, completed=step, line=line)
        if not self._console.is_terminal:
            self.say(f"step {step}  {line}")

    def evaluated(self, step: int, row: dict) -> None:
        """Show an evaluation."""
        self.say(f"step {step}  validation: " + _evaluation(row))

    def finished(self, evaluation: dict, order2: float, out: Path) -> None:
        """The last lines of a run."""
        bits = evaluation["val_bits_per_byte"]
        self.say(f"validation bits a byte: {bits:.3f}, against {order2:.3f} of an order-2 byte model of the same text")
        for name, value in evaluation.get("bits_per_byte_by_domain", {}).items():
            self.say(f"  {name:10s} {value:.3f}")
        self.say(f"pictures: {out / 'routing.png'}, {out / 'training.png'}; numbers: {out / 'metrics.jsonl'}")


class Speech:
    """Text as it comes, and a live line of how decoding goes. Use as a context.

    On a terminal the line stands below the text; elsewhere the text goes to stdout, and what came of drafts to stderr.
    """

    def __init__(self, prompt: str):
        self._console, self._text, self._line = Console(highlight=False, soft_wrap=True), prompt, ""
        self._drafted = False
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible")
        if not self._console.is_terminal:
            print(prompt, end="", flush=True)

    def __enter__(self) -> "Speech":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()
            return
        print(flush=True)
        if self._drafted:
            print(self._line, file=sys.stderr)

    def say(self, text: str) -> None:
        """More of the text."""
        self._text += text
        self._show(text)

    def measured(self, acceptance: list[float], tokens_a_step: float, tokens_per_s: float, steps: int) -> None:
        """How decoding goes: drafts that stood by position, and speed."""
        if not steps:
            return
        self._drafted = bool(acceptance)
        self._line = f"{tokens_per_s:,.0f} tokens/s"
        if acceptance:
            shares = " ".join(f"{a:.0%}" for a in acceptance)
            self._line = f"drafts that stood: {shares}; {tokens_a_step:.2f} tokens a step, {self._line}"
        self._show("")

    def _show(self, text: str) -> None:
        if self._console.is_terminal:
            self._live.update(Group(Text(self._text), Text(self._line, style="dim")), refresh=True)
        else:
            print(text, end="", flush=True)


def _evaluation(row: dict) -> str:
    text = f"loss {row['val_loss']:.3f}, {row['val_bits_per_byte']:.3f} bits a byte"
    if "max_vio_global" in row:
        text += f", MaxVio_global {row['max_vio_global']:.2f}"
    if row.get("mtp_acceptance"):
        text += ", MTP acceptance " + " ".join(f"{x:.0%}" for x in row["mtp_acceptance"])
    return text


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """The items, with a bar of how many are done on stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total, description=what)


@contextmanager
def transfer(what: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr, where that is a terminal; the context's value takes how many more are done."""
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
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
