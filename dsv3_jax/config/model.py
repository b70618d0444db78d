"""The shape and rules of a model, its balance and its positions.

Letters in brackets are the papers': B batch, T length, D width, H heads, N nope dim, R rope dim, V
value dim, C key-value latent, Q query latent, E routed experts, K experts a token, G groups, F
expert width, L layers, W vocabulary, M multi-token heads; of an indexer I heads, X width, k tokens.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from dsv3_jax.config.fields import (
    Natural,
    NonNegative,
    Positive,
    PositiveReal,
    Table,
    check_fields,
    require,
)


@dataclass(frozen=True)
class Yarn:
    """Context extension of RoPE (YaRN, arXiv 2309.00071), named as in the released configs.

    Example:
        >>> Yarn(factor=40.0).original_max_positions * 40  # the context of DeepSeek-V3
        163840
    """

    # context length over the original one; 1 turns YaRN off
    factor: Annotated[float, "[1, 3.4e38)"] = 1.0
    original_max_positions: Positive = 4096  # context length before the extension
    # feature pairs with at least so many turns in the original context keep their frequency
    beta_fast: PositiveReal = 32.0
    # feature pairs with at most so many turns have their frequency divided by the factor
    beta_slow: PositiveReal = 1.0
    # weight of the temperature of rotary features, over that of mscale_all_dim
    mscale: Annotated[float, "[0, 100]"] = 1.0
    # weight of the temperature of all features, which scales the scores; 0 turns it off
    mscale_all_dim: Annotated[float, "[0, 100]"] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "yarn ")


@dataclass(frozen=True)
class Balance:
    """How the load of the experts is balanced: methods that can be combined; 0 turns one off.

    Sources: loss-free bias arXiv 2408.15664; sequence-wise loss DeepSeek-V3 report, section 2.1.2;
    Switch loss arXiv 2101.03961; z-loss arXiv 2202.08906.

    Example:
        >>> Balance(switch_alpha=1e-3) == Balance(1e-3, 1e-4, 1e-3, rule="sign", z_alpha=0.0)
        True
    """

    # step of the loss-free router bias after each batch (gamma); for quantile at most 1
    bias_rate: NonNegative = 1e-3
    sequence_alpha: NonNegative = 1e-4  # weight of the sequence-wise balance loss (alpha)
    switch_alpha: NonNegative = 0.0  # weight of the batch-wise Switch balance loss
    # how the bias moves (ops.balance.RULES). Rule sign: by gamma towards the mean load (V3). Rule
    # proportional: by gamma times the distance from it. Rule quantile: the share gamma of the way
    # to the bias that would have balanced the batch
    rule: str = "sign"
    z_alpha: NonNegative = 0.0  # weight of the z-loss, which keeps the router's logits small

    def __post_init__(self) -> None:
        check_fields(self, "balance ")

        # Rule quantile goes the share γ of the way to its target, so γ ≤ 1.
        most = 1 if self.rule == "quantile" else math.inf
        require(
            self.bias_rate <= most,
            f"balance bias_rate={self.bias_rate} is over 1 with rule={self.rule!r}",
        )


class HeadKind(NamedTuple):
    """Facts about a kind of multi-token head; its module is in model/mtp.py.

    Example:
        >>> [name for name, kind in HEAD_KINDS.items() if kind.reads_tokens]
        ['deepseek', 'eagle']
    """

    title: str  # in tables
    # It reads the tokens that it continues, so it can draft beyond its depth. Otherwise it reads
    # the trunk's output.
    reads_tokens: bool
    has_experts: bool  # it has a sparse block, so a router
    reads_raw: bool  # it has its own norm, so it may read the trunk's output before the final norm
    max_depth: int | None = None  # None means any


HEAD_KINDS: Table[HeadKind] = Table(
    "mtp_kind",
    {
        "deepseek": HeadKind("MTP modules", reads_tokens=True, has_experts=True, reads_raw=True),
        "meta": HeadKind("Meta heads", reads_tokens=False, has_experts=True, reads_raw=True),
        "medusa": HeadKind("Medusa heads", reads_tokens=False, has_experts=False, reads_raw=False),
        "eagle": HeadKind(
            "EAGLE head", reads_tokens=True, has_experts=False, reads_raw=False, max_depth=1
        ),
    },
)


# Kinds of attention, and whether each compresses keys and values into a latent; their classes are
# in model/blocks.py.
ATTENTION_KINDS: Table[bool] = Table(
    "attention",
    {"mla": True, "dsa": True, "mha": False, "gqa": False, "mqa": False},
    more="--import NAME imports a program that registers more",
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and rules of a model of the DeepSeek-V3 family.

    Example:
        >>> from dsv3_jax.config import replace
        >>> from dsv3_jax.presets import preset
        >>> replace(preset("tiny"), attention="gqa", num_kv_heads=2).kv_heads
        2
    """

    vocab_size: Positive  # number of token ids (W)
    dim: Positive  # width of the hidden state (D)
    num_layers: Annotated[int, "[1, 10000]"]  # number of layers, dense and sparse together (L)
    # number of dense layers, which come first: their FFN has no experts
    num_dense_layers: Annotated[int, "[0, 10000]"]
    dense_dim: Positive  # hidden width of the FFN in dense layers
    # attention
    num_heads: Positive  # number of attention heads (H)
    # width of the compressed queries (Q); None means that queries are not compressed
    q_latent_dim: Positive | None
    kv_latent_dim: Positive  # width of the compressed keys and values, which MLA caches (C)
    nope_head_dim: Positive  # width of a head's queries and keys without positions (N)
    # width of a head's queries and keys with rotary positions (R)
    rope_head_dim: Annotated[int, "[1, 1000000]"]
    v_head_dim: Positive  # width of a head's values (V)
    # DeepSeekMoE
    num_experts: Annotated[int, "[1, 1000000]"]  # number of routed experts in a sparse layer (E)
    experts_per_token: Positive  # number of routed experts that a token is sent to (K)
    num_shared_experts: Natural  # number of shared experts, which every token uses
    expert_dim: Positive  # hidden width of an expert (F)
    # kind of attention (ATTENTION_KINDS): mla compresses keys and values into a latent, and dsa is
    # MLA over the tokens that an indexer chooses (V3.2); mha, gqa and mqa do not, and their keys
    # have nope_head_dim + rope_head_dim numbers a head
    attention: str = "mla"
    # number of heads with keys and values; for attention gqa, or one of your own
    num_kv_heads: Positive | None = None
    # norm each head's queries and keys before RoPE; for attention mha, gqa and mqa
    qk_norm: bool = False
    # number of heads of an indexer (I); index settings are for attention dsa only
    index_heads: Positive = 64
    # width of an indexer's queries and keys (X), of which the first rope_head_dim are rotated
    index_dim: Positive = 128
    index_topk: Positive = 2048  # number of tokens that a query attends to (k)
    index_interleaved: bool = False  # as rope_interleaved, for the indexer
    # for each layer: full has an indexer; shared attends to the tokens of the last full one. None
    # means all full
    index_types: tuple[str, ...] | None = None
    # index queries and keys are rotated by a Hadamard matrix and rounded to e4m3, as in the
    # released inference code; the scales of fp8_ue8m0 are powers of two
    index_precision: Literal["none", "fp8", "fp8_ue8m0"] = "none"
    num_groups: Positive = 1  # number of groups that the experts are divided into (G)
    groups_per_token: Positive = 1  # number of groups that a token's experts may come from
    # how scores become a choice (ops.routing.ROUTERS): sigmoid with a balancing bias (V3),
    # sqrtsoftplus the same (V4), softmax with balance losses (V2), topk takes the softmax over the
    # chosen experts, dense uses every expert, hash chooses by the token's id
    router: str = "sigmoid"
    # score of a group: sum of its two best experts, or the best
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    normalize_gates: bool = True  # divide a token's gates by their sum
    # factor on the output of the routed experts
    routed_scale: Annotated[float, "[-1e6, 1e6]"] = 1.0
    # how the load of the experts is balanced; 0 turns a method off
    balance: Balance = field(default_factory=Balance)
    # capacity of an expert, over its even share of the tokens; tokens beyond it are dropped. None
    # drops no token
    capacity_factor: PositiveReal | None = None
    # positions
    rope_theta: Annotated[float, "[1, 3.4e38)"] = 1e4  # base of the rotary frequencies
    # rotate pairs of neighbours (2i, 2i+1), as in the released weights; otherwise pairs of halves
    # (i, i+R/2)
    rope_interleaved: bool = True
    yarn: Yarn = field(default_factory=Yarn)  # context extension of RoPE (YaRN, arXiv 2309.00071)
    max_positions: Positive = 4096  # longest sequence in tokens
    # multi-token prediction
    mtp_depth: Annotated[int, "[0, 100]"] = 0  # number of multi-token heads (M)
    # kind of multi-token heads, of HEAD_KINDS: deepseek's causal chain, meta's and medusa's
    # parallel heads, eagle
    mtp_kind: str = "deepseek"
    # heads read the trunk's output after or before the final norm (h^0)
    mtp_input: Literal["normed", "raw"] = "normed"
    # the rest
    norm_eps: Annotated[float, "[1e-30, 1]"] = 1e-6  # epsilon of RMSNorm
    tie_embeddings: bool = False  # use the embedding table as the unembedding too
    init_std: Annotated[float, "(0, 1000]"] = 0.006  # standard deviation of the initial weights

    def __post_init__(self) -> None:
        check_fields(self)
        _check_experts(self)
        _check_attention(self)
        _check_heads(self)

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads; MLA forms them for every head."""
        return self.num_kv_heads or (1 if self.attention == "mqa" else self.num_heads)

    @property
    def has_latent(self) -> bool:
        """Whether keys and values are compressed into a latent."""
        return ATTENTION_KINDS[self.attention]

    @property
    def has_indexer(self) -> tuple[bool, ...]:
        """Whether each layer of the trunk has an indexer."""
        types = self.index_types or ("full",) * self.num_layers
        return tuple(self.attention == "dsa" and kind == "full" for kind in types)

    @property
    def head_kind(self) -> HeadKind:
        """Facts about the kind of the multi-token heads."""
        return HEAD_KINDS[self.mtp_kind]

    @property
    def num_sparse_layers(self) -> int:
        """Number of the trunk's layers that have experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def num_sparse_heads(self) -> int:
        """Number of the multi-token heads that have experts."""
        return self.mtp_depth if self.head_kind.has_experts else 0


