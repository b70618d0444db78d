"""Do experts specialise by domain, and more so without an auxiliary loss?

Published: the loss-free model's experts specialise more than the auxiliary-loss model's (V3 report,
figure 9).
"""

from dsv3_jax import stats
from dsv3_jax.config import replace
from dsv3_jax.data.source import open_source
from experiments.lab import Claim, Column, Number, Stake, Study, drawing
from experiments.lab.bases import NO_BALANCE

SWITCH, SEQUENCE, BIAS = "Switch loss, α 1e-2", "sequence-wise, α 3e-3", "loss-free, γ 3e-3"
METHODS = {  # as in 03_balance, with the same runs
    SWITCH: replace(NO_BALANCE, switch_alpha=1e-2),
    SEQUENCE: replace(NO_BALANCE, sequence_alpha=3e-3),
    BIAS: replace(NO_BALANCE, bias_rate=3e-3),
    "loss-free + sequence-wise": replace(NO_BALANCE, bias_rate=3e-3, sequence_alpha=1e-4),
    "none": NO_BALANCE,
}


def variants(base):
    return {name: replace(base.model, balance=balance) for name, balance in METHODS.items()}


def measure(trained):
    """Measure I(expert; domain), I(expert; token) and I(expert; domain | token), over chance."""
    # The validation set has few English documents, so this reads half of all documents. Training
    # has not read most of them.
    cfg = replace(trained.run.data, val_fraction=0.5, seed=0)
    source = open_source(cfg, trained.tokenizer)
    batches = source.val_batches(trained.run.eval_batches)
    counts = stats.collect(trained.model, batches, source.domains)
    special = stats.specialisation(counts)
    # Shuffles for chance alone: intervals come from the seeds here.
    found = stats.information(
        counts.rows, trained.run.model.num_experts, len(counts.domains), draws=5, resamples=2
    )
    return {
        "shuffled_95": special.shuffled_95.tolist(),
        "excess_mean": float((special.bits - special.shuffled_mean).mean()),
        "share": float(special.share.mean()),
        "token": float(found.token.bits.mean()),
        "given": float(found.domain_given_token.bits.mean()),
    }


BITS, GIVEN = (Number(key, "bits", 3) for key in ("excess_mean", "given"))
TOKEN = Number("token", "bits", 3) - "excess_mean"


def more_bits(text, against, key=BITS):
    return Claim(text, BIAS, against, key, "higher", "domains")


STUDY = Study(
    variants=variants,
    measure=measure,
    columns=(
        Column(
            "bits over chance, mean of layers", "excess_mean", 4, paired=True, against=(SEQUENCE,)
        ),
        Column("the same, once the token is known", "given", 4, paired=True, against=(SEQUENCE,)),
        Column("I(expert; token)", "token", 3),
        Column("I(expert; domain), documents shuffled: 95 %, first layer", "shuffled_95/0", 4),
        Column("last layer", "shuffled_95/-1", 4),
        Column("share of H(domain), %", "share", 1, scale=100.0),
        Column("validation loss", "val_loss", 4),
    ),
    draw=drawing.claims_and_variants(
        "excess_mean", "I(expert; domain) over chance, bits, mean of layers", linear=0.1
    ),
    claims=(
        more_bits("the bias gives more specialised experts than a sequence-wise loss", SEQUENCE),
        more_bits("the bias gives more specialised experts than the Switch loss", SWITCH),
        more_bits("the bias gives more specialised experts than no balance", "none"),
        more_bits(
            "with the token given, the bias still gives more than a sequence-wise loss",
            SEQUENCE, GIVEN,
        ),
        more_bits(
            "with the token given, the bias still gives more than the Switch loss", SWITCH, GIVEN
        ),
        more_bits("an expert tells more about the token than about the domain", 0.0, TOKEN),
    ),
    stakes={"domains": Stake("documents' domains shuffled", BIAS, 0.0, BITS)},
    facts={"13 times": "1.679 / 0.1293", "1e-4": "a weight"},
)  # fmt: skip
