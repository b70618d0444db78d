"""What does each rule of balancing do to experts whose right division is known?

Published: batch-wise loss and bias 2.253, sequence-wise 2.258 (1B, V3 report, section 4.5.3).
"""

from dsv3_jax import stats
from dsv3_jax.config import replace
from experiments.lab import Claim, Column, Number, OnTask, Stake, Study, drawing
from experiments.lab.bases import NO_BALANCE
from experiments.lab.measuring import asked_load, unknown_bits
from experiments.lab.tasks import Domains

MIXED = Domains(count=16, words=224)
TOGETHER = replace(MIXED, together=True)
WEIGHTS = ("1e-3", "1e-2", "1e-1")
RULES = {
    "none": NO_BALANCE,
    **{f"bias, γ {g}": replace(NO_BALANCE, bias_rate=float(g)) for g in ("1e-4", "1e-3", "1e-2")},
    **{f"batch-wise, α {a}": replace(NO_BALANCE, switch_alpha=float(a)) for a in WEIGHTS},
    **{f"sequence-wise, α {a}": replace(NO_BALANCE, sequence_alpha=float(a)) for a in WEIGHTS},
}
BIAS, BATCH = "bias, γ 1e-3", "batch-wise, α 1e-1"
SEQUENCE, STRONG = "sequence-wise, α 1e-2", "sequence-wise, α 1e-1"
ONE_DOMAIN = ", batches of one domain"


def variants(base):
    models = {name: replace(base.model, balance=balance) for name, balance in RULES.items()}
    apart = {
        name + ONE_DOMAIN: OnTask(TOGETHER, models[name]) for name in ("none", BIAS, BATCH, STRONG)
    }
    # The feed-forward layer of one expert, which every token uses.
    cfg = base.model
    dense = replace(cfg, num_dense_layers=cfg.num_layers, dense_dim=cfg.expert_dim)
    return models | apart | {"dense": dense}


def measure(trained):
    """Measure I(expert; domain) of the asked tokens x."""
    if not trained.run.model.num_sparse_layers:
        return {}
    return {"information": float(stats.mutual_information(asked_load(trained)))}


INFORMATION = Number("information", "bits")


def fewer(text, variant, against):
    return Claim(text, variant, against, unknown_bits, "lower", "experts")


def divides(text, variant, against):
    return Claim(text, variant, against, INFORMATION, "higher")


STUDY = Study(
    variants=variants,
    base="domains",
    task=MIXED,
    seeds=5,
    measure=measure,
    columns=(
        Column("bits unknown, of 7.8", unknown_bits, 2, paired=True),
        Column("I(expert; domain), bits", "information", 2),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=drawing.claims_and_variants("information", "I(expert; domain), bits of 4"),
    claims=(
        divides("the bias divides the domains more than a sequence-wise loss", BIAS, SEQUENCE),
        divides(
            "a batch-wise loss divides the domains more than a sequence-wise loss", BATCH, STRONG
        ),
        fewer("the bias stores more than a sequence-wise loss", BIAS, SEQUENCE),
        fewer("the bias stores more than a strong sequence-wise loss", BIAS, STRONG),
        fewer("batch-wise stores more than sequence-wise of the same weight", BATCH, STRONG),
        fewer("the bias stores more than no balance", BIAS, "none"),
        divides(
            "on batches of one domain, the bias divides more than batch-wise",
            BIAS + ONE_DOMAIN, BATCH + ONE_DOMAIN,
        ),
        fewer(
            "on batches of one domain, the bias stores more than batch-wise",
            BIAS + ONE_DOMAIN, BATCH + ONE_DOMAIN,
        ),
        Claim(
            "on batches of one domain, batch-wise divides no more than sequence-wise, "
            "within 0.1 bits",
            BATCH + ONE_DOMAIN, STRONG + ONE_DOMAIN, INFORMATION, "equal", margin=0.1,
        ),
    ),
    stakes={"experts": Stake("one expert for all tokens: dense", "dense", BIAS, unknown_bits)},
    facts={"0.005": "published: 2.258 − 2.253"},
)  # fmt: skip
