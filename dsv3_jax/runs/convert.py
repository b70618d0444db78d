"""`dsv3 convert`: a released folder to a run and back, another dtype, or a mixture of experts."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.chat import text_settings
from dsv3_jax.config import RunConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.data.special_tokens import end_ids, read_object
from dsv3_jax.data.tokenizer import TIKTOKEN_FILE
from dsv3_jax.hf import tensor_files
from dsv3_jax.hf.card import card_of_folder, card_of_run
from dsv3_jax.hf.config_writing import config_to_dict, left_out
from dsv3_jax.hf.families import text_config
from dsv3_jax.hf.loading import load
from dsv3_jax.hf.released_folder import ReleasedFolder
from dsv3_jax.hf.tensor_names import tensor_table
from dsv3_jax.hf.writing import DTYPES, cast, folder_tensors, released_parts, write_released
from dsv3_jax.host.files import atomic_folder, read_bytes, write_atomic
from dsv3_jax.host.mirror import fetched
from dsv3_jax.host.signals import STOP, deferred
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.model.upcycle import Upcycling, upcycle
from dsv3_jax.runs.checkpoint import Checkpoints, load_run
from dsv3_jax.runs.folder import ORIGIN, RUN_FILE, TOKENIZER_FILE, check_place, claim
from dsv3_jax.runs.open_model import (
    check_text,
    find_released,
    load_text,
    released_run,
    text_files,
)
from dsv3_jax.training.optim import AdamState
from dsv3_jax.training.state import TrainState

DType = Literal["float32", "bfloat16", "fp8"]


def convert(  # noqa: PLR0913 - what to accept, each by name
    source: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: DType | None = None,
    mtp: bool = True,
    allow_nonfinite: bool = False,
    allow_unknown_keys: bool = False,
    quiet: bool = False,
    upcycling: Upcycling | None = None,
) -> str:
    """Convert a run to a released folder, or such a folder to a run or another dtype.

    With `upcycling`, either becomes a run of a mixture of experts. A failure leaves no folder.

    Args:
        source: a run folder or a released folder.
        out: the folder to create.
        step: of a run's checkpoint. None means the last.
        dtype: of a released folder's weights. None makes a run of a released folder. A run is
            written in the dtype of the released folder that it was made of, else in its
            embedding's.
        mtp, allow_nonfinite, allow_unknown_keys, quiet: as `save` and `load`.
        upcycling: the experts of a mixture to make, see `model.upcycle`. Its run is at step 0, for
            `dsv3 train PRESET --start OUT`. It has the text of a run that it is made of.
    Returns: a sentence about the new folder.
    Raises: ValueError (ConfigError) as `load`, `save` and `checkpoint.load_run`.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plain, fp8 = Path(folder) / "plain", Path(folder) / "fp8"
        ...     ds.hf.save(ds.Transformer(cfg, rngs=nnx.Rngs(0)), plain, quiet=True)
        ...     sentence = ds.hf.convert(plain, fp8, dtype="fp8", quiet=True)
        >>> sentence.endswith("tensors in fp8, in Hugging Face format")
        True
    """
    source = fetched(source)
    out = Path(out)
    from_run = (source / RUN_FILE).is_file()
    source = source if from_run else find_released(source)

    # What has no effect is refused.
    if step is not None and not from_run:
        raise ValueError(f"step={step} is for runs, and folder={str(source)!r} is a released one")
    if from_run and not mtp:
        raise ValueError(
            "mtp=False is not supported for a run, which is written with its MTP layers; leave it "
            "out"
        )
    if upcycling is not None and dtype is not None:
        raise ValueError(
            f"dtype={dtype!r} is for released weights, and a mixture that is made is a run; "
            "leave it out"
        )
    if from_run and allow_unknown_keys:
        raise ValueError(
            f"allow_unknown_keys=True is for a released folder, and folder={str(source)!r} is a run"
        )
    tensor_files.check_new(out, 0)

    # From a run.
    if from_run and upcycling is not None:
        return _upcycle_run(source, out, step, upcycling)
    if from_run:
        return _run_to_released(source, out, step, dtype, allow_nonfinite, quiet)

    # From a released folder.
    accept: dict[str, Any] = {
        "mtp": mtp,
        "allow_nonfinite": allow_nonfinite,
        "allow_unknown_keys": allow_unknown_keys,
    }
    if dtype is None:
        check_place(out.resolve())
        model = load(source, jnp.float32, quiet=quiet, **accept)
        if upcycling is not None:
            model = upcycle(model, upcycling)
        return _released_to_run(source, out, model)
    return _released_to_dtype(ReleasedFolder(source, **accept), out, dtype, quiet)


def _run_to_released(
    source: Path,
    out: Path,
    step: int | None,
    dtype: DType | None,
    allow_nonfinite: bool,
    quiet: bool,
) -> str:
    """Convert a run's checkpoint, with its tokenizer and the other files of its text."""
    # The weights. The kernels that the run names may be of other devices.
    model, run, step = load_run(source, step=step, kernels="auto")
    origin = read_object(tensor_files.file_inside(source, ORIGIN))
    kept_dtype = origin.get("dtype", origin.get("torch_dtype"))
    fp8 = dtype == "fp8"
    name = next((d for d in (dtype, kept_dtype) if d in DTYPES), None)
    config, table, read = released_parts(model, fp8, name)

    # The ids that begin and end a text are the origin's, else the tokenizer's.
    config["eos_token_id"] = tokenizer.load(run.data.tokenizer).eos_id
    for key in ("bos_token_id", "eos_token_id"):
        if origin.get(key) is not None:
            config[key] = origin[key]
    texts = {name: read_bytes(file) for name, file in text_files(source).items()}
    if run.data.tokenizer == "bytes":
        texts[TOKENIZER_FILE] = tokenizer.byte_tokenizer_json().encode()
    written = "fp8" if fp8 else config["torch_dtype"]
    texts |= card_of_run(source, run, step, out.resolve().name, written)
    tensors = cast(read, table, allow_nonfinite=allow_nonfinite)
    write_released(out, config, table, tensors, quiet=quiet, texts=texts)

    # Say what the format has no place for.
    lost = left_out(run.model)
    sentence = (
        f"{out}: the checkpoint of step {step}, {len(table)} tensors in {written}, "
        "in Hugging Face format"
    )
    return f"{sentence}; {lost}" if lost else sentence


