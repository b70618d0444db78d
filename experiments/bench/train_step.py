"""Training steps in turns: ours against transformers', by optimizer, and by the model's sizes."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dsv3_jax as ds
from dsv3_jax.config import ModelConfig, replace, to_dict
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.model.counting import size, train_flops_per_token
from dsv3_jax.presets import preset
from dsv3_jax.training import optim
from dsv3_jax.training.state import Job, init_state, split_trainable
from dsv3_jax.training.step import make_step
from experiments.apart import Worker
from experiments.bench import harness
from experiments.bench.harness import KEEP_MEMORY, Rows, in_turns, ratio
from experiments.bench.worker import draw_tokens
from experiments.random_data import batch_of

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


CHAIN = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(2.2e-4, 0.9, 0.95, weight_decay=0.1)
)
OPTIMIZERS: dict[str, tuple[dict, optax.GradientTransformation | None]] = {
    "adamw": ({}, None),
    "muon": ({"name": "muon"}, None),
    "optax chain of adamw": ({}, CHAIN),
    "muon, qk_clip 100": ({"name": "muon", "qk_clip": 100.0}, None),
}


class Optimizer:
    """One optimizer: a complete step, and its update alone on gradients that are there."""

    def __init__(self, run: ds.RunConfig, tx: optax.GradientTransformation | None, batch: dict):
        kernels = prepare(run.execution)
        job = Job(run, kernels=kernels, optimizer=tx)
        self.state, self.batch, self.step_fn = init_state(job), batch, make_step(job)
        update = optim.make(run.optim, run.steps, kernels, tx).update
        self.update_fn = jax.jit(update, donate_argnums=(1, 2))
        self.params = jax.tree.map(jnp.copy, split_trainable(run, self.state.params)[0])
        self.opt = jax.tree.map(jnp.copy, self.state.opt)
        self.grads = jax.tree.map(lambda p: jnp.full_like(p, 1e-3), self.params)

    def step(self) -> Any:
        self.state, metrics = self.step_fn(self.state, self.batch)
        return metrics

    def update(self) -> Any:
        # QK-clip's own part is in `step` alone: it needs the forward pass.
        args = self.state.step, self.params, self.opt, self.grads, jnp.float32(1), jnp.bool_(True)
        self.params, self.opt = self.update_fn(*args)
        return self.params


def optimizer(name: str = "tiny", rounds: int = 7) -> Rows:
    """How much longer is a step with Muon, QK-clip or an optax chain than with the fused AdamW?"""
    run = ds.recipe(name)
    batch = batch_of(draw_tokens(run.data.batch_size, run.data.seq_len, run.model.vocab_size))

    def seconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - start

    calls = {}
    for side, (changes, tx) in OPTIMIZERS.items():
        one = Optimizer(replace(run, optim=replace(run.optim, **changes)), tx, batch)
        calls[side, "step"] = partial(seconds, one.step)
        calls[side, "update"] = partial(seconds, one.update)
    times = in_turns(calls, rounds)
    for side in OPTIMIZERS:
        step, update = times[side, "step"], times[side, "update"]
        row = {
            "step_s": median(step),
            "step_over_adamw": ratio(step, times["adamw", "step"]),
            "update_ms": 1e3 * median(update),
            "update_over_adamw": ratio(update, times["adamw", "update"]),
        }
        yield side, row
