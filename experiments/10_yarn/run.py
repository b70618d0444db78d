"""A four times longer context by YaRN: loss by position and retrieval by distance. L is the base's sequence length."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from functools import partial

import jax
import numpy as np
import planted
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Yarn, replace
from dsv3_jax.data.batches import val_batches
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.cross_entropy import token_scores
from experiments.lab import RUNS_FOLDER, FollowUp, Study, drawing, markdown_table, mean_spread, write_figure

FACTOR = 4
BINS = 8  # equal parts of the positions up to 4L
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
        base.model, vocab_size=260, rope_head_dim=16, mtp_depth=0, max_positions=FACTOR * length, yarn=Yarn()
    )
    data = replace(base.data, paths=(corpus_of(base),), tokenizer="bytes")
    short = replace(base, model=model, data=data, steps=2 * base.steps)
    longer = replace(data, seq_len=FACTOR * length, batch_size=max(data.batch_size // FACTOR, 1))
    lr = base.optim.learning_rate / 3
    further = replace(
        short, data=longer, steps=max(base.steps // 5, 2), optim=replace(base.optim, learning_rate=lr, warmup_steps=10)
    )
    extended = replace(model, yarn=yarn_of(length))
    return {
        "L": short,
        "L, then 4L": FollowUp(("L",), lambda folder: replace(further, start=folder)),
        "L, then 4L with YaRN": FollowUp(("L",), lambda folder: replace(further, model=extended, start=folder)),
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
    cfg = replace(trained.run.data, seq_len=most, batch_size=16, seed=0)
    rows = [b["tokens"][(b["segment_ids"] == 1).all(1)] for b in val_batches(trained.corpus, tokenizer, cfg, 8)]
    tokens = np.concatenate(rows)  # rows that one document fills
    nll, _ = predict(model, tokens)
    is_text = ~np.isin(tokens[:, 1:], tokenizer.encode_array(planted.PLANTED))
    bins = [(nll[:, part] * is_text[:, part]).sum() / is_text[:, part].sum() for part in position_bins(most)]
    home = [d for d in DISTANCES if d < 1]
    return {
        "loss": [float(x) for x in bins],
        "retrieved": retrieved(trained, model, most, DISTANCES),
        "home": retrieved(trained, model, most // FACTOR, home),
    }


def position_bins(most):
    """Return slices of the predicting positions 0 … 4L − 2."""
    edges = np.linspace(0, most, BINS + 1).astype(int)
    return [slice(a, min(b, most - 1)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def retrieved(trained, model, row, distances):
    """Return the share of correct values in rows of `row` tokens, one number per distance.

    All models get the same questions.
    """
    texts = [planted.without_keys(d.text) for d in trained.corpus.val]
    texts = [text for text in texts if len(text) >= row]
    if not texts:
        raise ValueError(f"row={row} is longer than every held-out document; use a smaller data.seq_len")
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
    """Return the nats of each next token and the most likely one, both [rows, T − 1]; each row is one document."""
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
        losses = split(results.values(variant, f"{how}/loss"), BINS // FACTOR)
        shares = split(results.values(variant, f"{how}/retrieved"), sum(d < 1 for d in DISTANCES))
        home = results.values(variant, f"{how}/home").mean(1)
        cells = [mean_spread(x, 3) for x in losses] + [mean_spread(100 * x, 1) + " %" for x in (home, *shares)]
        rows.append([line, *cells])
    return markdown_table(header, rows) + f"\n\nLoss in nats per byte of text. Chance retrieves {planted.CHANCE:.1%}."


def split(values, inside):
    """Return the means over the first `inside` positions or distances and over the others, [seeds, n] → two [seeds]."""
    return values[:, :inside].mean(1), values[:, inside:].mean(1)


def draw(results, path):
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    length = results.records(results.variants[0])[0]["numbers"]["length"]
    middles = (np.arange(BINS) + 0.5) * FACTOR * length / BINS
    for i, (line, variant, how) in enumerate(shown(results)):
        curve(left, middles, results.values(variant, f"{how}/loss"), line, i)
        curve(right, np.array(DISTANCES) * length, 100 * results.values(variant, f"{how}/retrieved"), line, i)
    drawing.style_axes(left, "Loss of the text by position", "position", "nats per byte")
    drawing.style_axes(right, f"Keys retrieved in rows of {FACTOR * length}", "distance to the key", "%")
    right.axhline(100 * planted.CHANCE, color="0.5", linewidth=0.8, linestyle=":")
    right.text(FACTOR * length, 100 * planted.CHANCE, "chance", fontsize=8, color="0.4", ha="right", va="top")
    right.set_ylim(0, 103)
    for ax in (left, right):
        ax.axvline(length, color="0.5", linewidth=0.8)
        ax.annotate(" L", (length, 0.99), xycoords=("data", "axes fraction"), va="top", fontsize=9, color="0.4")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    write_figure(figure, path)


def curve(ax, x, values, line, i):
    """Plot the mean over seeds, shaded from minimum to maximum."""
    ax.plot(x, values.mean(0), "o-", label=line, color=f"C{i}", markersize=4, linewidth=1.4)
    ax.fill_between(x, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, linewidth=0)


def ours(results):
    parts = []
    for line, variant, how in shown(results):
        loss = split(results.values(variant, f"{how}/loss"), BINS // FACTOR)[1].mean()
        share = split(results.values(variant, f"{how}/retrieved"), sum(d < 1 for d in DISTANCES))[1].mean()
        parts.append(f"{line}: loss beyond L {loss:.2f}, {share:.0%} of keys")
    return "; ".join(parts)


STUDY = Study(
    script=__file__,
    question="Does YaRN extend a model to four times its training length?",
    published="4K → 128K in two short phases, every needle found (V3 report, figure 8); 99 % of passkeys (YaRN)",
    variants=variants,
    prepare=prepare,
    measure=measure,
    table=table,
    draw=draw,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
