"""What training by pairs combines: factors, their values, and the run that each value changes."""

from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

import dsv3_jax as ds
from dsv3_jax.config import Balance, Execution, ModelConfig, RunConfig
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
SHARED = DSA | {"model.index_types": ("full", "shared"), "model.index_precision": "fp8"}
GROUPS = {"model.num_groups": 2, "model.groups_per_token": 1}
ALL = ("attention", "dense", "shared", "routed")
SWITCH = {"model.balance.switch_alpha": 1e-2, "model.balance.z_alpha": 1e-2}
ALONE = {"model.balance.sequence_alpha": 0.0}
FSDP, COMM = {"execution.layout.fsdp": True}, "execution.layout.expert_comm"


def named(setting: str, values: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A factor whose values are one setting's, by name; the first is the default."""
    return {name: {setting: name} for name in values}


def of_execution(name: str) -> dict[str, dict[str, Any]]:
    """A factor of all values that a setting of `Execution` may have."""
    return named(f"execution.{name}", get_args(get_type_hints(Execution)[name]))


def without(names: str) -> dict[str, dict[str, Any]]:
    """Values that `Plan` knows by name, and that change no setting."""
    return {name: {} for name in names.split()}


# Factor → value → what it changes of RUN. A setting that matters only beside another has its name.
FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "how": {
        "text": {},
        "shards": {"data.format": "shards"},
        "chats": CHATS,
        "GRPO": GRPO,
        "GRPO, KL": KL | {"grpo.form": "constant_length"},
        "GRPO, KL at 0.7": KL | {"grpo.temperature": 0.7, "grpo.cache_dtype": "float32"},
        "GRPO at 0.7, no replay": GRPO | {"grpo.temperature": 0.7, "grpo.replay": False},
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
        "dsa, shared FP8": SHARED,
        "mha": {"model.attention": "mha", "model.qk_norm": True},
        "gqa": {"model.attention": "gqa", "model.num_kv_heads": 2},
        "mqa": {"model.attention": "mqa"},
    },
    "layers": {"dense, sparse": {}, "sparse": {"model.num_dense_layers": 0}},
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
        "sigmoid, proportional": {"model.balance.rule": "proportional"},
        "sigmoid, quantile": {"model.balance.rule": "quantile", "model.balance.bias_rate": 0.5},
    },
    "capacity": {"none": {}, "1": {"model.capacity_factor": 1.0}},
    "losses": {"sequence": {}, "Switch, z": SWITCH | ALONE, "bias alone": ALONE},
    "tied": {"no": {}, "yes": {"model.tie_embeddings": True}},
    "positions": {
        "plain": {},
        "YaRN": {"model.yarn.factor": 4.0, "model.yarn.original_max_positions": 16},
        "halves": {"model.rope_interleaved": False},
    },
    "optimizer": {
        **without("adamw optax"),
        "bfloat16 means": {"optim.moments_dtype": "bfloat16"},
        "muon": {"optim.name": "muon"},
    },
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
    "dtype": of_execution("compute_dtype"),
    "precision": of_execution("precision"),
    "remat": of_execution("remat"),
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
