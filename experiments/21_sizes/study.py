"""Do MLA's lead over MHA and the module's gain hold at half and at double the width?

Published: MLA better than MHA at 16B and 250B (DeepSeek-V2); more tokens ahead cost small models
(Gloeckle).
"""

from dsv3_jax.config import replace
from experiments.lab import Claim, Column, Study
from experiments.lab.matching import FACTORS, scaled
from experiments.lab.parts import CONTEXT


def name_of(kind, size):
    return f"{kind}, {size} width"


def variants(base):
    runs = {}
    for size, factor in FACTORS.items():
        mla = runs[name_of("MLA", size)] = scaled(base, factor)
        # MHA learns better at half the rate, see study 01.
        slower = replace(mla.optim, learning_rate=mla.optim.learning_rate / 2)
        runs[name_of("MHA", size)] = replace(
            mla, model=replace(mla.model, attention="mha"), optim=slower
        )
        runs[name_of("MLA with a module", size)] = replace(
            mla, model=replace(mla.model, mtp_depth=1)
        )
    return runs


STUDY = Study(
    variants=variants,
    columns=(
        Column("learning rate", lambda results, variant: results.values(variant, "rate"), 4),
        Column("validation loss", "val_loss", 4),
    ),
    measure=lambda trained: {"rate": trained.run.optim.learning_rate},
    claims=(
        *(
            Claim(
                f"MLA has a lower loss than MHA with more parameters, at {size} width",
                name_of("MLA", size), name_of("MHA", size), stake="context",
            )
            for size in FACTORS
        ),
        # The papers expect no direction: more tokens ahead cost small models.
        *(
            Claim(
                f"a module lowers the next token's loss, at {size} width",
                name_of("MLA with a module", size), name_of("MLA", size), expect="none",
            )
            for size in FACTORS
        ),
    ),
    stakes={"context": CONTEXT},
    facts={"0.4": "371,400 / 1000000", "4.7": "4,706,592 / 1000000"},
)  # fmt: skip
