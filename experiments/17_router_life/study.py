"""When do a router's choices settle, what does the bias do, and which experts can a model do
without?

Published: 60 % of OLMoE's choices are made after 1 % of training, 80 % after 40 % (2409.02060);
pruning by error beats pruning by load and at random (2402.14800), pruning beats merging
(2510.13999).
"""

from functools import partial
from itertools import combinations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import stats
from dsv3_jax.config import replace
from dsv3_jax.runs.checkpoint import load_run, steps_of
from dsv3_jax.stats.token_rows import rows_of
from experiments.lab import Claim, Column, Number, Stake, Study, drawing, ln, logit
from experiments.lab.bases import NO_BALANCE
from experiments.lab.tables import markdown_table, mean_spread

BIAS, SWITCH, UNBALANCED = "loss-free, γ 3e-3", "Switch loss, α 1e-2", "none"
METHODS = {  # as in 09_specialisation
    BIAS: replace(NO_BALANCE, bias_rate=3e-3),
    SWITCH: replace(NO_BALANCE, switch_alpha=1e-2),
    UNBALANCED: NO_BALANCE,
}
CHECKPOINTS = 10
TOKENS = 512  # whose choices are kept, to compare seeds
CHOICES = 10_000  # that shares are counted over, at least
EARLY = 0.2  # of training

SHARES = (0.125, 0.25, 0.5)  # of a layer's experts, that are removed
WORTH, LOAD, CHANCE, MERGED = "least worth", "least load", "at random", "least worth, merged"
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
    """Measure which choices are settled by checkpoint, and which of them the bias makes.

    All are of held-out text, in the mean over layers.
    """
    batches = trained.held_out(min(8, trained.run.eval_batches))
    steps = steps_of(trained.folder / "checkpoints")
    found = [
        stats.collect(load_run(trained.folder, step=step).model, batches, trained.corpus.domains)
        for step in steps
    ]
    last = found[-1].rows
    settled = [float(stats.agreement(last, counts.rows).mean()) for counts in found]
    max_vios = [max_vio(counts.load) for counts in found]
    numbers = {
        "steps": steps,
        "settled": settled,
        "choices": last.expert_ids[:, :TOKENS].tolist(),  # [L, n, K]
        "max_vio": max_vios,
        "early": float(np.interp(EARLY * steps[-1], steps, settled)),
    }
    if trained.run.model.balance.bias_rate:
        slots = last.expert_ids[0].size
        changed = [float(counts.bias.changed.mean() / slots) for counts in found]
        without = [max_vio(counts.bias.load_without) for counts in found]
        numbers |= {
            "changed": changed,
            "max_vio_without": without,
            "work": np.log(without[-1] / max_vios[-1]),
        }
    return numbers


def max_vio(load):
    return float((load.max(-1) / load.mean(-1) - 1).mean())


# Experts that are removed


