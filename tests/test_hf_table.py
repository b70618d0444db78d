"""The table of names, configurations, FP8 and 4 bits of released folders, against what was released."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flax import nnx
from models import small
from released import GRID, INT4, dequantized, quantized

import dsv3_jax as ds
from dsv3_jax import hf
from dsv3_jax.config import ConfigError, Yarn
from dsv3_jax.hf.config_json import config_to_dict
from dsv3_jax.hf.fp8 import dequantize, quantize
from dsv3_jax.hf.table import entries
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import abstract

# config.json of DeepSeek-V3 without names of classes and generation settings, written by hand.
RELEASED_V3 = json.loads("""{
 "model_type": "deepseek_v3", "attention_bias": false, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
 "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
 "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048,
 "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
 "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
 "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
 "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                         "weight_block_size": [128, 128]},
 "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                         "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
 "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": true,
 "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
 "v_head_dim": 128, "vocab_size": 129280}""")
RELEASED_V2_LITE = RELEASED_V3 | {
    "model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "num_nextn_predict_layers": None, "q_lora_rank": None, "quantization_config": None,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy",
    "rope_scaling": RELEASED_V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707}, "vocab_size": 102400,
}  # fmt: skip
RELEASED_V2 = RELEASED_V2_LITE | {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8,
    "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "rope_scaling": RELEASED_V3["rope_scaling"], "routed_scaling_factor": 16.0, "topk_group": 3,
    "topk_method": "group_limited_greedy",
}  # fmt: skip
RELEASED_MOONLIGHT = RELEASED_V3 | {
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0, "q_lora_rank": None, "quantization_config": None, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
RELEASED_GLM47_FLASH = {
    "model_type": "glm4_moe_lite", "attention_bias": False, "attention_dropout": 0.0, "dtype": "bfloat16",
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240,
    "kv_lora_rank": 512, "max_position_embeddings": 202752, "moe_intermediate_size": 1536, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 20,
    "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20, "num_nextn_predict_layers": 1,
    "pad_token_id": 154820, "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "v_head_dim": 256, "vocab_size": 154880, "eos_token_id": [154820, 154827, 154829],
}  # fmt: skip
RELEASED_KIMI_K2 = RELEASED_V3 | {
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "max_position_embeddings": 131072, "n_group": 1,
    "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "rope_scaling": RELEASED_V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip
CONFIGS = {
    "v3": RELEASED_V3, "v2": RELEASED_V2, "v2_lite": RELEASED_V2_LITE, "moonlight": RELEASED_MOONLIGHT,
    "glm47_flash": RELEASED_GLM47_FLASH, "kimi_k2": RELEASED_KIMI_K2,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_released_configurations_are_the_presets(name):
    cfg, preset = hf.config_from_dict(CONFIGS[name]), ds.preset(name)
    assert replace(cfg, balance=preset.balance, init_std=preset.init_std) == preset
    config = config_to_dict(preset, fp8=name == "v3")
    different = {k for k, v in config.items() if k in CONFIGS[name] and v != CONFIGS[name][k]}
    # The presets train with the reports' standard deviation. V2 has no MTP, written as null or 0. Others' models are
    # written under DeepSeek's label.
    assert different <= {
        "initializer_range", "num_nextn_predict_layers", "model_type", "quantization_config", "eos_token_id"
    }  # fmt: skip


def test_the_released_list_of_tensors():
    """DeepSeek-V3's index has 91,991 tensors: layers, their scales, and the MTP layer."""
    table = hf.tensor_table(ds.preset("v3"), fp8=True)
    assert len(table) == 91_991 and not any(name.startswith("model.layers.62.") for name in table)
    expected = {
        "model.embed_tokens.weight": ((129280, 7168), "bfloat16"),
        "lm_head.weight": ((129280, 7168), "bfloat16"),
        "model.layers.0.mlp.down_proj.weight": ((7168, 18432), "float8_e4m3fn"),
        "model.layers.0.mlp.down_proj.weight_scale_inv": ((56, 144), "float32"),
        "model.layers.3.mlp.gate.weight": ((256, 7168), "bfloat16"),
        "model.layers.3.mlp.gate.e_score_correction_bias": ((256,), "float32"),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), "float8_e4m3fn"),
        "model.layers.60.self_attn.kv_b_proj.weight_scale_inv": ((256, 4), "float32"),
        "model.layers.61.eh_proj.weight": ((7168, 14336), "bfloat16"),
        "model.layers.61.enorm.weight": ((7168,), "bfloat16"),
        "model.layers.61.shared_head.head.weight": ((129280, 7168), "bfloat16"),
    }
    assert expected.items() <= table.items() and "model.layers.61.eh_proj.weight_scale_inv" not in table


@pytest.mark.parametrize("name", ["groups", "no query compression", "tied embeddings", "V2-Lite, greedy", "Youtu"])
def test_the_table_fills_every_parameter_once(name):
    cfg = GRID[name].cfg
    counts = {}
    for path, v in nnx.to_flat_state(nnx.state(abstract(cfg))):
        counts[path] = np.full(v.shape, 1 if isinstance(v, RouterBias) and cfg.router == "softmax" else 0)
    for entry in entries(cfg):
        if not entry.copy_of:
            parts = entry.split(np.ones(entry.shape, np.int64))
            for param_slice, part in zip(entry.slices, parts, strict=True):
                counts[param_slice.path][param_slice.indices] += part
    assert all((count == 1).all() for count in counts.values())


# configurations


