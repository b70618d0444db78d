"""Kimi K2.5 as transformers saves it and as it was released: its language model computes the same in both programs."""

import pytest
from released import GRID, differences, ours, tokens, write_folder

from dsv3_jax import hf
from dsv3_jax.hf.files import read_json

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # torch and transformers warn
]

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@pytest.fixture
def wrapped():
    """transformers' class of Kimi K2.5, with a small tower of pictures, around a cell's language model."""
    import torch
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    text = hf.config_to_dict(GRID["Kimi K2.5"].cfg, dtype="float32")
    vision = {"patch_size": 2, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 1, "hidden_size": 8}
    vision |= {"num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    roles = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict.fromkeys(roles, 999)  # in no text
    config = Kimi_K25Config(text_config=text, vision_config=vision, projection_hidden_size=8, **ids)
    torch.manual_seed(0)
    model = Kimi_K25ForConditionalGeneration._from_config(config, dtype=torch.float32, **EAGER).eval()
    for parameter in model.model.language_model.parameters():
        parameter.data.normal_(1 if parameter.ndim == 1 else 0, 0.3)
    return model


def assert_same_logits(folder, theirs):
    import torch

    model = hf.load(folder, quiet=True)
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens(model.cfg), dtype=torch.long), use_cache=False).logits.numpy()
    results = ours(model, gradients=False, greedy=False)
    assert differences({"logits": results["logits"]}, {"logits": logits})["logits"] < 1e-4


def test_a_wrapped_model_as_saved_and_as_released(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path / "saved")
    config = read_json(tmp_path / "saved" / "config.json")
    assert config["model_type"] == "kimi_k25" and config["text_config"]["model_type"] == "deepseek_v3"
    assert_same_logits(tmp_path / "saved", wrapped)
    folder = write_folder(tmp_path / "released", GRID["Kimi K2.5"])
    theirs, report = type(wrapped).from_pretrained(folder, config=wrapped.config, output_loading_info=True, **EAGER)
    assert not [name for name in report["missing_keys"] if "language_model" in name or "lm_head" in name]
    assert_same_logits(folder, theirs.eval())
