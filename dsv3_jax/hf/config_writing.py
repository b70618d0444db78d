"""Convert a ModelConfig to a released config.json; what it cannot express is an error."""

from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig, Yarn, replace
from dsv3_jax.hf.config_json import (
    BLOCK_SIZE,
    INDEXER_KEYS,
    KEY_OF_FIELD,
    WITH_DEFAULT,
    config_from_dict,
)
from dsv3_jax.hf.families import FIXED
from dsv3_jax.hf.tensor_names import check_released


def config_to_dict(
    cfg: ModelConfig, *, fp8: bool = False, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Convert a ModelConfig to the config.json that was released and that transformers reads.

    The inverse of `config_from_dict`. Settings that config.json cannot express are left out:
    balance losses, dispatch, remat, compute dtype, and the rounding of index queries and keys, see
    `left_out`.

    Args:
        cfg: a model with a released format, see `tensor_names.check_released`.
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
    label = _label(cfg)

    config: dict[str, Any] = {
        # as in DeepseekV3ForCausalLM
        "architectures": [label.title().replace("_", "") + "ForCausalLM"],
        "model_type": label,
        # Sizes, and what has one value in every released file.
        **{key: getattr(cfg, field) for field, key in KEY_OF_FIELD.items()},
        **{key: getattr(cfg, field) for field, (key, _) in WITH_DEFAULT.items()},
        **{key: FIXED[key] for key in ("hidden_act", "attention_bias", "moe_layer_freq")},
        "num_key_value_heads": cfg.num_heads,
        "n_shared_experts": cfg.num_shared_experts,
        "num_nextn_predict_layers": cfg.mtp_depth,
        # The router.
        "scoring_func": cfg.router,
        "topk_method": _topk_method(cfg),
        "n_group": cfg.num_groups,
        "topk_group": cfg.groups_per_token,
        "norm_topk_prob": cfg.normalize_gates,
        # Positions.
        "rope_theta": cfg.rope_theta,
        "rope_interleave": cfg.rope_interleaved,
        "rope_scaling": None if cfg.yarn.factor <= 1 else _yarn(cfg.yarn),
        # What only other programs read.
        "bos_token_id": None,
        "eos_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
    }

    # Sparse attention, and which of its layers have an indexer; then how weights are stored.
    if cfg.attention == "dsa":
        config |= {key: getattr(cfg, field) for field, key in INDEXER_KEYS.items()}
    if cfg.index_interleaved:
        config["indexer_types"] = list(cfg.index_types or ["full"] * cfg.num_layers)
    if fp8:
        config["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": BLOCK_SIZE,
        }

    # Read back, it must be the same model: whatever differs is what the format cannot express.
    restored = config_from_dict(config)
    expected = _expressible(cfg, restored)
    if restored != expected:
        field = next(k for k in vars(restored) if getattr(restored, k) != getattr(expected, k))
        raise ConfigError(
            f"{field}={getattr(cfg, field)!r} cannot be expressed in the released format "
            f"{label!r}; it requires {field}={getattr(restored, field)!r}"
        )
    return config


def _label(cfg: ModelConfig) -> str:
    if cfg.attention == "dsa":
        return "glm_moe_dsa" if cfg.index_interleaved else "deepseek_v32"
    return "deepseek_v3" if cfg.router == "sigmoid" else "deepseek_v2"


def _topk_method(cfg: ModelConfig) -> str:
    if cfg.router == "sigmoid":
        return "noaux_tc"
    return "group_limited_greedy" if cfg.groups_per_token < cfg.num_groups else "greedy"


def _yarn(yarn: Yarn) -> dict[str, Any]:
    names = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return {
        "type": "yarn",
        **{name: getattr(yarn, name) for name in names},
        "original_max_position_embeddings": yarn.original_max_positions,
    }


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
    # All groups are chosen, so their number and score have no effect.
    if cfg.groups_per_token == cfg.num_groups:
        changes |= {
            key: getattr(restored, key) for key in ("num_groups", "groups_per_token", "group_score")
        }
    if cfg.yarn.factor == 1:
        changes["yarn"] = restored.yarn
    if cfg.mtp_depth == 0:
        changes["mtp_kind"] = restored.mtp_kind
    return replace(cfg, **changes)
