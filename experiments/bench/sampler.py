"""The batch sampler: 64 prompts of unequal lengths in refilled batches, against a row at a time.

python experiments/bench/sampler.py    # writes sampler_results.json, and prints a table

The model is the demo's with random weights, in float32. A text ends with one of 16 of its 1,024
tokens, so lengths are about geometric with a mean of 64, cut at 128. All sides give the same texts;
they take turns.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import dsv3_jax as ds
from dsv3_jax.cli.demo import VOCAB_SIZE

PROMPTS, NEW, STOPS = 64, 128, 16
ONE = "one row: a call for each prompt"
RESULTS = Path(__file__).with_name("sampler_results.json")


def measure(samples: int, rounds: int, batch_sizes: tuple[int, ...]) -> dict:
    """Tokens a second of each side, with prefill, and against one row: medians of rounds.

    A first round, which compiles, does not count.
    """
    cfg = ds.replace(ds.preset("tiny"), vocab_size=VOCAB_SIZE)
    model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(VOCAB_SIZE, size=n).tolist() for n in rng.integers(4, 65, PROMPTS)]
    stops = rng.choice(VOCAB_SIZE, STOPS, replace=False).tolist()

    def sample(prompts: list, size: int) -> list[list[int]]:
        how = dict(temperature=1.0, stop_tokens=stops, samples=samples, batch_size=size)
        return ds.generate(model, prompts, NEW, **how).tokens

    sides = {ONE: lambda: [text for prompt in prompts for text in sample([prompt], 1)]}
    sides |= {f"{size} rows": partial(sample, prompts, size) for size in batch_sizes}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    texts = None
    for turn in range(rounds + 1):
        for side, run in sides.items():
            start = time.perf_counter()
            found = run()
            spent = time.perf_counter() - start
            texts = texts or found
            assert found == texts, f"{side}: other texts"
            rates[side] += [sum(map(len, found)) / spent] if turn else []
    lengths, rows = list(map(len, texts or [])), {}
    for side, found in rates.items():
        ratio = statistics.median(many / one for many, one in zip(found, rates[ONE], strict=True))
        rows[side] = {
            "tokens_per_s": statistics.median(found),
            "least": min(found),
            "most": max(found),
            "x": ratio,
        }
    return {
        "texts": len(lengths),
        "tokens": sum(lengths),
        "median_length": statistics.median(lengths),
        "sides": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, nargs="+", default=(1, 4))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(8, 16, 32))
    args = parser.parse_args()
    found = {str(n): measure(n, args.rounds, tuple(args.batch_sizes)) for n in args.samples}
    RESULTS.write_text(
        json.dumps({"jax": jax.__version__, "rounds": args.rounds, "samples": found}, indent=1)
        + "\n"
    )
    print("| samples a prompt | side | tokens/s (least–most) | × one row |\n|---|---|---|---|")
    for n, cell in found.items():
        for side, row in cell["sides"].items():
            rate = f"{row['tokens_per_s']:,.0f} ({row['least']:,.0f}–{row['most']:,.0f})"
            print(f"| {n} | {side} | {rate} | {row['x']:.1f} |")


if __name__ == "__main__":
    main()
