"""Convert between a released config.json and ModelConfig; what only one can express is an error."""

import typing
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig, Yarn, replace
from dsv3_jax.hf import int4
from dsv3_jax.hf.families import FIXED, Family, check_keys, check_known, family_of, text_config
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
# The same for models with an indexer.
_INDEX = {"index_topk": "index_topk", "index_heads": "index_n_heads", "index_dim": "index_head_dim"}
# in released files, and in newer transformers
_MTP_KEYS = ("num_nextn_predict_layers", "num_mtp_layers")
_NULLABLE = ("q_lora_rank", "n_shared_experts")  # keys for which null differs from absent
# Fields of the experts, which a model of dense layers does not have, and keys that are read one by
# one.
_OF_EXPERTS = ("num_experts", "experts_per_token", "expert_dim", "num_dense_layers", "routed_scale")
_ROUTER_KEYS = (
    "n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "scoring_func", "topk_method",
)  # fmt: skip
_OTHER_KEYS = (
    "mlp_layer_types", "rope_parameters", "rope_scaling", "rope_theta", "rope_interleave",
    "num_key_value_heads", "quantization_config",
)  # fmt: skip
# Keys inside of rope_scaling and rope_parameters that `_rope` reads or, without YaRN, no
# implementation does.
_ROPE_KEYS = frozenset(
    "type rope_type rope_theta factor original_max_position_embeddings beta_fast beta_slow mscale "
    "mscale_all_dim truncate attention_factor partial_rotary_factor".split()
)
_BLOCK_SIZE = [BLOCK, BLOCK]
_HINTS = typing.get_type_hints(ModelConfig)
_REQUIRED = object()  # the default of a key that must be there


def config_from_dict(values: dict[str, Any], *, allow_unknown_keys: bool = False) -> ModelConfig:
    """Convert a released config.json to a ModelConfig.

    RoPE scaling is read from `rope_theta` and `rope_scaling {type: yarn}`, or from
    `rope_parameters {rope_type: yarn}`. The labels are those of `families.FAMILIES`.

    Args:
        values: the parsed JSON.
        allow_unknown_keys: pass over keys that are not known.
    Raises: ConfigError naming an absent key, or a key and its value that this model does not
        support.
    Source: the released config.json of each label; transformers' DeepseekV3Config.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> config = config_to_dict(preset("v3"))
        >>> config["hidden_size"], config_from_dict(config).dim
        (7168, 7168)
    """
    if not isinstance(values, dict):
        raise ConfigError(f"config.json holds {type(values).__name__}, not an object")
    values = text_config(values)
    family = family_of(values)
    values = {family.aliases.get(key, key): value for key, value in values.items()}
    values = {**family.defaults} | {
        key: value for key, value in values.items() if value is not None or key in _NULLABLE
    }
    used = {
        *_SAME_VALUE.values(),
        *(key for key, _ in _WITH_DEFAULT.values()),
        *_MTP_KEYS,
        *_ROUTER_KEYS,
        *_OTHER_KEYS,
    }
    check_keys(values, family, used, allow_unknown=allow_unknown_keys)
    check_quantization(values)
    fields: dict[str, Any] = {}
    for name, key in _SAME_VALUE.items():
        if name == "num_dense_layers" and "mlp_layer_types" in values:
            fields[name] = _dense_prefix(values)
        elif family.experts or name not in _OF_EXPERTS:
            fields[name] = _value(values, key, _HINTS[name])
    for name, (key, default) in _WITH_DEFAULT.items():
        fields[name] = _value(values, key, _HINTS[name], default)
    kv_heads = values.get("num_key_value_heads", fields["num_heads"])
    if kv_heads != fields["num_heads"]:
        raise ConfigError(
            f"num_key_value_heads={kv_heads!r} differs from "
            f"num_attention_heads={fields['num_heads']!r}"
        )
    fields["mtp_depth"] = next((_value(values, key, int) for key in _MTP_KEYS if key in values), 0)
    if family.experts:
        fields["num_shared_experts"] = _value(values, "n_shared_experts", int | None) or 0
        fields.update(_router(family, values))
    else:  # a single expert that no layer has
        fields |= {
            "num_dense_layers": fields["num_layers"],
            "num_experts": 1,
            "experts_per_token": 1,
            "expert_dim": 1,
        }
        fields |= {"num_shared_experts": 0, "num_groups": 1, "groups_per_token": 1}
    fields.update(_rope(family, values, fields["max_positions"], allow_unknown_keys))
    if family.indexer:
        fields |= {name: _value(values, key, int) for name, key in _INDEX.items()}
        fields |= {"attention": "dsa", "index_interleaved": family.shared_indexers}
    cfg = ModelConfig(**fields)  # checks the number of layers
    return (
        replace(cfg, index_types=_index_types(values, cfg.num_layers))
        if family.shared_indexers
        else cfg
    )


