"""The training benchmark: our step against transformers', and its growth with sizes.

python experiments/bench/train_step.py           # all parts; writes results.json beside this file
python experiments/bench/train_step.py peer      # one part: peer, experts, length or depth

`--peer-python PATH`: another interpreter has torch and transformers.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
from pathlib import Path

from peer_transformers import PeerTrainWorker
from process import KEEP_MEMORY
from worker import TrainWorker

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.model.counting import size, train_flops_per_token
from dsv3_jax.presets import preset

MINI = preset("mini")
BATCH, LENGTH = 4, 512
CORES = math.gcd(BATCH, os.cpu_count() or 1)


def against_peer(rounds: int, python: str | None) -> dict:
    """Measure tokens per second of both sides in turns, after uncounted warm-up steps of each."""
    tokens, rows = BATCH * LENGTH, {}
    # The peer's step has no balance loss and no bias update. Ours has that, which costs nothing.
    model = replace(MINI, init_std=0.006, balance=replace(MINI.balance, sequence_alpha=0.0))
    ours = TrainWorker(model)
    sides: dict = {
        "dsv3-jax": ours,
        "transformers, grouped_mm": PeerTrainWorker(model, experts="grouped_mm", python=python),
        "transformers, grouped_mm, memory kept": PeerTrainWorker(
            model, experts="grouped_mm", python=python, env=KEEP_MEMORY
        ),
    }
    seconds: dict = {name: [] for name in sides}
    losses: dict = {name: [] for name in sides}
    peaks, memory = [], {}

    def measure(name, side, count):
        reply = side.step(count)
        seconds.setdefault(name, []).extend(reply["seconds"])
        losses.setdefault(name, []).extend(reply["loss"])
        memory[name] = reply["peak_rss_bytes"]

    for side in sides.values():
        side.step(2)
    for i in range(rounds):
        peaks.append(ours.gemm())
        for name, side in sides.items():
            measure(name, side, 3)
        print(f"round {i + 1} of {rounds}: {seconds}", file=sys.stderr, flush=True)
    versions = {"jax": ours.info["jax"], "python": platform.python_version()}
    versions |= {k: sides["transformers, grouped_mm"].info[k] for k in ("torch", "transformers")}
    for side in sides.values():
        side.close()
    # These run alone, at the end, because all sides together do not fit in memory.
    with TrainWorker(model, mesh=f"data=1,expert={CORES}") as sharded:
        sharded.step(2)
        measure(f"dsv3-jax, --mesh expert={CORES}", sharded, 3 * rounds)
    with TrainWorker(model, kernels="xla") as plain:
        plain.step(2)
        measure("dsv3-jax, XLA alone", plain, 3 * rounds)
    with PeerTrainWorker(model, experts="eager", python=python) as eager:
        eager.step(1)
        measure("transformers, eager", eager, 2)
    peak = statistics.median(peaks)
    flops = train_flops_per_token(MINI)
    for name, times in seconds.items():
        rate = tokens / statistics.median(times)
        rows[name] = {
            "tokens_per_s": rate,
            "least": tokens / max(times),
            "most": tokens / min(times),
            "share_of_gemm": rate * flops / peak,
            "peak_memory_gb": memory[name] / 1e9,
            "loss": [losses[name][0], losses[name][-1]],
        }
    best = max(row["tokens_per_s"] for name, row in rows.items() if name.startswith("transformers"))
    for row in rows.values():
        row["against_best_peer"] = row["tokens_per_s"] / best
    return {
        "gemm_gflops": peak / 1e9,
        "compile_seconds": ours.info["compile_seconds"],
        "versions": versions,
        "sides": rows,
    }


def _grow(variants: dict[str, tuple[ModelConfig, int, int]], rounds: int, in_turns: bool) -> dict:
    """Measure the step time and memory of (config, batch, length), in turns if `in_turns`."""
    rows: dict = {}
    workers: dict = {}

    def measure(name, worker, count):
        reply = worker.step(count)
        row = rows.setdefault(name, {"seconds": []})
        row["seconds"] += reply["seconds"]
        row["peak_memory_gb"] = reply["peak_rss_bytes"] / 1e9

    for name, (cfg, batch, length) in variants.items():
        worker = workers[name] = TrainWorker(cfg, batch_size=batch, seq_len=length)
        worker.step(1)
        if not in_turns:
            measure(name, worker, rounds)
            worker.close()
        print(name, worker.info, file=sys.stderr, flush=True)
    if in_turns:
        for _ in range(rounds):
            for name, worker in workers.items():
                measure(name, worker, 1)
        for worker in workers.values():
            worker.close()
    for name, (cfg, batch, length) in variants.items():
        info, row = workers[name].info, rows[name]
        row["seconds"] = statistics.median(row["seconds"])
        row |= {
            "tokens_per_s": batch * length / row["seconds"],
            "parameters": info["parameters"],
            "active": size(cfg).active,
            "compile_seconds": info["compile_seconds"],
            "temporary_gb": info["temporary_bytes"] / 1e9,
        }
    return rows


def growing_experts(rounds: int) -> dict:
    """Measure 16, 64 and 256 experts of one width, 6 per token: equal active parameters.

    Only the router's grow. At 4 × 512 and at 16 × 512 tokens. With more tokens, work that grows
    with all parameters (AdamW) weighs less.
    """
    variants = {}
    for batch in (4, 16):
        for experts in (16, 64, 256):
            cfg = replace(MINI, num_experts=experts)
            variants[f"{experts} experts, {batch} x 512"] = (cfg, batch, 512)
    return _grow(variants, rounds, in_turns=False)


def growing_length(rounds: int) -> dict:
    """Measure one sequence of 512 … 8,192 tokens: memory must grow linearly."""
    return _grow(
        {f"1 x {length}": (MINI, 1, length) for length in (512, 1024, 2048, 4096, 8192)},
        rounds,
        in_turns=False,
    )


def growing_depth(rounds: int) -> dict:
    """Measure 4 … 32 layers, one dense: compile time must not grow. Few experts: they must fit."""
    return _grow(
        {
            f"{layers} layers": (replace(MINI, num_layers=layers, num_experts=16), 4, 512)
            for layers in (4, 8, 16, 32)
        },
        rounds,
        in_turns=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=["peer", "experts", "length", "depth", []], help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--peer-python", help="an interpreter with torch and transformers; default: this one"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.json"))
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores"
    for part in args.parts or ["peer", "experts", "length", "depth"]:
        if part == "peer":
            results[part] = against_peer(args.rounds, args.peer_python)
        else:
            growing = {"experts": growing_experts, "length": growing_length, "depth": growing_depth}
            results[part] = growing[part](args.rounds)
        print(json.dumps(results[part], indent=1))
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
