"""What speculation rests on, measured: costs of steps, losses of heads, experts of neighbours.

python experiments/07_speculation/measured.py check              # minutes; CHECK.md's table
python experiments/07_speculation/measured.py heads TRUNK        # HEAD_LOSSES.md's table
python experiments/07_speculation/measured.py union RUN [RUN …]  # prints a table

`check` holds the cost model against this CPU: the cost of a step over 1, 2 and 4 drafts, in plain
steps. Times are the least of the rounds, in which all lengths take turns. Weights are random: they
decide no time, except by the experts that tokens reach.

`heads` trains a DeepSeek module by each loss and seed, in runs/lab/head-losses, on the frozen trunk
of a finished `dsv3 train lab`. Then it continues held-out prompts greedily and at temperature 1,
with one draft a step.

`union` counts the distinct experts that neighbouring tokens of held-out text reach.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from prompts import held_out_prompts
from when_it_pays import Setting, step_cost

from dsv3_jax.config import replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.host.files import write_atomic
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import distinct_experts, size
from dsv3_jax.model.decode import make_cache, prepare_decode, run_layers
from dsv3_jax.model.transformer import abstract
from dsv3_jax.presets import preset, recipe
from dsv3_jax.report.speed import gemm_flops
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import read_run
from dsv3_jax.runs.loop import fit
from dsv3_jax.runs.start import on_trunk, open_start
from experiments.bench.copying import copy_bandwidth
from experiments.lab.bases import lasting
from experiments.lab.measuring import expert_ids
from experiments.lab.results import replace_block
from experiments.lab.running import machine
from experiments.lab.tables import markdown_table, mean_spread
from experiments.random_data import filled

HERE = Path(__file__).parent


def keep(results, name, page, table):
    """Write results as JSON, and their table into a page."""
    write_atomic(HERE / name, json.dumps(results, indent=1) + "\n")
    replace_block(HERE / page, table(results))


# The cost model against this CPU

MINI = preset("mini")
DENSE = dict(dim=1024, dense_dim=4096, num_layers=8, num_dense_layers=8, num_heads=16)
MODELS = {"dense": replace(MINI, **DENSE), "mini": MINI}
LENGTHS, CONTEXT, ROUNDS = (0, 1, 2, 4), 256, 10
STEPS = {f"{name}x{batch}": (name, batch) for name in MODELS for batch in (1, 8, 32)}


def check():
    cells = {key: measure_steps(*of) for key, of in STEPS.items()}
    keep({"cells": cells, "machine": machine()}, "check.json", "CHECK.md", check_table)


def measure_steps(name, batch):
    """Return the seconds of a step by its drafts, and the machine's figures and load then."""
    cfg = MODELS[name]
    model = nnx.merge(*filled(abstract(cfg), cfg.init_std, "float32"))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(state, weights, cache, tokens):
        model = nnx.merge(graphdef, state)
        x, cache, _ = run_layers(model, tokens, cache, weights)
        return jnp.argmax(model.logits(model.norm(x)), axis=-1), cache.lengths

    weights = jax.jit(lambda state: prepare_decode(nnx.merge(graphdef, state)))(state)
    cache = make_cache(model, batch, CONTEXT + 32, pick_kind(cfg, None), jnp.dtype("float32"))
    cache = cache.at_lengths(jnp.full((batch,), CONTEXT, jnp.int32))
    times = {length: [] for length in LENGTHS}
    for _ in range(1 + ROUNDS):
        for length in LENGTHS:
            tokens = jnp.asarray(rng.integers(cfg.vocab_size, size=(batch, length + 1)), jnp.int32)
            begin = time.perf_counter()
            jax.block_until_ready(step(state, weights, cache, tokens))
            times[length].append(time.perf_counter() - begin)
    return {
        "seconds": {str(length): min(found[1:]) for length, found in times.items()},  # 1 compiles
        "bandwidth": copy_bandwidth(0.3),
        "peak": gemm_flops(seconds=0.3),
        "load": os.getloadavg()[0],
        "rounds": ROUNDS,
    }


def check_table(results):
    cells = results["cells"]
    # The best that a cell measured, as other work only lowers them.
    bandwidth, peak = (max(c[figure] for c in cells.values()) for figure in ("bandwidth", "peak"))
    how = Setting(bandwidth, peak, CONTEXT, weight_bytes=4, cache_dtype="float32")
    rows, errors = [], {name: [] for name in MODELS}
    for key, (name, batch) in STEPS.items():
        seconds, load = cells[key]["seconds"], cells[key]["load"]
        for length in LENGTHS[1:]:
            predicted, _ = step_cost(MODELS[name], how, batch, length)
            measured = seconds[str(length)] / seconds["0"]
            ratio = predicted / measured
            errors[name].append(abs(np.log(ratio)))
            numbers = [f"{x:.2f}" for x in (predicted, measured, ratio)]
            rows.append([name, str(batch), str(length), *numbers, f"{load:.1f}"])
    header = ["model", "batch", "drafts", "predicted", "measured", "predicted / measured", "load"]
    text = ", ".join(f"{name} {np.exp(np.mean(e)) - 1:.0%}" for name, e in errors.items())
    sizes = ", ".join(f"{n} {size(cfg).total / 1e6:.0f}M parameters" for n, cfg in MODELS.items())
    notes = (
        f"Mean error of the ratio: {text}. {sizes}; float32, {CONTEXT} cached tokens. "
        f"Machine: {results['machine']}. "
        f"It copies {bandwidth / 1e9:.0f} GB/s and multiplies {peak / 1e9:.0f} GFLOP/s. "
        "The load is the number of processes that want its cores."
    )
    return f"{markdown_table(header, rows)}\n\n{notes}"


