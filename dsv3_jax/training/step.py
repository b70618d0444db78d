"""The pure training step: (state, batch) → (state, metrics). No files, no loop, no clock."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from dsv3_jax.mesh import sharding
from dsv3_jax.model.mtp import HEADS, Head, token_counts
from dsv3_jax.ops import balance
from dsv3_jax.training import lora, mup, optim, qk_clip, schedules
from dsv3_jax.training.loss import Losses, Part, compute_loss, over_parts, target_counts
from dsv3_jax.training.metrics import of_load, over_layers
from dsv3_jax.training.router_bias import in_rows, updated_bias
from dsv3_jax.training.state import (
    DeviceBatch,
    Job,
    TrainState,
    first_nonfinite,
    graph_of,
    split_moving,
    split_trainable,
)
from dsv3_jax.training.transformation import AtStep


def make_step(job: Job) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Make the compiled step of a run, `step(state, batch, go=True)`; it donates the state.

    The gradient of a batch split in microbatches is that of the complete batch: sums over targets
    or tokens are divided by the complete batch's counts, and the sequence-wise loss by its rows. A
    microbatch has its own Switch loss, its own capacity of experts, and its own target of the rule
    "quantile"; of the first and the last the mean is taken. The bias is updated once, after the
    optimizer, by the load of the complete batch.

    If the loss or a gradient is not finite, or `go` is False, the state does not change, and
    `finite` in the metrics is False. Given the last step's `finite` as `go`, a step may start
    before that is known, and changes nothing after a bad one. A step of GRPO without answers
    counts, but has nothing to learn from: neither momentum nor weight decay moves a weight.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.training.state import init_state
        >>> job = Job(ds.recipe("tiny"))
        >>> state, step = init_state(job), make_step(job)  # doctest: +SKIP
        >>> one = jnp.ones((8, 256), jnp.int32)  # B and T of the recipe
        >>> batch = {"tokens": one, "segment_ids": one, "positions": one.cumsum(1) - 1}
        >>> state, metrics = step(state, batch)  # doctest: +SKIP
        >>> int(state.step), bool(metrics["finite"])  # doctest: +SKIP
        (1, True)
    """
    job = replace(job, kernels=job.its_kernels())
    step = partial(_step, job, graph_of(job))
    return jax.jit(step, donate_argnums=0)


def _step(
    job: Job, graph: nnx.GraphDef, state: TrainState, batch: DeviceBatch, go: Array | bool = True
) -> tuple[TrainState, dict[str, Array]]:
    run = job.run
    cfg = job.run.optim

    # The gradient, and whether the step may move anything.
    trained, frozen = split_trainable(run, state.params)
    grads, out = _gradients(job, graph, trained, frozen, state, batch)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(out.total) & jnp.isfinite(norm) & go
    moves = finite & batch["loss_mask"].any() if run.grpo.group else finite

    # The weights: the optimizer, then QK-clip.
    optimizer = optim.make(cfg, run.steps, job.its_kernels(), job.optimizer, mup.growth(run))
    at = AtStep(state.step, norm, keep=moves, loss=out.total)
    params, opt = optimizer.update(at, trained, state.opt, grads)
    if cfg.qk_clip is not None:
        largest = {path: of["max_logit"] for path, of in out.metrics.items() if "max_logit" in of}
        params = qk_clip.clip(params, largest, cfg.qk_clip, run.model.nope_head_dim, moves)

    # The routers' biases, which have no gradient: a rule moves them by the load of this batch.
    bias = state.bias
    rule = balance.rule_of(run.model)
    if rule is not None:
        gamma = schedules.bias_rate(cfg, run.model.balance.bias_rate, run.steps, state.step)
        moved = updated_bias(bias, out.load, jnp.where(moves, gamma, 0.0), rule, out.bias_measure)
        bias = nnx.merge_state(moved, split_moving(run, bias)[1])

    # All as it was sharded before.
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
        metrics["bias"] = jnp.concatenate([jnp.atleast_2d(v[...]) for _, v in in_rows(bias)])
    return metrics


def _constrain(job: Job, tree: Any) -> Any:
    return sharding.constrain_state(tree, fsdp=job.run.execution.layout.fsdp)


def _gradients(
    job: Job,
    graph: nnx.GraphDef,
    trained: nnx.State,
    frozen: nnx.State,
    state: TrainState,
    batch: DeviceBatch,
) -> tuple[nnx.State, Losses]:
    """The gradient of a batch by what trains; its microbatches are read one after another."""
    run = job.run
    parts = job.run.optim.microbatches

    # Sums are divided by the counts of the complete batch, whichever part they are of.
    segment_ids = batch["segment_ids"]
    part = Part(
        target_counts(segment_ids, 1 + run.model.mtp_depth, batch.get("loss_mask")),
        token_counts(run.model, segment_ids),
        share=1 / parts,
    )

    # Some measures cost time, so they are made only if something needs them.
    watch = () if run.optim.qk_clip is None else ("max_logit",)
    if run.model.attention == "dsa":
        watch += (f"index_{run.indexer_stage}",)
    weight = schedules.mtp_weight(run.optim, run.steps, state.step) if run.trunk is None else None

    def losses(trained: nnx.State, batch: DeviceBatch) -> tuple[Array, Losses]:
        model = nnx.merge(graph, lora.join(run.lora, nnx.merge_state(trained, frozen)), state.bias)
        out = compute_loss(
            model, batch, weight,
            head_loss=run.head_loss,
            watch=watch,
            grpo=run.grpo if run.grpo.group else None,
            part=part,
            one_document=bool(run.grpo.group) or not run.data.separate_documents,
        )  # fmt: skip
        return out.total, out

    grad = jax.grad(losses, has_aux=True)
    used = _cast_once(job, trained)
    if parts == 1:
        grads, out = grad(used, batch)
        return _constrain(job, jax.tree.map(lambda w, g: g.astype(w.dtype), trained, grads)), out

    def add(total: nnx.State, piece: DeviceBatch) -> tuple[nnx.State, Losses]:
        grads, out = grad(used, piece)
        return _constrain(job, jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads)), out

    # Microbatches: a loop adds their gradients up, so that memory holds the activations of one.
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    grads, outs = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), split)
    return grads, over_parts(outs)


def _cast_once(job: Job, trained: nnx.State) -> nnx.State:
    """Cast matrices to the compute dtype before the gradient is taken, where this saves a copy.

    The gradient then comes in the compute dtype, half as large, and is widened once at the end.
    Under fsdp it is summed over devices in that dtype. On GPUs the experts' gradient is rounded to
    it anyway. Embeddings and routers stay exact.
    """
    run = job.run
    kernels = job.its_kernels()
    rounds = (run.execution.layout.fsdp and sharding.on_mesh()) or kernels.device.slices_experts
    if not rounds or run.lora.rank or run.execution.precision != "none":
        return trained

    def cast(v: nnx.Variable) -> nnx.Variable:
        stays = v.get_metadata().get("exact", False) or not sharding.names_of(v)
        return v if stays else v.replace(v[...].astype(run.execution.compute_dtype))

    return jax.tree.map(cast, trained, is_leaf=lambda v: isinstance(v, nnx.Variable))


def first_bad_tensor(job: Job, state: TrainState, batch: DeviceBatch) -> str:
    """Name the first tensor that is not finite: a parameter, else a gradient, else the loss.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.training.state import abstract_state
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
