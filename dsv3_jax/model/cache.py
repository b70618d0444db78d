"""The caches of decoding: rows of earlier tokens, in several kinds and dtypes, and their cost a token.

latent    MLA's row [c_kv, k_rope] a token and layer, shared by all heads
expanded  a key and a value for each key-value head: the cache of MHA, GQA and MQA, and MLA's naive one

A model reads prompts with `cache.prefill` and further tokens with `cache.step`, whatever the kind. "none" is no cache:
`decoding/without_cache.py` recomputes all tokens each step.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import CacheDtype, CacheKind, ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.quantize import quantize_rows

CACHE_KINDS: tuple[CacheKind, ...] = ("latent", "expanded")
CACHE_DTYPES: tuple[str, ...] = get_args(CacheDtype)
# How a mesh shards rows and scales [L, B, G, S, X]: by sequences, and expanded rows by key-value heads. They stay
# there: a token's row is written and read on the devices that hold its sequence.
ROW_AXES = ("batch", "heads", None, None)


@runtime_checkable
class Layers(Protocol):
    """A model as a cache needs it: it runs its layers over tokens."""

    def run_layers(self, tokens: Any, cache: Any, weights: Any = None) -> tuple[Any, Any]: ...


@partial(jax.tree_util.register_dataclass, data_fields=["stored", "lengths"], meta_fields=["kind", "parts", "is_empty"])
@dataclass(frozen=True)
class Cache:
    """The rows of a batch. Sequence b holds `lengths[b]` tokens; slots beyond are not read.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cache = empty_cache(preset("tiny"), layers=1, batch=2, capacity=8, kind="latent", dtype="float32")
        >>> cache.capacity, cache.parts, cache.positions(3).tolist()  # C = 32 and R = 16 numbers a token
        (8, (32, 16), [[0, 1, 2], [0, 1, 2]])
    """

    # Not annotated more closely: JAX rebuilds it with shapes and placeholders.
    stored: Any  # Stored of L layers; or a list, of one layer each
    lengths: Any  # int32 [B]
    kind: CacheKind
    parts: tuple[int, int]  # widths of a row's parts: (C, R), or (K, V)
    is_empty: bool  # nothing is written yet: the first tokens see each other alone

    @property
    def capacity(self) -> int:
        """S: tokens of a sequence that it has slots for."""
        return jax.tree.leaves(self.stored)[0].shape[3]

    @property
    def by_layer(self) -> bool:
        """Each layer has arrays of its own. Layers are then Python numbers: they are unrolled."""
        return isinstance(self.stored, list)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, free ones too."""
        return sum(x.nbytes for x in jax.tree.leaves(self.stored))

    def positions(self, count: int) -> Array:
        """Positions of the next `count` tokens, int32 [B, count]; each also is the last slot that its token sees."""
        return _positions(self.lengths, count)

    def at_lengths(self, lengths: Int[Array, " B"]) -> "Cache":
        """The cache with so many tokens a sequence; slots beyond will be overwritten."""
        return replace(self, lengths=lengths, is_empty=False)

    def take(self, layer: Int[Array, ""] | int) -> tuple["Cache", Array]:
        """(The part that holds a layer, the layer's index in it): of its own arrays, or of the stack of all."""
        if self.by_layer:
            return replace(self, stored=self.stored[layer]), jnp.zeros((), jnp.int32)
        return self, jnp.asarray(layer, jnp.int32)

    def put(self, stored: Stored, layer: Int[Array, ""] | int) -> "Cache":
        """The cache with a part that `take` returned, after it was written."""
        if not self.by_layer:
            return replace(self, stored=stored)
        return replace(self, stored=[stored if i == layer else old for i, old in enumerate(self.stored)])

    def write(self, rows: Float[Array, "B G T X"], layer: Int[Array, ""] | int, kernels: Kernels) -> "Cache":
        """Put T tokens' rows of one layer behind each sequence's own, in place. Lengths stay."""
        part, index = self.take(layer)
        new, zero = _as_stored(part, rows), jnp.zeros((), jnp.int32)

        def put(old, new):
            return jax.lax.dynamic_update_slice(old, new[None], (index, zero, zero, zero, zero))

        if self.is_empty:  # every sequence begins at slot 0
            return self.put(jax.tree.map(put, part.stored, new), layer)
        return self.put(kernels.write_rows(part.stored, new, index, self.lengths), layer)

    def prefill(self, model: Layers, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> tuple[Array, "Cache"]:
        """Read prompts into an empty cache; `lengths` of each row's tokens count.

        Returns: (the trunk's output [B, T, D] before the final norm, the filled cache).
        """
        if not self.by_layer:
            x, cache = model.run_layers(tokens, self)
            return x, keep_sharded(cache.at_lengths(lengths))
        # The layers run as a scan, which needs a stack. It has slots for the prompts alone, and is then cut up.
        length = tokens.shape[1]

        def short(x):
            return jnp.zeros((len(self.stored), *x.shape[1:3], length, x.shape[4]), x.dtype)

        stack = replace(self, stored=jax.tree.map(short, self.stored[0]))
        x, stack = model.run_layers(tokens, stack)
        stored = [
            jax.tree.map(lambda old, new, i=i: old.at[:, :, :, :length].set(new[i : i + 1]), old, stack.stored)
            for i, old in enumerate(self.stored)
        ]
        return x, replace(self, stored=stored).at_lengths(lengths)

    def step(self, model: Layers, tokens: Int[Array, "B T"], weights: Any = None) -> tuple[Array, "Cache"]:
        """Read T further tokens. Lengths stay: the caller knows how many of the tokens will count.

        Returns: (the trunk's output [B, T, D] before the final norm, the cache with the tokens' rows).
        """
        return model.run_layers(tokens, self, weights)


def _positions(lengths: Array, count: int) -> Array:
    return lengths[:, None] + jnp.arange(count, dtype=jnp.int32)[None]


def pick_kind(cfg: ModelConfig, kind: str | None) -> CacheKind:
    """Choose the cache of a model. None means the smallest that the model can use.

    Raises: ValueError for another kind, or a latent cache of a model that has no latent.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> pick_kind(preset("tiny"), None), pick_kind(preset("tiny"), "expanded")
        ('latent', 'expanded')
    """
    if kind is None:
        return "latent" if cfg.attention == "mla" else "expanded"
    for known in CACHE_KINDS:
        if kind == known:
            if kind == "latent" and cfg.attention != "mla":
                raise ValueError(f"cache='latent' needs attention='mla', and the model has {cfg.attention!r}")
            return known
    raise ValueError(f"cache={kind!r} is not one of {', '.join(CACHE_KINDS)}")


def pick_dtype(compute_dtype: Any, dtype: Any) -> jnp.dtype:
    """The dtype of cached rows. None means the compute dtype.

    Raises: ValueError for a dtype that is not one of CACHE_DTYPES.

    Example:
        >>> pick_dtype("bfloat16", None).name, pick_dtype("bfloat16", "int8").name
        ('bfloat16', 'int8')
    """
    if dtype is None:
        return jnp.dtype(compute_dtype)
    if dtype in ("float8_e4m3", jnp.float8_e4m3fn):
        return jnp.dtype(jnp.float8_e4m3fn)
    if dtype in CACHE_DTYPES or dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        return jnp.dtype(dtype)
    raise ValueError(f"cache_dtype={dtype!r} is not one of {', '.join(CACHE_DTYPES)}")


def row_shape(cfg: ModelConfig, kind: CacheKind) -> tuple[int, tuple[int, int]]:
    """(G, parts): rows a token and layer, and the widths of a row's two parts.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> row_shape(preset("v3"), "latent"), row_shape(preset("v3"), "expanded")
        ((1, (512, 64)), (128, (192, 128)))
    """
    if kind == "latent":
        return 1, (cfg.kv_latent_dim, cfg.rope_head_dim)
    return cfg.kv_heads, (cfg.nope_head_dim + cfg.rope_head_dim, cfg.v_head_dim)


def empty_cache(
    cfg: ModelConfig,
    layers: int,
    batch: int,
    capacity: int,
    kind: CacheKind,
    dtype: Any,
    *,
    by_layer: bool = False,
    row_multiple: int = 1,
) -> Cache:
    """An empty cache with `capacity` slots a sequence.

    Args:
        by_layer: each layer has arrays of its own; else one stack has all layers.
        row_multiple: rows are padded with zeros to a multiple of it.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> cache = empty_cache(preset("tiny"), layers=1, batch=2, capacity=8, kind="latent", dtype="int8")
        >>> cache.stored.rows.shape, cache.stored.scales.shape  # a scale for each of a row's two parts
        ((1, 2, 1, 8, 48), (1, 2, 1, 8, 2))
    """
    lengths = jnp.zeros((batch,), jnp.int32)
    groups, parts = row_shape(cfg, kind)
    width = -(-sum(parts) // row_multiple) * row_multiple

    def some(layers: int) -> Stored:
        shape = (layers, batch, groups, capacity, width)
        scales = jnp.ones((*shape[:-1], 2), jnp.float32) if jnp.dtype(dtype).itemsize == 1 else None
        return Stored(jnp.zeros(shape, dtype), scales)

    stored = [some(1) for _ in range(layers)] if by_layer else some(layers)
    return keep_sharded(Cache(stored, lengths, kind, parts, is_empty=True))


def keep_sharded(cache: Cache) -> Cache:
    """Constrain a cache to its axes' shards. For use under `jax.jit`."""
    cache = replace(cache, lengths=constrain(cache.lengths, "batch"))
    return replace(cache, stored=jax.tree.map(lambda x: constrain(x, *ROW_AXES), cache.stored))


def _as_stored(cache: Cache, rows: Array) -> Stored:
    like = cache.stored.rows
    new = Stored(rows.astype(like.dtype), None)
    if cache.stored.scales is not None:
        new = Stored(*quantize_rows(rows, cache.parts, like.dtype))
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, like.shape[-1] - rows.shape[-1])]
    return new._replace(rows=jnp.pad(new.rows, padding))


def elements_per_token(cfg: ModelConfig) -> dict[str, int]:
    """Numbers cached a token over all layers, by kind, and `mha`: a key and a value for each of the model's heads.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> elements_per_token(preset("v3"))  # 61 layers of 512 + 64, and of 128 · (192 + 128)
        {'latent': 35136, 'expanded': 2498560, 'mha': 2498560}
    """

    def of(groups: int, parts: tuple[int, int]) -> int:
        return cfg.num_layers * groups * sum(parts)

    per_head = row_shape(cfg, "expanded")[1]
    kinds: dict[str, int] = {"latent": of(*row_shape(cfg, "latent"))} if cfg.attention == "mla" else {}
    return kinds | {"expanded": of(*row_shape(cfg, "expanded")), "mha": of(cfg.num_heads, per_head)}


def bytes_per_token(cfg: ModelConfig, kind: CacheKind, dtype: Any) -> int:
    """Bytes cached a token over all layers, scales of 8-bit rows included.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> bytes_per_token(preset("v3"), "latent", "bfloat16")
        70272
    """
    groups, parts = row_shape(cfg, kind)
    size = jnp.dtype(dtype).itemsize
    return cfg.num_layers * groups * (sum(parts) * size + (8 if size == 1 else 0))
