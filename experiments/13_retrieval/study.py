"""YaRN: a model trained at L finds keys up to 16L away, and reads text of 4L.

L is the base's row length: that of the recipe "retrieval" for keys, of "lab" for text.
"""

import textwrap
from functools import partial

import numpy as np
import planted
from by_distance import CONTEXTS, DEPTHS, LENGTHS, ROWS, held_out_rows, losses, retrieved
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Yarn, replace
from dsv3_jax.model.transformer import Transformer
from experiments.lab import (
    RUNS_FOLDER,
    FollowUp,
    OnTask,
    Study,
    drawing,
    format_number,
    markdown_table,
    mean_spread,
    write_figure,
)
from experiments.lab.bases import base_run, short_run
from experiments.lab.claims import Claim, Stake, logit
from experiments.lab.tasks import Retrieval

FACTOR = {"keys": 16, "text": 4}
# More is held out than of other text, so that enough documents fill a row of 4L.
VAL_FRACTION = 0.15


def variants(base):
    keys = replace(base, model=replace(base.model, max_positions=16 * base.data.seq_len))
    text = text_base(base)
    text = replace(
        text,
        model=replace(
            text.model,
            vocab_size=260,
            rope_head_dim=16,
            mtp_depth=0,
            max_positions=4 * text.data.seq_len,
        ),
        data=replace(
            text.data,
            paths=(corpus_of(text),),
            tokenizer="bytes",
            val_fraction=VAL_FRACTION,
            max_documents=None,
        ),
        steps=2 * text.steps,
    )
    return of("keys", keys, 2) | of("text", text, 10)


def text_base(base):
    """Return the recipe of text, as short as the base is."""
    is_short = base.steps == short_run("retrieval").steps
    return short_run("lab") if is_short else base_run("lab", [], RUNS_FOLDER)


