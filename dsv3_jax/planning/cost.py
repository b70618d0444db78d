"""What a model on a mesh costs: what each device holds, computes and sends in a step, before any device is there.

Lowers and compiles the training step and the decoding step themselves, from shapes alone: no weight is allocated. What
each figure is:

    held          exact: the shards of parameters, optimizer state and cache, as the mesh cuts them
    FLOPs         by formula: 2 a parameter and token forward, 4 backward, and the scores of attention
    sent          every collective of the program, with its loops' lengths, by ring formulas (`hlo.py`); loops whose
                  length hangs on the data, as further rounds of an all-to-all under uneven load, stand apart
    temporaries   the compiler's own sum of all else that is alive at the worst moment

On fake CPU devices two things differ from an accelerator. The CPU's compiler makes float32 of bfloat16: collectives are
therefore read before it does, and its temporaries are more than an accelerator's. And experts run in blocks there,
where `ragged_dot` would have a layer's experts in bfloat16 and all rows at once. A TPU target has neither difference:
its own compiler's word is then what is printed.
"""

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, ModelConfig, RunConfig
from dsv3_jax.mesh import sharding
from dsv3_jax.model.cache import empty_cache, pick_kind
from dsv3_jax.model.counting import distinct_experts, size, train_flops_per_token
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.transformer import abstract
from dsv3_jax.planning.devices import Device
from dsv3_jax.planning.hlo import Traffic, compile_in_sight, traffic
from dsv3_jax.training.step import abstract_state, make_step, trained_and_held


@dataclass(frozen=True)
class Cost:
    """What one program costs each device, a step."""

    program: str
    mesh: dict[str, int]
    tokens: int  # of the whole mesh
    held: dict[str, int]  # bytes by kind, from before the step to after it
    made: dict[str, int]  # bytes by kind, of known size, that the step makes and drops: part of the temporaries
    flops: float
    reads: float  # bytes that must be read from memory; 0 where that bounds nothing
    temporaries: int | None  # bytes; None where the compiler gave up
    sent: Traffic
    seconds: float  # to lower and compile
    refused: str = ""  # why the compiler gave up
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes of memory at the worst moment; what is held and made alone where the compiler gave up."""
        made = sum(self.made.values())
        return sum(self.held.values()) + (made if self.temporaries is None else max(self.temporaries, made))

    def fits(self, memory: float) -> bool:
        return not self.refused and self.total <= memory

    def least_seconds(self, device: Device) -> dict[str, float]:
        """What a step of such devices would take if one thing were all that it waits for, at their makers' figures."""
        return {
            "FLOPs": self.flops / device.flops,
            "memory": self.reads / device.memory_bandwidth,
            "wire": sum((c.wire / _bandwidth(device, c.devices) for c in self.sent.known().collectives), 0.0),
        }


