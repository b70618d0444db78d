"""Sparse attention: what an indexer chooses by k and by its warm-up, and what that costs.

L is the base's row length. Two tasks share one small model: text in rows of 4L, and one-hop
retrieval that is trained at L and asked at 4L.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Yarn, replace
from dsv3_jax.data.batches import model_inputs
from dsv3_jax.model.context import make_context
from dsv3_jax.model.stack import unstack
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.indexer import index_scores
from dsv3_jax.runs.evaluate import evaluate
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

FACTOR = 4
INDEX = dict(attention="dsa", index_heads=4, index_dim=32)
CHOICES = {"text": (8, 16, 32), "keys": (4, 8, 16)}  # k; the middle one has all warm-ups
LEAST = 64  # tokens that a query of text must see to count: a choice of few is no choice
# Questions for each distance; the key's distances, in rows.
ROWS, DEPTHS = 64, (1 / 8, 3 / 8, 5 / 8, 7 / 8)
LOOKED_AT = 4  # batches of text
BINS = 9  # distances 0, 1, 2 to 3, 4 to 7, … 128 to 255
WARM_UPS = ("no", "short", "long")
COSTS = Path(__file__).parent / "cost.json"  # from cost.py


def variants(base):
    length, rate = base.data.seq_len, base.optim.learning_rate
    model = replace(
        base.model, q_latent_dim=base.model.dim // 2, max_positions=FACTOR * length, yarn=Yarn()
    )
    few = dict(warmup_steps=2, final_learning_rate=base.optim.final_learning_rate)
    indexers = replace(base.optim, **few)
    after = replace(base.optim, learning_rate=rate / 3, **few)
    data = replace(
        base.data, seq_len=FACTOR * length, batch_size=max(base.data.batch_size // FACTOR, 1)
    )
    text = replace(data, max_documents=400, val_fraction=0.1)
    keys = Retrieval(tokens=length)
    found = {}
    on_text = replace(base, model=model, data=text, steps=4 * base.steps)
    for name, task, first in (
        ("text", None, replace(on_text, eval_batches=2 * base.eval_batches)),
        ("keys", keys, replace(base, model=model, steps=2 * base.steps)),
    ):
        more = replace(first, optim=after, steps=max(base.steps // 2, 2))
        warm = {"short": max(base.steps // 16, 2), "long": base.steps}
        middle = CHOICES[name][1]
        found[dense(name)] = of(task, first)
        found[dense(name, more=True)] = begun(task, dense(name), more)
        for kind, steps in warm.items():
            run = replace(
                first, model=replace(model, **INDEX, index_topk=middle), optim=indexers, steps=steps
            )
            found[warmed(name, kind)] = begun(task, dense(name), run, indexer_stage="warm")
        for k, kind in [(middle, "no"), (middle, "short"), *((k, "long") for k in CHOICES[name])]:
            run = replace(more, model=replace(model, **INDEX, index_topk=k))
            found[sparse(name, k, kind)] = begun(task, warmed(name, kind), run)
    return found


def dense(name, more=False):
    return f"{name}: dense" + ", more steps" * more


def warmed(name, kind):
    """The variant whose indexers are warmed up; with none, the dense model's random ones."""
    return dense(name) if kind == "no" else f"{name}: {kind} warm-up"


def sparse(name, k, kind):
    return f"{name}: k {k}, {kind} warm-up"


def of(task, run):
    return run if task is None else OnTask(task, run)


def begun(task, other, run, **stage):
    return FollowUp((other,), lambda folder: of(task, replace(run, start=folder, **stage)))


# What is measured


def measure(trained):
    """Measure each k where the model itself was not trained sparsely; else its own."""
    run, name = trained.run, "text" if trained.task is None else "keys"
    is_dense = run.model.attention == "mla"
    is_final = bool(run.start) and run.indexer_stage == "sparse"
    ks = CHOICES[name] if not is_final else () if is_dense else (run.model.index_topk,)
    found = (of_text if name == "text" else of_keys)(trained, ks, is_dense, is_final)
    if is_final:  # what claims are judged by
        number = trained.numbers["val_loss"]
        if name == "keys":
            number = 100 * next(iter(found["far"].values()))
        found["final"] = {name: number}
    return found


def model_of(trained, k, **changes):
    """The model with k tokens for each query. One without indexers gets random ones."""
    cfg = replace(trained.run.model, **INDEX, index_topk=k, **changes)
    model = Transformer(cfg, trained.run.execution, rngs=nnx.Rngs(trained.run.seed))
    nnx.update(model, nnx.state(trained.model))
    return model


