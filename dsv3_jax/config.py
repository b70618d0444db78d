"""What a model and a run are: frozen dataclasses, validated when they are made.

A recipe is a diff of another: `replace(preset("tiny"), balance=Balance(switch_alpha=1e-3))`.
Letters in the comments are the papers': B batch, T length, D width, H heads, N nope dim, R rope dim, V value
dim, C key-value latent, Q query latent, E routed experts, K experts a token, G groups, F expert width, L layers,
W vocabulary.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

replace = dataclasses.replace

# What decoding remembers of each token, and in which dtype; see `cache.py`.
CacheKind = Literal["latent", "expanded", "none"]
CacheDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3"]


class ConfigError(ValueError):
    """A configuration that cannot be: its message is one sentence with the offending value."""


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _check_types(config) -> None:
    """Refuse values of another type at once, where the message can still name the key."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if hint is float and type(value) is int:
            object.__setattr__(config, item.name, float(value))
            continue
        if not _matches(value, hint):
            raise ConfigError(f"{item.name}={value!r} is not of type {_spell(hint)}")


def _matches(value, hint) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(v, args[0]) for v in value)
    if args:  # a union
        return any(_matches(value, a) for a in args)
    if hint is type(None):
        return value is None
    return type(value) is hint if hint in (int, float, bool, str) else isinstance(value, hint)


