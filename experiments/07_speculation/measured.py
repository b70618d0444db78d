"""What speculation rests on, measured: costs of steps, losses of heads, experts of neighbours.

python experiments/07_speculation/measured.py check    # minutes; check.json and CHECK.md's table
python experiments/07_speculation/measured.py check --rounds 3 --batches 1 8
python experiments/07_speculation/measured.py heads --trunk RUN     # HEAD_LOSSES.md's table
python experiments/07_speculation/measured.py union RUN [RUN …]     # prints a table

`check` holds the cost model against this CPU: the cost of a step over 1, 2 and 4 drafts, in plain
steps. Times are the least of the rounds, in which all lengths take turns. Weights are random: they
decide no time, except by the experts that tokens reach.

`heads` trains a DeepSeek module by each loss and seed, in runs/lab/head-losses, on the frozen trunk
of a finished `dsv3 train lab`. Then it continues held-out prompts greedily and at temperature 1,
with one draft a step.

`union` counts the distinct experts that neighbouring tokens of held-out text reach.

Cells that check.json or head_losses.json has are skipped, so the same command resumes.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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
from experiments.lab import markdown_table, mean_spread
from experiments.lab.prompts import held_out_prompts
from experiments.lab.results import replace_block
from experiments.random_data import filled

HERE = Path(__file__).parent

# Of `check`
MINI = preset("mini")
DENSE = dict(dim=1024, dense_dim=4096, num_layers=8, num_dense_layers=8, num_heads=16)
MODELS = {"dense": replace(MINI, **DENSE), "mini": MINI}
LENGTHS, CONTEXT = (0, 1, 2, 4), 256

# Of `heads`
LOSSES = {
    "ce": "cross-entropy on the text",
    "kl": "KL to the trunk",
    "tv": "total variation to the trunk",
}
PROMPTS, NEW = 32, 96

# Of `union`
TOKENS, ROWS, DRAWS = (2, 3, 5, 9), 16, 300


def read(name):
    """Return the stored results."""
    path = HERE / name
    return json.loads(path.read_text()) if path.exists() else {"cells": {}}


def keep(name, results, key, cell):
    """Store a result."""
    results["cells"][key] = cell
    write_atomic(HERE / name, json.dumps(results, indent=1) + "\n")
    print(key, cell, file=sys.stderr, flush=True)


# The cost model against this CPU


def check(args):
    results = {"cells": {}} if args.fresh else read("check.json")
    for name in MODELS:
        for batch in args.batches:
            if (key := f"{name}x{batch}") not in results["cells"]:
                cell = measure_steps(name, batch, args.rounds)
                results["machine"] = (
                    f"{os.cpu_count()} × {platform.machine()}, Python {platform.python_version()}, "
                    f"JAX {jax.__version__}"
                )
                keep("check.json", results, key, cell)
    replace_block(HERE / "CHECK.md", check_table(results))


def measure_steps(name, batch, rounds):
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
    for turn in range(rounds + 1):
        for length in LENGTHS:
            tokens = jnp.asarray(rng.integers(cfg.vocab_size, size=(batch, length + 1)), jnp.int32)
            begin = time.perf_counter()
            jax.block_until_ready(step(state, weights, cache, tokens))
            if turn:  # the first turn compiles
                times[length].append(time.perf_counter() - begin)
    return {
        "seconds": {str(length): min(found) for length, found in times.items()},
        "bandwidth": copy_bandwidth(0.3),
        "peak": gemm_flops(seconds=0.3),
        "load": os.getloadavg()[0],
        "rounds": rounds,
    }


def check_table(results):
    cells = results["cells"]
    # The best that a cell measured, as other work only lowers them.
    bandwidth, peak = (max(c[figure] for c in cells.values()) for figure in ("bandwidth", "peak"))
    how = Setting(bandwidth, peak, CONTEXT, weight_bytes=4, cache_dtype="float32")
    rows, errors = [], {name: [] for name in MODELS}
    for key, cell in sorted(cells.items(), key=lambda item: order_of(item[0])):
        name, batch = order_of(key)
        for length in LENGTHS[1:]:
            predicted = step_cost(MODELS[name], how, batch, length)[0]
            measured = cell["seconds"][str(length)] / cell["seconds"]["0"]
            ratio = predicted / measured
            errors[name].append(abs(np.log(ratio)))
            numbers = [f"{predicted:.2f}", f"{measured:.2f}", f"{ratio:.2f}", f"{cell['load']:.1f}"]
            rows.append([name, str(batch), str(length), *numbers])
    header = ["model", "batch", "drafts", "predicted", "measured", "predicted / measured", "load"]
    text = ", ".join(f"{name} {np.exp(np.mean(e)) - 1:.0%}" for name, e in errors.items() if e)
    counts = {name: size(cfg).total / 1e6 for name, cfg in MODELS.items()}
    sizes = ", ".join(f"{name} {count:.0f}M parameters" for name, count in counts.items())
    notes = (
        f"Mean error of the ratio: {text}. {sizes}; float32, {CONTEXT} cached tokens. "
        f"Machine: {results['machine']}. "
        f"It copies {bandwidth / 1e9:.0f} GB/s and multiplies {peak / 1e9:.0f} GFLOP/s. "
        "The load is the number of processes that want its cores."
    )
    return f"{markdown_table(header, rows)}\n\n{notes}"


def order_of(key):
    name, batch = key.split("x")
    return name, int(batch)


# Heads on one frozen trunk, trained by three losses


def heads(args):
    results, trunk = read("head_losses.json"), read_run(args.trunk)
    tokens = trunk.steps * trunk.data.batch_size * trunk.data.seq_len
    results["trunk"] = f"recipe lab, {trunk.steps} steps, {tokens / 1e6:.2f}M tokens"
    results["steps"] = args.steps
    for seed in args.seeds:
        for loss in LOSSES:
            if (key := f"{loss}-{seed}") not in results["cells"]:
                cell = measure_head(args.trunk, loss, seed, args.steps)
                keep("head_losses.json", results, key, cell)
    replace_block(HERE / "HEAD_LOSSES.md", heads_table(results))


def measure_head(trunk, loss, seed, steps):
    """Train a head, and return the share of its drafts that are accepted, by temperature."""
    start = open_start(trunk)
    run = replace(recipe("lab"), steps=steps, eval_every=steps, save_every=steps, seed=seed)
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
        found = [cell for key, cell in sorted(results["cells"].items()) if key[:3] == f"{loss}-"]
        if found:
            columns = [100 * np.array([cell[t] for cell in found]) for t in ("0.0", "1.0")]
            rows.append([name, *(mean_spread(c, 1) for c in columns), str(len(found))])
    header = ["the head's loss", "accepted, greedy, %", "accepted at temperature 1, %", "seeds"]
    notes = f"Trunk: {results['trunk']}. {results['steps']} steps for each head."
    return f"{markdown_table(header, rows)}\n\n{notes}"


# Experts of neighbouring tokens


def union(args):
    rows = []
    for folder in args.runs:
        name, counts = measure_union(folder)
        for tokens, (near, drawn, even) in counts.items():
            numbers = [f"{near:.2f}", f"{drawn:.2f}", f"{even:.2f}", f"{near / even - 1:+.0%}"]
            rows.append([name, str(tokens), *numbers])
    header = ["experts", "tokens", "neighbours", "drawn from the text", "even odds"]
    print(markdown_table([*header, "neighbours against even odds"], rows))


def measure_union(folder):
    """(The run's routing; distinct experts by count of tokens: neighbours, drawn, even.)"""
    model, run, _ = load_run(folder)
    cfg, rng = model.cfg, np.random.default_rng(0)
    rows = jnp.asarray(held_out_prompts(run.data, ROWS, run.data.seq_len - 8), jnp.int32)
    graphdef, state = nnx.split(model)
    chosen = jax.jit(lambda s, t: nnx.merge(graphdef, s)(t).routing.expert_ids)
    ids = np.asarray(chosen(state, rows))  # [L, B, T, K]
    layers = ids.reshape(len(ids), -1, ids.shape[-1])
    counts = {}
    for tokens in TOKENS:
        near = np.mean([neighbours(ids[:, row], tokens) for row in range(ids.shape[1])])
        drawn = [
            len(np.unique(layer[rng.choice(len(layer), tokens, False)]))
            for layer in layers
            for _ in range(DRAWS)
        ]
        counts[tokens] = near, np.mean(drawn), distinct_experts(cfg, tokens)
    balance = f"bias rate {cfg.balance.bias_rate:g}" if cfg.balance.bias_rate else "no bias"
    grouped = f"{cfg.groups_per_token} of {cfg.num_groups} groups"
    limit = grouped if cfg.num_groups > 1 else "no groups"
    return f"{cfg.experts_per_token} of {cfg.num_experts}, {balance}, {limit}", counts


def neighbours(expert_ids, tokens):
    """Return the mean number of distinct experts that so many neighbouring tokens reach in a layer.

    Args: expert_ids: int [L, T, K], of one text.

    Example:
        >>> ids = np.array([[[0, 1], [1, 2], [2, 3], [0, 1]]])
        >>> neighbours(ids, tokens=2)  # 3, 3 and 4 of them
        np.float64(3.3333333333333335)
    """
    starts = range(expert_ids.shape[1] - tokens + 1)
    return np.mean([len(np.unique(layer[i : i + tokens])) for layer in expert_ids for i in starts])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("check")
    command.set_defaults(run=check)
    command.add_argument("--rounds", type=int, default=10)
    command.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    command.add_argument("--fresh", action="store_true", help="measure all cells again")
    command = commands.add_parser("heads")
    command.set_defaults(run=heads)
    command.add_argument("--trunk", required=True)
    command.add_argument("--steps", type=int, default=300)
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    command = commands.add_parser("union")
    command.set_defaults(run=union)
    command.add_argument("runs", nargs="+", metavar="RUN")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
