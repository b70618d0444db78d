"""The pure training step: (state, batch) → (state, metrics). No files, no loop, no clock.

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
from jaxtyping import Array, Float

from dsv3_jax.config import RunConfig
from dsv3_jax.kernels.choose import Kernels, prepare
from dsv3_jax.kernels.cpu.draws import compile_lightly
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.mtp import HEADS, Head, token_counts
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.ops import balance
from dsv3_jax.training import lora, optim, qk_clip, schedules
from dsv3_jax.training.loss import Losses, compute_loss, over_parts, target_counts
from dsv3_jax.training.metrics import of_load, over_layers


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
    optimizer: optim.Transform = None  # in place of the run's own, see `optim.make`

    def chosen(self) -> Kernels:
        """The kernels."""
        return self.kernels or prepare(self.run.execution, mesh=self.mesh)


Batch = dict[str, Array]


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
    # Without a mesh committed to one device, as a restored state is: both use one compiled step.
    of = partial(sharding.state_sharding, mesh=job.mesh, fsdp=job.run.execution.layout.fsdp)
    where = of(jax.eval_shape(make, key, *given))
    given = jax.device_put(given, of(given), donate=True)
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
    params = nnx.merge_state(nnx.state(model, nnx.Param), params)
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
    return lora.split(params) if run.lora.rank else _split_moving(run, params)


def map_frozen(f: Callable, run: RunConfig, params: nnx.State) -> nnx.State:
    """Parameters with f(x) in place of each array x, or what there is for one, that does not train.

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


def _split_moving(run: RunConfig, variables: nnx.State) -> tuple[nnx.State, nnx.State]:
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


def make_step(job: Job) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Make the compiled step of a run, `step(state, batch, go=True)`; it donates the state.

    The gradient of a batch split in microbatches is that of the complete batch: sums over targets
    or tokens are divided by the complete batch's counts, and the sequence-wise loss by its rows. A
    microbatch has its own Switch loss, its own capacity of experts, and its own target of the rule
    "quantile"; of the first and the last the mean is taken. The bias is updated once, after the
    optimizer, by the load of the complete batch. A router's noise is that of the run's seed, the
    step and the row, in whatever part the row is. If the loss or a gradient is not finite, or `go`
    is False, the state does not change, and `finite` in the metrics is False. Given the last step's
    `finite` as `go`, a step may start before that is known, and changes nothing after a bad one. A
    step of GRPO without answers counts, but has nothing to learn from: neither momentum nor weight
    decay moves a weight.

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
    step = partial(_step, job, graph_of(job))
    return jax.jit(step, donate_argnums=0)


def _step(job: Job, graph: nnx.GraphDef, state: TrainState, batch: Batch, go: Array | bool = True):
    run = job.run
    cfg = job.run.optim
    trained, frozen = split_trainable(run, state.params)
    grads, out = _gradients(job, graph, trained, frozen, state, batch)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(out.total) & jnp.isfinite(norm) & go
    moves = finite & batch["loss_mask"].any() if run.grpo.group else finite
    move = optim.make(cfg, run.steps, job.chosen(), job.optimizer).update
    params, opt = move(state.step, trained, state.opt, grads, norm, moves)
    if cfg.qk_clip is not None:
        largest = {path: of["max_logit"] for path, of in out.metrics.items() if "max_logit" in of}
        params = qk_clip.clip(params, largest, cfg.qk_clip, run.model.nope_head_dim, moves)
    bias = state.bias
    rule = balance.rule_of(run.model)
    if rule is not None:
        gamma = schedules.bias_rate(cfg, run.model.balance.bias_rate, run.steps, state.step)
        moved = updated_bias(bias, out.load, jnp.where(moves, gamma, 0.0), rule, out.bias_measure)
        bias = nnx.merge_state(moved, _split_moving(run, bias)[1])
    params = nnx.merge_state(params, frozen)
    taken = state.step + finite.astype(jnp.int32)
    new = _constrain(job, replace(state, params=params, bias=bias, opt=opt, step=taken))
    metrics = _metrics(job, state, out, bias)
    return new, metrics | {"grad_norm": norm, "finite": finite}


def _metrics(job: Job, state: TrainState, out: Losses, bias: nnx.State) -> dict[str, Array]:
    run = job.run
    metrics = {
        "loss": out.main,
        "mtp_loss": out.mtp,
        "balance_loss": out.balance,
        "accuracy": out.accuracy,
        "load": out.load,
        **over_layers(out.metrics),
        **of_load(out.load),
    }
    if job.optimizer is None:  # a transformation has its own schedule
        metrics["lr"] = schedules.learning_rate(run.optim, run.steps, state.step)
    if run.model.mtp_depth and HEADS[run.model.mtp_kind].feature_loss is not Head.feature_loss:
        metrics["feature_loss"] = out.feature
    if out.load.shape[0] and balance.rule_of(run.model) is not None and run.model.balance.bias_rate:
        metrics["bias"] = jnp.concatenate([jnp.atleast_2d(v[...]) for _, v in _in_rows(bias)])
    return metrics


def _constrain(job: Job, tree: Any) -> Any:
    return sharding.constrain_state(tree, fsdp=job.run.execution.layout.fsdp)


