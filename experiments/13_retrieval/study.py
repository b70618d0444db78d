"""Does YaRN extend a model to 4 and to 16 times its training length?

Published: 4K → 128K in two short phases, every needle found (V3 report, figure 8); 99 % of passkeys
(YaRN).

L is the base's row length: that of the recipe "retrieval" for keys, of "lab" for text.
"""

import textwrap

import numpy as np
import planted
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Yarn, replace
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.cross_entropy import token_scores
from experiments.lab import Claim, Number, OnTask, Stake, Study, drawing, logit
from experiments.lab.bases import RUNS_FOLDER, text_beside
from experiments.lab.measuring import DEPTHS, QUESTIONS, compiled, keys_found
from experiments.lab.results import write_figure
from experiments.lab.tables import markdown_table, mean_spread
from experiments.lab.tasks import Retrieval

FACTOR = {"keys": 16, "text": 4}
AT_L, MORE, WITH_YARN, LONG = "L", "L, then {}L", "L, then {}L with YaRN", "{}L"
LINES = {  # line of table and picture: (how a model is trained, how it is evaluated)
    "trained at L, unchanged": (AT_L, "own"),
    "trained at L, YaRN, no more steps": (AT_L, "yarn"),
    "more steps on long rows, no YaRN": (MORE, "own"),
    "more steps on long rows with YaRN": (WITH_YARN, "own"),
    "trained on long rows from the start": (LONG, "own"),
}
LENGTHS = (1, 2, 4, 8, 16)  # of rows with keys, in L
# Tokens of text that are read, in L. The last L/2 of them are scored, BATCH rows at once.
CONTEXTS, BATCH = np.array([3 / 4, 1, 3 / 2, 2, 3, 4]), 16
WITHIN, BEYOND = CONTEXTS <= 1, CONTEXTS > 1
NEAR, FAR = 0, np.outer(LENGTHS, DEPTHS) > 1  # keys in rows of L; farther away, [lengths, depths]


def name_of(kind, way):
    return f"{kind}: {way.format(FACTOR[kind])}"


def variants(base):
    keys = replace(base, model=replace(base.model, max_positions=16 * base.data.seq_len))
    return of("keys", keys, 2) | of("text", text_run(base), 10)


def text_run(base):
    """Return the recipe of text in bytes, as short as the base is."""
    run = text_beside(base)
    reach = 4 * run.data.seq_len
    # More is held out than of other text, so that enough documents fill a row of 4L.
    data = replace(
        run.data,
        paths=(f"{RUNS_FOLDER}/keys-{reach}.jsonl",),
        tokenizer="bytes",
        val_fraction=0.15,
        max_documents=None,
    )
    model = replace(run.model, vocab_size=260, rope_head_dim=16, mtp_depth=0, max_positions=reach)
    return replace(run, model=model, data=data, steps=2 * run.steps)


def prepare(base, root):
    text = text_run(base)
    planted.write_corpus(root / text.data.paths[0], text.model.max_positions)


def of(kind, short, warmup):
    """Return the variants of one kind: trained at L, a tenth more steps on longer rows, or these.

    All steps have as many tokens.
    """
    factor, length, rate = FACTOR[kind], short.data.seq_len, short.optim.learning_rate / 3

    def on(run):
        return run if kind == "text" else OnTask(Retrieval(tokens=run.data.seq_len), run)

    def after(run):
        return on(replace(run, start=name_of(kind, AT_L)))

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
    extended = replace(more, model=replace(short.model, yarn=yarn_of(kind, length)))
    made = {
        AT_L: on(short),
        MORE: after(more),
        WITH_YARN: after(extended),
        LONG: on(replace(short, data=rows, steps=short.steps + more.steps)),
    }
    return {name_of(kind, way): run for way, run in made.items()}


def yarn_of(kind, length):
    return Yarn(factor=float(FACTOR[kind]), original_max_positions=length)


