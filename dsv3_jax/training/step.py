"""The pure training step: (state, batch) → (state, metrics). No files, no loop, no clock.

If a run has the trunk of another run (`RunConfig.trunk`), only the multi-token heads are trained. The gradient is taken
of their parameters only, so nothing runs backward through the trunk, and the optimizer has no state for it. If a run
has low-rank adapters (`RunConfig.lora`), they alone are trained, see `lora`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Float

from dsv3_jax.config import RunConfig
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.kernels.xla_flags import Options, compile_lightly
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.mtp import HEADS, Head
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.ops import balance, routing
from dsv3_jax.training import lora, optim, qk_clip
from dsv3_jax.training.finite import first_nonfinite
from dsv3_jax.training.loss import Losses, Objective, add_parts, compute_loss, target_counts
from dsv3_jax.training.metrics import empty, logged


@partial(jax.tree_util.register_dataclass, data_fields=["params", "bias", "opt", "step"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """All that training changes."""

    # Not annotated more closely: JAX and Orbax rebuild it with shapes, shardings and placeholders in its places.
    params: Any  # nnx.State; with LoRA, the adapters are beside the weights that they change, see `lora`
    bias: Any  # nnx.State: the router's correction biases
    opt: Any  # the optimizer's, of the parameters that train; see `optim.Optimizer.init`
    step: Any  # int32 []: optimizer steps taken


@dataclass(frozen=True)
class Job:
    """A run on its devices: all that its state and its compiled step depend on."""

    run: RunConfig
    mesh: Mesh | None = None  # None: a single device
    kernels: Kernels | None = None  # from `kernels.choose.prepare`; None: those of the default device
    optimizer: optax.GradientTransformation | None = None  # in place of the run's own, see `optim.make`
    options: Options = ()  # of the compiler, see `kernels.xla_flags`

    def chosen(self) -> Kernels:
        """The kernels."""
        return self.kernels or prepare(self.run.execution, mesh=self.mesh)


Batch = dict[str, Array]
Step = Callable[..., tuple[TrainState, dict[str, Array]]]


def graph_of(job: Job) -> nnx.GraphDef:
    """The model's structure without its arrays."""
    return nnx.split(abstract(job.run.model, job.run.execution, job.kernels), nnx.Param, RouterBias)[0]


def init_state(job: Job, trunk: tuple[nnx.State, nnx.State] | None = None) -> TrainState:
    """Make a fresh state from the run's seed in one compiled program, sharded over the mesh.

    Args: trunk: parameters and router biases from which everything but the multi-token heads is taken.

    Example:
        >>> import dsv3_jax as ds
        >>> state = init_state(Job(ds.recipe("tiny")))  # doctest: +SKIP
        >>> state.params["embed"].shape, int(state.step)  # doctest: +SKIP
        ((260, 128), 0)
    """

    def make(key: Array) -> TrainState:
        state = _initialiser(job)(key)
        return state if trunk is None else replace(state, params=_split(state.params)[0], bias=_split(state.bias)[0])

    run, mesh = job.run, job.mesh
    key = jax.random.key(run.seed)
    fsdp = run.execution.layout.fsdp
    # On a device of its own as a restored state is: the step's program is then the same, and is compiled once.
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    where: Any = SingleDeviceSharding(device)
    if mesh is not None:
        where = sharding.state_sharding(jax.eval_shape(make, key), mesh, fsdp=fsdp)
    state = compile_lightly(make, device, out_shardings=where)(key)
    if trunk is None:
        return state
    params, bias = (nnx.merge_state(_split(t)[1], h) for t, h in zip(trunk, (state.params, state.bias), strict=True))
    return replace(state, params=params, bias=bias)


def abstract_state(job: Job) -> TrainState:
    """The shapes of a run's state: nothing is allocated.

    Example:
        >>> import dsv3_jax as ds
        >>> abstract_state(Job(ds.recipe("v3"))).params["embed"].shape
        (129280, 7168)
    """
    return jax.eval_shape(_initialiser(job), jax.random.key(job.run.seed))


def _initialiser(job: Job) -> Callable[[Array], TrainState]:
    def make(key: Array) -> TrainState:
        run = job.run
        model = Transformer(run.model, rngs=nnx.Rngs(key), kernels=optim.XLA)
        params, bias = nnx.state(model, nnx.Param), nnx.state(model, RouterBias)
        params = nnx.merge_state(params, lora.init(run.lora, params, key))
        opt = init_optimizer(job, params)
        return TrainState(params, bias, opt, jnp.zeros((), jnp.int32))

    return make


