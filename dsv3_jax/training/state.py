"""A run on its devices, and all that its training changes.

If a run has the trunk of another run (`RunConfig.trunk`), only the multi-token heads are trained.
The gradient is taken of their parameters only, so nothing runs backward through the trunk, and the
optimizer has no state for it. If a run has low-rank adapters (`RunConfig.lora`), they alone are
trained, see `lora`. In the warm-up of sparse attention (`RunConfig.indexer_stage`) it is the
indexers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from dsv3_jax.config import RunConfig
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.kernels.cpu.draws import compile_lightly
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.training import lora, mup, optim
from dsv3_jax.training.transformation import Transform


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "bias", "opt", "step", "start_bias"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All that training changes."""

    # Not annotated more closely: JAX and Orbax rebuild it with shapes, shardings and placeholders.

    # nnx.State; with LoRA, the adapters are beside the weights that they change, see `lora`
    params: Any
    bias: Any  # nnx.State: the router's correction biases
    opt: Any  # the optimizer's, of the parameters that train; see `optim`
    step: Any  # int32 []: optimizer steps taken
    # nnx.State: the start's router biases. Only for GRPO's KL with LoRA: its start is these and the
    # frozen weights
    start_bias: Any = ()


@dataclass(frozen=True)
class Job:
    """A run on its devices: all that its state and its compiled step depend on."""

    run: RunConfig
    mesh: Mesh | None = None  # None: a single device
    kernels: Kernels | None = None  # from `kernels.choose.prepare`; None: the default device's
    optimizer: Transform = None  # in place of the run's own, see `optim.make`

    def its_kernels(self) -> Kernels:
        """The kernels that were given, or else those of the run's execution on its mesh."""
        return self.kernels or prepare(self.run.execution, mesh=self.mesh)


DeviceBatch = dict[str, Array]


def graph_of(job: Job) -> nnx.GraphDef:
    """The model's structure without its arrays."""
    model = abstract(job.run.model, job.run.execution, job.kernels)
    return nnx.split(model, nnx.Param, RouterBias)[0]


def init_state(
    job: Job, params: nnx.State | None = None, bias: nnx.State | None = None
) -> TrainState:
    """Make the state of step 0 in one compiled program, sharded over the mesh.

    Args: params, bias: parameters and router biases of another run, donated; all others are drawn
        by the run's seed.

    Example:
        >>> import dsv3_jax as ds
        >>> state = init_state(Job(ds.recipe("tiny")))  # doctest: +SKIP
        >>> state.params["embed"].shape, int(state.step)  # doctest: +SKIP
        ((260, 128), 0)
    """
    make = partial(_make_state, job)
    key = jax.random.key(job.run.seed)
    given = params or nnx.State({}), bias or nnx.State({})

    # Each array is made where it stays: no device holds all of them.
    of = partial(sharding.state_sharding, mesh=job.mesh, fsdp=job.run.execution.layout.fsdp)
    where = of(jax.eval_shape(make, key, *given))
    given = jax.device_put(given, of(given), donate=True)

    # Without a mesh committed to one device, as a restored state is: both use one compiled step.
    device = jax.devices()[0] if job.mesh is None else job.mesh.devices.flat[0]
    return compile_lightly(make, device, out_shardings=where, donate_argnums=(1, 2))(key, *given)


def abstract_state(job: Job, frozen: Any = jnp.float32) -> TrainState:
    """The shapes of a run's state: nothing is allocated.

    Args: frozen: dtype of the weights that are frozen, which is that of the run or folder that they
        come from.

    Example:
        >>> import dsv3_jax as ds
        >>> abstract_state(Job(ds.recipe("v3"))).params["embed"].shape
        (129280, 7168)
    """
    state = jax.eval_shape(
        partial(_make_state, job), jax.random.key(job.run.seed), nnx.State({}), nnx.State({})
    )
    params = map_frozen(lambda x: jax.ShapeDtypeStruct(x.shape, frozen), job.run, state.params)
    return replace(state, params=params)


