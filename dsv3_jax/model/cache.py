"""What decoding remembers of the tokens before, in what dtype, and what that costs a token.

latent    MLA's row [c_kv, k_rope] a token and layer, shared by all heads
expanded  a key and a value for each key-value head: the cache of MHA, GQA and MQA, and MLA's naive one
none      the tokens alone: every step computes all of them anew. The zero line, for comparison
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import CacheDtype, CacheKind, ModelConfig
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.quantize import quantize_rows

Kind = CacheKind
KINDS: tuple[Kind, ...] = get_args(CacheKind)
DTYPES: tuple[str, ...] = get_args(CacheDtype)
# How a mesh cuts rows and scales [L, B, G, S, X]: by sequences, and by key-value heads where a row is not for all of
# them. There they stay: a token's row is written and read on the devices that hold its sequence.
AXES = ("batch", "heads", None, None)


@partial(jax.tree_util.register_dataclass, data_fields=["stored", "tokens", "lengths"], meta_fields=["kind", "parts"])
@dataclass(frozen=True)
class Cache:
    """The cache of a batch. Row b holds `lengths[b]` tokens; what lies beyond is not read."""

    # Not annotated more closely: JAX rebuilds it with shapes and placeholders in its places.
    stored: Any  # Stored, of L layers; of none where kind is "none"
    tokens: Any  # int32 [B, S] where kind is "none", else [B, 0]
    lengths: Any  # int32 [B]
    kind: Kind
    parts: tuple[int, int]  # widths of a row's parts: (C, R), or (K, V)

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1] if self.kind == "none" else self.stored.rows.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered, free places too."""
        return sum(x.nbytes for x in (self.stored.rows, self.stored.scales, self.tokens) if x is not None)


def pick_kind(cfg: ModelConfig, kind: str | None) -> Kind:
    """The cache that a model uses: what is asked for, or the smallest that it can.

    Raises: ValueError for another kind, or a latent cache of a model that has no latent.
    """
    if kind is None:
        return "latent" if cfg.attention == "mla" else "expanded"
    for known in KINDS:
        if kind == known:
            if kind == "latent" and cfg.attention != "mla":
                raise ValueError(f"cache='latent' needs attention='mla', and the model has {cfg.attention!r}")
            return known
    raise ValueError(f"cache={kind!r} is not one of {', '.join(KINDS)}")


def pick_dtype(cfg: ModelConfig, dtype) -> jnp.dtype:
    """The dtype of cached rows; None is the model's compute dtype.

    Raises: ValueError for a dtype that is not one of DTYPES.
    """
    if dtype is None:
        return jnp.dtype(cfg.compute_dtype)
    if dtype in ("float8_e4m3", jnp.float8_e4m3fn):
        return jnp.dtype(jnp.float8_e4m3fn)
    if dtype in DTYPES or dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        return jnp.dtype(dtype)
    raise ValueError(f"cache_dtype={dtype!r} is not one of {', '.join(DTYPES)}")


def row_shape(cfg: ModelConfig, kind: Kind) -> tuple[int, tuple[int, int]]:
    """(G, parts): rows a token and layer, and the widths of a row's two parts."""
    if kind == "latent":
        return 1, (cfg.kv_latent_dim, cfg.rope_head_dim)
    return cfg.kv_heads, (cfg.nope_head_dim + cfg.rope_head_dim, cfg.v_head_dim)


def empty_cache(cfg: ModelConfig, layers: int, batch: int, capacity: int, kind: Kind, dtype) -> Cache:
    """A cache for `capacity` tokens a sequence with nothing in it."""
    groups, parts = row_shape(cfg, kind)
    if kind == "none":
        layers, dtype = 0, jnp.float32
    shape = (layers, batch, groups, capacity, sum(parts))
    scales = jnp.ones((*shape[:-1], 2), jnp.float32) if jnp.dtype(dtype).itemsize == 1 else None
    tokens = jnp.zeros((batch, capacity if kind == "none" else 0), jnp.int32)
    lengths = jnp.zeros((batch,), jnp.int32)
    return in_place(Cache(Stored(jnp.zeros(shape, dtype), scales), tokens, lengths, kind, parts))


def in_place(cache: Cache) -> Cache:
    """A cache held to where its axes' names say. For use under `jax.jit`."""
    stored = jax.tree.map(lambda x: constrain(x, *AXES), cache.stored)
    return replace(
        cache,
        stored=stored,
        tokens=constrain(cache.tokens, "batch", None),
        lengths=constrain(cache.lengths, "batch"),
    )


def fill(cache: Cache, rows: Float[Array, "L B G T X"], lengths: Int[Array, " B"]) -> Cache:
    """An empty cache filled with a prompt's rows, of which `lengths` a sequence count."""
    stored = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, 0, 0, 0)), cache.stored, _as_stored(cache, rows)
    )
    return in_place(replace(cache, stored=stored, lengths=lengths))


def write(cache: Cache, rows: Float[Array, "B G T X"], layer: Int[Array, ""]) -> Cache:
    """Put T new tokens' rows of one layer at each sequence's own place, in the buffer itself. Lengths stay."""
    zero = jnp.zeros((), jnp.int32)

    def put(b, stored):
        def one(old, new):
            new = jax.lax.dynamic_slice_in_dim(new, b, 1, 0)[None]
            return jax.lax.dynamic_update_slice(old, new, (layer, b, zero, cache.lengths[b], zero))

        return jax.tree.map(one, stored, new_rows)

    new_rows = _as_stored(cache, rows)
    return replace(cache, stored=jax.lax.fori_loop(0, rows.shape[0], put, cache.stored))


def _as_stored(cache: Cache, rows: Array) -> Stored:
    dtype = cache.stored.rows.dtype
    if cache.stored.scales is None:
        return Stored(rows.astype(dtype), None)
    return Stored(*quantize_rows(rows, cache.parts, dtype))


def elements_per_token(cfg: ModelConfig) -> dict[str, int]:
    """Numbers cached a token over all layers, by kind, and `mha`: a key and a value for each of the model's heads."""

    def of(groups: int, parts: tuple[int, int]) -> int:
        return cfg.num_layers * groups * sum(parts)

    per_head = row_shape(cfg, "expanded")[1]
    kinds: dict[str, int] = {"latent": of(*row_shape(cfg, "latent"))} if cfg.attention == "mla" else {}
    return kinds | {"expanded": of(*row_shape(cfg, "expanded")), "mha": of(cfg.num_heads, per_head)}


def bytes_per_token(cfg: ModelConfig, kind: Kind, dtype) -> int:
    """Bytes cached a token over all layers, scales of 8-bit rows included; a token's id where nothing is cached."""
    if kind == "none":
        return 4
    groups, parts = row_shape(cfg, kind)
    size = jnp.dtype(dtype).itemsize
    return cfg.num_layers * groups * (sum(parts) * size + (8 if size == 1 else 0))