def _spell(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


@dataclass(frozen=True)
class Yarn:
    """RoPE context extension (YaRN, arXiv 2309.00071) as the released configs spell it; factor 1 is no YaRN."""

    factor: float = 1.0  # s: how many times longer than the original
    original_max_positions: int = 4096  # L0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        _check_types(self)
        _require(self.factor >= 1.0, f"yarn factor={self.factor} is below 1")
        _require(
            self.original_max_positions > 0,
            f"yarn original_max_positions={self.original_max_positions} is not positive",
        )


@dataclass(frozen=True)
class Balance:
    """How expert load is kept even; the three means may be combined, all at 0 is none.

    Sources: loss-free bias arXiv 2408.15664; sequence-wise loss DeepSeek-V3 report, section 2.1.2; Switch loss
    arXiv 2101.03961.
    """

    bias_rate: float = 1e-3  # gamma: step of the loss-free correction bias
    sequence_alpha: float = 1e-4  # alpha: weight of the sequence-wise loss
    switch_alpha: float = 0.0  # weight of the batch-wise Switch loss

    def __post_init__(self):
        _check_types(self)
        for name in ("bias_rate", "sequence_alpha", "switch_alpha"):
            _require(getattr(self, name) >= 0, f"balance {name}={getattr(self, name)} is negative")


@dataclass(frozen=True)
class Layout:
    """How a model lies on a device mesh. It changes nothing that is computed: a run may go on under another layout."""

    fsdp: bool = False  # the mesh axis "data" cuts weights and optimizer state, too; a layer's are gathered in its turn
    # How tokens come to other devices' experts, see expert_parallel.py; "auto": the smaller of the first two.
    exchange: Literal["auto", "gather", "all_to_all", "ragged"] = "auto"
    slack: float = 1.25  # of "all_to_all": places for tokens in a round, over what even load needs

    def __post_init__(self):
        _check_types(self)
        _require(self.slack >= 1, f"layout slack={self.slack} is below 1")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and rules of one DeepSeek-V3 family model."""

    vocab_size: int  # W
    dim: int  # D
    num_layers: int  # L, dense and sparse together
    num_dense_layers: int  # the first layers, with one wide FFN
    dense_dim: int  # hidden width of that FFN
    # attention
    num_heads: int  # H
    q_latent_dim: int | None  # Q; None: no query compression
    kv_latent_dim: int  # C
    nope_head_dim: int  # N
    rope_head_dim: int  # R
    v_head_dim: int  # V
    # DeepSeekMoE
    num_experts: int  # E
    experts_per_token: int  # K
    num_shared_experts: int
    expert_dim: int  # F
    attention: Literal["mla", "mha", "gqa", "mqa"] = "mla"  # all but MLA: no latents, keys of N + R numbers a head
    num_kv_heads: int | None = None  # of attention="gqa" alone
    num_groups: int = 1  # G
    groups_per_token: int = 1  # groups that a token may reach
    router: Literal["sigmoid", "softmax", "topk", "dense"] = "sigmoid"
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    normalize_gates: bool = True
    routed_scale: float = 1.0
    balance: Balance = field(default_factory=Balance)
    dispatch: Literal["auto", "blocks", "ragged_dot", "dense", "capacity"] = "auto"
    capacity_factor: float = 1.25  # of dispatch="capacity" alone, which drops tokens
    # positions
    rope_theta: float = 1e4
    rope_interleaved: bool = True  # pairs (2i, 2i+1) as in the released weights; False: halves (i, i+R/2)
    yarn: Yarn = field(default_factory=Yarn)
    max_positions: int = 4096
    # multi-token prediction
    mtp_depth: int = 0  # M: how many heads
    mtp_kind: Literal["deepseek", "meta", "medusa", "eagle"] = "deepseek"  # a causal chain, parallel heads, …
    mtp_input: Literal["normed", "raw"] = "normed"  # h^0: the trunk's output after or before its final norm
    # the rest
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.006
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"  # recomputed backward: nothing, all but products, whole layers
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self):
        _check_types(self)
        for name in (
            "vocab_size", "dim", "num_layers", "dense_dim", "num_heads", "kv_latent_dim", "nope_head_dim",
            "rope_head_dim", "v_head_dim", "num_experts", "experts_per_token", "expert_dim", "num_groups",
            "groups_per_token", "max_positions",
        ):  # fmt: skip
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} is not positive")
        for name in ("num_dense_layers", "num_shared_experts", "mtp_depth"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative")
        _require(
            self.q_latent_dim is None or self.q_latent_dim > 0, f"q_latent_dim={self.q_latent_dim} is not positive"
        )
        _require(
            self.num_dense_layers <= self.num_layers,
            f"num_dense_layers={self.num_dense_layers} is more than num_layers={self.num_layers}",
        )
        _require(
            self.experts_per_token <= self.num_experts,
            f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}",
        )
        _require(
            self.num_experts % self.num_groups == 0,
            f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}",
        )
        _require(
            self.groups_per_token <= self.num_groups,
            f"groups_per_token={self.groups_per_token} is more than num_groups={self.num_groups}",
        )
        _require(
            self.experts_per_token <= self.groups_per_token * (self.num_experts // self.num_groups),
            f"experts_per_token={self.experts_per_token} does not fit in groups_per_token={self.groups_per_token} "
            f"groups of {self.num_experts // self.num_groups} experts",
        )
        _require(
            self.num_groups == 1 or self.group_score == "max" or self.num_experts // self.num_groups >= 2,
            f"group_score='top2_sum' needs 2 experts a group, num_groups={self.num_groups} leaves "
            f"{self.num_experts // self.num_groups}",
        )
        _require(
            self.router != "dense" or self.experts_per_token == self.num_experts,
            f"router='dense' takes every expert: experts_per_token={self.experts_per_token} must be "
            f"num_experts={self.num_experts}",
        )
        self._check_kv_heads()
        _require(
            self.mtp_kind != "eagle" or self.mtp_depth <= 1,
            f"mtp_kind='eagle' is a single head that reads its own output: mtp_depth={self.mtp_depth} must be 1",
        )
        _require(
            self.mtp_input == "normed" or self.mtp_kind in ("deepseek", "meta") or self.mtp_depth == 0,
            f"mtp_kind={self.mtp_kind!r} has no norm of its own: mtp_input={self.mtp_input!r} must be 'normed'",
        )
        _require(self.rope_head_dim % 2 == 0, f"rope_head_dim={self.rope_head_dim} is odd")
        _require(self.capacity_factor > 0, f"capacity_factor={self.capacity_factor} is not positive")
        _require(self.rope_theta > 0, f"rope_theta={self.rope_theta} is not positive")
        _require(self.norm_eps > 0, f"norm_eps={self.norm_eps} is not positive")
        _require(self.init_std > 0, f"init_std={self.init_std} is not positive")
        reach = self.yarn.original_max_positions
        _require(
            self.yarn.factor == 1.0 or self.max_positions <= reach * self.yarn.factor,
            f"max_positions={self.max_positions} is beyond YaRN's reach of {reach} x {self.yarn.factor:g}",
        )

    def _check_kv_heads(self) -> None:
        count, gqa = self.num_kv_heads, self.attention == "gqa"
        _require(
            gqa == (count is not None),
            f"num_kv_heads={count} with attention={self.attention!r}: it is for 'gqa', which needs it",
        )
        _require(count is None or count > 0, f"num_kv_heads={count} is not positive")
        _require(
            self.num_heads % self.kv_heads == 0, f"num_kv_heads={count} does not divide num_heads={self.num_heads}"
        )

    @property
    def kv_heads(self) -> int:
        """Heads that have keys and values of their own; MLA's are formed for every head."""
        return self.num_kv_heads or (1 if self.attention == "mqa" else self.num_heads)

    @property
    def chained_heads(self) -> bool:
        """Whether multi-token heads read the tokens that they go on from: they then draft beyond their depth, too."""
        return self.mtp_kind in ("deepseek", "eagle")

    @property
    def num_sparse_layers(self) -> int:
        """Layers of the trunk that route."""
        return self.num_layers - self.num_dense_layers

    @property
    def num_sparse_heads(self) -> int:
        """Multi-token heads that route: each has a block of experts."""
        return self.mtp_depth if self.mtp_kind in ("deepseek", "meta") else 0


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes [B, T] batches."""

    paths: tuple[str, ...] = ()  # files or folders; none: the text that this Python installation carries
    tokenizer: str = "bytes"  # "bytes", or the path of a tokenizer.json
    seq_len: int = 256  # T
    batch_size: int = 16  # B: sequences an optimizer step
    separate_documents: bool = True  # segment ids and positions start anew with each document of a row
    fim_rate: float = 0.0  # share of documents turned into fill-in-the-middle (PSM)
    val_fraction: float = 0.05  # share of documents, chosen by hash, kept for validation
    max_documents: int | None = None  # stop reading there: for quick runs
    seed: int = 0

    def __post_init__(self):
        _check_types(self)
        _require(self.seq_len >= 2, f"seq_len={self.seq_len} is below 2")
        _require(self.batch_size > 0, f"batch_size={self.batch_size} is not positive")
        _require(0.0 <= self.fim_rate <= 1.0, f"fim_rate={self.fim_rate} is outside [0, 1]")
        _require(0.0 < self.val_fraction < 1.0, f"val_fraction={self.val_fraction} is outside (0, 1)")
        _require(
            self.max_documents is None or self.max_documents > 0, f"max_documents={self.max_documents} is not positive"
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the report's schedule: warm-up, constant, cosine, constant (DeepSeek-V3 report, section 4.2)."""

    learning_rate: float = 2.2e-4  # of the constant stretch
    final_learning_rate: float = 2.2e-5
    warmup_steps: int = 2000
    decay_start: float = 0.67  # share of all steps after which the cosine begins
    decay_end: float = 0.97  # ... and ends
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms are left alone
    clip_norm: float = 1.0
    mtp_weight: float = 0.3  # lambda
    mtp_final_weight: float = 0.1  # lambda once the cosine begins
    bias_freeze: float = 0.97  # share of all steps after which gamma is 0
    microbatches: int = 1  # gradient accumulation: the batch is cut in so many

    def __post_init__(self):
        _check_types(self)
        for name in ("learning_rate", "eps", "clip_norm", "microbatches"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} is not positive")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay", "mtp_weight", "mtp_final_weight"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} is outside [0, 1)")
        _require(
            0 <= self.decay_start <= self.decay_end <= 1,
            f"decay_start={self.decay_start} and decay_end={self.decay_end} are not in order within [0, 1]",
        )
        _require(0 <= self.bias_freeze <= 1, f"bias_freeze={self.bias_freeze} is outside [0, 1]")


