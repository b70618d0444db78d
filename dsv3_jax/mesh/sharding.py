"""The device mesh, and where on it each array is.

A mesh has three axes. The axes "data" and "expert" both shard the batch, by rows. The axis "expert"
also shards the routed experts, and "tensor" shards heads, hidden widths and the vocabulary. An axis
may have size 1. RULES is the one table that says which axis of an array each of them shards.
Parameters carry the names of their axes (`model.parameters.param`), and activations are named where
they are constrained (`constrain`). An axis that does not divide evenly is replicated.

`jax.set_mesh` sets the mesh in use; without one everything is on a single device.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dsv3_jax.config import ConfigError, ModelConfig, RunConfig
from dsv3_jax.config.fields import require
from dsv3_jax.mesh.length import check_length, shards_length
from dsv3_jax.mesh.shape import AXES, format_mesh, over_slices

ROWS = ("data", "expert")  # axes that shard the batch

# Mesh axes that shard an array's axis of that name, outermost first; nameless ones are replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ROWS,
    "expert": ("expert",),
    "heads": ("tensor",),
    "attending": ("tensor",),  # heads while they attend
    "hidden": ("tensor",),
    "vocab": ("tensor",),
}
# `Layout.fsdp` adds these for weights, and for all that is sharded like them; they are gathered for
# use. Experts are sharded by number where "data" divides it: they then lie in memory as in use.
FSDP_RULES = RULES | {"expert": ("expert", "data"), "dim": ("data",), "latent": ("data",)}
# `Layout.length` puts these in their place, see length.py.
LENGTH_RULES = {"batch": ("data",), "length": ("expert",), "attending": ("tensor", "expert")}


def make_mesh(data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """Make a mesh of data × expert × tensor devices of all processes.

    Raises: ConfigError if there are fewer devices, or several slices that the mesh does not divide
        evenly over.

    Example:
        >>> make_mesh(data=1).axis_names
        ('data', 'expert', 'tensor')
    """
    count = data * expert * tensor
    if count > jax.device_count():
        raise ConfigError(
            f"mesh data={data},expert={expert},tensor={tensor} needs {count} devices, "
            f"and there are {jax.device_count()} here"
        )

    # Auto axes: the compiler chooses the shardings that no constraint names.
    sizes = (data, expert, tensor)
    kinds = (AxisType.Auto,) * len(AXES)
    devices = jax.devices()[:count]

    # The network between slices (nodes, pods) is slower: "data" crosses it first.
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) > 1:
        return Mesh(over_slices(sizes, devices, slices), AXES, axis_types=kinds)

    try:
        return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:
        # A TPU's torus has no axes of these sizes: one of its axes is split.
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(array, AXES, axis_types=kinds)


def check_run(mesh: Mesh, run: RunConfig) -> None:
    """Check that a run fits the mesh.

    Raises: ConfigError if its batch cannot be sharded evenly, or its model does not fit.

    Example:
        >>> from dsv3_jax.presets import recipe
        >>> check_run(make_mesh(), recipe("tiny"))  # one device fits every batch and model
    """
    rows = run.data.batch_size // run.optim.microbatches
    axes = ROWS if run.execution.layout.length == "none" else LENGTH_RULES["batch"]
    if rows % math.prod(mesh.shape[axis] for axis in axes):
        given = f"batch_size/microbatches={rows} rows are"
        raise ConfigError(f"{given} not divisible by mesh {format_mesh(mesh)}")
    nodes, peers = run.execution.layout.expert_nodes, mesh.shape["expert"]
    wrong = f"layout.expert_nodes={nodes} does not divide expert={peers} of the mesh"
    require(peers % nodes == 0, wrong)
    check_model(mesh, run.model)
    check_length(mesh, run)


def check_model(mesh: Mesh, cfg: ModelConfig) -> None:
    """Check that a model fits the mesh.

    Raises: ConfigError if its experts or heads cannot be sharded evenly.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> check_model(make_mesh(), preset("tiny"))  # one device fits every model
    """
    for name, axis in (("num_experts", "expert"), ("num_heads", "tensor")):
        number = getattr(cfg, name)
        if number % mesh.shape[axis]:
            raise ConfigError(f"{name}={number} is not divisible by mesh {format_mesh(mesh)}")


def mesh_of(state: Any) -> Mesh | None:
    """The mesh of the arrays in any structure; None for a single device.

    Raises: ConfigError for a mesh that `make_mesh` does not make.

    Example:
        >>> import jax.numpy as jnp
        >>> mesh_of({"w": jnp.ones(2)}) is None
        True
    """
    for x in jax.tree.leaves(state):
        mesh = getattr(x.sharding, "mesh", None)
        if isinstance(mesh, Mesh) and mesh.size > 1:
            _check_axes(mesh)
            return mesh
    return None


def use_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """A context in which `jax.jit` compiles for the mesh; None means a single device.

    Example:
        >>> with use_mesh(make_mesh()):
        ...     jax.sharding.get_abstract_mesh().axis_names
        ('data', 'expert', 'tensor')
    """
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_mesh() -> bool:
    """Whether a mesh of more than one device is in use.

    Raises: ConfigError if it has other axes than `AXES`.

    Example:
        >>> on_mesh()
        False
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        _check_axes(mesh)
    return mesh.size > 1


