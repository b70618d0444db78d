"""Convert a released config.json to a ModelConfig; what this model does not have is an error."""

import typing
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig, Yarn, replace
from dsv3_jax.hf import int4
from dsv3_jax.hf.families import Family, check_keys, check_known, family_of, text_config
from dsv3_jax.hf.tensor_names import BLOCK

# Our field → key of config.json with the same value.
KEY_OF_FIELD = {
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
WITH_DEFAULT: dict[str, tuple[str, Any]] = {
    "tie_embeddings": ("tie_word_embeddings", False),
    "init_std": ("initializer_range", 0.02),
}
# The same for models with an indexer.
INDEXER_KEYS = {
    "index_topk": "index_topk",
    "index_heads": "index_n_heads",
    "index_dim": "index_head_dim",
}
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
    "rope_type rope_theta factor original_max_position_embeddings beta_fast beta_slow mscale "
    "mscale_all_dim truncate attention_factor partial_rotary_factor".split()
)
# Keys inside of it of which one value is what this package computes.
_ROPE_FIXED: dict[str, Any] = {
    "partial_rotary_factor": 1,
    "truncate": True,
    "attention_factor": None,
}
# All keys that are read here.
_USED = {
    *KEY_OF_FIELD.values(),
    *(key for key, _ in WITH_DEFAULT.values()),
    *_MTP_KEYS,
    *_ROUTER_KEYS,
    *_OTHER_KEYS,
}
BLOCK_SIZE = [BLOCK, BLOCK]
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
        >>> from dsv3_jax.hf.config_writing import config_to_dict
        >>> from dsv3_jax.presets import preset
        >>> config = config_to_dict(preset("v3"))
        >>> config["hidden_size"], config_from_dict(config).dim
        (7168, 7168)
    """
    if not isinstance(values, dict):
        raise ConfigError(f"config.json holds {type(values).__name__}, not an object")

    # DeepSeek's spelling of keys, without nulls; what a label's files leave out has its default.
    values = text_config(values)
    family = family_of(values)
    values = {family.aliases.get(key, key): value for key, value in values.items()}
    values = {**family.defaults} | {
        key: value for key, value in values.items() if value is not None or key in _NULLABLE
    }
    check_keys(values, family, _USED, allow_unknown=allow_unknown_keys)
    check_quantization(values)

    # Fields group by group; each group refuses what this model does not have.
    fields = _sizes(family, values)
    fields["mtp_depth"] = next((_value(values, key, int) for key in _MTP_KEYS if key in values), 0)
    fields |= _experts(family, values, fields["num_layers"])
    fields |= _rope(family, values, fields["max_positions"], allow_unknown_keys)
    if family.indexer:
        fields |= {name: _value(values, key, int) for name, key in INDEXER_KEYS.items()}
        fields |= {"attention": "dsa", "index_interleaved": family.shared_indexers}

    cfg = ModelConfig(**fields)  # checks the number of layers, which the pattern must have
    if family.shared_indexers:
        return replace(cfg, index_types=_index_types(values, cfg.num_layers))
    return cfg


def _sizes(family: Family, values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are one key each."""
    fields: dict[str, Any] = {}
    for name, key in KEY_OF_FIELD.items():
        if name == "num_dense_layers" and "mlp_layer_types" in values:
            fields[name] = _dense_prefix(values)
        elif family.experts or name not in _OF_EXPERTS:
            fields[name] = _value(values, key, _HINTS[name])
    for name, (key, default) in WITH_DEFAULT.items():
        fields[name] = _value(values, key, _HINTS[name], default)

    # With MLA every head has its own keys and values.
    kv_heads = values.get("num_key_value_heads", fields["num_heads"])
    if kv_heads != fields["num_heads"]:
        raise ConfigError(
            f"num_key_value_heads={kv_heads!r} differs from "
            f"num_attention_heads={fields['num_heads']!r}"
        )
    return fields


