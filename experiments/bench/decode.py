"""Decoding in turns: our caches against transformers', this tree against commits, the sampler."""

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from flax import nnx

import dsv3_jax as ds
from dsv3_jax.config import replace, to_dict
from dsv3_jax.presets import preset
from experiments.apart import Worker
from experiments.bench import harness
from experiments.bench.copying import copy_bandwidth, decode_bytes
from experiments.bench.harness import KEEP_MEMORY, ROOT, Rows, in_turns, ratio

CELLS = ("1024x1", "1024x8", "4096x1", "4096x8", "16384x1", "16384x8")  # cached tokens × sequences
NEW_TOKENS = 33  # prefill makes the first
NEW_TOKENS_OF_COMMITS = 129
MINI = replace(preset("mini"), max_positions=16384 + NEW_TOKENS_OF_COMMITS)
# Side: the settings of `generate`; None means the peer.
SIDES: dict[str, dict | None] = {
    "transformers": None,
    "transformers, memory kept": None,
    "expanded": {"cache": "expanded", "cache_dtype": "float32"},
    "latent": {"cache": "latent", "cache_dtype": "float32"},
    "latent int8": {"cache": "latent", "cache_dtype": "int8"},
}
TOGETHER = 8192  # the largest cell, in tokens, whose sides all fit in memory together


def shape_of(cell: str) -> tuple[int, int]:
    """Return (cached tokens, sequences).

    >>> shape_of("1024x8")
    (1024, 8)
    """
    context, _, batch = cell.partition("x")
    return int(context), int(batch)


def start_ours(tree: Path = ROOT) -> Worker:
    """Start our side. It reads only fields that differ from their defaults: commits lack others."""
    values = to_dict(MINI)
    changed = [field.name for field in fields(MINI) if getattr(MINI, field.name) != field.default]
    config = {name: values[name] for name in changed}
    return harness.start("decode", {"config": config}, tree=tree)


def start(side: str, python: str | None) -> Worker:
    """Start a side of `caches`."""
    if SIDES[side] is not None:
        return start_ours()
    env = KEEP_MEMORY if side.endswith("kept") else None
    return harness.start_peer(MINI, python, env, decoding=True)


def request_of(side: str, context: int, batch: int) -> dict:
    """Return the question to a side of `caches`: read prompts, and decode once."""
    request = dict(batch=batch, context=context, new_tokens=NEW_TOKENS)
    settings = SIDES[side]
    if settings is not None:
        return request | settings
    # The peer's attention forms all scores, so long prompts go through in parts
    # (`prefill_chunk_size` of its `generate`), which is also faster there. Its steps in the largest
    # cells take seconds, so those have fewer.
    chunk = 0 if context <= 1024 else 1024 if context * batch <= 65536 else 256
    new = NEW_TOKENS if context * batch <= 32768 else 9
    return request | dict(new_tokens=new, prefill_chunk=chunk)


def caches(cells: Sequence[str] = CELLS, rounds: int = 5, python: str | None = None) -> Rows:
    """How much faster does the latent cache prefill and decode than transformers?

    Up to `TOGETHER` cached tokens all sides take turns. Larger cells start and stop a process for
    each side, for one long round.

    Args: python: an interpreter with torch and transformers; None means this one.
    """
    for cell in cells:
        context, batch = shape_of(cell)
        together = context * batch <= TOGETHER
        # The largest cells take minutes per side, so there the peer has only its default allocator.
        names = [side for side in SIDES if together or not side.endswith("kept")]
        found: dict[str, list] = {}
        bandwidths: list[float] = []
        for some in [names] if together else [[name] for name in names]:
            with ExitStack() as running:
                sides: dict[str, Callable] = {"copy": copy_bandwidth}
                for name in some:
                    worker = running.enter_context(start(name, python))
                    sides[name] = partial(worker.ask, **request_of(name, context, batch))
                found |= in_turns(sides, rounds if together else 1)
            bandwidths += found.pop("copy")
        for side, row in compared(found, context, batch, median(bandwidths)):
            yield f"{cell}, {side}", row


