"""Dropless routing against fixed expert capacities: the share of dropped tokens and the loss."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import Balance, replace
from dsv3_jax.model.transformer import abstract
from dsv3_jax.runs.evaluate import evaluate
from experiments.lab import Column, Study, drawing
from experiments.lab.claims import Claim, Stake, logit, percent_of
from experiments.lab.measuring import late_mean


def variants(base):
    capacities = {
        f"capacity {factor:g}": replace(base, model=replace(base.model, capacity_factor=factor))
        for factor in (1.0, 1.25, 2.0)
    }
    unbalanced = replace(
        capacities["capacity 1.25"].model, balance=Balance(bias_rate=0.0, sequence_alpha=0.0)
    )
    without = {"capacity 1.25, no balance": replace(base, model=unbalanced)}
    return {"no drop": base} | capacities | without


def measure(trained):
    """Measure the same weights' loss without the limit, and the dropped share of held-out text."""
    if trained.run.model.capacity_factor is None:
        return {"val_loss_no_drop": trained.numbers["val_loss"], "dropped_held_out": 0.0}
    shapes = abstract(replace(trained.run.model, capacity_factor=None), trained.run.execution)
    model = nnx.merge(nnx.graphdef(shapes), nnx.state(trained.model))
    metrics = evaluate(model, trained.held_out(), trained.tokenizer)
    graphdef, state = nnx.split(trained.model)
    shares = [
        dropped_share(graphdef, state, batch["tokens"], batch["segment_ids"])
        for batch in trained.held_out()
    ]
    return {"val_loss_no_drop": metrics["val_loss"], "dropped_held_out": float(np.mean(shares))}


@partial(jax.jit, static_argnames="graphdef")
def dropped_share(graphdef, state, tokens, segment_ids):
    """Return the dropped share of a batch's assignments, mean over layers."""
    found = nnx.merge(graphdef, state).forward_hidden(tokens, segment_ids)
    return found.metrics["sparse"]["dropped"].mean()


dropped_in_training = late_mean("dropped")  # share of assignments


def words(results):
    shares = [
        100 * dropped_in_training(results, name).mean() for name in ("capacity 1.25", UNBALANCED)
    ]
    return "At capacity 1.25, {:.0f} % are dropped with balance, {:.0f} % without".format(*shares)


UNBALANCED = "capacity 1.25, no balance"
DROPPED = logit("dropped_held_out", 100_000, 1.0)  # assignments of held-out text, at least


def costs(text, variant):
    return Claim(text, variant, "no drop", expect="higher", stake="drops")


STUDY = Study(
    question="What do dropped tokens cost, and does good balance make dropping unnecessary?",
    published=(
        "DeepSeek-V3 drops no token in training or inference, "
        "thanks to its balance; no figure is given"
    ),
    variants=variants,
    measure=measure,
    columns=(
        Column("dropped in training, %", dropped_in_training, 2, scale=100.0),
        Column("dropped of held-out text, %", "dropped_held_out", 2, scale=100.0),
        Column("validation loss", "val_loss", 4, paired=True),
        Column("validation loss without capacity limit", "val_loss_no_drop", 4),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=drawing.claims_and_variants(
        DROPPED,
        "dropped of held-out text, %",
        words,
        shown=percent_of,
        ticks=(0.001, 0.1, 1, 10, 100),
    ),
    claims=(
        Claim(
            "balance lowers the dropped share at capacity 1.25",
            "capacity 1.25",
            UNBALANCED,
            DROPPED,
            unit="logits",
            digits=2,
        ),
        costs("a capacity of the mean load costs loss", "capacity 1"),
        costs("a capacity of 1.25 costs loss", "capacity 1.25"),
        costs("a capacity of 2 costs loss", "capacity 2"),
        costs("a capacity of 1.25 without balance costs loss", UNBALANCED),
    ),
    stakes={
        "drops": Stake(
            "most assignments dropped",
            lambda results: results.paired(UNBALANCED, "no drop", "val_loss"),
        )
    },
    facts={
        "1e-4": "a weight",
        "0.007": "3.6553 - 3.6485",
    },
)
