"""A reach four times as long by YaRN: loss by position, and keys retrieved by distance; L is the base's row."""

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
from experiments.lab import RUNS, After, Study, drawing
from experiments.lab.results import markdown, mean_spread, write_figure

FACTOR = 4
BINS = 8  # of positions, equal parts of 4L
DISTANCES = (1 / 8, 1 / 4, 1 / 2, 7 / 8, 5 / 4, 2, 3, 15 / 4)  # in L
ROWS = 64  # questions of each distance
WAYS = {  # a line of the table: (variant, how it is read)
    "trained at L, as it is": ("L", "own"),
    "trained at L, YaRN, no further step": ("L", "yarn"),
    "further steps at 4L, no YaRN": ("L, then 4L", "own"),
    "further steps at 4L with YaRN": ("L, then 4L with YaRN", "own"),
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
        "L, then 4L": After(("L",), lambda folder: replace(further, start=folder)),
        "L, then 4L with YaRN": After(("L",), lambda folder: replace(further, model=extended, start=folder)),
        "4L": replace(short, data=longer, steps=short.steps + further.steps),
    }


def corpus_of(base):
    """The text that is trained on, below the repository; keys recur within what is asked for, 4L."""
    return f"{RUNS}/keys-{FACTOR * base.data.seq_len}.jsonl"


def prepare(base, root):
    planted.write_corpus(root / corpus_of(base), FACTOR * base.data.seq_len)


def yarn_of(length):
    return Yarn(factor=float(FACTOR), original_max_positions=length)


def measure(trained):
    length = trained.run.model.max_positions // FACTOR
    found = {"length": length, "own": reading(trained, trained.model)}
    if trained.run.data.seq_len == length:
        cfg = replace(trained.run.model, yarn=yarn_of(length))
        model = Transformer(cfg, rngs=nnx.Rngs(0))
        nnx.update(model, nnx.state(trained.model))
        found["yarn"] = reading(trained, model)
    return found


