"""DeepSeekMoE's ladder: dense, one large expert, two, a shared one, finer ones; equal total and active parameters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository, for `experiments.lab`

from dsv3_jax.config import replace
from dsv3_jax.model.counting import size
from experiments.lab import ABOVE, Column, Study


def variants(base):
    # Gates are not normalised: with one expert per token the gate would always be 1, and the router would not learn.
    cfg = replace(base.model, normalize_gates=False, num_groups=1, groups_per_token=1)
    active = cfg.dense_dim // 8 * 8  # active feed-forward width per token in each layer

    def sparse(experts, chosen, shared, width):
        return replace(
            cfg, dense_dim=active, num_experts=experts, experts_per_token=chosen, num_shared_experts=shared,
            expert_dim=width,
        )  # fmt: skip

    models = {
        "dense": replace(cfg, dense_dim=active, num_dense_layers=cfg.num_layers),
        "Switch, top 1 of 8": sparse(8, 1, 0, active),
        "GShard, top 2 of 16": sparse(16, 2, 0, active // 2),
        "+ shared: 1 + 1 of 15": sparse(15, 1, 1, active // 2),
        "fine × 2: 1 + 3 of 31": sparse(31, 3, 1, active // 4),
        "fine × 4: 1 + 7 of 63": sparse(63, 7, 1, active // 8),
    }
    sizes = [size(model) for model in models.values()]
    routers = [s.parts["router and norms"] for s in sizes]  # the only part that grows with the number of experts
    assert len({s.active - r for s, r in zip(sizes, routers, strict=True)}) == 1
    assert len({s.total - r for s, r in zip(sizes[1:], routers[1:], strict=True)}) == 1
    return {name: replace(base, model=model) for name, model in models.items()}


def ours(results):
    names = list(results.variants)
    return ", ".join(f"{results.values(name, 'val_loss').mean():.3f}" for name in names) + ", in this order"


STUDY = Study(
    script=__file__,
    question="Do shared and finer experts lower the loss at equal total and active parameters?",
    published="dense 2.060, Switch 1.881, GShard 1.867, DeepSeekMoE 1.808 (2B, Pile); every rung of the ladder helps",
    variants=variants,
    columns=(
        Column("validation loss", "val_loss", 4, paired=True, against=(ABOVE,)),
        Column("bits per byte", "val_bits_per_byte", 4),
        Column("MaxVio", "max_vio_global", 2),
    ),
    ours=ours,
)

if __name__ == "__main__":
    sys.exit(STUDY.main())