def test_both_spellings_of_rope_scaling():
    old = hf.config_from_dict(RELEASED_V3)
    scaling = {k: v for k, v in RELEASED_V3["rope_scaling"].items() if k != "type"}
    new = {k: v for k, v in RELEASED_V3.items() if k not in ("rope_scaling", "rope_theta")}
    new |= {"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 10000.0}}
    assert hf.config_from_dict(new) == old
    plain = hf.config_from_dict(new | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert plain.rope_theta == 5e5 and plain.yarn == Yarn()
    bare = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}  # the reference's own defaults
    assert hf.config_from_dict(RELEASED_V3 | {"rope_scaling": bare}).yarn == Yarn(40.0, 4096, mscale_all_dim=0.0)


GROUP = INT4["config_groups"]["group_0"]
EIGHT_BITS = INT4 | {"config_groups": {"group_0": GROUP | {"weights": GROUP["weights"] | {"num_bits": 8}}}}
# (change of V3's config.json, part of the error)
REFUSED = [
    ({"model_type": "kimi_k3"}, "model_type='kimi_k3' is not one of .*; did you mean 'kimi_k2'"),
    ({"model_type": "kimi_k25", "text_config": 3}, "needs the object text_config, not 3"),
    ({"scoring_func": "softplus"}, "scoring_func='softplus'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
    ({"quantization_config": EIGHT_BITS}, "num_bits=8"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8 differs from num_attention_heads=128"),
    ({"hidden_size": "7168"}, "hidden_size='7168' is not of type int"),
    ({"kv_lora_rank": None}, "'kv_lora_rank' is not in config.json"),
    ({"n_group": 7}, "num_groups=7 does not divide num_experts=256"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
    ({"rope_scaling": {"type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": RELEASED_V3["rope_scaling"] | {"mscale_all_dim": 0, "mscale": 0.5}}, "mscale=0.5 does not go"),
    ({"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 59}, "mlp_layer_types="),
    # keys that change the network
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"sliding_window": 4096}, "sliding_window=4096"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_unsupported_configurations_are_refused_always(changes, sentence):
    for allow in (False, True):
        with pytest.raises(ConfigError, match=sentence):
            hf.config_from_dict(RELEASED_V3 | changes, allow_unknown_keys=allow)


def test_unknown_keys_are_refused_unless_allowed():
    scaling = RELEASED_V3["rope_scaling"] | {"finetuned": True}
    for changes, sentence in (
        (
            {"index_topk": 2048, "new_norm": {"kind": "x" * 99}},
            "^index_topk=2048, new_norm={'kind': 'x+ may .* --allow-",
        ),
        ({"rope_scaling": scaling}, "finetuned=True may change the network"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            hf.config_from_dict(RELEASED_V3 | changes)
        assert hf.config_from_dict(RELEASED_V3 | changes, allow_unknown_keys=True) == hf.config_from_dict(RELEASED_V3)


def test_other_ways_to_say_the_same():
    v3 = hf.config_from_dict(RELEASED_V3)
    assert hf.config_from_dict(RELEASED_V3 | {"sliding_window": None}) == v3
    assert hf.config_from_dict(RELEASED_V3 | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58}) == v3
    indexed = RELEASED_V3 | {"model_type": "deepseek_v32", "index_topk": 2048, "index_n_heads": 64}
    assert hf.config_from_dict(indexed) == replace(v3, max_positions=2048)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"router": "topk"}, "router='topk'"),
        ({"router": "softmax"}, "norm_topk_prob=True"),
        ({"group_score": "max"}, "group_score='max'"),
        ({"mtp_input": "raw", "mtp_depth": 1}, "mtp_input='raw'"),
        ({"mtp_kind": "medusa", "mtp_depth": 1}, "mtp_kind='medusa'"),
    ],
)
def test_what_the_format_cannot_express_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config_to_dict(small(**changes))


# FP8


@pytest.mark.parametrize("shape", [(256, 384), (130, 257), (5, 7)])
def test_fp8_is_within_a_step_and_requantizing_changes_nothing(rng, shape):
    weight = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    numbers, scales = quantize(weight)
    value = dequantize(numbers, scales)
    np.testing.assert_array_equal(value, dequantized(numbers, scales))
    # A step of e4m3 is an eighth of the next lower power of two, at least 2^-9.
    exact = np.abs(weight) / np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(exact, 2**-9))), -6) - 3)
    error = np.abs(numbers.astype(np.float32)) - exact
    assert (np.abs(error) <= step / 2 * (1 + 1e-5)).all()
    assert_same(quantize(value), (numbers, scales))


def assert_same(left, right):
    assert [array.tobytes() for array in left] == [array.tobytes() for array in right]


def test_requantizing_keeps_released_scales_of_24_bits(rng):
    released = quantized(rng.standard_normal((300, 200)).astype(np.float32) * 0.02)
    assert_same(quantize(dequantized(*released)), released)


def test_requantizing_a_constant_block_changes_nothing(rng):
    """One number fits several neighbouring scales of 24 bits, so ours have 20."""
    constant = np.repeat(rng.uniform(0.5, 2, 100).astype(np.float32), 128)[None]
    numbers, scales = quantize(constant)
    assert_same(quantize(dequantize(numbers, scales)), (numbers, scales))
    assert (scales.view(np.uint32) % 16 == 0).mean() > 0.05  # the case occurs


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, 3e38, 1.4e-45])
def test_fp8_of_extremes(value):
    numbers, scales = quantize(np.full((3, 2), value, np.float32))
    back = dequantize(numbers, scales)
    assert np.isfinite(back).all() and (scales > 0).all()
    assert abs(float(back[0, 0]) - value) <= max(2.0**-100, abs(value) / 16)