def removals(trained):
    """Measure the loss without some experts, which are chosen on the other half of the text."""
    batches = trained.held_out()
    half = max(len(batches) // 2, 1)
    reads, scored = batches[:half], batches[half:] or batches
    worth = stats.worth(trained.model, reads, resamples=2)
    costs = worth.without - worth.loss  # [L, E]
    load = stats.collect(trained.model, reads, trained.corpus.domains).load[: len(costs)]
    rng = np.random.default_rng(trained.run.seed)
    chance = [rng.random(costs.shape) for _ in range(DRAWS)]
    loss = partial(loss_without, trained.model, scored)
    return {
        "full": loss(least(costs, 0.0)),
        "without": {
            WORTH: [loss(least(costs, share)) for share in SHARES],
            LOAD: [loss(least(load, share)) for share in SHARES],
            CHANCE: [
                float(np.mean([loss(least(rank, share)) for rank in chance])) for share in SHARES
            ],
            MERGED: [loss(least(costs, share), load) for share in SHARES],
        },
        "worth_load": float(np.corrcoef(costs.ravel(), load.ravel())[0, 1]),
    }


def least(rank, share):
    """Mark the `share` of each layer's experts with the smallest numbers. [L, E] → bool [L, E]."""
    count = round(share * rank.shape[1])
    return np.argsort(np.argsort(rank, axis=1, kind="stable"), axis=1) < count


def loss_without(model, batches, removed, load=None):
    """Return the loss where removed experts [L, E] are never chosen, and others take their places.

    Args: load: by which they are merged into kept ones before; None means that they are not.
    """
    model = nnx.clone(model)
    moe = model.sparse.moe
    moe.bias[...] = jnp.where(removed, NEVER, moe.bias[...])
    if load is not None:
        mixing = mixing_of(np.asarray(moe.w_router[...]), removed, load)
        for weight in (moe.experts.w_gate, moe.experts.w_up, moe.experts.w_down):
            w = np.asarray(weight[...])
            weight[...] = np.einsum("lij,lj...->li...", mixing, w).astype(w.dtype)
    return float(stats.tokens(model, batches, ()).loss)


def mixing_of(w_router, removed, load):
    """Return what each expert is made of, [L, E, E], after the merging.

    A removed expert is averaged into the kept one whose router vector is nearest, weighted by load.
    """
    vectors = w_router.swapaxes(-1, -2)  # [L, E, D]
    vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    mixing = np.zeros((*removed.shape, removed.shape[1]))
    for layer, gone in enumerate(removed):
        near = vectors[layer] @ vectors[layer].T
        near[:, gone] = -np.inf
        goes_to = np.where(gone, near.argmax(1), np.arange(len(gone)))
        np.add.at(mixing[layer], (goes_to, np.arange(len(gone))), load[layer] + 1e-9)
    return mixing / np.maximum(mixing.sum(-1, keepdims=True), 1e-30)


# The tables and the picture


def cost(way, share):
    """Return the nats that removing this share of the experts costs."""
    return Number(f"without/{way}/{SHARES.index(share)}", "nats", 3) - "full"


def matched(what):
    """Return a function: a mean of `stats.match_experts`, by pair of seeds."""

    def values(results, variant):
        found = []
        for pair in combinations(results.values(variant, "choices").astype(int), 2):
            match = stats.match_experts(*map(rows_of, pair), 1 + int(np.max(pair)))
            found.append(getattr(match, what).mean())
        return np.array(found or [np.nan])

    return values


def below(results):
    header = ["balance", "removed", *(f"{100 * s:g} % of the experts, nats" for s in SHARES)]
    rows = []
    for variant in (BIAS, UNBALANCED):
        for way in (WORTH, LOAD, CHANCE, MERGED):
            costs = [results.values(variant, cost(way, share)) for share in SHARES]
            rows.append([variant, way, *(mean_spread(x, 3, sign=True) for x in costs)])
    return markdown_table(header, rows)


SETTLED = {  # at every second checkpoint
    f"{20 * fifth} %: {variant.partition(',')[0]}": (variant, f"settled/{2 * fifth - 1}")
    for fifth in range(1, 5)
    for variant in METHODS
}

# The claims


SETTLED_EARLY = logit("early", CHOICES, 1.0)


def removed(text, variant, way, other, share):
    """A claim that this way of choosing the removed experts costs more than the other."""
    return Claim(text, variant, 0.0, cost(way, share) - cost(other, share), "higher", "experts")


STUDY = Study(
    variants=variants,
    measure=measure,
    columns=(
        Column("choices made after a fifth of training", "early", 2),
        Column("choices that the bias makes", "changed/-1", 2),
        Column("ln MaxVio without the bias over with it", "work", 2),
        Column("MaxVio", "max_vio/-1", 2),
        Column("two seeds' matched experts share", matched("shared"), 2),
        Column("by chance", matched("by_chance"), 2),
        Column("correlation of worth and load", "worth_load", 2),
        Column("validation loss", "val_loss", 4),
    ),
    below=below,
    draw=drawing.claims_and_variants(
        SETTLED, "share of the last choices that are made after a part of training"
    ),
    claims=(
        Claim(
            "half of the choices are made after a fifth of training",
            BIAS, 0.5, Number("early", ""), "higher",
        ),
        Claim(
            "choices settle later with a bias than with a loss", BIAS, SWITCH, SETTLED_EARLY
        ),
        Claim(
            "choices settle later with a bias than without balance", BIAS, UNBALANCED, SETTLED_EARLY
        ),
        Claim(
            "the bias evens the load", BIAS, 0.0, Number("work", "ln MaxVio"), "higher", "balance"
        ),
        removed("half the experts cost more at random than by worth", BIAS, CHANCE, WORTH, 0.5),
        removed("half the experts cost more by load than by worth", BIAS, LOAD, WORTH, 0.5),
        removed("merging costs more than pruning, at half", BIAS, MERGED, WORTH, 0.5),
        removed(
            "a quarter costs more at random than by load, without balance",
            UNBALANCED, CHANCE, LOAD, 0.25,
        ),
    ),
    stakes={
        "balance": Stake("no balance", UNBALANCED, BIAS, ln("max_vio/-1", "MaxVio")),
        "experts": Stake("half the experts, at random", BIAS, 0.0, cost(CHANCE, 0.5)),
    },
    facts={
        "60 %, 40 %, 80 %, 50,000": "published: 1 % of 5 trillion tokens; here 1 million",
        "3.0": "0.96 * exp(1.15)",
        "0.30": "0.68 - 0.38",
        **{f"{share} %": f"0.{share}" for share in (21, 38, 41, 44, 48, 60, 68)},
        "55 %": lambda results: results.values(BIAS, "changed").mean(0).max(),
        "4.7": lambda results: results.values(BIAS, "max_vio_without").mean(0).max(),
    },
)  # fmt: skip
