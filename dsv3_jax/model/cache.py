"""The cache of decoding: named arrays of a row for each earlier token, as attention declares them.

latent    MLA's rows, which all heads share: {"latent": c_kv, "k_rope": the rotated key}
expanded  a key and a value for each key-value head, {"k", "v"}: the cache of MHA, GQA and MQA, and
          MLA's naive one

The names and widths come from the attention's `cache_rows`; nothing here knows them. Decoding with
cache="none" has no cache: `decoding/programs.py` recomputes all tokens each step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import CacheDtype, CacheKind, ModelConfig
from dsv3_jax.kernels.choose import Kernels
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.quantize import quantize_rows

CACHE_KINDS: tuple[CacheKind, ...] = ("latent", "expanded")
CACHE_DTYPES: tuple[str, ...] = get_args(CacheDtype)
# How a mesh shards the last four axes of [L, B, G, S, X]: by sequences and by key-value heads. A
# token's row is written and read on the devices that hold its sequence.
ROW_AXES = ("batch", "heads", None, None)


@partial(jax.tree_util.register_dataclass, data_fields=["parts", "lengths"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """The rows of a batch. Sequence b holds `lengths[b]` tokens; slots beyond are not read.

    Example:
        >>> rows = {"k": (2, 48), "v": (2, 32)}
        >>> cache = empty_cache(rows, [1], batch=2, capacity=8, dtype="float32")
        >>> list(cache.parts[0]), cache.positions(3).tolist()
        (['k', 'v'], [[0, 1, 2], [0, 1, 2]])
    """

    # A list of {name: Stored of arrays [L, B, G, S, X]}: one of all layers, or one of 1 layer for
    # each. Not annotated more closely: JAX rebuilds it with shapes and placeholders.
    parts: Any
    lengths: Any  # int32 [B]

    @classmethod
    def of_rows(cls, rows: Mapping[str, Float[Array, "B T _ _"]]) -> "Cache":
        """A cache of one layer, with rows as they are: each token sees those up to its own."""
        # One layer [1, B, G, S, X] with S = T. Lengths are 0, so token t sees the slots 0 … t.
        part = {name: Stored(x.swapaxes(1, 2)[None], None) for name, x in rows.items()}
        batch = next(iter(rows.values())).shape[0]
        return cls([part], jnp.zeros((batch,), jnp.int32))

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, free ones too."""
        return sum(x.nbytes for x in jax.tree.leaves(self.parts))

    def positions(self, count: int) -> Int[Array, "B count"]:
        """Positions of the next `count` tokens; each also is the last slot that its token sees."""
        return self.lengths[:, None] + jnp.arange(count, dtype=jnp.int32)[None]

    @property
    def capacity(self) -> int:
        """Slots of a sequence."""
        return jax.tree.leaves(self.parts)[0].shape[3]

    def with_part(self, part: int, stored: dict[str, Stored]) -> "Cache":
        """The cache with other arrays in one part."""
        return replace(self, parts=[*self.parts[:part], stored, *self.parts[part + 1 :]])

    def at_lengths(self, lengths: Int[Array, " B"]) -> "Cache":
        """The cache with so many tokens a sequence; slots beyond will be overwritten."""
        return replace(self, lengths=lengths)

    def place(self, layer: Int[Array, ""] | int) -> tuple[int, Array]:
        """(The part that holds a layer, its index there). Only a stack takes a traced layer."""
        if len(self.parts) == 1:
            return 0, jnp.asarray(layer, jnp.int32)
        return int(layer), jnp.zeros((), jnp.int32)

    def write(
        self, rows: Mapping[str, Float[Array, "B T _ _"]], layer: Array | int, kernels: Kernels
    ) -> "Cache":
        """Put T tokens' rows of one layer behind each sequence's own, in place. Lengths stay.

        Args: rows: by name; those that the cache does not keep are left out.
        """
        i, index = self.place(layer)
        part = self.parts[i]
        new = {name: _as_stored(rows[name].swapaxes(1, 2), like) for name, like in part.items()}
        written = kernels("write_rows", part, new, index, self.lengths)
        return self.with_part(i, written)

    def read(self, layer: Array | int) -> dict[str, Stored]:
        """The arrays of one layer, [B, G, S, X]."""
        i, index = self.place(layer)

        def of_layer(x: Array) -> Array:
            if x.shape[0] == 1:
                return jax.lax.squeeze(x, [0])  # no index: a CPU would copy all slots to read them
            return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

        return jax.tree.map(of_layer, self.parts[i])

    def fill(
        self, rows: Mapping[str, Float[Array, "L B T _ _"]], lengths: Int[Array, " B"]
    ) -> "Cache":
        """The cache with prompts, whose first `lengths` tokens count."""
        new = {
            name: _as_stored(rows[name].swapaxes(2, 3), like)
            for name, like in self.parts[0].items()
        }

        # Part i takes the rows of its own layers: a stack has all of them, other parts one.
        each = jax.tree.leaves(self.parts[0])[0].shape[0]  # layers of a part

        def put(part: Any, first: int) -> Any:
            return jax.tree.map(lambda old, x: _put_first(old, x[first : first + each]), part, new)

        parts = [put(part, i * each) for i, part in enumerate(self.parts)]
        return keep_sharded(Cache(parts, lengths))

    # of a batch whose sequences come and go

    def take(self, sequences: Int[Array, " n"]) -> "Cache":
        """The cache of these sequences, in this order."""
        parts = jax.tree.map(lambda x: x.take(sequences, axis=1), self.parts)
        return Cache(parts, self.lengths.take(sequences))

    def begin(self, new: "Cache", begins: Bool[Array, " B"]) -> "Cache":
        """The cache where some sequences are those of another, which may have fewer slots."""
        by_sequence = begins[None, :, None, None, None]

        def put(old: Array, new: Array) -> Array:
            # slots beyond will be overwritten
            first = jnp.where(by_sequence, new, old[:, :, :, : new.shape[3]])
            return constrain(_put_first(old, first), *ROW_AXES)

        parts = jax.tree.map(put, self.parts, new.parts)
        return Cache(parts, jnp.where(begins, new.lengths, self.lengths))

    def with_slots(self, slots: int) -> "Cache":
        """The cache with so many slots a sequence; the new ones are empty."""
        more = [(0, 0), (0, 0), (0, 0), (0, slots - self.capacity if self.parts else 0), (0, 0)]
        parts = jax.tree.map(lambda x: constrain(jnp.pad(x, more), *ROW_AXES), self.parts)
        return Cache(parts, self.lengths)


