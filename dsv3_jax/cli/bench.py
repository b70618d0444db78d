"""`dsv3 bench decode RUN`: how fast a run's checkpoint decodes, by batch, context, cache and draft."""

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv3_jax.cli.common import parse
from dsv3_jax.config import CacheDtype, CacheKind, ModelConfig, did_you_mean
from dsv3_jax.data import tokenizer
from dsv3_jax.data.source import held_out_prompts
from dsv3_jax.decoding.generate import Generated, generate
from dsv3_jax.files import write_atomic
from dsv3_jax.model.cache import pick_dtype, pick_kind
from dsv3_jax.model.counting import decode_bytes
from dsv3_jax.report.progress import text_console
from dsv3_jax.report.speed import copy_bandwidth
from dsv3_jax.report.units import format_count


@dataclass
class Decode:
    """Time greedy decoding of a run's held-out text, for all combinations of the options with several values.

    Each combination (a cell of the table) runs once to compile, then once in each of --rounds rounds. The figures are
    medians of the rounds. Progress is printed on stderr.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run's folder, a released folder, or a hub id that is in the local cache"""
    batch: tuple[int, ...] = (1,)
    """numbers of sequences decoded together"""
    context: tuple[int, ...] = (128,)
    """numbers of tokens of a prompt; beyond the training length fewer drafts are accepted"""
    new_tokens: int = 64
    """number of tokens decoded after the prompt, at least 2"""
    cache: tuple[CacheKind, ...] = ()
    """what is cached: latent rows, expanded keys and values, or none; empty means the model's smallest"""
    cache_dtype: tuple[CacheDtype, ...] = ()
    """dtypes of cached rows; empty means the compute dtype"""
    draft: tuple[str, ...] = ("none",)
    """who drafts: none, mtp (the model's own heads), lookup (the text so far), or the folder of another run with the
    same tokenizer"""
    draft_length: tuple[int | Literal["auto"], ...] = (1,)
    """numbers of tokens drafted a step, or auto"""
    rounds: int = 3
    """number of timed rounds"""
    kernels: str | None = None
    """kernels to compute with: auto, xla, or a name from `dsv3 info PRESET --kernels`; None means the run's own"""
    json: Path | None = None
    """file to write the figures to; None means no file"""


BENCHMARKS = ("decode",)


def run(argv: list[str]) -> int:
    """Run the benchmark that the first argument names."""
    if argv and argv[0] in ("-h", "--help"):
        print("usage: dsv3 bench decode RUN …\n\n`dsv3 bench decode --help` lists its options.")
        return 0
    if not argv or argv[0].startswith("-"):
        raise ValueError("the name of a benchmark is missing, as in: dsv3 bench decode RUN")
    if argv[0] not in BENCHMARKS:
        near = did_you_mean(argv[0], BENCHMARKS)
        raise ValueError(f"benchmark {argv[0]!r} is not one of {', '.join(BENCHMARKS)}{near}")
    args = parse(Decode, argv[1:], "bench decode")
    return decode(args)


