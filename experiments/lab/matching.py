"""Models of equal size, for studies that compare kinds of attention."""

from dsv3_jax.config import ModelConfig, replace
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