def _put_first(old: Array, new: Array) -> Array:
    """Arrays [L, B, G, S, X] with others in their first slots."""
    return old.at[:, :, :, : new.shape[3]].set(new)


def empty_cache(
    rows: Mapping[str, tuple[int, int]], sizes: Sequence[int], batch: int, capacity: int, dtype: Any
) -> Cache:
    """An empty cache with `capacity` slots a sequence.

    Args:
        rows: for each array (key-value heads, numbers a row), as an attention's `cache_rows`
            declares them.
        sizes: layers of each part. [L] is one stack, for a scan; [1, 1, …] gives each layer its
            arrays, for layers that are unrolled: they are then read without a copy.

    Example:
        >>> rows = {"latent": (1, 32), "k_rope": (1, 16)}
        >>> cache = empty_cache(rows, [3], batch=2, capacity=8, dtype="int8")
        >>> {name: (x.rows.shape, x.scales.shape) for name, x in cache.parts[0].items()}["k_rope"]
        ((3, 2, 1, 8, 16), (3, 2, 1, 8, 1))
    """

    def one(layers: int, heads: int, width: int) -> Stored:
        shape = layers, batch, heads, capacity
        scales = jnp.ones((*shape, 1), jnp.float32) if jnp.dtype(dtype).itemsize == 1 else None
        return Stored(jnp.zeros((*shape, width), dtype), scales)

    parts = [{name: one(size, *shape) for name, shape in rows.items()} for size in sizes]
    return keep_sharded(Cache(parts, jnp.zeros((batch,), jnp.int32)))


def keep_sharded(cache: Cache) -> Cache:
    """Constrain a cache to its axes' shards. For use under `jax.jit`."""
    parts = jax.tree.map(lambda x: constrain(x, *ROW_AXES), cache.parts)
    return Cache(parts, constrain(cache.lengths, "batch"))


def _as_stored(x: Array, like: Stored) -> Stored:
    """Rows [..., X] in the dtype and the width that a cache has them."""
    rows = x.astype(like.rows.dtype)

    # Rows of 8 bits have a scale each. Rows that a device wants wider end in zeros.
    scales = None
    if like.scales is not None:
        rows, scales = quantize_rows(x, like.rows.dtype)
    padding = like.rows.shape[-1] - x.shape[-1]
    return Stored(jnp.pad(rows, [(0, 0)] * (x.ndim - 1) + [(0, padding)]), scales)


def pick_kind(cfg: ModelConfig, kind: Any) -> CacheKind:
    """Choose the cache of a model. None means the smallest that the model can use.

    Raises: ValueError for another kind, or a latent cache of a model whose attention has no latent,
        unlike mla and dsa.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> pick_kind(preset("tiny"), None), pick_kind(preset("tiny"), "expanded")
        ('latent', 'expanded')
    """
    if kind is None:
        kind = "latent" if cfg.has_latent else "expanded"
    if kind not in CACHE_KINDS:
        raise ValueError(f"cache={kind!r} is not one of {', '.join(CACHE_KINDS)}")
    if kind == "latent" and not cfg.has_latent:
        raise ValueError(
            "cache='latent' needs an attention with a latent, as 'mla' or 'dsa', and the model has "
            f"{cfg.attention!r}"
        )
    return kind


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
