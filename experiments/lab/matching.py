"""Models of equal size, to compare kinds of attention, and the same model at several sizes."""

from collections.abc import Sequence

from dsv3_jax.config import ModelConfig, RunConfig, replace
from dsv3_jax.model.counting import size


def matched(cfg: ModelConfig, like: ModelConfig) -> ModelConfig:
    """Return `cfg` with as many parameters as `like`, up to half a column of the dense layers.

    The width of the dense layers makes up for the difference.
    """
    column = 3 * cfg.dim * cfg.num_dense_layers
    missing = size(like).total - size(cfg).total
    widened = replace(cfg, dense_dim=cfg.dense_dim + round(missing / column))
    for count in ("total", "active"):
        assert abs(getattr(size(widened), count) - getattr(size(like), count)) <= column / 2
    return widened


# Those of a recipe of text. Heads' own widths and the number of experts stay.
WIDTHS = ("dim", "dense_dim", "num_heads", "q_latent_dim", "kv_latent_dim", "expert_dim")
FACTORS = {"half": 0.5, "base": 1, "double": 2}  # of the base recipe's widths


def scaled(base: RunConfig, factor: float, widths: Sequence[str] = WIDTHS) -> RunConfig:
    """Return the run with named widths times a factor, and learning rates divided by it."""
    rate, last = (r / factor for r in (base.optim.learning_rate, base.optim.final_learning_rate))
    model = replace(
        base.model, **{name: round(getattr(base.model, name) * factor) for name in widths}
    )
    return replace(
        base, model=model, optim=replace(base.optim, learning_rate=rate, final_learning_rate=last)
    )
