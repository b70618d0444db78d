"""Which rule of balance follows a change of the data, and what does it drop meanwhile?

Published: none of a change of the mix; loss-free balance moves by γ a step (arXiv 2408.15664),
quantile balancing needs no γ (J. Su; Marin 32B-A5B).
"""

import numpy as np

from dsv3_jax import stats
from dsv3_jax.config import replace
from experiments.lab import Claim, Column, Number, OnTask, Stake, Study, drawing, ln
from experiments.lab.bases import NO_BALANCE
from experiments.lab.measuring import asked_load, overflow, steps_until, unknown_bits
from experiments.lab.tasks import ShiftingDomains

SIGN, FAST_SIGN, PROPORTIONAL = "sign, γ 1e-3", "sign, γ 1e-2", "proportional, γ 1e-2"
QUANTILE, FULL_QUANTILE = "quantile, γ 0.1", "quantile, γ 1"
SWITCH, EIGHTHS = "Switch loss, batch", "Switch loss, eighths of it"
SEQUENCE = "sequence-wise loss"
RULES = {
    "none": NO_BALANCE,
    SIGN: replace(NO_BALANCE, bias_rate=1e-3),
    FAST_SIGN: replace(NO_BALANCE, bias_rate=1e-2),
    PROPORTIONAL: replace(NO_BALANCE, bias_rate=1e-2, rule="proportional"),
    QUANTILE: replace(NO_BALANCE, bias_rate=0.1, rule="quantile"),
    FULL_QUANTILE: replace(NO_BALANCE, bias_rate=1.0, rule="quantile"),
    SWITCH: replace(NO_BALANCE, switch_alpha=1e-1),
    EIGHTHS: replace(NO_BALANCE, switch_alpha=1e-1),
    SEQUENCE: replace(NO_BALANCE, sequence_alpha=1e-1),
}
PARTS = 8  # microbatches of EIGHTHS, each with its own Switch loss
BLOCKS, CAPACITY = ", blocks of one domain", ", capacity 1.25"
IN_BLOCKS = ("none", SIGN, FAST_SIGN, FULL_QUANTILE)
WITH_CAPACITY = ("none", SIGN, FULL_QUANTILE)
FACTOR = 1.25  # of the capacity

AROUND = 100  # steps before and after the change that means are over
BOUND = 0.5  # the load is even again if five steps have this MaxVio in their mean


def variants(base):
    even = base.steps // 2
    task = ShiftingDomains(count=16, words=224, pairs=16, even=even, favoured=2, share=0.9)
    blocks = replace(task, favoured=1, share=1.0, block=max(even // 16, 1))
    # As many tokens a step as the base recipe has; each step logs its load.
    base = replace(
        base,
        model=replace(base.model, max_positions=64),
        data=replace(base.data, seq_len=task.length, batch_size=base.data.batch_size // 2),
        log_every=1,
    )

    def run(name, factor=None):
        model = replace(base.model, balance=RULES[name], capacity_factor=factor)
        parts = PARTS if name == EIGHTHS else 1
        return replace(base, model=model, optim=replace(base.optim, microbatches=parts))

    return (
        {name: OnTask(task, run(name)) for name in RULES}
        | {name + BLOCKS: OnTask(blocks, run(name)) for name in IN_BLOCKS}
        | {name + CAPACITY: OnTask(task, run(name, FACTOR)) for name in WITH_CAPACITY}
    )


def measure(trained):
    """Measure MaxVio and drops around the change, steps until even, and bits of the new mix."""
    task, loads = trained.task, trained.loads()[:, 0]  # of the one layer
    vio = loads.max(-1) / loads.mean(-1) - 1
    dropped = 100 * overflow(loads, FACTOR)
    near = slice(task.even, task.even + AROUND)
    numbers = {
        "before": float(vio[max(task.even - AROUND, 0) : task.even].mean()),
        "after": float(vio[near].mean()),
        "dropped": float(dropped[near].mean()),
        "information": float(stats.mutual_information(asked_load(trained))),
    }
    if task.block is not None:  # the mix changes again and again
        return numbers

    bits = trained.numbers["bits_per_byte_by_domain"]  # a word is a byte
    mix = dict(zip(task.domains, task.mix(task.even), strict=True))
    numbers["new_bits"] = float(sum(mix[name] * bits[name] for name in bits))
    if trained.run.model.balance != NO_BALANCE:
        numbers["back"] = steps_until(vio[task.even :], BOUND)
    return numbers


BACK, DROPPED = ln("back", "steps"), ln("dropped", "%", least=1e-3)
ROSE = ln(lambda numbers: numbers["after"] / numbers["before"], "MaxVio")


STUDY = Study(
    variants=variants,
    base="domains",
    seeds=5,
    seeds_of={"none": 8},
    measure=measure,
    columns=(
        Column("MaxVio before", "before", 2),
        Column("MaxVio after", "after", 2),
        Column("steps until even", "back", 0),
        Column("beyond capacity, %", "dropped", 2),
        Column("bits unknown, new mix", "new_bits", 3),
        Column("bits unknown, even mix", unknown_bits, 2),
        Column("I(expert; domain), bits", "information", 2),
    ),
    draw=drawing.claims_and_variants(
        DROPPED, "beyond capacity, %", shown=np.exp, ticks=(0.5, 1, 2, 5, 10, 20)
    ),
    claims=(
        Claim(
            "the load is even again sooner by quantile, γ 1, than by sign, γ 1e-3",
            FULL_QUANTILE, SIGN, BACK, stake="change",
        ),
        Claim(
            "quantile, γ 1, would drop fewer than sign, γ 1e-2, after the change",
            FULL_QUANTILE, FAST_SIGN, DROPPED, stake="change",
        ),
        Claim(
            "sign, γ 1e-3, would drop fewer than a Switch loss after the change",
            SIGN, SWITCH, DROPPED, stake="change",
        ),
        Claim(
            "in blocks of one domain, quantile, γ 1, would drop fewer than sign, γ 1e-3",
            FULL_QUANTILE + BLOCKS, SIGN + BLOCKS, DROPPED, stake="blocks",
        ),
        Claim(
            "without balance, a capacity costs bits of the new mix",
            "none" + CAPACITY, "none", Number("new_bits", "bits", 3), "higher", "change",
        ),
        Claim(
            "a Switch loss over the batch divides the domains more than over eighths of it",
            SWITCH, EIGHTHS, Number("information", "bits"), "higher",
        ),
    ),
    stakes={
        "change": Stake("the change of the mix, without balance", "none", 0.0, ROSE),
        "blocks": Stake("blocks of one domain, without balance", "none" + BLOCKS, 0.0, ROSE),
    },
    facts={
        "90 %, 0.1, 0.5, 1.25": "settings",
        "0.86, 0.92": "single runs with seed 100",
    },
)  # fmt: skip
