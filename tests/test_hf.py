"""Released folders: our model computes what transformers does; loading and saving are inverse.

The golden files hold transformers' results, written by tests/parity/parity_reference.py. Nothing
here needs torch.
"""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from models import arrays_of, small
from released import GRID, assert_equal, golden, ours, probed, stored, without_int4, write_folder
from runs import assert_bitwise, refused
from safetensors.numpy import load_file, save_file

from dsv3_jax import hf, reference
from dsv3_jax.hf.released_folder import ReleasedFolder
from dsv3_jax.hf.tensor_files import SINGLE, read_header, read_tensor
from dsv3_jax.mesh.sharding import make_mesh
from dsv3_jax.model.context import make_context
from dsv3_jax.model.sparse import Indexer
from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.indexer import index_choose


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("released")
    return {name: write_folder(root / str(i), cell) for i, (name, cell) in enumerate(GRID.items())}


# parity

# Cells whose gradients or greedy tokens are compared too; `make parity` compares the rest, which
# compiles for minutes.
DEEP = {"half RoPE": "gradients", "V2-Lite, greedy": "greedy"}
SHORT = {"groups", "DeepSeek-V3.2, FP8 file", "Kimi K2-Thinking"}


def marked(name):
    marks = pytest.mark.long if name in DEEP else [pytest.mark.rare] * (name not in SHORT)
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in GRID])
def test_transformers_numbers(folders, name):
    gradients, greedy = (DEEP.get(name) == what for what in ("gradients", "greedy"))
    results = probed(ours(hf.load(folders[name]), gradients=gradients, greedy=greedy))
    theirs = golden(name)
    left_out = (set() if gradients else {"grads", "loss"}) | (set() if greedy else {"greedy"})
    assert theirs.keys() - results.keys() == left_out
    assert_equal(results, theirs)


def test_an_indexer_that_rounds_chooses_as_deepseeks_own_code(x64, rng, monkeypatch):
    """By the page's scores of rounded rows. transformers does not round: it differs at near ties.

    The code's first version rotated neighbours (2i, 2i + 1); a later one rotates halves, as
    transformers does. Here is no bfloat16.
    """
    cfg = small(attention="dsa", index_heads=11, index_dim=128, index_topk=32, max_positions=512)
    cfg = replace(cfg, index_precision="fp8_ue8m0")
    positions = np.arange(100, 300, dtype=np.int32)[None]
    graphdef, state = nnx.split(Indexer(cfg, nnx.Rngs(0)))
    state = jax.tree.map(lambda a: rng.standard_normal(a.shape), state)
    x, c_q = (rng.standard_normal((1, 200, width)) for width in (cfg.dim, cfg.q_latent_dim))
    indexer = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))
    ctx = make_context(cfg, jnp.asarray(positions))
    rows = jax.jit(indexer)(jnp.asarray(x), jnp.asarray(c_q), ctx)
    keys, last = Stored(rows["index_key"].swapaxes(1, 2), None), jnp.asarray(positions - 100)
    ids = index_choose(rows["index_query"], rows["index_weight"][:, :, 0], keys, last, k=32)

    rotate = reference.rotate
    monkeypatch.setattr(reference, "rotate", lambda *of: oracles.rounded(rotate(*of), cfg))
    monkeypatch.setattr(reference, "rms_norm", lambda *_: c_q)
    page = reference.Context(cfg, positions, np.ones((1, 200), int))
    params = {"indexer": nnx.to_pure_dict(state), "w_dq": np.zeros((cfg.dim, 1)), "q_norm": None}
    chosen = reference.choose(page, params, x)[0]
    expected = [np.flatnonzero(row).tolist() for row in chosen]
    assert [sorted(s for s in row if s >= 0) for row in ids[0].tolist()] == expected


# both ways


