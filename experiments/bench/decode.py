"""Decoding in turns: our caches against transformers'."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median

from dsv3_jax.config import replace, to_dict
from dsv3_jax.presets import preset
from experiments.apart import Worker
from experiments.bench import harness
from experiments.bench.copying import copy_bandwidth, decode_bytes
from experiments.bench.harness import CELLS, KEEP_MEMORY, Rows, in_turns, shape_of

NEW_TOKENS = 33  # prefill makes the first
MINI = replace(preset("mini"), max_positions=16384 + NEW_TOKENS)
# Side: the settings of `generate`; None means the peer.
SIDES: dict[str, dict | None] = {
    "transformers": None,
    "transformers, memory kept": None,
    "expanded": {"cache": "expanded", "cache_dtype": "float32"},
    "latent": {"cache": "latent", "cache_dtype": "float32"},
    "latent int8": {"cache": "latent", "cache_dtype": "int8"},
}
TOGETHER = 8192  # the largest cell, in tokens, whose sides all fit in memory together


def start(side: str, python: str | None) -> Worker:
    """Start a side."""
    if SIDES[side] is not None:
        return harness.start("decode", {"config": to_dict(MINI)})
    env = KEEP_MEMORY if side.endswith("kept") else None
    return harness.start_peer(MINI, python, env, decoding=True)


def request_of(side: str, context: int, batch: int) -> dict:
    """Return the question to a side: read prompts, and decode once."""
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
