"""Expert capacities on a task that needs the dropped experts: 16,384 facts to store."""

from dsv3_jax.config import Balance, replace
from experiments.lab import Column, OnTask, Study, drawing
from experiments.lab.ladder import DENSE, FINE_2, ladder
from experiments.lab.measuring import BITS, bits_claim, bits_stake, late_mean, unknown_bits
from experiments.lab.tasks import Facts

NO_BALANCE = Balance(bias_rate=0.0, sequence_alpha=0.0)
NO_DROP, UNBALANCED = "no drop", "no balance"
CAPPED, CAPPED_UNBALANCED = "capacity 1.25", "capacity 1.25, no balance"


def variants(base):
    models = ladder(base.model)
    fine = models[FINE_2]
    models = {
        NO_DROP: fine,
        CAPPED: replace(fine, capacity_factor=1.25),
        CAPPED_UNBALANCED: replace(fine, capacity_factor=1.25, balance=NO_BALANCE),
        UNBALANCED: replace(fine, balance=NO_BALANCE),
        DENSE: models[DENSE],
    }
    return {name: OnTask(Facts(), replace(base, model=model)) for name, model in models.items()}


def claim(text, variant, against, expect="lower", **more):
    return bits_claim(text, variant, against, expect=expect, stake="experts", **more)


def draw(results, path):
    below = "Bits of a fact still unknown, lower is better"
    drawing.draw_claims(path, results, lambda: words(results), below=below)


def words(results):
    pairs = (CAPPED_UNBALANCED, UNBALANCED), (CAPPED, NO_DROP)
    changes = (drawing.change(results, *pair, unknown_bits, 2) for pair in pairs)
    return "Drops without balance: {} bits; with it: {}".format(*changes)


STUDY = Study(
    question=(
        "What do dropped tokens cost where the experts' knowledge is needed, "
        "and does good balance prevent it?"
    ),
    published=(
        "DeepSeek-V3 drops no token in training or inference, "
        "thanks to its balance; no figure is given"
    ),
    variants=variants,
    base="facts",
    columns=(
        Column("bits unknown, of 6", "val_loss", 2, scale=BITS, paired=True),
        Column("dropped in training, %", late_mean("dropped"), 2, scale=100.0),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=draw,
    claims=(
        claim("drops without balance cost facts", CAPPED_UNBALANCED, UNBALANCED, "higher"),
        claim("drops with balance cost facts", CAPPED, NO_DROP, "higher"),
        claim("with a capacity, balance stores more facts", CAPPED, CAPPED_UNBALANCED),
        claim("without a capacity, balance stores more facts", NO_DROP, UNBALANCED),
    ),
    stakes={
        "experts": bits_stake(
            "no routed expert: dense", lambda results: results.paired(DENSE, NO_DROP, unknown_bits)
        )
    },
)