@dataclass(frozen=True)
class Cell:
    """One combination of the options."""

    batch: int
    context: int
    cache: str
    cache_dtype: str
    draft: str
    draft_length: int | str  # 0 without a draft

    @property
    def cache_text(self) -> str:
        return f"{self.cache} {self.cache_dtype}".strip()

    @property
    def draft_text(self) -> str:
        return f"{self.draft} {self.draft_length}" if self.draft_length else self.draft

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}, cache {self.cache_text}, draft {self.draft_text}"


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds of a cell."""

    prefill_tokens_per_s: float
    ms_per_token: float  # between two tokens of a sequence
    tokens_per_s: float  # of all sequences, while decoding
    cache_bytes_per_token: int
    acceptance: list[float]  # by position
    tokens_per_step: float
    share_of_bound: float | None  # None with a draft or without a cache: `decode_bytes` does not count these


def decode(options: Decode) -> int:
    """Run the benchmark and print its table; return the exit code.

    Raises: ValueError (one sentence) for options out of range and for folders that hold no checkpoint.
    """
    if options.new_tokens < 2:
        raise ValueError(f"new_tokens={options.new_tokens}: the first comes with the prefill, so decoding needs 2")
    for name in ("batch", "context", "draft", "draft_length"):
        if not getattr(options, name):
            raise ValueError(f"{name} is empty: give at least one value")
    for name, values in {"batch": options.batch, "context": options.context, "rounds": (options.rounds,)}.items():
        if min(values) < 1:
            raise ValueError(f"{name}={min(values)} is below 1")
    from dsv3_jax.hf.open_model import open_draft, open_model

    model, run, step = open_model(options.run, kernels=options.kernels)
    cfg = run.model
    drafts: dict[str, Any] = {"none": None, "mtp": "mtp", "lookup": "lookup"}
    own = tokenizer.load(run.data.tokenizer)
    drafts |= {name: open_draft(name, own, kernels=options.kernels) for name in options.draft if name not in drafts}
    kinds = options.cache or (pick_kind(cfg, None),)
    dtypes = options.cache_dtype or (str(pick_dtype(model.compute_dtype, None)),)
    prompts = cache(lambda batch, context: held_out_prompts(run.data, batch, context))

    def one(cell: Cell) -> Generated:
        return generate(
            model,
            prompts(cell.batch, cell.context),
            options.new_tokens,
            cache=cell.cache,
            cache_dtype=None if cell.cache == "none" else cell.cache_dtype,
            draft=drafts[cell.draft],
            draft_length=cell.draft_length,
        )

    cells = list(dict.fromkeys(
        Cell(batch, context, kind, "" if kind == "none" else dtype, draft, 0 if draft == "none" else length)
        for batch, context, kind, dtype, draft, length in product(
            options.batch, options.context, kinds, dtypes, options.draft, options.draft_length
        )
        if kind != "none" or draft == "none"  # without a cache nobody drafts
    ))  # fmt: skip
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
    console.print(model.kernels.describe(model.compute_dtype), soft_wrap=True)
    results: dict[Cell, list[Generated]] = {cell: [] for cell in cells}
    with _progress() as show:
        for i, cell in enumerate(cells, start=1):
            show(f"compile {i}/{len(cells)}: {cell}")
            one(cell)
        for i in range(1, options.rounds + 1):
            for cell in cells:
                show(f"round {i}/{options.rounds}: {cell}")
                results[cell].append(one(cell))
        show("measure the bandwidth of copying")
        bandwidth = copy_bandwidth()
    weight_bytes = model.embed[...].dtype.itemsize
    timed = {cell: timing(cfg, cell, found, bandwidth, weight_bytes) for cell, found in results.items()}
    console.print(_table(timed))
    console.print(
        f"step {step} of {options.run}, {options.new_tokens} new tokens, greedy, medians of {options.rounds} rounds; "
        f"bound: weights and cache that a step must read, at the measured {bandwidth / 1e9:.1f} GB/s of copying",
        soft_wrap=True,
    )
    if options.json:
        rows = [asdict(cell) | asdict(result) for cell, result in timed.items()]
        report = {"step": step, "new_tokens": options.new_tokens, "copy_bandwidth": bandwidth, "cells": rows}
        write_atomic(options.json, json.dumps(report, indent=1) + "\n")
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show what runs now on stderr: a live line on a terminal, a line each elsewhere."""
    console = text_console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(text)
        return
    with console.status("") as status:
        yield lambda text: status.update(escape(text))


def timing(
    cfg: ModelConfig, cell: Cell, results: Sequence[Generated], bandwidth: float, weight_bytes: int = 4
) -> Timing:
    """Compute the medians of a cell's rounds.

    Args:
        bandwidth: of copying, in bytes a second; for the bound.
        weight_bytes: of a parameter; for the bound.
    """

    def median(of) -> float:
        return statistics.median(of(result) for result in results)

    first, rows = results[0], results[0].tokens
    share = None
    if cell.draft == "none" and cell.cache != "none":
        held = cell.context + len(rows[0]) // 2  # half of the new tokens, on average
        must = decode_bytes(cfg, cell.batch, held, first.cache_bytes_per_token, weight_bytes=weight_bytes)
        share = must / bandwidth / median(lambda r: r.decode_seconds / r.steps)
    return Timing(
        prefill_tokens_per_s=cell.batch * cell.context / median(lambda r: r.prefill_seconds),
        ms_per_token=1e3 * median(lambda r: r.decode_seconds) / (len(rows[0]) - 1),
        tokens_per_s=median(lambda r: r.tokens_per_s),
        cache_bytes_per_token=first.cache_bytes_per_token,
        acceptance=first.acceptance,
        tokens_per_step=first.mean_accepted,
        share_of_bound=share,
    )


def _table(timed: dict[Cell, Timing]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("batch", "context", "cache", "draft"):
        table.add_column(name, justify="left" if name in ("cache", "draft") else "right")
    for name in (
        "prefill tok/s", "ms/token", "tok/s", "cache B/token", "acceptance", "tok/step", "of bound",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for cell, found in timed.items():
        table.add_row(
            str(cell.batch),
            str(cell.context),
            cell.cache_text,
            cell.draft_text,
            format_count(found.prefill_tokens_per_s),
            f"{found.ms_per_token:.2f}",
            format_count(found.tokens_per_s),
            str(found.cache_bytes_per_token),
            " ".join(f"{a:.0%}" for a in found.acceptance) or "-",
            f"{found.tokens_per_step:.2f}",
            "-" if found.share_of_bound is None else f"{found.share_of_bound:.0%}",
        )
    return table
