"""No token dropped, against experts of a fixed capacity: what is dropped, and what it costs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from functools import partial

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Balance, replace
from dsv3_jax.model.transformer import abstract
from dsv3_jax.training.evaluate import evaluate
from experiments.lab import Column, Study, drawing
from experiments.lab.results import write_figure


def variants(base):
    capacities = {
        f"capacity {factor:g}": replace(base, model=replace(base.model, dispatch="capacity", capacity_factor=factor))
        for factor in (1.0, 1.25, 2.0)
    }
    unbalanced = replace(capacities["capacity 1.25"].model, balance=Balance(bias_rate=0.0, sequence_alpha=0.0))
    return {"no drop": base} | capacities | {"capacity 1.25, no balance": replace(base, model=unbalanced)}


def measure(trained):
    """The loss of the same weights where nothing is dropped any more, and the share dropped of held-out text."""
    if trained.run.model.dispatch != "capacity":
        return {"val_loss_no_drop": trained.numbers["val_loss"], "dropped_held_out": 0.0}
    shapes = abstract(replace(trained.run.model, dispatch="auto"))
    model = nnx.merge(nnx.graphdef(shapes), nnx.state(trained.model))
    found = evaluate(model, trained.held_out(), trained.tokenizer)
    graphdef, state = nnx.split(trained.model)
    shares = [dropped_of(graphdef, state, batch["tokens"], batch["segment_ids"]) for batch in trained.held_out()]
    return {"val_loss_no_drop": found["val_loss"], "dropped_held_out": float(np.mean(shares))}


@partial(jax.jit, static_argnames="graphdef")
def dropped_of(graphdef, state, tokens, segment_ids):
    """Share of a batch's assignments that are dropped, mean over layers."""
    return nnx.merge(graphdef, state).trace(tokens, segment_ids).routing.dropped.mean()


def dropped(results, variant):
    """Share of assignments dropped over the last fifth of training, a number a seed."""
    _, shares = results.curve(variant, "dropped")
    return shares[:, -max(shares.shape[1] // 5, 1) :].mean(1)


def draw(results, path):
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawing.curves(left, results, "dropped", "Share of assignments dropped in training", "share")
    drawing.dots_by_variant(right, results, "val_loss", "Validation loss against no drop", "nats a token")
    write_figure(figure, path)


def ours(results):
    first, *others = results.variants
    return "; ".join(
        f"{name}: {dropped(results, name).mean():.1%} dropped, {results.paired(name, first, 'val_loss').mean():+.3f}"
        for name in others
    )


STUDY = Study(
    script=__file__,
    question="What do dropped tokens cost, and does good balance make dropping unnecessary to begin with?",
    published="DeepSeek-V3 drops no token in training or inference, thanks to its balance; no figure is given",
    variants=variants,
    measure=measure,
    columns=(
        Column("dropped in training, %", dropped, 2, scale=100.0),
        Column("of held-out text, %", "dropped_held_out", 2, scale=100.0),
        Column("validation loss", "val_loss", 4, paired=True),
        Column("the same, nothing dropped", "val_loss_no_drop", 4),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=draw,
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