def _check_experts(c: ModelConfig) -> None:
    for small, large in (
        ("num_dense_layers", "num_layers"),
        ("experts_per_token", "num_experts"),
        ("groups_per_token", "num_groups"),
    ):
        a, b = getattr(c, small), getattr(c, large)
        require(a <= b, f"{small}={a} is more than {large}={b}")

    experts = f"num_experts={c.num_experts}"
    chosen = f"experts_per_token={c.experts_per_token}"
    groups = c.num_groups
    require(c.num_experts % groups == 0, f"num_groups={groups} does not divide {experts}")

    # A token's K experts come from the groups that it keeps, each of E / G experts.
    size = c.num_experts // groups
    require(
        c.experts_per_token <= c.groups_per_token * size,
        f"{chosen} does not fit in groups_per_token={c.groups_per_token} groups of {size}",
    )
    require(
        groups == 1 or c.group_score == "max" or size >= 2,
        f"group_score='top2_sum' needs 2 experts a group, num_groups={groups} leaves {size}",
    )
    require(
        c.router != "dense" or c.experts_per_token == c.num_experts,
        f"router='dense' takes every expert: {chosen} must be {experts}",
    )


def _check_attention(c: ModelConfig) -> None:
    count = c.num_kv_heads

    # RoPE rotates pairs of features.
    require(c.rope_head_dim % 2 == 0, f"rope_head_dim={c.rope_head_dim} is odd")

    # Only gqa needs a number of key-value heads: mqa has 1, the others H. One's own may have it.
    fixed = c.attention in ("mla", "dsa", "mha", "mqa")
    require(
        not fixed if count else c.attention != "gqa",
        f"num_kv_heads={count} with attention={c.attention!r}: it is for 'gqa', which needs it",
    )
    require(
        not (c.has_latent and c.qk_norm),  # the table refuses a kind that it does not have
        "qk_norm=True is for attention='mha', 'gqa' and 'mqa'; a latent has norms of its own",
    )
    require(
        c.num_heads % c.kv_heads == 0,
        f"num_kv_heads={count} does not divide num_heads={c.num_heads}",
    )

    # YaRN stretches the original context by its factor, and no further.
    if c.yarn.factor != 1:
        reach = c.yarn.original_max_positions * c.yarn.factor
        require(  # YaRN counts turns by the logarithm of the base
            c.rope_theta > 1,
            f"rope_theta={c.rope_theta} is not above 1, as YaRN's factor={c.yarn.factor} needs",
        )
        require(
            c.max_positions <= reach,
            f"max_positions={c.max_positions} is beyond YaRN's reach of {reach:g}",
        )
    if c.attention == "dsa":
        _check_indexer(c)


