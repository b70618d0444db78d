"""A router's life: when choices settle, what the bias does, and which experts are not needed."""

from itertools import combinations

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import stats
from dsv3_jax.config import Balance, replace
from experiments.lab import Column, Study, drawing, markdown_table, mean_spread, write_figure
from experiments.lab.claims import Claim, Stake, logit
from experiments.lab.tables import results_table

NONE = Balance(bias_rate=0.0, sequence_alpha=0.0)
BIAS, SWITCH, UNBALANCED = "loss-free, γ 3e-3", "Switch loss, α 1e-2", "none"
METHODS = {  # as in 09_specialisation
    BIAS: replace(NONE, bias_rate=3e-3),
    SWITCH: replace(NONE, switch_alpha=1e-2),
    UNBALANCED: NONE,
}
CHECKPOINTS = 10
TOKENS = 512  # whose choices are kept, to compare seeds
CHOICES = 10_000  # that shares are counted over, at least
EARLY = 0.2  # of training

SHARES = (0.125, 0.25, 0.5)  # of a layer's experts, that are removed
WORTH, LOAD, CHANCE, MERGED = "least worth", "least load", "at random", "least worth, merged"
WAYS = (WORTH, LOAD, CHANCE, MERGED)
DRAWS = 3  # of the random choice
NEVER = -1e4  # a bias with which an expert is never chosen


