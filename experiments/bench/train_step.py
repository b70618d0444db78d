"""Training steps in turns: ours against transformers', and by the model's sizes."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from dsv3_jax.config import ModelConfig, replace, to_dict
from dsv3_jax.model.counting import size, train_flops_per_token
from dsv3_jax.presets import preset
from experiments.apart import Worker
from experiments.bench import harness
from experiments.bench.harness import KEEP_MEMORY, Rows, in_turns

MINI = preset("mini")
TOKENS = 4 * 512
# Of `sizes`: model, sequences, tokens of each. With 32 layers only few experts fit.
SIZES = {
    f"{experts} experts, {batch} x 512": (replace(MINI, num_experts=experts), batch, 512)
    for batch in (4, 16)
    for experts in (16, 64, 256)
}
SIZES |= {f"1 x {tokens}": (MINI, 1, tokens) for tokens in (512, 1024, 2048, 4096, 8192)}
SIZES |= {
    f"{layers} layers": (replace(MINI, num_layers=layers, num_experts=16), 4, 512)
    for layers in (4, 8, 16, 32)
}


def start_ours(cfg: ModelConfig, **options: Any) -> Worker:
    """Start our side. Args: options: of `worker.train`."""
    return harness.start("train", {"config": to_dict(cfg)} | options)


def against_peer(rounds: int = 4, python: str | None = None) -> Rows:
    """Does a training step process twice as many tokens per second as transformers'?

    Both sides have the same mathematics, cores and batch of 4 × 512 tokens.
    """
    # The peer's step has no balance loss and no bias update. Ours has that, which costs nothing.
    model = replace(MINI, init_std=0.006, balance=replace(MINI.balance, sequence_alpha=0.0))
    peer = partial(harness.start_peer, model, python)
    with ExitStack() as running:
        ours = running.enter_context(start_ours(model))
        sides = {
            "dsv3-jax": ours,
            "transformers, grouped_mm": running.enter_context(peer()),
            "transformers, grouped_mm, memory kept": running.enter_context(peer(KEEP_MEMORY)),
        }
        asked: dict[str, Callable] = {"gemm": partial(ours.ask, gemm=True)}
        asked |= {name: partial(side.ask, steps=3) for name, side in sides.items()}
        replies = in_turns(asked, rounds)
    peak = median(reply["flops"] for reply in replies.pop("gemm"))

    # These run alone, at the end, because all sides together do not fit in memory.
    with start_ours(model, kernels="xla") as plain:
        replies |= in_turns({"dsv3-jax, XLA alone": partial(plain.ask, steps=3)}, rounds)
    with peer(experts="eager") as eager:
        replies |= in_turns({"transformers, eager": partial(eager.ask, steps=2)}, 1)

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
            "share_of_gemm": rate * train_flops_per_token(MINI) / peak,
            "gemm_gflops": peak / 1e9,
            "peak_memory_gb": found[-1]["peak_rss_bytes"] / 1e9,
            "loss": [found[0]["loss"][0], found[-1]["loss"][-1]],
        }
        yield name, row


def sizes(names: Sequence[str] = tuple(SIZES), rounds: int = 4) -> Rows:
    """How do a step's time and memory grow with experts, the length of a sequence, and layers?

    The experts' active parameters are equal but for the router's, and with more tokens AdamW's work
    on all parameters weighs less.

    Args: names: of SIZES, which are measured one after the other.
    """
    for name in names:
        cfg, batch, length = SIZES[name]
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
