"""What training by pairs combines: factors, their values, and the run that each value changes."""

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any, Literal, get_args, get_origin, get_type_hints

import dsv3_jax as ds
from dsv3_jax.config import Balance, ModelConfig, RunConfig
from dsv3_jax.ops.routing import ROUTERS

STEPS = 4
MODEL = ModelConfig(
    vocab_size=260, dim=32, num_layers=2, num_dense_layers=1, dense_dim=24, num_heads=2,
    q_latent_dim=16, kv_latent_dim=12, nope_head_dim=8, rope_head_dim=4, v_head_dim=8,
    num_experts=8, experts_per_token=2, num_shared_experts=1, expert_dim=12,
    balance=Balance(bias_rate=1e-2, sequence_alpha=1e-2), max_positions=64, init_std=0.2,
)  # fmt: skip
# AdamW's eps is large: the rounding of gradients near 0 does not become whole steps of either sign.
OPTIM = ds.OptimConfig(learning_rate=3e-2, final_learning_rate=3e-3, warmup_steps=1, eps=0.1)
DATA = ds.DataConfig(seq_len=32, batch_size=8, val_fraction=0.3)
EVERY = dict(steps=STEPS, eval_every=STEPS, eval_batches=1, save_every=2, log_every=1)
RUN = RunConfig(MODEL, data=DATA, optim=OPTIM, **EVERY)

CHATS = {"data.format": "chat", "data.chat_template": "plain"}
GRPO = CHATS | {"grpo.group": 4, "grpo.max_new_tokens": 4, "grpo.checker": "regex"}
KL = GRPO | {"grpo.kl": 0.1}
INDEXER = {"model.index_heads": 2, "model.index_dim": 8, "model.index_topk": 6}
DSA = INDEXER | {"model.attention": "dsa"}
SHARED = DSA | {"model.index_types": ("full", "shared")}
GROUPS = {"model.num_groups": 2, "model.groups_per_token": 1}
BEST = {
    "model.num_groups": 4,
    "model.groups_per_token": 2,
    "model.group_score": "max",
    "model.routed_scale": 1.5,
}
ALL = ("attention", "dense", "shared", "routed")
SWITCH = {"model.balance.switch_alpha": 1e-2, "model.balance.z_alpha": 1e-2}
ALONE = {"model.balance.sequence_alpha": 0.0}
YARN = {
    "model.yarn.factor": 4.0,
    "model.yarn.original_max_positions": 16,
    "model.yarn.beta_fast": 16.0,
    "model.yarn.beta_slow": 0.5,
    "model.yarn.mscale": 0.9,
    "model.yarn.mscale_all_dim": 0.8,
}
SIZES = {
    "model.vocab_size": 264,
    "model.dim": 48,
    "model.dense_dim": 40,
    "model.num_heads": 4,
    "model.kv_latent_dim": 20,
    "model.nope_head_dim": 6,
    "model.rope_head_dim": 8,
    "model.v_head_dim": 10,
    "model.num_experts": 16,
    "model.num_shared_experts": 2,
    "model.expert_dim": 20,
    "model.max_positions": 96,
    "model.rope_theta": 1e3,
    "model.norm_eps": 1e-5,
    "model.init_std": 0.15,
}
FSDP, COMM = {"execution.layout.fsdp": True}, "execution.layout.expert_comm"


