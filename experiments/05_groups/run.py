"""Group-limited routing: the loss by how many groups a token may reach."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from functools import partial

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import replace
from dsv3_jax.mesh.token_exchange import mean_reach
from experiments.lab import Column, Study, drawing
from experiments.lab.claims import Claim, Stake

GROUPS = 8


def variants(base):
    cfg = base.model
    cfg = replace(
        cfg, num_experts=64, experts_per_token=6, expert_dim=cfg.experts_per_token * cfg.expert_dim // 6,
        num_groups=GROUPS, groups_per_token=GROUPS,
    )  # fmt: skip
    return {
        f"{kept} of {GROUPS} groups": replace(base, model=replace(cfg, groups_per_token=kept)) for kept in (8, 4, 2, 1)
    }


@partial(jax.jit, static_argnames="graphdef")
def expert_ids(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    return model.forward_hidden(batch["tokens"], batch["segment_ids"], batch["positions"]).routing.expert_ids


def groups_reached(ids, experts_in_group):
    """Count the groups of a token's experts: ids [..., K] → counts [...]."""
    groups = np.sort(np.asarray(ids) // experts_in_group, axis=-1)
    return 1 + (np.diff(groups, axis=-1) != 0).sum(-1)


def measure(trained):
    cfg = trained.run.model
    graphdef, state = nnx.split(trained.model)
    counts = []
    for batch in trained.held_out():
        ids = expert_ids(graphdef, state, {k: batch[k] for k in ("tokens", "segment_ids", "positions")})
        reached = groups_reached(ids, cfg.num_experts // cfg.num_groups)
        counts.append(reached[:, batch["segment_ids"] != 0])
    reached = float(np.concatenate(counts, axis=1).mean())
    even = mean_reach(cfg, cfg.num_groups)
    # A group is a device. A token is on any of the G devices, so a reached group needs no copy in 1 of G cases.
    return {"reached": reached, "reached_if_even": even, "copies": reached * (1 - 1 / cfg.num_groups)}


def draw(results, path):
    label = "groups per token, mean over held-out text and layers"
    drawing.draw_loss_by_cost(results, path, "reached", label, "Loss by traffic")


def equal(kept):
    text = f"{kept} of {GROUPS} groups have the loss of no limit, within {MARGIN} nats"
    return Claim(text, f"{kept} of {GROUPS} groups", NO_LIMIT, expect="equal", margin=MARGIN, stake="reach")


MARGIN = 0.02
NO_LIMIT = f"{GROUPS} of {GROUPS} groups"

STUDY = Study(
    script=__file__,
    question="How much loss does it cost to limit a token to a few groups of experts?",
    published="DeepSeek-V2: 3 of 8 devices is nearly as good as no limit; V3 uses 4 of 8 groups",
    variants=variants,
    measure=measure,
    columns=(
        Column("groups reached", "reached", 2),
        Column("groups reached by uniform choice", "reached_if_even", 2),
        Column("copies sent if a group is a device", "copies", 2),
        Column("validation loss", "val_loss", 4, paired=True),
        Column("MaxVio", "max_vio_global", 2),
    ),
    draw=draw,
    claims=(equal(4), equal(2), equal(1)),
    stakes={
        "reach": Stake(
            f"all experts of a token from 1 of {GROUPS} groups",
            lambda results: results.paired(f"1 of {GROUPS} groups", NO_LIMIT, "val_loss"),
        )
    },
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