def _index_types(values: dict[str, Any], layers: int) -> tuple[str, ...] | None:
    """Which layers have an indexer ("full") or reuse the last choice ("shared"); None: all full.

    Source: transformers' GlmMoeDsaConfig.
    """
    types = values.get("indexer_types", values.get("index_topk_pattern"))
    if isinstance(types, str):
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in types]
    if types is None:
        period = max(_value(values, "index_topk_freq", int, 1), 1)
        offset = _value(values, "index_skip_topk_offset", int, 2)
        types = [
            "shared" if max(layer - offset + 1, 0) % period else "full" for layer in range(layers)
        ]
    known = isinstance(types, list) and all(kind in ("full", "shared") for kind in types)
    if not known or len(types) != layers or types[:1] != ["full"]:
        raise ConfigError(
            f"indexer_types={types!r:.80} does not say 'full' or 'shared' for each of {layers} "
            "layers, 'full' first"
        )
    return tuple(types) if "shared" in types else None


def _dense_prefix(values: dict[str, Any]) -> int:
    """The number of dense layers before the sparse ones, from `mlp_layer_types`."""
    kinds, layers = values["mlp_layer_types"], values["num_hidden_layers"]
    complete = isinstance(kinds, list) and len(kinds) == layers
    dense = kinds.count("dense") if complete else 0
    if not complete or kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ConfigError(
            f"mlp_layer_types={kinds!r} is not 'dense' layers before 'sparse' ones, {layers!r} in "
            "all"
        )
    return dense


def _value(values: dict[str, Any], key: str, hint: Any, default: Any = _REQUIRED) -> Any:
    """Return a key's value in our field's type; JSON may write 40 for 40.0.

    Raises: ConfigError for another type, or for an absent key without a default, as implementations
        assume several.
    """
    value = values.get(key, default)
    if value is _REQUIRED:
        raise ConfigError(f"{key!r} is not in config.json; add it")
    if hint is float and type(value) is int and abs(value) < 1 << 64:
        return float(value)
    kinds = typing.get_args(hint) or (hint,)
    if type(value) not in kinds:
        raise ConfigError(
            f"{key}={value!r} is not of type {' or '.join(k.__name__ for k in kinds)}"
        )
    return value


def check_quantization(values: dict[str, Any]) -> None:
    """Check that weights are not quantized, or FP8 e4m3 in 128 × 128 blocks, or 4 bits in groups.

    Raises: ConfigError for another quantization.

    Example:
        >>> config = {"quant_method": "gptq"}
        >>> check_quantization({"quantization_config": config})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: quantization_config with quant_method='gptq', ...
    """
    config = values.get("quantization_config")
    if config is None:
        return
    if not isinstance(config, dict):
        raise ConfigError(f"quantization_config={config!r} is not an object")
    if config.get("quant_method") == int4.METHOD:
        int4.group_size(config)
        return
    method = config.get("quant_method")
    fmt = config.get("fmt", "e4m3")
    size = config.get("weight_block_size", _BLOCK_SIZE)
    if method != "fp8" or fmt != "e4m3" or size != _BLOCK_SIZE:
        raise ConfigError(
            f"quantization_config with quant_method={method!r}, fmt={fmt!r}, "
            f"weight_block_size={size!r} is not supported; use 'fp8', 'e4m3', {_BLOCK_SIZE}"
        )


def _router(family: Family, values: dict[str, Any]) -> dict[str, Any]:
    """Return our fields of the router."""
    label = values["model_type"]
    methods = family.methods
    scoring = values.get("scoring_func", family.scoring)
    method = values.get("topk_method", methods[0])
    if scoring != family.scoring:
        raise ConfigError(
            f"scoring_func={scoring!r} is not supported for {label}; use {family.scoring!r}"
        )
    if method not in methods:
        raise ConfigError(
            f"topk_method={method!r} is not supported for {label}; use {' or '.join(methods)}"
        )
    groups = (
        (1, 1)
        if method == "greedy"
        else [_value(values, key, int) for key in ("n_group", "topk_group")]
    )
    normalize = _value(values, "norm_topk_prob", bool)
    if label == "deepseek_v2" and normalize:
        # The released code then ignores the scale, and transformers ignores the normalisation.
        raise ConfigError(
            "norm_topk_prob=True is not supported for deepseek_v2: its implementations disagree "
            "on it"
        )
    return {
        "router": scoring,
        "group_score": "top2_sum" if scoring == "sigmoid" else "max",
        "num_groups": groups[0],
        "groups_per_token": groups[1],
        "normalize_gates": normalize,
    }


