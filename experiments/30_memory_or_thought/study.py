"""What do more experts buy: facts, or steps of reasoning?

Published: memory grows with total parameters, reasoning does not (arXiv 2508.18672); at equal total
and FLOPs, a fifth active beats dense (2506.12119).
"""

import math

import numpy as np

from dsv3_jax.config import replace
from dsv3_jax.model.counting import size
from experiments.lab import Claim, Column, MeasuredWith, Number, OnTask, Stake, Study, drawing
from experiments.lab.bases import at_rate
from experiments.lab.tasks import Facts, TwoHops

FACTS, HOPS = "facts", "two hops"
TASKS = {FACTS: Facts(), HOPS: TwoHops()}
# A task's unknown bits: of all facts, of held-out triples. Each has its own noise.
BITS = {
    FACTS: Number("bits_per_byte_by_domain/facts", "bits"),
    HOPS: Number("bits_per_byte_by_domain/held out", "bits"),
}
CHOSEN, WIDTH = 2, 16  # experts of a token, and the columns of each
EXPERTS = (8, 16, 32, 64, 128)
EQUAL = 32  # experts that "dense by total" has the columns of
BY_FLOPS, BY_TOTAL, BY_BOTH = "dense by FLOPs", "dense by total", "dense by total, equal FLOPs"
STEPS = {FACTS: 1, HOPS: 0.35}  # of the base recipe's 2,000
BUDGETS = ("half budget", "double budget")


def of(experts):
    return f"{experts} experts"


def name_of(task, kind, budget=""):
    return f"{task}: {kind}" + (f", {budget}" if budget else "")


MIXTURE, MOST = of(EQUAL), of(EXPERTS[-1])
PAIR = (MIXTURE, BY_FLOPS)  # facts at all budgets

SHOWN = {
    name_of(task, kind): (name_of(task, kind), BITS[task])
    for task in TASKS
    for kind in (BY_FLOPS, BY_TOTAL, BY_BOTH, *map(of, EXPERTS))
    if (task, kind) != (HOPS, BY_BOTH)
}
OTHER_BUDGETS = [name_of(FACTS, kind, budget) for kind in PAIR for budget in BUDGETS]


def models(cfg):
    """Return the kinds of models. None has a shared expert, and routers are not counted.

    "Dense by FLOPs" has the columns that a token uses, and "dense by total" those of 32 experts.
    """
    cfg = replace(cfg, num_shared_experts=0, normalize_gates=False)

    def dense(columns):
        return replace(cfg, num_dense_layers=cfg.num_layers, dense_dim=columns)

    mixtures = {
        of(n): replace(cfg, num_experts=n, experts_per_token=CHOSEN, expert_dim=WIDTH)
        for n in EXPERTS
    }
    return {BY_FLOPS: dense(CHOSEN * WIDTH), BY_TOTAL: dense(EQUAL * WIDTH)} | mixtures


def variants(base):
    facts, hops = (series(base, task) for task in TASKS)
    return facts | budgets(base) | hops


def series(base, task):
    """Return all kinds on a task. The run with most experts measures the slope over all."""
    made = {name_of(task, kind): on_task(base, task, kind) for kind in models(base.model)}
    fewer = tuple(name_of(task, of(n)) for n in EXPERTS[:-1])
    made[name_of(task, MOST)] = MeasuredWith(fewer, on_task(base, task, MOST))
    return made


def budgets(base):
    """Return the runs on facts that have other steps. At double budget they have the slope."""
    active = {kind: size(model).active for kind, model in models(base.model).items()}
    equal = on_task(base, FACTS, BY_TOTAL, active[MIXTURE] / active[BY_TOTAL])
    made = {name_of(FACTS, BY_BOTH): equal}
    for kind in PAIR:
        half, double = (name_of(FACTS, kind, budget) for budget in BUDGETS)
        made[half] = on_task(base, FACTS, kind, 0.5)
        made[double] = MeasuredWith((half,), on_task(base, FACTS, kind, 2))
    return made


