"""Random configurations of small models: a training step, decoding, drafts and batches must agree.

    python -m tests.campaign.models --minutes 10 --seed 0

A configuration that is refused (ConfigError) is drawn again. For the others a training step must be finite, and greedy
tokens must be those of the forward pass. Drafts must change no token, nor may other prompts in the batch. Either token
passes if two logits are within rounding.

Compiling takes nearly all the time, and of it the training step 60 %. So most models have one or two layers and one
head, and nine of ten get their other batch in the same shape: it needs no new program.
"""

import gc
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import runs
from flax import nnx
from models import random_model

from dsv3_jax.config import HEAD_KINDS, Balance, ConfigError, Execution, ModelConfig, OptimConfig, Yarn
from dsv3_jax.decoding.generate import generate
from dsv3_jax.model.transformer import abstract
from dsv3_jax.training.step import Job, make_step
from tests.campaign.small_runs import last_json
from tests.campaign.table import Table
from tests.campaign.trials import main, report, trials
from tests.campaign.watch import Worker

LIMIT_S = 300.0  # five programs are compiled
NEW, LENGTH, TIE = 8, 32, 1e-4  # new tokens; positions of the forward pass; a tie's distance of logits


def draw(rng: random.Random) -> ModelConfig:
    """Draw until a configuration is accepted."""
    while True:
        try:
            return _draw(rng)
        except ConfigError:
            continue


def _draw(rng: random.Random) -> ModelConfig:
    pick = rng.choice
    layers, experts, heads = pick([1, 1, 1, 1, 2, 2, 3]), pick([1, 2, 3, 4, 6, 8]), pick([1, 2, 3, 4])
    attention, router = (
        pick(["mla", "mla", "mha", "gqa", "mqa"]),
        pick(["sigmoid", "sigmoid", "softmax", "topk", "dense"]),
    )
    groups = pick([1, 1, 2, 3, 4])
    kind = pick(sorted(HEAD_KINDS))
    return ModelConfig(
        vocab_size=pick([5, 37, 260]),
        dim=pick([2, 7, 8, 16]),
        num_layers=layers,
        num_dense_layers=rng.randrange(layers + 1),
        dense_dim=pick([1, 5, 12]),
        num_heads=heads,
        q_latent_dim=pick([None, 1, 5]),
        kv_latent_dim=pick([1, 5, 8]),
        nope_head_dim=pick([1, 3, 4]),
        rope_head_dim=pick([2, 4, 6]),
        v_head_dim=pick([1, 3, 5]),
        num_experts=experts,
        experts_per_token=experts if router == "dense" else rng.randrange(1, experts + 1),
        num_shared_experts=pick([0, 1, 2]),
        expert_dim=pick([1, 5, 6]),
        attention=attention,
        num_kv_heads=pick([1, 2, 3]) if attention == "gqa" else None,
        num_groups=groups,
        groups_per_token=rng.randrange(1, groups + 1),
        router=router,
        group_score=pick(["top2_sum", "max"]),
        normalize_gates=pick([True, False]),
        routed_scale=pick([1.0, 2.5]),
        balance=Balance(pick([0.0, 1e-2]), pick([0.0, 1e-2]), pick([0.0, 1e-2])),
        capacity_factor=pick([None, None, 0.5, 1.25, 100.0]),
        rope_theta=pick([1.0, 100.0, 1e4]),
        rope_interleaved=pick([True, False]),
        yarn=pick([Yarn(), Yarn(factor=4.0, original_max_positions=16, mscale=pick([0.0, 1.0]))]),
        max_positions=64,
        mtp_depth=pick([0, 0, 1, 1, 1, 1, 1, 2, 3]),
        mtp_kind=kind,
        mtp_input=pick(["normed", "raw"]),
        norm_eps=pick([1e-6, 0.05]),
        tie_embeddings=pick([True, False]),
        init_std=0.3,
    )


def check(seed: str, number: str) -> int:
    """Print which checks of a configuration failed, as a line of JSON; a command of the worker."""
    rng = random.Random(f"models {seed} {number}")
    cfg = draw(rng)
    kernels = rng.choice(["auto", "auto", "xla", "grouped_swiglu=dense"])
    cache = rng.choice(["latent", "latent", "expanded", "none"]) if cfg.attention == "mla" else None
    print(cfg, kernels, cache)
    execution = Execution(kernels=kernels, remat=rng.choice(["none", "none", "full"]))
    failed = [] if is_finite(cfg, execution, rng) else ["step"]
    failed += decoding(cfg, Execution(kernels=kernels), cache, rng)
    print(json.dumps({"failed": failed}))
    jax.clear_caches()
    gc.collect()
    return 0


