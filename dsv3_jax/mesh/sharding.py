"""The device mesh, and where on it each array lies.

A mesh has three axes. "data" and "expert" both cut the batch, by rows; "expert" cuts the routed experts as well, and
"tensor" cuts heads, hidden widths and the vocabulary. An axis may have size 1. RULES is the one table that says which
axis of an array each of them cuts: parameters carry the names of their axes (`modules.layers.param`), and activations
are named where they are held in place (`constrain`). What cannot be cut evenly lies whole on every device.

`jax.set_mesh` puts a mesh in force; without one everything is on a single device.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dsv3_jax.config import ConfigError, ModelConfig, RunConfig

AXES = ("data", "expert", "tensor")
MOST_DEVICES = 65536  # of a mesh: more is a slip of the keyboard, and JAX would try to make them
ROWS = ("data", "expert")  # what cuts the batch

# The mesh axes that cut an array's axis of that name, outermost first; an axis without a name lies whole.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ROWS,
    "expert": ("expert",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
}
# What `Layout.fsdp` adds, of weights and of all that lies as they do; they are made whole again where they are used.
FSDP_RULES = RULES | {"dim": ("data",), "latent": ("data",)}


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,expert=4` as {"data": 2, "expert": 4, "tensor": 1}; an axis that is not named has size 1.

    Raises: ConfigError for other axes, one that is named twice, sizes that are not positive whole numbers, or more
        than MOST_DEVICES devices in all.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if not found or found[1] not in AXES:
            raise ConfigError(f"mesh {text!r} is not of the form {','.join(f'{a}=N' for a in AXES)}")
        if found[1] in sizes:
            raise ConfigError(f"mesh {text!r} names {found[1]} twice")
        sizes[found[1]] = int(found[2])
    if math.prod(sizes.values()) > MOST_DEVICES:
        raise ConfigError(f"mesh {text!r} is of more than {MOST_DEVICES:,} devices")
    return dict.fromkeys(AXES, 1) | sizes


def make_mesh(data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of data × expert × tensor devices, those of all processes.

    Raises: ConfigError when there are fewer devices.
    """
    count = data * expert * tensor
    if count > jax.device_count():
        raise ConfigError(
            f"mesh data={data},expert={expert},tensor={tensor} needs {count} devices, and there are "
            f"{jax.device_count()} here"
        )
    sizes, kinds = (data, expert, tensor), (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=kinds)
    except NotImplementedError:  # no axes of these sizes in a TPU's torus: one of its axes is cut in parts
        devices = mesh_utils.create_device_mesh(sizes, jax.devices()[:count], allow_split_physical_axes=True)
        return Mesh(devices, AXES, axis_types=kinds)


def spell(mesh: Mesh | AbstractMesh) -> str:
    """`data=2,expert=4,tensor=1`, as `parse_mesh` reads it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def check(mesh: Mesh, run: RunConfig) -> None:
    """Raises: ConfigError when a run's batch cannot be cut evenly over the mesh, or its model does not fit."""
    rows = run.data.batch_size // run.optim.microbatches
    if rows % math.prod(mesh.shape[axis] for axis in ROWS):
        raise ConfigError(f"batch_size/microbatches={rows} rows are not divisible by mesh {spell(mesh)}")
    check_model(mesh, run.model)


def check_model(mesh: Mesh, cfg: ModelConfig) -> None:
    """Raises: ConfigError when a model's experts or heads cannot be cut evenly over the mesh, or its devices cannot do
    what the layout says."""
    if cfg.num_experts % mesh.shape["expert"]:
        raise ConfigError(f"num_experts={cfg.num_experts} is not divisible by mesh {spell(mesh)}")
    if cfg.num_heads % mesh.shape["tensor"]:
        raise ConfigError(f"num_heads={cfg.num_heads} is not divisible by mesh {spell(mesh)}")
    platform = mesh.devices.flat[0].platform
    if cfg.layout.exchange == "ragged" and mesh.shape["expert"] > 1 and platform == "cpu":
        raise ConfigError(
            f"layout exchange='ragged' is not to be had on {platform} devices: JAX does not have it there"
        )


def mesh_of(state: Any) -> Mesh | None:
    """The mesh that arrays in any structure lie on; None where that is a single device.

    Raises: ValueError for a mesh that `make_mesh` does not make.
    """
    for x in jax.tree.leaves(state):
        mesh = getattr(x.sharding, "mesh", None)
        if isinstance(mesh, Mesh) and mesh.size > 1:
            if mesh.axis_names != AXES:
                raise ValueError(f"the arrays lie on a mesh of axes {mesh.axis_names}, not {AXES}")
            return mesh
    return None