def _check_axes(mesh: Mesh | AbstractMesh) -> None:
    wrong = f"mesh axes={mesh.axis_names} are not {AXES}; use sharding.make_mesh, or sizes of 1"
    require(mesh.axis_names == AXES, wrong)


def spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    *,
    fsdp: bool = False,
) -> P:
    """How an array is sharded: `names` belong to its last axes; axes before them are not sharded.

    An axis of the mesh shards the first axis of the array that it can.

    Example:
        >>> mesh, names = AbstractMesh((2, 4, 1), AXES), ("expert", "dim", "hidden")
        >>> many, few = (58, 256, 7168, 2048), (58, 4, 7168, 2048)
        >>> spec(names, many, mesh, fsdp=True), spec(names, few, mesh, fsdp=True)
        (P(None, ('expert', 'data'), None, None), P(None, 'expert', 'data', None))
    """
    # A stack's axis of layers has no name: each device has its part of every layer.
    leading = len(shape) - len(names)
    parts: list[tuple[str, ...] | None] = [None] * leading
    used: tuple[str, ...] = ()
    for name, size in zip(names, shape[leading:], strict=True):
        # With fsdp "expert" and "dim" both want "data": the first that it divides gets it.
        wanted = _mesh_axes(name, size, mesh, fsdp)
        axes = tuple(axis for axis in wanted if axis not in used)
        used += axes
        parts.append(axes or None)
    return P(*parts)


