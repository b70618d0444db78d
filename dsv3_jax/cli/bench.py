"""`dsv3 bench decode`: how fast a run's checkpoint decodes, by batch, context, cache and draft."""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from dsv3_jax.config import CacheDtype, CacheKind, ModelConfig, RunConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.decoding.generate import Generated, generate
from dsv3_jax.kernels.cpu import calls
from dsv3_jax.model.cache import pick_dtype, pick_kind
from dsv3_jax.model.counting import decode_bytes, short
from dsv3_jax.report.speed import copy_bandwidth
from dsv3_jax.training.checkpoint import load_draft, load_model


@dataclass
class Decode:
    """Decode a run's held-out text, greedily, and time it; options with several values are combined with one another.

    Everything runs once to compile and --rounds times to be timed, in turns; the figures are medians.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """a folder that `dsv3 train` made"""
    batch: tuple[int, ...] = (1,)
    """sequences side by side"""
    context: tuple[int, ...] = (128,)
    """tokens of a prompt; beyond the length that a run was trained on, drafts stand less"""
    new_tokens: int = 64
    """tokens decoded after it, at least 2"""
    cache: tuple[CacheKind, ...] = ()
    """not given: the model's own; the word none computes every step anew from the first token"""
    cache_dtype: tuple[CacheDtype, ...] = ()
    """of cached rows; none given: the model's compute dtype"""
    draft: tuple[str, ...] = ("none",)
    """who drafts: "none", "mtp" (the model's own heads), or the folder of another run with the same tokenizer"""
    draft_length: tuple[int, ...] = (1,)
    """tokens drafted a step"""
    rounds: int = 3
    """timed rounds"""
    json: Path | None = None
    """a file to write the figures to, too"""


@dataclass(frozen=True)
class Cell:
    """One combination of the options."""

    batch: int
    context: int
    cache: str
    cache_dtype: str
    draft: str
    draft_length: int  # 0 without a draft


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds of a cell."""

    prefill_tokens_per_s: float
    ms_per_token: float  # between two tokens of a sequence
    tokens_per_s: float  # of all sequences, while decoding
    cache_bytes_per_token: int
    acceptance: list[float]  # by position
    tokens_per_step: float
    share_of_bound: float | None  # None where `decode_bytes` does not tell what a step reads: with a draft, or no cache


def decode(options: Decode) -> int:
    """Run the benchmark and print its table; returns the exit code.

    Raises: ValueError, one sentence, for options that cannot be and for folders that hold no checkpoint.
    """
    if options.new_tokens < 2:
        raise ValueError(f"new_tokens={options.new_tokens}: the first comes with the prefill, so decoding needs 2")
    for name in ("batch", "context", "draft", "draft_length"):
        if not getattr(options, name):
            raise ValueError(f"{name} is empty: give at least one value")
    for name, values in {"batch": options.batch, "context": options.context, "rounds": (options.rounds,)}.items():
        if min(values) < 1:
            raise ValueError(f"{name}={min(values)} is below 1")
    model, cfg, run, step = load_model(options.run)
    drafts: dict[str, Any] = {"none": None, "mtp": "mtp"}
    drafts |= {name: load_draft(name, run) for name in options.draft if name not in drafts}
    kinds = options.cache or (pick_kind(cfg, None),)
    dtypes = options.cache_dtype or (str(pick_dtype(cfg, None)),)
    prompts = cache(lambda batch, context: held_out_prompts(run, batch, context))

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
    ))  # fmt: skip
    for cell in cells:
        one(cell)
    made: dict[Cell, list[Generated]] = {cell: [] for cell in cells}
    for _ in range(options.rounds):
        for cell in cells:
            made[cell].append(one(cell))
    bandwidth = copy_bandwidth()
    weight_bytes = model.embed[...].dtype.itemsize
    timed = {cell: timing(cfg, cell, results, bandwidth, weight_bytes) for cell, results in made.items()}
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(_table(timed))
    console.print(
        f"step {step} of {options.run}, {options.new_tokens} new tokens, greedy, medians of {options.rounds}; "
        f"bound: weights and cache that a step must read, at the measured {bandwidth / 1e9:.1f} GB/s of copying",
        soft_wrap=True,
    )
    why = calls.why_not()
    console.print(f"by XLA alone, for {why}" if why else "float32 by the native kernels", soft_wrap=True)
    if options.json:
        rows = [asdict(cell) | asdict(result) for cell, result in timed.items()]
        report = {"step": step, "new_tokens": options.new_tokens, "copy_bandwidth": bandwidth, "cells": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def timing(
    cfg: ModelConfig, cell: Cell, results: Sequence[Generated], bandwidth: float, weight_bytes: int = 4
) -> Timing:
    """What a cell's rounds say.

    Args: bandwidth in bytes a second and weight_bytes, a parameter's, are for the bound.
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


def held_out_prompts(run: RunConfig, batch: int, context: int) -> list[list[int]]:
    """Prompts of `context` tokens from a run's held-out text; each begins with another document, as far as there are.

    Raises: ValueError where the text has fewer tokens than one prompt.
    """
    documents, text = load_corpus(run.data).val, tokenizer.load(run.data.tokenizer)
    prompts = []
    for i in range(batch):
        first, tokens = i * len(documents) // batch, []
        for document in [*documents[first:], *documents[:first]]:
            tokens += [*text.encode(document.text), text.eos_id]
            if len(tokens) >= context:
                break
        if len(tokens) < context:
            raise ValueError(f"context={context} is more than the {len(tokens)} tokens of the run's held-out text")
        prompts.append(tokens[:context])
    return prompts


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
            f"{cell.cache} {cell.cache_dtype}".strip(),
            f"{cell.draft} {cell.draft_length}" if cell.draft_length else cell.draft,
            short(found.prefill_tokens_per_s),
            f"{found.ms_per_token:.2f}",
            short(found.tokens_per_s),
            str(found.cache_bytes_per_token),
            " ".join(f"{a:.0%}" for a in found.acceptance) or "-",
            f"{found.tokens_per_step:.2f}",
            "-" if found.share_of_bound is None else f"{found.share_of_bound:.0%}",
        )
    return table
