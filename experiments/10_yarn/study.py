"""A four times longer context by YaRN: loss by position and retrieval by distance.

L is the base's sequence length.
"""

from functools import partial

import jax
import numpy as np
import planted
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Yarn, replace
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.cross_entropy import token_scores
from experiments.lab import (
    RUNS_FOLDER,
    FollowUp,
    Study,
    drawing,
    format_number,
    markdown_table,
    mean_spread,
    write_figure,
)
from experiments.lab.claims import Claim, Stake

FACTOR = 4
# Tokens of a row that are read, in units of L; its last L/2 are scored.
CONTEXTS = (3 / 4, 1, 3 / 2, 2, 3, 4)
CONTEXTS_OF_L = 2 * FACTOR  # the scored part is 1 / CONTEXTS_OF_L of a row of 4L
LEAST_DOCUMENTS = 100
VAL_FRACTION = 0.15
DISTANCES = (1 / 8, 1 / 4, 1 / 2, 7 / 8, 5 / 4, 2, 3, 15 / 4)  # in units of L
ROWS = 64  # questions per distance
TABLE_LINES = {  # line: (variant, how it is evaluated)
    "trained at L, unchanged": ("L", "own"),
    "trained at L, YaRN, no more steps": ("L", "yarn"),
    "more steps at 4L, no YaRN": ("L, then 4L", "own"),
    "more steps at 4L with YaRN": ("L, then 4L with YaRN", "own"),
    "trained at 4L from the start": ("4L", "own"),
}


