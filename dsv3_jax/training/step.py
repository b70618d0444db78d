"""The pure training step: (state, batch) → (state, metrics). No files, no loop, no clock.

Where a run has a trunk of another run's (`RunConfig.trunk`), the multi-token heads alone are trained: the gradient is
taken of their parameters only, so that nothing runs backwards through the trunk, and the optimizer knows no others.
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

from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.mesh import sharding
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.ops import balance
from dsv3_jax.training import optim
from dsv3_jax.training.loss import Losses, losses, target_counts


@partial(jax.tree_util.register_dataclass, data_fields=["params", "bias", "opt", "step"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """All that training changes."""

    # Not annotated more closely: JAX and Orbax rebuild it with shapes, shardings and placeholders in its places.
    params: Any  # nnx.State
    bias: Any  # nnx.State: the router's correction biases
    opt: Any  # optim.AdamState, of the parameters that train
    step: Any  # int32 []: optimizer steps taken


Batch = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def graph_of(cfg: ModelConfig) -> nnx.GraphDef:
    """The model's structure without its arrays."""
    return nnx.split(abstract(cfg), nnx.Param, RouterBias)[0]


def init_state(run: RunConfig, mesh: Mesh | None = None, trunk: TrainState | None = None) -> TrainState:
    """A fresh state from the run's seed, made in one compiled program, each array where the mesh wants it.

    With `trunk` everything but the multi-token heads is that state's.
    """

    def make(key: Array) -> TrainState:
        state = _initialiser(run)(key)
        return state if trunk is None else replace(state, params=_cut(state.params)[0], bias=_cut(state.bias)[0])

    # On CPU a light compilation: the many random draws take longer to optimise than to run.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    key = jax.random.key(run.seed)
    fsdp = run.model.layout.fsdp
    where = None if mesh is None else sharding.state_sharding(jax.eval_shape(make, key), mesh, fsdp=fsdp)
    state = jax.jit(make, compiler_options=options, out_shardings=where)(key)
    if trunk is None:
        return state
    params, bias = (nnx.merge_state(_cut(t)[1], h) for t, h in ((trunk.params, state.params), (trunk.bias, state.bias)))
    return replace(state, params=params, bias=bias)


def abstract_state(run: RunConfig) -> TrainState:
    """The shapes of a run's state: nothing is allocated."""
    return jax.eval_shape(_initialiser(run), jax.random.key(run.seed))


def _initialiser(run: RunConfig) -> Callable[[Array], TrainState]:
    def make(key: Array) -> TrainState:
        model = Transformer(run.model, rngs=nnx.Rngs(key))
        params, bias = nnx.state(model, nnx.Param), nnx.state(model, RouterBias)
        return TrainState(params, bias, optim.init(trained_and_held(run, params)[0]), jnp.zeros((), jnp.int32))

    return make


