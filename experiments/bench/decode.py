"""The decoding benchmark: our caches and transformers' in turns, and the gain of drafts.

python experiments/bench/decode.py --run runs/demo           # all parts; writes decode_results.json
python experiments/bench/decode.py caches                    # one part, or more
python experiments/bench/decode.py caches --cells 1024x1 4096x8 --again  # these cells alone, again
python experiments/bench/decode.py speculation --run runs/demo runs/eagle --draft-run runs/small
python experiments/bench/decode.py quality --run runs/demo   # what cache dtypes cost in loss
python experiments/bench/decode.py commits --against HEAD~1  # in turns with this tree; see README
python experiments/bench/decode.py --table                   # prints the results in Markdown

Parts are caches, speculation, quality and commits. Cells that the results have already are skipped,
so the same command resumes a stopped benchmark. `--peer-python PATH`: another interpreter has torch
and transformers.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path

from copying import copy_bandwidth, decode_bytes
from decode_worker import DecodeWorker
from peer_decode import PeerDecodeWorker
from process import KEEP_MEMORY, OutOfMemory

from dsv3_jax.config import replace
from dsv3_jax.data import open_source, tokenizer
from dsv3_jax.model.cache import CACHE_DTYPES
from dsv3_jax.presets import preset
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import read_run
from dsv3_jax.stats.cache_quality import cache_quality

CONTEXTS, BATCHES = (1024, 4096, 16384), (1, 8)
NEW_TOKENS = 33  # prefill makes the first
NEW_TOKENS_OF_COMMITS = 129
MINI = replace(preset("mini"), max_positions=max(CONTEXTS) + NEW_TOKENS_OF_COMMITS)
# Side: the settings of `generate`; None means the peer.
SIDES = {
    "transformers": None,
    "transformers, memory kept": None,
    "expanded": {"cache": "expanded", "cache_dtype": "float32"},
    "latent": {"cache": "latent", "cache_dtype": "float32"},
    "latent int8": {"cache": "latent", "cache_dtype": "int8"},
}
TOGETHER = 8192  # the largest cell, in tokens, whose sides all fit in memory together
# The largest cell, in tokens, that a lone peer runs once uncounted; our worker always does.
WARM_UP = 16384
DRAFT_LENGTHS = (1, 2, 3, 4, 8)
LOOKUP_LENGTHS = (2, 8)
DRAFTED_CONTEXT, DRAFTED_TOKENS = 64, 161  # within the tiny recipe's 256 training positions


def _start(side: str, python: str | None):
    if SIDES[side] is not None:
        return DecodeWorker(MINI)
    return PeerDecodeWorker(MINI, python=python, env=KEEP_MEMORY if side.endswith("kept") else None)


def _measure(worker, side: str, context: int, batch: int) -> dict:
    settings = SIDES[side]
    if settings is not None:
        return worker.decode(batch, context, NEW_TOKENS, **settings)
    # The peer's attention forms all scores, so long prompts go through in parts
    # (`prefill_chunk_size` of its `generate`), which is also faster there. Its steps in the largest
    # cells take seconds, so those have fewer.
    chunk = 0 if context <= 1024 else 1024 if context * batch <= 65536 else 256
    return worker.decode(
        batch, context, NEW_TOKENS if context * batch <= 32768 else 9, prefill_chunk=chunk
    )


def caches(context: int, batch: int, rounds: int, python: str | None) -> dict:
    """Measure one cell: prefill and decoding of every side in turns, after uncounted warm-up runs.

    Sides that do not fit in memory together run in processes that start and stop, for one long
    round. The result records a side that runs out of memory.
    """
    together = context * batch <= TOGETHER
    # The largest cells take minutes per side, so there the peer has only its default allocator.
    rows: dict = {side: [] for side in SIDES if together or not side.endswith("kept")}
    failed: dict[str, str] = {}
    versions: dict[str, str] = {"python": platform.python_version()}
    with ExitStack() as running:
        workers = {}
        bandwidths = [copy_bandwidth()]
        if together:
            for side in rows:
                workers[side] = running.enter_context(_start(side, python))
                _measure(workers[side], side, context, batch)
        for turn in range(rounds if together else 1):
            for side in rows:
                if side in failed:
                    continue
                try:
                    if together:
                        rows[side].append(_measure(workers[side], side, context, batch))
                    else:
                        with _start(side, python) as worker:
                            if context * batch <= WARM_UP:
                                _measure(worker, side, context, batch)
                            rows[side].append(_measure(worker, side, context, batch))
                            versions |= _versions(worker)
                except OutOfMemory as error:
                    failed[side] = str(error)
                outcome = rows[side][-1] if rows[side] else failed[side]
                print(
                    f"{context} x {batch}, round {turn + 1}, {side}: {outcome}",
                    file=sys.stderr,
                    flush=True,
                )
            bandwidths.append(copy_bandwidth())
        for worker in workers.values():
            versions |= _versions(worker)
    cell: dict = {
        "copy_bandwidth": statistics.median(bandwidths),
        "sides": {},
        "versions": versions,
    }
    for side, replies in rows.items():
        cell["sides"][side] = (
            {"failed": failed[side]}
            if side in failed
            else _row(replies, context, batch, bandwidths)
        )
    return cell


def _versions(worker) -> dict[str, str]:
    return {
        name: worker.info[name] for name in ("jax", "torch", "transformers") if name in worker.info
    }


def _row(replies: list[dict], context: int, batch: int, bandwidths: list[float]) -> dict:
    prefill = statistics.median(reply["prefill_seconds"] for reply in replies)
    steps = [reply["step_seconds"] for reply in replies]
    step = statistics.median(steps)
    per_token = replies[0]["cache_bytes_per_token"]
    bytes_per_step = decode_bytes(MINI, batch, context + NEW_TOKENS // 2, per_token)
    return {
        "prefill_tokens_per_s": context * batch / prefill,
        "ms_per_step": 1e3 * step,
        "least_ms": 1e3 * min(steps),
        "most_ms": 1e3 * max(steps),
        "cache_bytes_per_token": per_token,
        "cache_bytes": replies[0]["cache_bytes"],
        "peak_memory_gb": max(reply["peak_rss_bytes"] for reply in replies) / 1e9,
        "share_of_bound": bytes_per_step / statistics.median(bandwidths) / step,
    }


def caches_table(cells: dict) -> str:
    """Return a Markdown table. Ratios are against the faster of the peer's sides."""
    lines = [
        "| context × batch | side | prefill tokens/s | × peer | ms per step | × peer "
        "| cache bytes per token | peak memory, GB | share of the bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        peers = [
            row
            for side, row in cell["sides"].items()
            if SIDES[side] is None and "failed" not in row
        ]
        prefill = max((row["prefill_tokens_per_s"] for row in peers), default=None)
        step = min((row["ms_per_step"] for row in peers), default=None)
        for side, row in cell["sides"].items():
            if "failed" in row:
                lines.append(f"| {name} | {side} | out of memory | | | | | | |")
                continue
            lines.append(
                f"| {name} | {side} | {row['prefill_tokens_per_s']:,.0f} "
                f"| {row['prefill_tokens_per_s'] / prefill if prefill else float('nan'):.2f} "
                f"| {row['ms_per_step']:.1f} ({row['least_ms']:.1f}–{row['most_ms']:.1f}) "
                f"| {step / row['ms_per_step'] if step else float('nan'):.1f} "
                f"| {row['cache_bytes_per_token']:,.0f} | {row['peak_memory_gb']:.1f} "
                f"| {row['share_of_bound']:.0%} |"
            )
    return "\n".join(lines)