# Heads on one frozen trunk, trained by three losses

LOSSES = {
    "ce": "cross-entropy on the text",
    "kl": "KL to the trunk",
    "tv": "total variation to the trunk",
}
SEEDS, HEAD_STEPS = (0, 1, 2), 150
PROMPTS, NEW = 32, 96


def heads(trunk):
    run = read_run(trunk)
    tokens = run.steps * run.data.batch_size * run.data.seq_len
    cells = {f"{loss}-{seed}": measure_head(trunk, loss, seed) for seed in SEEDS for loss in LOSSES}
    words = f"recipe lab, {run.steps} steps, {tokens / 1e6:.2f}M tokens"
    results = {"cells": cells, "trunk": words, "steps": HEAD_STEPS}
    keep(results, "head_losses.json", "HEAD_LOSSES.md", heads_table)


def measure_head(trunk, loss, seed):
    """Train a head, and return the share of its drafts that are accepted, by temperature."""
    start, steps = open_start(trunk), HEAD_STEPS
    run = lasting(replace(recipe("lab"), seed=seed), steps)
    run = replace(on_trunk(run, start), head_loss=loss)
    out = Path("runs/lab/head-losses") / f"{loss}-{seed}-{steps}"
    fit(run, out, start=start)
    model, prompts = load_run(out).model, held_out_prompts(run.data, PROMPTS, 32)
    how = dict(draft="mtp", draft_length=1, seed=seed)
    return {
        str(t): generate(model, prompts, NEW, temperature=t, **how).acceptance[0]
        for t in (0.0, 1.0)
    }


def heads_table(results):
    rows = []
    for loss, name in LOSSES.items():
        found = [results["cells"][f"{loss}-{seed}"] for seed in SEEDS]
        shares = [100 * np.array([cell[t] for cell in found]) for t in ("0.0", "1.0")]
        rows.append([name, *(mean_spread(share, 1) for share in shares), str(len(found))])
    header = ["the head's loss", "accepted, greedy, %", "accepted at temperature 1, %", "seeds"]
    notes = f"Trunk: {results['trunk']}. {results['steps']} steps for each head."
    return f"{markdown_table(header, rows)}\n\n{notes}"


# Experts of neighbouring tokens

TOKENS, ROWS, DRAWS = (2, 3, 5, 9), 16, 300


def union(*folders):
    rows = []
    for folder in folders:
        name, counts = measure_union(folder)
        for tokens, (near, drawn, even) in counts.items():
            numbers = [f"{x:.2f}" for x in (near, drawn, even)]
            rows.append([name, str(tokens), *numbers, f"{near / even - 1:+.0%}"])
    header = ["experts", "tokens", "neighbours", "drawn from the text", "even odds"]
    print(markdown_table([*header, "neighbours against even odds"], rows))


def measure_union(folder):
    """(The run's routing; distinct experts by count of tokens: neighbours, drawn, even.)"""
    model, run, _ = load_run(folder)
    cfg, rng = model.cfg, np.random.default_rng(0)
    tokens = jnp.asarray(held_out_prompts(run.data, ROWS, run.data.seq_len - 8), jnp.int32)
    ids = expert_ids(model, {"tokens": tokens, "segment_ids": None, "positions": None})
    texts = ids.reshape(-1, *ids.shape[2:])  # of each layer and row, [T, K]
    layers = ids.reshape(len(ids), -1, ids.shape[-1])
    counts = {}
    for n in TOKENS:
        near = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
        drawn = [layer[rng.choice(len(layer), n, False)] for layer in layers for _ in range(DRAWS)]
        means = (np.mean([len(np.unique(some)) for some in parts]) for parts in (near, drawn))
        counts[n] = (*means, distinct_experts(cfg, n))
    balance = f"bias rate {cfg.balance.bias_rate:g}" if cfg.balance.bias_rate else "no bias"
    grouped = f"{cfg.groups_per_token} of {cfg.num_groups} groups"
    limit = grouped if cfg.num_groups > 1 else "no groups"
    return f"{cfg.experts_per_token} of {cfg.num_experts}, {balance}, {limit}", counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {"check": check, "heads": heads, "union": union}
    parser.add_argument("what", choices=commands)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    args = parser.parse_args()
    commands[args.what](*args.runs)
