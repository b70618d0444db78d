"""Tiny released folders and our model's results on them, for the comparison with transformers.

Every number of a folder comes from raw bits of a seeded generator, which NumPy keeps the same in
all versions. The golden files of transformers' results are therefore valid for folders that any
machine writes.
"""

import json
import math
import zlib
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from dsv3_jax import hf
from dsv3_jax.config import Balance, ModelConfig
from dsv3_jax.decoding.generate import generate
from dsv3_jax.hf.tensor_files import CONFIG, SINGLE, write_json
from dsv3_jax.hf.tensor_names import entries
from dsv3_jax.model.transformer import abstract
from dsv3_jax.training.loss import compute_loss

BATCH, LENGTH, NEW = 2, 24, 6
MTP_WEIGHT = 0.3
GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True, eq=False)
class Cell:
    """A folder of the grid: its name and its config.json, as it is released."""

    name: str
    config: dict

    @cached_property
    def cfg(self) -> ModelConfig:
        return hf.config_from_dict(self.config)

    @property
    def file(self) -> str:
        """The dtype of the weights' file."""
        fp8 = self.config.get("quantization_config", {}).get("quant_method") == "fp8"
        return "fp8" if fp8 else self.config.get("text_config", self.config)["torch_dtype"]


FOLDERS = json.loads((GOLDEN / "folders.json").read_text())
GRID = {name: Cell(name, config) for name, config in FOLDERS.items()}
INT4 = GRID["Kimi K2-Thinking"].config["quantization_config"]
# numbers of a weight with one scale
_INT4_GROUP = INT4["config_groups"]["group_0"]["weights"]["group_size"]


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw float64 numbers, uniform, of mean 0 and deviation 1; a name always gives the same."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return (((raw >> np.uint64(11)) / 2.0**53 - 0.5) * 12**0.5).reshape(shape)


