"""A broken released folder gives a sentence naming file and tensor; failures leave no files."""

import json
import os
import shutil
from filecmp import cmpfiles
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from models import INDEXED, arrays_of, random_model, small
from runs import assert_bitwise, by_command, refused, save_run, write_lines, write_text
from safetensors.numpy import load_file, save_file

from dsv3_jax import hf
from dsv3_jax.config import DataConfig, RunConfig, replace
from dsv3_jax.data import tokenizer
from dsv3_jax.data.source import open_source
from dsv3_jax.hf import tensor_files
from dsv3_jax.hf.places import find
from dsv3_jax.hf.tensor_files import INDEX, write_json
from dsv3_jax.runs.checkpoint import load_run
from dsv3_jax.runs.loop import fit
from dsv3_jax.runs.open_model import load_text

CFG = small(num_layers=2, num_experts=4, num_groups=2, vocab_size=260, mtp_depth=1)
SHARD = "model-00002-of-00003.safetensors"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
UP = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "folder"
    hf.save(model, folder, shard_bytes=42_000)
    for path in folder.glob("*.safetensors"):
        assert sum(array.nbytes for array in load_file(path).values()) <= 42_000
    (folder / "tokenizer.json").write_text(tokenizer.byte_tokenizer_json())
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "folder"))


def rewritten(start, change=None):
    """Damage: one file of all tensors. Those whose names start so are changed, or left out."""

    def damage(folder: Path):
        stored = tensor_files.open_folder(folder)[1]
        arrays = {name: np.array(tensor_files.read_tensor(stored[name])) for name in stored}
        for name in [name for name in arrays if name.startswith(start)]:
            array = arrays.pop(name)
            if change is not None:
                arrays[name] = change(array)
        for path in folder.glob("model*"):
            path.unlink()
        save_file(arrays, folder / tensor_files.SINGLE)

    return damage


def with_nan(x):
    x.reshape(-1)[3] = np.nan
    return x


def link_out(folder):
    (folder / SHARD).rename(folder.parent / "outside.safetensors")
    (folder / SHARD).symlink_to(folder.parent / "outside.safetensors")