def trained_and_held(run: RunConfig, variables: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Parameters, or biases, that a run trains, and those that it holds still."""
    return (variables, nnx.State({})) if run.trunk is None else _cut(variables)


def _cut(variables: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Those of the multi-token heads, and all others."""
    heads, trunk = nnx.split_state(variables, lambda path, _: path[0] == "mtp", ...)
    return heads, trunk


def model_of(cfg: ModelConfig, state: TrainState) -> Transformer:
    """The model that a state holds."""
    return nnx.merge(graph_of(cfg), state.params, state.bias)


def make_step(run: RunConfig) -> Step:
    """The compiled step of a run; the state it is given is donated.

    The gradient of a batch cut in microbatches is that of the whole batch: sums are divided by the whole batch's
    target counts, and balance losses by the number of parts (so the batch-wise Switch loss is a mean over
    microbatches). The bias moves once, after the optimizer, by the load of the whole batch. Where the loss or a
    gradient is not finite the state stays as it was, and `finite` in the metrics is False.
    """
    graph, parts, heads_only = graph_of(run.model), run.optim.microbatches, run.trunk is not None
    in_place = partial(sharding.keep_in_place, fsdp=run.model.layout.fsdp)

    def part_losses(trained, held, bias, batch, weight, counts):
        model = nnx.merge(graph, trained, held, bias)
        out = losses(model, batch, weight, counts=counts, share=1 / parts, heads_only=heads_only)
        return out.total, out

    def gradients(trained, held, bias, batch: Batch, weight) -> tuple[nnx.State, Losses]:
        counts = target_counts(batch["segment_ids"], 1 + run.model.mtp_depth)
        grad = jax.grad(part_losses, has_aux=True)
        if parts == 1:
            grads, out = grad(trained, held, bias, batch, weight, counts)
            return in_place(grads), out

        def add(total, part):
            grads, out = jax.tree.map(jnp.add, total, grad(trained, held, bias, part, weight, counts))
            return (in_place(grads), out), None

        cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(grad, trained, held, bias, jax.tree.map(lambda x: x[0], cut), weight, counts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, cut)[0]

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch):
        weight = optim.mtp_weight(run.optim, run.steps, state.step)
        trained, held = trained_and_held(run, state.params)
        grads, out = gradients(trained, held, state.bias, batch, weight)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(out.total) & jnp.isfinite(norm)
        params, opt = optim.adamw(run.optim, run.steps, state.step, trained, state.opt, grads, norm, finite)
        rate = jnp.where(finite, optim.bias_rate(run.optim, _bias_rate(run.model), run.steps, state.step), 0.0)
        moving, still = trained_and_held(run, state.bias)
        bias = nnx.merge_state(updated_bias(moving, out.load, rate), still)
        params = nnx.merge_state(params, held)
        new = in_place(TrainState(params, bias, opt, state.step + finite.astype(jnp.int32)))
        metrics = {
            "loss": out.main,
            "mtp_loss": out.mtp,
            "balance_loss": out.balance,
            "accuracy": out.accuracy,
            "grad_norm": norm,
            "lr": optim.learning_rate(run.optim, run.steps, state.step),
            "load": out.load,
            "dropped": out.dropped,
            "crossed": out.crossed,
            "finite": finite,
        }
        if run.model.mtp_kind == "eagle" and run.model.mtp_depth:
            metrics["feature_loss"] = out.feature
        return new, metrics

    return step


def _bias_rate(cfg: ModelConfig) -> float:
    return cfg.balance.bias_rate if cfg.router == "sigmoid" else 0.0  # no other router has a bias to choose by


def updated_bias(bias: nnx.State, load: Float[Array, "L E"], rate: Array) -> nnx.State:
    """Every router's bias after a loss-free update; `load`: the trunk's sparse layers, then the heads with experts."""
    trunk = load.shape[0]
    flat = dict(nnx.to_flat_state(bias))
    trunk -= sum(path[0] == "mtp" for path in flat)
    for path, variable in flat.items():
        part = load[trunk + int(str(path[1]))] if path[0] == "mtp" else load[:trunk]
        flat[path] = variable.replace(balance.bias_update(variable[...], part, rate))
    return nnx.from_flat_state(flat)


def first_bad_tensor(run: RunConfig, state: TrainState, batch: Batch) -> str:
    """Name the first tensor that is not finite: a parameter, else a gradient of this batch, else the loss itself."""
    graph = graph_of(run.model)
    trained, held = trained_and_held(run, state.params)

    def total(trained):
        weight = optim.mtp_weight(run.optim, run.steps, state.step)
        model = nnx.merge(graph, trained, held, state.bias)
        return losses(model, batch, weight, heads_only=run.trunk is not None).total

    def first(kind: str, tree) -> str | None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not bool(jnp.isfinite(leaf).all()):
                return f"{kind} {'.'.join(str(k.key) for k in path if hasattr(k, 'key'))}"
        return None

    bad = first("parameter", state.params)
    return bad or first("gradient of", jax.jit(jax.grad(total))(trained)) or "the loss"