def _bandwidth(device: Device, members: tuple[int, ...]) -> float:
    """Of a ring of those members: its slowest link."""
    inside = device.node is None or len({m // device.node for m in members}) == 1
    return device.link if inside else device.network


def train_cost(run: RunConfig, mesh: Mesh, *, target: str | None = None) -> Cost:
    """The cost of a run's training step on a mesh; nothing is allocated.

    Args:
        run: its batch is what the step takes.
        mesh: of fake devices, or of a TPU topology.
        target: set where it is the latter.
    Raises: ConfigError where batch or experts cannot be cut over the mesh.
    """
    sharding.check(mesh, run)
    run = replace(run, model=_for(run.model, target))
    fsdp = run.model.layout.fsdp
    state = _placed(shapes := abstract_state(run), sharding.state_sharding(shapes, mesh, fsdp=fsdp))
    tokens = jax.ShapeDtypeStruct(
        (run.data.batch_size, run.data.seq_len), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    batch = {name: tokens for name in ("tokens", "segment_ids", "positions")}
    held = {
        **_by_kind(state.params),
        "router bias": _bytes(state.bias),
        "optimizer": _bytes(state.opt),
        "batch": _bytes(batch) + _bytes(state.step),
    }
    gradients = _bytes(trained_and_held(run, state.params)[0]) * (2 if run.optim.microbatches > 1 else 1)
    count = run.data.batch_size * run.data.seq_len
    flops = _train_flops(run.model, run.data.seq_len) * count / mesh.size
    program = "training step"
    return _compiled(
        program, mesh, target, make_step(run), (state, batch),
        tokens=count, held=held, made={"gradients": gradients}, flops=flops, reads=0.0,
    )  # fmt: skip


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a mesh cuts a batch."""
    return math.prod(mesh.shape[axis] for axis in sharding.ROWS)


def check_decode(cfg: ModelConfig, mesh: Mesh, batch: int, context: int) -> None:
    """Refuse a decoding step that a mesh cannot run.

    Raises: ConfigError where batch, experts or heads cannot be cut over the mesh, or the context is beyond
        max_positions.
    """
    parts = batch_parts(mesh)
    if batch < 1 or batch % parts:
        raise ConfigError(f"decode_batch={batch} is not divisible by the {parts} parts of mesh {sharding.spell(mesh)}")
    if not 0 < context <= cfg.max_positions:
        raise ConfigError(f"context={context} is not within 1 and the model's max_positions={cfg.max_positions}")
    sharding.check_model(mesh, cfg)


def decode_cost(
    cfg: ModelConfig,
    mesh: Mesh,
    batch: int,
    context: int,
    *,
    weight_dtype: str | None = None,
    target: str | None = None,
) -> Cost:
    """The cost of a step of plain decoding, a token for each sequence; nothing is allocated.

    Args:
        batch: sequences, cut over the mesh as a batch is.
        context: tokens of each that the cache has room for, and holds.
        weight_dtype: None is the model's compute dtype.
    Raises: ConfigError as `check_decode`.
    """
    check_decode(cfg, mesh, batch, context)
    rows = sharding.batch_sharding(mesh)
    cfg = replace(_for(cfg, target), mtp_depth=0)  # nobody drafts
    dtype = jnp.dtype(weight_dtype or cfg.compute_dtype)
    graph, *variables = nnx.split(abstract(cfg), nnx.Param, RouterBias)
    params, bias = variables
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), params)
    params, bias = (_placed(v, sharding.state_sharding(v, mesh, fsdp=cfg.layout.fsdp)) for v in (params, bias))
    kind = pick_kind(cfg, None)
    shapes = jax.eval_shape(
        lambda: empty_cache(cfg, cfg.num_layers, batch, context, kind, jnp.dtype(cfg.compute_dtype))
    )
    over = NamedSharding(mesh, P(None, *rows.spec))
    where = replace(shapes, stored=jax.tree.map(lambda _: over, shapes.stored), tokens=rows, lengths=rows)
    cache = _placed(shapes, where)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=rows)

    def step(params, bias, cache, tokens):
        model = nnx.merge(graph, params, bias)
        x, cache = model.decode(tokens, cache)
        logits = model.next_logits(model.norm(x))
        cache = replace(cache, lengths=cache.lengths + 1)
        return jax.lax.with_sharding_constraint(jnp.argmax(logits, axis=-1), rows), _held_to(cache, where)

    weights = _by_kind(params)
    held = {**weights, "router bias": _bytes(bias), "cache": _bytes(cache), "batch": _bytes(tokens)}
    reached = distinct_experts(cfg, batch * mesh.shape["expert"] // mesh.size) / cfg.num_experts
    experts = weights.get("routed experts", 0)
    reads = sum(weights.values()) - experts * (1 - reached) + _bytes(cache)
    flops = batch * (2 * size(cfg).active + _decode_attention_flops(cfg, context)) / mesh.size
    return _compiled(
        "decoding step", mesh, target, jax.jit(step, donate_argnums=2), (params, bias, cache, tokens),
        tokens=batch, held=held, made={}, flops=flops, reads=reads,
    )  # fmt: skip


def _compiled(program: str, mesh: Mesh, target: str | None, function, args: tuple, **known) -> Cost:
    """`known`: all of a Cost that needs no compiler."""
    start = time.perf_counter()
    refused, notes, temporaries, sent = "", [], None, Traffic([], 0)
    with jax.set_mesh(mesh):
        lowered = function.lower(*args)
    try:
        if target is None:
            compiled, text = compile_in_sight(lowered)
        else:
            compiled = lowered.compile()
            text = compiled.as_text() or ""
        analysis: Any = compiled.memory_analysis()
        temporaries, sent = analysis.temp_size_in_bytes, traffic(text, mesh.shape)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = " ".join(str(error).split("See https")[0].split())
    if target is None:
        notes.append("compiled for CPU: temporaries hold bfloat16 as float32, and experts run in blocks")
    seconds = time.perf_counter() - start
    return Cost(
        program, dict(mesh.shape), temporaries=temporaries, sent=sent, seconds=seconds, refused=refused, notes=notes,
        **known,
    )  # fmt: skip


def _for(cfg: ModelConfig, target: str | None) -> ModelConfig:
    """The model with the dispatch of the device that is compiled for, which is not the one that compiles."""
    return replace(cfg, dispatch="ragged_dot") if target and cfg.dispatch == "auto" else cfg


def _placed(shapes: Any, where: Any) -> Any:
    """Shapes that say where they lie: the same structure, for `lower`."""
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, where)


def _held_to(tree: Any, where: Any) -> Any:
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, where)


def _bytes(placed: Any) -> int:
    """What one device holds of arrays that say where they lie."""
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(placed))


def _by_kind(params: nnx.State) -> dict[str, int]:
    experts, rest = nnx.split_state(params, lambda path, _: "experts" in path, ...)
    return {"routed experts": _bytes(experts), "other parameters": _bytes(rest)}


def _train_flops(cfg: ModelConfig, length: int) -> float:
    """FLOPs of a trained token, attention's scores with it, and layers once more where they are computed anew."""
    counted = size(cfg, length)
    scores = counted.attention_flops / 2  # a token sees half of the sequence, on average
    total = train_flops_per_token(cfg) + 3 * scores
    if cfg.remat == "full":
        head = cfg.vocab_size * cfg.dim
        total += 2 * (counted.active + counted.mtp_active - head * (1 + cfg.mtp_depth)) + scores
    return total


def _decode_attention_flops(cfg: ModelConfig, context: int) -> float:
    """Of one token: absorbed attention reads the latent row of every token before it, as key and as value."""
    if pick_kind(cfg, None) != "latent":
        return float(size(cfg, context).attention_flops)
    return 2.0 * cfg.num_layers * cfg.num_heads * (2 * cfg.kv_latent_dim + cfg.rope_head_dim) * context