def compared(replies: dict[str, list], context: int, batch: int, bandwidth: float) -> Rows:
    """Return medians of the sides' replies; ratios are against the faster of the peer's sides."""
    prefill, step = (
        {side: median(reply[key] for reply in some) for side, some in replies.items()}
        for key in ("prefill_seconds", "step_seconds")
    )
    peers = [side for side in replies if SIDES[side] is None]
    for side, some in replies.items():
        per_token = some[0]["cache_bytes_per_token"]
        bytes_per_step = decode_bytes(MINI, batch, context + NEW_TOKENS // 2, per_token)
        row = {
            "prefill_tokens_per_s": context * batch / prefill[side],
            "prefill_over_peer": min(prefill[peer] for peer in peers) / prefill[side],
            "ms_per_step": 1e3 * step[side],
            "least_ms": 1e3 * min(reply["step_seconds"] for reply in some),
            "most_ms": 1e3 * max(reply["step_seconds"] for reply in some),
            "step_over_peer": min(step[peer] for peer in peers) / step[side],
            "cache_bytes_per_token": per_token,
            "cache_bytes": some[0]["cache_bytes"],
            "peak_memory_gb": max(reply["peak_rss_bytes"] for reply in some) / 1e9,
            "copy_bandwidth": bandwidth,
            "share_of_bound": bytes_per_step / bandwidth / step[side],
        }
        yield side, row


def commits(
    against: Sequence[str] = ("HEAD~1",), cells: Sequence[str] = CELLS, rounds: int = 5
) -> Rows:
    """How long does a step take by this tree, over other commits' time, in turns?

    Each commit's package has a folder of its own. No prompt is read: a step's time does not depend
    on the cache's rows, and reading takes minutes. The ratio is the median of the turns' own.
    """
    for cell in cells:
        context, batch = shape_of(cell)
        request = dict(batch=batch, context=context, new_tokens=NEW_TOKENS_OF_COMMITS, filled=True)
        with ExitStack() as running:
            trees = {"this tree": ROOT}
            for commit in against:
                trees[commit] = Path(running.enter_context(tempfile.TemporaryDirectory()))
                package = ["git", "archive", commit, "dsv3_jax"]
                archive = subprocess.run(package, cwd=ROOT, check=True, stdout=subprocess.PIPE)
                unpack = ["tar", "-x", "-C", trees[commit]]
                subprocess.run(unpack, input=archive.stdout, check=True)
            sides = {}
            for name, tree in trees.items():
                worker = running.enter_context(start_ours(tree))
                sides[name] = partial(worker.ask, **request)
            replies = in_turns(sides, rounds)
        steps = {name: [reply["step_seconds"] for reply in some] for name, some in replies.items()}
        for name, seconds in steps.items():
            over = ratio(steps["this tree"], seconds)
            yield f"{cell}, {name}", {"step_ms": 1e3 * median(seconds), "step_over": over}


def sampler(
    rounds: int = 5,
    samples: Sequence[int] = (1, 4),
    batch_sizes: Sequence[int] = (8, 16, 32),
    prompts: int = 64,
    new: int = 128,
) -> Rows:
    """How much faster are refilled rows than one row at a time, for prompts of unequal lengths?

    The model is the demo's with random weights, in float32. A text ends with one of 16 of its 1,024
    tokens, so lengths are about geometric with a mean of 64, cut at `new`. Seconds include prefill.
    """
    cfg = replace(ds.preset("tiny"), vocab_size=1024)
    model, rng = ds.Transformer(cfg, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    texts = [rng.integers(cfg.vocab_size, size=n).tolist() for n in rng.integers(4, 65, prompts)]
    stops = rng.choice(cfg.vocab_size, 16, replace=False).tolist()
    one_row = "one row: a call for each prompt"

    def sample(count: int, size: int | None) -> tuple[float, list]:
        """Args: size: rows of a batch; None means a call for each prompt."""
        start, found = time.perf_counter(), []
        for some in [texts] if size else [[text] for text in texts]:
            how = dict(temperature=1.0, stop_tokens=stops, samples=count, batch_size=size or 1)
            found += ds.generate(model, some, new, **how).tokens
        return sum(map(len, found)) / (time.perf_counter() - start), found

    for count in samples:
        sides = {one_row: partial(sample, count, None)}
        sides |= {f"{size} rows": partial(sample, count, size) for size in batch_sizes}
        turns = in_turns(sides, rounds)
        rates = {side: [rate for rate, _ in found] for side, found in turns.items()}
        first = turns[one_row][0][1]
        for side, found in turns.items():
            assert all(sampled == first for _, sampled in found), f"{side}: other texts"
            row = {
                "tokens_per_s": median(rates[side]),
                "least": min(rates[side]),
                "most": max(rates[side]),
                "x": ratio(rates[side], rates[one_row]),
                "tokens": sum(map(len, first)),
                "median_length": median(map(len, first)),
            }
            yield f"samples a prompt: {count}, {side}", row
