"""Balancing methods and none: MaxVio over time and validation loss; bias rates of the loss-free method."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from dsv3_jax.config import Balance, replace
from dsv3_jax.model.moe import RouterBias
from experiments.lab import Column, Study, drawing, write_figure
from experiments.lab.claims import Claim, Stake

BASELINE = "Switch loss, α 1e-3"  # the loss-free paper's
NONE = Balance(bias_rate=0.0, sequence_alpha=0.0)
METHODS = {
    "none": NONE,
    BASELINE: replace(NONE, switch_alpha=1e-3),
    "sequence-wise, α 3e-3": replace(NONE, sequence_alpha=3e-3),  # DeepSeek-V2's
    "loss-free, γ 3e-3": replace(NONE, bias_rate=3e-3),
    "loss-free + sequence-wise": replace(NONE, bias_rate=3e-3, sequence_alpha=1e-4),  # DeepSeek-V3's α
}
RATES = {f"loss-free, γ {rate}": replace(NONE, bias_rate=float(rate)) for rate in ("1e-4", "1e-3", "1e-2")}


def variants(base):
    return {
        name: replace(base, model=replace(base.model, balance=balance)) for name, balance in (METHODS | RATES).items()
    }


def measure(trained):
    """Measure the range of the biases within a layer (largest − smallest), mean over layers."""
    biases = [np.ptp(np.asarray(b), axis=-1) for b in jax.tree.leaves(nnx.state(trained.model, RouterBias))]
    return {"bias_range": float(np.mean(np.concatenate([b.ravel() for b in biases])))}


def late_max_vio(results, variant):
    """Return MaxVio of a step's tokens, mean over the last fifth of training, one number per seed."""
    _, values = results.curve(variant, "max_vio")
    return values[:, -max(values.shape[1] // 5, 1) :].mean(1)


def draw(results, path):
    figure = Figure(figsize=(11, 8), layout="constrained")
    (left, right), (below, last) = figure.subplots(2, 2)
    rates = [name for name in results.variants if name in ("none", "loss-free, γ 3e-3") or name in RATES]
    drawing.plot_curves(
        left, results, "max_vio", "MaxVio of a step's tokens, by method", "(max − mean) / mean", METHODS
    )
    drawing.plot_curves(right, results, "max_vio", "The same, by bias rate", "(max − mean) / mean", rates)
    drawing.plot_differences(below, results, "val_loss", "Validation loss against none", "nats per token")
    drawing.plot_differences(last, results, "max_vio_global", "MaxVio of the validation set against none", "ratio")
    last.set_yticklabels([])
    for ax in (left, right):
        ax.set_ylim(bottom=0)
    write_figure(figure, path)


def log_max_vio(numbers):
    """Return the natural logarithm of MaxVio: its noise is then alike in balanced and unbalanced runs."""
    return float(np.log(numbers["max_vio_global"]))


def balance(text, variant, against, expect="lower", published=None):
    return Claim(text, variant, against, log_max_vio, expect, unit="ln MaxVio", digits=2, published=published)


BIAS = "loss-free, γ 3e-3"

STUDY = Study(
    script=__file__,
    question="Does the loss-free bias balance experts better than an auxiliary loss, and at a lower loss?",
    published="MaxVio 0.72 → 0.04, perplexity 9.56 → 9.50 (1B, auxiliary loss → loss-free); γ 1e-4 slow, 1e-2 unstable",
    variants=variants,
    measure=measure,
    columns=(
        Column("validation loss", "val_loss", 4, paired=True, against=(BASELINE,)),
        Column("MaxVio, validation set", "max_vio_global", 2),
        Column("MaxVio of a step, last fifth", late_max_vio, 2),
        Column("range of biases", "bias_range", 3),
    ),
    draw=draw,
    claims=(
        balance("the bias balances better than its paper's auxiliary loss", BIAS, BASELINE, published=-2.89),
        balance("the bias balances better than a sequence-wise loss", BIAS, "sequence-wise, α 3e-3"),
        balance("γ 1e-4 balances worse than 3e-3", "loss-free, γ 1e-4", BIAS, "higher"),
        balance("γ 1e-2 balances worse than 3e-3", "loss-free, γ 1e-2", BIAS, "higher"),
        Claim("the bias has a lower loss than the auxiliary loss", BIAS, BASELINE, stake="balance", published=-0.0063),
        Claim(
            "the bias has a lower loss than a sequence-wise loss",
            BIAS,
            "sequence-wise, α 3e-3",
            stake="balance",
            published=-0.005,
        ),
    ),
    stakes={"balance": Stake("no balance", lambda results: results.paired("none", BIAS, "val_loss"))},
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
