"""What does recall of many keys need of MLA: the latent's width, the rotated part, the queries'
width?

Published: MLA is at least as good as MHA, and MHA better than GQA and MQA (DeepSeek-V2); no figure
for recall.
"""

from dsv3_jax.config import replace
from dsv3_jax.model.counting import elements_per_token
from experiments.lab import Claim, Column, Stake, Study, drawing, ln
from experiments.lab.matching import matched
from experiments.lab.measuring import BITS, unknown_bits
from experiments.lab.tasks import ManyKeys

TASK = ManyKeys(planted=16)
MARGIN = 0.1  # bits of 2
MLA, MHA, NORMED, GQA, MQA = "MLA", "MHA", "MHA, QK-norm", "GQA", "MQA"
# Widths of the latent and of the rotated key; the base has 32, 16.
ROWS = ((8, 16), (2, 16), (8, 4), (4, 4), (2, 2))
ROTATED = (28, 4)  # of a head's 32 numbers, with a latent of 32; the base rotates 16
QUERIES = (16, 4)


def row(latent, key):
    return f"MLA, row of {latent} + {key}"


def rotated(width):
    return f"MLA, {width} rotated"


def queries(width):
    return f"MLA, queries from {width}"


def variants(base):
    mla = base.model
    mha = replace(mla, attention="mha")
    head = mla.nope_head_dim + mla.rope_head_dim
    models = {MLA: mla}
    models |= {
        row(c, r): replace(mla, kv_latent_dim=c, rope_head_dim=r, nope_head_dim=head - r)
        for c, r in ROWS
    }
    models |= {rotated(r): replace(mla, rope_head_dim=r, nope_head_dim=head - r) for r in ROTATED}
    models |= {queries(q): replace(mla, q_latent_dim=q) for q in QUERIES}
    models |= {MHA: mha, NORMED: replace(mha, qk_norm=True)}
    models |= {
        GQA: replace(mha, attention="gqa", num_kv_heads=2),
        MQA: replace(mha, attention="mqa"),
    }
    return {name: matched(model, mha) for name, model in models.items()}


def measure(trained):
    """Count cached numbers a token and layer, and steps until half of a value's bits are known."""
    cfg = trained.run.model
    counts = elements_per_token(cfg)
    half = TASK.chance_bits / 2 / BITS
    below = [r["step"] for r in trained.metrics() if r.get("loss", half) < half]
    cached = counts["latent"] if cfg.attention == "mla" else counts["expanded"]
    return {
        "cached": cached / cfg.num_layers,
        "steps_to_half": min(below, default=trained.run.steps),
    }


STEPS = ln("steps_to_half", "steps")


def claim(text, variant, against, expect="higher", key=unknown_bits, margin=0.0):
    return Claim(text, variant, against, key, expect, "context", margin)


def same(text, variant, against):
    return claim(f"{text}, within {MARGIN} bits", variant, against, "equal", margin=MARGIN)


STUDY = Study(
    variants=variants,
    base="many_keys",
    task=TASK,
    seeds=4,
    measure=measure,
    columns=(
        Column("numbers cached per token and layer", "cached", 0),
        Column("bits unknown, of 2", unknown_bits, 2, paired=True, against=(MHA,)),
        Column("steps to half of the bits", "steps_to_half", 0),
    ),
    draw=drawing.claims_and_variants(unknown_bits, "bits of a value unknown, of 2"),
    claims=(
        same("MLA recalls as much as MHA", MLA, MHA),
        same("a row of 8 + 4 numbers recalls as much as one of 32 + 16", row(8, 4), MLA),
        claim("a row of 2 + 2 numbers recalls less", row(2, 2), MLA),
        same("queries from 16 numbers recall as much as from all 64", queries(16), MLA),
        claim("a head that is rotated nearly whole recalls less", rotated(28), MLA),
        claim("MQA recalls less than MHA", MQA, MHA),
        claim("norms of queries and keys make MHA learn sooner", NORMED, MHA, "lower", STEPS),
        claim("MLA learns as soon as MHA or sooner", MLA, MHA, "lower", STEPS),
    ),
    stakes={"context": Stake("no context: chance", TASK.chance_bits, MLA, unknown_bits)},
    facts={"7.6": "log2(48) + 2"},
)
