"""How `dsv3 demo` ends: continuations of held-out code, the page of experts, what to paste next."""

import itertools
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from rich.table import Table

from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import RunConfig
from dsv3_jax.data.corpus import Document
from dsv3_jax.decoding.generate import generate
from dsv3_jax.host.files import read_bytes, write_atomic
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.report.progress import text_console, track
from dsv3_jax.report.units import format_duration
from dsv3_jax.runs.callbacks import Callback
from dsv3_jax.stats import reporting

PAGE = "stats.html"
CODE = ("code", "tests", "C")  # domains of the default text
PIECE = 128  # tokens of a document that are looked at
CONTINUED = 12  # tokens that it writes there
SHOWN = 3
MEANINGS = """\
bits a byte: the yes-or-no questions that the model needs for a byte of text that it has not seen.
MaxVio: the load of the busiest expert over the mean load, less 1; 0 is perfectly even.
CORE: the mean accuracy on the tasks, scaled so that 0 is a blind guess and 1 is perfect."""


class Estimate(Callback):
    """Says how long training will take, once it knows the speed of some steps."""

    def on_start(self, run: RunConfig, out: Path, step: int) -> None:
        self._run: RunConfig | None = run

    def on_step(self, row: dict[str, Any]) -> None:
        run = self._run
        if run is None or "tokens_per_s" not in row:  # said, or only compiled
            return
        tokens = (run.steps - row["step"]) * run.data.batch_size * run.data.seq_len
        left = format_duration(tokens / row["tokens_per_s"])
        text_console().print(f"at this speed the {run.steps} steps end in about {left}")
        self._run = None


class Continued(NamedTuple):
    """Held-out code: what the model read, what it wrote, and what the text has there."""

    before: str
    written: str
    truth: str


def continued(
    model: Transformer, text: TextSettings, documents: Iterable[Document], *, rows: int
) -> list[Continued]:
    """Let a model continue held-out code greedily where it is good: each of another document.

    There it predicts the most letters after one another, given the text before.

    Args: rows: documents to look at, at most.
    """
    # A piece from the middle of each: a beginning is often a notice that all documents share.
    middles = (d.text[len(d.text) // 2 :] for d in documents if d.domain in CODE)
    encoded = (text.encode(middle[: 8 * PIECE], raw=True) for middle in middles)
    whole = (tokens[:PIECE] for tokens in encoded if len(tokens) >= PIECE)
    pieces = list(itertools.islice(whole, rows))
    if not pieces:
        return []

    # One pass over the text says which tokens are the likeliest.
    best = nnx.jit(lambda model, tokens: model(tokens).logits.argmax(-1))(model, np.array(pieces))
    places = [
        _best_place(tokens, likeliest, text)
        for tokens, likeliest in zip(pieces, np.asarray(best).tolist(), strict=True)
    ]

    # Those pieces are shown in which the model is best.
    order = sorted(range(len(pieces)), key=lambda i: -places[i][0])[:SHOWN]
    given = [pieces[i][: places[i][1]] for i in order]
    truth = [pieces[i][places[i][1] :][:CONTINUED] for i in order]
    made = generate(model, given, CONTINUED)
    decode = text.tokenizer.decode
    return [
        Continued(decode(before), decode(written), decode(after))
        for before, written, after in zip(given, made.tokens, truth, strict=True)
    ]


def _best_place(tokens: list[int], likeliest: list[int], text: TextSettings) -> tuple[int, int]:
    """The place from which on most letters are predicted without a miss: (letters, place).

    Args: likeliest: the model's token after each of `tokens`.
    """
    found = []
    for start in range(PIECE // 4, PIECE - CONTINUED):
        pairs = zip(tokens[start:][:CONTINUED], likeliest[start - 1 :], strict=False)
        right = [token for token, _ in itertools.takewhile(lambda p: p[0] == p[1], pairs)]
        letters = sum(map(str.isalpha, text.tokenizer.decode(right)))
        found.append((letters, start))
    return max(found)


def show(found: Sequence[Continued]) -> None:
    """Print continuations beside the text, below the last lines that were read."""
    console = text_console()
    console.print("code that the model has not seen, continued where it predicts it best:")
    for piece in found:
        table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
        for name in ("the model writes", "the text has"):
            table.add_column(name, ratio=1, overflow="fold")
        # Both begin in the middle of a line, which is shown with them.
        *lines, begun = piece.before.split("\n")
        table.add_row((begun + piece.written).rstrip(), (begun + piece.truth).rstrip())
        console.rule(style="dim", characters="-")
        console.print("\n".join(lines[-3:]))
        console.print(table)
    console.rule(style="dim", characters="-")


def write_page(out: Path, short: bool) -> Path:
    """Write the page of `dsv3 stats` into the run's folder."""
    options = reporting.ReportOptions(batches=2, draws=20) if short else reporting.ReportOptions()
    folder = reporting.report(out, options=options, follow=track).folder
    write_atomic(out / PAGE, read_bytes(folder / reporting.PAGE, None))
    return out / PAGE


def program() -> str:
    """This program as a shell here calls it.

    Example:
        >>> program().endswith("-m dsv3_jax.cli") or "dsv3" in program()
        True
    """
    called = sys.argv[0]
    if Path(called).name != "dsv3":  # python -m dsv3_jax.cli
        return f"{shlex.quote(sys.executable)} -m dsv3_jax.cli"
    return "dsv3" if shutil.which("dsv3") == called else shlex.quote(called)


def commands(dsv3: str, out: Path) -> list[str]:
    """What to do with the run next."""
    run, longer = shlex.quote(str(out)), shlex.quote(f"{out}-longer")
    return [
        f"{dsv3} generate {run} --prompt 'def '",
        f"{dsv3} stats {run} --text 'def add(a, b): return a + b'  # the experts of your own text",
        f"{dsv3} train --config {run} --out {longer} steps=800  # learn longer",
    ]
