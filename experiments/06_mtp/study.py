"""Does predicting several tokens ahead lower the loss of the next token, how many drafts are
accepted, and how much should the heads' loss weigh?

Published: equal bits per byte (0.729, 0.729; 0.658, 0.657) and gains on tasks at scale; small
models can lose; λ 0.3, then 0.1 (V3), with no comparison.
"""

from dsv3_jax.config import replace
from dsv3_jax.model.counting import train_flops_per_token
from experiments.lab import Claim, Column, Number, Stake, Study, logit

# The first three have V3's weights: λ 0.3, then 0.1.
OFF, ONE, LONGER = "off", "DeepSeek, depth 1", "off, with the FLOPs of depth 1"
TWO, META = "DeepSeek, depth 2", "Meta, 2 heads"
WEIGHTS = (0.1, 0.3, 1.0)
TOO_LARGE = 10.0  # the check's: the module's loss then outweighs the next token's
LOSS = "val_loss"
DRAFTS = 10_000  # that are counted at each position, at least


def constantly(weight):
    return f"depth 1, λ {weight} throughout"


def variants(base):
    off = replace(base.model, mtp_depth=0)
    models = {
        OFF: off,
        ONE: replace(off, mtp_depth=1),
        TWO: replace(off, mtp_depth=2),
        META: replace(off, mtp_depth=2, mtp_kind="meta"),
    }
    runs = {name: replace(base, model=model) for name, model in models.items()}
    ratio = train_flops_per_token(models[ONE]) / train_flops_per_token(off)
    steps = round(ratio * base.steps)
    longer = replace(base, model=off, steps=steps, eval_every=max(steps, base.eval_every))
    weighed = {
        constantly(x): replace(
            runs[ONE], optim=replace(base.optim, mtp_weight=x, mtp_final_weight=x)
        )
        for x in (*WEIGHTS, TOO_LARGE)
    }
    return runs | {LONGER: longer} | weighed


def measure(trained):
    """Count the training FLOPs per token."""
    return {"train_flops": train_flops_per_token(trained.run.model)}


def accepted(position):
    """Return the accepted share of drafts at a position, in points."""
    return Number(f"mtp_acceptance/{position}", "points", 1, scale=100)


FIRST, SECOND = (logit(accepted(position), DRAFTS) for position in (0, 1))


STUDY = Study(
    variants=variants,
    seeds_of={OFF: 10, ONE: 10},
    measure=measure,
    columns=(
        Column("training MFLOPs per token", "train_flops", 2, scale=1e-6),
        Column("validation loss", "val_loss", 4, paired=True),
        Column("first draft accepted, %", "mtp_acceptance/0", 1, scale=100.0),
        Column("second draft accepted if the first was, %", "mtp_acceptance/1", 1, scale=100.0),
    ),
    claims=(
        # The papers expect no direction: equal at scale, worse in small models.
        Claim(
            "one module lowers the next token's loss",
            ONE, OFF, LOSS, "none", "loss", published=0.0,
        ),
        Claim("two modules lower the next token's loss", TWO, OFF, LOSS, "none", "loss"),
        Claim("Meta's heads lower the next token's loss", META, OFF, LOSS, "none", "loss"),
        Claim(
            "one module lowers it more than longer training with its FLOPs",
            ONE, LONGER, stake="loss",
        ),
        Claim(
            "a chain's second draft is accepted more often than a parallel head's",
            TWO, META, SECOND, "higher",
        ),
        Claim("λ of 1 gives a higher loss than V3's", constantly(1.0), ONE, LOSS, "higher", "loss"),
        Claim(
            "λ of 0.1 throughout gives a higher loss than V3's",
            constantly(0.1), ONE, LOSS, "higher", "loss",
        ),
        Claim("λ of 1 has more drafts accepted", constantly(1.0), ONE, FIRST, "higher", "module"),
        Claim(
            "λ of 0.1 throughout has fewer drafts accepted",
            constantly(0.1), ONE, FIRST, "lower", "module",
        ),
    ),
    stakes={
        "loss": Stake(f"a module whose loss weighs {TOO_LARGE:g}", constantly(TOO_LARGE), OFF),
        "module": Stake("no module, no draft", ONE, 0.0, accepted(0)),
    },
    facts={
        "0.3": "a weight, and published sizes",
        "90 %": "published",
        "0.040": "recipe 1, which results.json does not hold",
        "67 %": "the schedule",
    },
)  # fmt: skip