def _released_to_dtype(folder: ReleasedFolder, out: Path, dtype: DType, quiet: bool) -> str:
    """Convert to another dtype with one tensor in memory at a time."""
    embed = folder.stored["model.embed_tokens.weight"].dtype.name
    fp8 = dtype == "fp8"
    name = next(d for d in (dtype, embed, "float32") if d in DTYPES)
    table = tensor_table(folder.cfg, fp8, dtype=name)
    config = config_to_dict(folder.cfg, fp8=fp8, dtype=name)

    # The files of text are copied as they are, once they are found to fit the model.
    for key in ("bos_token_id", "eos_token_id"):
        end_ids(folder.path, tensor_files.CONFIG, key)  # refuses what is no id
        config[key] = text_config(folder.config).get(key)
    texts = {name: read_bytes(file) for name, file in text_files(folder.path).items()}
    texts |= card_of_folder(folder.path)
    if TOKENIZER_FILE in texts or (TIKTOKEN_FILE in texts and find_spec("tiktoken")):
        check_text(folder.path, folder.cfg, load_text(folder.path))

    # One tensor after the other.
    tensors = cast(folder_tensors(folder), table, allow_nonfinite=folder.allow_nonfinite)
    write_released(out, config, table, tensors, quiet=quiet, texts=texts)
    return f"{out}: {len(table)} tensors in {dtype}, in Hugging Face format"


def _released_to_run(source: Path, out: Path, model: Transformer) -> str:
    """Convert to a run at step 0, with the files of its text."""
    run = released_run(source, model.cfg, load_text(source))
    text_files(source)  # none is a link out of the folder

    def copy_text(folder: Path) -> None:
        keep_origin(source, folder)
        text_settings.copy_to_run(source, folder)

    run = _write_run(out, run, model, copy_text)
    return f"{out}: a run at step 0, its tokenizer {Path(run.data.tokenizer).name}"


def _upcycle_run(source: Path, out: Path, step: int | None, how: Upcycling) -> str:
    """Make a run at step 0 out of a run's checkpoint, with its text and the files of that."""
    check_place(out.resolve())
    model, run, step = load_run(source, step=step, kernels="auto", widen=True)
    made = upcycle(model, how)
    files = {name: file for name, file in text_files(source).items() if name != TOKENIZER_FILE}

    def copy_text(folder: Path) -> None:
        keep_origin(source, folder)
        for name, file in files.items():
            if not (folder / name).exists():
                write_atomic(folder / name, read_bytes(file))

    run = RunConfig(made.cfg, data=run.data, execution=run.execution)
    _write_run(out, run, made, copy_text)
    cfg = made.cfg
    return (
        f"{out}: a run at step 0, made of the checkpoint of step {step}, with "
        f"{cfg.experts_per_token} of {cfg.num_experts} experts a token"
    )


def _write_run(
    out: Path, run: RunConfig, model: Transformer, copy_text: Callable[[Path], None]
) -> RunConfig:
    """Write a run at step 0 with a new optimizer state, as other commands read it."""
    params = nnx.state(model, nnx.Param)
    bias = nnx.state(model, RouterBias)
    # numpy's zeros take no memory until they are touched
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), params)
    state = TrainState(params, bias, AdamState(zeros, zeros), jnp.zeros((), jnp.int32))
    tensor_files.check_new(out, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
    with atomic_folder(out) as folder:
        run = claim(folder, run)
        copy_text(folder)
        # Orbax writes in threads: they would go on while the folder is deleted.
        with deferred(*STOP), Checkpoints(folder, run) as checkpoints:
            checkpoints.save(state, {}, wait=True)
    return run


def keep_origin(source: Path, run: str | Path) -> None:
    """Copy a released config.json into a run made of it, which keeps its dtype and ids when saved.

    Args: source: the released folder, or a run that may have been made of one.
    Raises: ValueError when it is no JSON, or a link out of the folder.
    """
    is_run = (source / RUN_FILE).is_file()
    config = tensor_files.file_inside(source, ORIGIN if is_run else tensor_files.CONFIG)
    if config.is_file():
        tensor_files.write_json(Path(run) / ORIGIN, text_config(tensor_files.read_json(config)))
