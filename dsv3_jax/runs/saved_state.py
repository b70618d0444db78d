"""What a checkpoint holds, and how it is read: on any mesh, with the optimizer's state or without.

`state` has the arrays by the names of `TrainState`, `data` the position in the data, and `config`
the run's settings with a list of the parameters that are packed.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import RunConfig, first_difference, from_dict, replace, to_dict
from dsv3_jax.mesh import sharding
from dsv3_jax.model.parameters import Packed, in_use
from dsv3_jax.training import lora
from dsv3_jax.training.state import Job, TrainState, abstract_state, first_nonfinite, map_frozen

SHAPES = ("model", "lora")  # settings of a run that say which arrays it has
PACKED = "packed"  # beside the settings: the frozen weights that are, see `parameters.Packed`
READ = ("params", "bias", "step")  # all that a reader needs; it may not know the optimizer's types


def to_save(state: TrainState, data: dict[str, Any], run: RunConfig) -> ocp.args.Composite:
    """Return what Orbax writes as one checkpoint."""
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(parts(state)),
        data=ocp.args.JsonSave(data),
        config=ocp.args.JsonSave(settings_of(run, state)),
    )


def from_orbax(
    orbax: ocp.AsyncCheckpointer, folder: Path, wanted: dict[str, Any], how: dict[str, Any]
) -> dict[str, Any]:
    """Read a state's trees, all of them or those of a reader, from a folder that Orbax wrote."""
    # Not StandardRestore, which reads no part of a tree.
    state = ocp.args.PyTreeRestore(wanted, restore_args=how, partial_restore="opt" not in wanted)
    return orbax.restore(folder, args=ocp.args.Composite(state=state)).state


def read_state(
    restore: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    saved: dict[str, Any],
    job: Job,
    mesh: Mesh | None,
    optimizer: bool,
    widen: bool,
) -> TrainState:
    """Read a checkpoint's state.

    Args:
        restore: reads trees by name, with the shapes, dtypes and shardings of Orbax's arguments.
        saved: the settings that were saved with it.
        job: the run, and the transformation that trains it.
        mesh, optimizer, widen: as `Checkpoints.restore`.
    Raises: ValueError if it does not fit the run; whatever Orbax raises.
    """
    # 1. Settings first.
    packed = saved.pop(PACKED, [])
    _check_shapes(job.run, saved)

    # 2. The shape, dtype and place of each array.
    shapes = abstract_state(job)
    place = partial(sharding.state_sharding, mesh=mesh, fsdp=job.run.execution.layout.fsdp)
    of_use = place(shapes.params)  # of parameters once they are unpacked
    shapes = replace(shapes, params=_with_packed(shapes.params, packed))
    shapes = jax.tree.map(
        lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, place(shapes)
    )

    # 3. All arrays, or those of a reader.
    wanted, how = _requests(job.run, shapes, widen)
    if not optimizer:
        wanted = {name: wanted[name] for name in READ}
        how = {name: how[name] for name in READ}
    found = restore(wanted, how)
    if bad := first_nonfinite("router bias", found["bias"]):
        raise ValueError(f"the norm of {bad} is not finite")
    if optimizer:
        return TrainState(**found)

    # 4. A reader gets a model's parameters: unpacked, and with LoRA's adapters merged.
    params = found.pop("params")
    if packed:
        dtype = jax.numpy.float32 if widen else jax.numpy.bfloat16
        params = jax.jit(partial(in_use, dtype=dtype), out_shardings=of_use)(params)
    return TrainState(lora.merge(job.run.lora, params), opt=(), **found)


def _check_shapes(run: RunConfig, saved: dict[str, Any]) -> None:
    """Check that a run has the arrays of the run that was saved. Raises: ValueError."""
    theirs = to_dict(from_dict(RunConfig, saved))
    ours = to_dict(run)
    different = first_difference(
        {key: theirs[key] for key in SHAPES}, {key: ours[key] for key in SHAPES}
    )
    if different:
        key, a, b = different
        raise ValueError(f"{key}={b!r} is not that of the checkpoint, {a!r}")


def _requests(
    run: RunConfig, shapes: TrainState, widen: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Orbax is asked for, and how it restores each array.

    Orbax restores the dtype that was saved if neither of the two names one: so do frozen weights,
    unless they are widened.
    """
    wanted = shapes
    how = ocp.checkpoint_utils.construct_restore_args(shapes)
    if not widen:
        of_saved_dtype = map_frozen(lambda args: replace(args, dtype=None), run, how.params)
        wanted = replace(wanted, params=map_frozen(lambda _: 0, run, wanted.params))
        how = replace(how, params=of_saved_dtype)
    return parts(wanted), parts(how)


def settings_of(run: RunConfig, state: TrainState) -> dict[str, Any]:
    """What is saved beside the arrays to read them again."""
    return to_dict(run) | {PACKED: _packed(state.params)}


def parts(state: TrainState) -> dict[str, Any]:
    """A state's trees by name; without the start's biases in a run that needs none."""
    return {name: tree for name, tree in vars(state).items() if name != "start_bias" or tree}


def _packed(params: nnx.State) -> list:
    """The packed parameters: [path, [shape, dtype] of each array]."""
    found = ((path, v.get_value()) for path, v in nnx.to_flat_state(params))
    return [
        [path, [[x.shape, x.dtype.name] for x in value]]
        for path, value in found
        if isinstance(value, Packed)
    ]


def _with_packed(params: nnx.State, packed: list) -> nnx.State:
    """The shapes of parameters, of which some are packed, as `_packed` lists them."""
    flat = dict(nnx.to_flat_state(params))
    try:
        for path, arrays in packed:
            value = Packed(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays))
            if jax.eval_shape(Packed.unpack, value).shape != flat[tuple(path)].shape:
                raise ValueError("its matrix has another shape")
            flat[tuple(path)] = flat[tuple(path)].replace(value)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{PACKED}={packed!r:.100} is no list of its packed weights") from error
    return nnx.from_flat_state(flat)
