"""Do shared and finer experts store more facts at equal total and active parameters, and what do
dropped tokens cost?

Published: dense 2.060, Switch 1.881, GShard 1.867, DeepSeekMoE 1.808 (2B, Pile); every rung of the
ladder helps; DeepSeek-V3 drops no token.
"""

from dsv3_jax.config import replace
from experiments.lab import Claim, Column, OnTask, Stake, Study, drawing
from experiments.lab.bases import NO_BALANCE
from experiments.lab.ladder import (
    DENSE,
    FINE_2,
    FINE_4,
    GSHARD,
    SHARED,
    SWITCH,
    UNSHARED_2,
    UNSHARED_4,
    ladder,
)
from experiments.lab.matching import FACTORS, scaled
from experiments.lab.measuring import late_mean, unknown_bits
from experiments.lab.tasks import Facts

# The number of experts stays.
WIDTHS = (
    "dim",
    "dense_dim",
    "kv_latent_dim",
    "nope_head_dim",
    "rope_head_dim",
    "v_head_dim",
    "expert_dim",
)
# First tokens, and second ones; the ids end at 192.
FACTS = {"half": 64, "base": 128, "double": 192}
AT_EACH_SIZE = (DENSE, GSHARD, SHARED, FINE_4, UNSHARED_2, UNSHARED_4)

CAPPED, UNBALANCED = "1 + 3 of 31, capacity 1.25", "1 + 3 of 31, no balance"
CAPPED_UNBALANCED = f"{CAPPED}, no balance"


def name_of(kind, size):
    return kind if size == "base" else f"{kind}; {size} width"


def variants(base):
    runs = {}
    for size in ("base", "half", "double"):
        run = scaled(base, FACTORS[size], WIDTHS)
        task = Facts(firsts=FACTS[size], seconds=FACTS[size])
        models = ladder(run.model, unshared=True)
        if size == "base":
            fine = models[FINE_2]
            models |= {
                CAPPED: replace(fine, capacity_factor=1.25),
                CAPPED_UNBALANCED: replace(fine, capacity_factor=1.25, balance=NO_BALANCE),
                UNBALANCED: replace(fine, balance=NO_BALANCE),
            }
        for kind, model in models.items():
            if size == "base" or kind in AT_EACH_SIZE:
                runs[name_of(kind, size)] = OnTask(task, replace(run, model=model))
    return runs


def at(size):
    """Return a function (results, variant) → bits unknown at a size, by seed."""
    return lambda results, kind: results.values(name_of(kind, size), unknown_bits)


def claim(text, variant, against, expect="lower", size="base"):
    names = name_of(variant, size), name_of(against, size)
    return Claim(text, *names, unknown_bits, expect, size)


def by_size(text, variant, against):
    return tuple(claim(f"{text}, at {size} width", variant, against, size=size) for size in FACTORS)


def stake(size):
    names = name_of(DENSE, size), name_of(GSHARD, size)
    return Stake(f"no routed expert: dense, at {size} width", *names, unknown_bits)


def shared_at(size):
    return name_of(SHARED, size), name_of(GSHARD, size)


AT_BASE = (
    *(DENSE, SWITCH, GSHARD, SHARED, FINE_2, FINE_4, UNSHARED_2, UNSHARED_4),
    *(CAPPED, CAPPED_UNBALANCED, UNBALANCED),
)
SHOWN = AT_BASE + tuple(
    name_of(kind, size)
    for size in ("half", "double")
    for kind in (GSHARD, SHARED, FINE_4, UNSHARED_4)
)


STUDY = Study(
    variants=variants,
    base="facts",
    rows=AT_BASE,
    columns=(
        Column("bits unknown, of 6", unknown_bits, 2, against=(GSHARD,)),
        Column("at half width", at("half"), 2),
        Column("at double width", at("double"), 2),
        Column("dropped in training, %", late_mean("dropped"), 2, scale=100.0),
    ),
    draw=drawing.claims_and_variants(
        {name: (name, unknown_bits) for name in SHOWN}, "bits of a fact still unknown, of 6"
    ),
    claims=(
        claim("two of sixteen store more than one of eight", GSHARD, SWITCH),
        claim("a shared expert stores more than none", SHARED, GSHARD),
        *by_size("1 + 7 of 63 store more than 2 of 16", FINE_4, GSHARD),
        *by_size("8 of 64 store more than 2 of 16, none shared", UNSHARED_4, GSHARD),
        claim("drops without balance cost facts", CAPPED_UNBALANCED, UNBALANCED, "higher"),
        claim("drops with balance cost facts", CAPPED, FINE_2, "higher"),
    ),
    stakes={size: stake(size) for size in FACTORS},
    facts={
        "0.31": lambda results: results.difference(*shared_at("half"), unknown_bits),
        "0.78": lambda results: results.difference(*shared_at("double"), unknown_bits),
        "0.42": lambda results: results.difference(CAPPED_UNBALANCED, CAPPED, unknown_bits),
        "5e-3": "a rate",
        "0.17, 2.5e-3": "trials on seed 100",
        "800, 2.3, 1,500": "runs at twice the rate, which results.json does not hold",
    },
)
