"""Does an expert that begins ahead stay ahead, and does the bias take its lead away?

Published: without balance favoured experts are trained more and chosen more (arXiv 1701.06538).
"""

import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import replace
from dsv3_jax.ops import balance
from experiments.lab import Claim, Column, Number, Stake, Study, drawing, ln
from experiments.lab.bases import NO_BALANCE, lasting
from experiments.lab.ladder import GSHARD, ladder
from experiments.lab.measuring import expert_ids, fact_bits, fact_rows, unknown_bits
from experiments.lab.tasks import Facts

AHEAD, EVEN = "one expert ahead", "even"  # the first phase
NONE, BIAS = "no balance", "bias"  # the second one
FIRST = 0.2  # share of the steps that the first phase has
WINDOW = 20  # rows of load.jsonl that a mean is over


def first_ahead(bias, load, measure, rate):
    """Expert 0 is chosen by every token while γ > 0. At the end of a run γ and the bias are 0."""
    only = jnp.zeros_like(bias).at[..., 0].set(1.0)  # scores are below 1
    return jnp.where(rate > 0, only, 0.0).astype(bias.dtype)


if "first_ahead" not in balance.RULES:
    balance.register_rule("first_ahead", balance.Rule(first_ahead))


def variants(base):
    model = ladder(base.model)[GSHARD]
    steps = max(round(FIRST * base.steps), 2)
    rate = base.optim.learning_rate
    # The rate stays, for the second phase; the last step has no bias.
    optim = replace(base.optim, final_learning_rate=rate, bias_freeze=(steps - 1) / steps)
    first = lasting(replace(base, log_every=1, optim=optim), steps)
    rules = {AHEAD: replace(NO_BALANCE, bias_rate=1.0, rule="first_ahead"), EVEN: NO_BALANCE}
    found = {
        name: replace(first, model=replace(model, balance=rule)) for name, rule in rules.items()
    }
    optim = replace(base.optim, warmup_steps=1)
    second = lasting(replace(base, log_every=1, optim=optim), base.steps - steps)
    for begun in (AHEAD, EVEN):
        for name, rule in ((NONE, NO_BALANCE), (BIAS, replace(NO_BALANCE, bias_rate=1e-3))):
            run = replace(second, model=replace(model, balance=rule))
            found[name_of(begun, name)] = replace(run, start=begun)
    return found


def name_of(begun, name):
    return f"{begun}, then {name}"


def measure(trained):
    """Measure expert 0's load over the mean one, MaxVio, and what facts of rare experts lack."""
    loads = trained.loads()
    lead = np.log(np.maximum(loads[..., 0], 0.5) / loads.mean(-1)).mean(-1)  # [steps]
    vio = (loads.max(-1) / loads.mean(-1) - 1).mean(-1)
    return {
        "lead_first": float(lead[:WINDOW].mean()),
        "lead": float(lead[-WINDOW:].mean()),
        "vio": float(vio[-WINDOW:].mean()),
        "rare": rare_minus_usual(trained),
    }


def rare_minus_usual(trained):
    model = trained.model
    bits = fact_bits(model)
    batch = {"tokens": fact_rows(), "segment_ids": None, "positions": None}
    first = expert_ids(model, batch)[-1, :, 1, 0]  # of the token that is answered
    used = np.bincount(first, minlength=model.cfg.num_experts)
    least = np.argsort(used, kind="stable")[: model.cfg.num_experts // 2]
    rare = np.isin(first, least)
    return float(bits[rare].mean() - bits[~rare].mean()) if rare.any() else 0.0


WITHOUT = name_of(AHEAD, NONE), name_of(EVEN, NONE)
WITH = name_of(AHEAD, BIAS), name_of(EVEN, BIAS)
LEAD = Number("lead", "ln")
GROWTH = LEAD - "lead_first"


STUDY = Study(
    variants=variants,
    base="facts",
    task=Facts(),
    seeds=4,
    measure=measure,
    columns=(
        Column("lead of expert 0 at first, ln", "lead_first", 2),
        Column("at the end, ln", "lead", 2),
        Column("MaxVio at the end", "vio", 2),
        Column("bits unknown, of 6", unknown_bits, 2),
        Column("facts of rare experts, bits more", "rare", 2),
    ),
    draw=drawing.claims_and_variants(
        {name: (name, "lead") for name in (*WITHOUT, *WITH)},
        "ln of expert 0's load over the mean one, at the end",
    ),
    claims=(
        Claim(
            "without balance, a lead is there at the end", *WITHOUT, LEAD, "higher", "ahead"
        ),
        Claim(
            "without balance, it grows after the first phase",
            WITHOUT[0], 0.0, GROWTH, "higher", "ahead",
        ),
        Claim(
            "without balance, a lead leaves a larger MaxVio",
            *WITHOUT, ln("vio", "", least=1e-3), "higher", "ahead",
        ),
        Claim("without balance, a lead costs facts", *WITHOUT, unknown_bits, "higher", "ahead"),
        Claim("with the bias no lead is left, within 0.1", *WITH, LEAD, "equal", "ahead", 0.1),
        Claim(
            "without balance, facts of rarely used experts are known less",
            WITHOUT[1], 0.0, Number("rare", "bits"), "higher",
        ),
    ),
    stakes={
        "ahead": Stake(
            "the head start itself, at the end of the first phase", AHEAD, EVEN, LEAD
        )
    },
    facts={"1e-3": "a step size", "2.08": "the logarithm of 8"},
)  # fmt: skip
