"""A run that begins with another run's last checkpoint, and heads on another run's frozen trunk.

`start`: parameters and router biases are the other run's; optimizer, steps and data position are
new. Settings that add no parameters may differ: context length and YaRN, load balancing. MLA may
become sparse attention, whose indexers are new. With `lora`, the other run's parameters stay as
they are, and new adapters are trained.
`trunk`: everything but the multi-token heads is the other run's, and stays as it is. The heads
alone are trained.

A start is opened once: its text, the headers of its tensors and its settings are read by
`open_start` and not again. A run that has a checkpoint does not need it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import ConfigError, RunConfig, first_difference, replace, to_dict
from dsv3_jax.hf.loading import load_weights
from dsv3_jax.hf.released_folder import ReleasedFolder
from dsv3_jax.host.mirror import fetched
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.runs.checkpoint import load_run, steps_of
from dsv3_jax.runs.folder import RUN_FILE, check_registered, read_run, same_tokenizer
from dsv3_jax.runs.open_model import find_released, load_text, released_run
from dsv3_jax.training.state import Job, TrainState, init_state, split_heads

# Keys of a model that may differ from the other run's.
START_KEYS = (
    "index_topk",
    "index_precision",
    "yarn",
    "max_positions",
    "rope_theta",
    "balance",
    "capacity_factor",
    "init_std",
)
TRUNK_KEYS = ("mtp_depth", "mtp_kind", "mtp_input")
# These may differ too where a start with MLA becomes sparse attention.
INDEX_KEYS = ("attention", "index_heads", "index_dim", "index_interleaved", "index_types")


@dataclass(frozen=True)
class Start:
    """Another run, or a released model, that is open to begin with."""

    place: str  # its folder
    run: RunConfig  # its model, and what its tokens mean
    text: TextSettings  # how it reads and ends text: tokenizer, template, stops
    released: bool  # then data and execution of `run` mean nothing
    # job → (the model, sharded over its mesh; words on which checkpoint it is, as "of step 9 ").
    # Weights that train are float32.
    load: Callable[[Job], tuple[Transformer, str]]
    four_bits: bool = False  # some weights have 4 bits, so only a run that freezes them may use it


def open_start(place: str, out: str | Path | None = None) -> Start:
    """Open a run or a released model to begin with.

    Args: out: a folder to train in. If the other is gone but training in `out` has begun, the
        settings are its own.
    Raises: ValueError when there is neither, or no checkpoint yet.
    """
    try:
        if (fetched(place) / RUN_FILE).is_file():
            return open_run(place)
        return _open_released(place)
    except ValueError:
        if out is None or not (fetched(out) / RUN_FILE).is_file():
            raise
        # GRPO may still need the weights. To read them says what is wrong with the place.
        load = lambda job: open_start(place).load(job)  # noqa: E731
        return Start(str(place), read_run(fetched(out)), load_text(out), False, load)


def open_run(place: str) -> Start:
    """Open a run's folder.

    Raises: ValueError if it holds no run or no checkpoint.
    """
    folder = fetched(place)
    run = read_run(folder)
    check_registered(run, folder)
    if not steps_of(folder / "checkpoints"):
        raise ValueError(f"folder={place!r} holds no checkpoint yet; training writes the first")

    def load(job: Job) -> tuple[Transformer, str]:
        run = job.run
        model, _, step = load_run(
            place, job.mesh, kernels=run.execution.kernels, widen=not run.freezes
        )
        return model, f"of step {step} "

    return Start(place, run, load_text(place), False, load)


def _open_released(place: str) -> Start:
    folder = ReleasedFolder(find_released(place))
    text = load_text(folder.path)
    run = released_run(folder.path, folder.cfg, text)

    def load(job: Job) -> tuple[Transformer, str]:
        freezes = job.run.freezes
        dtype = None if freezes else jnp.float32
        fsdp = job.run.execution.layout.fsdp
        return load_weights(folder, dtype, job.mesh, packed=freezes, fsdp=fsdp), ""

    return Start(str(folder.path), run, text, True, load, four_bits=folder.four_bits)


def on_weights(run: RunConfig, start: Start) -> RunConfig:
    """Make a recipe begin with another run's weights, and take its model, execution and data.

    A recipe for chats takes the tokenizer alone of the data, and so does every recipe from a
    released model.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> start = Start("runs/lab", ds.recipe("lab"), plain_settings(), False, lambda job: ...)
        >>> run = on_weights(ds.replace(ds.recipe("tiny"), steps=9), start)
        >>> run.model == ds.preset("lab"), run.steps, run.start
        (True, 9, 'runs/lab')
    """
    return replace(_like(run, start), start=start.place)


def on_trunk(run: RunConfig, trunk: Start) -> RunConfig:
    """Give a recipe a trunk's model, execution and data; the heads to train are a diff of that.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.chat.text_settings import plain_settings
        >>> trunk = Start("runs/lab", ds.recipe("lab"), plain_settings(), False, lambda job: ...)
        >>> run = on_trunk(ds.recipe("tiny"), trunk)
        >>> run.model == ds.replace(ds.preset("lab"), mtp_depth=1), run.trunk
        (True, 'runs/lab')
    """
    run = _like(run, trunk)
    return replace(
        run, model=replace(run.model, mtp_depth=run.model.mtp_depth or 1), trunk=trunk.place
    )


def _like(run: RunConfig, other: Start) -> RunConfig:
    model, data = other.run.model, other.run.data

    # Only a recipe for text that begins with a run takes its data; others take the tokenizer.
    if other.released or run.data.format != "text":
        length = min(run.data.seq_len, model.max_positions)
        data = replace(run.data, tokenizer=data.tokenizer, seq_len=length)
    execution = run.execution if other.released else other.run.execution
    return replace(run, model=model, execution=execution, data=data)


def check_start(run: RunConfig, start: Start) -> None:
    """Check that a run can begin with the other: its model but for the free keys, and its tokens.

    Raises: ValueError.
    """
    name = "start" if run.trunk is None else "trunk"
    was = start.run.model.attention
    becomes_sparse = run.trunk is None and (was, run.model.attention) == ("mla", "dsa")

    # Parameters of the same shapes, that mean the same.
    free = START_KEYS if run.trunk is None else TRUNK_KEYS
    if becomes_sparse:
        free = (*START_KEYS, *INDEX_KEYS)
    theirs = {k: v for k, v in to_dict(start.run.model).items() if k not in free}
    ours = {k: v for k, v in to_dict(run.model).items() if k not in free}
    if different := first_difference(theirs, ours):
        key, a, b = different
        raise ConfigError(f"model.{key}={b!r} is not that of {name}={start.place!r}, {a!r}")

    # The stage of its indexers, and weights that can train.
    if (was, start.run.indexer_stage, run.indexer_stage) == ("dsa", "sparse", "warm"):
        raise ConfigError(
            "indexer_stage='warm' learns from dense attention, "
            f"and that of start={start.place!r} is sparse"
        )
    if start.four_bits and not run.freezes:
        raise ConfigError(
            f"start={start.place!r} has weights of 4 bits, which do not train; "
            "use lora, or convert it"
        )

    # Ids of the same meaning.
    if not same_tokenizer(start.run.data.tokenizer, run.data.tokenizer):
        raise ValueError(
            f"data.tokenizer={run.data.tokenizer!r} gives ids another meaning than that of "
            f"{name}={start.place!r}"
        )


def begin(job: Job, start: Start | None) -> tuple[TrainState, str]:
    """Make the state of step 0.

    Args: start: of the run's `start` or `trunk`. None means that it has neither.
    Returns: (the state, a sentence on where its weights come from, which may be empty).
    """
    if start is None:
        return init_state(job), ""
    model, which = start.load(job)
    params = nnx.state(model, nnx.Param)
    bias = nnx.state(model, RouterBias)
    if job.run.trunk is None:
        return init_state(job, params, bias), f"the weights are those {which}in {start.place}"
    sentence = f"the trunk is that {which}in {start.place}; only the multi-token heads are trained"
    return init_state(job, split_heads(params)[1], split_heads(bias)[1]), sentence
