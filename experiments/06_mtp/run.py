"""Multi-token prediction: its effect on the next token's loss, and the acceptance of its drafts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.config import replace
from dsv3_jax.model.counting import train_flops_per_token
from experiments.lab import Column, Study, drawing, write_figure
from experiments.lab.claims import Claim

OFF, ONE, LONGER = "off", "DeepSeek, depth 1", "off, with the FLOPs of depth 1"


def variants(base):
    off = replace(base.model, mtp_depth=0)
    models = {
        OFF: off,
        ONE: replace(off, mtp_depth=1),
        "DeepSeek, depth 2": replace(off, mtp_depth=2),
        "Meta, 2 heads": replace(off, mtp_depth=2, mtp_kind="meta"),
    }
    ratio = train_flops_per_token(models[ONE]) / train_flops_per_token(off)
    steps = round(ratio * base.steps)
    longer = replace(base, model=off, steps=steps, eval_every=max(steps, base.eval_every))
    return {name: replace(base, model=model) for name, model in models.items()} | {LONGER: longer}


def measure(trained):
    """Count the training FLOPs per token."""
    return {"train_flops": train_flops_per_token(trained.run.model)}


def tokens_per_step(results, variant):
    """Return 1 + the mean number of accepted drafts, one number per seed.

    `mtp_acceptance` is the accepted share of drafts whose predecessors were accepted.
    """
    acceptance = results.values(variant, "mtp_acceptance")  # [seeds, depth]
    return 1 + np.cumprod(acceptance, axis=1).sum(axis=1)


def draw(results, path):
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawing.plot_differences(
        left, results, "val_loss", "Validation loss of the next token against off", "nats per token"
    )
    for i, variant in enumerate(results.variants):
        acceptance = results.values(variant, "mtp_acceptance") * 100
        for position, shares in enumerate(acceptance.T):
            x = position + 0.2 * (i - (len(results.variants) - 1) / 2)
            label = variant if position == 0 else None
            right.bar([x], [shares.mean()], 0.18, color=f"C{i % 10}", alpha=0.6, label=label)
            right.plot(np.full(len(shares), x), shares, ".", color="0.2", markersize=5)
    drawing.style_axes(right, "Accepted drafts on held-out text", "", "%, if the drafts before were accepted")
    right.set_ylim(0, 100)
    right.set_xticks([0, 1], ["first draft", "second draft"])
    right.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


STUDY = Study(
    script=__file__,
    question="Does predicting several tokens ahead lower the loss of the next token, and how many drafts are accepted?",
    published="equal bits per byte (0.729, 0.729; 0.658, 0.657) and gains on tasks at scale; small models can lose",
    variants=variants,
    measure=measure,
    columns=(
        Column("training MFLOPs per token", "train_flops", 2, scale=1e-6),
        Column("validation loss", "val_loss", 4, paired=True),
        Column("bits per byte", "val_bits_per_byte", 4),
        Column("first draft accepted, %", "mtp_acceptance/0", 1, scale=100.0),
        Column("second draft accepted if the first was, %", "mtp_acceptance/1", 1, scale=100.0),
        Column("tokens per step", tokens_per_step, 2),
    ),
    draw=draw,
    claims=(
        Claim("one module lowers the next token's loss", ONE, OFF, published=0.0),
        Claim("two modules lower the next token's loss", "DeepSeek, depth 2", OFF),
        Claim("Meta's heads lower the next token's loss", "Meta, 2 heads", OFF),
        Claim("one module lowers it more than longer training with its FLOPs", ONE, LONGER),
        Claim(
            "a chain's second draft is accepted more often than a parallel head's",
            "DeepSeek, depth 2",
            "Meta, 2 heads",
            lambda numbers: 100 * numbers["mtp_acceptance"][1],
            "higher",
            unit="points",
            digits=1,
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