@pytest.mark.parametrize("name", GRID)
def test_a_folder_survives_loading_and_saving_bitwise(folders, name, tmp_path):
    file = GRID[name].file
    dtype = "bfloat16" if file == "bfloat16" else None
    hf.save(hf.load(folders[name]), tmp_path / "out", file == "fp8", dtype=dtype)
    expected = without_int4(stored(GRID[name]))
    if file == "float16":
        expected = {name: value.astype(np.float32) for name, value in expected.items()}
    header = read_header(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert header.keys() == expected.keys()
    for key, tensor in header.items():
        assert tensor.start % tensor.dtype.itemsize == 0  # torch maps aligned tensors only
        assert (tensor.dtype, tensor.shape) == (expected[key].dtype, expected[key].shape), key
        assert read_tensor(tensor).tobytes() == expected[key].tobytes(), key


def test_a_wrapped_model_is_read_by_the_names_that_transformers_saves(folders, tmp_path):
    folder, saved = folders["Kimi K2.5"], tmp_path / "saved"
    shutil.copytree(folder, saved)
    arrays = load_file(folder / SINGLE)
    renamed = {name.replace(".layers.", ".blocks."): a for name, a in arrays.items()}
    save_file(renamed, saved / SINGLE)
    assert_bitwise(*(arrays_of(hf.load(place)) for place in (folder, saved)))


def test_a_mesh_changes_no_number_and_each_tensor_is_read_once(folders, tmp_path, monkeypatch):
    names, read = [], ReleasedFolder.read

    def noted(self, entry, dtype):
        names.append(entry.name)
        return read(self, entry, dtype)

    monkeypatch.setattr(ReleasedFolder, "read", noted)
    mesh = make_mesh(data=2, expert=2, tensor=2)
    folder = ReleasedFolder(folders["groups"])
    model = hf.loading.load_weights(folder, mesh=mesh, quiet=True, fsdp=True)
    own = [name for name, entry in folder.entries.items() if entry.copy_of is None]
    assert sorted(names) == sorted(own)
    w_gate = model.sparse.moe.experts.w_gate[...]  # along "expert", and by FSDP along "data"
    assert w_gate.addressable_shards[0].data.shape[1] == folder.cfg.num_experts // 4
    hf.save(model, tmp_path / "out", quiet=True)
    alone = arrays_of(hf.load(folders["groups"], quiet=True))
    for other in (model, hf.load(tmp_path / "out", quiet=True)):
        assert_bitwise(arrays_of(other), alone)

    # As a process that has the second device of "expert": experts of other devices are not read.
    names.clear()

    def mine(where, shape):
        by_device = where.devices_indices_map(shape)
        return {device: by_device[device] for device in mesh.devices[:, 1].flat}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", mine)
    monkeypatch.setattr(hf.loading.Parts, "whole", lambda parts: parts)
    hf.loading.load_weights(folder, mesh=mesh, quiet=True)
    experts = {int(n.split(".experts.")[1].split(".")[0]) for n in names if ".experts." in n}
    assert experts == set(range(folder.cfg.num_experts // 2, folder.cfg.num_experts))


def test_bfloat16_parameters(folders):
    model, wide = (hf.load(folders["bfloat16 file"], dtype=d) for d in (jnp.bfloat16, jnp.float32))
    assert model.execution.compute_dtype == "bfloat16" and model.embed[...].dtype == jnp.bfloat16
    assert model.sparse.moe.w_router[...].dtype == model.sparse.moe.bias[...].dtype == jnp.float32
    as_float32 = jax.tree.map(lambda a: np.asarray(a, np.float32), arrays_of(model))
    assert_bitwise(as_float32, jax.tree.map(np.asarray, arrays_of(wide)))
    with refused("dtype=float16"):
        hf.load(folders["bfloat16 file"], dtype=jnp.float16)


def test_without_mtp(folders):
    full, short = arrays_of(hf.load(folders["groups"])), hf.load(folders["groups"], mtp=False)
    assert short.cfg.mtp_depth == 0 and len(short.mtp) == 0
    assert_bitwise({k: v for k, v in full.items() if k != "mtp"}, arrays_of(short))