def _make_state(job: Job, key: Array, params: nnx.State, bias: nnx.State) -> TrainState:
    model = Transformer(job.run.model, rngs=nnx.Rngs(key), kernels=optim.XLA)

    # Adapters are made for the weights that they will change.
    drawn = mup.scale_initial(nnx.state(model, nnx.Param), mup.growth(job.run))
    params = nnx.merge_state(drawn, params)
    params = nnx.merge_state(params, lora.init(job.run.lora, params, key))

    bias = nnx.merge_state(nnx.state(model, RouterBias), bias)
    start_bias = bias if job.run.grpo.kl and job.run.lora.rank else ()
    opt = init_optimizer(job, params)
    return TrainState(params, bias, opt, jnp.zeros((), jnp.int32), start_bias)


def init_optimizer(job: Job, params: nnx.State) -> Any:
    """The optimizer's state at step 0.

    Example:
        >>> import dsv3_jax as ds
        >>> job = Job(ds.recipe("tiny"))
        >>> params = abstract_state(job).params
        >>> state = jax.eval_shape(lambda params: init_optimizer(job, params), params)
        >>> state.mu["embed"].shape
        (260, 128)
    """
    run = job.run
    optimizer = optim.make(run.optim, run.steps, transformation=job.optimizer)
    return optimizer.init(split_trainable(run, params)[0])


def split_trainable(run: RunConfig, params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Split parameters into those that a run trains and frozen ones.

    Example:
        >>> import dsv3_jax as ds
        >>> run = ds.recipe("tiny")
        >>> params = abstract_state(Job(run)).params
        >>> trained, frozen = split_trainable(ds.replace(run, trunk="runs/demo"), params)
        >>> list(trained), "mtp" in frozen
        (['mtp'], False)
    """
    return lora.split(params) if run.lora.rank else split_moving(run, params)


def map_frozen(f: Callable, run: RunConfig, params: nnx.State) -> nnx.State:
    """Apply f to each frozen parameter: an array, or what takes its place. Others stay as they are.

    Example:
        >>> import dsv3_jax as ds
        >>> run = ds.recipe("tiny")
        >>> params = nnx.State({name: nnx.Param(jnp.zeros(1)) for name in ("w", "mtp")})
        >>> changed = map_frozen(lambda x: x + 1, ds.replace(run, trunk="runs/demo"), params)
        >>> changed["w"][...], changed["mtp"][...]
        (Array([1.], dtype=float32), Array([0.], dtype=float32))
    """
    trained, frozen = split_trainable(run, params)
    return nnx.merge_state(trained, jax.tree.map(f, frozen))


def split_moving(run: RunConfig, variables: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Split variables into what a run without adapters may change and what is frozen."""
    if run.indexer_stage == "warm":
        indexers, rest = nnx.split_state(variables, lambda path, _: "indexer" in path, ...)
        return indexers, rest
    return (variables, nnx.State({})) if run.trunk is None else split_heads(variables)


def split_heads(variables: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The multi-token heads' variables, and all others."""
    heads, trunk = nnx.split_state(variables, lambda path, _: path[0] == "mtp", ...)
    return heads, trunk


def model_of(job: Job, state: TrainState) -> Transformer:
    """The model that a state of a run holds.

    Example:
        >>> import dsv3_jax as ds
        >>> job = Job(ds.recipe("tiny"))
        >>> model = model_of(job, abstract_state(job))  # of shapes alone
        >>> model.embed.shape
        (260, 128)
    """
    return nnx.merge(graph_of(job), lora.join(job.run.lora, state.params), state.bias)


def first_nonfinite(kind: str, tree: nnx.State) -> str:
    """Name the first array whose norm is not finite in float32; "" if all are.

    The norm and not each number: a parameter of 1e30 is finite, but no product of it is.

    Example:
        >>> params = nnx.State({"attn": {"w_o": nnx.Param(jnp.full((2, 3), 1e30))}})
        >>> first_nonfinite("parameter", params)
        'parameter attn.w_o'
    """
    for path, x in nnx.to_flat_state(tree):
        if not jnp.isfinite(norm(x)):
            return f"{kind} {'.'.join(map(str, path))}"
    return ""


def norm(tree: Any) -> Array:
    """The norm of all arrays together, in float32 whatever their dtypes.

    Example:
        >>> norm({"mean": jnp.array([3.0], jnp.bfloat16), "w": jnp.array([4.0])})
        Array(5., dtype=float32)
    """
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