def named(setting: str, values: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A factor whose values are one setting's, by name; the first is the default."""
    return {name: {setting: name} for name in values}


def kind_of(setting: str) -> Any:
    """The type of a setting, by its name with dots."""
    kind: Any = RunConfig
    for name in setting.split("."):
        kind = get_type_hints(kind)[name]
    return kind


def listed(kind: Any) -> tuple[Any, ...]:
    """The values that a type lists; those of `Literal[...] | None` without None."""
    if kind is bool:
        return False, True
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(value for inner in get_args(kind) for value in listed(inner))


def all_of(setting: str) -> dict[str, dict[str, Any]]:
    """A factor of all values that a setting's type lists; the first is the default."""
    return named(setting, listed(kind_of(setting)))


def without(names: str) -> dict[str, dict[str, Any]]:
    """Values that `Plan` knows by name, and that change no setting."""
    return {name: {} for name in names.split()}


# Factor → value → what it changes of RUN. A setting that matters only beside another has its name.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "how": {
        "text": {},
        "text, documents together": {"data.separate_documents": False},
        "shards": {"data.format": "shards"},
        "chats": CHATS,
        "chats, no bad record": CHATS | {"data.bad_records": "refuse"},
        "GRPO": GRPO,
        "GRPO, KL": KL | {"grpo.form": "constant_length"},
        "GRPO, KL at 0.7": KL | {"grpo.temperature": 0.7, "grpo.cache_dtype": "float32"},
        "GRPO at 0.7, no replay": GRPO | {"grpo.temperature": 0.7, "grpo.replay": False},
        "GRPO of right ones": GRPO | {"grpo.learn_from": "right", "data.prompts": "text"},
        "GRPO, two updates": GRPO | {"grpo.updates": 2, "grpo.outside": "mask"},
        **{
            f"GRPO by {weights}, {cache}": GRPO
            | {"grpo.sampler_weights": weights, "grpo.cache_dtype": cache}
            for weights, cache in zip_longest(
                listed(kind_of("grpo.sampler_weights")), listed(kind_of("grpo.cache_dtype"))
            )
        },
        "warm-up": {"indexer_stage": "warm"},
    },
    "start": {
        **without("none run trunk float32 bfloat16 FP8 int4"),
        "trunk, KL": {"head_loss": "kl"},
        "trunk, TV": {"head_loss": "tv"},
    },
    "lora": {
        "none": {},
        "attention": {"lora.rank": 2},
        "experts": {"lora.rank": 2, "lora.on": ("shared", "routed")},
        "all": {"lora.rank": 2, "lora.on": ALL},
    },
    "attention": {
        "mla": {},
        "mla, full queries": {"model.q_latent_dim": None},
        "dsa": DSA,
        "dsa, shared FP8": SHARED | {"model.index_precision": "fp8"},
        "dsa, UE8M0": DSA | {"model.index_precision": "fp8_ue8m0", "model.index_interleaved": True},
        "mha": {"model.attention": "mha", "model.qk_norm": True},
        "gqa": {"model.attention": "gqa", "model.num_kv_heads": 2},
        "mqa": {"model.attention": "mqa"},
    },
    "layers": {
        "dense, sparse": {},
        "sparse": {"model.num_dense_layers": 0},
        "dense, sparse, sparse": {"model.num_layers": 3},
    },
    "sizes": {"usual": {}, "other": SIZES},
    "heads": {
        "none": {},
        "deepseek": {"model.mtp_depth": 1},
        "deepseek of 2, raw": {"model.mtp_depth": 2, "model.mtp_input": "raw"},
        "meta": {"model.mtp_depth": 2, "model.mtp_kind": "meta"},
        "medusa": {"model.mtp_depth": 2, "model.mtp_kind": "medusa"},
        "eagle": {"model.mtp_depth": 1, "model.mtp_kind": "eagle"},
    },
    "router": {
        **named("model.router", ROUTERS),
        "softmax": {"model.router": "softmax", "model.normalize_gates": False},
        "dense": {"model.router": "dense", "model.experts_per_token": 8},
        "sigmoid in groups": GROUPS,
        "softmax in groups": BEST | {"model.router": "softmax"},
        "sigmoid, proportional": {"model.balance.rule": "proportional"},
        "sigmoid, quantile": {"model.balance.rule": "quantile", "model.balance.bias_rate": 0.5},
    },
    "capacity": {"none": {}, "1": {"model.capacity_factor": 1.0}},
    "losses": {"sequence": {}, "Switch, z": SWITCH | ALONE, "bias alone": ALONE},
    "tied": {"no": {}, "yes": {"model.tie_embeddings": True}},
    "positions": {
        "plain": {},
        "YaRN": YARN,
        "halves": {"model.rope_interleaved": False},
    },
    "optimizer": {
        **without("adamw optax"),
        "bfloat16 means": {"optim.moments_dtype": "bfloat16"},
        "muon": {"optim.name": "muon"},
    },
    "schedule": all_of("optim.schedule"),
    "QK-clip": {"none": {}, "0.1": {"optim.qk_clip": 0.1}},
    "microbatches": {"1": {}, "2": {"optim.microbatches": 2}},
    "mesh": {
        **without("none data=2 tensor=2"),
        "data=2, FSDP": FSDP,
        "expert=2": {COMM: "all_to_all", "execution.layout.capacity_slack": 1.0},
        "data=2,expert=2": FSDP | {COMM: "gather"},
        "expert=4, in 2 nodes": {"execution.layout.expert_nodes": 2},
        "expert=2, rows by length": {"execution.layout.length": "expert"},
    },
    "dtype": all_of("execution.compute_dtype"),
    "precision": all_of("execution.precision"),
    "remat": all_of("execution.remat"),
    "kernels": {
        "auto": {},
        "XLA": {"execution.kernels": "xla"},
        "ragged": {"execution.kernels": "xla,grouped_swiglu=ragged_dot"},
    },
}


def bases(factors: dict[str, dict[str, Any]], *unusual: str) -> list[dict[str, str]]:
    """Rows beside which two values are tried, until the package accepts them."""
    first = {name: next(iter(values)) for name, values in factors.items()}
    return [first | dict(pair.split("=") for pair in beside.split("; ")) for beside in unusual]


BASES = bases(
    FACTORS,
    "start=run",
    "start=none",
    "start=run; heads=deepseek",
    "start=run; heads=eagle",
    "start=trunk; heads=medusa",
    "start=trunk; heads=deepseek",
    "start=run; how=GRPO",
    "start=run; attention=dsa",
    "start=run; attention=dsa; how=warm-up",
    "start=float32",
    "start=float32; how=GRPO",
    "start=float32; attention=dsa",
    "start=int4; lora=attention",
    "start=int4; lora=attention; how=GRPO",
)