def variants(base):
    every = max(base.steps // CHECKPOINTS, 1)
    return {
        name: replace(
            base, model=replace(base.model, balance=balance), save_every=every, keep=CHECKPOINTS + 1
        )
        for name, balance in METHODS.items()
    }


def measure(trained):
    """Measure choices by checkpoint and, but for the Switch loss, what removed experts cost."""
    numbers = choices(trained)
    if not trained.run.model.balance.switch_alpha:
        numbers |= removals(trained)
    return numbers


# Choices by checkpoint


def choices(trained):
    """Measure choices and biases by checkpoint, in the mean over layers.

    `settled` is the share of the last checkpoint's choices that are made already. Of runs with a
    bias: `changed`, the share of choices that the bias makes, and `max_vio` with and
    `max_vio_without` it on held-out text.
    """
    from dsv3_jax.runs.checkpoint import load_run

    batches = trained.held_out(min(8, trained.run.eval_batches))
    steps = sorted(
        int(p.name) for p in (trained.folder / "checkpoints").iterdir() if p.name.isdigit()
    )
    found = [
        stats.collect(load_run(trained.folder, step=step).model, batches, trained.corpus.domains)
        for step in steps
    ]
    last = found[-1].rows
    numbers = {
        "steps": steps,
        "settled": [float(stats.agreement(last, counts.rows).mean()) for counts in found],
        "choices": last.expert_ids[:, :TOKENS].tolist(),  # [L, n, K]
        "max_vio": [max_vio(counts.load) for counts in found],
    }
    numbers["early"] = float(np.interp(EARLY * steps[-1], steps, numbers["settled"]))
    if trained.run.model.balance.bias_rate:
        slots = last.expert_ids[0].size
        numbers |= {
            "changed": [float(counts.bias.changed.mean() / slots) for counts in found],
            "max_vio_without": [max_vio(counts.bias.load_without) for counts in found],
        }
        numbers["changed_last"], numbers["work"] = (
            numbers["changed"][-1],
            np.log(numbers["max_vio_without"][-1] / numbers["max_vio"][-1]),
        )
    return numbers


def max_vio(load):
    return float((load.max(-1) / load.mean(-1) - 1).mean())


def shared(index):
    """Return a function: the share of choices that two seeds' matched experts share, by pair.

    Args: index: 0 for the share, 1 for what shuffled tokens share.
    """
    from dsv3_jax.stats.token_rows import rows_of

    def of(results, variant):
        rows = []
        for a, b in combinations(results.records(variant), 2):
            here, there = (rows_of(np.array(r["numbers"]["choices"])) for r in (a, b))
            experts = 1 + max(here.expert_ids.max(), there.expert_ids.max())
            match = stats.match_experts(here, there, int(experts))
            rows.append((match.shared.mean(), match.by_chance.mean())[index])
        return np.array(rows or [np.nan])

    return of


# Experts that are removed


def removals(trained):
    """Measure `full`, the loss of all experts, and `without`, by way of choosing and share.

    The experts are chosen on one half of the held-out batches, and the losses are of the other
    half. `worth_load`: the correlation of an expert's worth with its load.
    """
    batches = trained.held_out()
    half = max(len(batches) // 2, 1)
    reads, scored = batches[:half], batches[half:] or batches
    worth = stats.worth(trained.model, reads, resamples=2)
    costs = worth.without - worth.loss  # [L, E]
    load = stats.collect(trained.model, reads, trained.corpus.domains).load[: len(costs)]
    rng = np.random.default_rng(trained.run.seed)
    ranks = {
        WORTH: [costs],
        LOAD: [load],
        CHANCE: [rng.random(costs.shape) for _ in range(DRAWS)],
        MERGED: [costs],
    }

    def loss_of(way, share):
        losses = [
            loss_without(trained, scored, least(rank, share), load, way == MERGED)
            for rank in ranks[way]
        ]
        return float(np.mean(losses))

    every = np.zeros(costs.shape, bool)
    return {
        "full": loss_without(trained, scored, every, load, False),
        "without": {way: [loss_of(way, share) for share in SHARES] for way in WAYS},
        "worth_load": float(np.corrcoef(costs.ravel(), load.ravel())[0, 1]),
    }


def least(rank, share):
    """Mark the `share` of each layer's experts with the smallest numbers. [L, E] → bool [L, E]."""
    count = round(share * rank.shape[1])
    return np.argsort(np.argsort(rank, axis=1, kind="stable"), axis=1) < count


def loss_without(trained, batches, removed, load, merge):
    """Return the loss where removed experts [L, E] are never chosen, and others take their places.

    With `merge` each removed expert's matrices are first averaged into the kept expert whose router
    vector is nearest, weighted by load.
    """
    import jax.numpy as jnp
    from flax import nnx

    from dsv3_jax.model.moe import RouterBias

    graph, params, bias, rest = nnx.split(trained.model, nnx.Param, RouterBias, ...)

    def never(path, b):
        return b.replace(jnp.where(removed, NEVER, b[...]).reshape(b[...].shape))

    bias = nnx.map_state(never, bias)
    if merge:
        params = merged(params, removed, load)
    return float(stats.tokens(nnx.merge(graph, params, bias, rest), batches, ()).loss)


def merged(params, removed, load):
    from flax import nnx

    flat = dict(nnx.to_flat_state(params))
    (router,) = [path for path in flat if path[-1] == "w_router"]
    vectors = np.asarray(flat[router][...]).swapaxes(-1, -2)  # [L, E, D]
    vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    # [L, E, E]: row i is what expert i is made of
    mixing = np.zeros((*removed.shape, removed.shape[1]))
    for layer, gone in enumerate(removed):
        near = vectors[layer] @ vectors[layer].T
        near[:, gone] = -np.inf
        goes_to = np.where(gone, near.argmax(1), np.arange(len(gone)))
        np.add.at(mixing[layer], (goes_to, np.arange(len(gone))), load[layer] + 1e-9)
    mixing /= np.maximum(mixing.sum(-1, keepdims=True), 1e-30)
    for path, weight in flat.items():
        if "experts" in path:
            w = np.asarray(weight[...])
            flat[path] = weight.replace(np.einsum("lij,lj...->li...", mixing, w).astype(w.dtype))
    return nnx.from_flat_state(flat)


def cost(way, share):
    """Return a function: nats that removing this share of the experts costs."""
    index = SHARES.index(share)
    return lambda numbers: numbers["without"][way][index] - numbers["full"]


def gap(way, other, share):
    """Return a function: nats that `way` costs more than `other`."""
    return lambda numbers: cost(way, share)(numbers) - cost(other, share)(numbers)


# The tables and the picture

COLUMNS = (
    Column("choices made after a fifth of training", "early", 2),
    Column("choices that the bias makes", "changed_last", 2),
    Column("ln MaxVio without the bias over with it", "work", 2),
    Column("MaxVio", lambda results, variant: results.values(variant, "max_vio")[:, -1], 2),
    Column("two seeds' matched experts share", shared(0), 2),
    Column("by chance", shared(1), 2),
    Column("validation loss", "val_loss", 4),
)


def table(results):
    both = (BIAS, UNBALANCED)
    rows = []
    for variant in both:
        for way in WAYS:
            costs = [results.values(variant, cost(way, s)) for s in SHARES]
            rows.append([variant, way, *(mean_spread(x, 3, sign=True) for x in costs)])
    header = ["balance", "removed", *(f"{100 * s:g} % of the experts, nats" for s in SHARES)]
    correlation = "; ".join(f"{v}: {mean_spread(results.values(v, 'worth_load'), 2)}" for v in both)
    return (
        f"{results_table(results, COLUMNS)}\n\n{markdown_table(header, rows)}\n\n"
        f"Correlation of worth and load: {correlation}."
    )


def draw(results, path):
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    (settled, bias), (balance, removed) = figure.subplots(2, 2)
    steps = results.records(BIAS)[0]["numbers"]["steps"]
    for variant in results.variants:
        band(settled, steps, results.values(variant, "settled"), results, variant, "o-", variant)
    early = 100 * results.values(BIAS, "early").mean()
    title = f"With the bias {early:.0f} % are made after {100 * EARLY:.0f} % of training"
    drawing.style_axes(settled, title, "step", "share of the last choices")
    settled.set_ylim(0, 1.02)
    settled.legend(frameon=False, fontsize=8, loc="lower right")

    changed = 100 * results.values(BIAS, "changed")
    band(bias, steps, changed, results, BIAS, "o-")
    title = f"The bias makes {changed[:, -1].mean():.0f} % of the choices at the end"
    drawing.style_axes(bias, title, "step", "% of choices that differ without it")
    bias.set_ylim(bottom=0)

    without = results.values(BIAS, "max_vio_without")
    band(balance, steps, without, results, BIAS, "--", f"{BIAS}, without its bias")
    for variant in results.variants:
        band(balance, steps, results.values(variant, "max_vio"), results, variant, "-", variant)
    with_it = results.values(BIAS, "max_vio")[:, -1].mean()
    title = f"Without its bias: MaxVio {without[:, -1].mean():.1f}, not {with_it:.1f}"
    drawing.style_axes(balance, title, "step", "MaxVio")
    balance.set_ylim(0, 1.45 * balance.get_ylim()[1])  # space for the legend
    balance.legend(frameon=False, fontsize=8, loc="upper right")

    for i, way in enumerate(WAYS):
        costs = np.stack([results.values(BIAS, cost(way, share)) for share in SHARES], 1)
        band(removed, 100 * np.array(SHARES), costs, results, f"C{i}", "o-", way)
    worth, merge = (results.values(BIAS, cost(way, 0.5)).mean() for way in (WORTH, MERGED))
    title = f"Half of the experts, by worth, cost {worth:.3f} nats; merged {merge:.3f}"
    drawing.style_axes(removed, title, "% of each layer's experts that are removed", "nats")
    removed.set_ylim(bottom=0)
    removed.legend(frameon=False, fontsize=8, loc="upper left")
    figure.supxlabel("lines: means over seeds; shaded: from least to most", fontsize=9)
    write_figure(figure, path)


def band(ax, x, values, results, variant, style, label=None):
    """Plot a mean over seeds, shaded from least to most. Args: variant: or a colour."""
    colour = drawing.colour_of(results, variant) if variant in results.variants else variant
    ax.plot(x, values.mean(0), style, color=colour, label=label, markersize=4)
    ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def log_vio(numbers):
    return float(np.log(numbers["max_vio"][-1]))


def later(text, against):
    key = logit("early", CHOICES, 1.0)
    return Claim(text, BIAS, against, key, unit="logits", digits=2)


def removed(text, variant, key):
    return Claim(text, variant, 0.0, key, "higher", stake="experts")


STUDY = Study(
    question=(
        "When do a router's choices settle, what does the bias do, "
        "and which experts can a model do without?"
    ),
    published=(
        "60 % of OLMoE's choices are made after 1 % of training, 80 % after 40 % (2409.02060); "
        "pruning by error beats pruning by load and at random (2402.14800), "
        "pruning beats merging (2510.13999)"
    ),
    variants=variants,
    measure=measure,
    columns=COLUMNS,
    table=table,
    draw=draw,
    claims=(
        Claim(
            "half of the choices are made after a fifth of training",
            BIAS,
            0.5,
            "early",
            "higher",
            unit="",
            digits=2,
        ),
        later("choices settle later with a bias than with a loss", SWITCH),
        later("choices settle later with a bias than without balance", UNBALANCED),
        Claim(
            "the bias evens the load",
            BIAS,
            0.0,
            "work",
            "higher",
            unit="ln MaxVio",
            digits=2,
            stake="balance",
        ),
        removed(
            "half the experts cost more at random than by worth", BIAS, gap(CHANCE, WORTH, 0.5)
        ),
        removed("half the experts cost more by load than by worth", BIAS, gap(LOAD, WORTH, 0.5)),
        removed("merging costs more than pruning, at half", BIAS, gap(MERGED, WORTH, 0.5)),
        removed(
            "a quarter costs more at random than by load, without balance",
            UNBALANCED,
            gap(CHANCE, LOAD, 0.25),
        ),
    ),
    stakes={
        "balance": Stake(
            "no balance",
            lambda results: results.paired(UNBALANCED, BIAS, log_vio),
            "ln MaxVio",
            2,
        ),
        "experts": Stake(
            "half the experts, at random",
            lambda results: results.values(BIAS, cost(CHANCE, 0.5)),
        ),
    },
    facts={
        "60 %, 40 %, 80 %, 50,000": "published: 1 % of 5 trillion tokens; here 1 million",
        "3.0": "0.96 * exp(1.15)",
        "0.30": "0.68 - 0.38",
        **{f"{share} %": f"0.{share}" for share in (21, 38, 41, 44, 48, 60, 68)},
        "55 %": lambda results: results.values(BIAS, "changed").mean(0).max(),
        "4.7": lambda results: results.values(BIAS, "max_vio_without").mean(0).max(),
    },
)
