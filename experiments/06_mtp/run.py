"""Multi-token prediction: what heads that look further ahead do to the next token's loss, and what they draft."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`


import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.config import replace
from dsv3_jax.model.counting import train_flops_per_token
from experiments.lab import Column, Study, drawing
from experiments.lab.results import write_figure


def variants(base):
    off = replace(base.model, mtp_depth=0)
    models = {
        "off": off,
        "DeepSeek, depth 1": replace(off, mtp_depth=1),
        "DeepSeek, depth 2": replace(off, mtp_depth=2),
        "Meta, 2 heads": replace(off, mtp_depth=2, mtp_kind="meta"),
    }
    return {name: replace(base, model=model) for name, model in models.items()}


def measure(trained):
    """FLOPs that a trained token takes."""
    return {"train_flops": train_flops_per_token(trained.run.model)}


def tokens_a_step(results, variant):
    """1 and the drafts that stand, a number a seed: `mtp_acceptance` is the share of those whose forerunners stood."""
    acceptance = results.values(variant, "mtp_acceptance")  # [seeds, depth]
    return 1 + np.cumprod(acceptance, axis=1).sum(axis=1)


def draw(results, path):
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawing.dots_by_variant(left, results, "val_loss", "Validation loss of the next token against off", "nats a token")
    for i, variant in enumerate(results.variants):
        acceptance = results.values(variant, "mtp_acceptance") * 100
        for position, found in enumerate(acceptance.T):
            at = position + 0.2 * (i - (len(results.variants) - 1) / 2)
            label = variant if position == 0 else None
            right.bar([at], [found.mean()], 0.18, color=f"C{i % 10}", alpha=0.6, label=label)
            right.plot(np.full(len(found), at), found, ".", color="0.2", markersize=5)
    drawing.panel(right, "Drafts that stand on held-out text", "", "%, where those before it stood")
    right.set_ylim(0, 100)
    right.set_xticks([0, 1], ["first draft", "second draft"])
    right.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def ours(results):
    first, *others = results.variants
    return "; ".join(f"{name}: {results.paired(name, first, 'val_loss').mean():+.3f} nats" for name in others)


STUDY = Study(
    script=__file__,
    question="Does predicting more tokens ahead lower the loss of the next one, and how many of the drafts stand?",
    published="the same bits a byte (0.729, 0.729; 0.658, 0.657), gains on tasks at scale; small models can lose",
    variants=variants,
    measure=measure,
    columns=(
        Column("training MFLOPs a token", "train_flops", 2, scale=1e-6),
        Column("validation loss", "val_loss", 4, paired=True),
        Column("bits a byte", "val_bits_per_byte", 4),
        Column("first draft stands, %", "mtp_acceptance/0", 1, scale=100.0),
        Column("second, after the first, %", "mtp_acceptance/1", 1, scale=100.0),
        Column("tokens a step", tokens_a_step, 2),
    ),
    draw=draw,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
