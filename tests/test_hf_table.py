"""The table of names, configurations, FP8 and 4 bits of released folders, against the releases."""

import json
from dataclasses import replace

import numpy as np
import pytest
from models import small
from released import GOLDEN, INT4, dequantized, quantized
from runs import assert_bitwise, refused

import dsv3_jax as ds
from dsv3_jax import hf
from dsv3_jax.config import Yarn
from dsv3_jax.hf.config_writing import config_to_dict
from dsv3_jax.hf.fp8 import dequantize, quantize

# config.json of the released models, without names of classes and generation settings, by hand.
CONFIGS = json.loads((GOLDEN / "configs.json").read_text())
RELEASED_V3 = CONFIGS["v3"]


@pytest.mark.parametrize("name", CONFIGS)
def test_released_configurations_are_the_presets(name):
    cfg, preset = hf.config_from_dict(CONFIGS[name]), ds.preset(name)
    assert replace(cfg, balance=preset.balance, init_std=preset.init_std) == preset
    config = config_to_dict(preset, fp8=name == "v3")
    # The reports' standard deviation, V2's 0 of no MTP, DeepSeek's label for others' models.
    may_differ = "initializer_range num_nextn_predict_layers model_type quantization_config"
    different = {k for k in config.keys() & CONFIGS[name] if config[k] != CONFIGS[name][k]}
    assert different <= {*may_differ.split(), "eos_token_id"}


def test_the_released_list_of_tensors():
    """DeepSeek-V3's index has 91,991 tensors: layers, their scales, and the MTP layer."""
    table = hf.tensor_table(ds.preset("v3"), fp8=True)
    assert len(table) == 91_991 and not any(name.startswith("model.layers.62.") for name in table)
    expected = {
        "model.embed_tokens.weight": ((129280, 7168), "bfloat16"),
        "model.layers.0.mlp.down_proj.weight": ((7168, 18432), "float8_e4m3fn"),
        "model.layers.0.mlp.down_proj.weight_scale_inv": ((56, 144), "float32"),
        "model.layers.3.mlp.gate.e_score_correction_bias": ((256,), "float32"),
        "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), "float8_e4m3fn"),
        "model.layers.60.self_attn.kv_b_proj.weight_scale_inv": ((256, 4), "float32"),
        "model.layers.61.eh_proj.weight": ((7168, 14336), "bfloat16"),
        "model.layers.61.shared_head.head.weight": ((129280, 7168), "bfloat16"),
    }
    assert expected.items() <= table.items()
    assert "model.layers.61.eh_proj.weight_scale_inv" not in table


# configurations


def test_other_ways_to_say_the_same():
    scaling = {k: v for k, v in RELEASED_V3["rope_scaling"].items() if k != "type"}
    new = {k: v for k, v in RELEASED_V3.items() if k not in ("rope_scaling", "rope_theta")}
    new |= {"rope_parameters": scaling | {"rope_type": "yarn", "rope_theta": 10000.0}}
    assert hf.config_from_dict(new) == hf.config_from_dict(RELEASED_V3)
    # the reference's own defaults
    bare = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    found = hf.config_from_dict(RELEASED_V3 | {"rope_scaling": bare}).yarn
    assert found == Yarn(40.0, 4096, mscale_all_dim=0.0)


INDEX = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
V32 = RELEASED_V3 | INDEX | {"model_type": "deepseek_v32"}
GLM = V32 | {"model_type": "glm_moe_dsa", "num_hidden_layers": 8, "n_routed_experts": 16}


def test_indexers():
    of_v3 = hf.config_from_dict(RELEASED_V3)
    v32 = replace(of_v3, attention="dsa", index_topk=2048, index_heads=64, index_dim=128)
    assert hf.config_from_dict(V32) == v32
    without, table = (hf.tensor_table(replace(cfg, num_layers=5), fp8=True) for cfg in (of_v3, v32))
    assert without.items() <= table.items() and len(table) == len(without) + 6 * 7
    assert table["model.layers.5.self_attn.indexer.k_norm.bias"][0] == (128,)
    of_one = {k.split(".")[5]: v for k, (_, v) in table.items() if ".4.self_attn.indexer" in k}
    of_bfloat16 = dict.fromkeys(("k_norm", "weights_proj"), "bfloat16")
    assert of_one == dict.fromkeys(("wq_b", "wk"), "float32") | of_bfloat16
    pattern, types = {"index_topk_pattern": "FSSFSSSS"}, ["full", *["shared"] * 7]
    for changes, expected in (
        ({"indexer_rope_interleave": True}, "FFFFFFFF"),
        ({"index_topk_freq": 3}, "FFSSFSSF"),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 3}, "FFFSSSFS"),
        (pattern | {"index_topk_freq": 4}, "FSSFSSSS"),
        (pattern | {"indexer_types": types}, "FSSSSSSS"),
    ):
        cfg = hf.config_from_dict(GLM | changes)
        assert cfg.index_interleaved
        assert "".join(k[0].upper() for k in cfg.index_types or ["full"] * 8) == expected
        assert hf.config_from_dict(config_to_dict(cfg)) == cfg
        found = {int(k.split(".")[2]) for k in hf.tensor_table(cfg) if ".indexer." in k}
        # an MTP layer has its own
        assert found == {i for i, kind in enumerate(expected + "F") if kind == "F"}
    with refused("index_types=.* cannot be expressed in the released format 'deepseek_v32'"):
        config_to_dict(replace(v32, index_types=("full", *["shared"] * 60)))


