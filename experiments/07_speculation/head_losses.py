"""Heads on one frozen trunk, trained by three losses: how many of their drafts are accepted?

python experiments/07_speculation/head_losses.py --trunk RUN    # a finished `dsv3 train lab`

The losses are cross-entropy, KL and total variation. Trains a DeepSeek module for each loss and
seed in runs/lab/head-losses, then continues held-out prompts greedily and at temperature 1, with
one draft per step. Results that head_losses.json has are skipped.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import numpy as np

from dsv3_jax.config import replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.host.files import write_atomic
from dsv3_jax.presets import recipe
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.folder import read_run
from dsv3_jax.runs.loop import fit
from dsv3_jax.runs.start import on_trunk, open_start
from experiments.bench.prompts import held_out_prompts
from experiments.lab import markdown_table, mean_spread
from experiments.lab.results import replace_block

HERE = Path(__file__).parent
LOSSES = {
    "ce": "cross-entropy on the text",
    "kl": "KL to the trunk",
    "tv": "total variation to the trunk",
}
PROMPTS, NEW = 32, 96


def measure(trunk, loss, seed, steps):
    """Train a head, and return the share of its drafts that are accepted, by temperature."""
    start = open_start(trunk)
    base = on_trunk(
        replace(recipe("lab"), steps=steps, eval_every=steps, save_every=steps, seed=seed),
        start,
    )
    run = replace(base, head_loss=loss)
    out = Path("runs/lab/head-losses") / f"{loss}-{seed}-{steps}"
    fit(run, out, start=start)
    model, prompts = load_run(out).model, held_out_prompts(run.data, PROMPTS, 32)
    shares = {}
    for temperature in (0.0, 1.0):
        result = generate(
            model, prompts, NEW, temperature=temperature, draft="mtp", draft_length=1, seed=seed
        )
        shares[str(temperature)] = result.acceptance[0]
    return shares


def table(results):
    rows = []
    for loss, name in LOSSES.items():
        found = [
            cell for key, cell in sorted(results["cells"].items()) if key.startswith(f"{loss}-")
        ]
        if found:
            columns = [100 * np.array([cell[t] for cell in found]) for t in ("0.0", "1.0")]
            shares = [mean_spread(c, 1) if len(c) > 1 else f"{c[0]:.1f}" for c in columns]
            rows.append([name, *shares, str(len(found))])
    text = markdown_table(
        ["the head's loss", "accepted, greedy, %", "accepted at temperature 1, %", "seeds"], rows
    )
    return f"{text}\n\nTrunk: {results['trunk']}. {results['steps']} steps for each head."


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    path = HERE / "head_losses.json"
    results = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    trunk = read_run(args.trunk)
    tokens = trunk.steps * trunk.data.batch_size * trunk.data.seq_len
    results |= {
        "trunk": f"recipe lab, {trunk.steps} steps, {tokens / 1e6:.2f}M tokens",
        "steps": args.steps,
    }
    for seed in args.seeds:
        for loss in LOSSES:
            if f"{loss}-{seed}" not in results["cells"]:
                results["cells"][f"{loss}-{seed}"] = measure(args.trunk, loss, seed, args.steps)
                write_atomic(path, (json.dumps(results, indent=1) + "\n").encode())
                print(loss, seed, results["cells"][f"{loss}-{seed}"], file=sys.stderr, flush=True)
    replace_block(HERE / "HEAD_LOSSES.md", table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
