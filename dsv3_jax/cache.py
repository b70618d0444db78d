"""What decoding remembers: a latent row [c_kv, k_rope] a token and layer, and what that costs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig


class LatentCache(NamedTuple):
    """The latent cache of a batch. Row b holds `lengths[b]` tokens; what lies beyond is not read."""

    rows: Array  # [L, B, S, C+R]
    lengths: Array  # int32 [B]

    @property
    def capacity(self) -> int:
        return self.rows.shape[2]


def latent_cache(cfg: ModelConfig, batch: int, capacity: int, dtype) -> LatentCache:
    """An empty cache for `capacity` tokens a row."""
    shape = (cfg.num_layers, batch, capacity, cfg.kv_latent_dim + cfg.rope_head_dim)
    return LatentCache(jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))


def fill(cache: LatentCache, rows: Float[Array, "L B T CR"], lengths: Int[Array, " B"]) -> LatentCache:
    """An empty cache filled with a prompt's rows, of which `lengths` a row count."""
    return LatentCache(jax.lax.dynamic_update_slice(cache.rows, rows.astype(cache.rows.dtype), (0, 0, 0, 0)), lengths)


def write(
    rows: Float[Array, "L B S CR"], new: Float[Array, "B T CR"], layer: Int[Array, ""], at: Int[Array, " B"]
) -> Float[Array, "L B S CR"]:
    """Put T new tokens' rows of one layer at each batch row's own place `at`, in the buffer itself."""

    def put(b, rows):
        one = jax.lax.dynamic_slice_in_dim(new, b, 1, 0)[None].astype(rows.dtype)
        return jax.lax.dynamic_update_slice(rows, one, (layer, b, at[b], 0))

    return jax.lax.fori_loop(0, new.shape[0], put, rows)


def elements_per_token(cfg: ModelConfig) -> dict[str, int]:
    """Numbers cached a token over all layers: `latent` (MLA), `mha` (the same heads' keys and values, expanded)."""
    latent = cfg.num_layers * (cfg.kv_latent_dim + cfg.rope_head_dim)
    per_head = cfg.nope_head_dim + cfg.rope_head_dim + cfg.v_head_dim
    return {"latent": latent, "mha": cfg.num_layers * cfg.num_heads * per_head}
