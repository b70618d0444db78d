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
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

replace = dataclasses.replace

# Kinds and dtypes of the cache that decoding keeps; see `model/cache.py`.
CacheKind = Literal["latent", "expanded", "none"]
CacheDtype = Literal["float32", "bfloat16", "int8", "float8_e4m3"]
Precision = Literal["none", "fp8", "fp8_ue8m0", "mxfp8"]  # of the linear layers' products; see `ops/low_precision.py`


class ConfigError(ValueError):
    """An invalid configuration: its message is one sentence with the offending value.

    Example:
        >>> DataConfig(seq_len=1)
        Traceback (most recent call last):
            ...
        dsv3_jax.config.ConfigError: seq_len=1 is below 2
    """


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ConfigError(sentence)


def _check_types(config, **tables: dict[Any, Any]) -> None:
    """Refuse values of another type, NaN, infinity and absurd sizes at once, where the message can still name the key.

    Args: tables: for a key whose values are the keys of a table, that table.
    """
    hints = typing.get_type_hints(type(config)) | {name: Literal[tuple(table)] for name, table in tables.items()}
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if type(value) is int and (hint is float or hint == float | None) and abs(value) <= _LARGEST_FLOAT:
            value = float(value)
            object.__setattr__(config, item.name, value)
        elif not _matches(value, hint):
            raise ConfigError(f"{item.name}={_short(value)} is not of type {_spell(hint)}")
        if type(value) is int:
            most = _MOST.get(item.name, _LARGEST_INT)
            _require(abs(value) <= most, f"{item.name}={_short(value)} is outside what is supported, {most:,} at most")
        elif type(value) is float:
            _require(abs(value) <= _LARGEST_FLOAT, f"{item.name}={value!r} is not a finite float32")
        elif type(value) is str:
            _require(not _CONTROL.search(value), f"{item.name}={_short(value)} holds a control character")
        elif type(value) is tuple:
            for text in value:
                _require(not _CONTROL.search(text), f"{item.name} holds {_short(text)}, with a control character")


