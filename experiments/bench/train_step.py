"""The training step: ours against transformers' in turns, and its growth with the model's sizes."""

from statistics import median

from dsv3_jax.config import ModelConfig, replace, to_dict
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.model.counting import size, train_flops_per_token
from dsv3_jax.presets import preset
from experiments.bench.process import KEEP_MEMORY, ROOT, Worker
from experiments.bench.results import Rows

MINI = preset("mini")
TOKENS = 4 * 512
LENGTHS = (512, 1024, 2048, 4096, 8192)


def start_ours(cfg: ModelConfig, **options) -> Worker:
    """Start our side. Args: options: of `train_worker.prepare`."""
    options = {"config": to_dict(cfg)} | options
    return Worker("train_worker.py", options, {"PYTHONPATH": str(ROOT)})


def start_peer(cfg: ModelConfig, python: str | None, env: dict | None = None, **options) -> Worker:
    """Start transformers on two cores.

    Args:
        python: an interpreter with torch and transformers; None means this one.
        options: of `peer_transformers.prepare`.
    """
    options = {"config": config_to_dict(cfg, dtype="float32"), "threads": 2} | options
    return Worker("peer_transformers.py", options, {"OMP_NUM_THREADS": "2"} | (env or {}), python)


def against_peer(rounds: int = 4, python: str | None = None) -> Rows:
    """Does a training step process twice as many tokens per second as transformers'?

    Both sides have the same mathematics, cores and batch of 4 × 512 tokens.
    """
    # The peer's step has no balance loss and no bias update. Ours has that, which costs nothing.
    model = replace(MINI, init_std=0.006, balance=replace(MINI.balance, sequence_alpha=0.0))
    ours = start_ours(model)
    sides = {
        "dsv3-jax": ours,
        "transformers, grouped_mm": start_peer(model, python),
        "transformers, grouped_mm, memory kept": start_peer(model, python, KEEP_MEMORY),
    }
    replies: dict[str, list[dict]] = {name: [] for name in sides}
    for side in sides.values():
        side.ask(steps=2)  # uncounted
    peaks = []
    for _ in range(rounds):
        peaks.append(ours.ask(gemm=True)["flops"])
        for name, side in sides.items():
            replies[name].append(side.ask(steps=3))
    for side in sides.values():
        side.close()

    # These run alone, at the end, because all sides together do not fit in memory.
    with start_ours(model, kernels="xla") as plain:
        plain.ask(steps=2)
        replies["dsv3-jax, XLA alone"] = [plain.ask(steps=3 * rounds)]
    with start_peer(model, python, experts="eager") as eager:
        eager.ask(steps=1)
        replies["transformers, eager"] = [eager.ask(steps=2)]

    rates = {
        name: [TOKENS / seconds for reply in found for seconds in reply["seconds"]]
        for name, found in replies.items()
    }
    best = max(median(rates[name]) for name in rates if name.startswith("transformers"))
    for name, found in replies.items():
        rate = median(rates[name])
        row = {
            "tokens_per_s": rate,
            "least": min(rates[name]),
            "most": max(rates[name]),
            "against_best_peer": rate / best,
            "share_of_gemm": rate * train_flops_per_token(MINI) / median(peaks),
            "gemm_gflops": median(peaks) / 1e9,
            "peak_memory_gb": found[-1]["peak_rss_bytes"] / 1e9,
            "loss": [found[0]["loss"][0], found[-1]["loss"][-1]],
        }
        yield name, row


def grow(variants: dict[str, tuple[ModelConfig, int, int]], rounds: int) -> Rows:
    """Measure the step's time and memory of (config, batch, length), one after the other."""
    for name, (cfg, batch, length) in variants.items():
        with start_ours(cfg, batch=batch, length=length) as worker:
            worker.ask(steps=1)  # uncounted
            reply, info = worker.ask(steps=rounds), worker.info
        row = {
            "seconds": median(reply["seconds"]),
            "tokens_per_s": batch * length / median(reply["seconds"]),
            "parameters": info["parameters"],
            "active": size(cfg).active,
            "compile_seconds": info["compile_seconds"],
            "temporary_gb": info["temporary_bytes"] / 1e9,
            "peak_memory_gb": reply["peak_rss_bytes"] / 1e9,
        }
        yield name, row


def experts(rounds: int = 4) -> Rows:
    """What do more experts cost, with equal active parameters but for the router's?

    With more tokens, AdamW's work on all parameters weighs less.
    """
    return grow(
        {
            f"{experts} experts, {batch} x 512": (replace(MINI, num_experts=experts), batch, 512)
            for batch in (4, 16)
            for experts in (16, 64, 256)
        },
        rounds,
    )


def length(rounds: int = 4) -> Rows:
    """Does memory grow linearly with the length of one sequence?"""
    return grow({f"1 x {tokens}": (MINI, 1, tokens) for tokens in LENGTHS}, rounds)


def depth(rounds: int = 4) -> Rows:
    """Does compile time grow with depth? Few experts, since 32 layers must fit."""
    return grow(
        {
            f"{layers} layers": (replace(MINI, num_layers=layers, num_experts=16), 4, 512)
            for layers in (4, 8, 16, 32)
        },
        rounds,
    )