@dataclass(frozen=True)
class RunConfig:
    """One training run: a model, its data, its optimizer, and how often to look, save and stop."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    steps: int = 1000
    eval_every: int = 250
    eval_batches: int = 8
    save_every: int = 250
    keep: int = 3  # checkpoints kept
    log_every: int = 10
    seed: int = 0
    trunk: str | None = None  # a run whose last trunk is taken and held still: the multi-token heads alone train
    start: str | None = None  # a run whose last weights training begins with

    def __post_init__(self):
        _check_types(self)
        for name in ("steps", "eval_every", "eval_batches", "save_every", "keep", "log_every"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} is not positive")
        _require(
            self.data.batch_size % self.optim.microbatches == 0,
            f"microbatches={self.optim.microbatches} does not divide batch_size={self.data.batch_size}",
        )
        _require(
            self.data.seq_len <= self.model.max_positions,
            f"seq_len={self.data.seq_len} is more than the model's max_positions={self.model.max_positions}",
        )
        _require(
            self.data.seq_len > self.model.mtp_depth + 1,
            f"seq_len={self.data.seq_len} leaves no target for mtp_depth={self.model.mtp_depth}",
        )
        _require(
            self.trunk is None or self.model.mtp_depth > 0,
            f"mtp_depth={self.model.mtp_depth} leaves nothing to train on the frozen trunk {self.trunk!r}",
        )
        _require(
            self.trunk is None or self.start is None,
            f"a run begins with start={self.start!r} or on trunk={self.trunk!r}, not with both",
        )


def to_dict(config) -> dict:
    """A configuration as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind, values: dict):
    """The inverse of `to_dict`.

    Raises: ConfigError naming a key that `kind` does not have, or a value that it refuses.
    """
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for key in values:
        _require(key in known, f"{key!r} is not a key of {kind.__name__}")
    made = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            value = from_dict(hints[key], value)
        made[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except TypeError as error:  # a key without a default is absent
        raise ConfigError(f"{kind.__name__}: {str(error).split('__init__() ')[-1]}") from error


def first_difference(a: dict, b: dict, prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first key, in alphabetical order, that two configurations have other values of, and these values."""
    for key in sorted(a.keys() | b.keys()):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            inner = first_difference(x, y, f"{prefix}{key}.")
            if inner:
                return inner
        elif json.dumps(x) != json.dumps(y):
            return prefix + key, x, y
    return None
