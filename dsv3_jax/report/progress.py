"""Progress of a run or a conversion: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from dsv3_jax.host.mirror import with_urls
from dsv3_jax.report.units import format_duration, printable, shortened

T = TypeVar("T")


class _Console(Console):
    def render_str(self, text: str, **options: Any) -> Text:  # of `print` and of a table's cells
        return super().render_str(printable(with_urls(text)), **options)

    def on_broken_pipe(self) -> None:  # rich would end the process with code 1
        raise BrokenPipeError


def text_console(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Where text appears as it is: `[b]` is no markup, `:smile:` no picture, numbers are plain.

    Control codes in it are visible and do nothing.

    Example:
        >>> text_console().print("[b] :smile: 1")
        [b] :smile: 1
    """
    return _Console(
        quiet=quiet, stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True
    )


def say(text: str) -> None:
    """Write text to stdout at once, without a line end; a terminal gets control codes visibly.

    Example:
        >>> say("to be")
        to be
    """
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


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

        # The speed counts from the first update, since the first step compiles.
        self._task = self._bar.add_task("train", total=steps, line="")
        self._steps = steps
        self._first = (0, 0.0)  # the step and time of the first update

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
        # What a run does not have, its rows do not have either.
        line = f"loss {row['loss']:.3f}"
        if "mtp_loss" in row:
            line += "  mtp " + " ".join(f"{x:.3f}" for x in row["mtp_loss"])
        if "reward" in row:
            line += f"  reward {row['reward']:.3f}  mismatch {row['mismatch']:.1e}"
        if "max_vio" in row:
            line += f"  MaxVio {row['max_vio']:.2f}"

        # With GRPO a step may have nothing to learn from: its other measures are 0.
        if row.get("skipped") == 1:
            line = f"no step: none of {row['groups']} groups teaches  reward {row['reward']:.3f}"
        if "tokens_per_s" in row:
            line += f"  {row['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in row:
            line += f"  MFU {row['mfu']:.0%}"

        # A terminal shows one line that changes; a file gets a line for each update.
        self._bar.update(self._task, completed=step, line=line)
        if not self._console.is_terminal:
            self.say(f"step {step}  {line}{self._remaining(step)}")

    def _remaining(self, step: int) -> str:
        """How long the rest will take, as measured since the first update, after compiling."""
        now = time.perf_counter()
        first, since = self._first
        if not since:
            self._first = step, now
            return ""
        if step == self._steps:
            return ""
        seconds_a_step = (now - since) / max(step - first, 1)
        return f"  {format_duration((self._steps - step) * seconds_a_step)} left"

    def show_evaluation(self, step: int, row: dict) -> None:
        """Print the metrics of an evaluation; `row` as in metrics.jsonl."""
        text = f"loss {row['val_loss']:.3f}, {row['val_bits_per_byte']:.3f} bits a byte"
        if "val_reward" in row:
            text = f"reward {row['val_reward']:.3f}, {text}"
        if "max_vio_global" in row:
            text += f", MaxVio_global {row['max_vio_global']:.2f}"
        if "max_vio_training_mix" in row:
            text += f" ({row['max_vio_training_mix']:.2f} on the training mix)"
        if "max_vio_mtp" in row:
            text += f", of the heads {row['max_vio_mtp']:.2f}"
        if row.get("mtp_acceptance"):
            text += ", MTP acceptance " + " ".join(f"{x:.0%}" for x in row["mtp_acceptance"])
        self.say(f"step {step}  validation: {text}")

    def show_sample(self, step: int, sample: dict) -> None:
        """Print the "prompt", "answer" and "reward" of a sample."""
        asked, answer = (repr(shortened(sample[key], 400)) for key in ("prompt", "answer"))
        self.say(f"step {step}  sample: {asked} → {answer}, reward {sample['reward']:.3g}")

    def show_result(
        self, evaluation: dict, order2: float | None, out: Path, pictures: Sequence[Path]
    ) -> None:
        """Print the last lines of a run.

        Args:
            evaluation: metrics of the last evaluation.
            order2: bits a byte of an order-2 byte model of the same text. None means that there is
                none.
            out: the run's folder.
            pictures: that were drawn.
        """
        bits = evaluation["val_bits_per_byte"]

        # The baseline needs no network: it counts which byte follows two others.
        against = ""
        if order2 is not None:
            against = f", against {order2:.3f} of an order-2 byte model of the same text"
        self.say(f"validation bits a byte: {bits:.3f}{against}")
        if "val_reward" in evaluation:
            self.say(f"validation reward: {evaluation['val_reward']:.3f}")
        for name, value in evaluation.get("bits_per_byte_by_domain", {}).items():
            self.say(f"  {name:10s} {value:.3f}")
        drawn = f"pictures: {', '.join(map(str, pictures))}; " if pictures else ""
        answers = f"; answers: {out / 'answers.jsonl'}" if "val_reward" in evaluation else ""
        self.say(f"{drawn}numbers: {out / 'metrics.jsonl'}{answers}")


def track(items: Iterable[T], total: int, name: str) -> Iterator[T]:
    """Yield the items, with a progress bar on stderr if that is a terminal.

    Example:
        >>> list(track("abc", 3, "letters"))
        ['a', 'b', 'c']
    """
    with _bar() as bar:
        yield from bar.track(items, total, description=name)


@contextmanager
def transfer(name: str, total: int, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr if that is a terminal.

    Args: name: text before the bar; total: bytes of the transfer, or what is counted; quiet: show
        nothing.
    Returns: in a `with` statement, a function that adds to what is done, and may change the text.

    Example:
        >>> with transfer("saving", 1000) as advance:
        ...     advance(400)
    """
    with _bar(quiet=quiet) as bar:
        task = bar.add_task(name, total=total)
        yield lambda count, name=None: bar.update(task, advance=count, description=name)


def _bar(*, quiet: bool = False) -> Bar:
    console = text_console(stderr=True)
    return Bar(console=console, disable=quiet or not console.is_terminal)