def _check_indexer(c: ModelConfig) -> None:
    types = c.index_types
    for kind in types or ():
        require(kind in ("full", "shared"), f"index_types={kind!r} is not one of full, shared")

    # Index queries [T, I, X] come from the query latent; their first R numbers are rotated.
    require(
        bool(c.q_latent_dim),
        "q_latent_dim=None with attention='dsa', which makes index queries from it; give a width",
    )
    width = f"index_dim={c.index_dim}"
    require(
        c.index_dim >= c.rope_head_dim,
        f"{width} is less than the rope_head_dim={c.rope_head_dim} that it rotates",
    )

    # A Hadamard matrix, which precedes the rounding to e4m3, has a power of 2 as its size.
    require(
        c.index_precision == "none" or c.index_dim.bit_count() == 1,
        f"{width} is no power of 2, as index_precision={c.index_precision!r} needs",
    )

    # A shared layer attends to what the last full layer before it chose.
    require(
        types is None or len(types) == c.num_layers,
        f"index_types={types} has not one entry for each of num_layers={c.num_layers}",
    )
    require(
        types is None or types[:1] == ("full",),
        f"index_types={types} begins with a layer that has no set to share; begin with 'full'",
    )


def _check_heads(c: ModelConfig) -> None:
    kind = c.head_kind
    require(
        kind.max_depth is None or c.mtp_depth <= kind.max_depth,
        f"mtp_depth={c.mtp_depth} is more than the {kind.max_depth} of mtp_kind={c.mtp_kind!r}",
    )
    require(
        kind.reads_raw or c.mtp_input == "normed" or c.mtp_depth == 0,
        f"mtp_input='raw' needs a norm in the head: mtp_kind={c.mtp_kind!r} has none",
    )
