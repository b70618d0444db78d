"""Does one learning rate serve all widths: for AdamW, muP and Muon, dense and mixture?

Published: with muP the best rate stays, without it falls with width (arXiv 2203.03466); so for
mixtures, but for finer experts (2508.09752).
"""

import math

import numpy as np

from dsv3_jax.config import replace
from experiments.lab import Claim, Column, MeasuredWith, Number, Stake, Study, drawing
from experiments.lab.bases import at_rate, base_run, lasting
from experiments.lab.matching import FACTORS, scaled
from experiments.lab.rates import best_rate
from experiments.lab.tables import markdown_table, mean_spread

DENSE, MIXTURE = "dense", "mixture"
ADAMW, MUP, MUON = "AdamW", "muP", "Muon"
HALF, DOUBLE = "half", "double"
# With muP the half-wide model is AdamW's: its width is the base's.
CELLS = (
    *((kind, *of) for kind in (DENSE, MIXTURE) for of in ((ADAMW, HALF), (ADAMW, DOUBLE))),
    *((kind, MUP, DOUBLE) for kind in (DENSE, MIXTURE)),
    *((MIXTURE, MUON, size) for size in (HALF, DOUBLE)),
)
TIMES = (0.35, 0.7, 2.8, 5.6, 1.4)  # the base recipe's rate; the last run measures all five
RATE = base_run("lab").optim.learning_rate
LOG_GROWTH = math.log(FACTORS[DOUBLE] / FACTORS[HALF])
LEAST = 0.05  # nats that a rate of four times the best should cost


def cell_of(kind, arm, size):
    return f"{kind}, {arm}, {size} width"


def variants(base):
    """Five runs a cell. The one at the middle rate follows the others, to measure the best rate."""
    runs, steps = {}, max(base.steps * 19 // 50, 2)
    for kind, arm, size in CELLS:
        run = scaled(base, FACTORS[size])
        if kind == DENSE:
            run = replace(run, model=replace(run.model, num_dense_layers=run.model.num_layers))
        others = []
        for times in TIMES:
            rate = times * base.optim.learning_rate
            optim = at_rate(base.optim, rate)
            if arm == MUP:
                optim = replace(optim, base_width=round(base.model.dim * FACTORS[HALF]))
            elif arm == MUON:
                optim = replace(optim, name="muon")
            made = lasting(replace(run, optim=optim), steps)
            name = cell_of(kind, arm, size)
            if times == TIMES[-1]:
                runs[name] = MeasuredWith(tuple(others), made)
            else:
                others.append(f"{name}, rate {rate:g}")
                runs[others[-1]] = made
    return runs


def measure(trained):
    """Measure the best rate of a cell, in the run at the middle rate, from its five `losses`.

    `four`: what four times the best rate costs, or a quarter of it, by the parabola.
    """
    if not trained.needed_folders:
        return {}
    losses = {trained.run.optim.learning_rate: trained.numbers["val_loss"]}
    for name, numbers in trained.needed_numbers().items():
        losses[float(name.rpartition(" ")[2])] = numbers["val_loss"]
    rates = sorted(losses)
    found = [losses[rate] for rate in rates]
    best = best_rate(rates, found)
    return {
        "rates": rates,
        "losses": found,
        "log_rate": best.log_rate,
        "curvature": best.curvature,
        "inside": best.inside,
        "four": best.cost(4),
        "dim": trained.run.model.dim,
    }


def exponent(numbers):
    """A number whose difference between the widths is the slope of ln rate on ln width."""
    return numbers["log_rate"] / LOG_GROWTH


def product(numbers):
    """The same of ln (rate × width): 0 if the best rate is divided by the width."""
    return (numbers["log_rate"] + math.log(numbers["dim"])) / LOG_GROWTH


def pair_of(kind, arm):
    """Return an arm's cell at double width, and the one at half width that its rate comes from."""
    return cell_of(kind, arm, DOUBLE), cell_of(kind, ADAMW if arm == MUP else arm, HALF)


def best_rate_of(numbers):
    return 1e3 * math.exp(numbers["log_rate"])


def rules(results):
    """Return what the rate of a rule, taken from half width, costs at double width.

    It is read off the fitted parabola.
    """
    rows = []
    for kind, arm, size in CELLS:
        if size == HALF:
            continue
        pair = pair_of(kind, arm)
        slopes = results.paired(*pair, exponent)
        curvature = results.values(pair[0], "curvature")
        for rule, wanted in (("one rate", 0), ("÷ width", -1))[: 1 + (arm == ADAMW)]:
            cost = curvature * ((slopes - wanted) * LOG_GROWTH) ** 2
            names = [f"{kind}, {arm}, {rule}", mean_spread(slopes, 2, sign=True)]
            rows.append([*names, mean_spread(cost)])
    header = ["rule for double width", "slope of the best rate on ln width", "it costs"]
    return markdown_table(header, rows)


def claim(text, kind, arm, key, expect):
    """A claim of the slope; of an equality, that it is nearer to one rule than to the other."""
    margin = 0.5 if expect == "equal" else 0.0
    return Claim(text, *pair_of(kind, arm), Number(key, ""), expect, kind, margin)


def stake(kind):
    """The check of a kind, by model and seed."""

    def cost(results):
        names = [cell_of(*cell) for cell in CELLS if cell[0] == kind]
        return np.concatenate([results.values(name, "four") for name in names]) - LEAST

    return Stake(f"{kind}, four times the best rate, less {LEAST} nats", cost=cost)


STUDY = Study(
    variants=variants,
    seeds=2,
    measure=measure,
    rows=[cell_of(*cell) for cell in CELLS],
    columns=(
        *(Column(f"loss at {RATE * x:g}", f"losses/{i}") for i, x in enumerate(sorted(TIMES))),
        Column("best rate, × 1e-3", Number(best_rate_of, ""), 2),
        Column("four times that costs", "four"),
    ),
    below=rules,
    draw=drawing.claims_and_variants(
        "log_rate", "best learning rate", shown=np.exp, ticks=(2e-3, 4e-3, 8e-3, 16e-3)
    ),
    claims=(
        claim("the best rate falls with width, dense", DENSE, ADAMW, exponent, "lower"),
        claim("the best rate falls with width, mixture", MIXTURE, ADAMW, exponent, "lower"),
        claim("the best rate × the width stays, mixture", MIXTURE, ADAMW, product, "equal"),
        claim("with muP the best rate stays, dense", DENSE, MUP, exponent, "equal"),
        claim("with muP the best rate stays, mixture", MIXTURE, MUP, exponent, "equal"),
        claim("with Muon the best rate stays, mixture", MIXTURE, MUON, exponent, "equal"),
    ),
    stakes={kind: stake(kind) for kind in (DENSE, MIXTURE)},
    facts={
        "0.2": "published",
        "8.4e-3, 2.1e-3, 3.36e-2": "1.4 times the base recipe's rate, over and times 4",
        "0.05, 0.5": "bounds of the check and of the claims, fixed before the runs",
    },
)