def init_optimizer(job: Job, params: nnx.State) -> Any:
    """The optimizer's state at step 0.

    Example:
        >>> import dsv3_jax as ds
        >>> job = Job(ds.recipe("tiny"))
        >>> jax.eval_shape(lambda params: init_optimizer(job, params), abstract_state(job).params).mu["embed"].shape
        (260, 128)
    """
    run = job.run
    return optim.make(run.optim, run.steps, transformation=job.optimizer).init(split_trainable(run, params)[0])


def split_trainable(run: RunConfig, params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Split parameters into those that a run trains and frozen ones.

    Example:
        >>> import dsv3_jax as ds
        >>> run = ds.recipe("tiny")
        >>> trained, frozen = split_trainable(ds.replace(run, trunk="runs/demo"), abstract_state(Job(run)).params)
        >>> list(trained), "mtp" in frozen
        (['mtp'], False)
    """
    return lora.split(params) if run.lora.rank else _split_moving(run, params)


def _split_moving(run: RunConfig, variables: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Split variables into those that a run without adapters may change and those of a frozen trunk."""
    return (variables, nnx.State({})) if run.trunk is None else _split(variables)


def _split(variables: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Those of the multi-token heads, and all others."""
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


def make_step(job: Job) -> Step:
    """Make the compiled step of a run, `step(state, batch, go=True)`; the state it is given is donated.

    The gradient of a batch split in microbatches is that of the complete batch: sums are divided by the complete
    batch's target counts. Balance losses are divided by the number of parts, so the batch-wise Switch loss is a mean
    over microbatches. The bias is updated once, after the optimizer, by the load of the complete batch. A router's
    noise is that of the run's seed, the step and the row, in whatever part the row is. If the loss or
    a gradient is not finite, or `go` is False, the state does not change, and `finite` in the metrics is False. Given
    the last step's `finite` as `go`, a step may start before that is known, and changes nothing after a bad one.

    Example:
        >>> import dsv3_jax as ds
        >>> job = Job(ds.recipe("tiny"))
        >>> state, step = init_state(job), make_step(job)  # doctest: +SKIP
        >>> one = jnp.ones((8, 256), jnp.int32)  # B and T of the recipe
        >>> batch = {"tokens": one, "segment_ids": one, "positions": one.cumsum(1) - 1}
        >>> state, metrics = step(state, batch)  # doctest: +SKIP
        >>> int(state.step), bool(metrics["finite"])  # doctest: +SKIP
        (1, True)
    """
    job = replace(job, kernels=job.chosen())
    graph = graph_of(job)

    @partial(jax.jit, donate_argnums=0, compiler_options=dict(job.options) or None)
    def step(state: TrainState, batch: Batch, go: Array | bool = True):
        return _step(job, graph, state, batch, go)

    return step


def _step(job: Job, graph: nnx.GraphDef, state: TrainState, batch: Batch, go: Array | bool):
    run, cfg = job.run, job.run.optim
    batch = _with_keys(run, batch, state.step)
    trained, frozen = split_trainable(run, state.params)
    grads, out = _gradients(job, graph, trained, frozen, state, batch)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(out.total) & jnp.isfinite(norm)
    if go is not True:
        finite &= go
    move = optim.make(cfg, run.steps, job.chosen(), job.optimizer).update
    params, opt = move(state.step, trained, state.opt, grads, norm, finite)
    if cfg.qk_clip is not None:
        largest = {path: of["max_logit"] for path, of in out.metrics.items() if "max_logit" in of}
        params = qk_clip.clip(params, largest, cfg.qk_clip, run.model.nope_head_dim, finite)
    bias, rule = state.bias, balance.rule_of(run.model)
    if rule is not None:
        gamma = optim.bias_rate(cfg, run.model.balance.bias_rate, run.steps, state.step)
        updated, fixed = _split_moving(run, bias)
        moved = updated_bias(updated, out.load, jnp.where(finite, gamma, 0.0), rule, out.bias_measure)
        bias = nnx.merge_state(moved, fixed)
    params = nnx.merge_state(params, frozen)
    new = TrainState(params, bias, opt, state.step + finite.astype(jnp.int32))
    return _constrain(job, new), _metrics(job, state, out) | {"grad_norm": norm, "finite": finite}


def _metrics(job: Job, state: TrainState, out: Losses) -> dict[str, Array]:
    run = job.run
    metrics = {
        "loss": out.main,
        "mtp_loss": out.mtp,
        "balance_loss": out.balance,
        "accuracy": out.accuracy,
        "load": out.load,
        **logged(out.metrics),
    }
    if job.optimizer is None:  # a transformation has a schedule of its own
        metrics["lr"] = optim.learning_rate(run.optim, run.steps, state.step)
    if run.model.mtp_depth and HEADS[run.model.mtp_kind].feature_loss is not Head.feature_loss:
        metrics["feature_loss"] = out.feature
    return metrics


def _constrain(job: Job, tree: Any) -> Any:
    return sharding.constrain_state(tree, fsdp=job.run.execution.layout.fsdp)


def _losses(job: Job, graph: nnx.GraphDef, frozen: nnx.State, state: TrainState, counts: Array | None = None):
    """Make the loss that a step minimises: (parameters that train, batch) → (total, `Losses`)."""
    run = job.run
    weight = optim.mtp_weight(run.optim, run.steps, state.step)
    watch = () if run.optim.qk_clip is None else ("max_logit",)
    objective = Objective(run.trunk is not None, run.head_loss, watch)

    def losses(trained: nnx.State, batch: Batch) -> tuple[Array, Losses]:
        model = nnx.merge(graph, lora.join(run.lora, nnx.merge_state(trained, frozen)), state.bias)
        out = compute_loss(model, batch, weight, objective, counts=counts, share=1 / run.optim.microbatches)
        return out.total, out

    return losses


def _gradients(
    job: Job, graph: nnx.GraphDef, trained: nnx.State, frozen: nnx.State, state: TrainState, batch: Batch
) -> tuple[nnx.State, Losses]:
    """The gradient of a batch, whose microbatches are read one after the other."""
    parts = job.run.optim.microbatches
    counts = target_counts(batch["segment_ids"], 1 + job.run.model.mtp_depth, batch.get("loss_mask"))
    grad = jax.grad(_losses(job, graph, frozen, state, counts), has_aux=True)
    if parts == 1:
        grads, out = grad(trained, batch)
        return _constrain(job, grads), out

    def add(total, part):
        grads, out = grad(trained, part)
        return (_constrain(job, jax.tree.map(jnp.add, total[0], grads)), add_parts(total[1], out)), None

    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    shapes = jax.eval_shape(grad, trained, jax.tree.map(lambda x: x[0], split))
    grads, out = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, (grads, out._replace(metrics=empty(out.metrics))), split)[0]


def _with_keys(run: RunConfig, batch: Batch, step: Array) -> Batch:
    """The batch with a random key for each row, of the run's seed, the step and the row, if the router has noise."""
    if not routing.ROUTERS[run.model.router].has_noise:
        return batch
    of_run = jax.random.fold_in(jax.random.key(run.seed), _NOISE)
    return batch | {"keys": jax.random.split(jax.random.fold_in(of_run, step), len(batch["tokens"]))}


_NOISE = 0x4E4F4953  # apart from the keys of the initial weights, which are numbered from 0


def updated_bias(
    bias: nnx.State,
    load: Float[Array, "L E"],
    rate: Array,
    rule: balance.Rule = balance.RULES["sign"],
    measure: Float[Array, "L E"] | None = None,
) -> nnx.State:
    """Update every router's loss-free bias by a rule.

    Args:
        load: of the trunk's sparse layers, then of the heads with experts.
        rate: γ.
        measure: what the rule needs beside the load, in the same rows.

    Example:
        >>> bias = nnx.State({"sparse": {"bias": RouterBias(jnp.zeros((1, 3)))}})  # one layer, three experts
        >>> load = jnp.array([[3.0, 2.0, 1.0]])
        >>> updated_bias(bias, load, jnp.float32(0.5))["sparse"]["bias"][...]
        Array([[-0.5,  0. ,  0.5]], dtype=float32)
    """
    trunk = load.shape[0]
    flat = dict(nnx.to_flat_state(bias))
    trunk -= sum(path[0] == "mtp" for path in flat)
    for path, variable in flat.items():
        rows = trunk + int(str(path[1])) if path[0] == "mtp" else slice(trunk)
        own = None if measure is None else measure[rows]
        flat[path] = variable.replace(rule.update(variable[...], load[rows], own, rate))
    return nnx.from_flat_state(flat)


def first_bad_tensor(job: Job, state: TrainState, batch: Batch) -> str:
    """Name the first tensor that is not finite: a parameter, else a gradient of this batch, else the loss itself.

    Example:
        >>> import dsv3_jax as ds
        >>> run = ds.replace(ds.recipe("tiny"), model=ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0))
        >>> state = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), abstract_state(Job(run)))
        >>> first_bad_tensor(Job(run), state, batch={})  # no gradient is computed: a parameter is bad
        'parameter dense.attn.kv_norm.scale'
    """
    trained, frozen = split_trainable(job.run, state.params)
    batch, job = _with_keys(job.run, batch, state.step), Job(job.run)
    if bad := first_nonfinite({"parameter": state.params}):
        return bad
    grads, _ = jax.jit(jax.grad(_losses(job, graph_of(job), frozen, state), has_aux=True))(trained, batch)
    return first_nonfinite({"gradient of": grads}) or "the loss"