# Far above any model that was trained; a number beyond them is a mistake, and would be allocated or counted to.
_LARGEST_INT, _LARGEST_FLOAT = 2**31 - 1, 3.4e38
_MOST = {
    "num_layers": 10_000,
    "num_dense_layers": 10_000,
    "num_experts": 1_000_000,
    "rope_head_dim": 1_000_000,  # its frequencies are computed before files are compared with the settings
    "mtp_depth": 100,
    "seed": 2**32 - 1,  # JAX keeps 32 bits of a seed
}
_MOST_PARAMETERS = 10**15  # of one kind of weight in all layers
_MOST_TOKENS = 2**30  # of a batch
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control codes; bytes of a name that are not UTF-8


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or nothing if none is near.

    Example:
        >>> did_you_mean("trian", ["train", "eval"])
        "; did you mean 'train'?"
    """
    near = get_close_matches(str(word), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


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
        _check_types(self)
        _require(self.factor >= 1.0, f"yarn factor={self.factor} is below 1")
        _require(
            self.original_max_positions > 0,
            f"yarn original_max_positions={self.original_max_positions} is not positive",
        )
        for name in ("beta_fast", "beta_slow"):
            _require(getattr(self, name) > 0, f"yarn {name}={getattr(self, name)} is not positive")
        for name in ("mscale", "mscale_all_dim"):
            _require(0 <= getattr(self, name) <= 100, f"yarn {name}={getattr(self, name)} is outside [0, 100]")


# Names of `ops.routing.ROUTERS` and of `ops.balance.RULES`, which say what each is; a test holds them equal.
RouterName = Literal["sigmoid", "sqrtsoftplus", "softmax", "topk", "noisy_topk", "dense", "hash"]
RuleName = Literal["sign", "proportional", "quantile"]


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
    # how the bias moves. sign: by gamma towards the mean load (V3). proportional: by gamma times the distance from it.
    # quantile: the share gamma of the way to the bias that would have balanced the batch
    rule: RuleName = "sign"
    z_alpha: float = 0.0  # weight of the z-loss, which keeps the router's logits small

    def __post_init__(self):
        _check_types(self)
        for name in ("bias_rate", "sequence_alpha", "switch_alpha", "z_alpha"):
            _require(getattr(self, name) >= 0, f"balance {name}={getattr(self, name)} is negative")
        _require(
            self.rule != "quantile" or self.bias_rate <= 1,
            f"balance bias_rate={self.bias_rate} is over 1, the complete way to the bias of rule='quantile'",
        )


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
    capacity_slack: float = 1.25  # for all_to_all: slots of the first round, over the slots that even load needs

    def __post_init__(self):
        _check_types(self)
        _require(1 <= self.capacity_slack <= 1e6, f"layout capacity_slack={self.capacity_slack} is outside [1, 1e6]")


@dataclass(frozen=True)
class Execution:
    """How a model is computed. It changes results by rounding only: a run may resume under another execution.

    Example:
        >>> Execution(compute_dtype="bfloat16", remat="full").kernels
        'auto'
    """

    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of activations; parameters are always float32
    # what the backward pass keeps of a layer, most memory first. none recomputes nothing. dots keeps products and
    # attention. attention keeps its results alone and so computes it once. full keeps nothing
    remat: Literal["none", "dots", "attention", "full"] = "none"
    # which kernels compute: auto takes the fastest, xla those that XLA compiles; `dsv3 info PRESET --kernels` lists
    # other names. OP=NAME forces the kernel of one op; commas join several
    kernels: str = "auto"
    layout: Layout = field(default_factory=Layout)  # how the model is sharded over a mesh of devices
    # XLA's flags for training on several GPUs or TPUs: auto sets those of kernels/xla_flags.py, none sets none
    xla_flags: Literal["auto", "none"] = "auto"
    # 8-bit operands for the products of linear layers in training. fp8 is DeepSeek-V3's recipe, fp8_ue8m0 V3.1's, whose
    # scales are powers of two, and mxfp8 that of the MX formats. none multiplies in compute_dtype. Emulated, so slower:
    # it shows what the rounding does to the loss. GPUs and TPUs multiply the numbers of fp8_ue8m0 and mxfp8 in
    # bfloat16, which holds them exactly
    precision: Precision = "none"

    def __post_init__(self):
        _check_types(self)
        _require(
            re.fullmatch(r"\w+(=\w+)?(,\w+=\w+)*", self.kernels) is not None,
            f"kernels={self.kernels!r} is not of the form NAME, OP=NAME or NAME,OP=NAME",
        )


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
    reads_raw: bool  # it has a norm of its own, so it may read the trunk's output before the final norm
    max_depth: int | None = None  # None means any


HeadLoss = Literal["ce", "kl", "tv"]
MtpKind = Literal["deepseek", "meta", "medusa", "eagle"]  # for help texts: HEAD_KINDS says which kinds there are
HEAD_KINDS: dict[MtpKind, HeadKind] = {
    "deepseek": HeadKind("MTP modules", reads_tokens=True, has_experts=True, reads_raw=True),
    "meta": HeadKind("Meta heads", reads_tokens=False, has_experts=True, reads_raw=True),
    "medusa": HeadKind("Medusa heads", reads_tokens=False, has_experts=False, reads_raw=False),
    "eagle": HeadKind("EAGLE head", reads_tokens=True, has_experts=False, reads_raw=False, max_depth=1),
}


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
    # kind of attention: MLA compresses keys and values into a latent; the others do not, and their keys have
    # nope_head_dim + rope_head_dim numbers a head
    attention: Literal["mla", "mha", "gqa", "mqa"] = "mla"
    num_kv_heads: int | None = None  # number of heads with keys and values; for attention gqa only
    qk_norm: bool = False  # norm each head's queries and keys before RoPE; for attention mha, gqa and mqa
    num_groups: int = 1  # number of groups that the experts are divided into (G)
    groups_per_token: int = 1  # number of groups that a token's experts may come from
    # how scores become a choice: sigmoid with a balancing bias (V3), sqrtsoftplus the same (V4), softmax with balance
    # losses (V2), topk takes the softmax over the chosen experts, noisy_topk adds learnt noise in training, dense uses
    # every expert, hash chooses by the token's id
    router: RouterName = "sigmoid"
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
    # kind of multi-token heads: DeepSeek's causal chain, Meta's or Medusa's parallel heads, or one EAGLE head
    mtp_kind: MtpKind = "deepseek"
    mtp_input: Literal["normed", "raw"] = "normed"  # heads read the trunk's output after or before the final norm (h^0)
    # the rest
    norm_eps: float = 1e-6  # epsilon of RMSNorm
    tie_embeddings: bool = False  # use the embedding table as the unembedding too
    init_std: float = 0.006  # standard deviation of the initial weights

    def __post_init__(self):
        _check_types(self, mtp_kind=HEAD_KINDS)
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
        self._check_heads()
        _require(self.rope_head_dim % 2 == 0, f"rope_head_dim={self.rope_head_dim} is odd")
        _require(
            self.capacity_factor is None or self.capacity_factor > 0,
            f"capacity_factor={self.capacity_factor} is not positive",
        )
        _require(self.rope_theta >= 1, f"rope_theta={self.rope_theta} is below 1")
        # YaRN counts turns by the logarithm of the base.
        _require(
            self.yarn.factor == 1.0 or self.rope_theta > 1,
            f"rope_theta={self.rope_theta} does not go with YaRN's factor={self.yarn.factor}; use a base above 1",
        )
        _require(1e-30 <= self.norm_eps <= 1, f"norm_eps={self.norm_eps} is outside [1e-30, 1]")
        _require(0 < self.init_std <= 1e3, f"init_std={self.init_std} is outside (0, 1000]")
        _require(abs(self.routed_scale) <= 1e6, f"routed_scale={self.routed_scale} is outside [-1e6, 1e6]")
        self._check_size()
        reach = self.yarn.original_max_positions
        _require(
            self.yarn.factor == 1.0 or self.max_positions <= reach * self.yarn.factor,
            f"max_positions={self.max_positions} is beyond YaRN's reach of {reach} x {self.yarn.factor:g}",
        )

    def _check_size(self) -> None:
        """Refuse sizes that overflow 64-bit counts, and would be multiplied before memory is asked for."""
        qk, layers = self.nope_head_dim + self.rope_head_dim, self.num_layers + self.mtp_depth
        latents = self.kv_latent_dim + (self.q_latent_dim or 0)
        products = {
            "vocab_size x dim": self.vocab_size * self.dim,
            "num_layers x dim x dense_dim": layers * self.dim * self.dense_dim,
            "num_layers x num_experts x dim x expert_dim": layers * self.num_experts * self.dim * self.expert_dim,
            "num_layers x num_shared_experts x dim x expert_dim": (
                layers * self.num_shared_experts * self.dim * self.expert_dim
            ),
            "num_layers x num_heads x head dims x widths": (
                layers * self.num_heads * (qk + self.v_head_dim) * (self.dim + latents)
            ),
        }
        for names, count in products.items():
            _require(count <= _MOST_PARAMETERS, f"{names} = {count:,} parameters are more than {_MOST_PARAMETERS:,}")

    def _check_kv_heads(self) -> None:
        count, gqa = self.num_kv_heads, self.attention == "gqa"
        _require(
            gqa == (count is not None),
            f"num_kv_heads={count} with attention={self.attention!r}: it is for 'gqa', which needs it",
        )
        _require(count is None or count > 0, f"num_kv_heads={count} is not positive")
        _require(
            not self.qk_norm or self.attention != "mla",
            "qk_norm=True is for attention='mha', 'gqa' and 'mqa'; 'mla' has norms on its latents",
        )
        _require(
            self.num_heads % self.kv_heads == 0, f"num_kv_heads={count} does not divide num_heads={self.num_heads}"
        )

    @property
    def kv_heads(self) -> int:
        """Number of heads with keys and values of their own; MLA forms them for every head."""
        return self.num_kv_heads or (1 if self.attention == "mqa" else self.num_heads)

    def _check_heads(self) -> None:
        most = self.head_kind.max_depth
        _require(
            most is None or self.mtp_depth <= most,
            f"mtp_depth={self.mtp_depth} is more than the {most} of mtp_kind={self.mtp_kind!r}",
        )
        _require(
            self.mtp_input == "normed" or self.head_kind.reads_raw or self.mtp_depth == 0,
            f"mtp_input={self.mtp_input!r} needs a head with a norm of its own: mtp_kind={self.mtp_kind!r} has none",
        )

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
    # key of JSONL and column of Parquet or a dataset that holds the text; for chat, the messages
    text_column: str = "text"
    # for shards: weights of domains, as in ("code=2", "English=1"), other domains are left out; empty means all
    # domains, weighted by their tokens
    mixture: tuple[str, ...] = ()
    temperature: float = 1.0  # for shards: weights are raised to the power 1 / temperature; above 1 they are more equal

    def __post_init__(self):
        _check_types(self)
        self.weights()  # refuses a mixture that is none
        _require(
            self.format == "shards" or not self.mixture,
            f"mixture={self.mixture} is for format='shards', not {self.format!r}",
        )
        _require(0 < self.temperature < math.inf, f"temperature={self.temperature} is not a positive number")
        _require(
            self.format == "shards" or self.temperature == 1,
            f"temperature={self.temperature} is for format='shards', not {self.format!r}",
        )
        _require(
            self.format != "shards" or len(self.paths) == 1,
            f"paths={self.paths} is not one folder of shards; name what `dsv3 data tokenize` wrote",
        )
        _require(
            self.format != "shards" or self.max_documents is None,
            f"max_documents={self.max_documents} is for text and chats; shards are complete",
        )
        _require(
            self.chat_template is None or self.format == "chat",
            f"chat_template={self.chat_template!r} is for format='chat', not {self.format!r}",
        )
        _require(
            self.format != "chat" or self.separate_documents,
            f"separate_documents={self.separate_documents} is for format='text': chat examples never see one another",
        )
        _require(
            self.format == "text" or self.fim_rate == 0,
            f"fim_rate={self.fim_rate} is for format='text', not {self.format!r}",
        )
        _require(self.seq_len >= 2, f"seq_len={self.seq_len} is below 2")
        _require(self.batch_size > 0, f"batch_size={self.batch_size} is not positive")
        _require(
            self.batch_size * self.seq_len <= _MOST_TOKENS,
            f"batch_size={self.batch_size} x seq_len={self.seq_len} is more than {_MOST_TOKENS:,} tokens",
        )
        _require(self.seed >= 0, f"seed={self.seed} is negative")
        _require(0.0 <= self.fim_rate <= 1.0, f"fim_rate={self.fim_rate} is outside [0, 1]")
        _require(0.0 < self.val_fraction < 1.0, f"val_fraction={self.val_fraction} is outside (0, 1)")
        _require(
            self.max_documents is None or self.max_documents > 0, f"max_documents={self.max_documents} is not positive"
        )

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
                weight = float(number)
            except ValueError:
                weight = math.nan
            _require(
                bool(name) and 0 <= weight < math.inf, f"mixture={entry!r} is not DOMAIN=WEIGHT, a weight from 0 up"
            )
            _require(name not in weights, f"mixture={self.mixture} names domain {name!r} twice")
            weights[name] = weight
        _require(
            not weights or sum(weights.values()) > 0,
            f"mixture={self.mixture} has weights that sum to 0; give a domain a positive weight",
        )
        return weights


OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for matrices, AdamW for the rest"}  # made by training/optim.py
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
        _check_types(self)
        for name in ("learning_rate", "eps", "clip_norm", "microbatches"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} is not positive")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay", "mtp_weight", "mtp_final_weight"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} is negative")
        if self.name not in OPTIMIZERS and not self.name.startswith(OPTAX):
            near = did_you_mean(self.name, OPTIMIZERS)
            raise ConfigError(f"optim name={_short(self.name)} is not one of {', '.join(OPTIMIZERS)}{near}")
        for name in ("beta1", "beta2", "muon_beta"):
            _require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} is outside [0, 1)")
            # A bfloat16 has 8 bits: a step of less than 2^-9 of a mean is rounded away, and a mean could not decay.
            _require(
                self.moments_dtype == "float32" or getattr(self, name) <= 0.99,
                f"{name}={getattr(self, name)} is over 0.99, too slow for moments_dtype='bfloat16'; use 'float32'",
            )
        _require(self.qk_clip is None or self.qk_clip > 0, f"qk_clip={self.qk_clip} is not positive")
        _require(
            0 <= self.decay_start <= self.decay_end <= 1,
            f"decay_start={self.decay_start} and decay_end={self.decay_end} are not in order within [0, 1]",
        )
        _require(0 <= self.bias_freeze <= 1, f"bias_freeze={self.bias_freeze} is outside [0, 1]")


LoraPart = Literal["attention", "dense", "shared", "routed"]


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
        _check_types(self)
        _require(self.rank >= 0, f"lora rank={self.rank} is negative")
        _require(self.alpha > 0, f"lora alpha={self.alpha} is not positive")
        _require(len(self.on) > 0, "lora on=() names no matrices; use rank=0 to train without adapters")
        _require(len(set(self.on)) == len(self.on), f"lora on={self.on} names one part twice")


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
    head_loss: HeadLoss = "ce"  # of heads on a frozen trunk: cross-entropy on the text, or KL or TV to the trunk's law

    def __post_init__(self):
        _check_types(self)
        _require(
            self.head_loss == "ce" or self.trunk is not None,
            f"head_loss={self.head_loss!r} compares heads with a frozen trunk, and trunk is None; use 'ce'",
        )
        for name in ("steps", "eval_every", "eval_batches", "save_every", "keep", "log_every"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} is not positive")
        _require(self.seed >= 0, f"seed={self.seed} is negative")
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
        clip, attention = self.optim.qk_clip, self.model.attention
        _require(clip is None or attention == "mla", f"optim.qk_clip={clip} is for attention='mla', not {attention!r}")
        _require(
            clip is None or self.lora.rank == 0,
            f"optim.qk_clip={clip} is not supported with lora rank={self.lora.rank}: it scales weights, not adapters",
        )
        if self.lora.rank:
            self._check_lora()

    def _check_lora(self) -> None:
        lora, model = self.lora, self.model
        _require(
            self.trunk is None,
            f"lora rank={lora.rank} is not supported on a frozen trunk={self.trunk!r}; use start",
        )
        _require(
            self.start is not None,
            f"lora rank={lora.rank} needs start: adapters change given weights, and those of start=None are random",
        )
        sparse = model.num_sparse_layers + model.num_sparse_heads > 0
        there = {
            "attention": True,
            "dense": model.num_dense_layers > 0 or (model.mtp_kind == "eagle" and model.mtp_depth > 0),
            "shared": sparse and model.num_shared_experts > 0,
            "routed": sparse,
        }
        for part in lora.on:
            _require(there[part], f"lora on={part!r} names matrices that the model does not have")


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
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for key in values:
        _require(key in known, f"{_short(key)} is not a key of {kind.__name__}")
    made = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            value = from_dict(hints[key], value)
        made[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**made)
    except TypeError as error:  # a key without a default is missing
        raise ConfigError(f"{kind.__name__}: {str(error).split('__init__() ')[-1]}") from error


# Keys that moved: a run.json older than `Execution` has them in its model.
_MOVED = {"compute_dtype": "compute_dtype", "remat": "remat"}
_MOVED_LAYOUT = {"exchange": "expert_comm", "slack": "capacity_slack"}


def run_from_dict(values: dict) -> RunConfig:
    """Make a run from plain JSON values, those of older run folders too.

    Older folders keep the settings of `execution` inside the model. There, `dispatch` names a kernel, or drops tokens.

    Raises: ConfigError as `from_dict`.

    Example:
        >>> from dsv3_jax.presets import recipe
        >>> run_from_dict(to_dict(recipe("tiny"))) == recipe("tiny")
        True
    """
    model = values.get("model")
    if "execution" in values or not isinstance(model, dict):
        return from_dict(RunConfig, values)
    model = dict(model)
    execution: dict[str, Any] = {new: model.pop(old) for old, new in _MOVED.items() if old in model}
    layout = model.pop("layout", {})
    renamed = isinstance(layout, dict) and {_MOVED_LAYOUT.get(key, key): value for key, value in layout.items()}
    execution["layout"] = renamed or layout
    dispatch = model.pop("dispatch", "auto")
    if dispatch == "capacity":
        model.setdefault("capacity_factor", 1.25)
    else:
        model.pop("capacity_factor", None)
        if dispatch != "auto":
            execution["kernels"] = f"auto,grouped_swiglu={dispatch}"
    return from_dict(RunConfig, values | {"model": model, "execution": execution})


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
        elif json.dumps(x) != json.dumps(y):
            return prefix + key, x, y
    return None
