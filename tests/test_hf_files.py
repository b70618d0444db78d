"""A broken released folder gives one sentence that names file and tensor; a failed conversion leaves no files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flax import nnx
from models import random_model, small
from released import hand_written
from runs import assert_bitwise, environment

from dsv3_jax import hf
from dsv3_jax.config import replace
from dsv3_jax.hf import files
from dsv3_jax.hf.open_model import load_text
from dsv3_jax.training.checkpoint import load_run

CFG = small(num_layers=2, num_experts=4, num_groups=2, groups_per_token=2, vocab_size=260, mtp_depth=1)
SHARD = "model-00002-of-00003.safetensors"
LAYER = "model.layers.1."
O_PROJ, ROUTER, UP = (LAYER + n for n in ("self_attn.o_proj.weight", "mlp.gate.weight", "mlp.experts.2.up_proj.weight"))


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    """A good folder of three shards."""
    folder = tmp_path_factory.mktemp("good") / "folder"
    hf.save(model, folder, shard_bytes=42_000)
    edit_json(folder / files.CONFIG, set_to("eos_token_id", 256))  # of bytes
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "folder"))


def edit_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_header(path: Path, change) -> None:
    """Change a header but not the data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


def edit_tensors(folder: Path, change) -> None:
    """Change the tensors and write all of them into one file."""
    _, stored = files.open_folder(folder)
    read = files.TensorReader()
    arrays = {name: np.array(read(tensor)) for name, tensor in stored.items()}
    change(arrays)
    for path in folder.glob("model*"):
        path.unlink()
    hand_written(folder / files.SINGLE, arrays)


def poison(value):
    def change(arrays):
        arrays[UP].reshape(-1)[3] = value

    return change


def without(name):
    return lambda arrays: arrays.pop(name)


def set_to(name, value):
    return lambda values: values.__setitem__(name, value)


def pack(name, scales=None):
    """Replace a weight by one of 4 bits, of a wrong shape."""

    def change(arrays):
        if name in arrays:
            del arrays[name]
            arrays[name + "_packed"] = np.zeros((2, 1), np.int32)
            if scales is not None:
                arrays[name + "_scale"] = scales

    return change


def some_shard(folder: Path) -> Path:
    return folder / SHARD


def first_name(header) -> str:
    return next(name for name in header if name != "__metadata__")


def misdescribe(key, value):
    return lambda header: header[first_name(header)].__setitem__(key, value)


def overlap(header):
    """Give a tensor the bytes of another one of its size."""
    sizes: dict[tuple, str] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            other = sizes.setdefault(tuple(entry["shape"]), name)
            if other != name:
                entry["data_offsets"] = header[other]["data_offsets"]
                return


def name_twice(folder):
    """The second has the first one's bytes and another dtype: safetensors would take it in silence."""
    raw = some_shard(folder).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = first_name(header)
    again = json.dumps({name: header[name] | {"dtype": "I32"}})
    new = (json.dumps(header)[:-1] + "," + again[1:]).encode()
    some_shard(folder).write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


def index(folder):
    return folder / files.INDEX


def link_out(folder):
    outside = folder.parent / "outside.safetensors"
    some_shard(folder).rename(outside)
    some_shard(folder).symlink_to(outside)


def fp8_without_scale(folder):
    def change(arrays):
        arrays[O_PROJ] = arrays[O_PROJ].astype(files.STORED_DTYPES["F8_E4M3"])

    edit_tensors(folder, change)