def in_force(mesh: Mesh | None) -> AbstractContextManager:
    """A context in which `jax.jit` compiles for the mesh; for a single device where there is none."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_mesh() -> bool:
    """Whether a mesh of more than one device is in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, *, fsdp: bool = False) -> P:
    """How an array is cut. The names are its last axes'; what stands before them, as a stack's layers, is whole."""
    whole: list[tuple[str, ...] | None] = [None] * (len(shape) - len(names))
    sizes = shape[len(whole) :]
    return P(*whole, *(_cutting(name, size, mesh, fsdp) or None for name, size in zip(names, sizes, strict=True)))


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes of the mesh in force that cut so many rows of a batch."""
    return _cutting("batch", rows, jax.sharding.get_abstract_mesh())


def _cutting(name: str | None, size: int, mesh: Mesh | AbstractMesh, fsdp: bool = False) -> tuple[str, ...]:
    """The mesh axes for a name, as many as cut `size` evenly; those of size 1 are left out."""
    axes: tuple[str, ...] = ()
    for axis in (FSDP_RULES if fsdp else RULES).get(name or "", ()):
        if mesh.shape[axis] > 1 and size % math.prod(mesh.shape[a] for a in (*axes, axis)) == 0:
            axes += (axis,)
    return axes


def state_sharding(state, mesh: Mesh | AbstractMesh | None, *, fsdp: bool = False):
    """Where each array of a state, or of its shapes, lies: the same structure of shardings.

    Without a mesh all is on the first device.
    """

    def place(v):
        def of(x):
            if mesh is None:
                return SingleDeviceSharding(jax.devices()[0])
            return NamedSharding(mesh, spec(names_of(v), x.shape, mesh, fsdp=fsdp))

        return jax.tree.map(of, v)

    return jax.tree.map(place, state, is_leaf=_is_variable)


def names_of(v: Any) -> tuple[str | None, ...]:
    """Names of a variable's last axes; of none where it has no names, or is a plain array."""
    return v.get_metadata().get("axes", ()) if _is_variable(v) else ()


def _is_variable(v: Any) -> bool:
    return isinstance(v, nnx.Variable)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: its rows cut over "data" and "expert"."""
    return NamedSharding(mesh, P(ROWS))


def constrain(x: Array, *names: str | None) -> Array:
    """An activation, held to where its axes' names say; untouched without a mesh. For use under `jax.jit`."""
    if not on_mesh():
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, jax.sharding.get_abstract_mesh()))


def keep_in_place(state, *, fsdp: bool = False):
    """A state, or gradients of its structure, held to where `state_sharding` says. For use under `jax.jit`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(state, state_sharding(state, mesh, fsdp=fsdp))


def whole(v, *, fsdp: bool, dtype: Any):
    """Weights (variables in any structure) made whole along "data" for use, where fsdp cut them. Under `jax.jit`.

    They are cast to `dtype` on the way, but for those that `modules.layers.param` marks as exact. Their gradients are
    added up along "data" and cut again in that dtype, before they are cast back: a bfloat16 run sums them in bfloat16.
    No device ever holds all of the layers' gradients; those of the embedding and the head it does, for `by_rows` takes
    these tables whole and adds their gradients up whole.
    """
    if not fsdp or not on_mesh():
        return v
    mesh = jax.sharding.get_abstract_mesh()

    def gather(v):
        names, exact = names_of(v), v.get_metadata().get("exact", False)

        def of(x):
            used, kept = spec(names, x.shape, mesh), spec(names, x.shape, mesh, fsdp=True)
            return x if used == kept else _gathered(x, used, kept, x.dtype if exact else jnp.dtype(dtype))

        return jax.tree.map(of, v)

    return jax.tree.map(gather, v, is_leaf=_is_variable)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x: Array, used: P, kept: P, dtype: Any) -> Array:
    cast = jax.lax.with_sharding_constraint(x.astype(dtype), kept)  # so that what travels is cast already
    return jax.lax.with_sharding_constraint(cast, used)


def _gathered_fwd(x, used, kept, dtype):
    return _gathered(x, used, kept, dtype), x[:0]


def _gathered_bwd(used, kept, dtype, like_x, d):
    return (jax.lax.with_sharding_constraint(d, kept).astype(like_x.dtype),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def by_rows(f: Callable, whole: Sequence, *cut) -> Any:
    """`f(*whole, *cut)` with each device on its own rows of the arrays in `cut`; plainly called without a mesh.

    Only the axes of ROWS are taken apart; along "tensor" the compiler goes on cutting as it does elsewhere.
    f returns (sums, rows): arrays that are added up over devices, and arrays that are cut as those in `cut`.
    """
    axes = row_axes(jax.tree.leaves(cut)[0].shape[0]) if on_mesh() else ()
    if not axes:
        return f(*whole, *cut)

    def local(*args):
        sums, rows = f(*args)
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), sums), rows

    specs = (*(P() for _ in whole), *(P(axes) for _ in cut))
    return jax.shard_map(local, in_specs=specs, out_specs=(P(), P(axes)), axis_names=set(axes))(*whole, *cut)


def each_its_own(f: Callable, names: Sequence[Sequence[str | None]], like: Sequence[int], *args: Any) -> Any:
    """`f(*args)` with each device on its own part of every argument; plainly called without a mesh.

    Args:
        names: of each argument's last axes, by which it is cut; of all its arrays alike.
        like: f returns a tuple of so many, which lie as the arguments of these numbers.
    """
    if not on_mesh():
        return f(*args)
    mesh = jax.sharding.get_abstract_mesh()
    specs = tuple(
        jax.tree.map(lambda x, of=of: spec(of, x.shape, mesh), arg) for of, arg in zip(names, args, strict=True)
    )
    return jax.shard_map(f, in_specs=specs, out_specs=tuple(specs[i] for i in like))(*args)
