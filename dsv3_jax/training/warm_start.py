"""Another run as what a run begins with: its last checkpoint's parameters and router biases; all else is new.

That run may be a converted one. The optimizer, the steps and the place in the data begin anew. What makes no parameter
and is there to be trained for may be another: the reach in positions and YaRN, how load is balanced, precision.
The run that is made stands on its own: the other's folder is read once, at the start. A tokenizer.json that lies in it
is copied. Of a trunk that is held still (see `frozen`) the same holds, and what is said here of tokenizers and checks.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dsv3_jax.config import ConfigError, RunConfig, first_difference, replace, to_dict
from dsv3_jax.data import tokenizer
from dsv3_jax.mesh import sharding
from dsv3_jax.training import optim
from dsv3_jax.training.checkpoint import RUN_FILE, TOKENIZER_FILE, Checkpoints, read_run
from dsv3_jax.training.step import TrainState, abstract_state

FREE = (  # keys of a model that may be other than the source's
    "yarn", "max_positions", "rope_theta", "balance", "dispatch", "capacity_factor", "init_std", "compute_dtype",
    "remat", "layout",
)  # fmt: skip


def on_weights(run: RunConfig, folder: str | Path, out: str | Path | None = None) -> RunConfig:
    """A recipe that begins with the weights of the run in `folder`, whose model and data it takes.

    Args: as `model_and_data`. Raises: ValueError when the folder holds no run.
    """
    return replace(model_and_data(run, folder, out), start=str(folder))


def model_and_data(run: RunConfig, folder: str | Path, out: str | Path | None = None) -> RunConfig:
    """A recipe with another run's model and data in the place of its own.

    Args:
        run: the recipe: optimizer, number of steps, and how often to look and save.
        folder: the other's.
        out: the folder to train in: the other's own tokenizer.json will be copied there. Where the other is gone but
            training in `out` has begun, model and data are taken from there.
    Raises: ValueError when the folder holds no run.
    """
    here = [place for place in (folder, out) if place is not None and (Path(place) / RUN_FILE).exists()]
    source = read_run(here[0] if here else folder)
    data = source.data
    if out is not None and Path(data.tokenizer).resolve() == (Path(folder) / TOKENIZER_FILE).resolve():
        data = replace(data, tokenizer=str(Path(out) / TOKENIZER_FILE))
    return replace(run, model=source.model, data=data)


def check(run: RunConfig, words: tokenizer.Tokenizer) -> None:
    """See that a run can begin with the weights of `run.start`. `words`: the tokenizer of `run`.

    Raises: ValueError when that folder holds no run or no checkpoint, or is of another model or other tokens.
    """
    assert run.start is not None
    fitting(run.start, run, words, "run", FREE)


def begin(run: RunConfig, words: tokenizer.Tokenizer, mesh: Mesh | None = None) -> tuple[TrainState, int]:
    """Step 0 of a run with the weights of `run.start`, and the step that they are of. Raises: as `check`."""
    assert run.start is not None
    source = fitting(run.start, run, words, "run", FREE)
    found = last_state(run.start, replace(source, model=replace(source.model, layout=run.model.layout)), mesh)
    where = sharding.state_sharding(abstract_state(run), mesh, fsdp=run.model.layout.fsdp)
    opt = jax.jit(optim.init, out_shardings=where.opt)(found.params)
    step = jax.device_put(jnp.zeros((), jnp.int32), where.step)
    return TrainState(found.params, found.bias, opt, step), int(found.step)


def fitting(folder: str, run: RunConfig, words: tokenizer.Tokenizer, name: str, free: tuple[str, ...]) -> RunConfig:
    """The run in a folder, found to have a checkpoint, this run's tokens, and its model but for the keys `free`.

    Args: words: the tokenizer of `run`. name: what to call the other in a message.
    Raises: ValueError where one of these does not hold.
    """
    source = read_run(folder)
    theirs, ours = ({k: v for k, v in to_dict(r.model).items() if k not in free} for r in (source, run))
    different = first_difference(theirs, ours)
    if different:
        key, a, b = different
        raise ConfigError(f"the {name} in {folder} has model.{key} {a!r}, not {b!r}")
    spec = source.data.tokenizer
    if spec != run.data.tokenizer and not words.same_ids(tokenizer.load(spec)):
        raise ValueError(
            f"the {name} in {folder} has the tokenizer {spec!r}, whose ids are not those of {run.data.tokenizer!r}"
        )
    with Checkpoints(folder, source, read_only=True) as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"the {name} {folder} holds no checkpoint yet")
    return source


def last_state(folder: str, source: RunConfig, mesh: Mesh | None) -> TrainState:
    """The state of a folder's last checkpoint, which there must be."""
    with Checkpoints(folder, source, read_only=True) as checkpoints:
        found = checkpoints.restore(mesh)
    assert found is not None
    return found[0]


def tokenizer_of(run: RunConfig, out: Path) -> str:
    """Where a run's tokenizer is: the other run's, while a copy of it has yet to be made in `out`."""
    folder, own = run.trunk or run.start, out / TOKENIZER_FILE
    if folder is None or Path(run.data.tokenizer) != own or own.exists():
        return run.data.tokenizer
    return str(Path(folder) / TOKENIZER_FILE)


def copy_tokenizer(spec: str, run: RunConfig) -> None:
    """Make the run's tokenizer.json, whole or not at all."""
    part = Path(run.data.tokenizer).with_suffix(".part")
    shutil.copyfile(spec, part)
    part.rename(run.data.tokenizer)
