"""From a dense run, when does a mixture from scratch overtake an upcycled one?

Published: copies lead at first, train more slowly than from scratch and stay alike; with half of
their units at random they do not (2502.19261).
"""

from pathlib import Path

from dsv3_jax.config import replace
from dsv3_jax.model.upcycle import Upcycling, upcycled_config
from dsv3_jax.runs.convert import convert
from experiments.lab import Claim, Column, Number, OnTask, Stake, Study, drawing
from experiments.lab.bases import lasting, make_tokenizer, text_beside
from experiments.lab.measuring import BITS, alike, fact_bits, fact_rows
from experiments.lab.tasks import Facts

FACTS = Facts()
FIRST_HALF = Facts(firsts=FACTS.firsts // 2)  # of the same table: its rows are the first ones
DENSE, SMALL = "dense, first half", "2 of 8 narrow, first half"
FURTHER, SCRATCH = "dense further", "from scratch"
COPIES, DRAWN, GROUPS = "copies", "half at random", "virtual groups"
GROWN, SCRATCH_32 = "8 → 32 narrow", "32 narrow from scratch"
# What is made of a run, by variant.
WAYS = {
    COPIES: Upcycling(8),
    DRAWN: Upcycling(8, redrawn=0.5),
    GROUPS: Upcycling(32, parts=4),
    GROWN: Upcycling(32),
}
BUDGETS = {"× ½": 0.5, "× 1": 1, "× 2": 2}  # of the base's steps
MOST = (COPIES, DRAWN, SCRATCH)  # with all budgets
ONCE = (FURTHER, GROUPS, GROWN, SCRATCH_32)
TEXT_DENSE = "text: dense"
TEXT_BUDGETS = ("× ½", "× 1")


def place_of(parent, how):
    """The folder of a mixture that is made of a run. It says how; the seed is the run's."""
    return f"{parent}/upcycled-{how.experts}-{how.parts}-{how.redrawn}"


def make_start(run):
    """Make the mixture that a run starts with, of the run whose folder it is in."""
    place = Path(run.start)
    for how in WAYS.values():
        if place_of(place.parent, how) == str(place) and not place.exists():
            convert(place.parent, place, quiet=True, upcycling=replace(how, seed=run.seed))


def within(run, budget):
    return lasting(run, max(round(run.steps * BUDGETS[budget]), 1))


def variants(base):
    dense = replace(base.model, num_dense_layers=base.model.num_layers)
    narrow = replace(
        base.model, num_experts=8, experts_per_token=2, num_shared_experts=0, expert_dim=8
    )
    ways = {  # the model, and what it starts with
        FURTHER: (dense, DENSE),
        SCRATCH: (upcycled_config(dense, WAYS[COPIES]), None),
        SCRATCH_32: (upcycled_config(narrow, WAYS[GROWN]), None),
    }
    for way, how in WAYS.items():
        model, parent = (narrow, SMALL) if way == GROWN else (dense, DENSE)
        ways[way] = upcycled_config(model, how), place_of(parent, how)

    found = {DENSE: OnTask(FIRST_HALF, dense), SMALL: OnTask(FIRST_HALF, narrow)}
    pairs = [(way, budget) for budget in BUDGETS for way in MOST]
    for way, budget in (*pairs, *((way, "× 1") for way in ONCE)):
        model, start = ways[way]
        found[f"{way}, {budget}"] = replace(within(base, budget), model=model, start=start)
    return found | on_text(base)


def on_text(base):
    """The dense model of the text's recipe, copies of it, and the same from scratch."""
    run = text_beside(base)
    dense = replace(run.model, num_dense_layers=run.model.num_layers, dense_dim=128)
    runs = {TEXT_DENSE: replace(run, model=dense)}
    for budget in TEXT_BUDGETS:
        scratch = replace(within(run, budget), model=upcycled_config(dense, WAYS[COPIES]))
        copies = replace(scratch, start=place_of(TEXT_DENSE, WAYS[COPIES]))
        runs |= {f"text: {COPIES}, {budget}": copies, f"text: {SCRATCH}, {budget}": scratch}
    return {name: OnTask(None, run) for name, run in runs.items()}


def prepare(base, root):
    make_tokenizer(text_beside(base), root)


def measure(trained):
    """Facts: bits unknown of all, and of each half; how alike experts are. Text: its loss."""
    if trained.task is None:
        return {"nats": trained.numbers["val_loss"]}
    bits = fact_bits(trained.model)
    old = fact_rows()[:, 0] < FIRST_HALF.firsts
    numbers = {"first": float(bits[old].mean()), "second": float(bits[~old].mean())}
    if trained.task == FACTS:
        numbers["bits"] = trained.numbers["val_loss"] * BITS
    if trained.model.cfg.num_sparse_layers:
        numbers["alike"] = alike(trained.model)
    return numbers


def at(budget, way, against):
    return f"{way}, {budget}", f"{against}, {budget}"


UNKNOWN = Number("bits", "bits")


def claim(text, budget, way, against):
    return Claim(text, *at(budget, way, against), UNKNOWN, stake="experts")


HALF, ONE, TWO = BUDGETS
STUDY = Study(
    variants=variants,
    base="facts",
    task=FACTS,
    prepare=prepare,
    make_start=make_start,
    measure=measure,
    columns=(
        Column("bits unknown, of 6", "bits", 2),
        Column("of the first half", "first", 2),
        Column("of the second half", "second", 2),
        Column("likeness of experts", "alike", 2),
        Column("validation loss of text, nats", "nats", 3),
    ),
    draw=drawing.claims_and_variants("bits", "facts: bits unknown, of 6"),
    claims=(
        claim("at half the budget copies store more than from scratch", HALF, COPIES, SCRATCH),
        claim("at twice the budget from scratch stores more than copies", TWO, SCRATCH, COPIES),
        claim("at twice the budget half at random stores more than copies", TWO, DRAWN, COPIES),
        Claim(
            "at twice the budget copies are more alike than experts from scratch",
            *at(TWO, COPIES, SCRATCH), Number("alike", ""), "higher",
        ),
        claim("8 → 32 narrow experts store more than 32 from scratch", ONE, GROWN, SCRATCH_32),
        Claim(
            "on text, at half the budget, copies have a lower loss than from scratch",
            *at(HALF, f"text: {COPIES}", f"text: {SCRATCH}"), "nats",
        ),
    ),
    stakes={
        "experts": Stake(
            "no experts: dense further against from scratch, × 1",
            *at(ONE, FURTHER, SCRATCH), UNKNOWN,
        )
    },
)  # fmt: skip