# name → (damage to the folder, parts of the error)
BAD = {
    "no folder": (shutil.rmtree, ["is not a folder"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json holds a list"]),
    "config has a key twice": (lambda f: (f / "config.json").write_text('{"a":1,"a":2}'), ["key 'a'"]),
    "scoring": (lambda f: edit_json(f / "config.json", set_to("scoring_func", "x")), ["config.json: scoring_func='x'"]),
    "no weights": (lambda f: index(f).unlink(), ["has neither model.safetensors nor model.safetensors.index.json"]),
    "no shard": (lambda f: some_shard(f).unlink(), ["has no " + SHARD]),
    "index without a map": (lambda f: index(f).write_text("{}"), ["has no weight_map"]),
    "index names a path": (
        lambda f: edit_json(index(f), lambda v: v["weight_map"].__setitem__(UP, "../x.safetensors")),
        ["file '../x.safetensors'"],
    ),
    "index names an absent tensor": (
        lambda f: edit_json(index(f), lambda v: v["weight_map"].__setitem__("model.ghost", SHARD)),
        [SHARD + " does not hold model.ghost"],
    ),
    "link out of the folder": (link_out, [SHARD + " is a link out of its folder"]),
    "truncated": (lambda f: some_shard(f).write_bytes(some_shard(f).read_bytes()[:-5]), [SHARD, "is damaged"]),
    "empty file": (lambda f: some_shard(f).write_bytes(b""), [SHARD, "is damaged"]),
    "longer": (lambda f: some_shard(f).write_bytes(some_shard(f).read_bytes() + b"12"), [SHARD, "is damaged"]),
    "unsupported dtype": (lambda f: edit_header(some_shard(f), misdescribe("dtype", "C64")), [SHARD, "is damaged"]),
    "overlap": (lambda f: edit_header(some_shard(f), overlap), [SHARD, "is damaged"]),
    "a name twice": (name_twice, [SHARD, "is damaged", "occurs twice"]),
    "missing": (lambda f: edit_tensors(f, without(UP)), [UP + " is missing", "1 tensors"]),
    "extra": (lambda f: edit_tensors(f, set_to("model.more", np.zeros(2, np.float32))), ["model.more in model.safe"]),
    "misshapen": (lambda f: edit_tensors(f, set_to(UP, np.zeros((2, 3), np.float32))), [UP + " in model", "[2, 3]"]),
    "integers": (lambda f: edit_tensors(f, set_to(ROUTER, np.zeros((4, 16), np.int32))), [ROUTER, "int32 [4, 16]"]),
    "FP8 without a scale": (fp8_without_scale, [O_PROJ + "_scale_inv is missing"]),
    "other frequencies": (
        lambda f: edit_tensors(f, set_to(LAYER + "self_attn.rotary_emb.inv_freq", np.ones(2, np.float32))),
        ["model.safetensors holds", "rotary_emb.inv_freq, which is not what rope_theta=10000.0 gives"],
    ),
    "4 bits without a scale": (lambda f: edit_tensors(f, pack(UP)), [UP + "_scale is missing"]),
    "4 bits of another shape": (
        lambda f: edit_tensors(f, pack(UP, np.ones((3, 3), np.float32))),
        [UP + "_packed in", "int32", UP + "_scale in", "not scales of groups of"],
    ),
    "4 bits of a norm": (lambda f: edit_tensors(f, pack(ROUTER)), [ROUTER + " in", "packed in 4 bits"]),
    "NaN": (lambda f: edit_tensors(f, poison(np.nan)), ["model.safetensors holds 1 NaN or Inf in " + UP]),
    "another embedding in the MTP layer": (
        lambda f: edit_tensors(f, set_to("model.layers.2.embed_tokens.weight", np.ones((260, 16), np.float32))),
        ["model.layers.2.embed_tokens.weight that differs from model.embed_tokens.weight"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_an_error_is_one_sentence_with_file_and_tensor(folder, name):
    damage, expected = BAD[name]
    damage(folder)
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    text = str(error.value)
    assert str(folder) in text and "\n" not in text and len(text) < 500
    assert all(part in text for part in expected), text
    out = folder.parent / "out"
    for to in ("hf", "run"):
        with pytest.raises(ValueError):
            hf.convert(folder, out, to=to)
        assert [p.name for p in folder.parent.iterdir() if "out" in p.name and "outside" not in p.name] == []


def test_wrong_tensors_are_listed_together(folder):
    def change(arrays):
        for e in range(4):
            for w in ("gate", "up", "down"):
                del arrays[f"{LAYER}mlp.experts.{e}.{w}_proj.weight"]
        for i in range(15):
            arrays[f"model.extra.{i}"] = np.zeros(1, np.float32)
        arrays[O_PROJ] = np.zeros(1, np.float32)

    edit_tensors(folder, change)
    with pytest.raises(ValueError) as error:
        hf.load(folder)
    text = str(error.value)
    assert "28 tensors: " in text and text.endswith(" and 8 more") and text.count(";") == 19


def test_missing_mtp_layers_are_left_out_with_a_line(folder, capfd):
    edit_tensors(folder, lambda arrays: [arrays.pop(k) for k in [*arrays] if k.startswith("model.layers.2.")])
    assert hf.load(folder).cfg.mtp_depth == 0
    assert "names 1 MTP layer, and the files have none: loaded without" in capfd.readouterr().err
    assert hf.load(folder, mtp=False).cfg.mtp_depth == 0
    assert capfd.readouterr().err == ""


def test_allow_nonfinite_accepts_nan(folder):
    edit_tensors(folder, poison(np.nan))
    loaded = hf.load(folder, allow_nonfinite=True)
    assert np.isnan(np.asarray(loaded.sparse.moe.experts.w_up[...])).sum() == 1
    with pytest.raises(ValueError, match=f"{UP} holds NaN or Inf"):
        hf.save(loaded, folder.parent / "out")
    with pytest.raises(ValueError, match="which FP8 cannot"):
        hf.save(loaded, folder.parent / "out", fp8=True, allow_nonfinite=True)
    assert not (folder.parent / "out").exists() and len(list(folder.parent.iterdir())) == 1
    hf.save(loaded, folder.parent / "out", allow_nonfinite=True)


def test_saving_needs_a_new_folder_and_room(model, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes").write_text("kept")
    with pytest.raises(ValueError, match="taken exists"):
        hf.save(model, tmp_path / "taken")
    with pytest.raises(ValueError, match="absent is not a folder, so out cannot be created"):
        hf.save(model, tmp_path / "absent" / "out")
    with pytest.raises(ValueError, match="shard_bytes=0 is below 1"):
        hf.save(model, tmp_path / "out", shard_bytes=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=70 << 20))
    hf.save(model, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(ValueError, match=f"{tmp_path} has no room for 0 MB: 1 MB are free"):
        hf.save(model, tmp_path / "more")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "taken"]


def test_a_failure_half_way_leaves_no_files(model, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        hf.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_unpickled(folder):
    """A pickle in the folder is not read, also when the weights are missing."""
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    hf.load(folder)
    index(folder).unlink()
    with pytest.raises(ValueError, match="other formats are not supported"):
        hf.load(folder)


# the command


def command(root: Path, *args) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "dsv3_jax.cli", "convert", *map(str, args)]
    return subprocess.run(argv, env=environment(root), capture_output=True, text=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.getbasetemp()


def test_convert_there_and_back(root, good, model, tmp_path):
    """Released → run → released, bitwise; `load_run`, which generate and eval use, loads the run."""
    done = command(root, good, tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "") and "a run at step 0" in done.stdout
    loaded, run, step = load_run(tmp_path / "run")
    assert step == 0 and run.model == replace(CFG, balance=run.model.balance, init_std=CFG.init_std)
    assert_bitwise(nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(nnx.state(model)))
    sentence = hf.convert(tmp_path / "run", tmp_path / "back", shard_bytes=42_000)
    assert "checkpoint of step 0" in sentence
    for file in good.glob("model*"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "run"]


def test_convert_between_dtypes(good, tmp_path):
    """float32 → FP8 → bfloat16 and float32; FP8 → FP8 writes the same bytes."""
    (good / "tokenizer_config.json").write_text("{}")
    hf.convert(good, tmp_path / "fp8", dtype="fp8")
    for dtype in ("bfloat16", "float32"):
        hf.convert(tmp_path / "fp8", tmp_path / dtype, dtype=dtype)
        assert "quantization_config" not in json.loads((tmp_path / dtype / "config.json").read_text())
        assert (tmp_path / dtype / "tokenizer_config.json").read_text() == "{}"
    a, b = hf.load(tmp_path / "fp8"), hf.load(tmp_path / "float32")
    assert_bitwise(nnx.to_pure_dict(nnx.state(a)), nnx.to_pure_dict(nnx.state(b)))
    hf.convert(tmp_path / "fp8", tmp_path / "again", dtype="fp8")
    names = sorted(os.listdir(tmp_path / "fp8"))
    assert names == sorted(os.listdir(tmp_path / "again"))
    assert all((tmp_path / "fp8" / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_convert_rejects_what_it_cannot_do(good, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    for source, options, sentence in (
        (tmp_path, {}, f"{tmp_path} is neither a run"),
        (good, {"to": "run", "dtype": "fp8"}, "dtype=fp8"),
        (run, {"to": "run"}, f"to='run' .* {run}"),
        (run, {"mtp": False}, "mtp=False"),
    ):
        with pytest.raises(ValueError, match=sentence):
            hf.convert(source, tmp_path / "out", **options)
    with pytest.raises(ValueError, match=f"{good} exists"):
        hf.convert(good, good)
    shutil.rmtree(run)
    assert list(tmp_path.iterdir()) == []


# places

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def cached(good, tmp_path, monkeypatch):
    """The folder as the hub's cache holds it: a snapshot of links into blobs."""
    repo = tmp_path / "hub" / "models--deep--small"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(good.iterdir()):
        (repo / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (repo / "blobs" / "template").write_text("{{ 'other' }}")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "rag.jinja").symlink_to("../../../blobs/template")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return repo


def test_a_hub_cache_is_read_by_path_and_by_id(cached, good):
    expected = nnx.to_pure_dict(nnx.state(hf.load(good)))
    for place in (cached, cached / "snapshots" / COMMIT, "deep/small", "deep/small@main"):
        assert_bitwise(nnx.to_pure_dict(nnx.state(hf.load(place))), expected)
        assert load_text(place).templates == {"rag": "{{ 'other' }}"}


@pytest.mark.parametrize("text", ["", COMMIT + "0", "../../secret"])
def test_the_name_of_main_is_a_commit(cached, text):
    (cached / "refs" / "main").write_text(text)
    with pytest.raises(ValueError, match="refs/main' holds .* not a commit"):
        hf.load(cached)


def test_an_id_that_is_not_in_the_cache_is_one_sentence(cached):
    for place, how in (("deep/large", "deep/large"), ("deep/small@v2", "deep/small --revision v2")):
        with pytest.raises(
            ValueError, match=f"model='{place}' is no folder, and the hub's cache .* hf download {how}$"
        ):
            hf.load(place)


def test_a_template_that_is_a_link_out_of_the_repository_is_refused(cached, tmp_path):
    """It would be copied, too."""
    (tmp_path / "secret.jinja").write_text("secret")
    template = cached / "snapshots" / COMMIT / "additional_chat_templates" / "rag.jinja"
    template.unlink()
    template.symlink_to(tmp_path / "secret.jinja")
    for refused in (load_text, lambda place: hf.convert(place, tmp_path / "out")):
        with pytest.raises(ValueError, match="rag.jinja is a link out of its folder"):
            refused(cached)
    assert not (tmp_path / "out").exists()
