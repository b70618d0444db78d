"""A model's size and cost: parameters, FLOPs a token, cache bytes a token. Allocates nothing."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import CacheKind, LoraPart, ModelConfig
from dsv3_jax.kernels.choose import Kernels, Target
from dsv3_jax.model.blocks import ATTENTION
from dsv3_jax.model.mtp import HEADS
from dsv3_jax.model.transformer import abstract


@dataclass(frozen=True)
class ModelSize:
    """Counts of one model. The multi-token heads are apart, as in the reports' 671B."""

    total: int  # parameters without multi-token heads
    # of these, what one token is multiplied with (the embedding is looked up, not multiplied)
    active: int
    mtp: int  # parameters of the multi-token heads
    mtp_active: int  # with the shared unembedding, once a head
    parts: dict[str, int]  # total, by kind
    # score and value products of one token over a full context, forward; an indexer's too
    attention_flops: int
    mtp_attention_flops: int  # those of the multi-token heads' own blocks


def size(cfg: ModelConfig, context: int | None = None) -> ModelSize:
    """Count a model's parameters. Attention FLOPs are of `context` tokens, by default 4,096.

    A model with a smaller max_positions has that as its default.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> counted = size(preset("v3"))
        >>> f"{counted.total / 1e9:.0f}B parameters, {counted.active / 1e9:.1f}B active"
        '671B parameters, 36.6B active'
    """
    context = context or min(4096, cfg.max_positions)

    # The parameters of trunk and heads: all, the routed experts' alone, and the trunk's by kind.
    parts: dict[str, int] = {}
    routed = {"trunk": 0, "mtp": 0}
    counted = {"trunk": 0, "mtp": 0}
    for path, count in _counts(cfg).items():
        where = "mtp" if path[0] == "mtp" else "trunk"
        counted[where] += count
        if "experts" in path:
            routed[where] += count
        if where == "trunk":
            kind = next((kind for name, kind in KINDS.items() if name in path), "router and norms")
            parts[kind] = parts.get(kind, 0) + count

    # Active: K of E experts; and not the embedding, unless it is the unembedding too.
    # Each multi-token head multiplies with the unembedding once more.
    idle = 1 - cfg.experts_per_token / cfg.num_experts
    looked_up = cfg.vocab_size * cfg.dim if not cfg.tie_embeddings else 0
    head = cfg.vocab_size * cfg.dim * cfg.mtp_depth

    # Products of one query: with keys and values that it attends to, and with all index keys.
    rows = ATTENTION[cfg.attention].cache_rows(cfg, "expanded")
    qk_and_v = rows["k"][1] + rows["v"][1]
    products = 2 * cfg.num_heads * qk_and_v * attended(cfg, context)
    scored = 2 * cfg.index_heads * cfg.index_dim * context
    of_heads = cfg.mtp_depth if HEADS[cfg.mtp_kind].remembers else 0
    with_indexer = of_heads if cfg.attention == "dsa" else 0
    return ModelSize(
        total=counted["trunk"],
        active=round(counted["trunk"] - routed["trunk"] * idle - looked_up),
        mtp=counted["mtp"],
        mtp_active=round(counted["mtp"] - routed["mtp"] * idle + head),
        parts=parts,
        attention_flops=cfg.num_layers * products + sum(cfg.has_indexer) * scored,
        mtp_attention_flops=of_heads * products + with_indexer * scored,
    )


def attended(cfg: ModelConfig, context: int) -> int:
    """Tokens that a token attends to, of so many.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> attended(preset("v3"), 4096)
        4096
    """
    return min(context, cfg.index_topk) if cfg.attention == "dsa" else context


