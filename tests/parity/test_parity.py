"""Parity with transformers over the whole grid, from folders made on the spot. `make parity` runs these."""

import json
from functools import cache

import numpy as np
import pytest
from released import GRID, differences, golden, ours, probed, write_folder

from dsv3_jax import hf

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # of torch and transformers

# Of the logits' deviation, and of a gradient's root mean square: float32 sums in another order, through a few layers.
LOGITS, GRADIENTS, LOSS = 1e-4, 3e-4, 5e-6


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """(ours, theirs, folder) of a cell, made once."""
    from parity_reference import plain_folder, theirs

    @cache
    def made(name: str):
        root = tmp_path_factory.mktemp("cell")
        folder = write_folder(root / "folder", GRID[name])
        return ours(hf.load(folder)), theirs(plain_folder(root / "plain", GRID[name]), GRID[name]), folder

    return made


def assert_equal(mine, other):
    worst = differences(mine, other)
    assert worst.pop("expert_ids") == 0 and worst.pop("mtp_expert_ids", 0) == 0
    assert worst.pop("greedy", 0) == 0
    assert worst.pop("loss", 0) < LOSS and worst.pop("grad", 0) < GRADIENTS
    assert worst.pop("logits") < LOGITS and worst.pop("mtp_logits", 0) < LOGITS
    assert not worst


@pytest.mark.parametrize("name", GRID)
def test_ours_is_transformers(result, name):
    mine, other, _ = result(name)
    assert mine.keys() == other.keys()
    assert_equal(mine, other)


@pytest.mark.parametrize("name", GRID)
def test_golden_files_are_transformers(result, name):
    made, kept = probed(result(name)[1]), golden(name)
    assert made.keys() == kept.keys()
    worst = differences(made, kept)
    # Another processor or build of torch may sum in another order.
    assert all(value == 0 if "ids" in kind or kind == "greedy" else value < 1e-4 for kind, value in worst.items())


@pytest.mark.parametrize("name", ["groups", "half RoPE", "YaRN beyond the original length", "tied embeddings",
                                  "bfloat16 file", "V2, groups", "V2-Lite, greedy"])  # fmt: skip
def test_transformers_runs_what_we_save(result, name, tmp_path):
    from parity_reference import theirs

    mine, _, folder = result(name)
    hf.save(hf.load(folder), tmp_path / "saved", shard_bytes=9000)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 3
    assert_equal(mine, theirs(tmp_path / "saved", GRID[name]))


@pytest.mark.parametrize("name", ["no groups", "V2, groups", "V2-Lite, greedy"])
def test_we_run_what_transformers_saves(result, name, tmp_path):
    from parity_reference import load_theirs

    _, other, folder = result(name)
    cfg = GRID[name].cfg
    main, _ = load_theirs(folder, cfg.num_layers, 0, cfg.tie_embeddings)
    main.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "rope_theta" in config["rope_parameters"]  # the newer spelling
    assert_equal(ours(hf.load(tmp_path / "theirs")), other)


def test_torch_reads_what_we_quantize(result, tmp_path):
    """The FP8 numbers and scales, as torch knows the dtype and the safetensors package the file."""
    import torch
    from safetensors.torch import load_file

    source, saved = result("FP8 file")[2], tmp_path / "saved"
    hf.save(hf.load(source), saved, fp8=True)
    arrays = {k: v for file in saved.glob("*.safetensors") for k, v in load_file(file).items()}
    assert {k: tuple(v.shape) for k, v in arrays.items()} == {
        k: shape for k, (shape, _) in hf.tensor_table(GRID["FP8 file"].cfg, fp8=True).items()
    }
    folder = hf.reading.Folder(source)
    for name, value in arrays.items():
        if value.dtype == torch.float8_e4m3fn:
            scale = arrays[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            whole = value.float() * scale[: value.shape[0], : value.shape[1]]
            wanted = folder.read(folder.entries[name], np.dtype(np.float32))
            np.testing.assert_array_equal(whole.numpy(), wanted)