def variants(base):
    length = base.data.seq_len
    model = replace(
        base.model,
        vocab_size=260,
        rope_head_dim=16,
        mtp_depth=0,
        max_positions=FACTOR * length,
        yarn=Yarn(),
    )
    # More is held out than of other text: LEAST_DOCUMENTS documents or more must fill a row of 4L.
    data = replace(
        base.data,
        paths=(corpus_of(base),),
        tokenizer="bytes",
        val_fraction=VAL_FRACTION,
        max_documents=None,
    )
    short = replace(base, model=model, data=data, steps=2 * base.steps)
    longer = replace(data, seq_len=FACTOR * length, batch_size=max(data.batch_size // FACTOR, 1))
    lr = base.optim.learning_rate / 3
    further = replace(
        short,
        data=longer,
        steps=max(base.steps // 5, 2),
        optim=replace(base.optim, learning_rate=lr, warmup_steps=10),
    )
    extended = replace(model, yarn=yarn_of(length))
    return {
        "L": short,
        "L, then 4L": FollowUp(("L",), lambda folder: replace(further, start=folder)),
        "L, then 4L with YaRN": FollowUp(
            ("L",), lambda folder: replace(further, model=extended, start=folder)
        ),
        "4L": replace(short, data=longer, steps=short.steps + further.steps),
    }


def corpus_of(base):
    """Return the path of the training text, relative to the repository; keys recur within 4L."""
    return f"{RUNS_FOLDER}/keys-{FACTOR * base.data.seq_len}.jsonl"


def prepare(base, root):
    planted.write_corpus(root / corpus_of(base), FACTOR * base.data.seq_len)


def yarn_of(length):
    return Yarn(factor=float(FACTOR), original_max_positions=length)


def measure(trained):
    length = trained.run.model.max_positions // FACTOR
    numbers = {"length": length, "own": scores(trained, trained.model)}
    if trained.run.data.seq_len == length:
        cfg = replace(trained.run.model, yarn=yarn_of(length))
        model = Transformer(cfg, trained.run.execution, rngs=nnx.Rngs(0))
        nnx.update(model, nnx.state(trained.model))
        numbers["yarn"] = scores(trained, model)
    return numbers


def scores(trained, model):
    """Measure the loss of the text by position, and the retrieved share of keys by distance.

    "home" is retrieval in rows of length L.
    """
    most, tokenizer = trained.run.model.max_positions, trained.tokenizer
    tokens = held_out_rows(trained.corpus.val, tokenizer, most)
    is_planted = np.isin(
        tokens[:, -most // CONTEXTS_OF_L :], tokenizer.encode_array(planted.PLANTED)
    )
    is_text = ~is_planted
    nll = []
    for context in CONTEXTS:
        # The same last L/2 tokens of each row are scored, with more and more before them.
        row = tokens[:, -round(context * most / FACTOR) :]
        nll.append(predict(model, row)[0][:, -is_text.shape[1] :])
    home = [d for d in DISTANCES if d < 1]
    return {
        "documents": len(tokens),
        "loss": [float((x * is_text).sum() / is_text.sum()) for x in nll],
        "retrieved": retrieved(trained, model, most, DISTANCES),
        "home": retrieved(trained, model, most // FACTOR, home),
    }


def held_out_rows(documents, tokenizer, length):
    """Cut one row from each held-out document of at least `length` tokens: its last ones.

    Raises: ValueError for fewer than LEAST_DOCUMENTS rows: a loss by position is that of the
        documents that have it.
    """
    texts = (tokenizer.encode_array(document.text) for document in documents)
    rows = [tokens[-length:] for tokens in texts if len(tokens) >= length]
    print(f"rows={len(rows)} of length={length}, one from each of as many held-out documents")
    if len(rows) < LEAST_DOCUMENTS:
        raise ValueError(
            f"rows={len(rows)} from held-out documents of at least {length} tokens are fewer than "
            f"{LEAST_DOCUMENTS}; use a smaller data.seq_len or a larger data.val_fraction"
        )
    return np.stack(rows)


def retrieved(trained, model, row, distances):
    """Return the share of correct values in rows of `row` tokens, one number per distance.

    All models get the same questions.
    """
    texts = [planted.without_keys(d.text) for d in trained.corpus.val]
    texts = [text for text in texts if len(text) >= row]
    if not texts:
        raise ValueError(
            f"row={row} is longer than every held-out document; use a smaller data.seq_len"
        )
    rng, length = np.random.default_rng(1), trained.run.model.max_positions // FACTOR
    questions = [
        planted.question(texts[i % len(texts)], row, round(distance * length), rng, FACTOR * length)
        for distance in distances
        for i in range(ROWS)
    ]
    tokens = np.stack([trained.tokenizer.encode_array(text) for text in questions])
    _, best = predict(model, tokens)
    correct = best[:, -1] == tokens[:, -1]
    return [float(x) for x in correct.reshape(len(distances), ROWS).mean(1)]


def predict(model, tokens):
    """Return the nats of each next token and the likeliest one, [rows, T − 1] each.

    Each row is one document.
    """
    graphdef, state = nnx.split(model)
    parts = [_predict(graphdef, state, tokens[i : i + 16]) for i in range(0, len(tokens), 16)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@partial(jax.jit, static_argnames="graphdef")
def _predict(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    h, targets = model.forward_hidden(tokens).h[:, :-1], tokens[:, 1:]
    outputs = token_scores(h.reshape(-1, h.shape[-1]), model.head_matrix(), targets.reshape(-1))
    return tuple(x.reshape(targets.shape) for x in outputs)


# The table and the picture


def shown(results):
    """Return (line, variant, how it is evaluated) for the variants with results."""
    return [(line, *row) for line, row in TABLE_LINES.items() if row[0] in results.variants]


def table(results):
    header = ["", "loss within L", "loss beyond L", "retrieved in rows of L"]
    header += ["retrieved in rows of 4L, within L", "retrieved in rows of 4L, beyond L"]
    rows = []
    for line, variant, how in shown(results):
        losses = [mean_spread(x, 3) for x in losses_of(results, variant, how)] or ["withdrawn"] * 2
        shares = split(results.values(variant, f"{how}/retrieved"), sum(d < 1 for d in DISTANCES))
        home = results.values(variant, f"{how}/home").mean(1)
        cells = losses + [mean_spread(100 * x, 1) + " %" for x in (home, *shares)]
        rows.append([line, *cells])
    counts = results.values(results.variants[0], lambda numbers: numbers["own"].get("documents", 3))
    note = (
        f"Loss in nats per byte of text, of {counts.min():.0f} documents. "
        f"Chance retrieves {planted.CHANCE:.1%}."
    )
    if counts.min() < LEAST_DOCUMENTS:
        note += " Losses of recipe 1 rest on three rows of text, and are withdrawn."
    return f"{markdown_table(header, rows)}\n\n{note}"


def losses_of(results, variant, how):
    """Return the loss in and beyond L, two [seeds]; nothing for results of recipe 1."""
    if "documents" not in results.records(variant)[0]["numbers"]["own"]:
        return ()
    return split(results.values(variant, f"{how}/loss"), sum(c <= 1 for c in CONTEXTS))


def split(values, inside):
    """Return the means of the first `inside` values and of the others: [seeds, n] → two [seeds]."""
    return values[:, :inside].mean(1), values[:, inside:].mean(1)


def draw(results, path):
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    length = results.records(results.variants[0])[0]["numbers"]["length"]
    contexts = np.array(CONTEXTS) * length
    for i, (line, variant, how) in enumerate(shown(results)):
        if losses_of(results, variant, how):
            curve(left, contexts, results.values(variant, f"{how}/loss"), line, i)
        curve(
            right,
            np.array(DISTANCES) * length,
            100 * results.values(variant, f"{how}/retrieved"),
            line,
            i,
        )
    title = drawing.answer(lambda: loss_words(results), "Loss beyond L")
    label = f"tokens read; the same {length // 2} bytes are scored; shaded: seeds"
    drawing.style_axes(left, title, label, "nats per byte")
    found = [
        100 * results.values(variant, f"{how}/retrieved").mean()
        for _, variant, how in shown(results)
    ]
    title = (
        f"Of keys, {min(found):.0f} to {max(found):.0f} % are found, "
        f"{100 * planted.CHANCE:.0f} % by chance"
    )
    label = f"distance to the key, in rows of {FACTOR * length}; shaded: seeds"
    drawing.style_axes(right, title, label, "keys found, %")
    if not left.lines:
        left.text(
            0.5,
            0.5,
            "withdrawn: recipe 1 rests on three rows",
            ha="center",
            transform=left.transAxes,
        )
    right.axhline(100 * planted.CHANCE, color="0.5", linewidth=0.8, linestyle=":")
    right.text(
        FACTOR * length,
        100 * planted.CHANCE,
        "chance",
        fontsize=8,
        color="0.4",
        ha="right",
        va="top",
    )
    right.set_ylim(0, max(30, right.get_ylim()[1]))
    for ax in (left, right):
        ax.axvline(length, color="0.5", linewidth=0.8)
        ax.annotate(
            " L",
            (length, 0.99),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=9,
            color="0.4",
        )
    figure.legend(
        *right.get_legend_handles_labels(),
        frameon=False,
        fontsize=9,
        ncols=3,
        loc="outside lower center",
    )
    write_figure(figure, path)


def loss_words(results):
    """Say what contexts beyond L cost against those up to L, unchanged and with YaRN."""
    costs = []
    for how in ("own", "yarn"):
        within, beyond = losses_of(results, "L", how) or [np.array(np.nan)] * 2
        costs.append(format_number(float((beyond - within).mean()), 2, sign=True))
    return f"Beyond L: {costs[0]} nats unchanged, {costs[1]} with YaRN alone"


def curve(ax, x, values, line, i):
    """Plot the mean over seeds, shaded from minimum to maximum."""
    ax.plot(x, values.mean(0), "o-", label=line, color=f"C{i}", markersize=4, linewidth=1.4)
    ax.fill_between(x, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, linewidth=0)


def loss_beyond(numbers, how):
    """Return the mean loss with contexts beyond L.

    Raises: KeyError for recipe 1, whose loss rests on three rows.
    """
    numbers[how]["documents"]
    return float(np.mean(numbers[how]["loss"][sum(c <= 1 for c in CONTEXTS) :]))


def loss_of_extended(numbers):
    """Return the loss beyond L of a model that trained there.

    Raises: KeyError for one that did not: its seeds differ ten times as much, and so its noise.
    """
    if "yarn" in numbers:
        raise KeyError("own")
    return loss_beyond(numbers, "own")


def yarn_gain(numbers):
    """Return the loss beyond L with YaRN minus that without, of a model that trained at L."""
    return loss_beyond(numbers, "yarn") - loss_beyond(numbers, "own")


def retrieved_beyond(numbers):
    return float(np.mean(numbers["own"]["retrieved"][sum(d < 1 for d in DISTANCES) :]))


STUDY = Study(
    question="Does YaRN extend a model to four times its training length?",
    published=(
        "4K → 128K in two short phases, every needle found (V3 report, figure 8); "
        "99 % of passkeys (YaRN)"
    ),
    variants=variants,
    prepare=prepare,
    measure=measure,
    table=table,
    draw=draw,
    claims=(
        Claim(
            "beyond L, YaRN without more steps is better than nothing", "L", 0.0, yarn_gain, "lower"
        ),
        Claim(
            "beyond L, more steps with YaRN are better than without",
            "L, then 4L with YaRN",
            "L, then 4L",
            loss_of_extended,
        ),
        Claim(
            "beyond L, more steps with YaRN are better than 4L from the start",
            "L, then 4L with YaRN",
            "4L",
            loss_of_extended,
        ),
        Claim(
            "more steps with YaRN find keys beyond L",
            "L, then 4L with YaRN",
            planted.CHANCE,
            retrieved_beyond,
            "higher",
            unit="of keys",
            stake="keys",
        ),
    ),
    stakes={
        "keys": Stake(
            "no key: chance, against keys within L",
            lambda results: (
                results.values("L", lambda n: float(np.mean(n["own"]["home"]))) - planted.CHANCE
            ),
            "of keys",
        )
    },
    facts={
        "0.91": "2.529 - 1.615",
        "0.15": "1.761 - 1.615",
        "3.14": lambda results: results.values("L", "own/loss")[:, -1].mean(),
        "1.73": lambda results: results.values("L, then 4L", "own/loss")[:, -1].mean(),
    },
)
