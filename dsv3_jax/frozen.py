"""Heads on a frozen trunk: all but the multi-token heads comes from another run's last checkpoint, and stays as it is.

The run that is made stands on its own: its checkpoints hold the whole model, and the trunk's folder is read once, at
the start. A tokenizer.json that lies in it is copied.
"""

import shutil
from pathlib import Path

from jax.sharding import Mesh

from dsv3_jax import tokenizer
from dsv3_jax.checkpoint import RUN_FILE, TOKENIZER_FILE, Checkpoints, first_difference, read_run
from dsv3_jax.config import ConfigError, RunConfig, replace, to_dict
from dsv3_jax.train_step import TrainState, init_state


def on_trunk(run: RunConfig, trunk: str | Path, out: str | Path | None = None) -> RunConfig:
    """A recipe with a trunk's model and data in the place of its own; what heads to train is a diff of that.

    Args:
        run: the recipe: optimizer, number of steps, and how often to look and save.
        trunk: a run folder.
        out: the folder to train in: the trunk's own tokenizer.json will be copied there. Where the trunk is gone but
            training in `out` has begun, model and data are taken from there.
    Raises: ValueError when the trunk holds no run.
    """
    here = [folder for folder in (trunk, out) if folder is not None and (Path(folder) / RUN_FILE).exists()]
    source = read_run(here[0] if here else trunk)
    model, data = source.model, source.data
    if model.mtp_depth == 0:
        model = replace(model, mtp_depth=1)
    if out is not None and Path(data.tokenizer).resolve() == (Path(trunk) / TOKENIZER_FILE).resolve():
        data = replace(data, tokenizer=str(Path(out) / TOKENIZER_FILE))
    return replace(run, model=model, data=data, trunk=str(trunk))


def check(run: RunConfig, words: tokenizer.Tokenizer) -> RunConfig:
    """The run whose trunk a run takes. `words`: the tokenizer of the latter.

    Raises: ValueError when that folder holds no run or no checkpoint, or is of another model or other tokens.
    """
    assert run.trunk is not None
    source = read_run(run.trunk)
    theirs, ours = ({k: v for k, v in to_dict(r.model).items() if not k.startswith("mtp_")} for r in (source, run))
    different = first_difference(theirs, ours)
    if different:
        key, a, b = different
        raise ConfigError(f"the trunk in {run.trunk} has model.{key} {a!r}, not {b!r}")
    spec = source.data.tokenizer
    if spec != run.data.tokenizer and not words.same_ids(tokenizer.load(spec)):
        raise ValueError(
            f"the trunk in {run.trunk} has the tokenizer {spec!r}, whose ids are not those of {run.data.tokenizer!r}"
        )
    with Checkpoints(run.trunk, source, read_only=True) as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"the trunk {run.trunk} holds no checkpoint yet")
    return source


def start(run: RunConfig, words: tokenizer.Tokenizer, mesh: Mesh | None = None) -> tuple[TrainState, int]:
    """Fresh heads on the trunk's last checkpoint, and the step of that. Raises: as `check`."""
    source = check(run, words)
    assert run.trunk is not None
    with Checkpoints(run.trunk, source, read_only=True) as checkpoints:
        found = checkpoints.restore(mesh)
    assert found is not None
    trunk, _ = found
    return init_state(run, mesh, trunk), int(trunk.step)


def tokenizer_of(run: RunConfig, out: Path) -> str:
    """Where a run's tokenizer is: the trunk's, while a copy of it has yet to be made in `out`."""
    own = out / TOKENIZER_FILE
    if run.trunk is None or Path(run.data.tokenizer) != own or own.exists():
        return run.data.tokenizer
    return str(Path(run.trunk) / TOKENIZER_FILE)


def copy_tokenizer(spec: str, run: RunConfig) -> None:
    """Make the run's tokenizer.json, whole or not at all."""
    part = Path(run.data.tokenizer).with_suffix(".part")
    shutil.copyfile(spec, part)
    part.rename(run.data.tokenizer)