def _experts(family: Family, values: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return the fields of experts and router. A model without has one expert, in no layer."""
    if family.experts:
        shared = _value(values, "n_shared_experts", int | None) or 0
        return {"num_shared_experts": shared} | _router(family, values)
    return {
        "num_dense_layers": num_layers,
        "num_experts": 1,
        "experts_per_token": 1,
        "expert_dim": 1,
        "num_shared_experts": 0,
        "num_groups": 1,
        "groups_per_token": 1,
    }


def _index_types(values: dict[str, Any], layers: int) -> tuple[str, ...] | None:
    """Which layers have an indexer ("full") or reuse the last choice ("shared"); None: all full.

    Source: transformers' GlmMoeDsaConfig.
    """
    # A list of names; a string with a letter for each layer; or a period with an offset.
    types = values.get("indexer_types", values.get("index_topk_pattern"))
    if isinstance(types, str):
        types = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in types]
    if types is None:
        period = max(_value(values, "index_topk_freq", int, 1), 1)
        offset = _value(values, "index_skip_topk_offset", int, 2)
        types = [
            "shared" if max(layer - offset + 1, 0) % period else "full" for layer in range(layers)
        ]

    # The first layer has no earlier choice to reuse.
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
        int4.group_size(config)  # refuses another form
        return

    method = config.get("quant_method")
    fmt = config.get("fmt", "e4m3")
    size = config.get("weight_block_size", BLOCK_SIZE)
    if method != "fp8" or fmt != "e4m3" or size != BLOCK_SIZE:
        raise ConfigError(
            f"quantization_config with quant_method={method!r}, fmt={fmt!r}, "
            f"weight_block_size={size!r} is not supported; use 'fp8', 'e4m3', {BLOCK_SIZE}"
        )


def _router(family: Family, values: dict[str, Any]) -> dict[str, Any]:
    """Return our fields of the router."""
    # How an expert is scored, and whether groups are chosen before experts.
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

    # "greedy" chooses among all experts: one group.
    num_groups = chosen_groups = 1
    if method != "greedy":
        num_groups = _value(values, "n_group", int)
        chosen_groups = _value(values, "topk_group", int)

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
        "num_groups": num_groups,
        "groups_per_token": chosen_groups,
        "normalize_gates": normalize,
    }


def _rope(
    family: Family, values: dict[str, Any], max_positions: int, allow_unknown: bool
) -> dict[str, Any]:
    """Return our fields of RoPE and YaRN."""
    # Newer files have `rope_parameters`, older ones `rope_scaling`; some have both.
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{key}={value!r} is not an object")
    new, old = (_rope_values(value or {}) for value in (new, old))
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise ConfigError(
                f"rope_scaling has {key}={old[key]!r} and rope_parameters {key}={new[key]!r}; "
                "leave one out"
            )
    scaling = {**old, **new}
    theta_from = scaling if "rope_theta" in scaling else values
    fields: dict[str, Any] = {
        "rope_theta": _value(theta_from, "rope_theta", float, 1e4),
        "rope_interleaved": _value(values, "rope_interleave", bool, True),
    }

    # Pairs of a rotation: neighbours, or halves. For an indexer's the label decides.
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

    # Refuse all that would compute other angles.
    for key, supported in _ROPE_FIXED.items():
        if scaling.get(key, supported) != supported:
            raise ConfigError(
                f"{key}={scaling[key]!r} is not supported in rope scaling; use {supported!r}"
            )
    rope_type = scaling.get("rope_type", "default")
    if rope_type not in ("default", "yarn", "deepseek_yarn"):
        raise ConfigError(f"rope_type={rope_type!r} is not supported; use 'yarn' or 'default'")
    if not allow_unknown:
        check_known(scaling, _ROPE_KEYS, "RoPE scaling")
    if rope_type != "default":
        fields["yarn"] = _yarn(scaling, max_positions)
    return fields


def _rope_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values of RoPE that are not null; the older files' `type` is the newer `rope_type`."""
    found = {key: value for key, value in values.items() if value is not None}
    if "type" in found:
        found.setdefault("rope_type", found["type"])
        del found["type"]
    return found


def _yarn(scaling: dict[str, Any], max_positions: int) -> Yarn:
    """Return YaRN's settings; `max_positions` is the trained length where none is named."""
    mscale, all_dim = (_value(scaling, key, float, 0.0) for key in ("mscale", "mscale_all_dim"))
    if not all_dim and mscale in (0, 1):
        mscale = 1.0  # the reference's value where both are absent
    elif not mscale or not all_dim:
        raise ConfigError(
            f"mscale={mscale!r} does not go with mscale_all_dim={all_dim!r}; give both or neither"
        )
    original = _value(scaling, "original_max_position_embeddings", int, max_positions)
    return Yarn(
        factor=_value(scaling, "factor", float),
        original_max_positions=original,
        beta_fast=_value(scaling, "beta_fast", float, 32.0),
        beta_slow=_value(scaling, "beta_slow", float, 1.0),
        mscale=mscale,
        mscale_all_dim=all_dim,
    )
