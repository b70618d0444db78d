"""`dsv3 bench decode RUN`: how fast a run's checkpoint decodes, by batch, context, cache and draft."""

from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from dsv3_jax.cli.common import parse, run_subcommand
from dsv3_jax.config import CacheDtype, CacheKind
from dsv3_jax.data import tokenizer
from dsv3_jax.data.source import held_out_prompts
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model.cache import pick_kind


@dataclass
class Decode:
    """Time greedy decoding of a run's held-out text, for all combinations of the options with several values.

    Each combination runs once to compile, and then --rounds times. Its line has the medians.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run's folder, a released folder, or a hub id that is in the local cache"""
    batch: tuple[int, ...] = (1,)
    """numbers of sequences decoded together"""
    context: tuple[int, ...] = (128,)
    """numbers of tokens of a prompt; beyond the training length fewer drafts are accepted"""
    new_tokens: int = 64
    """number of tokens decoded after the prompt, at least 2"""
    cache: tuple[CacheKind | None, ...] = (None,)
    """what is cached: latent rows, expanded keys and values, or none; None means the model's smallest"""
    cache_dtype: tuple[CacheDtype | None, ...] = (None,)
    """dtypes of cached rows; None means the compute dtype"""
    draft: tuple[str, ...] = ("none",)
    """who drafts: none, mtp (the model's own heads), lookup (the text so far), or the folder of another run with the
    same tokenizer"""
    draft_length: tuple[int | Literal["auto"], ...] = (1,)
    """numbers of tokens drafted a step, or auto"""
    rounds: int = 3
    """number of timed rounds"""
    kernels: str | None = None
    """kernels to compute with: auto, xla, or a name from `dsv3 info PRESET --kernels`; None means the run's own"""


def decode(options: Decode) -> int:
    """Run the benchmark and print a line for each combination; return the exit code.

    Raises: ValueError (one sentence) for options out of range and for folders that hold no checkpoint.
    """
    if options.new_tokens < 2:
        raise ValueError(f"new_tokens={options.new_tokens}: the first comes with the prefill, so decoding needs 2")
    for name in ("batch", "context", "rounds"):
        if np.min(getattr(options, name), initial=1) < 1:
            raise ValueError(f"{name}={getattr(options, name)} is below 1")
    from dsv3_jax.hf.open_model import open_draft, open_model

    model, run, step = open_model(options.run, kernels=options.kernels)
    drafts: dict[str, Any] = {"none": None, "mtp": "mtp", "lookup": "lookup"}
    own = tokenizer.load(run.data.tokenizer)
    drafts |= {name: open_draft(name, own, kernels=options.kernels) for name in options.draft if name not in drafts}
    prompts = cache(lambda batch, context: held_out_prompts(run.data, batch, context))
    print(model.kernels.describe(model.compute_dtype))
    print(f"step {step} of {options.run}, {options.new_tokens} new tokens, greedy, medians of {options.rounds} rounds")
    columns = options.batch, options.context, options.cache, options.cache_dtype, options.draft, options.draft_length
    for batch, context, kind, dtype, draft, length in product(*columns):
        if draft == "none" and length != options.draft_length[0] or draft != "none" and kind == "none":
            continue  # without a draft no length differs, and without a cache nobody drafts
        how: dict[str, Any] = {"cache": kind, "cache_dtype": dtype, "draft": drafts[draft], "draft_length": length}
        rounds = range(options.rounds + 1)
        found = [generate(model, prompts(batch, context), options.new_tokens, **how) for _ in rounds][1:]
        prefill, seconds = (median(getattr(x, f"{name}_seconds") for x in found) for name in ("prefill", "decode"))
        drafted = "" if draft == "none" else f" of {length}, {found[-1].mean_accepted:.2f} tokens a step"
        print(
            f"batch {batch}, context {context}, cache {kind or pick_kind(run.model, None)} "
            f"{dtype or model.compute_dtype}, draft {draft}{drafted}: prefill {batch * context / prefill:,.0f} "
            f"tokens/s, {1e3 * seconds / (options.new_tokens - 1):.2f} ms a token, "
            f"{batch * (options.new_tokens - 1) / seconds:,.0f} tokens/s, "
            f"{found[-1].cache_bytes_per_token} bytes of cache a token",
            flush=True,
        )
    return 0


def run(argv: list[str]) -> int:
    """Run the benchmark that the first argument names: there is one."""
    decoding = (lambda rest: decode(parse(Decode, rest, "bench decode")), "RUN", "time the decoding of a checkpoint")
    return run_subcommand("bench", {"decode": decoding}, argv)
