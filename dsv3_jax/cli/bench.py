"""`dsv3 bench decode RUN`: how fast a run's checkpoint decodes, by batch, context, cache and draft."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from dsv3_jax.cli.common import parse, run_subcommand
from dsv3_jax.config import CacheDtype, CacheKind
from dsv3_jax.data import tokenizer
from dsv3_jax.data.source import held_out_prompts
from dsv3_jax.decoding.generate import Generated, generate
from dsv3_jax.files import check_writable, write_atomic
from dsv3_jax.model.cache import pick_dtype, pick_kind
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


class Cell(NamedTuple):
    """One combination of the options."""

    batch: int
    context: int
    cache: str
    cache_dtype: str | None  # None without a cache
    draft: str
    draft_length: int | str  # 0 without a draft

    def __str__(self) -> str:
        cache = f"{self.cache} {self.cache_dtype or ''}".strip()
        draft = f"{self.draft} {self.draft_length or ''}".strip()
        return f"batch {self.batch}, context {self.context}, cache {cache}, draft {draft}"


def decode(options: Decode) -> int:
    """Run the benchmark and print its table; return the exit code.

    Raises: ValueError (one sentence) for options out of range and for folders that hold no checkpoint.
    """
    if options.new_tokens < 2:
        raise ValueError(f"new_tokens={options.new_tokens}: the first comes with the prefill, so decoding needs 2")
    for name in ("batch", "context", "rounds", "draft", "draft_length"):
        values = getattr(options, name)
        if values == ():
            raise ValueError(f"{name} is empty: give at least one value")
        if "draft" not in name and np.min(values) < 1:
            raise ValueError(f"{name}={np.min(values)} is below 1")
    check_writable(options.json)
    from dsv3_jax.hf.open_model import open_draft, open_model

    model, run, step = open_model(options.run, kernels=options.kernels)
    drafts: dict[str, Any] = {"none": None, "mtp": "mtp", "lookup": "lookup"}
    own = tokenizer.load(run.data.tokenizer)
    drafts |= {name: open_draft(name, own, kernels=options.kernels) for name in options.draft if name not in drafts}
    kinds = options.cache or (pick_kind(run.model, None),)
    dtypes = options.cache_dtype or (str(pick_dtype(model.compute_dtype, None)),)
    prompts = cache(lambda batch, context: held_out_prompts(run.data, batch, context))
    cells = dict.fromkeys(
        Cell(batch, context, kind, None if kind == "none" else dtype, draft, 0 if draft == "none" else length)
        for batch, context, kind, dtype, draft, length in product(
            options.batch, options.context, kinds, dtypes, options.draft, options.draft_length
        )
        if kind != "none" or draft == "none"  # without a cache nobody drafts
    )
    print(model.kernels.describe(model.compute_dtype))
    results: dict[Cell, list[Generated]] = {cell: [] for cell in cells}
    for i in range(options.rounds + 1):
        for cell in cells:
            print(f"{f'round {i}/{options.rounds}' if i else 'compile'}: {cell}", file=sys.stderr)
            given, how = prompts(cell.batch, cell.context), cell._asdict() | {"draft": drafts[cell.draft]}
            found = generate(model, given, options.new_tokens, **{name: how[name] for name in Cell._fields[2:]})
            results[cell] += [found] if i else []  # the first of all compiles
    rows = {cell: timing(cell, found) for cell, found in results.items()}
    width = max(len(str(cell)) for cell in cells)
    print(f"{'':{width}s}  prefill tok/s  ms/token    tok/s  cache B/token  tok/step  acceptance")
    for cell, row in rows.items():
        accepted = " ".join(f"{a:.0%}" for a in row["acceptance"])
        print(
            f"{cell!s:{width}s}  {format_count(row['prefill_tokens_per_s']):>13s}  {row['ms_per_token']:8.2f}  "
            f"{format_count(row['tokens_per_s']):>7s}  {row['cache_bytes_per_token']:13d}  "
            f"{row['tokens_per_step']:8.2f}  {accepted or '-'}"
        )
    print(f"step {step} of {options.run}, {options.new_tokens} new tokens, greedy, medians of {options.rounds} rounds")
    if options.json:
        report: dict[str, Any] = {"step": step, "new_tokens": options.new_tokens}
        report["cells"] = [cell._asdict() | row for cell, row in rows.items()]
        write_atomic(options.json, json.dumps(report, indent=1) + "\n")
    return 0


def timing(cell: Cell, results: Sequence[Generated]) -> dict[str, Any]:
    """Compute the medians of a cell's rounds."""
    first, count = results[0], len(results[0].tokens[0])
    return {
        "prefill_tokens_per_s": cell.batch * cell.context / median(result.prefill_seconds for result in results),
        "ms_per_token": 1e3 * median(result.decode_seconds for result in results) / (count - 1),  # of a sequence
        "tokens_per_s": median(result.tokens_per_s for result in results),  # of all sequences, while decoding
        "cache_bytes_per_token": first.cache_bytes_per_token,
        "acceptance": first.acceptance,
        "tokens_per_step": first.mean_accepted,
    }


def run(argv: list[str]) -> int:
    """Run the benchmark that the first argument names: there is one."""
    decoding = (lambda rest: decode(parse(Decode, rest, "bench decode")), "RUN", "time the decoding of a checkpoint")
    return run_subcommand("bench", {"decode": decoding}, argv)