def of_text(trained, ks, is_dense, is_final):
    """Loss and recall by k, and what is picked at the middle k, or the only one."""
    batches = trained.held_out()
    most = trained.run.model.max_positions
    own = trained.numbers["val_loss"]
    loss = {"all": own} if is_dense else {}
    for k in ks:
        if is_final:
            loss[k] = own
        else:
            loss[k] = evaluate(model_of(trained, k), batches, trained.tokenizer)["val_loss"]
    if not ks:
        return {"loss": loss}
    model, looks = model_of(trained, most), []
    for batch in batches[:LOOKED_AT]:
        inputs = model_inputs(batch)
        p, s = look(model, inputs["tokens"], inputs["segment_ids"], inputs["positions"])
        where = np.isfinite(s[0]).sum(-1) >= LEAST
        looks.append((p[:, where], s[:, where]))
    p, s = (np.concatenate(x, 1) for x in zip(*looks, strict=True))
    k = ks[len(ks) // 2]
    picks = {"k": k, "distance": by_distance(p, s, k), "document": by_document(trained, model, k)}
    return {"loss": loss, "recall": {k: recall(p, s, k) for k in ks}, "picks": picks}


def of_keys(trained, ks, is_dense, is_final):
    """Keys found in rows of L and of 4L with YaRN, and whether the planted token is chosen."""
    most = trained.run.model.max_positions
    length = most // FACTOR
    yarn = Yarn(factor=float(FACTOR), original_max_positions=length)
    near = [trained.task.questions(length, round(x * length), ROWS).tokens for x in DEPTHS]
    distances = [round(x * most) for x in DEPTHS]
    far = [trained.task.questions(most, distance, ROWS).tokens for distance in distances]
    models = {k: model_of(trained, k, yarn=yarn) for k in ks}
    models["all"] = model_of(trained, most, yarn=yarn)
    shown = [*ks, "all"] if is_dense else ks
    found = {
        "near": {name: share(models[name], near) for name in shown},
        "far": {name: share(models[name], far) for name in shown},
    }
    if not ks:
        return found
    # At the question.
    looks = [[x[:, :, -2] for x in look(models["all"], tokens)] for tokens in far]
    p, s = (np.concatenate(x, 1) for x in zip(*looks, strict=True))
    planted = np.repeat([most - 1 - distance for distance in distances], ROWS)
    # By either layer.
    chosen = {k: best(s, k)[:, np.arange(len(planted)), planted].any(0) for k in ks}
    return found | {
        "recall": {k: recall(p, s, k) for k in ks},
        "planted": {k: float(x.mean()) for k, x in chosen.items()},
    }


def share(model, rows):
    """Share of rows [n, T] whose last token is the likeliest one."""
    graphdef, state = nnx.split(model)
    return float(
        np.mean([np.mean(last_choice(graphdef, state, tokens) == tokens[:, -1]) for tokens in rows])
    )


@partial(jax.jit, static_argnames="graphdef")
def last_choice(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    return (model.forward_hidden(tokens).h[:, -2] @ model.head_matrix()).argmax(-1)


def look(model, tokens, segment_ids=None, positions=None):
    """(Dense attention's mean over heads; the indexers' scores, -inf if unseen), [L, B, T, S]."""
    graphdef, state = nnx.split(model)
    return tuple(np.asarray(x) for x in _look(graphdef, state, tokens, segment_ids, positions))


@partial(jax.jit, static_argnames="graphdef")
def _look(graphdef, state, tokens, segment_ids, positions):
    model = nnx.merge(graphdef, state)
    x, found, length = model.embedding(tokens), [], tokens.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is not None:
        seen &= segment_ids[:, :, None] == segment_ids[:, None]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    ctx = make_context(model.cfg, positions, segment_ids)
    blocks = nnx.graphdef(model.dense)
    for layer in unstack(model.dense):
        block = nnx.merge(blocks, layer)
        q, rows = block.attn.project(block.attn_norm(x), ctx)
        k = block.attn.expand(rows, ctx)["k"]
        products = jnp.einsum("bthk,bshk->bths", q, k) * block.attn.scale
        p = jax.nn.softmax(jnp.where(seen[:, :, None], products, -jnp.inf)).mean(2)
        one = partial(index_scores, rows=rows["index_key"][:, :, 0])
        s = jax.vmap(one, 1, 1)(rows["index_query"], rows["index_weight"][:, :, 0])
        found.append((p, jnp.where(seen, s, -jnp.inf)))
        x = block(x, ctx)[0]
    return tuple(jnp.stack(of_layers) for of_layers in zip(*found, strict=True))


def best(scores, k):
    """bool of the same shape: the k largest of the last axis."""
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, np.argpartition(-scores, k - 1)[..., :k], True, axis=-1)
    return chosen & np.isfinite(scores)


def recall(p, s, k):
    """Shares of attention's mass [L, n, S] in the indexer's choice, the latest k, and its best k.

    "set" is the share of its own best k that the indexer chose.
    """
    latest = np.where(np.isfinite(s), np.arange(s.shape[-1]), -np.inf)
    dense = np.where(np.isfinite(s), p, -np.inf)
    chosen, top = best(s, k), best(dense, k)
    shares = {"mass": chosen, "latest": best(latest, k), "best": top}
    mass = {name: float((p * which).sum(-1).mean()) for name, which in shares.items()}
    return mass | {"set": float((chosen & top).sum() / top.sum())}


def by_distance(p, s, k):
    """By layer and bin of distance: the shares of seen tokens in the choice and in the best k."""
    seen = np.isfinite(s)
    # A query's own place is the last that it sees.
    own = s.shape[-1] - 1 - seen[:, :, ::-1].argmax(-1)
    distance = own[..., None] - np.arange(s.shape[-1])
    bins = np.where(distance > 0, 1 + np.log2(np.maximum(distance, 1)).astype(int), 0)
    found = {}
    for name, which in (("chosen", best(s, k)), ("best", best(np.where(seen, p, -np.inf), k))):
        found[name] = [
            [float(w[v & (b == i)].mean()) if (v & (b == i)).any() else 0.0 for i in range(BINS)]
            for w, v, b in zip(which, seen, bins, strict=True)
        ]
    return found


def by_document(trained, model, k):
    """The model reads two documents as one text: its choice in the query's own, and first tokens.

    A row is the beginning of one held-out document and that of another one. Queries are in the last
    quarter of the row. "own" is a share of the choice; "row" and "document" are the shares of
    choices that have these first tokens. "even" is what an even choice of k seen tokens would have.
    """
    half = model.cfg.max_positions // 2
    texts = [trained.tokenizer.encode_array(d.text) for d in trained.corpus.val]
    parts = [x[:half] for x in texts if len(x) >= half]
    tokens = np.stack(
        [np.concatenate([a, b]) for a, b in zip(parts, [*parts[1:], parts[0]], strict=True)]
    )
    p, s = (x[:, :, -(half // 2) :] for x in look(model, tokens.astype(np.int32)))
    seen = np.isfinite(s)
    even = k * seen / seen.sum(-1, keepdims=True)
    found = {"rows": len(tokens)}
    for name, which in (
        ("chosen", best(s, k)),
        ("best", best(np.where(seen, p, -np.inf), k)),
        ("even", even),
    ):
        own = float(which[..., half:].sum(-1).mean() / k)
        found[name] = {
            "own": own,
            "row": float(which[..., 0].mean()),
            "document": float(which[..., half].mean()),
        }
    return found


# The table and the picture


def rows_of(results, name):
    """Yield (line, k, variant, whether it was trained with that k), dense ones first."""
    for more in (False, True):
        yield ("dense, more steps" if more else "dense"), "all", dense(name, more), more
    for kind in WARM_UPS:
        for k in CHOICES[name]:
            yield f"{kind} warm-up, not trained further", str(k), warmed(name, kind), False
    for k in CHOICES[name]:
        for kind in WARM_UPS:
            if sparse(name, k, kind) in results.variants:
                yield f"{kind} warm-up, then more steps", str(k), sparse(name, k, kind), True


RECALL = ("mass", "latest", "best", "set")


def table(results):
    header = [
        "text",
        "k",
        "nats a byte",
        "of dense attention's mass: chosen, %",
        "in the latest k",
        "in its best k",
    ]
    rows = []
    for line, k, variant, _ in rows_of(results, "text"):
        cells = [mean_spread(results.values(variant, f"loss/{k}"), 4)]
        cells += [
            "" if k == "all" else mean_spread(100 * results.values(variant, f"recall/{k}/{x}"), 1)
            for x in RECALL
        ]
        rows.append([line, k, *cells])
    parts = [markdown_table([*header, "of its best k chosen, %"], rows)]
    header = [
        "keys",
        "k",
        "found in rows of L, %",
        "in rows of 4L",
        "planted token chosen at 4L, %",
    ]
    rows = []
    for line, k, variant, _ in rows_of(results, "keys"):
        names = (f"near/{k}", f"far/{k}", f"planted/{k}")
        cells = [
            mean_spread(100 * results.values(variant, x), 1)
            if k != "all" or "planted" not in x
            else ""
            for x in names
        ]
        rows.append([line, k, *cells])
    parts += [markdown_table(header, rows), f"Chance finds {100 / Retrieval().values:.1f} %."]
    middle, rows = CHOICES["text"][1], []
    shown = {f"{kind} warm-up, not trained further": warmed("text", kind) for kind in WARM_UPS}
    shown["long warm-up, then more steps"] = sparse("text", middle, "long")
    for line, variant in shown.items():
        for which, words in (
            ("chosen", "the indexer's"),
            ("best", "dense attention's best"),
            ("even", "an even one"),
        ):
            values = [
                results.values(variant, f"picks/document/{which}/{x}")
                for x in ("own", "document", "row")
            ]
            rows.append([line, words, *(mean_spread(100 * x, 1) for x in values)])
    header = [f"two documents read as one, k {middle}", "choice", "of the query's own document, %"]
    parts.append(
        markdown_table(
            [*header, "has its document's first token, %", "has the row's first token, %"], rows
        )
    )
    return "\n\n".join([*parts, cost_table()])


def cost_table():
    """Milliseconds a decoded token by context, from cost.py."""
    cost = json.loads(COSTS.read_text())
    rows = []
    for context, x in cost["contexts"].items():
        times = {kind: np.median(x["ms"][kind]) for kind in ("dense", "sparse")}
        ratio = np.median(np.divide(x["ms"]["dense"], x["ms"]["sparse"]))
        spans = [
            f"{times[kind]:.2f} ({min(x['ms'][kind]):.2f} to {max(x['ms'][kind]):.2f})"
            for kind in times
        ]
        sizes = [f"{x['bytes'][kind] / 2**20:.1f}" for kind in times]
        rows.append(
            [
                f"{int(context):,}",
                *spans,
                f"{ratio:.2f}",
                *sizes,
                f"{x['bytes']['dense'] / x['bytes']['sparse']:.2f}",
            ]
        )
    header = [
        "tokens in the cache",
        "dense, ms a token",
        "sparse, ms a token",
        "dense / sparse",
        "dense, MiB of the cache",
    ]
    rounds = f"Medians of {cost['rounds']} rounds in turns (least to most)"
    text = markdown_table([*header, "sparse, MiB of the cache", "dense / sparse"], rows)
    return f"{text}\n\n{rounds}, {cost['machine']}. {cost['what']}"


COLOURS = {"no": "C3", "short": "C1", "long": "C0"}


def draw(results, path):
    figure = Figure(figsize=(14, 8.4), layout="constrained")
    axes = figure.subplots(2, 3)
    draw_recall(axes[0, 0], results)
    draw_loss(axes[0, 1], results)
    draw_keys(axes[0, 2], results)
    draw_distances(axes[1, 0], results)
    draw_documents(axes[1, 1], results)
    draw_costs(axes[1, 2])
    figure.suptitle(drawing.answer(lambda: words(results), results.about["question"]), fontsize=12)
    write_figure(figure, path)


def words(results):
    middle = CHOICES["text"][1]
    mass = [
        100 * results.values(sparse("text", middle, kind), f"recall/{middle}/mass").mean()
        for kind in WARM_UPS
    ]
    return (
        f"{middle} of up to 256 tokens hold {mass[2]:.0f} % of dense attention's mass "
        f"after a long warm-up of the indexer, {mass[0]:.0f} % after none"
    )


def draw_recall(ax, results):
    ks = CHOICES["text"]
    drawing.make_logarithmic(ax, "x", ks)
    for kind in WARM_UPS:
        values = [100 * results.values(warmed("text", kind), f"recall/{k}/mass").mean() for k in ks]
        ax.plot(
            ks, values, "o--", color=COLOURS[kind], label=f"{kind} warm-up", markerfacecolor="none"
        )
        for k in ks:
            if (name := sparse("text", k, kind)) in results.variants:
                ax.plot(
                    [k],
                    [100 * results.values(name, f"recall/{k}/mass").mean()],
                    "o",
                    color=COLOURS[kind],
                )
    for which, text, style in (("best", "its own best k", "-"), ("latest", "the latest k", ":")):
        values = [100 * results.values(dense("text"), f"recall/{k}/{which}").mean() for k in ks]
        ax.plot(ks, values, style, color="0.4", label=text)
    ax.plot([], [], "o", color="0.4", label="filled: trained further")
    drawing.style_axes(ax, "Dense attention's mass in the choice", "k", "%")
    ax.set_ylim(0, 118)
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def draw_loss(ax, results):
    """How far each k is above dense attention that has more steps, on a logarithmic axis."""
    least = results.values(dense("text", more=True), "loss/all").mean()
    draw_by_k(ax, results, "text", "loss", lambda loss: loss - least)
    more = results.values(dense("text"), "loss/all").mean() - least
    ax.axhline(more, color="0.3", linewidth=1, linestyle="--", label="dense, no more steps")
    ax.set_yscale("log")
    drawing.style_axes(ax, "Loss of text above dense, more steps", "k", "nats a byte")
    ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")


def draw_keys(ax, results):
    draw_by_k(ax, results, "keys", "far", lambda share: 100 * share)
    share = 100 * results.values(dense("keys", more=True), "far/all").mean()
    ax.axhline(share, color="0.3", linewidth=1, zorder=0, label="dense, more steps")
    ax.axhline(100 / Retrieval().values, color="0.5", linewidth=0.8, linestyle=":", label="chance")
    drawing.style_axes(ax, "Keys found at 4L", "k", "%")
    ax.legend(frameon=False, fontsize=8)


def draw_by_k(ax, results, name, key, shown):
    """Open: not trained further, filled: trained further."""
    ks = CHOICES[name]
    drawing.make_logarithmic(ax, "x", ks)
    for kind in WARM_UPS:
        values = [shown(results.values(warmed(name, kind), f"{key}/{k}").mean()) for k in ks]
        ax.plot(
            ks, values, "o--", color=COLOURS[kind], label=f"{kind} warm-up", markerfacecolor="none"
        )
        there = [k for k in ks if sparse(name, k, kind) in results.variants]
        values = [shown(results.values(sparse(name, k, kind), f"{key}/{k}").mean()) for k in there]
        ax.plot(there, values, "o-", color=COLOURS[kind])


def draw_distances(ax, results):
    middle = CHOICES["text"][1]
    variant = sparse("text", middle, "long")
    for layer, marker in ((0, "o"), (1, "s")):
        for which, style, text in (
            ("chosen", "-", "chosen"),
            ("best", ":", "in dense attention's best"),
        ):
            values = 100 * results.values(variant, f"picks/distance/{which}/{layer}").mean(0)
            ax.plot(
                range(BINS),
                values,
                style,
                marker=marker,
                color=f"C{layer}",
                label=f"layer {layer + 1}: {text}",
                markersize=4,
            )
    ticks = ["0", "1", *(f"{2**i}–{2 ** (i + 1) - 1}" for i in range(1, BINS - 1))]
    ax.set_xticks(range(BINS), ticks, fontsize=7)
    drawing.style_axes(
        ax,
        f"What is picked by distance, k {middle}",
        "distance to the token",
        "of the tokens there, %",
    )
    ax.legend(frameon=False, fontsize=8)


def draw_documents(ax, results):
    """Bars of the choice at the middle k: own document, its first token, the row's first token."""
    middle = CHOICES["text"][1]
    variant = sparse("text", middle, "long")
    names = {
        "own": "of the query's\nown document",
        "document": "has its\nfirst token",
        "row": "has the row's\nfirst token",
    }
    for i, (which, text) in enumerate(
        (("chosen", "chosen"), ("best", "dense attention's best"), ("even", "an even choice"))
    ):
        values = [
            100 * results.values(variant, f"picks/document/{which}/{name}").mean() for name in names
        ]
        bars = ax.bar(
            np.arange(3) + 0.27 * (i - 1), values, 0.25, label=text, color=("C0", "0.55", "0.85")[i]
        )
        ax.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=8)
    ax.set_xticks(range(3), names.values(), fontsize=8)
    drawing.style_axes(ax, f"Two documents read as one text, k {middle}", "", "%")
    ax.legend(frameon=False, fontsize=8)


def draw_costs(ax):
    cost = json.loads(COSTS.read_text())["contexts"]
    contexts = [int(context) for context in cost]
    drawing.make_logarithmic(ax, "x", contexts)
    ax.set_xticks(contexts, [f"{context // 1024}K" for context in contexts])
    ax.set_yscale("log")
    for kind, colour in (("dense", "0.3"), ("sparse", "C0")):
        times = np.array([x["ms"][kind] for x in cost.values()])
        ax.plot(contexts, np.median(times, 1), "o-", color=colour, label=kind)
        ax.fill_between(contexts, times.min(1), times.max(1), color=colour, alpha=0.15, linewidth=0)
    drawing.style_axes(
        ax, "A decoded token, one layer, CPU", "tokens in the cache", "ms; shaded: rounds"
    )
    ax.legend(frameon=False, fontsize=8)


# The claims


def text_claim(text, k, kind, against, expect="lower", **more):
    return Claim(
        text, sparse("text", k, kind), against, "final/text", expect, stake="choice", **more
    )


def keys_claim(text, against, key="final/keys", expect="equal", **more):
    variant = sparse("keys", CHOICES["keys"][1], "long")
    return Claim(text, variant, against, key, expect, stake="reach", **more)


FAR_KEYS = ROWS * len(DEPTHS)  # questions at 4L of a run
MASSES = 10_000  # tokens whose attention is looked at, at least


def chosen_mass(numbers):
    """Dense attention's mass in the choice, in %, of a model that was trained with it."""
    numbers["final"]["text"]
    ((_, shares),) = numbers["recall"].items()
    return 100 * shares["mass"]


def beyond_latest(numbers):
    """How much more of that mass it is than in the latest k tokens, in logits."""
    chosen, ((_, shares),) = logit(chosen_mass, MASSES)(numbers), numbers["recall"].items()
    return chosen - logit("latest", MASSES, 1.0)(shares)


def cost_of(name, key, scale):
    """What a random choice of the middle k costs the dense model, by seed."""
    middle, variant = CHOICES[name][1], dense(name)
    return lambda results: (
        scale * (results.values(variant, f"{key}/{middle}") - results.values(variant, f"{key}/all"))
    )


K, MOST = CHOICES["text"][1:]
STUDY = Study(
    question="How few tokens does sparse attention need, and does its indexer need a warm-up?",
    published=(
        "k 2,048 of up to 128K, a warm-up of 1,000 steps: "
        "no substantial loss against V3.1 (V3.2 report)"
    ),
    variants=variants,
    base="retrieval",
    measure=measure,
    table=table,
    draw=draw,
    claims=(
        text_claim(
            f"k {MOST} after a long warm-up has dense attention's loss, within 0.02 nats",
            MOST,
            "long",
            dense("text", more=True),
            "equal",
            margin=0.02,
        ),
        text_claim(
            f"k {K}: a long warm-up ends at a lower loss than none",
            K,
            "long",
            sparse("text", K, "no"),
        ),
        Claim(
            f"k {K}: after a long warm-up more of dense attention's mass is chosen than after none",
            sparse("text", K, "long"),
            sparse("text", K, "no"),
            logit(chosen_mass, MASSES),
            "higher",
            unit="logits",
            digits=2,
        ),
        Claim(
            f"k {K}: the choice has more of that mass than the latest {K} tokens",
            sparse("text", K, "long"),
            0.0,
            beyond_latest,
            "higher",
            unit="logits",
            digits=2,
        ),
        keys_claim(
            f"k {CHOICES['keys'][1]} finds as many keys at 4L as dense attention, within 5 points",
            dense("keys", more=True),
            margin=5.0,
            unit="points",
            digits=1,
            questions=FAR_KEYS,
        ),
        keys_claim(
            "a long warm-up finds more keys at 4L than none",
            sparse("keys", CHOICES["keys"][1], "no"),
            logit("final/keys", FAR_KEYS),
            "higher",
            unit="logits",
            digits=2,
        ),
    ),
    stakes={
        "choice": Stake(
            f"{K} tokens at random, of dense attention's",
            cost_of("text", "loss", 1.0),
        ),
        "reach": Stake(
            f"{CHOICES['keys'][1]} tokens at random: keys at 4L",
            cost_of("keys", "far", -100.0),
            "points",
            1,
        ),
    },
    facts={
        "1,000, 15,000": "published",
        "160 steps, 240 steps": "settings",
        "0.026": "1.9494 - 1.9233",
        "768": "64 questions of 4 distances for each of three seeds",
        "0.010": "1.9336 - 1.9233",
        "0.022": "1.9618 - 1.9394",
    },
)
