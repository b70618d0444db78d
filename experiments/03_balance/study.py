"""Does the loss-free bias balance experts better than auxiliary losses, and does balance make
dropping unnecessary?

Published: MaxVio 0.72 → 0.04 (1B, auxiliary loss → loss-free); γ 1e-4 slow, 1e-2 unstable; V3 drops
no token, thanks to its balance.
"""

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import replace
from dsv3_jax.model.moe import RouterBias
from experiments.lab import Claim, Column, Number, Stake, Study, drawing, ln, logit
from experiments.lab.bases import NO_BALANCE
from experiments.lab.measuring import compiled, late_mean

UNBALANCED = "none"
BIAS, SLOW, FAST = (f"loss-free, γ {rate}" for rate in ("3e-3", "1e-4", "1e-2"))
PROPORTIONAL, QUANTILE = "proportional, γ 1e-2", "quantile, γ 0.1"
BASELINE = "Switch loss, α 1e-3"  # the loss-free paper's
SWITCH = "Switch loss, α 1e-2"  # Switch Transformer's
SEQUENCE = "sequence-wise, α 3e-3"
BALANCES = {
    UNBALANCED: NO_BALANCE,
    BIAS: replace(NO_BALANCE, bias_rate=3e-3),
    SLOW: replace(NO_BALANCE, bias_rate=1e-4),
    FAST: replace(NO_BALANCE, bias_rate=1e-2),
    PROPORTIONAL: replace(NO_BALANCE, bias_rate=1e-2, rule="proportional"),
    QUANTILE: replace(NO_BALANCE, bias_rate=0.1, rule="quantile"),
    BASELINE: replace(NO_BALANCE, switch_alpha=1e-3),
    SWITCH: replace(NO_BALANCE, switch_alpha=1e-2),
    SEQUENCE: replace(NO_BALANCE, sequence_alpha=3e-3),
    # V3's own, whose sequence-wise loss is weak
    "loss-free + sequence-wise": replace(NO_BALANCE, bias_rate=3e-3, sequence_alpha=1e-4),
}
CAPACITY = 1.25
LIMITED, LIMITED_UNBALANCED = (f"capacity {CAPACITY}, {name}" for name in (BIAS, UNBALANCED))


def variants(base):
    models = {name: replace(base.model, balance=balance) for name, balance in BALANCES.items()}
    return models | {
        LIMITED: replace(models[BIAS], capacity_factor=CAPACITY),
        LIMITED_UNBALANCED: replace(models[UNBALANCED], capacity_factor=CAPACITY),
    }


def measure(trained):
    """Measure the range of a layer's biases; with a capacity, the share of text that it drops."""
    biases = jax.tree.leaves(nnx.state(trained.model, RouterBias))
    ranges = [np.ptp(np.asarray(b), axis=-1).ravel() for b in biases]
    numbers = {"bias_range": float(np.mean(np.concatenate(ranges)))}
    if trained.run.model.capacity_factor is not None:
        shares = [
            dropped_share(trained.model, batch["tokens"], batch["segment_ids"])
            for batch in trained.held_out()
        ]
        numbers["dropped_held_out"] = float(np.mean(shares))
    return numbers


@compiled
def dropped_share(model, tokens, segment_ids):
    """Return the dropped share of a batch's assignments, mean over layers."""
    return model.forward_hidden(tokens, segment_ids).metrics["sparse"]["dropped"].mean()


def in_domains(numbers):
    """Return MaxVio of each domain alone, mean over domains."""
    return float(np.mean(list(numbers["max_vio_by_domain"].values())))


def apart(numbers):
    """Return ln of MaxVio within domains over the mix's: how far domains have their own experts."""
    return float(np.log(in_domains(numbers) / numbers["max_vio_training_mix"]))


MAX_VIO, APART = ln("max_vio_training_mix", "MaxVio"), Number(apart, "ln ratio")
DROPPED = logit("dropped_held_out", 100_000, 1.0)  # assignments of held-out text, at least


STUDY = Study(
    variants=variants,
    measure=measure,
    columns=(
        Column("validation loss", "val_loss", 4, paired=True),
        Column("MaxVio, training mix", "max_vio_training_mix", 2),
        Column("MaxVio of a domain, mean", Number(in_domains, ""), 2),
        Column("range of biases", "bias_range", 3),
        Column("dropped in training, %", late_mean("dropped"), 2, scale=100.0),
        Column("dropped of held-out text, %", "dropped_held_out", 2, scale=100.0),
    ),
    draw=drawing.claims_and_variants(
        MAX_VIO, "MaxVio of the training mix", shown=np.exp, ticks=(0.2, 0.5, 1, 2, 5)
    ),
    claims=(
        Claim(
            "the bias balances better than its paper's auxiliary loss",
            BIAS, BASELINE, MAX_VIO, published=-2.89,
        ),
        Claim("the bias balances better than a sequence-wise loss", BIAS, SEQUENCE, MAX_VIO),
        Claim("γ 1e-4 balances worse than 3e-3", SLOW, BIAS, MAX_VIO, "higher"),
        Claim("γ 1e-2 balances worse than 3e-3", FAST, BIAS, MAX_VIO, "higher"),
        Claim(
            "steps in proportion to the error balance better than its sign",
            PROPORTIONAL, BIAS, MAX_VIO, published=-0.45,
        ),
        Claim("the quantile rule balances better than the sign", QUANTILE, BIAS, MAX_VIO),
        Claim(
            "the bias leaves domains less even than a sequence-wise loss",
            BIAS, SEQUENCE, APART, "higher",
        ),
        Claim(
            "the bias leaves domains less even than the Switch loss", BIAS, SWITCH, APART, "higher"
        ),
        Claim(
            f"balance lowers the share that a capacity of {CAPACITY} drops",
            LIMITED, LIMITED_UNBALANCED, DROPPED,
        ),
    ),
    stakes={"balance": Stake("no balance", UNBALANCED, BIAS, MAX_VIO)},
    facts={"1e5": "published", "100 steps, 500 steps": "the run's length"},
)  # fmt: skip
