"""config.json of a released folder ↔ ModelConfig. What the two cannot say alike is refused, never guessed."""

import typing
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig, Yarn, replace
from dsv3_jax.hf.table import BLOCK, check_released

# Ours → theirs, where the value is the same.
_SAME = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "dense_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "q_latent_dim": "q_lora_rank",
    "kv_latent_dim": "kv_lora_rank",
    "nope_head_dim": "qk_nope_head_dim",
    "rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size",
    "max_positions": "max_position_embeddings",
    "num_dense_layers": "first_k_dense_replace",
    "routed_scale": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps",
}
# The same with the value that an absent key stands for.
_WITH_DEFAULT: dict[str, tuple[str, Any]] = {
    "tie_embeddings": ("tie_word_embeddings", False),
    "init_std": ("initializer_range", 0.02),
}
# What the model cannot do otherwise; an absent key, or null, is fine.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1}
# model_type → (scoring_func, the topk_methods it may have, the first being meant where none is given).
_FAMILIES = {
    "deepseek_v3": ("sigmoid", ("noaux_tc",)),
    "deepseek_v2": ("softmax", ("greedy", "group_limited_greedy")),
}
_MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")  # released, and newer transformers
_NULLS = ("q_lora_rank", "n_shared_experts")  # keys whose null says something
_BLOCK_SIZE = [BLOCK, BLOCK]
_HINTS = typing.get_type_hints(ModelConfig)
_YARN = (("beta_fast", 32.0), ("beta_slow", 1.0))


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """The model that a released config.json describes.

    Rope scaling may be spelt `rope_theta` + `rope_scaling {type: yarn}` or `rope_parameters {rope_type: yarn}`. The
    result computes in float32, as what is loaded is float32; `replace(cfg, compute_dtype="bfloat16")` changes that.

    Raises: ConfigError naming a key that is absent, or a value that this model cannot have.
    Source: the released config.json of DeepSeek-V3, V2 and V2-Lite; transformers' DeepseekV3Config.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"config.json holds {type(values).__name__}, not an object")
    values = {key: value for key, value in values.items() if value is not None or key in _NULLS}
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise ConfigError(f"model_type={family!r} is not one of {', '.join(map(repr, _FAMILIES))}")
    for key, wanted in _FIXED.items():
        if values.get(key, wanted) != wanted:
            raise ConfigError(f"{key}={values[key]!r} is not supported: it must be {wanted!r}")
    check_quantization(values)
    made: dict[str, Any] = {}
    for ours, theirs in _SAME.items():
        made[ours] = _typed(theirs, _needed(values, theirs), _HINTS[ours])
    for ours, (theirs, default) in _WITH_DEFAULT.items():
        made[ours] = _typed(theirs, values.get(theirs, default), _HINTS[ours])
    heads = values.get("num_key_value_heads", made["num_heads"])
    if heads != made["num_heads"]:
        raise ConfigError(f"num_key_value_heads={heads!r} is not num_attention_heads={made['num_heads']!r}")
    made["num_shared_experts"] = _typed("n_shared_experts", _needed(values, "n_shared_experts") or 0, int)
    made["mtp_depth"] = next((_typed(k, values[k], int) for k in _MTP_KEYS if k in values), 0)
    made.update(_router(family, values))
    made.update(_rope(family, values, made["max_positions"]))
    return ModelConfig(**made)


def _needed(values: dict[str, Any], key: str) -> Any:
    if key not in values:  # implementations differ in what they then assume
        raise ConfigError(f"{key!r} is not in config.json")
    return values[key]


def _typed(key: str, value: Any, hint: Any) -> Any:
    """The value as our field has it; JSON may write 40 for 40.0."""
    if hint is float and type(value) is int:
        return float(value)
    kinds = typing.get_args(hint) or (hint,)
    if type(value) not in kinds:
        raise ConfigError(f"{key}={value!r} is not of type {' or '.join(k.__name__ for k in kinds)}")
    return value


def check_quantization(values: dict[str, Any]) -> None:
    """Raises: ConfigError for a quantization other than FP8 e4m3 in 128 × 128 blocks."""
    found = values.get("quantization_config")
    if found is None:
        return
    if not isinstance(found, dict):
        raise ConfigError(f"quantization_config={found!r} is not an object")
    method, fmt = found.get("quant_method"), found.get("fmt", "e4m3")
    size = found.get("weight_block_size", _BLOCK_SIZE)
    if method != "fp8" or fmt != "e4m3" or size != _BLOCK_SIZE:
        raise ConfigError(
            f"quantization quant_method={method!r}, fmt={fmt!r}, weight_block_size={size!r} is not known: it must be "
            f"'fp8', 'e4m3', {_BLOCK_SIZE}"
        )


def _router(family: str, values: dict[str, Any]) -> dict[str, Any]:
    scoring, methods = _FAMILIES[family]
    found, method = values.get("scoring_func", scoring), values.get("topk_method", methods[0])
    if found != scoring:
        raise ConfigError(f"scoring_func={found!r} is not known for {family}: it must be {scoring!r}")
    if method not in methods:
        raise ConfigError(f"topk_method={method!r} is not known for {family}: it must be {' or '.join(methods)}")
    limit = (_typed(key, _needed(values, key), int) for key in ("n_group", "topk_group"))
    groups = (1, 1) if method == "greedy" else tuple(limit)
    normalize = _typed("norm_topk_prob", _needed(values, "norm_topk_prob"), bool)
    if family == "deepseek_v2" and normalize:
        # The released code then drops the scale, transformers the normalisation.
        raise ConfigError("norm_topk_prob=True is not supported for deepseek_v2: its implementations disagree on it")
    return {
        "router": scoring,
        "group_score": "top2_sum" if scoring == "sigmoid" else "max",
        "num_groups": groups[0],
        "groups_per_token": groups[1],
        "normalize_gates": normalize,
    }


def _rope(family: str, values: dict[str, Any], max_positions: int) -> dict[str, Any]:
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for key, found in (("rope_parameters", new), ("rope_scaling", old)):
        if found is not None and not isinstance(found, dict):
            raise ConfigError(f"{key}={found!r} is not an object")
    scaling = {k: v for k, v in {**(old or {}), **(new or {})}.items() if v is not None}
    theta = scaling.get("rope_theta", values.get("rope_theta", 1e4))
    made: dict[str, Any] = {
        "rope_theta": _typed("rope_theta", theta, float),
        "rope_interleaved": _typed("rope_interleave", values.get("rope_interleave", True), bool),
    }
    if family == "deepseek_v2" and made["rope_interleaved"] is not True:
        raise ConfigError("rope_interleave=False is not supported for deepseek_v2: its rotary pairs are interleaved")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return made
    if kind != "yarn":
        raise ConfigError(f"rope scaling {kind!r} is not supported: it must be 'yarn'")
    if "factor" not in scaling:
        raise ConfigError("rope scaling 'yarn' has no 'factor'")
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not all_dim and mscale in (None, 1):
        mscale, all_dim = 1.0, 0.0  # the reference's values where neither is given
    elif not mscale or not all_dim:
        raise ConfigError(
            f"rope scaling has mscale={mscale!r} without mscale_all_dim={all_dim!r}: give both or neither"
        )
    for key, wanted in (("truncate", True), ("attention_factor", None), ("partial_rotary_factor", 1)):
        if scaling.get(key, wanted) != wanted:
            raise ConfigError(f"rope scaling {key}={scaling[key]!r} is not supported")
    found = {"mscale": mscale, "mscale_all_dim": all_dim, **{key: scaling.get(key, d) for key, d in _YARN}}
    found["factor"] = scaling["factor"]
    reach = scaling.get("original_max_position_embeddings", max_positions)
    made["yarn"] = Yarn(
        original_max_positions=_typed("original_max_position_embeddings", reach, int),
        **{key: _typed(f"rope scaling {key}", value, float) for key, value in found.items()},
    )
    return made


def config_to_dict(cfg: ModelConfig, *, fp8: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    """The config.json of a model, as it was released and as transformers reads it: the inverse of `config_from_dict`.

    What config.json cannot say (balance losses, dispatch, remat, compute dtype) is left out.

    Raises: ConfigError naming a value that the released format does not have.
    """
    check_released(cfg)
    family = "deepseek_v3" if cfg.router == "sigmoid" else "deepseek_v2"
    grouped = cfg.groups_per_token < cfg.num_groups
    method = "noaux_tc" if cfg.router == "sigmoid" else "group_limited_greedy" if grouped else "greedy"
    made: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if family == "deepseek_v3" else "DeepseekV2ForCausalLM"],
        "model_type": family,
        **{theirs: getattr(cfg, ours) for ours, theirs in _SAME.items()},
        **{theirs: getattr(cfg, ours) for ours, (theirs, _) in _WITH_DEFAULT.items()},
        **{key: value for key, value in _FIXED.items() if key != "mlp_bias"},
        "num_key_value_heads": cfg.num_heads,
        "n_shared_experts": cfg.num_shared_experts,
        "num_nextn_predict_layers": cfg.mtp_depth,
        "scoring_func": cfg.router,
        "topk_method": method,
        "n_group": cfg.num_groups,
        "topk_group": cfg.groups_per_token,
        "norm_topk_prob": cfg.normalize_gates,
        "rope_theta": cfg.rope_theta,
        "rope_interleave": cfg.rope_interleaved,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if cfg.yarn.factor > 1:
        yarn = cfg.yarn
        made["rope_scaling"] = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    if fp8:
        made["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": _BLOCK_SIZE,
        }
    back = config_from_dict(made)
    wanted = _spoken(cfg, back)
    if back != wanted:
        key = next(k for k in vars(back) if getattr(back, k) != getattr(wanted, k))
        raise ConfigError(f"{key}={getattr(cfg, key)!r} has no place in the released format of router={cfg.router!r}")
    return made


def _spoken(cfg: ModelConfig, like: ModelConfig) -> ModelConfig:
    """`cfg` with what config.json does not say, or says in another way, taken from `like`."""
    silent = ("balance", "dispatch", "capacity_factor", "compute_dtype", "remat")
    changes = {key: getattr(like, key) for key in silent}
    if cfg.groups_per_token == cfg.num_groups:  # no limit: the number of groups and their score do not matter
        changes |= {key: getattr(like, key) for key in ("num_groups", "groups_per_token", "group_score")}
    if cfg.yarn.factor == 1:
        changes["yarn"] = like.yarn
    if cfg.mtp_depth == 0:
        changes["mtp_kind"] = like.mtp_kind
    return replace(cfg, **changes)
