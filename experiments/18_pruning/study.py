"""Pruning and merging experts by their worth, load, or at random: the loss with half of them."""

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import stats
from dsv3_jax.config import Balance, replace
from experiments.lab import Study, drawing, markdown_table, mean_spread, write_figure
from experiments.lab.claims import Claim, Stake

NONE = Balance(bias_rate=0.0, sequence_alpha=0.0)
BIAS, UNBALANCED = "loss-free, γ 3e-3", "none"
# As in 17_router_life, with the same runs.
METHODS = {BIAS: replace(NONE, bias_rate=3e-3), UNBALANCED: NONE}
SHARES = (0.125, 0.25, 0.5)  # of a layer's experts, that are removed
WORTH, LOAD, CHANCE, MERGED = "least worth", "least load", "at random", "least worth, merged"
DRAWS = 3  # of the random choice
NEVER = -1e4  # a bias with which an expert is never chosen


def variants(base):
    every = max(base.steps // 10, 1)
    return {
        name: replace(base, model=replace(base.model, balance=balance), save_every=every, keep=11)
        for name, balance in METHODS.items()
    }


def measure(trained):
    """`loss` of all experts, and `without`: the loss by way of choosing what is removed, and share.

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
    ways = {
        WORTH: [costs],
        LOAD: [load],
        CHANCE: [rng.random(costs.shape) for _ in range(DRAWS)],
        MERGED: [costs],
    }

    def loss_of(way, share):
        losses = [
            loss_without(trained, scored, least(rank, share), load, way == MERGED)
            for rank in ways[way]
        ]
        return float(np.mean(losses))

    losses = {way: [loss_of(way, share) for share in SHARES] for way in ways}
    every = np.zeros(costs.shape, bool)
    return {
        "full": loss_without(trained, scored, every, load, False),
        "without": losses,
        "worth": costs.tolist(),
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


def table(results):
    rows = []
    for variant in results.variants:
        for way in (WORTH, LOAD, CHANCE, MERGED):
            costs = [results.values(variant, cost(way, s)) for s in SHARES]
            rows.append([variant, way, *(mean_spread(x, 3, sign=True) for x in costs)])
    header = ["balance", "removed", *(f"{100 * s:g} % of the experts, nats" for s in SHARES)]
    correlation = "; ".join(
        f"{v}: {mean_spread(results.values(v, 'worth_load'), 2)}" for v in results.variants
    )
    return markdown_table(header, rows) + f"\n\nCorrelation of worth and load: {correlation}."


def draw(results, path):
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, variant in zip(axes, results.variants, strict=False):
        for i, way in enumerate((WORTH, LOAD, CHANCE, MERGED)):
            by_share = [results.values(variant, cost(way, share)) for share in SHARES]
            costs = np.stack(by_share)  # [shares, seeds]
            x = 100 * np.array(SHARES)
            ax.plot(x, costs.mean(1), "o-", color=f"C{i}", label=f"{way}")
            ax.fill_between(x, costs.min(1), costs.max(1), color=f"C{i}", alpha=0.15, linewidth=0)
        drawing.style_axes(
            ax, f"Balance: {variant}", "% of each layer's experts that are removed", ""
        )
        ax.axhline(0, color="0.5", linewidth=0.8)
    axes[0].set_ylabel("loss above all experts', nats; shaded: seeds")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(
        drawing.answer(lambda: words(results), "What removed experts cost"), fontsize=11
    )
    write_figure(figure, path)


def words(results):
    worth, chance = (results.values(BIAS, cost(way, 0.5)).mean() for way in (WORTH, CHANCE))
    return f"Half of the experts, chosen by worth, cost {worth:.3f} nats; at random {chance:.3f}"


def claim(text, variant, key, expect="higher", stake="experts"):
    return Claim(text, variant, 0.0, key, expect, stake=stake)


STUDY = Study(
    question="Which experts can a model do without: those with the least worth, or the least load?",
    published=(
        "pruning by error beats pruning by load and at random (2402.14800), "
        "pruning beats merging (2510.13999)"
    ),
    variants=variants,
    measure=measure,
    table=table,
    draw=draw,
    claims=(
        claim("half the experts cost more at random than by worth", BIAS, gap(CHANCE, WORTH, 0.5)),
        claim("half the experts cost more by load than by worth", BIAS, gap(LOAD, WORTH, 0.5)),
        claim("a quarter costs more by load than by worth", BIAS, gap(LOAD, WORTH, 0.25)),
        claim("merging costs more than pruning, at half", BIAS, gap(MERGED, WORTH, 0.5)),
        claim(
            "a quarter costs more at random than by load, without balance",
            UNBALANCED,
            gap(CHANCE, LOAD, 0.25),
        ),
    ),
    stakes={
        "experts": Stake(
            "half the experts, at random",
            lambda results: results.values(BIAS, cost(CHANCE, 0.5)),
        )
    },
)
