"""DeepSeekMoE's ladder of experts, from dense to fine ones; equal total and active parameters."""

from dsv3_jax.config import replace
from experiments.lab import ABOVE, Column, Study, drawing
from experiments.lab.claims import Claim, Stake
from experiments.lab.ladder import DENSE, FINE_2, FINE_4, GSHARD, SHARED, SWITCH, ladder


def variants(base):
    return {name: replace(base, model=model) for name, model in ladder(base.model).items()}


def claim(text, variant, against, published=None):
    return Claim(text, variant, against, stake="experts", published=published)


def words(results):
    return f"The finest experts against dense: {drawing.change(results, FINE_4, DENSE)} nats"


STUDY = Study(
    question="Do shared and finer experts lower the loss at equal total and active parameters?",
    published=(
        "dense 2.060, Switch 1.881, GShard 1.867, DeepSeekMoE 1.808 (2B, Pile); "
        "every rung of the ladder helps"
    ),
    variants=variants,
    draw=drawing.claims_and_variants(text=words),
    claims=(
        claim("one expert of eight is better than dense", SWITCH, DENSE, -0.179),
        claim("two of sixteen are better than one of eight", GSHARD, SWITCH, -0.014),
        claim("a shared expert is better than none", SHARED, GSHARD),
        claim("experts of half the width are better", FINE_2, SHARED),
        claim("experts of a quarter are better than of half", FINE_4, FINE_2),
        claim("half the width with a shared one is better than GShard", FINE_2, GSHARD),
        claim("the finest are better than GShard", FINE_4, GSHARD, -0.059),
        claim("the finest are better than dense", FINE_4, DENSE, -0.252),
    ),
    stakes={
        "experts": Stake(
            "no routed expert: dense", lambda results: results.paired(DENSE, FINE_4, "val_loss")
        )
    },
    columns=(
        Column("validation loss", "val_loss", 4, paired=True, against=(ABOVE,)),
        Column("bits per byte", "val_bits_per_byte", 4),
        Column("MaxVio", "max_vio_global", 2),
    ),
    facts={
        "0.252, 0.059": "published: 2.060 − 1.808 and 1.867 − 1.808",
        "0.054, 0.047": "recipe 1, which results.json does not hold",
    },
)
