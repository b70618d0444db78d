"""How much does it cost to limit a token to a few groups of experts, and what traffic does it save?

Published: DeepSeek-V2: 3 of 8 devices is nearly as good as no limit; V3 uses 4 of 8 groups.
"""

import sys
from pathlib import Path

import numpy as np

from dsv3_jax.config import replace
from dsv3_jax.mesh.rounds import mean_reach, wire_bytes
from experiments import apart
from experiments.lab import Claim, Column, Stake, Study, drawing
from experiments.lab.measuring import expert_ids, unknown_bits
from experiments.lab.tasks import Facts

GROUPS = 8
KEPT = (8, 6, 4, 3, 2, 1)
MARGIN = 0.15  # bits of 6


def name_of(kept):
    return f"{kept} of {GROUPS} groups"


NO_LIMIT = name_of(GROUPS)


def variants(base):
    # V3's ratio: 8 experts of 64 for 8 groups. No shared expert, as it costs facts (study 11).
    cfg = replace(
        base.model, num_experts=64, experts_per_token=8, num_shared_experts=0, expert_dim=4,
        num_groups=GROUPS, groups_per_token=GROUPS,
    )  # fmt: skip
    return {name_of(kept): replace(cfg, groups_per_token=kept) for kept in KEPT}


def measure(trained):
    """Count groups that tokens reach, and what the model sends on a mesh of 8 devices."""
    cfg = trained.run.model
    ids = np.concatenate([expert_ids(trained.model, batch) for batch in trained.held_out()], axis=1)
    group_of = ids // (cfg.num_experts // GROUPS)
    reached = (group_of[..., None] == np.arange(GROUPS)).any(-2).sum(-1)
    numbers = {"reached": float(reached.mean()), "reached_if_even": mean_reach(cfg, GROUPS)}
    if trained.run.data.batch_size % GROUPS == 0:
        # In a process of its own: JAX cannot add devices to this one.
        script = Path(__file__).with_name("on_mesh.py")
        found = apart.result([sys.executable, str(script), str(trained.folder)])
        numbers |= {f"mesh_{key}": value for key, value in found.items()}
        numbers["mesh_least_bytes"] = wire_bytes(numbers["mesh_copies"], cfg, itemsize=4)
    return numbers


def equal(kept):
    text = f"{name_of(kept)} store as many facts as no limit, within {MARGIN} bits"
    return Claim(text, name_of(kept), NO_LIMIT, unknown_bits, "equal", "reach", MARGIN)


STUDY = Study(
    variants=variants,
    base="facts",
    task=Facts(),
    measure=measure,
    columns=(
        Column("bits unknown, of 6", unknown_bits, 2, paired=True),
        Column("groups reached", "reached", 2),
        Column("groups reached by uniform choice", "reached_if_even", 2),
        Column("copies sent, 8 devices", "mesh_copies", 2),
        Column("rounds of all_to_all", "mesh_rounds", 2),
        Column("bytes sent per token and layer", "mesh_bytes", 0),
        Column("of these needed", "mesh_least_bytes", 0),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=drawing.claims_and_variants(unknown_bits, "bits of a fact unknown, of 6"),
    claims=tuple(equal(kept) for kept in KEPT[1:-1]),
    stakes={
        "reach": Stake(
            f"all experts of a token from 1 of {GROUPS} groups", name_of(1), NO_LIMIT, unknown_bits
        )
    },
    facts={
        "1.25": "a setting",
        "18 %": "1 - 2287 / 2774",
        "63 %": "1 - 1.76 / 4.73",
        "0.018": "an earlier version on text, which results.json does not hold",
    },
)
