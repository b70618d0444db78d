"""Multi-token prediction: its effect on the next token's loss, and the acceptance of its drafts."""

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax.config import replace
from dsv3_jax.model.counting import train_flops_per_token
from experiments.lab import Column, Study, drawing, write_figure
from experiments.lab.claims import Claim, logit

OFF, ONE, LONGER = "off", "DeepSeek, depth 1", "off, with the FLOPs of depth 1"
TWO, META = "DeepSeek, depth 2", "Meta, 2 heads"
DRAFTS = 10_000  # that second drafts are counted over, at least


def variants(base):
    off = replace(base.model, mtp_depth=0)
    models = {
        OFF: off,
        ONE: replace(off, mtp_depth=1),
        TWO: replace(off, mtp_depth=2),
        META: replace(off, mtp_depth=2, mtp_kind="meta"),
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
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    title = drawing.answer(lambda: loss_words(results), "Validation loss of the next token")
    published = {
        claim.variant: claim.published for claim in STUDY.claims if claim.published is not None
    }
    drawing.plot_differences(left, results, "val_loss", title, "nats per token", published)
    for position in (0, 1):
        names = [
            name
            for name in results.variants
            if results.values(name, "mtp_acceptance").shape[1] > position
        ]
        halves = drawing.half_intervals(results, names, accepted(position)) if names else []
        for name, half in zip(names, halves, strict=True):
            colour = drawing.colour_of(results, name)
            shares = results.values(name, accepted(position))
            x = position + 0.2 * (results.variants.index(name) - (len(results.variants) - 1) / 2)
            label = name if position == 0 else None
            right.bar([x], [shares.mean()], 0.18, color=colour, alpha=0.6, label=label)
            right.plot(np.full(len(shares), x), shares, ".", color="0.2", markersize=5)
            right.errorbar([x], [shares.mean()], yerr=[half], color="0.2", linewidth=1.2, capsize=4)
    title = drawing.answer(lambda: draft_words(results), "Accepted drafts on held-out text")
    drawing.style_axes(
        right, title, "dots: seeds, bars: 95 % interval", "%, if the drafts before were accepted"
    )
    right.set_ylim(0, 100)
    right.set_xticks([0, 1], ["first draft", "second draft"])
    if right.containers:
        right.legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def accepted(position):
    """Return a function of a run's numbers: the accepted share of drafts at a position, %."""
    return lambda numbers: 100 * numbers["mtp_acceptance"][position]


def loss_words(results):
    changes = (drawing.change(results, name, OFF) for name in (ONE, LONGER))
    return "One module: {} nats;\nmore steps with its FLOPs: {}".format(*changes)


def draft_words(results):
    shares = [results.values(name, accepted(1)).mean() for name in (TWO, META)]
    words = "Second drafts accepted: {:.0f} % of a chain's,\n{:.0f} % of parallel heads'"
    return words.format(*shares)


STUDY = Study(
    question=(
        "Does predicting several tokens ahead lower the loss of the next token, "
        "and how many drafts are accepted?"
    ),
    published=(
        "equal bits per byte (0.729, 0.729; 0.658, 0.657) and gains on tasks at scale; "
        "small models can lose"
    ),
    variants=variants,
    seeds_of={OFF: 10, ONE: 10},
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
        # The papers expect no direction: equal at scale, worse in small models.
        Claim("one module lowers the next token's loss", ONE, OFF, expect="none", published=0.0),
        Claim("two modules lower the next token's loss", TWO, OFF, expect="none"),
        Claim("Meta's heads lower the next token's loss", META, OFF, expect="none"),
        Claim("one module lowers it more than longer training with its FLOPs", ONE, LONGER),
        Claim(
            "a chain's second draft is accepted more often than a parallel head's",
            TWO,
            META,
            logit(accepted(1), DRAFTS),
            "higher",
            unit="logits",
            digits=2,
        ),
    ),
    facts={
        "0.3": "a weight, and published sizes",
        "90 %": "published",
        "0.040": "recipe 1, which results.json does not hold",
    },
)
