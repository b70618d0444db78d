"""Predict what each device of a mesh holds, computes and sends in a step, before any device exists.

Lowers and compiles the training step and the decoding step from shapes; no weight is allocated. The
figures:

    persistent    exact: the shards of parameters, optimizer state and cache
    FLOPs         by formula: 2 a parameter and token forward, 4 backward, and attention's scores
    sent          every collective of the program, once for each iteration of its loops, by ring
                  formulas (`traffic.py`). Loops whose length depends on the data, as further
                  rounds of an all-to-all, are counted apart.
    temporaries   the compiler's sum of all other memory at the worst moment

On fake CPU devices two things differ from an accelerator. First, the CPU's compiler turns bfloat16
into float32. Collectives are therefore counted before that pass, and temporaries are larger than on
an accelerator. Second, experts run in blocks, while `ragged_dot` would have a layer's experts in
bfloat16 and all rows at once. A target has neither difference: it has its own kernels, and its own
compiler reports the figures.
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

from dsv3_jax.config import ConfigError, Execution, ModelConfig, RunConfig
from dsv3_jax.kernels.choose import Kernels, Target, platform_of, prepare
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.length import check_decoding
from dsv3_jax.mesh.shape import format_mesh
from dsv3_jax.model.cache import Cache, pick_kind
from dsv3_jax.model.counting import (
    distinct_experts,
    share_read,
    size,
)
from dsv3_jax.model.decode import make_cache, prepare_decode, run_layers
from dsv3_jax.model.moe import RouterBias
from dsv3_jax.model.parameters import Packed
from dsv3_jax.model.transformer import abstract
from dsv3_jax.planning.devices import Accelerator
from dsv3_jax.planning.flops import decode_attention_flops, train_flops
from dsv3_jax.planning.hlo import compile_with_hlo
from dsv3_jax.planning.traffic import Traffic, traffic
from dsv3_jax.training.state import Job, abstract_state, split_trainable
from dsv3_jax.training.step import make_step

# As released folders pack weights: name → parts of the model; how many inputs share a number, then
# a scale, and dtypes.
PACKED: dict[str, Any] = {
    "fp8": ({"experts", "shared", "ffn"}, (1, "float8_e4m3fn"), (128, "float32")),  # DeepSeek-V3
    "int4": ({"experts"}, (2, "uint8"), (32, "bfloat16")),  # Kimi K2-Thinking
}


@dataclass(frozen=True)
class Cost:
    """The cost of one program for each device and step."""

    program: str
    mesh: dict[str, int]
    tokens: int  # on the complete mesh
    persistent: dict[str, int]  # bytes by kind that exist before and after the step
    # bytes by kind, of known size, that exist only during the step: part of the temporaries
    transient: dict[str, int]
    flops: float
    bytes_read: float  # bytes that must be read from memory; 0 where this bounds nothing
    temporaries: int | None  # bytes; None if compiling failed
    sent: Traffic
    seconds: float  # to lower and compile
    compile_error: str = ""  # the compiler's reason for running out of memory
    notes: list[str] = field(default_factory=list)
    text: str = field(default="", repr=False)  # of the compiled program; "" if compiling failed

    @property
    def total(self) -> int:
        """Bytes of memory at the worst moment.

        If compiling failed, only the persistent and transient ones.
        """
        transient = sum(self.transient.values())
        temporaries = transient if self.temporaries is None else max(self.temporaries, transient)
        return sum(self.persistent.values()) + temporaries

    def fits(self, memory: float) -> bool:
        """Say whether the program fits in so many bytes of memory."""
        return not self.compile_error and self.total <= memory

    def least_seconds(self, device: Accelerator) -> dict[str, float]:
        """Return the seconds of a step that waits for one resource alone, for each resource."""
        return {
            "FLOPs": self.flops / device.flops,
            "memory": self.bytes_read / device.memory_bandwidth,
            "wire": sum(
                (c.wire / _bandwidth(device, c.devices) for c in self.sent.known().collectives), 0.0
            ),
        }


def _bandwidth(device: Accelerator, members: tuple[int, ...]) -> float:
    """Return the bandwidth of the slowest link in a ring of these devices."""
    inside = device.node is None or len({m // device.node for m in members}) == 1
    return device.link if inside else device.network


def train_cost(
    run: RunConfig, mesh: Mesh, *, frozen: str | None = None, target: str | None = None
) -> Cost:
    """Predict the cost of a run's training step on a mesh; nothing is allocated.

    Args:
        run: its batch is that of the step.
        mesh: of fake devices, or of a target's.
        frozen: dtype of weights that do not train, or a name in PACKED. None means the model's
            compute dtype.
        target: of the mesh, see `devices.parse_target`. None means fake devices.
    Raises: ConfigError when batch or experts are not divisible by the mesh, or for kernels that the
        target does not have.

    Example:
        >>> from dsv3_jax.presets import recipe
        >>> cost = train_cost(recipe("tiny"), sharding.make_mesh())  # doctest: +SKIP
        >>> cost.fits(16e9), cost.sent.wire  # doctest: +SKIP
        (True, 0.0)
    """
    sharding.check_run(mesh, run)
    kernels = choose_kernels(run.execution, mesh)
    fsdp = run.execution.layout.fsdp
    frozen = frozen or run.execution.compute_dtype

    # The state as shapes, then with the shards of each.
    shapes = abstract_state(Job(run), "bfloat16" if frozen in PACKED else frozen)
    if frozen in PACKED:
        trained, given = split_trainable(run, shapes.params)
        shapes = replace(shapes, params=nnx.merge_state(trained, _packed(given, *PACKED[frozen])))
    state = _with_shardings(shapes, sharding.state_sharding(shapes, mesh, fsdp=fsdp))
    tokens = jax.ShapeDtypeStruct(
        (run.data.batch_size, run.data.seq_len),
        jnp.int32,
        sharding=sharding.batch_sharding(mesh, run.data.batch_size),
    )
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), tokens)

    # What a device holds before and after the step, and while it runs.
    trained, given = split_trainable(run, state.params)
    persistent = {
        **({f"frozen, in {frozen}": _shard_bytes(given)} if jax.tree.leaves(given) else {}),
        **_parameter_bytes(trained),
        "router bias": _shard_bytes(state.bias),
        "optimizer": _shard_bytes(state.opt),
        "batch": _shard_bytes(batch) + _shard_bytes(state.step),
    }
    # Microbatches add their gradients up: those of one, and the sum.
    gradients = _shard_bytes(trained) * (2 if run.optim.microbatches > 1 else 1)

    count = run.data.batch_size * run.data.seq_len
    flops = train_flops(run) * count / mesh.size
    return _compile_cost(
        "training step", mesh, target, make_step(Job(run, mesh, kernels)), (state, batch),
        tokens=count, persistent=persistent, transient={"gradients": gradients},
        flops=flops, bytes_read=0.0,
    )  # fmt: skip


def _packed(params: nnx.State, parts: set[str], *kinds: tuple[int, str]) -> nnx.State:
    """The shapes of parameters whose matrices in these parts are packed in whole groups."""

    def of(path: tuple, v: nnx.Variable) -> nnx.Variable:
        if not parts & set(path) or v.shape[-2] % max(inputs for inputs, _ in kinds):
            return v
        lead, (rows, out) = v.shape[:-2], v.shape[-2:]
        shapes = (((*lead, rows // inputs, out), own) for inputs, own in kinds)
        return v.replace(Packed(*(jax.ShapeDtypeStruct(shape, own) for shape, own in shapes)))

    return nnx.from_flat_state((path, of(path, v)) for path, v in nnx.to_flat_state(params))


def batch_parts(mesh: Mesh) -> int:
    """Return the number of parts into which a mesh shards a batch.

    Example:
        >>> batch_parts(sharding.make_mesh())
        1
    """
    return math.prod(mesh.shape[axis] for axis in sharding.ROWS)


def check_decode(
    cfg: ModelConfig, execution: Execution, mesh: Mesh, batch: int, context: int
) -> None:
    """Check that a mesh can run a decoding step.

    Raises: ConfigError when batch, experts or heads are not divisible by the mesh, or the context
        is beyond max_positions.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> mesh = sharding.make_mesh()
        >>> check_decode(preset("tiny"), Execution(), mesh, 1, context=9999)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        dsv3_jax.config.fields.ConfigError: context=9999 is not between 1 and the model's ...
    """
    check_decoding(execution.layout, mesh)
    parts = batch_parts(mesh)
    if batch < 1 or batch % parts:
        raise ConfigError(
            f"decode_batch={batch} is not divisible by the {parts} parts of "
            f"mesh={format_mesh(mesh)}; use a multiple"
        )
    if not 0 < context <= cfg.max_positions:
        raise ConfigError(
            f"context={context} is not between 1 and the model's max_positions={cfg.max_positions}"
        )
    sharding.check_model(mesh, cfg)


def decode_cost(
    cfg: ModelConfig,
    execution: Execution,
    mesh: Mesh,
    batch: int,
    context: int,
    *,
    weight_dtype: str | None = None,
    target: str | None = None,
) -> Cost:
    """Predict the cost of a step of plain decoding, one token a sequence; nothing is allocated.

    Args:
        batch: sequences, sharded as a training batch.
        context: tokens of each sequence in the cache, which has no room for more.
        weight_dtype: None means the model's compute dtype.
        target: as `train_cost`.
    Raises: ConfigError as `check_decode`.

    Example:
        >>> from dsv3_jax.presets import preset
        >>> mesh = sharding.make_mesh()
        >>> cfg = preset("tiny")
        >>> cost = decode_cost(cfg, Execution(), mesh, batch=8, context=1024)  # doctest: +SKIP
        >>> cost.persistent["cache"] // (8 * 1024)  # doctest: +SKIP
        768
    """
    check_decode(cfg, execution, mesh, batch, context)
    rows = sharding.batch_sharding(mesh)

    # Weights as shapes, with their shards. Plain decoding uses no multi-token heads.
    cfg = replace(cfg, mtp_depth=0)
    compute_dtype = jnp.dtype(execution.compute_dtype)
    dtype = jnp.dtype(weight_dtype or compute_dtype)
    fsdp = execution.layout.fsdp
    model = abstract(cfg, execution, choose_kernels(execution, mesh))
    graph, *variables = nnx.split(model, nnx.Param, RouterBias)
    params, bias = variables
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), params)
    params, bias = (
        _with_shardings(v, sharding.state_sharding(v, mesh, fsdp=fsdp)) for v in (params, bias)
    )

    # Arrays that `generate` makes of the weights once a request.
    with jax.set_mesh(mesh):
        by_layer = jax.eval_shape(
            lambda params, bias: prepare_decode(nnx.merge(graph, params, bias)), params, bias
        )
    own = sharding.state_sharding(by_layer, mesh, fsdp=fsdp)
    by_layer = _with_shardings(by_layer, own)

    # The cache: its slots belong to the devices of their rows.
    kind = pick_kind(cfg, None)

    def empty(params, bias) -> Any:
        model = nnx.merge(graph, params, bias)
        return make_cache(model, batch, context, kind, compute_dtype)

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(empty, params, bias)
    stored = NamedSharding(mesh, P(None, *rows.spec))
    shardings = Cache(jax.tree.map(lambda _: stored, shapes.parts), rows)
    cache = _with_shardings(shapes, shardings)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=rows)

    def step(params, bias, by_layer, cache, tokens):
        model = nnx.merge(graph, params, bias)
        x, cache, _ = run_layers(model, tokens, cache, by_layer)
        logits = model.logits(model.norm(x))
        cache = cache.at_lengths(cache.lengths + 1)
        next_tokens = jax.lax.with_sharding_constraint(jnp.argmax(logits, axis=-1), rows)
        return next_tokens, jax.tree.map(jax.lax.with_sharding_constraint, cache, shardings)

    # What a device holds before and after the step.
    weights = _parameter_bytes(params)
    persistent = dict(weights)
    if by_layer is not None:
        persistent["layers' own arrays"] = _shard_bytes(by_layer)
    persistent["router bias"] = _shard_bytes(bias)
    persistent["cache"] = _shard_bytes(cache)
    persistent["batch"] = _shard_bytes(tokens)

    # A step reads the weights, but not experts that no row chose, nor all rows of the embedding.
    rows_a_device = batch * mesh.shape["expert"] // mesh.size
    reached = distinct_experts(cfg, rows_a_device) / cfg.num_experts
    unread = weights.get("routed experts", 0) * (1 - reached)
    if not cfg.tie_embeddings:
        unread += _shard_bytes(params["embed"])
    cached = _shard_bytes(cache) * share_read(cfg, context, kind)
    read = sum(weights.values()) - unread + cached

    flops = batch * (2 * size(cfg).active + decode_attention_flops(cfg, context)) / mesh.size
    return _compile_cost(
        "decoding step", mesh, target, jax.jit(step, donate_argnums=3),
        (params, bias, by_layer, cache, tokens),
        tokens=batch, persistent=persistent, transient={}, flops=flops, bytes_read=read,
    )  # fmt: skip


def _compile_cost(
    program: str, mesh: Mesh, target: str | None, function, args: tuple, **known
) -> Cost:
    """Compile a function for a mesh and return its cost; `known`: fields that need no compiler."""
    start = time.perf_counter()
    compile_error = ""
    temporaries = None
    sent = Traffic([], 0)
    text = ""
    with jax.set_mesh(mesh):
        lowered = function.lower(*args)

    # A compiler of accelerators refuses a program that does not fit: that is a result, too.
    try:
        if target is None:
            compiled, text = compile_with_hlo(lowered)
        else:
            compiled = lowered.compile()
            text = compiled.as_text() or ""
        analysis: Any = compiled.memory_analysis()
        temporaries = analysis.temp_size_in_bytes
        sent = traffic(text, mesh.shape)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compile_error = " ".join(str(error).split("See https")[0].split())

    note = "compiled for CPU: temporaries hold bfloat16 as float32, and experts run in blocks"
    return Cost(
        program, dict(mesh.shape), temporaries=temporaries, sent=sent,
        seconds=time.perf_counter() - start, compile_error=compile_error,
        notes=[] if target else [note], text=text, **known,
    )  # fmt: skip


def choose_kernels(execution: Execution, mesh: Mesh) -> Kernels:
    """Choose the kernels of the mesh's devices.

    Simulated CPU devices represent accelerators, so they get plain XLA.

    Raises: ConfigError for kernels that the devices do not have.
    """
    return (
        Kernels(Target("cpu", "xla"))
        if platform_of(mesh) == "cpu"
        else prepare(execution, mesh=mesh)
    )


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    """Add shardings to shapes of the same structure, for `lower`."""
    return jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
    )


def _shard_bytes(shapes: Any) -> int:
    """Add up one device's bytes of shapes with shardings."""
    return sum(
        math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize
        for s in jax.tree.leaves(shapes)
    )


def _parameter_bytes(params: nnx.State) -> dict[str, int]:
    experts, rest = nnx.split_state(params, lambda path, _: "experts" in path, ...)
    return {"routed experts": _shard_bytes(experts), "other parameters": _shard_bytes(rest)}