def speculation(runs: list[str], draft_run: str | None, batch: int, rounds: int) -> dict:
    """Measure one batch size on held-out text: runs plain and with heads, one with a draft model.

    All runs are loaded at once and take turns. Ratios are against plain decoding of the same run.
    """
    sides: list[tuple[str, str, dict]] = []  # (run, name, generate's settings)
    for run in runs:
        cfg = read_run(run).model
        kind = f"{cfg.mtp_kind} heads, {cfg.mtp_depth}" if cfg.mtp_depth else "no heads"
        sides.append((run, f"{kind}: plain", {}))
        for length in DRAFT_LENGTHS if cfg.mtp_depth else ():
            if cfg.head_kind.reads_tokens or length <= cfg.mtp_depth:
                sides.append(
                    (run, f"{kind}: draft {length}", {"draft": "mtp", "draft_length": length})
                )
        sides += [
            (run, f"{kind}, look-up: draft {n}", {"draft": "lookup", "draft_length": n})
            for n in LOOKUP_LENGTHS
        ]
    if draft_run:
        layers = read_run(draft_run).model.num_layers
        name = f"a model of {layers} layer{'s' if layers > 1 else ''}"
        sides += [
            (runs[0], f"{name}: draft {n}", {"draft": "run", "draft_length": n})
            for n in DRAFT_LENGTHS
        ]
    replies_by_side: list[list[dict]] = [[] for _ in sides]
    with ExitStack() as running:
        workers = {
            run: running.enter_context(
                DecodeWorker(run=run, draft_run=draft_run if run == runs[0] else None)
            )
            for run in runs
        }
        for turn in range(rounds):
            for (run, _, settings), replies in zip(sides, replies_by_side, strict=True):
                replies.append(
                    workers[run].decode(batch, DRAFTED_CONTEXT, DRAFTED_TOKENS, **settings)
                )
            print(f"batch {batch}, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    cell: dict = {}
    plain: dict[str, float] = {}
    for (run, name, settings), replies in zip(sides, replies_by_side, strict=True):
        rate = statistics.median(reply["tokens_per_s"] for reply in replies)
        if not settings:
            plain[run] = rate
        cell[name] = {
            "tokens_per_s": rate,
            "against_plain": rate / plain[run],
            "acceptance": replies[0]["acceptance"],
            "tokens_per_step": replies[0]["tokens_per_step"],
            "step_ms": 1e3 * statistics.median(reply["step_seconds"] for reply in replies),
        }
    return cell


def speculation_table(cells: dict) -> str:
    lines = [
        "| batch | drafts | tokens/s | × plain | ms per step | tokens per step "
        "| acceptance by position |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        for draft, row in cell.items():
            shares = ", ".join(f"{a:.0%}" for a in row["acceptance"])
            lines.append(
                f"| {name} | {draft} | {row['tokens_per_s']:,.0f} | {row['against_plain']:.2f} "
                f"| {row['step_ms']:.2f} | {row['tokens_per_step']:.2f} | {shares} |"
            )
    return "\n".join(lines)


def quality(run: str, batches: int = 8) -> dict:
    """Evaluate held-out text through caches of every kind and dtype."""
    model, trained, _ = load_run(run)
    source = open_source(trained.data, tokenizer.load(trained.data.tokenizer))
    held_out = source.val_batches(batches)
    kinds = ("latent", "expanded") if model.cfg.attention == "mla" else ("expanded",)
    return {
        kind: {k: asdict(v) for k, v in cache_quality(model, held_out, CACHE_DTYPES, kind).items()}
        for kind in kinds
    }


def quality_table(cells: dict) -> str:
    lines = [
        "| cache | dtype | bytes per token | validation loss | against float32 "
        "| same greedy tokens |",
        "|---|---|---|---|---|---|",
    ]
    for kinds in cells.values():
        for kind, rows in kinds.items():
            for dtype, row in rows.items():
                change = row["val_loss"] / rows["float32"]["val_loss"] - 1
                lines.append(
                    f"| {kind} | {dtype} | {row['bytes_per_token']:,} | {row['val_loss']:.4f} "
                    f"| {change:+.4%} | {row['agreement']:.2%} |"
                )
    return "\n".join(lines)


def commits(against: Sequence[str], context: int, batch: int, rounds: int) -> dict:
    """Measure one cell with this tree and with other commits in turns, each from its own work tree.

    No prompt is read: a step's time does not depend on the cache's rows, and reading takes minutes.

    Returns: by commit, the median of a step in ms, and the median over turns of this tree's step
        over the commit's.
    """
    repository = Path(__file__).parents[2]
    replies: dict[str, list[dict]] = {name: [] for name in ("this tree", *against)}
    with ExitStack() as running:
        trees: dict[str, Path | None] = {"this tree": None}
        for commit in against:
            folder = Path(running.enter_context(tempfile.TemporaryDirectory()))
            archive = subprocess.run(
                ["git", "archive", commit], cwd=repository, check=True, stdout=subprocess.PIPE
            )
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            trees[commit] = folder
        workers = {
            name: running.enter_context(DecodeWorker(MINI, tree=tree))
            for name, tree in trees.items()
        }
        for turn in range(rounds):
            # Who comes first may have it easier.
            for name in (list(workers), list(reversed(workers)))[turn % 2]:
                replies[name].append(
                    workers[name].decode(batch, context, NEW_TOKENS_OF_COMMITS, filled=True)
                )
            print(f"{context} x {batch}, round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    mine = [reply["step_seconds"] for reply in replies["this tree"]]
    cell = {}
    for name, rows in replies.items():
        steps = [reply["step_seconds"] for reply in rows]
        ratios = [ours / theirs for ours, theirs in zip(mine, steps, strict=True)]
        cell[name] = {
            "step_ms": 1e3 * statistics.median(steps),
            "step_over": statistics.median(ratios),
        }
    return cell


def commits_table(cells: dict) -> str:
    lines = [
        "| context × batch | commit | ms per step | this tree's time over it |",
        "|---|---|---|---|",
    ]
    for cell, rows in cells.items():
        lines += [
            f"| {cell} | {name} | {row['step_ms']:.2f} | {row['step_over']:.2f} |"
            for name, row in rows.items()
        ]
    return "\n".join(lines)


TABLES = {
    "caches": caches_table,
    "speculation": speculation_table,
    "quality": quality_table,
    "commits": commits_table,
}


def main() -> int:  # noqa: C901 - one command a branch
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*TABLES, []], help="default: the first three")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cells", nargs="*", help="cells of caches, as 1024x8; default: all")
    parser.add_argument(
        "--run", nargs="+", help="run folders of `dsv3 train`; quality uses the first"
    )
    parser.add_argument(
        "--draft-run",
        help="for speculation: another run, whose model also drafts for the first run",
    )
    parser.add_argument(
        "--against", nargs="+", help="for commits: what this tree is compared with, as HEAD~1"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure cells again that have results"
    )
    parser.add_argument("--table", action="store_true", help="only print the results")
    parser.add_argument(
        "--peer-python", help="an interpreter with torch and transformers; default: this one"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("decode_results.json"))
    args = parser.parse_args()
    parts = args.parts or ["caches", "speculation", "quality"]
    if "commits" in parts and not args.table and not args.against:
        parser.error("--against is missing, but commits compares this tree with other commits")
    if {"speculation", "quality"} & set(parts) and not args.table and not args.run:
        parser.error(
            "--run is missing, but speculation and quality need a run folder "
            "of `dsv3 train` or `dsv3 demo`"
        )
    known = [f"{context}x{batch}" for context, batch in product(CONTEXTS, BATCHES)]
    for cell in args.cells or ():
        if cell not in known:
            parser.error(f"--cells={cell!r} is not one of {', '.join(known)}")
    results = json.loads(args.out.read_text()) if args.out.exists() else {}

    def measure_cell(part: str, cell: str, measure, *settings) -> None:
        cells = results.setdefault(part, {})
        if cell in cells and not args.again:
            return
        cells[cell] = measure(*settings)
        results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    if not args.table:
        for context, batch in product(CONTEXTS, BATCHES):
            cell = f"{context}x{batch}"
            if "caches" in parts and cell in (args.cells or known):
                measure_cell("caches", cell, caches, context, batch, args.rounds, args.peer_python)
            if "commits" in parts and cell in (args.cells or known):
                measure_cell("commits", cell, commits, args.against, context, batch, args.rounds)
        for batch in BATCHES:
            if "speculation" in parts:
                measure_cell(
                    "speculation",
                    f"{batch}",
                    speculation,
                    args.run,
                    args.draft_run,
                    batch,
                    args.rounds,
                )
        if "quality" in parts:
            measure_cell("quality", "latent and expanded", quality, args.run[0])
    for part, table in TABLES.items():
        if part in results:
            print(f"\n{table(results[part])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
