"""The device mesh, and where on it each array lies.

A mesh has two axes: "data" and "expert". The batch is cut over both; the routed experts along "expert"; all else is
on every device. `jax.set_mesh` puts a mesh in force; without one everything is on a single device.
"""

import re
from contextlib import AbstractContextManager, nullcontext

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, RunConfig
from dsv3_jax.expert_parallel import AXES
from dsv3_jax.modules.moe import ExpertParam


def parse_mesh(text: str) -> dict[str, int]:
    """`data=2,expert=4` as {"data": 2, "expert": 4}; an axis that is not named has size 1.

    Raises: ConfigError for other axes, or sizes that are not positive whole numbers.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if not found or found[1] not in AXES:
            raise ConfigError(f"mesh {text!r} is not of the form {','.join(f'{a}=N' for a in AXES)}")
        sizes[found[1]] = int(found[2])
    return sizes


def make_mesh(data: int = 1, expert: int = 1) -> Mesh:
    """A mesh of data × expert of the process's devices.

    Raises: ConfigError when there are fewer devices.
    """
    if data * expert > jax.device_count():
        raise ConfigError(
            f"mesh data={data},expert={expert} needs {data * expert} devices, and there are {jax.device_count()} here"
        )
    return jax.make_mesh((data, expert), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(mesh: Mesh, run: RunConfig) -> None:
    """Raises: ConfigError when a run's batch or experts cannot be cut evenly over the mesh."""
    sizes, model = dict(mesh.shape), run.model
    name = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    rows = run.data.batch_size // run.optim.microbatches
    if rows % mesh.size:
        raise ConfigError(f"batch_size/microbatches={rows} rows are not divisible by mesh {name}")
    if model.num_experts % sizes["expert"]:
        raise ConfigError(f"num_experts={model.num_experts} is not divisible by mesh {name}")
    if model.dispatch == "capacity" and sizes["expert"] > 1:
        raise ConfigError(f"dispatch='capacity' does not cut experts over a mesh, and the mesh is {name}")


def in_force(mesh: Mesh | None) -> AbstractContextManager:
    """A context in which `jax.jit` compiles for the mesh; for a single device where there is none."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def state_sharding(state, mesh: Mesh | AbstractMesh | None):
    """Where each array of a state, or of its shapes, lies: the same structure of shardings.

    On a mesh experts are cut along "expert" and the rest is on every device; without one all is on the first.
    """

    def place(v):
        if mesh is None:
            return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), v)
        where = NamedSharding(mesh, P(None, "expert") if isinstance(v, ExpertParam) else P())
        return jax.tree.map(lambda _: where, v)

    return jax.tree.map(place, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies: its rows cut over all devices."""
    return NamedSharding(mesh, P(AXES))


def keep_in_place(state):
    """The state that a step returns, held to where its arrays lay before. For use under `jax.jit`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return state
    return jax.lax.with_sharding_constraint(state, state_sharding(state, mesh))
