"""Two rungs of the ladder at half, base and double width: finer experts, and a shared one."""

from dsv3_jax.config import replace
from experiments.lab import Column, OnTask, Study, drawing
from experiments.lab.ladder import DENSE, FINE_4, GSHARD, SHARED, ladder
from experiments.lab.matching import FACTORS, scaled
from experiments.lab.measuring import BITS, bits_claim, bits_stake, unknown_bits
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


def name_of(kind, size):
    return f"{kind}; {size} width"


def variants(base):
    runs = {}
    for size, factor in FACTORS.items():
        run, task = scaled(base, factor, WIDTHS), Facts(firsts=FACTS[size], seconds=FACTS[size])
        models = ladder(run.model)
        for kind in (DENSE, GSHARD, SHARED, FINE_4):
            runs[name_of(kind, size)] = OnTask(task, replace(run, model=models[kind]))
    return runs


def claim(text, first, second, size):
    names = name_of(first, size), name_of(second, size)
    return bits_claim(f"{text}, at {size} width", *names, stake=size)


def stake(size):
    names = name_of(DENSE, size), name_of(GSHARD, size)
    return bits_stake(
        f"no routed expert: dense, at {size} width",
        lambda results: results.paired(*names, unknown_bits),
    )


def draw(results, path):
    drawing.draw_claims(path, results, lambda: words(results))


def words(results):
    pairs = [(name_of(FINE_4, size), name_of(GSHARD, size)) for size in FACTORS]
    gains = [drawing.change(results, *pair, unknown_bits, 2) for pair in pairs]
    return (
        "1 + 7 of 63 experts against 2 of 16, from half to double width: "
        f"{', '.join(gains)} bits unknown"
    )


STUDY = Study(
    question=(
        "Do finer experts store more, and does a shared one cost facts, "
        "at half and at double the width?"
    ),
    published="finer and shared experts help from 2B to 145B parameters (DeepSeekMoE)",
    variants=variants,
    base="facts",
    columns=(
        Column("bits unknown, of 6", "val_loss", 2, scale=BITS),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=draw,
    claims=tuple(
        claim(text, first, second, size)
        for text, first, second in (
            ("1 + 7 of 63 store more than 1 + 1 of 15", FINE_4, SHARED),
            ("a shared expert stores more than none", SHARED, GSHARD),
            ("1 + 7 of 63 store more than 2 of 16", FINE_4, GSHARD),
        )
        for size in FACTORS
    ),
    stakes={size: stake(size) for size in FACTORS},
)
