"""Configuration of models and runs: frozen dataclasses, validated when they are made.

A recipe is a diff of another: `replace(preset("tiny"), balance=Balance(switch_alpha=1e-3))`.
The comment of a field is also its help text on the command line. Letters in brackets are the papers': B batch, T
length, D width, H heads, N nope dim, R rope dim, V value dim, C key-value latent, Q query latent, E routed experts, K
experts a token, G groups, F expert width, L layers, W vocabulary.
"""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, TypeVar

# Kinds and dtypes of the cache that decoding keeps; see `model/cache.py`.
CacheKind = Literal["latent", "expanded", "none"]
CacheDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3"]
Precision = Literal["none", "fp8", "fp8_ue8m0", "mxfp8"]  # of linear layers; see `kernels/low_precision.py`
HeadLoss = Literal["ce", "kl", "tv"]
LoraPart = Literal["attention", "dense", "shared", "routed"]

V = TypeVar("V")


class ConfigError(ValueError):
    """An invalid configuration: its message is one sentence with the offending value.

    Example:
        >>> DataConfig(seq_len=1)
        Traceback (most recent call last):
            ...
        dsv3_jax.config.ConfigError: seq_len=1 is outside [2, 2147483648)
    """


class Table(dict[str, V]):
    """Things by name, to which anyone may add: a name that it does not have raises ConfigError.

    Example:
        >>> Table("router", {"sigmoid": 1})["sigmiod"]
        Traceback (most recent call last):
            ...
        dsv3_jax.config.ConfigError: router='sigmiod' is not one of sigmoid; did you mean 'sigmoid'?
    """

    def __init__(self, setting: str, rows: Mapping[str, V], more: str = ""):
        """Make a table. Args: more: a sentence for errors, on how it gets more rows."""
        super().__init__(rows)
        self.setting = setting
        self.more = f"; {more}" if more else ""

    def add(self, name: str, row: V) -> None:
        """Add a row. Raises: ConfigError if its name is taken, or no text."""
        if not isinstance(name, str) or not name or name in self:
            raise ConfigError(f"{self.setting}={name!r} is taken or no name; the names are {', '.join(self)}")
        self[name] = row

    def __missing__(self, name: str) -> V:
        near = did_you_mean(name, self)
        raise ConfigError(f"{self.setting}={_short(name)} is not one of {', '.join(self)}{near}{self.more}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or nothing if none is near.

    Example:
        >>> did_you_mean("trian", ["train", "eval"])
        "; did you mean 'train'?"
    """
    near = get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _require(rules: dict[str, bool]) -> None:
    """Raise the first sentence that does not hold."""
    for sentence, holds in rules.items():
        if not holds:
            raise ConfigError(sentence)


# The rules of single fields, of whatever configuration: an interval, and who has to lie in it. A number far above any
# model that was trained is a mistake, and would be allocated or counted to.
_MOST = {int: str(2**31), float: "3.4e38"}  # in place of inf
_INTERVALS = {
    "[1, inf)": "vocab_size dim dense_dim num_heads num_kv_heads q_latent_dim kv_latent_dim nope_head_dim v_head_dim "
    "experts_per_token expert_dim num_groups groups_per_token max_positions original_max_positions batch_size "
    "max_documents steps eval_every eval_batches save_every keep log_every microbatches rope_theta factor index_heads "
    "index_dim index_topk max_new_tokens",
    "[2, inf)": "seq_len",
    "[1, 10000]": "num_layers",
    "[1, 1000000]": "num_experts rope_head_dim capacity_slack",  # rotary frequencies are computed early
    "[0, 10000]": "num_dense_layers",
    "[0, inf)": "num_shared_experts bias_rate sequence_alpha switch_alpha z_alpha final_learning_rate warmup_steps "
    "weight_decay mtp_weight mtp_final_weight rank group kl clip_high",
    "[0, 4294967295]": "seed",  # JAX keeps 32 bits of a seed
    "(0, inf)": "capacity_factor temperature learning_rate eps clip_norm qk_clip alpha beta_fast beta_slow",
    "[0, 1]": "fim_rate decay_start decay_end bias_freeze clip_low",
    "[0, 1)": "beta1 beta2 muon_beta",
    "(0, 1)": "val_fraction",
    "[0, 100]": "mtp_depth mscale mscale_all_dim",
    "[1e-30, 1]": "norm_eps",
    "(0, 1000]": "init_std",
    "[-1e6, 1e6]": "routed_scale",
}
_INTERVAL_OF = {name: interval for interval, names in _INTERVALS.items() for name in names.split()}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control codes; bytes of a name that are not UTF-8


def _check_fields(config, prefix: str = "") -> None:
    """Refuse values of another type or outside their interval, at once, where the message can still name the key."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        hint = hints[item.name]
        name = prefix + item.name
        if type(value) is int and (hint is float or hint == float | None) and abs(value) < 2**127:
            value = float(value)
            object.__setattr__(config, item.name, value)
        if not _matches(value, hint):
            raise ConfigError(f"{name}={_short(value)} is not of type {_spell(hint)}")
        interval = _INTERVAL_OF.get(item.name, "(-inf, inf)").replace("inf", _MOST.get(type(value), ""))
        if type(value) in _MOST and not _inside(value, interval):
            raise ConfigError(f"{name}={_short(value)} is outside {interval}")
        for text in value if type(value) is tuple else (value,):
            if type(text) is str and _CONTROL.search(text):
                raise ConfigError(f"{name}={_short(text)} holds a control character")


def _inside(value: int | float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(", "))
    return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")


def check_kind(name: str, value: Any, kind: Any) -> None:
    """Check the type of an argument, where a wrong one would fail far away.

    Raises: ConfigError naming the value.

    Example:
        >>> check_kind("cfg", 3, Layout)
        Traceback (most recent call last):
            ...
        dsv3_jax.config.ConfigError: cfg=3 is not of type Layout
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={_short(value)} is not of type {_spell(kind)}")


def check_inputs(width: int | None, **inputs: Any) -> None:
    """Check what a model or a layer is given.

    Args:
        width: of the first input, an array [B, T, width]; None if it is one of integers [B, T].
        inputs: the others are arrays of integers [B, T], or None.
    Raises: ValueError naming the input.

    Example:
        >>> import numpy as np
        >>> check_inputs(128, x=np.ones((2, 8)))
        Traceback (most recent call last):
            ...
        ValueError: x of shape (2, 8) is not an array [B, T, 128]
    """
    (name, x), *others = inputs.items()
    shape: Any = getattr(x, "shape", None)
    what = f"{name} of type {type(x).__name__}" if shape is None else f"{name} of shape {shape}"
    if width is not None and (shape is None or len(shape) != 3 or shape[-1] != width):
        raise ValueError(f"{what} is not an array [B, T, {width}]")
    if width is None and (shape is None or len(shape) != 2 or x.dtype.kind not in "iu"):
        raise ValueError(f"{what} is not an array [B, T] of integers")
    for other, ids in others:
        if ids is not None and getattr(ids, "shape", None) != shape[:2]:
            raise ValueError(f"{other} is not an array of shape {shape[:2]}, as {name} is")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _matches(value, hint) -> bool:
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(v, args[0]) for v in value)
    if args:  # a union
        return any(_matches(value, a) for a in args)
    return type(value) is hint if hint in (int, float, bool, str) else isinstance(value, hint)


def _spell(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


def replace(config: V, /, **changes: Any) -> V:
    """Make a configuration that differs in some fields.

    Raises: ConfigError naming a field that it does not have, or a value that it refuses.

    Example:
        >>> replace(Layout(), fsdp=True)
        Layout(fsdp=True, expert_comm='auto', capacity_slack=1.25)
    """
    _check_names(type(config), changes)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _check_names(kind: type, names: Iterable[str]) -> None:
    known = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for name in names:
        if name not in known:
            raise ConfigError(f"{_short(name)} is not a key of {kind.__name__}{did_you_mean(name, known)}")


@dataclass(frozen=True)
class Yarn:
    """Context extension of RoPE (YaRN, arXiv 2309.00071), named as in the released configs.

    Example:
        >>> Yarn(factor=40.0).original_max_positions * 40  # the context of DeepSeek-V3
        163840
    """

    factor: float = 1.0  # context length over the original one; 1 turns YaRN off
    original_max_positions: int = 4096  # context length before the extension
    beta_fast: float = 32.0  # feature pairs with at least so many turns in the original context keep their frequency
    beta_slow: float = 1.0  # feature pairs with at most so many turns have their frequency divided by the factor
    mscale: float = 1.0  # weight of the temperature of rotary features, over that of mscale_all_dim
    mscale_all_dim: float = 1.0  # weight of the temperature of all features, which scales the scores; 0 turns it off

    def __post_init__(self):
        _check_fields(self, "yarn ")


@dataclass(frozen=True)
class Balance:
    """How the load of the experts is balanced: methods that can be combined; 0 turns one off.

    Sources: loss-free bias arXiv 2408.15664; sequence-wise loss DeepSeek-V3 report, section 2.1.2; Switch loss
    arXiv 2101.03961; z-loss arXiv 2202.08906.

    Example:
        >>> Balance(switch_alpha=1e-3) == Balance(1e-3, 1e-4, 1e-3, rule="sign", z_alpha=0.0)
        True
    """

    bias_rate: float = 1e-3  # step of the loss-free router bias after each batch (gamma); for quantile at most 1
    sequence_alpha: float = 1e-4  # weight of the sequence-wise balance loss (alpha)
    switch_alpha: float = 0.0  # weight of the batch-wise Switch balance loss
    # how the bias moves (ops.balance.RULES). Rule sign: by gamma towards the mean load (V3). Rule proportional: by
    # gamma times the distance from it. Rule quantile: the share gamma of the way to the bias that would have balanced
    # the batch
    rule: str = "sign"
    z_alpha: float = 0.0  # weight of the z-loss, which keeps the router's logits small

    def __post_init__(self):
        _check_fields(self, "balance ")
        most = 1 if self.rule == "quantile" else math.inf
        _require({f"balance bias_rate={self.bias_rate} is over 1 with rule={self.rule!r}": self.bias_rate <= most})


@dataclass(frozen=True)
class Layout:
    """How a model is sharded over a mesh of devices.

    Example:
        >>> Layout(fsdp=True)
        Layout(fsdp=True, expert_comm='auto', capacity_slack=1.25)
    """

    fsdp: bool = False  # shard weights and optimizer state along data too; each layer is gathered when it is computed
    # how tokens reach the experts of other devices. gather sends all tokens. all_to_all sends a token once to each
    # device that needs it. ragged does so without padding where the hardware can. auto is the cheaper of the first two
    expert_comm: Literal["auto", "gather", "all_to_all", "ragged"] = "auto"
    capacity_slack: float = 1.25  # for all_to_all: slots and rows of the first round, over what even load needs

    def __post_init__(self):
        _check_fields(self, "layout ")


@dataclass(frozen=True)
class Execution:
    """How a model is computed. It changes results by rounding only: a run may resume under another execution.

    Example:
        >>> Execution(compute_dtype="bfloat16", remat="full").kernels
        'auto'
    """

    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of activations; what trains is always float32
    # what the backward pass keeps of a layer, most memory first. none recomputes nothing. dots keeps products and
    # attention. queries keeps attention's results, the factors of norms, and on a TPU the queries. attention keeps its
    # results alone and so computes it once. full keeps nothing
    remat: Literal["none", "dots", "queries", "attention", "full"] = "none"
    # which kernels compute: auto takes the fastest, xla those that XLA compiles; `dsv3 info PRESET --kernels` lists
    # other names. OP=NAME forces the kernel of one op; commas join several
    kernels: str = "auto"
    layout: Layout = field(default_factory=Layout)  # how the model is sharded over a mesh of devices
    # 8-bit operands for the products of linear layers in training. fp8 is DeepSeek-V3's recipe, fp8_ue8m0 V3.1's, whose
    # scales are powers of two, and mxfp8 that of the MX formats. none multiplies in compute_dtype. Emulated, so slower:
    # it shows what the rounding does to the loss. GPUs and TPUs multiply the numbers of fp8_ue8m0 and mxfp8 in
    # bfloat16, which holds them exactly
    precision: Precision = "none"

    def __post_init__(self):
        _check_fields(self)
        form = re.fullmatch(r"\w+(=\w+)?(,\w+=\w+)*", self.kernels)
        _require({f"kernels={self.kernels!r} is not of the form NAME, OP=NAME or NAME,OP=NAME": form is not None})


class HeadKind(NamedTuple):
    """Facts about a kind of multi-token head, for configuration, loss and decoding; the module is in model/mtp.py.

    Example:
        >>> [name for name, kind in HEAD_KINDS.items() if kind.reads_tokens]
        ['deepseek', 'eagle']
    """

    title: str  # in tables
    # It reads the tokens that it continues, so it can draft beyond its depth. Otherwise it reads the trunk's output.
    reads_tokens: bool
    has_experts: bool  # it has a sparse block, so a router
    reads_raw: bool  # it has its own norm, so it may read the trunk's output before the final norm
    max_depth: int | None = None  # None means any


HEAD_KINDS: Table[HeadKind] = Table("mtp_kind", {
    "deepseek": HeadKind("MTP modules", reads_tokens=True, has_experts=True, reads_raw=True),
    "meta": HeadKind("Meta heads", reads_tokens=False, has_experts=True, reads_raw=True),
    "medusa": HeadKind("Medusa heads", reads_tokens=False, has_experts=False, reads_raw=False),
    "eagle": HeadKind("EAGLE head", reads_tokens=True, has_experts=False, reads_raw=False, max_depth=1),
})  # fmt: skip


@dataclass(frozen=True)
class ModelConfig:
    """Shape and rules of a model of the DeepSeek-V3 family.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> replace(preset("tiny"), attention="gqa", num_kv_heads=2).kv_heads
        2
    """

    vocab_size: int  # number of token ids (W)
    dim: int  # width of the hidden state (D)
    num_layers: int  # number of layers, dense and sparse together (L)
    num_dense_layers: int  # number of dense layers, which come first: their FFN has no experts
    dense_dim: int  # hidden width of the FFN in dense layers
    # attention
    num_heads: int  # number of attention heads (H)
    q_latent_dim: int | None  # width of the compressed queries (Q); None means that queries are not compressed
    kv_latent_dim: int  # width of the compressed keys and values, which MLA caches (C)
    nope_head_dim: int  # width of a head's queries and keys without positions (N)
    rope_head_dim: int  # width of a head's queries and keys with rotary positions (R)
    v_head_dim: int  # width of a head's values (V)
    # DeepSeekMoE
    num_experts: int  # number of routed experts in a sparse layer (E)
    experts_per_token: int  # number of routed experts that a token is sent to (K)
    num_shared_experts: int  # number of shared experts, which every token uses
    expert_dim: int  # hidden width of an expert (F)
    # kind of attention: MLA compresses keys and values into a latent, and DSA is MLA over the tokens that an indexer
    # chooses (V3.2); the others do not, and their keys have nope_head_dim + rope_head_dim numbers a head
    attention: Literal["mla", "dsa", "mha", "gqa", "mqa"] = "mla"
    num_kv_heads: int | None = None  # number of heads with keys and values; for attention gqa only
    qk_norm: bool = False  # norm each head's queries and keys before RoPE; for attention mha, gqa and mqa
    index_heads: int = 64  # number of heads of an indexer (I); index settings are for attention dsa only
    index_dim: int = 128  # width of an indexer's queries and keys (X), of which the first rope_head_dim are rotated
    index_topk: int = 2048  # number of tokens that a query attends to (k)
    index_interleaved: bool = False  # as rope_interleaved, for the indexer
    # for each layer: full has an indexer; shared attends to the tokens of the last full one. None means all full
    index_types: tuple[str, ...] | None = None
    # index queries and keys are rotated by a Hadamard matrix and rounded to e4m3, as in the released inference code;
    # the scales of fp8_ue8m0 are powers of two
    index_precision: Literal["none", "fp8", "fp8_ue8m0"] = "none"
    num_groups: int = 1  # number of groups that the experts are divided into (G)
    groups_per_token: int = 1  # number of groups that a token's experts may come from
    # how scores become a choice (ops.routing.ROUTERS): sigmoid with a balancing bias (V3), sqrtsoftplus the same (V4),
    # softmax with balance
    # losses (V2), topk takes the softmax over the chosen experts, noisy_topk adds learnt noise in training, dense uses
    # every expert, hash chooses by the token's id
    router: str = "sigmoid"
    group_score: Literal["top2_sum", "max"] = "top2_sum"  # score of a group: sum of its two best experts, or the best
    normalize_gates: bool = True  # divide a token's gates by their sum
    routed_scale: float = 1.0  # factor on the output of the routed experts
    balance: Balance = field(default_factory=Balance)  # how the load of the experts is balanced; 0 turns a method off
    # capacity of an expert, over its even share of the tokens; tokens beyond it are dropped. None drops no token
    capacity_factor: float | None = None
    # positions
    rope_theta: float = 1e4  # base of the rotary frequencies
    # rotate pairs of neighbours (2i, 2i+1), as in the released weights; otherwise pairs of halves (i, i+R/2)
    rope_interleaved: bool = True
    yarn: Yarn = field(default_factory=Yarn)  # context extension of RoPE (YaRN, arXiv 2309.00071)
    max_positions: int = 4096  # longest sequence in tokens
    # multi-token prediction
    mtp_depth: int = 0  # number of multi-token heads (M)
    # kind of multi-token heads, of HEAD_KINDS: deepseek's causal chain, meta's and medusa's parallel heads, eagle
    mtp_kind: str = "deepseek"
    mtp_input: Literal["normed", "raw"] = "normed"  # heads read the trunk's output after or before the final norm (h^0)
    # the rest
    norm_eps: float = 1e-6  # epsilon of RMSNorm
    tie_embeddings: bool = False  # use the embedding table as the unembedding too
    init_std: float = 0.006  # standard deviation of the initial weights

    def __post_init__(self):
        _check_fields(self)
        _check_experts(self)
        _check_attention(self)
        kind, depth = self.head_kind, self.mtp_depth
        most = kind.max_depth
        raw = self.mtp_input == "raw" and depth > 0
        _require({
            f"mtp_depth={depth} is more than the {most} of mtp_kind={self.mtp_kind!r}": most is None or depth <= most,
            f"mtp_input='raw' needs a norm in the head: mtp_kind={self.mtp_kind!r} has none": kind.reads_raw or not raw,
        })  # fmt: skip

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads; MLA forms them for every head."""
        return self.num_kv_heads or (1 if self.attention == "mqa" else self.num_heads)

    @property
    def has_latent(self) -> bool:
        """Whether keys and values are compressed into a latent."""
        return self.attention in ("mla", "dsa")

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
    experts = f"num_experts={c.num_experts}"
    chosen = f"experts_per_token={c.experts_per_token}"
    groups = c.num_groups
    pairs = ("num_dense_layers", "num_layers"), ("experts_per_token", "num_experts"), ("groups_per_token", "num_groups")
    for small, large in pairs:
        a, b = getattr(c, small), getattr(c, large)
        _require({f"{small}={a} is more than {large}={b}": a <= b})
    _require({f"num_groups={groups} does not divide {experts}": c.num_experts % groups == 0})
    size = c.num_experts // groups
    fits = c.experts_per_token <= c.groups_per_token * size
    all_chosen = c.experts_per_token == c.num_experts
    enough = groups == 1 or c.group_score == "max" or size >= 2
    _require({
        f"{chosen} does not fit in groups_per_token={c.groups_per_token} groups of {size}": fits,
        f"group_score='top2_sum' needs 2 experts a group, num_groups={groups} leaves {size}": enough,
        f"router='dense' takes every expert: {chosen} must be {experts}": c.router != "dense" or all_chosen,
    })  # fmt: skip


def _check_attention(c: ModelConfig) -> None:
    count = c.num_kv_heads
    kind = f"attention={c.attention!r}"
    mla = c.has_latent
    reach = c.yarn.original_max_positions * c.yarn.factor
    plain = c.yarn.factor == 1
    _require({
        f"rope_head_dim={c.rope_head_dim} is odd": c.rope_head_dim % 2 == 0,
        f"num_kv_heads={count} with {kind}: it is for 'gqa', which needs it": (c.attention == "gqa") == bool(count),
        "qk_norm=True is for attention='mha', 'gqa' and 'mqa'; 'mla' has norms on its latents": not (c.qk_norm and mla),
        f"num_kv_heads={count} does not divide num_heads={c.num_heads}": c.num_heads % c.kv_heads == 0,
        # YaRN counts turns by the logarithm of the base.
        f"rope_theta={c.rope_theta} is not above 1, as YaRN's factor={c.yarn.factor} needs": plain or c.rope_theta > 1,
        f"max_positions={c.max_positions} is beyond YaRN's reach of {reach:g}": plain or c.max_positions <= reach,
    })  # fmt: skip
    if c.attention == "dsa":
        _check_indexer(c)


def _check_indexer(c: ModelConfig) -> None:
    types = c.index_types
    width = f"index_dim={c.index_dim}"
    rounds = c.index_precision != "none"
    for kind in types or ():
        _require({f"index_types={kind!r} is not one of full, shared": kind in ("full", "shared")})
    _require({
        "q_latent_dim=None with attention='dsa', which makes index queries from it; give a width": bool(c.q_latent_dim),
        f"{width} is less than the rope_head_dim={c.rope_head_dim} that it rotates": c.index_dim >= c.rope_head_dim,
        f"{width} is no power of 2, as index_precision={c.index_precision!r} needs": (
            not rounds or c.index_dim.bit_count() == 1
        ),
        f"index_types={types} has not one entry for each of num_layers={c.num_layers}": (
            types is None or len(types) == c.num_layers
        ),
        f"index_types={types} begins with a layer that has no set to share; begin with 'full'": (
            types is None or types[:1] == ("full",)
        ),
    })  # fmt: skip


# Settings of `DataConfig` that are for some formats; others leave them at their default.
ONLY_FOR = {
    "mixture": ("shards",), "temperature": ("shards",), "max_documents": ("text", "chat"), "chat_template": ("chat",),
    "template": ("chat",), "prompts": ("chat",), "fim_rate": ("text",), "separate_documents": ("text", "shards"),
}  # fmt: skip


@dataclass(frozen=True)
class DataConfig:
    """The source of the text, and how it becomes [B, T] batches.

    Example:
        >>> DataConfig(paths=("books",), seq_len=512).batch_size
        16
    """

    # files or folders of text, or hf:NAME[:CONFIG][@SPLIT], a dataset of Hugging Face; empty means the text that this
    # Python carries
    paths: tuple[str, ...] = ()
    tokenizer: str = "bytes"  # bytes, or the path of a tokenizer.json
    seq_len: int = 256  # number of tokens in a sequence (T)
    batch_size: int = 16  # number of sequences in an optimizer step (B)
    separate_documents: bool = True  # documents in a row do not attend to each other; each has positions from 0
    fim_rate: float = 0.0  # share of documents that are rearranged for fill-in-the-middle (PSM)
    val_fraction: float = 0.05  # share of documents that are held out for validation, chosen by their hash
    max_documents: int | None = None  # number of documents to read, for quick runs; None means all
    seed: int = 0  # seed of the order of documents
    # what the files hold: text, every token of which is a target; or chat examples, JSONL or Parquet with messages,
    # prompt and completion, or text, of which the assistant's tokens are targets; or shards, for which `paths` names
    # the folder that `dsv3 data tokenize` wrote, with its own split into training and validation
    format: Literal["text", "chat", "shards"] = "text"
    # for chat: the file of a Jinja template, or plain, which writes the role on a line of its own; None means the
    # template of the model that training starts with
    chat_template: str | None = None
    template: tuple[str, ...] = ()  # for chat: variables of the template, as in ("thinking=true",)
    # for chat: what the prompt of a task is if it is a text: a user's turn of the chat template, or text that the model
    # continues
    prompts: Literal["turn", "text"] = "turn"
    # key of JSONL and column of Parquet or a dataset that holds the text; for chat, the messages
    text_column: str = "text"
    # for shards: weights of domains, as in ("code=2", "English=1"), other domains are left out; empty means all
    # domains, weighted by their tokens
    mixture: tuple[str, ...] = ()
    temperature: float = 1.0  # for shards: weights are raised to the power 1 / temperature; above 1 they are more equal

    def __post_init__(self):
        _check_fields(self)
        for name, formats in ONLY_FOR.items():
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            fits = value == default or self.format in formats
            either = " or ".join(map(repr, formats))
            _require({f"{name}={value!r} is for format={either}, not {self.format!r}": fits})
        self.weights()  # refuses a mixture that is none
        few = self.batch_size * self.seq_len <= 2**30
        folder = self.format != "shards" or len(self.paths) == 1
        _require({
            f"paths={self.paths} is not one folder of shards; name what `dsv3 data tokenize` wrote": folder,
            f"batch_size={self.batch_size} x seq_len={self.seq_len} is over 2^30 tokens": few,
        })  # fmt: skip

    def weights(self) -> dict[str, float]:
        """Return the weights of `mixture` by domain.

        Raises: ConfigError for an entry that is not DOMAIN=WEIGHT, a domain named twice, or weights that do not sum to
            something positive.

        Example:
            >>> DataConfig(("shards",), format="shards", mixture=("code=2", "English=1")).weights()
            {'code': 2.0, 'English': 1.0}
        """
        weights: dict[str, float] = {}
        for entry in self.mixture:
            name, _, number = entry.rpartition("=")
            try:
                weights[name] = float(number)
            except ValueError:
                weights[name] = math.nan
            usable = bool(name) and 0 <= weights[name] < math.inf
            _require({f"mixture={entry!r} is not DOMAIN=WEIGHT, a weight from 0 up": usable})
        _require({
            f"mixture={self.mixture} names a domain twice": len(weights) == len(self.mixture),
            f"mixture={self.mixture} has weights that sum to 0; give a domain a positive weight": (
                not weights or sum(weights.values()) > 0
            ),
        })  # fmt: skip
        return weights


# made by training/optim.py
OPTIMIZERS = Table("optim name", {"adamw": "AdamW", "muon": "Muon for matrices, AdamW for the rest"})
OPTAX = "optax:"  # begins the name that `ds.train.fit(…, optimizer=tx)` gives a run


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the schedules. The defaults are AdamW and the DeepSeek-V3 report's, section 4.2.

    Example:
        >>> OptimConfig(learning_rate=1e-3).warmup_steps
        2000
    """

    # adamw, or muon: it orthogonalises the updates of matrices, LoRA's A and B too, and leaves embeddings, router and
    # norms to AdamW
    name: str = "adamw"
    # learning rate after the warm-up: report is constant, cosine, constant; wsd is constant, a line down, constant;
    # cosine falls to the last step
    schedule: Literal["report", "wsd", "cosine"] = "report"
    learning_rate: float = 2.2e-4  # largest learning rate, between the warm-up and the decay
    final_learning_rate: float = 2.2e-5  # learning rate after the decay
    warmup_steps: int = 2000  # number of steps in which the learning rate rises from 0
    decay_start: float = 0.67  # share of all steps after which the decay begins; not for schedule cosine
    decay_end: float = 0.97  # share of all steps after which the decay ends; not for schedule cosine
    beta1: float = 0.9  # decay of AdamW's mean of gradients
    beta2: float = 0.95  # decay of AdamW's mean of squared gradients
    muon_beta: float = 0.95  # decay of Muon's mean of gradients
    eps: float = 1e-8  # epsilon of AdamW's division
    weight_decay: float = 0.1  # weight decay of matrices; the scales of norms have none
    clip_norm: float = 1.0  # largest norm of the whole gradient; a larger gradient is scaled down
    # QK-clip: after a step, weights of heads whose largest attention logit was above it are scaled down; None: never
    qk_clip: float | None = None
    mtp_weight: float = 0.3  # weight of the multi-token loss (lambda)
    mtp_final_weight: float = 0.1  # weight of the multi-token loss once the decay begins
    bias_freeze: float = 0.97  # share of all steps after which the router bias no longer moves
    microbatches: int = 1  # number of parts of a batch whose gradients are accumulated
    # dtype of the means of AdamW and Muon; bfloat16 halves their memory (DeepSeek-V3 report, section 3.3.2)
    moments_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        _check_fields(self)
        if not self.name.startswith(OPTAX):
            OPTIMIZERS[self.name]  # refuses a name that it does not have
        # A bfloat16 has 8 bits: a step of less than 2^-9 of a mean is rounded away, and a mean could not decay.
        most = 0.99 if self.moments_dtype == "bfloat16" else 1
        dtype = self.moments_dtype
        start, end = self.decay_start, self.decay_end
        for name in ("beta1", "beta2", "muon_beta"):
            beta = getattr(self, name)
            _require({f"{name}={beta} is over 0.99, too slow for moments_dtype={dtype!r}; use 'float32'": beta <= most})
        _require({f"decay_start={start} is after decay_end={end}": start <= end})


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: W + (alpha / rank) A B is used in place of a frozen W, and only A and B are trained.

    Source: LoRA (arXiv 2106.09685), section 4.1.

    Example:
        >>> Lora(rank=8, on=("attention", "routed")).alpha
        16.0
    """

    rank: int = 0  # rank of the change of a matrix; 0 trains the matrices themselves
    alpha: float = 16.0  # weight of the change, times rank
    # matrices that change, in all layers and multi-token heads: of attention, of the FFN in dense layers, of the shared
    # and of the routed experts, each expert by itself
    on: tuple[LoraPart, ...] = ("attention",)

    def __post_init__(self):
        _check_fields(self, "lora ")
        _require({
            "lora on=() names no matrices; use rank=0 to train without adapters": len(self.on) > 0,
            f"lora on={self.on} names one part twice": len(set(self.on)) == len(self.on),
        })  # fmt: skip


@dataclass(frozen=True)
class Grpo:
    """Reinforcement learning by GRPO: the model answers each prompt a few times, and learns from its better answers.

    Sources: GRPO arXiv 2402.03300; token_mean and two clips DAPO, arXiv 2503.14476; constant_length arXiv 2503.20783.

    Example:
        >>> Grpo(group=8, checker="number").form
        'token_mean'
    """

    group: int = 0  # answers that are sampled for each prompt; 0 trains on the given answers
    # what makes an answer right: exact (equal texts, but for spaces around them), number (its last number is the given
    # answer's), regex (the given answer is a pattern that it holds), or module:name, a function (text, row) → bool
    checker: str = "exact"
    max_new_tokens: int = 256  # tokens of an answer, at most
    temperature: float = 1.0  # of sampling; ratios and KL are of the distribution that was sampled from
    clip_low: float = 0.2  # ratios of new to old probabilities below 1 minus this teach nothing
    clip_high: float = 0.2  # ratios above 1 plus this teach nothing
    kl: float = 0.0  # weight of the KL divergence from start (beta); without LoRA it keeps start in memory, too
    # token_mean is the mean over all tokens of answers; constant_length divides their sum by the most that they may
    # have, so that long answers count no less
    form: Literal["token_mean", "constant_length"] = "token_mean"
    replay: bool = True  # train with the experts that the sampler chose
    # dtype of the sampler's cache; None is compute_dtype
    cache_dtype: CacheDtype | None = None

    def __post_init__(self):
        _check_fields(self, "grpo ")
        _require({"grpo group=1 has nothing to compare an answer with; sample at least 2": self.group != 1})


@dataclass(frozen=True)
class RunConfig:
    """One training run: a model, how it is computed, its data, its optimizer, and when to evaluate, save and stop.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> RunConfig(preset("tiny"), steps=100).data.seq_len
        256
    """

    model: ModelConfig
    execution: Execution = field(default_factory=Execution)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000  # number of optimizer steps
    eval_every: int = 250  # number of steps between two evaluations
    eval_batches: int = 8  # number of validation batches in an evaluation
    save_every: int = 250  # number of steps between two checkpoints
    keep: int = 3  # number of checkpoints to keep; older ones are deleted
    log_every: int = 10  # number of steps between two rows of metrics
    seed: int = 0  # seed of the initial weights
    trunk: str | None = None  # folder of a run whose trunk is taken over and frozen; only the multi-token heads train
    start: str | None = None  # folder of a run whose last weights training begins with
    lora: Lora = field(default_factory=Lora)  # low-rank adapters, which train in place of the weights of start
    grpo: Grpo = field(default_factory=Grpo)  # learning from the model's own answers to the prompts of chat examples
    # of attention dsa: sparse trains the model on its text, and each indexer to choose what attention to its choice
    # weighs most; warm trains the indexers alone, by the dense attention of start
    indexer_stage: Literal["sparse", "warm"] = "sparse"
    head_loss: HeadLoss = "ce"  # of heads on a frozen trunk: cross-entropy on the text, or KL or TV to the trunk's law

    def __post_init__(self):
        _check_fields(self)
        d = self.data
        m = self.model
        on = self.trunk
        clip = self.optim.qk_clip
        parts = self.optim.microbatches
        loss = self.head_loss
        attention = f"attention='mla', not {m.attention!r}"
        fits = d.seq_len <= m.max_positions
        warm = self.indexer_stage == "warm"
        sparse = m.attention == "dsa"
        rank = self.lora.rank
        _require({
            f"head_loss={loss!r} compares heads with a frozen trunk; trunk=None needs 'ce'": loss == "ce" or bool(on),
            f"microbatches={parts} does not divide batch_size={d.batch_size}": d.batch_size % parts == 0,
            f"seq_len={d.seq_len} is more than the model's max_positions={m.max_positions}": fits,
            f"seq_len={d.seq_len} leaves no target for mtp_depth={m.mtp_depth}": d.seq_len > m.mtp_depth + 1,
            f"mtp_depth={m.mtp_depth} leaves nothing to train on the frozen trunk {on!r}": not on or m.mtp_depth > 0,
            f"a run begins with start={self.start!r} or on trunk={on!r}, not with both": not (on and self.start),
            f"optim.qk_clip={clip} is for {attention}": clip is None or m.attention == "mla",
            f"indexer_stage='warm' is for attention='dsa', not {m.attention!r}": sparse or not warm,
            "indexer_stage='warm' learns from given weights, and those of start=None are random; give start": (
                not warm or self.start is not None
            ),
            f"lora rank={rank} is not supported with indexer_stage='warm', which trains indexers": not (warm and rank),
        })  # fmt: skip
        if rank:
            _check_lora(self)
        if self.grpo.group:
            _check_grpo(self)

    @property
    def freezes(self) -> bool:
        """Whether the weights of `start` or `trunk` stay as they are."""
        return self.trunk is not None or self.lora.rank > 0


def _check_lora(run: RunConfig) -> None:
    m = run.model
    rank = f"lora rank={run.lora.rank}"
    on = run.trunk
    clip = run.optim.qk_clip
    _require({
        f"{rank} is not supported on a frozen trunk={on!r}; use start": on is None,
        f"{rank} changes given weights, and those of start=None are random; give start": run.start is not None,
        f"{rank} is not supported with optim.qk_clip={clip}, which scales weights, not adapters": clip is None,
    })  # fmt: skip
    sparse = m.num_sparse_layers + m.num_sparse_heads > 0
    dense = m.num_dense_layers > 0 or (m.mtp_kind == "eagle" and m.mtp_depth > 0)
    there = {"attention": True, "dense": dense, "shared": sparse and m.num_shared_experts > 0, "routed": sparse}
    _require({f"lora on={part!r} names matrices that the model does not have": there[part] for part in run.lora.on})


def _check_grpo(run: RunConfig) -> None:
    group = f"grpo group={run.grpo.group}"
    data = run.data
    _require({
        f"{group} asks the prompts of chat examples; data.format={data.format!r} must be 'chat'": data.format == "chat",
        f"{group} does not divide batch_size={data.batch_size}": data.batch_size % run.grpo.group == 0,
        f"{group} is not supported with indexer_stage='warm', which trains indexers": run.indexer_stage != "warm",
    })  # fmt: skip


def to_dict(config) -> dict:
    """Turn a configuration into plain JSON values.

    Example:
        >>> to_dict(Layout())
        {'fsdp': False, 'expert_comm': 'auto', 'capacity_slack': 1.25}
    """
    return dataclasses.asdict(config)


def from_dict(kind, values: dict):
    """Make a configuration from plain JSON values: the inverse of `to_dict`.

    Raises: ConfigError naming a key that `kind` does not have, or a value that it refuses.

    Example:
        >>> from_dict(Layout, {"fsdp": True})
        Layout(fsdp=True, expert_comm='auto', capacity_slack=1.25)
    """
    _check_names(kind, values)
    hints = typing.get_type_hints(kind)
    made = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            value = from_dict(hints[key], value)
        made[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except TypeError as error:  # a key without a default is missing
        raise ConfigError(f"{kind.__name__}: {str(error).split('__init__() ')[-1]}") from error


def first_difference(a: dict, b: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
    """Find the first key, in alphabetical order, whose values differ: (key, value in a, value in b).

    Example:
        >>> first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
        ('b.c', 2, 3)
    """
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            inner = first_difference(x, y, f"{prefix}{key}.")
            if inner:
                return inner
        elif (key in a) != (key in b) or json.dumps(x) != json.dumps(y):
            return prefix + key, x, y
    return None