@lru_cache(maxsize=64)  # tables, plans and studies ask for the same models again and again
def _counts(cfg: ModelConfig) -> dict[tuple[str, ...], int]:
    """Count each array's parameters, by path, without indexers that share another's choice."""
    # Named kernels, because the default ones start the device and compile the C++.
    params = nnx.state(abstract(cfg, kernels=Kernels(Target("cpu", "xla"))), nnx.Param)
    counts = {
        tuple(str(k.key) for k in path if hasattr(k, "key")): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    # A stack has an indexer in every layer: count it only where the layer chooses by it.
    of = {
        "dense": cfg.has_indexer[: cfg.num_dense_layers],
        "sparse": cfg.has_indexer[cfg.num_dense_layers :],
    }
    for path, count in counts.items():
        if "indexer" in path and path[0] in of:
            own = of[path[0]]
            counts[path] = count * sum(own) // len(own)
    return counts


# The kind of a parameter, by the first of these names that is in its path.
KINDS = {
    "experts": "routed experts",
    "shared": "shared experts",
    "indexer": "indexers",
    "attn": "attention",
    "ffn": "dense feed-forward",
    "embed": "embedding and head",
    "head": "embedding and head",
}
# Names of the parameters that low-rank adapters may change.
ADAPTED: dict[LoraPart, str] = {
    "attention": "attn",
    "dense": "ffn",
    "shared": "shared",
    "routed": "experts",
}


def train_flops_per_token(
    cfg: ModelConfig,
    *,
    with_mtp: bool = True,
    frozen_trunk: bool = False,
    adapted: tuple[LoraPart, ...] = (),
) -> int:
    """FLOPs a trained token: 6 an active parameter (2 forward, 4 backward), no attention scores.

    With `frozen_trunk` the heads alone are trained: 2 for the trunk's, and 4 for the unembedding
    that heads share. With `adapted`, low-rank adapters of these parts are trained: 4, and 2 more
    for the matrices that they change. The gradient of these is formed on the way to the adapters'.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> train_flops_per_token(preset("tiny"), with_mtp=False) // size(preset("tiny")).active
        6
    """
    counted = size(cfg)

    # The trunk runs forward alone. The unembedding passes the heads' gradient on, and takes none.
    if frozen_trunk:
        return (
            2 * counted.active
            + 6 * counted.mtp_active
            - 2 * cfg.mtp_depth * cfg.vocab_size * cfg.dim
        )
    active = counted.active + (counted.mtp_active if with_mtp else 0)
    if not adapted:
        return 6 * active

    # Forward and the gradient on its way back, 2 each; 2 more where a matrix is adapted.
    share = cfg.experts_per_token / cfg.num_experts
    changed = sum(
        count * (share if "experts" in path else 1)
        for path, count in _counts(cfg).items()
        if any(ADAPTED[part] in path for part in adapted) and (with_mtp or path[0] != "mtp")
    )
    return 4 * active + round(2 * changed)


def distinct_experts(cfg: ModelConfig, tokens: int) -> float:
    """Experts of a layer that so many tokens reach, as expected: E (1 − (1 − K/E)^tokens).

    Exact if all experts are equally likely and tokens choose independently of one another. Which
    experts a token may combine, as with groups, does not matter.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> v3 = preset("v3")
        >>> distinct_experts(v3, tokens=1), round(distinct_experts(v3, tokens=32))
        (8.0, 163)
    """
    return cfg.num_experts * (1 - (1 - cfg.experts_per_token / cfg.num_experts) ** tokens)


def elements_per_token(cfg: ModelConfig) -> dict[str, int]:
    """Numbers cached a token over all layers, by kind; `mha` has a key and a value for each head.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> elements_per_token(preset("v3"))  # 61 layers of 512 + 64, and of 128 · (192 + 128)
        {'latent': 35136, 'expanded': 2498560, 'mha': 2498560}
    """
    kinds: tuple[CacheKind, ...] = ("latent", "expanded") if cfg.has_latent else ("expanded",)
    rows = {kind: ATTENTION[cfg.attention].cache_rows(cfg, kind).values() for kind in kinds}
    counts: dict[str, int] = {
        kind: sum(heads * width for heads, width in of) for kind, of in rows.items()
    }
    counts["mha"] = cfg.num_heads * (cfg.nope_head_dim + cfg.rope_head_dim + cfg.v_head_dim)
    return {name: cfg.num_layers * count for name, count in counts.items()}


def bytes_per_token(cfg: ModelConfig, kind: CacheKind, dtype: Any) -> int:
    """Bytes cached a token over all layers, scales of 8-bit rows included.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> bytes_per_token(preset("v3"), "latent", "bfloat16")
        70272
    """
    itemsize = jnp.dtype(dtype).itemsize
    scale = 4 if itemsize == 1 else 0  # a float32 for each row of 8 bits
    rows = ATTENTION[cfg.attention].cache_rows(cfg, kind)
    return cfg.num_layers * sum(
        heads * (width * itemsize + scale) for heads, width in rows.values()
    )


def share_read(cfg: ModelConfig, context: int, kind: CacheKind) -> float:
    """Share of cached numbers that a decoding step reads: all index keys, and rows attended to.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> share_read(preset("v3"), 4096, "latent")
        1.0
    """
    widths = {
        name: n * width
        for name, (n, width) in ATTENTION[cfg.attention].cache_rows(cfg, kind).items()
    }
    index = widths.get("index_key", 0)
    total = sum(widths.values())
    return (index + (total - index) * attended(cfg, context) / context) / total