def _gradients(
    job: Job,
    graph: nnx.GraphDef,
    trained: nnx.State,
    frozen: nnx.State,
    state: TrainState,
    batch: Batch,
) -> tuple[nnx.State, Losses]:
    """The gradient of a batch by what trains; its microbatches are read one after another."""
    run = job.run
    parts = job.run.optim.microbatches
    how: dict[str, Any] = {
        "counts": target_counts(
            batch["segment_ids"], 1 + run.model.mtp_depth, batch.get("loss_mask")
        ),
        "token_counts": token_counts(run.model, batch["segment_ids"]),
        "share": 1 / parts,
        "one_document": bool(run.grpo.group) or not run.data.separate_documents,
    }
    weight = schedules.mtp_weight(run.optim, run.steps, state.step) if run.trunk is None else None
    watch = () if run.optim.qk_clip is None else ("max_logit",)
    if run.model.attention == "dsa":
        watch += (f"index_{run.indexer_stage}",)
    how |= {
        "head_loss": run.head_loss,
        "watch": watch,
        "grpo": run.grpo if run.grpo.group else None,
    }

    def losses(trained: nnx.State, batch: Batch) -> tuple[Array, Losses]:
        model = nnx.merge(graph, lora.join(run.lora, nnx.merge_state(trained, frozen)), state.bias)
        out = compute_loss(model, batch, weight, **how)
        return out.total, out

    def add(total: nnx.State, part: Batch) -> tuple[nnx.State, Losses]:
        grads, out = grad(used, part)
        return _constrain(job, jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)), out

    grad = jax.grad(losses, has_aux=True)
    used = _cast_once(job, trained)
    if parts == 1:
        grads, out = grad(used, batch)
        return _constrain(job, jax.tree.map(lambda w, g: g.astype(w.dtype), trained, grads)), out
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    grads, outs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), split)
    return grads, over_parts(outs)


def _cast_once(job: Job, trained: nnx.State) -> nnx.State:
    """Matrices in the dtype of use, cast once a step: their gradients come in it, half as large.

    Under fsdp they are summed over devices in it, and the kernels for Hopper GPUs round those of
    experts, so nothing is rounded twice; other GPUs round those of experts here. Embeddings and
    routers stay exact.
    """
    run = job.run
    kernels = job.chosen()
    rounds = run.execution.layout.fsdp and sharding.on_mesh() or kernels.device.slices_experts
    if not rounds or run.lora.rank or run.execution.precision != "none":
        return trained

    def cast(v: nnx.Variable) -> nnx.Variable:
        stays = v.get_metadata().get("exact", False) or not sharding.names_of(v)
        return v if stays else v.replace(v[...].astype(run.execution.compute_dtype))

    return jax.tree.map(cast, trained, is_leaf=lambda v: isinstance(v, nnx.Variable))


def updated_bias(
    bias: nnx.State,
    load: Float[Array, "L E"],
    rate: Array,
    rule: balance.Rule,
    measure: Float[Array, "L E"] | None = None,
) -> nnx.State:
    """Update every router's loss-free bias by a rule.

    Args:
        load: of the trunk's sparse layers, then of the heads with experts.
        rate: γ.
        measure: what the rule needs beside the load, in the same rows.

    Example:
        >>> bias = RouterBias(jnp.zeros((1, 3)))  # one layer, three experts
        >>> bias = nnx.State({"sparse": {"bias": bias}})
        >>> load = jnp.array([[3.0, 2.0, 1.0]])
        >>> updated_bias(bias, load, jnp.float32(0.5), balance.RULES["sign"])["sparse"]["bias"][...]
        Array([[-0.5,  0. ,  0.5]], dtype=float32)
    """
    moved = []
    first = 0
    for path, variable in _in_rows(bias):
        before = jnp.atleast_2d(variable[...])
        rows = slice(first, first := first + len(before))
        own = None if measure is None else measure[rows]
        after = rule.update(before, load[rows], own, rate)
        moved.append((path, variable.replace(after.reshape(variable.shape))))
    return nnx.from_flat_state(moved)


def _in_rows(bias: nnx.State) -> list[tuple[tuple, nnx.Variable]]:
    """The routers' biases in the order of the load's rows: the trunk's layers, then the heads."""
    return sorted(
        nnx.to_flat_state(bias), key=lambda item: int(item[0][1]) if item[0][0] == "mtp" else -1
    )


def first_bad_tensor(job: Job, state: TrainState, batch: Batch) -> str:
    """Name the first tensor that is not finite: a parameter, else a gradient, else the loss.

    Example:
        >>> import dsv3_jax as ds
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> run = ds.replace(ds.recipe("tiny"), model=cfg)
        >>> shapes = abstract_state(Job(run))
        >>> state = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
        >>> first_bad_tensor(Job(run), state, batch={})  # a parameter is bad: no gradient is needed
        'parameter dense.attn.kv_norm.scale'
    """
    run = job.run
    job = Job(job.run)
    if bad := first_nonfinite("parameter", state.params):
        return bad
    parts = *split_trainable(run, state.params), state, batch
    grads, _ = jax.jit(partial(_gradients, job, graph_of(job)))(*parts)
    return first_nonfinite("gradient of", grads) or "the loss"


def first_nonfinite(kind: str, tree: nnx.State) -> str:
    """Name the first array whose norm is not finite in float32; "" if all are.

    The norm and not each number: a parameter of 1e30 is finite, but no product of it is.

    Example:
        >>> params = nnx.State({"attn": {"w_o": nnx.Param(jnp.full((2, 3), 1e30))}})
        >>> first_nonfinite("parameter", params)
        'parameter attn.w_o'
    """
    for path, x in nnx.to_flat_state(tree):
        if not jnp.isfinite(optax.tree.norm(x)):
            return f"{kind} {'.'.join(map(str, path))}"
    return ""
