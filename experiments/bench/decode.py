"""Decoding: our caches against transformers' in turns, and this tree against other commits."""

import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from statistics import median

from dsv3_jax.config import replace, to_dict
from dsv3_jax.presets import preset
from experiments.bench.copying import copy_bandwidth, decode_bytes
from experiments.bench.process import KEEP_MEMORY, ROOT, Worker
from experiments.bench.results import Rows
from experiments.bench.train_step import start_peer

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
# The largest cell, in tokens, that a lone peer runs once uncounted; our worker always does.
WARM_UP = 16384


def shape_of(cell: str) -> tuple[int, int]:
    """Return (cached tokens, sequences).

    >>> shape_of("1024x8")
    (1024, 8)
    """
    context, _, batch = cell.partition("x")
    return int(context), int(batch)


def start_ours(tree: Path = ROOT) -> Worker:
    """Start our side, with the package of a work tree.

    It reads only the fields that differ from their defaults: older commits lack new fields.
    """
    values = to_dict(MINI)
    config = {
        field.name: values[field.name]
        for field in fields(MINI)
        if getattr(MINI, field.name) != field.default
    }
    return Worker("decode_worker.py", {"config": config}, {"PYTHONPATH": str(tree)})


def start(side: str, python: str | None) -> Worker:
    """Start a side of `caches`."""
    if SIDES[side] is not None:
        return start_ours()
    env = KEEP_MEMORY if side.endswith("kept") else None
    return start_peer(MINI, python, env, decoding=True)


def measure(worker: Worker, side: str, context: int, batch: int) -> dict:
    """Read prompts and decode once."""
    settings = SIDES[side]
    if settings is not None:
        return worker.ask(batch=batch, context=context, new_tokens=NEW_TOKENS, **settings)
    # The peer's attention forms all scores, so long prompts go through in parts
    # (`prefill_chunk_size` of its `generate`), which is also faster there. Its steps in the largest
    # cells take seconds, so those have fewer.
    chunk = 0 if context <= 1024 else 1024 if context * batch <= 65536 else 256
    new = NEW_TOKENS if context * batch <= 32768 else 9
    return worker.ask(batch=batch, context=context, new_tokens=new, prefill_chunk=chunk)


def caches(cells: Sequence[str] = CELLS, rounds: int = 5, python: str | None = None) -> Rows:
    """How much faster does the latent cache prefill and decode than transformers?

    Up to `TOGETHER` cached tokens all sides take turns. Larger cells start and stop a process for
    each side, for one long round.

    Args: python: an interpreter with torch and transformers; None means this one.
    """
    for cell in cells:
        for side, row in one_cell(*shape_of(cell), rounds, python):
            yield f"{cell}, {side}", row


def one_cell(context: int, batch: int, rounds: int, python: str | None) -> Rows:
    """Measure one cell of `caches`, after an uncounted run of each side."""
    together = context * batch <= TOGETHER
    # The largest cells take minutes per side, so there the peer has only its default allocator.
    replies: dict = {side: [] for side in SIDES if together or not side.endswith("kept")}
    bandwidths = [copy_bandwidth()]

    def started(side: str, running: ExitStack) -> Worker:
        worker = running.enter_context(start(side, python))
        if context * batch <= WARM_UP:
            measure(worker, side, context, batch)
        return worker

    with ExitStack() as running:
        workers = {side: started(side, running) for side in replies} if together else {}
        for _ in range(rounds if together else 1):
            for side, found in replies.items():
                with ExitStack() as alone:
                    worker = workers.get(side) or started(side, alone)
                    found.append(measure(worker, side, context, batch))
            bandwidths.append(copy_bandwidth())

    # Medians; ratios are against the faster of the peer's sides.
    prefill, step = (
        {side: median(reply[key] for reply in found) for side, found in replies.items()}
        for key in ("prefill_seconds", "step_seconds")
    )
    peers = [side for side in replies if SIDES[side] is None]
    for side, found in replies.items():
        per_token = found[0]["cache_bytes_per_token"]
        bytes_per_step = decode_bytes(MINI, batch, context + NEW_TOKENS // 2, per_token)
        row = {
            "prefill_tokens_per_s": context * batch / prefill[side],
            "prefill_over_peer": min(prefill[peer] for peer in peers) / prefill[side],
            "ms_per_step": 1e3 * step[side],
            "least_ms": 1e3 * min(reply["step_seconds"] for reply in found),
            "most_ms": 1e3 * max(reply["step_seconds"] for reply in found),
            "step_over_peer": min(step[peer] for peer in peers) / step[side],
            "cache_bytes_per_token": per_token,
            "cache_bytes": found[0]["cache_bytes"],
            "peak_memory_gb": max(reply["peak_rss_bytes"] for reply in found) / 1e9,
            "copy_bandwidth": median(bandwidths),
            "share_of_bound": bytes_per_step / median(bandwidths) / step[side],
        }
        yield side, row


def commits(
    against: Sequence[str] = ("HEAD~1",), cells: Sequence[str] = CELLS, rounds: int = 5
) -> Rows:
    """How long does a step take by this tree, over other commits' time, in turns?

    Each commit has its own work tree. No prompt is read: a step's time does not depend on the
    cache's rows, and reading takes minutes. The ratio is the median of the turns' own.
    """
    for cell in cells:
        context, batch = shape_of(cell)
        with ExitStack() as running:
            workers = {"this tree": running.enter_context(start_ours())}
            for commit in against:
                folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
                archive = subprocess.run(
                    ["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE
                )
                subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
                workers[commit] = running.enter_context(start_ours(folder))
            steps: dict[str, list[float]] = {name: [] for name in workers}
            for turn in range(rounds):
                # Who comes first may have it easier.
                for name in (list(workers), list(reversed(workers)))[turn % 2]:
                    reply = workers[name].ask(
                        batch=batch, context=context, new_tokens=NEW_TOKENS_OF_COMMITS, filled=True
                    )
                    steps[name].append(reply["step_seconds"])
        for name, seconds in steps.items():
            ratios = [ours / other for ours, other in zip(steps["this tree"], seconds, strict=True)]
            yield f"{cell}, {name}", {"step_ms": 1e3 * median(seconds), "step_over": median(ratios)}
