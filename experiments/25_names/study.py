"""Do multi-token heads bring the induction of two-token names forward?

Published: two-token prediction raises the induction of models up to 30M (arXiv 2404.19737, figure
7).
"""

import numpy as np

from dsv3_jax.config import replace
from experiments.lab import Claim, Column, Stake, Study, drawing, ln
from experiments.lab.measuring import induction, unknown_bits
from experiments.lab.statistics import estimate
from experiments.lab.tables import format_number
from experiments.lab.tasks import Names

TASK = Names(names=3, tokens=40, share=1.0)
PLAIN, MODULE, PARALLEL = "next token alone", "a module", "two parallel heads"


def variants(base):
    changes = {PLAIN: {}, MODULE: {"mtp_depth": 1}, PARALLEL: {"mtp_depth": 2, "mtp_kind": "meta"}}
    return {name: replace(base.model, **change) for name, change in changes.items()}


def run_seconds(results, variant):
    """Return the seconds of each seed's training, compiling and evaluation."""
    return np.array([record["seconds"] for record in results.records(variant)])


def seconds(results, variant):
    """Return the seconds until names have formed, by seed, if all steps take alike."""
    steps = np.array([record["steps"] for record in results.records(variant)])
    return run_seconds(results, variant) * results.values(variant, "formed") / steps


def below(results):
    """Differences in ln seconds with intervals: a step with heads takes longer."""
    sentences = []
    for name in (MODULE, PARALLEL):
        logs = [np.log(seconds(results, variant)) for variant in (name, PLAIN)]
        found = estimate(np.subtract(*logs).tolist())
        mean, low, high = (format_number(x, 2, sign=True) for x in (found.mean, *found.interval))
        share = f"{100 * np.exp(found.mean):.0f} % of the seconds"
        sentences.append(
            f"Until then, {name} against {PLAIN}: {mean} ({low} to {high}) ln seconds, {share}."
        )
    return "\n\n".join(sentences)


FORMED = ln("formed", "steps")
STUDY = Study(
    variants=variants,
    base="names",
    task=TASK,
    seeds=6,
    measure=induction,
    columns=(
        Column("step at which half is learnt", "formed", 0),
        Column("seconds until then", seconds, 0),
        Column("seconds of the run", run_seconds, 0),
        Column("bits above the optimum", "above", 3, paired=True),
    ),
    below=below,
    draw=drawing.claims_and_variants(
        FORMED, "step at which half is learnt", shown=np.exp, ticks=(100, 200, 400, 800)
    ),
    claims=(
        Claim("a module brings names forward", MODULE, PLAIN, FORMED, "lower", "pairs"),
        Claim("two parallel heads bring names forward", PARALLEL, PLAIN, FORMED, "lower", "pairs"),
    ),
    stakes={"pairs": Stake("no pair of a name", TASK.bits_without_pairs, MODULE, unknown_bits)},
    facts={
        "1.12": lambda _: TASK.best_bits,
        "1.66": lambda _: TASK.bits_without_pairs,
        "1.39": lambda _: (TASK.best_bits + TASK.bits_without_pairs) / 2,
        "41 %": "exp(-0.90)",
        "1.9 times": "130 / 69",
        "2.6 times": "182 / 69",
        "0.16": lambda results: results.values(PLAIN, "above").max(),
        "600 steps": "trials",
    },
)