def token_axes(shape: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """The axes of the mesh in use that shard tokens [B, …]: their rows, and a sharded length.

    Example:
        >>> with jax.sharding.use_abstract_mesh(AbstractMesh((2, 4, 1), AXES)):
        ...     [token_axes((rows,)) for rows in (16, 6, 5)]  # 6 is not divisible by 2 · 4
        [(('data', 'expert'),), (('data',),), ((),)]
    """
    names = ("batch", "length") if shards_length() else ("batch",)
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(_mesh_axes(name, size, mesh) for name, size in zip(names, shape, strict=False))


def _mesh_axes(
    name: str | None, size: int, mesh: Mesh | AbstractMesh, fsdp: bool = False
) -> tuple[str, ...]:
    """The mesh axes for a name, as many as divide `size` evenly; axes of size 1 are left out."""
    rules = FSDP_RULES if fsdp else RULES
    if shards_length():
        rules = rules | LENGTH_RULES

    # An axis shards what the axes before it leave, or is left out if it does not divide that.
    axes: tuple[str, ...] = ()
    parts = 1
    for axis in rules.get(name or "", ()):
        devices = mesh.shape[axis]
        if devices > 1 and size % (parts * devices) == 0:
            axes += (axis,)
            parts *= devices
    return axes


def state_sharding(state: Any, mesh: Mesh | AbstractMesh | None, *, fsdp: bool = False) -> Any:
    """The sharding of each array of a state, or of its shapes, in the same structure.

    Without a mesh all arrays are on the first device.

    Example:
        >>> import jax.numpy as jnp
        >>> w = nnx.Param(jnp.ones((4, 2)), axes=("heads", None))
        >>> state_sharding(w, AbstractMesh((1, 1, 2), AXES)).get_value().spec
        P('tensor', None)
    """

    def place(v: Any) -> Any:
        # A packed weight is two arrays, numbers and scales: the same names shard both.
        names = names_of(v)

        def of(x: Any) -> Sharding:
            if mesh is None:
                return SingleDeviceSharding(jax.devices()[0])
            return NamedSharding(mesh, spec(names, x.shape, mesh, fsdp=fsdp))

        return jax.tree.map(of, v)

    return jax.tree.map(place, state, is_leaf=is_variable)


def names_of(v: Any) -> tuple[str | None, ...]:
    """Names of a variable's last axes; empty if it has none, or is a plain array.

    Example:
        >>> import jax.numpy as jnp
        >>> names_of(nnx.Param(jnp.ones((4, 2)), axes=("heads", None)))
        ('heads', None)
    """
    return v.get_metadata().get("axes", ()) if is_variable(v) else ()


def is_variable(v: Any) -> bool:
    """Whether a node of a state is a variable, which has names."""
    return isinstance(v, nnx.Variable)


def batch_sharding(mesh: Mesh, rows: int | None = None) -> NamedSharding:
    """The sharding of a batch: its rows over "data" and "expert".

    Args: rows: of the batch; an axis that does not divide them is left out. None: both axes do.

    Example:
        >>> batch_sharding(make_mesh()).spec
        P(('data', 'expert'),)
    """
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    whole = rows is None or rows % parts == 0
    return NamedSharding(mesh, P(ROWS if whole else _mesh_axes("batch", rows or 0, mesh)))


def constrain(x: Array, *names: str | None) -> Array:
    """Shard an activation as its axes' names say; no change without a mesh. Under `jax.jit`.

    The axis after "batch" is the length of rows, unless it has a name.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((4, 3))
        >>> constrain(x, "batch", None) is x  # without a mesh
        True
    """
    if not on_mesh():
        return x
    if names[:2] == ("batch", None):
        names = ("batch", "length", *names[2:])
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def constrain_state(state: Any, *, fsdp: bool = False) -> Any:
    """Constrain a state, or gradients of its structure, to `state_sharding`. Under `jax.jit`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(state, state_sharding(state, mesh, fsdp=fsdp))


def shard_map_over_batch(f: Callable, tokens: Array) -> Callable:
    """The function that calls `f(weights, *rows)` on each device's own rows; f without a mesh.

    Only the axes of ROWS are manual; the compiler shards along "tensor" as it does elsewhere.

    Args:
        f: gets weights, which are on all devices, and rows: each is an array or any tree of them.
            It returns (sums, results): arrays that are summed over devices, and arrays that are
            sharded as the rows are.
        tokens: an array whose first axes are those of the rows.

    Example:
        >>> import jax.numpy as jnp
        >>> def scaled(w, x):
        ...     return x.sum(), w * x
        >>> x = jnp.array([1.0, 3.0])
        >>> shard_map_over_batch(scaled, x)(jnp.float32(2), x)  # the same on a mesh
        (Array(4., dtype=float32), Array([2., 6.], dtype=float32))
    """
    shards = token_axes(tokens.shape) if on_mesh() else ()
    axes = sum(shards, ())
    if not axes:
        return f

    def local(weights: Any, *rows: Any) -> tuple[Any, Any]:
        sums, results = f(weights, *rows)
        return jax.tree.map(lambda x: jax.lax.psum(x, axes), sums), results

    def on_devices(weights: Any, *rows: Any) -> tuple[Any, Any]:
        # Sums leave with no axis, as they are alike on all devices; rows leave as they came.
        in_specs = P(), *(P(*shards),) * len(rows)
        out_specs = P(), P(*shards)
        mapped = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=set(ROWS))
        return mapped(weights, *rows)

    return on_devices


def shards_alike(names: Sequence[str | None], *shapes: Sequence[int]) -> bool:
    """Whether these shapes are sharded along the same axes; without a mesh, they are."""
    if not on_mesh():
        return True
    mesh = jax.sharding.get_abstract_mesh()
    return len({spec(names, shape, mesh) for shape in shapes}) == 1


def on_shards(
    local: Callable[..., dict[str, Any]],
    arrays: Mapping[str, tuple[Any, Sequence[str | None]]],
    like: Mapping[str, str],
    *,
    has_kernel: bool = False,
) -> dict[str, Any]:
    """Call `local(**arrays)` with each device on its own shard of all; without a mesh, once.

    Args:
        arrays: by name, an array, or a tree of them, and the names of its last axes, by which it
            is sharded. None stays None.
        like: for each result of `local`, the array as which it is sharded.
        has_kernel: `local` may call a Pallas kernel of a library. JAX cannot check along which axes
            its results differ, so the check is left out. Therefore `local` must have no
            collectives, and an axis that does not shard a result may shard no array.

    Example:
        >>> import jax.numpy as jnp
        >>> rows = ("batch",)  # both arrays are sharded by rows, and the sum as x is
        >>> arrays = {"x": (jnp.array([1.0, 2.0]), rows), "y": (jnp.array([3.0, 4.0]), rows)}
        >>> on_shards(lambda x, y: {"sum": x + y}, arrays, like={"sum": "x"})
        {'sum': Array([4., 6.], dtype=float32)}
    """
    values = {name: array for name, (array, _) in arrays.items()}
    if not on_mesh():
        return local(**values)

    mesh = jax.sharding.get_abstract_mesh()

    # A spec for each array of a tree. A None has no array, and reaches `local` as it is.
    specs = {
        name: jax.tree.map(lambda x, axes=axes: spec(axes, x.shape, mesh), array)
        for name, (array, axes) in arrays.items()
    }
    run = jax.shard_map(
        lambda values: local(**values),
        in_specs=(specs,),
        out_specs={result: specs[name] for result, name in like.items()},
        check_vma=not has_kernel,
    )
    return run(values)