def of(kind, short, warmup):
    """Return the variants of one kind: trained at L, a tenth more steps on longer rows, or these.

    All steps have as many tokens.
    """
    factor, length, rate = FACTOR[kind], short.data.seq_len, short.optim.learning_rate / 3

    def on(run):
        return run if kind == "text" else OnTask(Retrieval(tokens=run.data.seq_len), run)

    short = replace(short, model=replace(short.model, yarn=Yarn()))
    rows = replace(
        short.data, seq_len=factor * length, batch_size=max(short.data.batch_size // factor, 1)
    )
    optim = replace(
        short.optim,
        learning_rate=rate,
        final_learning_rate=min(rate, short.optim.final_learning_rate),
        warmup_steps=warmup,
    )
    more = replace(short, data=rows, steps=max(short.steps // 10, 2), optim=optim)
    extended = replace(more, model=replace(short.model, yarn=yarn_of(length, factor)))
    first = f"{kind}: L"
    return {
        first: on(short),
        f"{first}, then {factor}L": FollowUp((first,), lambda f: on(replace(more, start=f))),
        f"{first}, then {factor}L with YaRN": FollowUp(
            (first,), lambda f: on(replace(extended, start=f))
        ),
        f"{kind}: {factor}L": on(replace(short, data=rows, steps=short.steps + more.steps)),
    }


def corpus_of(text):
    """Return the path of the training text, relative to the repository."""
    return f"{RUNS_FOLDER}/keys-{4 * text.data.seq_len}.jsonl"


def prepare(base, root):
    text = text_base(base)
    planted.write_corpus(root / corpus_of(text), 4 * text.data.seq_len)


def yarn_of(length, factor):
    return Yarn(factor=float(factor), original_max_positions=length)


# What is measured


def measure(trained):
    """Measure a model as it is, and one that was trained at L also with YaRN alone.

    `found` is the retrieved share [lengths][depths]; `loss` is that of the text by context.
    """
    kind = "text" if trained.task is None else "keys"
    length = trained.run.model.max_positions // FACTOR[kind]
    models = {"own": trained.model}
    if trained.run.data.seq_len == length:
        cfg = replace(trained.run.model, yarn=yarn_of(length, FACTOR[kind]))
        models["yarn"] = Transformer(cfg, trained.run.execution, rngs=nnx.Rngs(0))
        nnx.update(models["yarn"], nnx.state(trained.model))
    if kind == "keys":
        read = partial(retrieved, trained.task, length)
        return {"length": length, "found": {how: read(model) for how, model in models.items()}}
    rows = held_out_rows(trained.corpus.val, trained.tokenizer, FACTOR[kind] * length)
    scored = ~np.isin(rows[:, -length // 2 :], trained.tokenizer.encode_array(planted.PLANTED))
    return {
        "length": length,
        "documents": len(rows),
        "loss": {how: losses(model, rows, scored, length) for how, model in models.items()},
    }


# Numbers of a run


def beyond(how):
    """Return a function of a run's numbers: the % of keys farther away than L that are found."""

    def mean(numbers):
        far = [
            share
            for c, row in zip(LENGTHS, numbers["found"][how], strict=True)
            for d, share in zip(DEPTHS, row, strict=True)
            if c * d > 1
        ]
        return 100 * float(np.mean(far))

    return mean


def within(how):
    """Return a function of a run's numbers: the retrieved share, in %, in rows of L."""
    return lambda numbers: 100 * float(np.mean(numbers["found"][how][0]))


def far_logit(how):
    return logit(beyond(how), ROWS * sum(c * d > 1 for c in LENGTHS for d in DEPTHS))


def gain(key):
    """Return a function: how much more YaRN alone has of a number than the unchanged model."""
    return lambda numbers: key("yarn")(numbers) - key("own")(numbers)


def loss_within(how):
    """Return a function of a run's numbers: the mean loss of contexts of at most L."""
    return lambda numbers: float(np.mean(numbers["loss"][how][: sum(c <= 1 for c in CONTEXTS)]))


def loss_beyond(how):
    """Return a function of a run's numbers: the mean loss of contexts of more than L."""
    return lambda numbers: float(np.mean(numbers["loss"][how][sum(c <= 1 for c in CONTEXTS) :]))


def loss_of_extended(numbers):
    """Return the loss beyond L of a model that trained there.

    Raises: KeyError for one that did not: its seeds differ ten times as much, and so its noise.
    """
    if "yarn" in numbers["loss"]:
        raise KeyError("own")
    return loss_beyond("own")(numbers)


# The table and the picture

LINES = {  # line: (how a variant's name goes on after its kind, how it is evaluated)
    "trained at L, unchanged": ("L", "own"),
    "trained at L, YaRN, no more steps": ("L", "yarn"),
    "more steps on long rows, no YaRN": ("L, then {}L", "own"),
    "more steps on long rows with YaRN": ("L, then {}L with YaRN", "own"),
    "trained on long rows from the start": ("{}L", "own"),
}


def shown(results, kind):
    """Return (line, variant, how it is evaluated) for the variants with results."""
    names = ((line, f"{kind}: {n.format(FACTOR[kind])}", how) for line, (n, how) in LINES.items())
    return [row for row in names if row[1] in results.variants]


def table(results):
    header = ["", "text: loss within L", "beyond L", "keys: found in rows of L, %"]
    header += [*(f"of {c}L" for c in LENGTHS[1:]), "farther than L, %"]
    rows = []
    for (line, keys, how), (_, text, _) in zip(
        shown(results, "keys"), shown(results, "text"), strict=True
    ):
        losses = [results.values(text, key(how)) for key in (loss_within, loss_beyond)]
        shares = results.values(keys, lambda n, how=how: [np.mean(x) for x in n["found"][how]])
        farther = results.values(keys, beyond(how))
        cells = [mean_spread(x, 3) for x in losses]
        rows.append([line, *cells, *(mean_spread(x, 1) for x in (*(100 * shares.T), farther))])
    documents = results.values("text: L", "documents").min()
    return (
        f"{markdown_table(header, rows)}\n\nLoss in nats per byte of text, of {documents:.0f} "
        f"documents. Long rows are 4L of text, and 16L of keys. "
        f"Chance finds {100 / Retrieval().values:.1f} %."
    )


def draw(results, path):
    """Draw a heat map of keys for each line, and the loss of the text by context."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    lines = shown(results, "keys")
    axes = np.atleast_1d(above.subplots(1, len(lines), sharey=True))
    for ax, (line, variant, how) in zip(axes, lines, strict=True):
        share = 100 * results.values(variant, f"found/{how}").mean(0)  # [lengths, depths]
        image = ax.imshow(share.T, vmin=0, vmax=100, cmap="viridis", aspect="auto", origin="lower")
        for i, j in np.ndindex(share.shape):
            colour = "white" if share[i, j] < 60 else "black"
            style = dict(ha="center", va="center", fontsize=8, color=colour)
            ax.text(i, j, f"{share[i, j]:.0f}", **style)
        ax.set_title(textwrap.fill(line, 22), fontsize=9)
        ax.set_xticks(range(len(LENGTHS)), [f"{c}L" if c > 1 else "L" for c in LENGTHS])
        ax.set_xlabel("tokens in the row")
    axes[0].set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS])
    axes[0].set_ylabel("distance to the key, of the row")
    above.colorbar(image, ax=axes, label="keys found, %")

    ax = below.add_subplot()
    for i, (line, variant, how) in enumerate(shown(results, "text")):
        values = results.values(variant, f"loss/{how}")
        style = dict(color=f"C{i}", markersize=4, linewidth=1.4)
        ax.plot(CONTEXTS, values.mean(0), "o-", label=line, **style)
        ax.fill_between(CONTEXTS, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, lw=0)
    drawing.style_axes(ax, "", "bytes of text that are read, in L; shaded: seeds", "nats per byte")
    ax.axvline(1, color="0.5", linewidth=0.8)
    ax.legend(frameon=False, fontsize=9, loc="upper left")
    title = drawing.answer(lambda: words(results), results.about["question"])
    figure.suptitle(title, fontsize=11)
    write_figure(figure, path)


def words(results):
    unchanged, yarn = (results.values("keys: L", beyond(how)).mean() for how in ("own", "yarn"))
    more = [
        np.mean(results.values("text: L", loss_beyond(how)))
        - np.mean(results.values("text: L", loss_within(how)))
        for how in ("own", "yarn")
    ]
    return (
        f"Of keys farther than L, YaRN alone finds {yarn:.0f} %, the unchanged model "
        f"{unchanged:.0f} %\nText beyond L: {format_number(more[1], 2, sign=True)} nats with YaRN "
        f"alone, {format_number(more[0], 2, sign=True)} unchanged"
    )


def on_keys(text, variant, against, key):
    return Claim(text, variant, against, key, "higher", unit="logits", digits=2, stake="keys")


STUDY = Study(
    question="Does YaRN extend a model to 4 and to 16 times its training length?",
    published=(
        "4K → 128K in two short phases, every needle found (V3 report, figure 8); "
        "99 % of passkeys (YaRN)"
    ),
    variants=variants,
    base="retrieval",
    prepare=prepare,
    measure=measure,
    table=table,
    draw=draw,
    claims=(
        on_keys(
            "YaRN without more steps finds more far keys than nothing",
            "keys: L",
            0.0,
            gain(far_logit),
        ),
        Claim(
            "YaRN without more steps keeps near keys, within 2 points",
            "keys: L",
            0.0,
            gain(within),
            "equal",
            margin=2.0,
            unit="points",
            digits=1,
            stake="keys",
            questions=ROWS * len(DEPTHS),
        ),
        on_keys(
            "after a tenth more steps, YaRN finds more far keys than none",
            "keys: L, then 16L with YaRN",
            "keys: L, then 16L",
            far_logit("own"),
        ),
        on_keys(
            "a tenth more steps with YaRN find more than 16L from the start",
            "keys: L, then 16L with YaRN",
            "keys: 16L",
            far_logit("own"),
        ),
        Claim(
            "text beyond L: YaRN without more steps has a lower loss than nothing",
            "text: L",
            0.0,
            gain(loss_beyond),
        ),
        Claim(
            "text beyond L: more steps with YaRN have a lower loss than without",
            "text: L, then 4L with YaRN",
            "text: L, then 4L",
            loss_of_extended,
        ),
        Claim(
            "text beyond L: more steps with YaRN have a lower loss than 4L from the start",
            "text: L, then 4L with YaRN",
            "text: 4L",
            loss_of_extended,
        ),
    ),
    stakes={
        "keys": Stake(
            "no reach: far keys, against near keys",
            lambda results: (
                results.values("keys: L", within("own")) - results.values("keys: L", beyond("own"))
            ),
            "points",
            1,
        )
    },
    facts={
        "43 points": "100.0 - 56.9",
        "13 points": "99.9 - 86.7",
        "768, 0.4 %": "64 questions of 4 distances for each of three seeds; 3 / 768 of them",
        "176 steps": "a setting: 160 and a tenth more",
        "1.15": "2.629 - 1.480",
        "0.16": "1.641 - 1.480",
        "3.38": lambda results: results.values("text: L", "loss/own")[:, -1].mean(),
        "1.57": lambda results: results.values("text: L, then 4L", "loss/own")[:, -1].mean(),
    },
)
