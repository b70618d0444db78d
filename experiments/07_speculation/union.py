"""How many distinct experts neighbouring tokens of a text reach, in runs of `dsv3 train`.

python experiments/07_speculation/union.py RUN [RUN …]    # prints a table; one forward pass a run
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model_of_time import measured_union

from dsv3_jax.model.counting import distinct_experts
from dsv3_jax.runs.checkpoint import load_run
from experiments.bench.prompts import held_out_prompts
from experiments.lab import markdown_table

TOKENS, ROWS, DRAWS = (2, 3, 5, 9), 16, 300


def measure(folder):
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
        near = np.mean([measured_union(ids[:, row], tokens) for row in range(ids.shape[1])])
        drawn = [
            len(np.unique(layer[rng.choice(len(layer), tokens, False)]))
            for layer in layers
            for _ in range(DRAWS)
        ]
        counts[tokens] = near, np.mean(drawn), distinct_experts(cfg, tokens)
    balance = f"bias rate {cfg.balance.bias_rate:g}" if cfg.balance.bias_rate else "no bias"
    limit = (
        f"{cfg.groups_per_token} of {cfg.num_groups} groups" if cfg.num_groups > 1 else "no groups"
    )
    return f"{cfg.experts_per_token} of {cfg.num_experts}, {balance}, {limit}", counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    rows = []
    for folder in parser.parse_args().runs:
        name, counts = measure(folder)
        rows += [
            [name, str(tokens), *(f"{x:.2f}" for x in found), f"{found[0] / found[2] - 1:+.0%}"]
            for tokens, found in counts.items()
        ]
    header = [
        "experts",
        "tokens",
        "neighbours",
        "drawn from the text",
        "even odds",
        "neighbours against even odds",
    ]
    print(markdown_table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
