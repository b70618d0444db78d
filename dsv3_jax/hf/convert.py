"""`dsv3 convert`: released folder → run folder, run folder → released folder, released folder → another dtype."""

import shutil
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import DataConfig, RunConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.hf import files
from dsv3_jax.hf.config_json import config_to_dict
from dsv3_jax.hf.reading import Folder, load
from dsv3_jax.hf.table import tensor_table
from dsv3_jax.hf.writing import DTYPES, SHARD_BYTES, Tensors, from_folder, write, written_as
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.training.checkpoint import RUN_FILE, TOKENIZER_FILE, Checkpoints, claim, load_model
from dsv3_jax.training.optim import AdamState
from dsv3_jax.training.step import TrainState

# Small files that go along from one released folder to another, where they are.
BESIDE = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
DType = Literal["float32", "bfloat16", "fp8"]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: Literal["run", "hf"] | None = None,
    dtype: DType | None = None,
    shard_bytes: int = SHARD_BYTES,
    mtp: bool = True,
    allow_nonfinite: bool = False,
    quiet: bool = False,
) -> str:
    """Convert a folder, either way; returns a sentence on what was made.

    Args:
        source: a run folder (its last checkpoint is taken) or a released folder.
        out: the folder to make; nothing is left of it on failure.
        to: "run" or "hf", the released format; None is what the source is not, or "hf" where a dtype is given.
        dtype: of the released folder's weights; None keeps the source's (float32 for a run, bfloat16 for FP8).
        shard_bytes, mtp, allow_nonfinite, quiet: see `save` and `load`.
    Raises: ValueError (ConfigError) as `load`, `save` and `checkpoint.load_model` do.
    """
    source, out = Path(source), Path(out)
    from_run = (source / RUN_FILE).is_file()
    if not from_run and not (source / files.CONFIG).exists():
        raise ValueError(f"{source} is neither a run (no {RUN_FILE}) nor a released folder (no {files.CONFIG})")
    to = to or ("hf" if from_run or dtype else "run")
    if to == "run" and (from_run or dtype not in (None, "float32")):
        raise ValueError(f"{source} is a run already" if from_run else f"dtype={dtype}: a run's weights are float32")
    files.check_new(out, 0)
    if to == "run":
        return _to_run(source, out, mtp, allow_nonfinite, quiet)
    if from_run:
        if not mtp:
            raise ValueError("mtp=False is for released folders: a run is written with its MTP layers")
        return _from_run(source, out, dtype, shard_bytes, allow_nonfinite, quiet)
    return _to_dtype(source, out, dtype, shard_bytes, mtp, allow_nonfinite, quiet)


def _from_run(
    source: Path, out: Path, dtype: DType | None, shard_bytes: int, allow_nonfinite: bool, quiet: bool
) -> str:
    """A run's last checkpoint as a released folder, with its tokenizer.json if it has one."""
    model, _, run, step = load_model(source)
    fp8, name = dtype == "fp8", None if dtype == "fp8" else dtype
    config, table, tensors = written_as(model, fp8, name, allow_nonfinite)
    words = tokenizer.load(run.data.tokenizer)
    beside = []
    if run.data.tokenizer != "bytes":
        file = Path(run.data.tokenizer)
        beside = [file / TOKENIZER_FILE if file.is_dir() else file]
    write(out, config | {"eos_token_id": words.eos_id}, table, tensors, shard_bytes, quiet=quiet, beside=beside)
    return f"{out}: the checkpoint of step {step}, {len(table)} tensors in Hugging Face format"


def _to_dtype(
    source: Path, out: Path, dtype: DType | None, shard_bytes: int, mtp: bool, allow_nonfinite: bool, quiet: bool
) -> str:
    """A released folder in another dtype, one tensor in memory at a time."""
    folder = Folder(source, mtp=mtp, allow_nonfinite=allow_nonfinite)
    embed, fp8 = folder.stored["model.embed_tokens.weight"].dtype.name, dtype == "fp8"
    name = next(d for d in (dtype, embed, "float32") if d in DTYPES)
    table = tensor_table(folder.cfg, fp8, dtype=name)
    config = config_to_dict(folder.cfg, fp8=fp8, dtype=name)
    config |= {key: folder.config.get(key) for key in ("bos_token_id", "eos_token_id")}
    beside = [files.inside(source, file) for file in BESIDE if (source / file).exists()]
    tensors = Tensors(from_folder(folder), table, allow_nonfinite)
    write(out, config, table, tensors, shard_bytes, quiet=quiet, beside=beside)
    return f"{out}: {len(table)} tensors in {dtype or name}, in Hugging Face format"


def _to_run(source: Path, out: Path, mtp: bool, allow_nonfinite: bool, quiet: bool) -> str:
    """A run folder at step 0 with a fresh optimizer, as `dsv3 generate` and `dsv3 eval` read it."""
    model = load(source, jnp.float32, mtp=mtp, allow_nonfinite=allow_nonfinite, quiet=quiet)
    cfg = model.cfg
    words = files.inside(source, TOKENIZER_FILE).is_file()
    name = str(out.absolute() / TOKENIZER_FILE) if words else "bytes"
    data = DataConfig(tokenizer=name, seq_len=min(256, cfg.max_positions))
    run = RunConfig(model=cfg, data=data)
    params, bias = nnx.state(model, nnx.Param), nnx.state(model, RouterBias)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), params)  # pages that nobody touched: no memory
    state = TrainState(params, bias, AdamState(zeros, zeros), jnp.zeros((), jnp.int32))
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with files.new_folder(out, nbytes) as folder:
        claim(folder, run)
        with Checkpoints(folder, run) as checkpoints:
            checkpoints.save(state, {}, wait=True)
        if words:
            shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    kind = TOKENIZER_FILE if words else "bytes, for the folder had no tokenizer.json"
    return f"{out}: a run at step 0, its tokenizer {kind}"