def _rope(
    family: Family, values: dict[str, Any], max_positions: int, allow_unknown: bool
) -> dict[str, Any]:
    """Return our fields of RoPE and YaRN."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r} is not an object")
    scaling = {k: v for k, v in {**(old or {}), **(new or {})}.items() if v is not None}
    fields: dict[str, Any] = {
        "rope_theta": _value(
            scaling if "rope_theta" in scaling else values, "rope_theta", float, 1e4
        ),
        "rope_interleaved": _value(values, "rope_interleave", bool, True),
    }
    label = values["model_type"]
    if (label == "deepseek_v2" or family.indexer) and not fields["rope_interleaved"]:
        raise ConfigError(
            f"rope_interleave=False is not supported for {label}: its rotary pairs are interleaved"
        )
    supported = family.shared_indexers
    if (index := values.get("indexer_rope_interleave", supported)) != supported:
        raise ConfigError(
            f"indexer_rope_interleave={index!r} is not supported for {label}; use {supported!r}"
        )
    for key, supported in (
        ("partial_rotary_factor", 1),
        ("truncate", True),
        ("attention_factor", None),
    ):
        if scaling.get(key, supported) != supported:
            raise ConfigError(
                f"{key}={scaling[key]!r} is not supported in rope scaling; use {supported!r}"
            )
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "yarn", "deepseek_yarn"):
        raise ConfigError(f"rope_type={rope_type!r} is not supported; use 'yarn' or 'default'")
    if not allow_unknown:
        check_known(scaling, _ROPE_KEYS, "RoPE scaling")
    if rope_type == "default":
        return fields
    mscale, all_dim = (_value(scaling, key, float, 0.0) for key in ("mscale", "mscale_all_dim"))
    if not all_dim and mscale in (0, 1):
        mscale = 1.0  # the reference's value where both are absent
    elif not mscale or not all_dim:
        raise ConfigError(
            f"mscale={mscale!r} does not go with mscale_all_dim={all_dim!r}; give both or neither"
        )
    fields["yarn"] = Yarn(
        factor=_value(scaling, "factor", float),
        original_max_positions=_value(
            scaling, "original_max_position_embeddings", int, max_positions
        ),
        beta_fast=_value(scaling, "beta_fast", float, 32.0),
        beta_slow=_value(scaling, "beta_slow", float, 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
    return fields


def config_to_dict(
    cfg: ModelConfig, *, fp8: bool = False, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Convert a ModelConfig to the config.json that was released and that transformers reads.

    The inverse of `config_from_dict`. Settings that config.json cannot express are left out:
    balance losses, dispatch, remat, compute dtype, and the rounding of index queries and keys, see
    `left_out`.

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
    label = "deepseek_v3" if cfg.router == "sigmoid" else "deepseek_v2"
    if cfg.attention == "dsa":
        label = "glm_moe_dsa" if cfg.index_interleaved else "deepseek_v32"
    grouped = cfg.groups_per_token < cfg.num_groups
    method = (
        "noaux_tc" if cfg.router == "sigmoid" else "group_limited_greedy" if grouped else "greedy"
    )
    config: dict[str, Any] = {
        # as in DeepseekV3ForCausalLM
        "architectures": [label.title().replace("_", "") + "ForCausalLM"],
        "model_type": label,
        **{key: getattr(cfg, field) for field, key in _SAME_VALUE.items()},
        **{key: getattr(cfg, field) for field, (key, _) in _WITH_DEFAULT.items()},
        **{key: FIXED[key] for key in ("hidden_act", "attention_bias", "moe_layer_freq")},
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
    if cfg.attention == "dsa":
        config |= {key: getattr(cfg, field) for field, key in _INDEX.items()}
    if cfg.index_interleaved:
        config["indexer_types"] = list(cfg.index_types or ["full"] * cfg.num_layers)
    if cfg.yarn.factor > 1:
        yarn = cfg.yarn
        scaling = {
            key: getattr(yarn, key)
            for key in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        }
        original = {"original_max_position_embeddings": yarn.original_max_positions}
        config["rope_scaling"] = {"type": "yarn"} | scaling | original
    if fp8:
        method = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
        config["quantization_config"] = method | {"weight_block_size": _BLOCK_SIZE}
    restored = config_from_dict(config)
    expected = _expressible(cfg, restored)
    if restored != expected:
        field = next(k for k in vars(restored) if getattr(restored, k) != getattr(expected, k))
        raise ConfigError(
            f"{field}={getattr(cfg, field)!r} cannot be expressed in the released format "
            f"{label!r}; it requires {field}={getattr(restored, field)!r}"
        )
    return config


def left_out(cfg: ModelConfig) -> str:
    """Say which setting makes a released folder compute otherwise than the model; "" if none does.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> left_out(preset("v3"))
        ''
    """
    if cfg.attention != "dsa" or cfg.index_precision == "none":
        return ""
    return (
        f"index_precision={cfg.index_precision!r} is lost, since config.json has no key for it: "
        "its readers do not round index queries and keys"
    )


def _expressible(cfg: ModelConfig, restored: ModelConfig) -> ModelConfig:
    """Return `cfg` with the fields that config.json does not determine taken from `restored`."""
    silent = ("balance", "capacity_factor", "index_precision")
    changes = {key: getattr(restored, key) for key in silent}
    # no limit, so the number of groups and their score have no effect
    if cfg.groups_per_token == cfg.num_groups:
        changes |= {
            key: getattr(restored, key) for key in ("num_groups", "groups_per_token", "group_score")
        }
    if cfg.yarn.factor == 1:
        changes["yarn"] = restored.yarn
    if cfg.mtp_depth == 0:
        changes["mtp_kind"] = restored.mtp_kind
    return replace(cfg, **changes)
