"""Labels of released models (`model_type`) that are one network: MLA or DSA, experts or dense.

One row a label. A key of config.json is used, known to be harmless, or refused: nothing that
changes the network is passed over. Sources: the released config.json files of each label;
transformers' configuration classes.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv3_jax.config import ConfigError, did_you_mean


@dataclass(frozen=True)
class Family:
    """A label's defaults where config.json says nothing, and its spelling of the rest."""

    scoring: str = "sigmoid"  # scores of the router
    methods: tuple[str, ...] = ("noaux_tc",)  # its topk_methods; the first if the key is absent
    defaults: Mapping[str, Any] = field(default_factory=dict)  # values of keys that may be absent
    aliases: Mapping[str, str] = field(default_factory=dict)  # its spelling of a key → DeepSeek's
    # keys that it alone has: `config_json` reads them, or they change no number
    keys: frozenset[str] = frozenset()
    experts: bool = True  # False: every layer is dense, and there are no keys of experts
    indexer: bool = False  # its attention is DSA
    # layers may reuse the choice of an earlier one; index features are then interleaved
    shared_indexers: bool = False


_ONE_GROUP = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 1}
_INDEXER = frozenset(
    "index_topk index_head_dim index_n_heads indexer_rope_interleave layer_types".split()
)
_GLM = frozenset(
    "indexer_types index_topk_pattern index_topk_freq index_skip_topk_offset "
    "index_share_for_mtp_iteration moe_router_dtype".split()
)
_YOUTU = Family(experts=False, keys=frozenset({"embedding_initializer_range"}))

FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family("softmax", ("greedy", "group_limited_greedy")),
    "deepseek_v3": Family(),  # also Moonlight and GigaChat3
    "deepseek_v32": Family(indexer=True, keys=_INDEXER),
    "kimi_k2": Family(),
    "glm4_moe_lite": Family(defaults=_ONE_GROUP),
    "glm_moe_dsa": Family(
        indexer=True,
        shared_indexers=True,
        keys=_INDEXER | _GLM,
        defaults=_ONE_GROUP | {"first_k_dense_replace": 3},
    ),
    "sarvam_mla": Family(
        defaults=_ONE_GROUP | {"q_lora_rank": None},
        aliases={"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"},
    ),
    "youtu": _YOUTU,
    "youtu_llm": _YOUTU,
}
WRAPPERS = ("kimi_k25",)  # labels whose language model is described by their `text_config`
# keys of the language model that a wrapper may have in place of its `text_config`
_OF_THE_WRAPPER = frozenset(
    "quantization_config dtype torch_dtype bos_token_id eos_token_id".split()
)

# Keys that change no number that this package computes.
HARMLESS = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version _name_or_path name_or_path
    model_type tokenizer_class bos_token_id eos_token_id pad_token_id unk_token_id
    decoder_start_token_id sep_token_id
    use_cache return_dict output_attentions output_hidden_states output_router_logits
    chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder is_decoder
    add_cross_attention task_specific_params
    finetuning_task attn_implementation _attn_implementation use_flash_attention_2
    head_dim qk_head_dim q_head_dim ep_size ep_degree pretraining_tp num_local_experts
    aux_loss_alpha seq_aux router_aux_loss_coef embd_pdrop resid_pdrop
    """.split()
)
# Keys of which one value is what this package computes; absent or null means it.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "attention_dropout": 0,
    "use_qk_norm": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1,
    "sliding_window": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "residual_scale": None,
    "embedding_multiplier": None,
    "logits_scaling": None,
}


def text_config(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of the language model: those of `text_config` for a label that wraps one, else all.

    Example:
        >>> inner = {"model_type": "kimi_k2"}
        >>> text_config({"model_type": "kimi_k25", "text_config": inner, "vision_config": {}})
        {'model_type': 'kimi_k2'}
    """
    if values.get("model_type") not in WRAPPERS:
        return values
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        raise ConfigError(
            f"model_type={values['model_type']!r} needs the object text_config, not {inner!r}"
        )

    # The wrapper alone may have some keys of the language model.
    inner = {"model_type": "deepseek_v3"} | inner
    for key in _OF_THE_WRAPPER & values.keys():
        if inner.get(key) is None:
            inner[key] = values[key]
    if "tie_word_embeddings" in values:  # the head is the wrapper's
        inner["tie_word_embeddings"] = values["tie_word_embeddings"]
    return inner


def family_of(values: dict[str, Any]) -> Family:
    """The row of a config.json.

    Raises: ConfigError for a label that there is not, with the nearest one.

    Example:
        >>> family_of({"model_type": "deepseek_v2"}).scoring
        'softmax'
    """
    label = values.get("model_type")
    if not isinstance(label, str) or label not in FAMILIES:
        near = did_you_mean(str(label), FAMILIES)
        raise ConfigError(
            f"model_type={label!r} is not one of {', '.join((*FAMILIES, *WRAPPERS))}{near}"
        )
    return FAMILIES[label]


def check_keys(
    values: dict[str, Any], family: Family, used: set[str], *, allow_unknown: bool
) -> None:
    """Check that every key is understood.

    Args:
        values: config.json with DeepSeek's spelling of keys, without nulls.
        used: keys that the caller reads.
        allow_unknown: pass over keys that nobody knows. Keys that are known to change the network
            stay refused.
    Raises: ConfigError naming the keys and their values.

    Example:
        >>> check_keys({"use_qk_norm": True}, FAMILIES["deepseek_v3"], set(), allow_unknown=True)
        Traceback (most recent call last):
        dsv3_jax.config.fields.ConfigError: use_qk_norm=True is not supported; use False
    """
    for key, supported in FIXED.items():
        if values.get(key, supported) != supported:
            wanted = "leave it out" if supported is None else f"use {supported!r}"
            raise ConfigError(f"{key}={values[key]!r} is not supported; {wanted}")

    # A key that nobody knows may change the network, too.
    if allow_unknown:
        return
    known = used | HARMLESS | family.keys | FIXED.keys()
    check_known(values, known, f"model_type={values.get('model_type')!r}")


def check_known(values: dict[str, Any], known: Collection[str], where: str) -> None:
    """Check that every key is one of those that are known.

    Raises: ConfigError naming the others and their values.

    Example:
        >>> values = {"factor": 2, "low_freq_factor": 1}
        >>> check_known(values, {"factor"}, "RoPE scaling")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        dsv3_jax.config.fields.ConfigError: low_freq_factor=1 may change the network ...
    """
    if unknown := sorted(values.keys() - known):
        listed = ", ".join(f"{key}={values[key]!r:.60}" for key in unknown)
        raise ConfigError(
            f"{listed} may change the network and is not known for {where}; "
            "dsv3 convert --allow-unknown-keys (allow_unknown_keys=True) leaves it out"
        )
