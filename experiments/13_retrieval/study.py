"""YaRN on one-hop retrieval: a model trained at L answers questions up to 16L away.

L is the base's row length.
"""

from functools import partial

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Yarn, replace
from dsv3_jax.model.transformer import Transformer
from experiments.lab import (
    FollowUp,
    OnTask,
    Study,
    drawing,
    markdown_table,
    mean_spread,
    write_figure,
)
from experiments.lab.claims import Claim, Stake, logit
from experiments.lab.tasks import Retrieval

FACTOR = 16
CONTEXTS = (1, 2, 4, 8, 16)  # lengths of rows, in units of L
DEPTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # distance of the key, in units of the row
ROWS = 64  # questions for each length and depth
BATCH_TOKENS = 16384


def variants(base):
    length, lr = base.data.seq_len, base.optim.learning_rate / 3
    model = replace(base.model, max_positions=FACTOR * length, yarn=Yarn())
    extended = replace(model, yarn=yarn_of(length))
    short = replace(base, model=model)
    # A tenth more steps, with as many tokens each.
    long_rows = replace(
        base.data, seq_len=FACTOR * length, batch_size=max(base.data.batch_size // FACTOR, 1)
    )
    optim = replace(
        base.optim, learning_rate=lr, final_learning_rate=min(lr, base.optim.final_learning_rate)
    )
    more = replace(
        short, data=long_rows, steps=max(base.steps // 10, 2), optim=replace(optim, warmup_steps=2)
    )
    long = Retrieval(tokens=FACTOR * length)
    return {
        "L": OnTask(Retrieval(tokens=length), short),
        "L, then 16L": FollowUp(("L",), lambda folder: OnTask(long, replace(more, start=folder))),
        "L, then 16L with YaRN": FollowUp(
            ("L",), lambda folder: OnTask(long, replace(more, model=extended, start=folder))
        ),
        "16L": OnTask(long, replace(short, data=long_rows, steps=short.steps + more.steps)),
    }


def yarn_of(length):
    return Yarn(factor=float(FACTOR), original_max_positions=length)


def measure(trained):
    """Measure the retrieved share [lengths][depths]: own, and with YaRN alone after L."""
    length = trained.run.model.max_positions // FACTOR
    numbers = {"length": length, "own": retrieved(trained.model, trained.task, length)}
    if trained.run.data.seq_len == length:
        cfg = replace(trained.run.model, yarn=yarn_of(length))
        model = Transformer(cfg, trained.run.execution, rngs=nnx.Rngs(0))
        nnx.update(model, nnx.state(trained.model))
        numbers["yarn"] = retrieved(model, trained.task, length)
    return numbers


def retrieved(model, task, length):
    """Return the share of right answers by length of the row and depth of the key, as lists."""
    return [
        [
            share(model, task.questions(c * length, max(round(d * c * length), 2), ROWS).tokens)
            for d in DEPTHS
        ]
        for c in CONTEXTS
    ]


def share(model, tokens):
    graphdef, state = nnx.split(model)
    size = max(BATCH_TOKENS // tokens.shape[1], 1)
    best = [last_choice(graphdef, state, tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return float((np.concatenate(best) == tokens[:, -1]).mean())


@partial(jax.jit, static_argnames="graphdef")
def last_choice(graphdef, state, tokens):
    """Return the likeliest last token of each row."""
    model = nnx.merge(graphdef, state)
    return (model.forward_hidden(tokens).h[:, -2] @ model.head_matrix()).argmax(-1)


# The table and the picture

LINES = {  # line: (variant, how it is evaluated)
    "trained at L, unchanged": ("L", "own"),
    "trained at L, YaRN, no more steps": ("L", "yarn"),
    "more steps at 16L, no YaRN": ("L, then 16L", "own"),
    "more steps at 16L with YaRN": ("L, then 16L with YaRN", "own"),
    "trained at 16L from the start": ("16L", "own"),
}


def shown(results):
    return [(line, *row) for line, row in LINES.items() if row[0] in results.variants]


def beyond(how):
    """Return a function of a run's numbers: the % of keys farther away than L that are found."""

    def mean(numbers):
        far = [
            share
            for c, row in zip(CONTEXTS, numbers[how], strict=True)
            for d, share in zip(DEPTHS, row, strict=True)
            if c * d > 1
        ]
        return 100 * float(np.mean(far))

    return mean


def within(how):
    """Return a function of a run's numbers: the retrieved share, in %, in rows of L."""
    return lambda numbers: 100 * float(np.mean(numbers[how][0]))


def table(results):
    header = [
        "",
        "found in rows of L, %",
        *(f"rows of {c}L" for c in CONTEXTS[1:]),
        "farther than L, %",
    ]
    rows = []
    for line, variant, how in shown(results):
        shares = results.values(variant, lambda n, how=how: [np.mean(row) for row in n[how]])
        by_length = 100 * shares
        farther = mean_spread(results.values(variant, beyond(how)), 1)
        rows.append([line, *(mean_spread(x, 1) for x in by_length.T), farther])
    return markdown_table(header, rows) + f"\n\nChance finds {100 / Retrieval().values:.1f} %."


def draw(results, path):
    """Draw a heat map for each line: length of the row by depth of the key, mean over seeds."""
    lines = shown(results)
    figure = Figure(figsize=(2.5 * len(lines) + 1.2, 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(lines), sharey=True))
    for ax, (line, variant, how) in zip(axes, lines, strict=True):
        share = 100 * results.values(variant, how).mean(0)  # [lengths, depths]
        image = ax.imshow(share.T, vmin=0, vmax=100, cmap="viridis", aspect="auto", origin="lower")
        for i, j in np.ndindex(share.shape):
            ax.text(
                i,
                j,
                f"{share[i, j]:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share[i, j] < 60 else "black",
            )
        ax.set_title(line.replace(", ", ",\n", 1), fontsize=9)
        ax.set_xticks(range(len(CONTEXTS)), [f"{c}L" if c > 1 else "L" for c in CONTEXTS])
        ax.set_xlabel("tokens in the row")
    axes[0].set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS])
    axes[0].set_ylabel("distance to the key, of the row")
    figure.colorbar(image, ax=axes, label="keys found, %")
    title = drawing.answer(lambda: words(results), "Keys found")
    figure.suptitle(f"{title} (mean over {len(results.seeds())} seeds)", fontsize=11)
    write_figure(figure, path)


def words(results):
    unchanged, yarn = (results.values("L", beyond(how)).mean() for how in ("own", "yarn"))
    return (
        f"Of keys farther than L, YaRN alone finds {yarn:.0f} %, "
        f"the unchanged model {unchanged:.0f} %"
    )


def claim(text, variant, against, key, **more):
    return Claim(
        text, variant, against, key, "higher", unit="logits", digits=2, stake="keys", **more
    )


def far_logit(how):
    return logit(beyond(how), ROWS * sum(c * d > 1 for c in CONTEXTS for d in DEPTHS))


STUDY = Study(
    question="Does YaRN let a model find keys at up to 16 times its training length?",
    published=(
        "4K → 128K in two short phases, every needle found (V3 report, figure 8); "
        "99 % of passkeys (YaRN)"
    ),
    variants=variants,
    base="retrieval",
    measure=measure,
    table=table,
    draw=draw,
    claims=(
        claim(
            "YaRN without more steps finds more far keys than nothing",
            "L",
            0.0,
            lambda n: far_logit("yarn")(n) - far_logit("own")(n),
        ),
        Claim(
            "YaRN without more steps keeps near keys, within 2 points",
            "L",
            0.0,
            lambda n: within("yarn")(n) - within("own")(n),
            "equal",
            margin=2.0,
            unit="points",
            digits=1,
            stake="keys",
            questions=ROWS * len(DEPTHS),
        ),
        claim(
            "after a tenth more steps, YaRN finds more far keys than none",
            "L, then 16L with YaRN",
            "L, then 16L",
            far_logit("own"),
        ),
        claim(
            "a tenth more steps with YaRN find more than 16L from the start",
            "L, then 16L with YaRN",
            "16L",
            far_logit("own"),
        ),
    ),
    stakes={
        "keys": Stake(
            "no reach: far keys, against near keys",
            lambda results: results.values("L", within("own")) - results.values("L", beyond("own")),
            "points",
            1,
        )
    },
    facts={
        "43 points": "100.0 - 56.9",
        "13 points": "99.9 - 86.7",
        "768, 0.4 %": "64 questions of 4 distances for each of three seeds; 3 / 768 of them",
        "176 steps": "a setting: 160 and a tenth more",
    },
)