def is_finite(cfg: ModelConfig, execution: Execution, rng: random.Random) -> bool:
    """Take a training step; whether loss, gradient and all new parameters are finite."""
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=0, microbatches=rng.choice([1, 1, 2]))
    run = runs.make_run("nowhere", model=cfg, execution=execution, optim=optim)
    values = np.random.default_rng(rng.randrange(2**32))
    batch = runs.packed_batch(values, np.sort(values.integers(1, 4, (4, 16)), axis=1))
    batch["tokens"] = batch["tokens"] % cfg.vocab_size
    state, metrics = make_step(Job(run))(runs.fresh_state(run), batch)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
    return bool(metrics["finite"]) and all(np.isfinite(leaf).all() for leaf in leaves)


def decoding(cfg: ModelConfig, execution: Execution, cache: str | None, rng: random.Random) -> list[str]:
    """Compare greedy decoding with the forward pass, and with drafts, and row by row."""
    model = random_model(cfg, rng.randrange(2**32), execution)
    prompts = [[rng.randrange(cfg.vocab_size) for _ in range(n)] for n in (1, rng.randrange(2, 9), 12)]
    # Decoding drops no token, so neither must the forward pass that it is compared with.
    forward = nnx.merge(nnx.graphdef(abstract(replace(cfg, capacity_factor=None), execution)), nnx.state(model))
    logits_of = jax.jit(lambda tokens: forward(tokens).logits)
    greedy = generate(model, prompts, NEW, cache=cache).tokens
    failed = []

    def is_greedy(prompt: list[int], new: list[int]) -> bool:
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(prompt) + len(new)] = [*prompt, *new]
        logits = np.asarray(logits_of(jnp.asarray(row)))[0, len(prompt) - 1 : len(prompt) - 1 + len(new)]
        chosen = np.take_along_axis(logits, np.array(new)[:, None], axis=-1)[:, 0]
        return bool((chosen >= logits.max(-1) - TIE * np.maximum(1, np.abs(logits).max())).all())

    def agree(name: str, rows: list[list[int]], chosen: list[list[int]]) -> None:
        """Other tokens pass if they are greedy too: then two logits were within rounding."""
        same = all(a == b or is_greedy(p, b) for p, a, b in zip(chosen, greedy_of(chosen), rows, strict=True))
        if not same or any(len(row) != NEW for row in rows):
            failed.append(name)

    def greedy_of(chosen: list[list[int]]) -> list[list[int]]:
        return [greedy[prompts.index(prompt)] for prompt in chosen]

    if not all(map(is_greedy, prompts, greedy)):
        failed.append("greedy")
    if cfg.mtp_depth:
        length = rng.randrange(1, 5 if cfg.head_kind.reads_tokens else cfg.mtp_depth + 1)
        kept = None if cache == "none" else cache  # without a cache nobody drafts
        agree("drafts", generate(model, prompts, NEW, cache=kept, draft="mtp", draft_length=length).tokens, prompts)
    alone = prompts[2:] * (1 if rng.random() < 0.1 else 3)  # a batch of one, or one of the same shape: no other prompts
    agree("single", generate(model, alone, NEW, cache=cache).tokens, alone)
    return failed


COMMANDS = {"check": check}


def run(seconds: float, seed: int, table: Table, least: int = 1) -> None:
    """Check random configurations for so long."""
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as root:
        with Worker("tests.campaign.models", limit=LIMIT_S, environment=runs.environment(Path(root))) as ready:
            for number, _ in trials("models", until, seed, table, least):
                answer = ready.run(["check", str(seed), str(number)])
                faults, said = [answer.fault] if answer.fault else [], answer.out + answer.err[-1500:]
                if answer.code == 2:
                    faults = ["tracebacks"]  # what is accepted must work
                if answer.code == 0 and last_json(answer.out)["failed"]:
                    faults = ["silent"]
                table.add("models", faults)
                report("models", seed, number, "configuration", faults, said)


if __name__ == "__main__":
    sys.exit(main("models", run))
