"""A run that begins with another run's last checkpoint, and heads on another run's frozen trunk.

`start`: parameters and router biases are the other run's; optimizer, steps and data position are new. Settings that add
no parameters may differ: context length and YaRN, load balancing.
With `lora`, the other run's parameters stay as they are, and new adapters are trained.
`trunk`: everything but the multi-token heads is the other run's, and stays as it is. The heads alone are trained.

For `start` it may be a released model. Its folder is read once, at the start: the new run then depends on it no more.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, DataConfig, RunConfig, first_difference, replace, to_dict
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.hf import reading
from dsv3_jax.hf.files import CONFIG
from dsv3_jax.hf.open_model import released_run
from dsv3_jax.hf.places import find
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.training import lora
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.run_folder import RUN_FILE, read_run, same_tokenizer
from dsv3_jax.training.step import TrainState, abstract_state, init_optimizer, init_state

# Keys of a model that may differ from the other run's.
START_KEYS = ("yarn", "max_positions", "rope_theta", "balance", "capacity_factor", "init_std")
TRUNK_KEYS = ("mtp_depth", "mtp_kind", "mtp_input")


def on_weights(run: RunConfig, folder: str | Path, out: str | Path | None = None) -> RunConfig:
    """Make a recipe begin with the weights of the run in `folder`, and take its model and data.

    Args: as `model_and_data`. Raises: ValueError if the folder holds no run.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.training.run_folder import claim
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = claim(folder, ds.recipe("lab"))
        ...     run = on_weights(ds.replace(ds.recipe("tiny"), steps=9), folder)
        >>> run.model == ds.preset("lab"), run.steps, run.start == folder
        (True, 9, True)
    """
    run = model_and_data(run, folder, out)
    try:
        place = find(folder)
    except ValueError:  # gone, but training in `out` may have begun
        if out is None or not (Path(out) / RUN_FILE).exists():
            raise
        place = Path(folder)
    return replace(run, start=str(place))


def on_trunk(run: RunConfig, trunk: str | Path, out: str | Path | None = None) -> RunConfig:
    """Give a recipe a trunk's model and data instead of its own; the heads to train are a diff of that.

    Args: as `model_and_data`. Raises: ValueError if the trunk holds no run.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.training.run_folder import claim
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = claim(folder, ds.recipe("lab"))
        ...     run = on_trunk(ds.recipe("tiny"), folder)
        >>> run.model == ds.replace(ds.preset("lab"), mtp_depth=1), run.trunk == folder
        (True, True)
    """
    run = model_and_data(run, trunk, out)
    if run.model.mtp_depth == 0:
        run = replace(run, model=replace(run.model, mtp_depth=1))
    return replace(run, trunk=str(trunk))


def model_and_data(run: RunConfig, folder: str | Path, out: str | Path | None = None) -> RunConfig:
    """Give a recipe another run's model, execution and data instead of its own; of the data of a recipe for chats, the
    tokenizer alone.

    Args:
        run: the recipe: optimizer, number of steps, and how often to evaluate and save.
        folder: the other run's.
        out: the folder to train in. If the other is gone but training in `out` has begun, they are taken from there.
    Raises: ValueError if the folder holds no run.

    Example:
        >>> import tempfile
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.training.run_folder import claim
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = claim(folder, ds.recipe("lab"))
        ...     run = model_and_data(ds.recipe("tiny"), folder)
        >>> run.model == ds.preset("lab"), run.optim == ds.recipe("tiny").optim
        (True, True)
    """
    there = [place for place in (folder, out) if place is not None and (Path(place) / RUN_FILE).exists()]
    if not there and _is_released(folder):
        source = _released(folder)
        return replace(run, model=source.model, data=_with_tokenizer(run, source))
    source = read_run(there[0] if there else folder)
    data = source.data if run.data.format == "text" else _with_tokenizer(run, source)
    return replace(run, model=source.model, execution=source.execution, data=data)


def _with_tokenizer(run: RunConfig, source: RunConfig) -> DataConfig:
    """A recipe's data for another run's model."""
    length = min(run.data.seq_len, source.model.max_positions)
    return replace(run.data, tokenizer=source.data.tokenizer, seq_len=length)


def check(run: RunConfig, tokenizer: Tokenizer) -> None:
    """Check that a run can begin with the run that it names as `start` or `trunk`, if it names one.

    Args: tokenizer: that of `run`.
    Raises: ValueError if that folder holds no run or no checkpoint, or is of another model or other tokens.
    """
    if run.trunk is not None or run.start is not None:
        _fitting(run, tokenizer)


def begin(
    run: RunConfig,
    tokenizer: Tokenizer,
    mesh: Mesh | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
) -> tuple[TrainState, str]:
    """Make the state of step 0.

    Args: optimizer: as in `step.make_step`.
    Returns: (the state, a sentence on where its weights come from).
    Raises: as `check`.
    """
    if run.trunk is not None:
        trunk = _last_state(run.trunk, _fitting(run, tokenizer), run, mesh)
        text = f"the trunk is that of step {int(trunk.step)} in {run.trunk}; only the multi-token heads are trained"
        return init_state(run, mesh, trunk, optimizer=optimizer), text
    if run.start is not None:
        source = _fitting(run, tokenizer)
        shapes = abstract_state(run, optimizer=optimizer)
        where = sharding.state_sharding(shapes, mesh, fsdp=run.execution.layout.fsdp)
        adapters_at, weights_at = lora.split(where.params)
        if _is_released(run.start):
            model = reading.load(run.start, jnp.float32, mesh)
            found, text = (nnx.state(model, kind) for kind in (nnx.Param, RouterBias)), "those"
            params, bias = (jax.device_put(*pair) for pair in zip(found, (weights_at, where.bias), strict=True))
        else:
            last = _last_state(run.start, source, run, mesh)
            params, bias, text = last.params, last.bias, f"those of step {int(last.step)}"
        start = jax.jit(partial(lora.init, run.lora, lora.split(shapes.params)[1]), out_shardings=adapters_at)
        params = nnx.merge_state(params, start(jax.random.key(run.seed)))
        init = partial(init_optimizer, run, optimizer=optimizer)
        opt = jax.jit(init, out_shardings=where.opt)(params)
        step = jax.device_put(jnp.zeros((), jnp.int32), where.step)
        return TrainState(params, bias, opt, step), f"the weights are {text} in {run.start}"
    return init_state(run, mesh, optimizer=optimizer), ""


def _fitting(run: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The run that `run` begins with: it has a checkpoint, this run's tokens, and its model but for the free keys.

    Raises: ValueError if one of these does not hold.
    """
    name, free = ("trunk", TRUNK_KEYS) if run.trunk is not None else ("start", START_KEYS)
    folder = run.trunk or run.start
    assert folder is not None
    released = name == "start" and _is_released(folder)
    source = _released(folder) if released else read_run(folder)
    theirs, ours = ({k: v for k, v in to_dict(r.model).items() if k not in free} for r in (source, run))
    different = first_difference(theirs, ours)
    if different:
        key, a, b = different
        raise ConfigError(f"model.{key}={b!r} is not that of {name}={folder!r}, {a!r}")
    if not same_tokenizer(source.data.tokenizer, run.data.tokenizer):
        raise ValueError(
            f"data.tokenizer={run.data.tokenizer!r} gives ids another meaning than that of {name}={folder!r}"
        )
    if released:
        return source
    with Checkpoints(folder, source, read_only=True) as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"{name}={folder!r} holds no checkpoint yet")
    return source


def _is_released(place: str | Path) -> bool:
    """Whether a model to start with is a released one, and not a run."""
    return not (Path(place) / RUN_FILE).exists() and (find(place) / CONFIG).exists()


def _released(place: str | Path) -> RunConfig:
    """The settings of a released model."""
    folder = reading.ReleasedFolder(place)
    return released_run(folder.path, folder.cfg)


def _last_state(folder: str, source: RunConfig, run: RunConfig, mesh: Mesh | None) -> TrainState:
    """The state of a folder's last checkpoint without its optimizer, sharded as `run` says."""
    with Checkpoints(folder, replace(source, execution=run.execution), read_only=True) as checkpoints:
        found = checkpoints.restore(mesh, optimizer=False)
    assert found is not None
    return found[0]
