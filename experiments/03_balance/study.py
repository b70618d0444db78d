"""Rules of balancing at several strengths: MaxVio against loss, on the mix and by domain."""

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import Balance, replace
from dsv3_jax.model.moe import RouterBias
from experiments.lab import Column, Study, drawing
from experiments.lab.claims import Claim, Stake
from experiments.lab.measuring import late_mean

NONE = Balance(bias_rate=0.0, sequence_alpha=0.0)
BASELINE = "Switch loss, α 1e-3"  # the loss-free paper's
BIAS, SEQUENCE, PROPORTIONAL = "loss-free, γ 3e-3", "sequence-wise, α 3e-3", "proportional, γ 1e-2"
SWITCH = "Switch loss, α 1e-2"  # Switch Transformer's
RULES = {  # rule → the strengths that it is tried at, by variant
    "sign of the load's error (loss-free)": {
        f"loss-free, γ {rate}": replace(NONE, bias_rate=float(rate))
        for rate in ("1e-4", "1e-3", "3e-3", "1e-2")
    },
    "proportional to the error": {
        f"proportional, γ {rate}": replace(NONE, bias_rate=float(rate), rule="proportional")
        for rate in ("3e-3", "1e-2", "3e-2")
    },
    "quantile": {
        f"quantile, γ {rate}": replace(NONE, bias_rate=rate, rule="quantile")
        for rate in (0.03, 0.1, 0.3)
    },
    "batch-wise loss (Switch)": {
        f"Switch loss, α {alpha}": replace(NONE, switch_alpha=float(alpha))
        for alpha in ("1e-3", "1e-2", "1e-1")
    },
    "sequence-wise loss": {
        f"sequence-wise, α {alpha}": replace(NONE, sequence_alpha=float(alpha))
        for alpha in ("3e-4", "3e-3", "3e-2")
    },
}
# The sequence-wise α is DeepSeek-V3's.
BOTH = {"loss-free + sequence-wise": replace(NONE, bias_rate=3e-3, sequence_alpha=1e-4)}


def variants(base):
    balances = {"none": NONE}
    balances |= {name: balance for rule in RULES.values() for name, balance in rule.items()}
    balances |= BOTH
    return {
        name: replace(base, model=replace(base.model, balance=balance))
        for name, balance in balances.items()
    }


def measure(trained):
    """Measure the range of the biases within a layer (largest − smallest), mean over layers."""
    biases = [
        np.ptp(np.asarray(b), axis=-1)
        for b in jax.tree.leaves(nnx.state(trained.model, RouterBias))
    ]
    return {"bias_range": float(np.mean(np.concatenate([b.ravel() for b in biases])))}


late_max_vio = late_mean("max_vio")  # of a step's tokens


def in_domains(numbers):
    """Return MaxVio of each domain alone, mean over domains."""
    return float(np.mean(list(numbers["max_vio_by_domain"].values())))


def log_max_vio(numbers):
    """Return ln MaxVio of the training mix: its noise is then alike in balanced and other runs."""
    return float(np.log(numbers["max_vio_training_mix"]))


def apart(numbers):
    """Return ln of MaxVio within domains over the mix's: how far domains have their own experts."""
    return float(np.log(in_domains(numbers) / numbers["max_vio_training_mix"]))


def words(results):
    found = [
        results.values(name, "max_vio_training_mix").mean() for name in (BIAS, BASELINE, SEQUENCE)
    ]
    text = (
        "MaxVio is {:.2f} with the bias, {:.2f} and {:.2f} with losses at their published weights"
    )
    return text.format(*found)


def balance(
    text, variant, against, expect="lower", key=log_max_vio, unit="ln MaxVio", published=None
):
    return Claim(text, variant, against, key, expect, unit=unit, digits=2, published=published)


STUDY = Study(
    question=(
        "Does the loss-free bias balance experts better than an auxiliary loss, "
        "and at a lower loss?"
    ),
    published=(
        "MaxVio 0.72 → 0.04, perplexity 9.56 → 9.50 (1B, auxiliary loss → loss-free); "
        "γ 1e-4 slow, 1e-2 unstable"
    ),
    variants=variants,
    measure=measure,
    columns=(
        Column("validation loss", "val_loss", 4, paired=True, against=(BASELINE,)),
        Column("MaxVio, training mix", "max_vio_training_mix", 2),
        Column("MaxVio, equal shares of the domains", "max_vio_global", 2),
        Column(
            "MaxVio of a domain, mean",
            lambda results, variant: results.values(variant, in_domains),
            2,
        ),
        Column("MaxVio of a step, last fifth", late_max_vio, 2),
        Column("range of biases", "bias_range", 3),
    ),
    draw=drawing.claims_and_variants(
        log_max_vio,
        "MaxVio of the training mix",
        words,
        shown=np.exp,
        ticks=(0.2, 0.5, 1, 2, 5),
    ),
    claims=(
        balance(
            "the bias balances better than its paper's auxiliary loss",
            BIAS,
            BASELINE,
            published=-2.89,
        ),
        balance("the bias balances better than a sequence-wise loss", BIAS, SEQUENCE),
        balance("γ 1e-4 balances worse than 3e-3", "loss-free, γ 1e-4", BIAS, "higher"),
        balance("γ 1e-2 balances worse than 3e-3", "loss-free, γ 1e-2", BIAS, "higher"),
        balance(
            "steps in proportion to the error balance better than its sign",
            PROPORTIONAL,
            BIAS,
            published=-0.45,
        ),
        balance("the quantile rule balances better than the sign", "quantile, γ 0.1", BIAS),
        balance(
            "the bias leaves domains less even than a sequence-wise loss",
            BIAS,
            SEQUENCE,
            "higher",
            apart,
            "ln ratio",
        ),
        balance(
            "the bias leaves domains less even than the Switch loss",
            BIAS,
            SWITCH,
            "higher",
            apart,
            "ln ratio",
        ),
        Claim(
            "at equal balance, batch-wise has a lower loss than sequence-wise",
            "Switch loss, α 1e-1",
            "sequence-wise, α 3e-2",
            published=-0.005,
        ),
        Claim(
            "the bias has a lower loss than the auxiliary loss",
            BIAS,
            BASELINE,
            stake="balance",
            published=-0.0063,
        ),
        Claim(
            "the bias has a lower loss than a sequence-wise loss",
            BIAS,
            SEQUENCE,
            stake="balance",
            published=-0.005,
        ),
    ),
    stakes={
        "balance": Stake("no balance", lambda results: results.paired("none", BIAS, "val_loss"))
    },
    facts={
        "1e5": "published",
        "100 steps, 500 steps": "the run's length",
    },
)
