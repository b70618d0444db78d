"""DeepSeekMoE's ladder, for a study of it on text and one on facts."""

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.model.counting import size

DENSE, SWITCH, GSHARD = "dense", "Switch, top 1 of 8", "GShard, top 2 of 16"
SHARED, FINE_2, FINE_4 = "+ shared: 1 + 1 of 15", "fine × 2: 1 + 3 of 31", "fine × 4: 1 + 7 of 63"
UNSHARED_2, UNSHARED_4 = "none shared: 4 of 32", "none shared: 8 of 64"


def ladder(cfg: ModelConfig, *, unshared: bool = False) -> dict[str, ModelConfig]:
    """Return the rungs, from dense to fine experts; equal total and active parameters.

    Routers are left out of the equality: they grow with the number of experts.

    Args: unshared: add rungs as fine as DeepSeekMoE's without its shared expert.
    """
    # Gates are not normalised: with one expert per token the gate would always be 1, and the router
    # would not learn.
    cfg = replace(cfg, normalize_gates=False, num_groups=1, groups_per_token=1)
    active = cfg.dense_dim // 8 * 8  # active feed-forward width per token in each layer

    def sparse(experts: int, chosen: int, shared: int, width: int) -> ModelConfig:
        return replace(
            cfg, dense_dim=active, num_experts=experts, experts_per_token=chosen,
            num_shared_experts=shared, expert_dim=width,
        )  # fmt: skip

    models = {
        DENSE: replace(cfg, dense_dim=active, num_dense_layers=cfg.num_layers),
        SWITCH: sparse(8, 1, 0, active),
        GSHARD: sparse(16, 2, 0, active // 2),
        SHARED: sparse(15, 1, 1, active // 2),
        FINE_2: sparse(31, 3, 1, active // 4),
        FINE_4: sparse(63, 7, 1, active // 8),
    }
    if unshared:
        models[UNSHARED_2] = sparse(32, 4, 0, active // 4)
        models[UNSHARED_4] = sparse(64, 8, 0, active // 8)
    sizes = [size(model) for model in models.values()]
    routers = [s.parts["router and norms"] for s in sizes]
    assert len({s.active - r for s, r in zip(sizes, routers, strict=True)}) == 1
    assert len({s.total - r for s, r in zip(sizes[1:], routers[1:], strict=True)}) == 1
    return models
