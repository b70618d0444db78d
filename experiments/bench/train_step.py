"""Training steps in turns: ours against transformers'."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from dsv3_jax.config import ModelConfig, replace, to_dict
from dsv3_jax.model.counting import train_flops_per_token
from dsv3_jax.presets import preset
from experiments.apart import Worker
from experiments.bench import harness
from experiments.bench.harness import KEEP_MEMORY, Rows, in_turns

MINI = preset("mini")
TOKENS = 4 * 512


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
