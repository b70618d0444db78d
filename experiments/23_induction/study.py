"""When does induction form, and do multi-token heads or Muon bring it forward?

Published: two-token prediction raises the induction of models up to 30M (arXiv 2404.19737, figure
7).
"""

import itertools

import numpy as np

from dsv3_jax.config import replace
from experiments.lab import Claim, Column, OnTask, Stake, Study, drawing, ln
from experiments.lab.bases import at_rate
from experiments.lab.matching import FACTORS, scaled
from experiments.lab.measuring import induction, unknown_bits
from experiments.lab.tasks import Chains

TOKENS = Chains()  # the last token chooses what follows
TWO = Chains(states=3, order=2, tokens=96)  # the last two tokens do
ADAMW, MUON = "AdamW", "Muon"
MODULE, PARALLEL = "a module", "two parallel heads"
OF_TWO = ", order 2"
SIZES = {", half width": "half", "": "base", ", double width": "double"}
WIDTHS = ("dim", "dense_dim", "kv_latent_dim", "nope_head_dim", "rope_head_dim", "v_head_dim")
RATES = {ADAMW: 6e-3, MUON: 1.2e-2}  # chosen on seed 100, see README.md


def variants(base):
    def run(optimizer, task=TOKENS, size="base", **heads):
        made = replace(
            base,
            optim=at_rate(replace(base.optim, name=optimizer.lower()), RATES[optimizer]),
            data=replace(base.data, seq_len=task.length),
            model=replace(base.model, **heads),
        )
        return OnTask(task, scaled(made, FACTORS[size], WIDTHS))

    module, parallel = {"mtp_depth": 1}, {"mtp_depth": 2, "mtp_kind": "meta"}
    made = {}
    for optimizer in (ADAMW, MUON):
        made |= {
            optimizer: run(optimizer),
            f"{optimizer}, {MODULE}": run(optimizer, **module),
            f"{optimizer}, {PARALLEL}": run(optimizer, **parallel),
        }
    for optimizer, (name, size) in itertools.product(RATES, SIZES.items()):
        if name:  # the base width is there
            made[optimizer + name] = run(optimizer, size=size)
    return made | {
        MUON + OF_TWO: run(MUON, TWO),
        f"{MUON}, {MODULE}{OF_TWO}": run(MUON, TWO, **module),
    }


FORMED = ln("formed", "steps")


def sooner(text, variant, against):
    return Claim(text, variant, against, FORMED, "lower", "pairs")


STUDY = Study(
    variants=variants,
    base="chains",
    measure=induction,
    columns=(
        Column("step at which half is learnt", "formed", 0),
        Column("bits above the optimum", "above", 3, paired=True, against=(MUON,)),
    ),
    draw=drawing.claims_and_variants(
        FORMED, "step at which half is learnt", shown=np.exp, ticks=(100, 200, 400)
    ),
    claims=(
        *(
            sooner(f"Muon finds induction sooner than AdamW{size}", MUON + size, ADAMW + size)
            for size in SIZES
        ),
        sooner("with AdamW, a module brings it forward", f"{ADAMW}, {MODULE}", ADAMW),
        sooner("with AdamW, two parallel heads bring it forward", f"{ADAMW}, {PARALLEL}", ADAMW),
        sooner("with Muon, a module brings it forward", f"{MUON}, {MODULE}", MUON),
        sooner("with Muon, two parallel heads bring it forward", f"{MUON}, {PARALLEL}", MUON),
        sooner(
            "with Muon, a module brings order 2 forward", f"{MUON}, {MODULE}{OF_TWO}", MUON + OF_TWO
        ),
    ),
    stakes={"pairs": Stake("counts of tokens alone", TOKENS.bits_of_order(0), MUON, unknown_bits)},
    facts={
        "1.24": lambda _: (TOKENS.bits_of_order(0) + TOKENS.best_bits) / 2,
        "1.50": lambda _: TOKENS.bits_of_order(0),
        "0.98": lambda _: TOKENS.best_bits,
        "1.02": lambda _: TWO.bits_of_order(1),
        "0.70": lambda _: TWO.best_bits,
        "13 %": "1 - 343 / 393",
        "6e-3, 320, 2.4e-2": "trials on seed 100",
    },
)
