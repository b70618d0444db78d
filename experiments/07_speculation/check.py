"""The cost model against this CPU: the cost of a step over drafts, predicted and measured.

python experiments/07_speculation/check.py    # minutes; writes check.json and CHECK.md's table
python experiments/07_speculation/check.py --rounds 3 --batches 1 8

The drafts are 1, 2 and 4, and costs are in plain steps. Cells that check.json has are skipped, so
the same command resumes a stopped check. Times are the least of the rounds, in which all lengths
take turns. Weights are random: they decide no time, except by the experts that tokens reach.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import jax
import jax.numpy as jnp
import numpy as np
from copying import copy_bandwidth
from decode_worker import random_model
from flax import nnx
from model_of_time import Setting, step_cost

from dsv3_jax.config import replace
from dsv3_jax.host.files import write_atomic
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import size
from dsv3_jax.model.decode import make_cache, prepare_decode, run_layers
from dsv3_jax.presets import preset
from dsv3_jax.report.speed import gemm_flops
from experiments.lab import markdown_table
from experiments.lab.results import replace_block

HERE = Path(__file__).parent
MINI = preset("mini")
MODELS = {
    "dense": replace(
        MINI, dim=1024, dense_dim=4096, num_layers=8, num_dense_layers=8, num_heads=16
    ),
    "mini": MINI,
}
LENGTHS, CONTEXT = (0, 1, 2, 4), 256


def measure(name, batch, rounds):
    """Return the seconds of a step by its drafts, and the machine's figures and load then."""
    cfg = MODELS[name]
    model = random_model(cfg, seed=0)
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


def machine_figures(cells):
    """Return bytes/s and FLOP/s: the best that a cell measured, as other work only lowers them."""
    return tuple(max(cell[figure] for cell in cells.values()) for figure in ("bandwidth", "peak"))


def rows(cells, bandwidth, peak):
    how = Setting(bandwidth, peak, CONTEXT, weight_bytes=4, cache_dtype="float32")
    for key, cell in cells.items():
        name, batch = key.split("x")
        for length in LENGTHS[1:]:
            predicted = step_cost(MODELS[name], how, int(batch), length)[0]
            measured = cell["seconds"][str(length)] / cell["seconds"]["0"]
            yield name, int(batch), length, predicted, measured, cell["load"]


def table(results):
    header = ["model", "batch", "drafts", "predicted", "measured", "predicted / measured", "load"]
    bandwidth, peak = machine_figures(results["cells"])
    found = sorted(rows(results["cells"], bandwidth, peak), key=lambda row: row[:3])
    lines = [
        [name, str(batch), str(length), f"{p:.2f}", f"{m:.2f}", f"{p / m:.2f}", f"{load:.1f}"]
        for name, batch, length, p, m, load in found
    ]
    errors = {
        name: [abs(np.log(p / m)) for n, _, _, p, m, _ in found if n == name] for name in MODELS
    }
    text = ", ".join(f"{name} {np.exp(np.mean(e)) - 1:.0%}" for name, e in errors.items() if e)
    sizes = ", ".join(
        f"{name} {size(cfg).total / 1e6:.0f}M parameters" for name, cfg in MODELS.items()
    )
    notes = (
        f"Mean error of the ratio: {text}. {sizes}; float32, {CONTEXT} cached tokens. "
        f"Machine: {results['machine']}. "
        f"It copies {bandwidth / 1e9:.0f} GB/s and multiplies {peak / 1e9:.0f} GFLOP/s. "
        "The load is the number of processes that want its cores."
    )
    return f"{markdown_table(header, lines)}\n\n{notes}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--fresh", action="store_true", help="measure all cells again")
    args = parser.parse_args()
    path = HERE / "check.json"
    results = json.loads(path.read_text()) if path.exists() and not args.fresh else {"cells": {}}
    for name in MODELS:
        for batch in args.batches:
            if f"{name}x{batch}" in results["cells"]:
                continue
            results["cells"][f"{name}x{batch}"] = measure(name, batch, args.rounds)
            results["machine"] = (
                f"{os.cpu_count()} × {platform.machine()}, Python {platform.python_version()}, "
                f"JAX {jax.__version__}"
            )
            write_atomic(path, (json.dumps(results, indent=1) + "\n").encode())
            print(name, batch, results["cells"][f"{name}x{batch}"], file=sys.stderr, flush=True)
    replace_block(HERE / "CHECK.md", table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