COPY = "model.layers.2.embed_tokens.weight"  # of the MTP layer
FP8 = ml_dtypes.float8_e4m3fn
BAD = [  # damage to the folder, parts of the error
    (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    (lambda f: (f / SHARD).unlink(), ["has no " + SHARD]),
    (lambda f: write_json(f / INDEX, {"weight_map": {UP: "../x"}}), ["file '../x'"]),
    (link_out, [SHARD + " is a link out of its folder"]),
    (lambda f: os.truncate(f / SHARD, 9000), [SHARD, "is damaged"]),
    (rewritten(UP), [UP + " is missing", "1 tensors"]),
    (rewritten(UP, lambda x: x[:2, :3].copy()), [UP + " in model", "[2, 3]"]),
    (rewritten(O_PROJ, lambda x: x.astype(FP8)), [O_PROJ + "_scale_inv is missing"]),
    (rewritten(UP, with_nan), ["model.safetensors holds 1 NaN or Inf in " + UP]),
    (rewritten(COPY, lambda x: x + 1), [COPY + " that differs from model.embed_tokens.weight"]),
]


@pytest.mark.parametrize("damage, expected", BAD, ids=[parts[0] for _, parts in BAD])
def test_an_error_is_one_sentence_with_file_and_tensor(folder, damage, expected):
    damage(folder)
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    text = str(error.value)
    assert str(folder) in text and "\n" not in text
    assert all(part in text for part in expected), text
    with pytest.raises(ValueError):
        hf.convert(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_missing_mtp_layers_are_left_out_with_a_line(folder, capfd):
    rewritten("model.layers.2.")(folder)
    assert hf.load(folder).cfg.mtp_depth == 0
    assert "names 1 MTP layers, and the files have none" in capfd.readouterr().err


def test_allow_nonfinite_accepts_nan(folder):
    rewritten(UP, with_nan)(folder)
    out = folder.parent / "out"
    loaded = hf.load(folder, allow_nonfinite=True)
    assert np.isnan(np.asarray(loaded.sparse.moe.experts.w_up[...])).sum() == 1
    with refused(f"{UP} holds NaN or Inf"):
        hf.save(loaded, out)
    assert list(folder.parent.iterdir()) == [folder]
    hf.save(loaded, out, allow_nonfinite=True)


def test_saving_needs_a_new_folder_and_room(model, tmp_path, monkeypatch):
    (tmp_path / "taken").touch()
    with refused("taken exists"):
        hf.save(model, tmp_path / "taken")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with refused(f"{tmp_path} has no room for 0 MB: 1 MB are free"):
        hf.save(model, tmp_path / "more")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


# the command


def test_convert_there_and_back(good, model, tmp_path):
    code, said, _ = by_command("convert", good, tmp_path / "run")
    assert code == 0 and "a run at step 0, its tokenizer tokenizer.json" in said
    loaded, run, step = load_run(tmp_path / "run")
    assert step == 0 and run.model == replace(CFG, balance=run.model.balance, init_std=CFG.init_std)
    assert_bitwise(arrays_of(loaded), arrays_of(model))
    text = replace(run.data, paths=(write_text(tmp_path / "text"),), val_fraction=0.3)
    source = open_source(text, tokenizer.load("bytes"))
    with refused("holds a converted model, which has read no text: train in another folder"):
        fit(run, tmp_path / "run", source=source)
    assert "checkpoint of step 0" in hf.convert(tmp_path / "run", tmp_path / "back")
    assert_bitwise(arrays_of(hf.load(tmp_path / "back")), arrays_of(model))

    # Its card says what the model is, and nothing of this machine.
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"{CFG.experts_per_token} of {CFG.num_experts} experts a token" in card
    assert 'from_pretrained("back")' in card and 'ds.load_model("back")' in card
    for part in ("0 of 1,000 steps", "It was not measured", "None is stated"):
        assert part in card
    assert "{" not in card and str(tmp_path) not in card

    row = {"step": 0, "val_loss": 2.5, "val_bits_per_byte": 1.25}
    late = {"step": 9, "val_loss": 2.0}  # of a later step than the checkpoint
    write_lines(tmp_path / "run" / "metrics.jsonl", [row, late])
    hf.convert(tmp_path / "run", tmp_path / "measured")
    card = (tmp_path / "measured" / "README.md").read_text()
    assert "nats a token | 2.5000 |" in card and "held-out text | 1.2500 |" in card


def test_convert_between_dtypes(good, tmp_path):
    """float32 → FP8 → float32; FP8 → FP8 writes the same bytes."""
    hf.convert(good, tmp_path / "fp8", dtype="fp8")
    hf.convert(tmp_path / "fp8", tmp_path / "float32", dtype="float32")
    hf.convert(tmp_path / "fp8", tmp_path / "again", dtype="fp8")
    assert "quantization_config" not in (tmp_path / "float32" / "config.json").read_text()
    assert_bitwise(*(arrays_of(hf.load(tmp_path / name)) for name in ("fp8", "float32")))
    names = [path.name for path in (tmp_path / "fp8").iterdir()]
    assert cmpfiles(tmp_path / "fp8", tmp_path / "again", names, shallow=False)[0] == names


def test_a_setting_that_a_released_folder_cannot_hold_is_named(tmp_path, capsys):
    cfg = small(num_layers=1, vocab_size=260, **INDEXED | {"index_dim": 32})
    rounding = replace(cfg, index_precision="fp8")
    for name, model in (("plain", cfg), ("rounding", rounding)):
        hf.save(random_model(model), tmp_path / name)
    said = "index_precision='fp8' is lost, since config.json has no key for it"
    assert capsys.readouterr().err.count(said) == 1
    save_run(tmp_path / "run", RunConfig(rounding, data=DataConfig(seq_len=8)))
    assert said in hf.convert(tmp_path / "run", tmp_path / "back")


def test_convert_refuses_what_it_cannot_do(good, tmp_path):
    with refused("step=3 is for runs"):
        hf.convert(good, tmp_path / "out", step=3)
    (tmp_path / "run.json").write_text("{}")
    for name, value in (("mtp", False), ("allow_unknown_keys", True)):
        with refused(f"{name}={value} is"):
            hf.convert(tmp_path, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


# places

COMMIT = "0123456789abcdef" * 2 + "01234567"


def test_a_hub_cache_is_read_by_path_and_by_id(good, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--deep--small"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(good.iterdir()):
        (repo / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    for module in ("constants", "_snapshot_download.constants"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(tmp_path / "hub"))

    assert_bitwise(*(arrays_of(hf.load(place)) for place in ("deep/small", good)))
    for place in (snapshot, "deep/small", "deep/small@main"):
        assert load_text(place).template is None
    with refused("'deep/small@v2' is no folder, .* hf download deep/small --revision v2$"):
        hf.load("deep/small@v2")
    monkeypatch.chdir(repo.parent)
    assert find(f"{repo.name}/none") == Path(repo.name, "none")  # a path with a typing error


@pytest.mark.parametrize("where", ["wrapper", "text_config"])
def test_a_wrappers_ids_and_dtype_stay_wherever_they_are(folder, tmp_path, where):
    """As a run that is written back, and in another dtype."""
    config = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 5, "eos_token_id": [256, 7]}
    inner = {k: v for k, v in config.items() if k not in {*ids, "torch_dtype"}}
    outer = {"model_type": "kimi_k25", "text_config": inner}
    (outer if where == "wrapper" else inner).update(ids | {"dtype": "bfloat16"})
    tensor_files.write_json(folder / "config.json", outer)
    hf.convert(folder, tmp_path / "run")
    hf.convert(tmp_path / "run", tmp_path / "back")
    hf.convert(folder, tmp_path / "half", dtype="bfloat16")
    for name in ("back", "half"):
        found = json.loads((tmp_path / name / "config.json").read_text())
        assert ids | {"torch_dtype": "bfloat16"} == {k: found[k] for k in (*ids, "torch_dtype")}
    assert load_text(folder).stop_ids == load_text(tmp_path / "run").stop_ids == (256, 7)
