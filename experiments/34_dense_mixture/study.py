"""What does a sparse mixture give up against a dense one, and are its experts redundant?

Published: loss 1.867 with 2 of 16 experts, 1.806 with all of them (2B, Pile); without their best
experts DeepSeekMoE loses more than GShard (arXiv 2401.06066).
"""

from dsv3_jax.config import replace
from experiments.lab import Claim, Column, Number, Stake, Study, drawing
from experiments.lab.bases import NO_BALANCE
from experiments.lab.ladder import DENSE, FINE_4, GSHARD, ladder
from experiments.lab.measuring import fact_bits, skip_top, unknown_bits
from experiments.lab.tasks import Facts

ALL, THIN = "all of 16", "all of 16, an eighth as wide"
# Shares of the routed experts that a token may not use: those with its highest scores.
SHARES = (1 / 16, 2 / 16, 4 / 16)


def variants(base):
    models = ladder(base.model)
    sparse = models[GSHARD]
    everything = replace(
        sparse, router="dense", experts_per_token=sparse.num_experts, balance=NO_BALANCE
    )
    width = sparse.expert_dim * sparse.experts_per_token // sparse.num_experts
    return {name: models[name] for name in (GSHARD, DENSE, FINE_4)} | {
        ALL: everything,
        THIN: replace(everything, expert_dim=width),
    }


def measure(trained):
    """Measure what facts cost without each token's best routed experts, in bits of an answer."""
    model = trained.model
    cfg = model.cfg
    if not cfg.num_sparse_layers or cfg.router == "dense":
        return {}
    whole, cost = fact_bits(model).mean(), {}
    for share in SHARES:
        without = skip_top(model, round(share * cfg.num_experts))
        cost[name_of(share)] = float(fact_bits(without).mean() - whole)
    return {"cost": cost}


def name_of(share):
    return f"1 of {round(1 / share)}"


def cost(share):
    return Number(f"cost/{name_of(share)}", "bits")


def redundancy(share):
    return Claim(
        f"without each token's best {name_of(share)} experts, 7 of 63 and a shared one lose more "
        "than 2 of 16",
        FINE_4, GSHARD, cost(share), "higher", "experts",
    )  # fmt: skip


STUDY = Study(
    variants=variants,
    base="facts",
    task=Facts(),
    measure=measure,
    columns=(
        Column("bits unknown, of 6", unknown_bits, 2, against=(GSHARD,)),
        *(Column(f"without the best {name_of(s)}, bits more", cost(s), 2) for s in SHARES),
    ),
    draw=drawing.claims_and_variants(
        {name: (name, unknown_bits) for name in (GSHARD, FINE_4, ALL, THIN, DENSE)},
        "bits of a fact still unknown, of 6",
    ),
    claims=(
        Claim(
            "all of 16 experts store more than 2 of them",
            ALL, GSHARD, unknown_bits, stake="experts",
        ),
        Claim(
            "2 of 16 store more than 16 that all tokens use, of as many active parameters",
            GSHARD, THIN, unknown_bits, stake="experts",
        ),
        Claim(
            "16 thin experts, weighted, store more than one layer",
            THIN, DENSE, unknown_bits, "none",
        ),
        redundancy(SHARES[0]),
        redundancy(SHARES[1]),
    ),
    stakes={"experts": Stake("no routed expert: dense", DENSE, GSHARD, unknown_bits)},
    facts={"3.69": "3.75 - 0.06", "1.806, 1.867, 1.808, 0.061": "published"},
)  # fmt: skip