def reading(trained, model):
    """Loss of the text by position, and the share of keys retrieved: by distance, and in rows of L alone ("home")."""
    most, words = trained.run.model.max_positions, trained.tokenizer
    cfg = replace(trained.run.data, seq_len=most, batch_size=16, seed=0)
    rows = [b["tokens"][(b["segment_ids"] == 1).all(1)] for b in val_batches(trained.corpus, words, cfg, 8)]
    tokens = np.concatenate(rows)  # of documents that fill the row
    nll, _ = scored(model, tokens)
    is_text = ~np.isin(tokens[:, 1:], words.encode_array(planted.PLANTED))
    bins = [(nll[:, part] * is_text[:, part]).sum() / is_text[:, part].sum() for part in position_bins(most)]
    home = [d for d in DISTANCES if d < 1]
    return {
        "loss": [float(x) for x in bins],
        "retrieved": retrieved(trained, model, most, DISTANCES),
        "home": retrieved(trained, model, most // FACTOR, home),
    }


def position_bins(most):
    """Slices of the predicting positions 0 … 4L − 2."""
    edges = np.linspace(0, most, BINS + 1).astype(int)
    return [slice(a, min(b, most - 1)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def retrieved(trained, model, row, distances):
    """The share of right values in rows of `row` tokens, a number a distance; the same questions for all models."""
    texts = [planted.without_keys(d.text) for d in trained.corpus.val]
    texts = [text for text in texts if len(text) >= row]
    if not texts:
        raise ValueError(f"no held-out document has {row} characters")
    rng, length = np.random.default_rng(1), trained.run.model.max_positions // FACTOR
    asked = [
        planted.question(texts[i % len(texts)], row, round(distance * length), rng, FACTOR * length)
        for distance in distances
        for i in range(ROWS)
    ]
    tokens = np.stack([trained.tokenizer.encode_array(text) for text in asked])
    _, best = scored(model, tokens)
    right = best[:, -1] == tokens[:, -1]
    return [float(x) for x in right.reshape(len(distances), ROWS).mean(1)]


def scored(model, tokens):
    """Nats of each next token and the likeliest one, two [rows, T − 1]; each row is one document."""
    graphdef, state = nnx.split(model)
    parts = [_scored(graphdef, state, tokens[i : i + 16]) for i in range(0, len(tokens), 16)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


@partial(jax.jit, static_argnames="graphdef")
def _scored(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    h, wanted = model.trace(tokens).h[:, :-1], tokens[:, 1:]
    found = token_scores(h.reshape(-1, h.shape[-1]), model.head_matrix(), wanted.reshape(-1))
    return tuple(x.reshape(wanted.shape) for x in found)


# The table and the picture


def shown(results):
    """(line, variant, how it is read) of what there is."""
    return [(line, *way) for line, way in WAYS.items() if way[0] in results.variants]


def table(results):
    header = ["", "loss within L", "loss beyond", "retrieved in rows of L", "in rows of 4L, within L", "beyond L"]
    rows = []
    for line, variant, how in shown(results):
        losses = split(results.values(variant, f"{how}/loss"), BINS // FACTOR)
        found = split(results.values(variant, f"{how}/retrieved"), sum(d < 1 for d in DISTANCES))
        home = results.values(variant, f"{how}/home").mean(1)
        cells = [mean_spread(x, 3) for x in losses] + [mean_spread(100 * x, 1) + " %" for x in (home, *found)]
        rows.append([line, *cells])
    return markdown(header, rows) + f"\n\nLoss in nats a byte of text; chance retrieves {planted.CHANCE:.1%}."


def split(values, inside):
    """Means over positions or distances, [seeds, n] → two [seeds]: of the first `inside`, and of the others."""
    return values[:, :inside].mean(1), values[:, inside:].mean(1)


def draw(results, path):
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    length = results.records("L")[0]["numbers"]["length"]
    middles = (np.arange(BINS) + 0.5) * FACTOR * length / BINS
    for i, (line, variant, how) in enumerate(shown(results)):
        curve(left, middles, results.values(variant, f"{how}/loss"), line, i)
        curve(right, np.array(DISTANCES) * length, 100 * results.values(variant, f"{how}/retrieved"), line, i)
    drawing.panel(left, "Loss of the text by position", "position", "nats a byte")
    drawing.panel(right, f"Keys retrieved in rows of {FACTOR * length}", "distance to the key", "%")
    right.axhline(100 * planted.CHANCE, color="0.5", linewidth=0.8, linestyle=":")
    right.text(FACTOR * length, 100 * planted.CHANCE, "chance", fontsize=8, color="0.4", ha="right", va="top")
    right.set_ylim(0, 103)
    for ax in (left, right):
        ax.axvline(length, color="0.5", linewidth=0.8)
        ax.annotate(" L", (length, 0.99), xycoords=("data", "axes fraction"), va="top", fontsize=9, color="0.4")
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    write_figure(figure, path)


def curve(ax, x, values, line, i):
    """Mean over seeds, and a shade from the least to the most."""
    ax.plot(x, values.mean(0), "o-", label=line, color=f"C{i}", markersize=4, linewidth=1.4)
    ax.fill_between(x, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, linewidth=0)


def ours(results):
    parts = []
    for line, variant, how in shown(results):
        loss = split(results.values(variant, f"{how}/loss"), BINS // FACTOR)[1].mean()
        found = split(results.values(variant, f"{how}/retrieved"), sum(d < 1 for d in DISTANCES))[1].mean()
        parts.append(f"{line}: loss beyond L {loss:.2f}, {found:.0%} of keys")
    return "; ".join(parts)


STUDY = Study(
    script=__file__,
    question="Does YaRN carry a model to four times the length that it was trained at?",
    published="4K → 128K by two short phases, every needle found (V3 report, figure 8); passkeys 99 % (YaRN)",
    variants=variants,
    prepare=prepare,
    measure=measure,
    table=table,
    draw=draw,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
