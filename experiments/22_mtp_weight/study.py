"""The weight λ of the multi-token loss, annealed or constant: the next token's loss, and drafts."""

from matplotlib.figure import Figure

from dsv3_jax.config import replace
from experiments.lab import Column, Study, drawing, write_figure
from experiments.lab.claims import Claim, Stake, logit

ANNEALED, OFF = "λ 0.3, then 0.1", "no module"
CONSTANT = (0.1, 0.3, 1.0)


def constantly(weight):
    return f"λ {weight}"


def variants(base):
    one = replace(base, model=replace(base.model, mtp_depth=1))
    runs = {
        constantly(x): replace(one, optim=replace(base.optim, mtp_weight=x, mtp_final_weight=x))
        for x in CONSTANT
    }
    return {ANNEALED: one, OFF: replace(base, model=replace(base.model, mtp_depth=0))} | runs


DRAFTS = 10_000  # that are counted, at least


def accepted(numbers):
    """Return the share of drafts that are accepted, in %."""
    return 100 * numbers["mtp_acceptance"][0]


def draw(results, path):
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    title = drawing.answer(lambda: words(results), f"Loss against {ANNEALED}")
    drawing.plot_differences(left, results, "val_loss", title, "nats per token")
    names = [name for name in results.variants if name != OFF]
    drawing.plot_rows(
        right, results, names, accepted, [drawing.colour_of(results, name) for name in names]
    )
    shares = [results.values(name, accepted).mean() for name in names]
    title = f"{min(shares):.0f} to {max(shares):.0f} % of drafts are accepted" if shares else ""
    drawing.style_axes(
        right, title, "drafts accepted on held-out text, %\ndots: seeds, bars: 95 % interval", ""
    )
    right.set_yticks(range(len(names)), names)
    right.set_ylim(max(len(names), 1) - 0.5, -0.5)
    write_figure(figure, path)


def words(results):
    changes = (drawing.change(results, constantly(x), ANNEALED) for x in (0.1, 1.0))
    return "Against λ that falls, 0.1: {}; 1: {} nats".format(*changes)


def drafts(text, variant, against, expect="higher"):
    key = logit(accepted, DRAFTS)
    return Claim(text, variant, against, key, expect, unit="logits", digits=2, stake="module")


STUDY = Study(
    question=(
        "How much should the multi-token loss weigh, and should its weight fall during training?"
    ),
    published="λ 0.3 for 10T tokens, then 0.1 for 4.8T (DeepSeek-V3); no comparison is published",
    variants=variants,
    columns=(
        Column("validation loss", "val_loss", 4, paired=True),
        Column("drafts accepted, %", "mtp_acceptance/0", 1, scale=100.0),
    ),
    draw=draw,
    claims=(
        Claim("λ that falls gives a lower loss than 0.3 throughout", ANNEALED, constantly(0.3)),
        Claim("λ of 1 gives a higher loss than V3's", constantly(1.0), ANNEALED, expect="higher"),
        Claim(
            "λ of 0.1 throughout gives a higher loss than V3's",
            constantly(0.1),
            ANNEALED,
            expect="higher",
        ),
        drafts(
            "λ of 0.3 throughout has more drafts accepted than λ that falls",
            constantly(0.3),
            ANNEALED,
        ),
        drafts("λ of 1 has more drafts accepted than V3's", constantly(1.0), ANNEALED),
        drafts(
            "λ of 0.1 throughout has fewer drafts accepted than V3's",
            constantly(0.1),
            ANNEALED,
            "lower",
        ),
    ),
    stakes={
        "module": Stake(
            "no module, no draft",
            lambda results: results.values(ANNEALED, accepted),
            "points",
            1,
        )
    },
    facts={
        "67 %": "the schedule",
        "0.011": "3.6388 - 3.6278",
        "1.8": "59.7 - 57.9",
        "6 points": "0.25 logits at 59 %: 0.25 × 0.59 × 0.41",
    },
)