GROUP = INT4["config_groups"]["group_0"]
GROUP = GROUP | {"weights": GROUP["weights"] | {"num_bits": 8}}
EIGHT_BITS = INT4 | {"config_groups": {"group_0": GROUP}}
# (change of V3's config.json, part of the error)
REFUSED = [
    ({"model_type": "kimi_k3"}, "model_type='kimi_k3' is not one of .*; did you mean 'kimi_k2'"),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
    ({"quantization_config": EIGHT_BITS}, "num_bits=8"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8 differs from num_attention_heads=128"),
    ({"hidden_size": "7168"}, "hidden_size='7168' is not of type int"),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
    (GLM | {"indexer_types": ["full"] * 7}, "indexer_types=.* for each of 8 layers"),
    (GLM | {"index_topk_pattern": "SFFFFFFF"}, "indexer_types=.* 'full' first"),
    (GLM | {"indexer_rope_interleave": False}, "indexer_rope_interleave=False"),
    (GLM | {"index_topk": None}, "'index_topk' is not in config.json"),
    (
        {"rope_parameters": {"rope_type": "default"}},
        "rope_scaling has rope_type='yarn' and rope_parameters rope_type='default'",
    ),
    ({"rope_parameters": {"factor": 20}}, "rope_scaling has factor=40 and .* factor=20"),
    ({"sliding_window": 4096}, "sliding_window=4096"),  # a key that changes the network
]


def test_what_has_no_form_is_refused_and_unknown_keys_unless_allowed():
    for changes, sentence in REFUSED:
        with refused(sentence):
            hf.config_from_dict(RELEASED_V3 | changes, allow_unknown_keys=True)
    with refused("mtp_kind='medusa'"):
        config_to_dict(small(mtp_kind="medusa", mtp_depth=1))
    unknown = RELEASED_V3 | {"index_topk": 2048, "new_norm": {"kind": "x" * 99}}
    with refused("^index_topk=2048, new_norm={'kind': 'x+ may .* --allow-"):
        hf.config_from_dict(unknown)
    assert hf.config_from_dict(unknown, allow_unknown_keys=True) == hf.config_from_dict(RELEASED_V3)


# FP8


@pytest.mark.parametrize("shape", [(256, 384), (130, 257)])
def test_fp8_is_within_a_step_and_requantizing_changes_nothing(rng, shape):
    weight = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    numbers, scales = quantize(weight)
    value = dequantize(numbers, scales)
    np.testing.assert_array_equal(value, dequantized(numbers, scales))
    # A step of e4m3 is an eighth of the next lower power of two, at least 2^-9.
    exact = np.abs(weight) / np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    assert exact.max() <= 448  # scales are rounded up, so nothing is clipped
    step = np.exp2(np.maximum(np.floor(np.log2(np.maximum(exact, 2**-9))), -6) - 3)
    error = np.abs(numbers.astype(np.float32)) - exact
    assert (np.abs(error) <= step / 2 * (1 + 1e-5)).all()
    assert_bitwise(quantize(value), (numbers, scales))


def test_requantizing_keeps_scales_of_24_bits_and_extremes(rng):
    """A number of a constant block fits several scales of 24 bits, so ours have 20."""
    released = quantized(rng.standard_normal((300, 200)).astype(np.float32) * 0.02)
    assert_bitwise(quantize(dequantized(*released)), released)
    numbers, scales = quantize(np.repeat(rng.uniform(0.5, 2, 100).astype(np.float32), 128)[None])
    assert_bitwise(quantize(dequantize(numbers, scales)), (numbers, scales))
    numbers, scales = quantize(np.repeat(np.float32([0.0, -0.0, 1e-38, 3e38, 1.4e-45]), 128)[None])
    assert np.isfinite(dequantize(numbers, scales)).all() and (scales > 0).all()