def measure(trained):
    """Measure a model as it is, and one that was trained at L also with YaRN alone.

    `found` is the retrieved share [lengths][depths]; `loss` is that of the text by context.
    """
    kind = "text" if trained.task is None else "keys"
    length = trained.run.model.max_positions // FACTOR[kind]
    models = {"own": trained.model}
    if trained.run.data.seq_len == length:
        cfg = replace(trained.run.model, yarn=yarn_of(kind, length))
        models["yarn"] = Transformer(cfg, trained.run.execution, rngs=nnx.Rngs(0))
        nnx.update(models["yarn"], nnx.state(trained.model))
    if kind == "keys":
        shares = {
            how: [keys_found(model, trained.task, c * length) for c in LENGTHS]
            for how, model in models.items()
        }
        return {"length": length, "found": shares}

    # The last bytes of each document that fills the longest row; planted ones are not scored.
    tokenizer, longest = trained.tokenizer, FACTOR[kind] * length
    texts = [tokenizer.encode_array(document.text) for document in trained.corpus.val]
    rows = np.stack([tokens[-longest:] for tokens in texts if len(tokens) >= longest])
    scored = ~np.isin(rows[:, -length // 2 :], tokenizer.encode_array(planted.PLANTED))
    nats = {how: losses(model, rows, scored, length) for how, model in models.items()}
    return {"length": length, "documents": len(rows), "loss": nats}


def losses(model, rows, scored, length):
    """Return the mean nats of the same last tokens, which are scored, with more and more before."""
    found = []
    for context in CONTEXTS:
        read = rows[:, -round(context * length) :]
        parts = [nats_of(model, read[i : i + BATCH]) for i in range(0, len(read), BATCH)]
        last = np.concatenate(parts)[:, -scored.shape[1] :]
        found.append(float((last * scored).sum() / scored.sum()))
    return found


@compiled
def nats_of(model, tokens):
    """Return the nats of each next token, [rows, T − 1]."""
    h, targets = model.forward_hidden(tokens).h[:, :-1], tokens[:, 1:]
    nats, _ = token_scores(h.reshape(-1, h.shape[-1]), model.head_matrix(), targets.reshape(-1))
    return nats.reshape(targets.shape)


def loss(where, how="own"):
    """Return a text's loss, mean over contexts; `how` the model is evaluated."""
    return Number(lambda numbers: np.mean(np.array(numbers["loss"][how])[where]), "nats", 3)


def found(where, how="own"):
    """Return the share of keys found, mean over lengths and depths."""
    return Number(
        lambda numbers: 100 * np.mean(np.array(numbers["found"][how])[where]), "points", 1
    )


def far_keys(how="own"):
    return logit(found(FAR, how), QUESTIONS * int(FAR.sum()))


def loss_of_extended(numbers):
    """Return the loss beyond L of a model that trained there.

    Raises: KeyError for one that did not: its seeds differ ten times as much, and so its noise.
    """
    if "yarn" in numbers["loss"]:
        raise KeyError("own")
    return loss(BEYOND)(numbers)


def table(results):
    header = ["", "text: loss within L", "beyond L", "keys: found in rows of L, %"]
    header += [*(f"of {c}L" for c in LENGTHS[1:]), "farther than L, %"]
    rows = []
    for line, (way, how) in LINES.items():
        keys, text = name_of("keys", way), name_of("text", way)
        nats = [results.values(text, loss(where, how)) for where in (WITHIN, BEYOND)]
        shares = 100 * results.values(keys, f"found/{how}").mean(2)  # by length of the row
        farther = results.values(keys, found(FAR, how))
        cells = [mean_spread(x, 3) for x in nats]
        rows.append([line, *cells, *(mean_spread(x, 1) for x in (*shares.T, farther))])
    documents = results.values("text: L", "documents").min()
    return (
        f"{markdown_table(header, rows)}\n\nLoss in nats per byte of text, of {documents:.0f} "
        f"documents. Long rows are 4L of text, and 16L of keys. "
        f"Chance finds {100 / Retrieval().values:.1f} %."
    )


def draw(results, path):
    """Draw a heat map of keys for each line, and the loss of the text by context."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    drawing.set_title(figure, results)
    above, below = figure.subfigures(2, 1)
    axes, ax = above.subplots(1, len(LINES), sharey=True), below.add_subplot()
    for heat, (line, (way, how)) in zip(axes, LINES.items(), strict=True):
        share = 100 * results.values(name_of("keys", way), f"found/{how}").mean(0)
        image = heat.imshow(share.T, vmin=0, vmax=100, aspect="auto", origin="lower")
        heat.set_title(textwrap.fill(line, 22), fontsize=9)
        heat.set_xticks(range(len(LENGTHS)), [f"{c}L" for c in LENGTHS])
        heat.set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS])
        nats = results.values(name_of("text", way), f"loss/{how}").mean(0)
        ax.plot(CONTEXTS, nats, "o-", label=line, markersize=4)
    above.supxlabel("tokens in the row", fontsize=10)
    above.supylabel("distance to the key, of the row", fontsize=10)
    above.colorbar(image, ax=axes, label="keys found, %")
    drawing.style_axes(ax, "", "bytes of text that are read, in L", "nats per byte")
    ax.legend(frameon=False, fontsize=9)
    write_figure(figure, path)


STUDY = Study(
    variants=variants,
    base="retrieval",
    prepare=prepare,
    measure=measure,
    table=table,
    draw=draw,
    claims=(
        Claim(
            "YaRN without more steps finds more far keys than nothing",
            "keys: L", 0.0, far_keys("yarn") - far_keys(), "higher", "keys",
        ),
        Claim(
            "YaRN without more steps keeps near keys, within 2 points",
            "keys: L", 0.0, found(NEAR, "yarn") - found(NEAR), "equal", "keys", 2.0,
            questions=QUESTIONS * len(DEPTHS),
        ),
        Claim(
            "after a tenth more steps, YaRN finds more far keys than none",
            "keys: L, then 16L with YaRN", "keys: L, then 16L", far_keys(), "higher", "keys",
        ),
        Claim(
            "a tenth more steps with YaRN find more than 16L from the start",
            "keys: L, then 16L with YaRN", "keys: 16L", far_keys(), "higher", "keys",
        ),
        Claim(
            "text beyond L: YaRN without more steps has a lower loss than nothing",
            "text: L", 0.0, loss(BEYOND, "yarn") - loss(BEYOND),
        ),
        Claim(
            "text beyond L: more steps with YaRN have a lower loss than without",
            "text: L, then 4L with YaRN", "text: L, then 4L", loss_of_extended,
        ),
        Claim(
            "text beyond L: more steps with YaRN have a lower loss than 4L from the start",
            "text: L, then 4L with YaRN", "text: 4L", loss_of_extended,
        ),
    ),
    stakes={
        "keys": Stake(
            "no reach: far keys, against near keys",
            "keys: L", 0.0, found(NEAR) - found(FAR),
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
)  # fmt: skip