def tensors(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Make float32 tensors by released name: scales far from 1, signed biases, uneven gates."""
    arrays = {}
    original = {e.name: e.copy_of or e.name for e in entries(cfg)}
    for name, (shape, _) in hf.tensor_table(cfg).items():
        value = noise(original[name], shape)
        if name.endswith("norm.weight"):
            value = 1 + 0.3 * value
        elif name.endswith("correction_bias"):
            value = 0.2 * value
        else:
            value = 1.2 * value / shape[-1] ** 0.5
        arrays[name] = value.astype(np.float32)
    return arrays


def quantized(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize to FP8 with scales of 24 bits, block by block, without the library."""
    numbers = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn)
    scales = np.zeros([-(-n // 128) for n in weight.shape], np.float32)
    for i, j in np.ndindex(*scales.shape):
        block = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        scales[i, j] = np.abs(weight[block]).max() / 448
        numbers[block] = (weight[block] / scales[i, j]).astype(numbers.dtype)
    return numbers, scales


def dequantized(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Dequantize FP8 numbers, independent of the library."""
    expanded = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)
    return numbers.astype(np.float32) * expanded[: numbers.shape[0], : numbers.shape[1]]


_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)  # of the eight numbers of a word


def packed_int4(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Quantize a weight to 4 bits in groups of a row, by suffix of the tensor's name."""
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, _INT4_GROUP)
    scales = (np.abs(grouped).max(-1) / 7).astype(ml_dtypes.bfloat16)
    numbers = np.clip(np.rint(grouped / scales.astype(np.float32)[..., None]), -8, 7)
    numbers = numbers.reshape(rows, columns) + 8
    words = np.pad(numbers.astype(np.uint32), ((0, 0), (0, -columns % 8))).reshape(rows, -1, 8)
    packed = np.bitwise_or.reduce(words << _SHIFTS, axis=-1)
    shape = np.array(weight.shape, np.int32)
    return {"_packed": packed.view(np.int32), "_scale": scales, "_shape": shape}


def without_int4(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replace weights of 4 bits by float32."""
    plain = {k: v for k, v in arrays.items() if not k.endswith(("_packed", "_scale", "_shape"))}
    for name in (k.removesuffix("_packed") for k in arrays if k.endswith("_packed")):
        packed = arrays[name + "_packed"].view(np.uint32)
        scales = arrays[name + "_scale"].astype(np.float32)
        rows, columns = arrays[name + "_shape"]
        numbers = (packed[..., None] >> _SHIFTS & 15).astype(np.float32).reshape(rows, -1)
        numbers = numbers[:, :columns] - 8
        plain[name] = numbers * np.repeat(scales, _INT4_GROUP, axis=1)
    return plain


@cache
def stored(cell: Cell) -> dict[str, np.ndarray]:
    """Make the tensors of a cell's file in its dtype, by DeepSeek's names."""
    arrays = {}
    linear = {e.name for e in entries(cell.cfg) if e.quantized and cell.file == "fp8"}
    dtype = {"float32": np.float32, "float16": np.float16}.get(cell.file, ml_dtypes.bfloat16)
    kimi = cell.name == "Kimi K2-Thinking"
    for name, value in tensors(cell.cfg).items():
        if kimi and ".experts." in name:
            arrays |= {name + suffix: part for suffix, part in packed_int4(value).items()}
        elif name in linear:
            arrays[name], arrays[name + "_scale_inv"] = quantized(value)
        else:
            kept = kimi or "correction_bias" in name
            arrays[name] = value if kept else value.astype(dtype)
    return arrays


def as_labelled(cell: Cell) -> dict[str, np.ndarray]:
    """The tensors of a cell's file as its label releases them: other names, and some unread."""
    arrays, cfg = dict(stored(cell)), cell.cfg
    if cell.name == "Moonlight":
        powers = np.arange(0, cfg.rope_head_dim, 2) / cfg.rope_head_dim
        inv_freq = (1 / cfg.rope_theta**powers).astype(np.float32)
        for layer in range(cfg.num_layers):
            arrays[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inv_freq.copy()
    if cell.name == "Kimi K2.5":
        arrays = {f"language_model.{name}": value for name, value in arrays.items()}
        ones = np.ones((2, 2), np.float32)
        arrays["vision_tower.patch.weight"] = arrays["mm_projector.weight"] = ones
    return arrays


def write_folder(folder: Path, cell: Cell) -> Path:
    """Write a cell's folder: config.json and one safetensors file."""
    folder.mkdir(parents=True)
    write_json(folder / CONFIG, cell.config)
    save_file(as_labelled(cell), folder / SINGLE, metadata={"format": "pt"})
    return folder


def tokens(cfg: ModelConfig) -> np.ndarray:
    """Draw the grid's tokens: int32 [BATCH, LENGTH]."""
    raw = np.random.PCG64(7).random_raw(BATCH * LENGTH)
    return (raw % np.uint64(cfg.vocab_size)).astype(np.int32).reshape(BATCH, LENGTH)


@partial(jax.jit, static_argnums=0)
def _outputs(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    out = model(batch["tokens"])
    none = jnp.zeros((0, BATCH, LENGTH, 1), jnp.int32)  # of a model without sparse layers
    ids, heads = out.routing.expert_ids if out.routing else none, out.mtp_routing
    return out.logits, out.mtp_logits, ids, [head.expert_ids for head in heads]


@partial(jax.jit, static_argnums=0)
def _gradients(graphdef, params, rest, batch):
    def total(p):
        return compute_loss(nnx.merge(graphdef, p, rest), batch, MTP_WEIGHT).total

    return jax.value_and_grad(total)(params)


def ours(model, *, gradients: bool = True, greedy: bool = True) -> dict[str, np.ndarray]:
    """Compute our results on the grid's tokens, by the names of `parity_reference.theirs`."""
    # Without balance losses, which config.json cannot express.
    cfg = replace(model.cfg, balance=Balance(0.0, 0.0, 0.0))
    model = nnx.merge(nnx.split(abstract(cfg, model.execution, model.kernels))[0], nnx.state(model))
    one = jnp.ones((BATCH, LENGTH), jnp.int32)
    positions = jnp.cumsum(one, axis=1) - 1
    batch = {"tokens": jnp.asarray(tokens(cfg)), "segment_ids": one, "positions": positions}
    logits, mtp, ids, mtp_ids = jax.tree.map(np.asarray, _outputs(*nnx.split(model), batch))
    results = {"logits": logits, "expert_ids": np.sort(ids, axis=-1)}
    for k in range(model.cfg.mtp_depth):
        results |= {f"mtp_logits.{k}": mtp[k], f"mtp_expert_ids.{k}": np.sort(mtp_ids[k], axis=-1)}
    if greedy:
        greedy_ids = generate(model, tokens(model.cfg)[:, :8].tolist(), NEW).tokens
        results["greedy"] = np.array(greedy_ids, np.int32)
    if gradients:
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        loss, grads = _gradients(graphdef, params, rest, batch)
        results["loss"] = np.asarray(loss)
        results |= {f"grad.{k}": v for k, v in released(model.cfg, grads).items()}
    return results


def released(cfg: ModelConfig, params: nnx.State) -> dict[str, np.ndarray]:
    """Convert arrays of our parameters' shapes to released names and layouts, without the bias.

    Copies are left out.
    """
    flat = {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(params)}
    return {
        e.name: e.join([flat[s.path][s.indices] for s in e.slices])
        for e in entries(cfg)
        if not e.copy_of and not e.always_float32
    }


def probed(results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replace each gradient by its norm and its product with a fixed vector of deviation 1."""
    grads = {k: v for k, v in results.items() if k.startswith("grad.")}
    small = {k: v for k, v in results.items() if k not in grads}
    if grads:
        wide = [(k, v.astype(np.float64)) for k, v in sorted(grads.items())]
        pairs = [(np.linalg.norm(v), (v * noise(k, v.shape)).sum()) for k, v in wide]
        small["grads"] = np.array(pairs, np.float64)
    return small


def differences(
    results: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> dict[str, float]:
    """Measure the largest difference by kind of result, over the names that both have.

    Logits are relative to the logits' standard deviation. Gradients are relative to the parameter's
    root mean square, and probes to their norm. Ids and greedy tokens are counted.
    """
    worst: dict[str, float] = {}
    for name in results.keys() & reference.keys():
        a, b, kind = results[name], reference[name], name.split(".")[0]
        if kind in ("expert_ids", "mtp_expert_ids", "greedy"):
            assert a.shape == b.shape, name
            value = float((a != b).sum())
        elif kind == "grads":
            value = float((np.abs(a - b).max(axis=1) / np.where(b[:, 0] > 0, b[:, 0], 1)).max())
        else:
            a, b = a.astype(np.float64), b.astype(np.float64)
            assert a.shape == b.shape, name
            size = {"loss": 1.0, "grad": np.sqrt((b * b).mean())}.get(kind, b.std())
            value = float(np.abs(a - b).max() / size) if size else float(np.abs(a).max())
        assert math.isfinite(value), name  # max() would drop a NaN
        worst[kind] = max(worst.get(kind, 0.0), value)
    return worst


# The largest that float32 sums in a different order give over a few layers.
LIMITS = {"logits": 1e-4, "mtp_logits": 1e-4, "grads": 1e-4, "grad": 3e-4, "loss": 5e-6}


def assert_equal(results: dict, reference: dict) -> dict[str, float]:
    """Values are as near as `LIMITS`, and ids are equal. Returns: `differences`."""
    found = differences(results, reference)
    over = {kind: value for kind, value in found.items() if not value <= LIMITS.get(kind, 0)}
    assert not over
    return found


def golden(name: str) -> dict[str, np.ndarray]:
    """Read transformers' results for a cell."""
    with np.load(GOLDEN / (file_name(name) + ".npz"), allow_pickle=False) as file:
        return dict(file)


def file_name(name: str) -> str:
    return name.lower().replace(",", "").replace(" ", "_")
