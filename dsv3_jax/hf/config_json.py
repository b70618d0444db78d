"""Convert between config.json of a released folder and ModelConfig; what only one of them can express is an error."""

import typing
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig, Yarn, replace
from dsv3_jax.hf.table import BLOCK, check_released

# Our field → key of config.json with the same value.
_SAME_VALUE = {
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
# The same for keys that may be absent, with the value that an absent key means.
_WITH_DEFAULT: dict[str, tuple[str, Any]] = {
    "tie_embeddings": ("tie_word_embeddings", False),
    "init_std": ("initializer_range", 0.02),
}
# Keys for which the model supports one value; absent or null means that value.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "moe_layer_freq": 1}
# model_type → (scoring_func, allowed topk_methods; the first one is the default).
_FAMILIES = {
    "deepseek_v3": ("sigmoid", ("noaux_tc",)),
    "deepseek_v2": ("softmax", ("greedy", "group_limited_greedy")),
}
_MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")  # in released files, and in newer transformers
_NULLABLE = ("q_lora_rank", "n_shared_experts")  # keys for which null differs from absent
_BLOCK_SIZE = [BLOCK, BLOCK]
_HINTS = typing.get_type_hints(ModelConfig)
_YARN_DEFAULTS = (("beta_fast", 32.0), ("beta_slow", 1.0))


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Convert a released config.json to a ModelConfig.

    RoPE scaling is read from `rope_theta` and `rope_scaling {type: yarn}`, or from `rope_parameters {rope_type: yarn}`.

    Args: values: the parsed JSON.
    Raises: ConfigError naming an absent key, or a key and its value that this model does not support.
    Source: the released config.json of DeepSeek-V3, V2 and V2-Lite; transformers' DeepseekV3Config.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> config = config_to_dict(preset("v3"))
        >>> config["hidden_size"], config_from_dict(config).dim
        (7168, 7168)
    """
    if not isinstance(values, dict):
        raise ConfigError(f"config.json holds {type(values).__name__}, not an object")
    values = {key: value for key, value in values.items() if value is not None or key in _NULLABLE}
    family = values.get("model_type")
    if family not in _FAMILIES:
        raise ConfigError(f"model_type={family!r} is not supported; use {' or '.join(map(repr, _FAMILIES))}")
    for key, value in _FIXED.items():
        if values.get(key, value) != value:
            raise ConfigError(f"{key}={values[key]!r} is not supported; use {value!r}")
    check_quantization(values)
    fields: dict[str, Any] = {}
    for field, key in _SAME_VALUE.items():
        fields[field] = _typed(key, _required(values, key), _HINTS[field])
    for field, (key, default) in _WITH_DEFAULT.items():
        fields[field] = _typed(key, values.get(key, default), _HINTS[field])
    kv_heads = values.get("num_key_value_heads", fields["num_heads"])
    if kv_heads != fields["num_heads"]:
        raise ConfigError(f"num_key_value_heads={kv_heads!r} differs from num_attention_heads={fields['num_heads']!r}")
    fields["num_shared_experts"] = _typed("n_shared_experts", _required(values, "n_shared_experts") or 0, int)
    fields["mtp_depth"] = next((_typed(k, values[k], int) for k in _MTP_KEYS if k in values), 0)
    fields.update(_router(family, values))
    fields.update(_rope(family, values, fields["max_positions"]))
    return ModelConfig(**fields)


def _required(values: dict[str, Any], key: str) -> Any:
    if key not in values:  # implementations assume different defaults
        raise ConfigError(f"{key!r} is not in config.json; add it")
    return values[key]


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Return a value in our field's type; JSON may write 40 for 40.0."""
    if hint is float and type(value) is int:
        return float(value)
    kinds = typing.get_args(hint) or (hint,)
    if type(value) not in kinds:
        raise ConfigError(f"{key}={value!r} is not of type {' or '.join(k.__name__ for k in kinds)}")
    return value


def check_quantization(values: dict[str, Any]) -> None:
    """Check that weights are not quantized, or are FP8 e4m3 in 128 × 128 blocks.

    Raises: ConfigError for another quantization.

    Example:
        >>> check_quantization({"quantization_config": {"quant_method": "gptq"}})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.ConfigError: quantization_config with quant_method='gptq', ...
    """
    config = values.get("quantization_config")
    if config is None:
        return
    if not isinstance(config, dict):
        raise ConfigError(f"quantization_config={config!r} is not an object")
    method, fmt = config.get("quant_method"), config.get("fmt", "e4m3")
    size = config.get("weight_block_size", _BLOCK_SIZE)
    if method != "fp8" or fmt != "e4m3" or size != _BLOCK_SIZE:
        raise ConfigError(
            f"quantization_config with quant_method={method!r}, fmt={fmt!r}, weight_block_size={size!r} is not "
            f"supported; use 'fp8', 'e4m3', {_BLOCK_SIZE}"
        )


def _router(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return our fields of the router."""
    family_scoring, methods = _FAMILIES[family]
    scoring, method = values.get("scoring_func", family_scoring), values.get("topk_method", methods[0])
    if scoring != family_scoring:
        raise ConfigError(f"scoring_func={scoring!r} is not supported for {family}; use {family_scoring!r}")
    if method not in methods:
        raise ConfigError(f"topk_method={method!r} is not supported for {family}; use {' or '.join(methods)}")
    limit = (_typed(key, _required(values, key), int) for key in ("n_group", "topk_group"))
    groups = (1, 1) if method == "greedy" else tuple(limit)
    normalize = _typed("norm_topk_prob", _required(values, "norm_topk_prob"), bool)
    if family == "deepseek_v2" and normalize:
        # The released code then ignores the scale, and transformers ignores the normalisation.
        raise ConfigError("norm_topk_prob=True is not supported for deepseek_v2: its implementations disagree on it")
    return {
        "router": scoring,
        "group_score": "top2_sum" if scoring == "sigmoid" else "max",
        "num_groups": groups[0],
        "groups_per_token": groups[1],
        "normalize_gates": normalize,
    }


def _rope(family: str, values: dict[str, Any], max_positions: int) -> dict[str, Any]:
    """Return our fields of RoPE and YaRN."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r} is not an object")
    scaling = {k: v for k, v in {**(old or {}), **(new or {})}.items() if v is not None}
    theta = scaling.get("rope_theta", values.get("rope_theta", 1e4))
    fields: dict[str, Any] = {
        "rope_theta": _typed("rope_theta", theta, float),
        "rope_interleaved": _typed("rope_interleave", values.get("rope_interleave", True), bool),
    }
    if family == "deepseek_v2" and fields["rope_interleaved"] is not True:
        raise ConfigError("rope_interleave=False is not supported for deepseek_v2: its rotary pairs are interleaved")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return fields
    if rope_type != "yarn":
        raise ConfigError(f"rope_type={rope_type!r} is not supported; use 'yarn' or 'default'")
    if "factor" not in scaling:
        raise ConfigError("rope_type='yarn' has no 'factor'; add it to the rope scaling")
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not all_dim and mscale in (None, 1):
        mscale, all_dim = 1.0, 0.0  # the reference's values where both are absent
    elif not mscale or not all_dim:
        raise ConfigError(f"mscale={mscale!r} does not go with mscale_all_dim={all_dim!r}; give both or neither")
    for key, supported in (("truncate", True), ("attention_factor", None), ("partial_rotary_factor", 1)):
        if scaling.get(key, supported) != supported:
            raise ConfigError(f"{key}={scaling[key]!r} is not supported in rope scaling; use {supported!r}")
    numbers = {"mscale": mscale, "mscale_all_dim": all_dim}
    numbers |= {key: scaling.get(key, default) for key, default in _YARN_DEFAULTS}
    numbers["factor"] = scaling["factor"]
    original = scaling.get("original_max_position_embeddings", max_positions)
    fields["yarn"] = Yarn(
        original_max_positions=_typed("original_max_position_embeddings", original, int),
        **{key: _typed(key, value, float) for key, value in numbers.items()},
    )
    return fields


def config_to_dict(cfg: ModelConfig, *, fp8: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    """Convert a ModelConfig to the config.json that was released and that transformers reads.

    The inverse of `config_from_dict`. Settings that config.json cannot express are left out: balance losses, dispatch,
    remat and compute dtype.

    Args:
        cfg: a model with a released format, see `table.check_released`.
        fp8: say that linear weights are FP8.
        dtype: name of the other weights' dtype.
    Raises: ConfigError naming a value that the released format cannot express.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> config = config_to_dict(preset("v2_lite"))
        >>> config["model_type"], config["kv_lora_rank"], config["num_hidden_layers"]
        ('deepseek_v2', 512, 27)
    """
    check_released(cfg)
    family = "deepseek_v3" if cfg.router == "sigmoid" else "deepseek_v2"
    grouped = cfg.groups_per_token < cfg.num_groups
    method = "noaux_tc" if cfg.router == "sigmoid" else "group_limited_greedy" if grouped else "greedy"
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if family == "deepseek_v3" else "DeepseekV2ForCausalLM"],
        "model_type": family,
        **{key: getattr(cfg, field) for field, key in _SAME_VALUE.items()},
        **{key: getattr(cfg, field) for field, (key, _) in _WITH_DEFAULT.items()},
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
        config["rope_scaling"] = {
            "type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": _BLOCK_SIZE,
        }
    restored = config_from_dict(config)
    expected = _expressible(cfg, restored)
    if restored != expected:
        field = next(k for k in vars(restored) if getattr(restored, k) != getattr(expected, k))
        raise ConfigError(
            f"{field}={getattr(cfg, field)!r} cannot be expressed in the released format of router={cfg.router!r}; "
            f"it requires {field}={getattr(restored, field)!r}"
        )
    return config


def _expressible(cfg: ModelConfig, restored: ModelConfig) -> ModelConfig:
    """Return `cfg` with the fields that config.json does not determine taken from `restored`."""
    silent = ("balance", "capacity_factor")
    changes = {key: getattr(restored, key) for key in silent}
    if cfg.groups_per_token == cfg.num_groups:  # no limit, so the number of groups and their score have no effect
        changes |= {key: getattr(restored, key) for key in ("num_groups", "groups_per_token", "group_score")}
    if cfg.yarn.factor == 1:
        changes["yarn"] = restored.yarn
    if cfg.mtp_depth == 0:
        changes["mtp_kind"] = restored.mtp_kind
    return replace(cfg, **changes)