def on_task(base, name, kind, budget=1):
    task, optim = TASKS[name], base.optim
    if name == HOPS:
        optim = at_rate(replace(optim, name="muon"), 1.2e-2)  # the rate of 23 and 25
    steps = max(round(budget * STEPS[name] * base.steps), 2)
    run = replace(
        base,
        model=models(base.model)[kind],
        data=replace(base.data, seq_len=task.length),
        optim=optim,
        steps=steps,
        eval_every=steps,
        save_every=min(base.save_every, steps),
    )
    return OnTask(task, run)


def measure(trained):
    """Measure the slope of the unknown bits over a series, of which this run is the last.

    `third` is the slope by doublings of the experts, a third of it for facts.
    """
    task = FACTS if trained.task.name == Facts.name else HOPS
    before = trained.needed_numbers().values()
    bits = [BITS[task](numbers) for numbers in (*before, trained.numbers)]
    if len(bits) == 1:
        return {}
    if len(bits) == 2:  # the budget × ½ and × 2; × 1 in their middle has no weight
        return {"growth": (bits[1] - bits[0]) / math.log(4)}
    slope = float(np.polyfit(np.log2(EXPERTS), bits, 1)[0])
    return {"doubling": slope, "third": slope / (3 if task == FACTS else 1)}


def claim(text, task, variant, against, expect="lower"):
    names = name_of(task, variant), name_of(task, against)
    return Claim(text, *names, BITS[task], expect, task)


def gained(results):
    """Return the bits of facts that experts store more than dense by FLOPs, beyond 2."""
    mixture, dense = (name_of(FACTS, kind) for kind in PAIR)
    return results.paired(dense, mixture, BITS[FACTS]) - 2


STUDY = Study(
    variants=variants,
    base="facts",
    seeds=5,  # two hops form suddenly, at steps that differ by seed
    seeds_of=dict.fromkeys([name_of(FACTS, BY_TOTAL), *OTHER_BUDGETS], 3),
    measure=measure,
    columns=(
        Column("facts unknown, of 6 bits", BITS[FACTS], 2),
        Column("held-out triples, of 4", BITS[HOPS], 2),
        Column("seen triples", "bits_per_byte_by_domain/seen", 2),
        Column("bits a doubling", "doubling", 2),
        Column("bits by ln FLOPs", "growth", 2),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=drawing.claims_and_variants(SHOWN, "bits unknown, of 6 (facts) and 4 (held-out triples)"),
    claims=(
        claim("facts: 32 experts store more than 8", FACTS, MIXTURE, of(8)),
        claim("facts: 128 experts store more than 32", FACTS, MOST, MIXTURE),
        Claim(
            "a doubling of the experts gains two hops less than a third of what it gains facts",
            name_of(HOPS, MOST), name_of(FACTS, MOST), Number("third", "bits"), "higher", HOPS,
        ),
        claim("two hops: at equal total, 32 experts know less", HOPS, MIXTURE, BY_TOTAL, "higher"),
        claim("facts: at equal total and FLOPs, 32 experts store more", FACTS, MIXTURE, BY_BOTH),
        Claim(
            "facts: what 32 experts gain over dense grows with the budget",
            *(name_of(FACTS, kind, "double budget") for kind in PAIR),
            Number("growth", "bits by ln FLOPs"), stake=FACTS,
        ),
    ),
    facts={"0.50, 3.60": "trials on seeds 100 and 101"},
    stakes={
        FACTS: Stake("no experts: dense by FLOPs, beyond 2 bits", key=BITS[FACTS], cost=gained),
        HOPS: Stake(
            "no second step: chance, against dense by total",
            TASKS[HOPS].chance_bits, name_of(HOPS, BY_TOTAL), BITS[HOPS],
        ),
    },
)  # fmt: skip
