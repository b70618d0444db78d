"""DeepSeekMoE's ladder on 16,384 facts to store, more than the dense model can."""

from dsv3_jax.config import replace
from experiments.lab import ABOVE, Column, OnTask, Study, drawing
from experiments.lab.ladder import DENSE, FINE_2, FINE_4, GSHARD, SHARED, SWITCH, ladder
from experiments.lab.measuring import BITS, bits_claim, bits_stake, unknown_bits
from experiments.lab.tasks import Facts


def variants(base):
    return {
        name: OnTask(Facts(), replace(base, model=model))
        for name, model in ladder(base.model).items()
    }


def claim(text, variant, against):
    return bits_claim(text, variant, against, stake="facts")


def draw(results, path):
    below = "Bits of a fact still unknown, lower is better"
    drawing.draw_claims(path, results, lambda: words(results), below=below)


def words(results):
    pairs = (SWITCH, DENSE), (SHARED, GSHARD), (FINE_4, GSHARD)
    changes = (drawing.change(results, *pair, unknown_bits, 2) for pair in pairs)
    words = (
        "One expert of eight against dense: {} bits; "
        "1 + 1 of 15 against 2 of 16: {}; 1 + 7 of 63: {}"
    )
    return words.format(*changes)


STUDY = Study(
    question="Do shared and finer experts store more facts at equal total and active parameters?",
    published=(
        "dense 2.060, Switch 1.881, GShard 1.867, DeepSeekMoE 1.808 (2B, Pile); "
        "every rung of the ladder helps"
    ),
    variants=variants,
    base="facts",
    columns=(
        Column("bits unknown, of 6", "val_loss", 2, scale=BITS, paired=True, against=(ABOVE,)),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=draw,
    claims=(
        claim("one expert of eight stores more than dense", SWITCH, DENSE),
        claim("two of sixteen store more than one of eight", GSHARD, SWITCH),
        claim("a shared expert stores more than none", SHARED, GSHARD),
        claim("1 + 3 of 31 store more than 1 + 1 of 15", FINE_2, SHARED),
        claim("1 + 7 of 63 store more than 1 + 3 of 31", FINE_4, FINE_2),
        claim("the finest, 1 + 7 of 63, store more than dense", FINE_4, DENSE),
        claim("the finest store more than two of sixteen", FINE_4, GSHARD),
    ),
    stakes={
        "facts": bits_stake(
            "no routed expert: dense", lambda results: results.paired(DENSE, SWITCH, unknown_bits)
        )
    },
    facts={
        "0.037": "3.6753 - 3.6385",
        "5e-3": "a rate",
        "0.17, 2.5e-3": "trials on seed 100",
        "800, 2.3, 1,500": "runs at twice the rate, which results.json does not hold",
    },
)
