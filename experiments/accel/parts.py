"""The parts that `run.py` measures, and the worker process that measures them on JAX's default device.

A part is a generator: it yields a line on what it does next, or a `Figure`. All data are random, because a chip runs
faster on constant data. Rates count useful work alone: an implementation that computes every expert for every token
gets no credit for it.

`python parts.py` is the worker. It prints one line of JSON on the device. Then it measures the part that each line of
its input names: a line of JSON for each thing it says, each figure, and the end.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import ConfigError, DataConfig, Execution, ModelConfig, RunConfig, replace
from dsv3_jax.decoding.generate import generate
from dsv3_jax.kernels import choose
from dsv3_jax.model.cache import pick_kind
from dsv3_jax.model.counting import bytes_per_token, decode_bytes, train_flops_per_token
from dsv3_jax.model.moe import MoE, RouterBias
from dsv3_jax.model.transformer import Transformer, abstract
from dsv3_jax.presets import preset, recipe
from dsv3_jax.training.step import Job, init_state, make_step
from experiments.accel.kernels import hopper_fp8, hopper_products

PACKAGES = ("dsv3-jax", "jax", "jaxlib", "flax", "libtpu", "tokamax", "jax-cuda13-plugin", "jax-cuda12-plugin",
            "jax-rocm7-plugin")  # fmt: skip
DRIVER_FILES = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
LONGEST = 300  # characters of an error in the table


@dataclass(frozen=True)
class Figure:
    """One figure, or why there is none."""

    name: str
    value: float | None
    unit: str = ""  # FLOP/s, B/s, s, B, tokens/s, or what is counted
    against: str = ""  # the bound that the value is divided by: see BOUNDS in run.py
    bound: str = ""  # the bound that this figure is
    bar: str = ""  # the bar that it must reach: see BARS in run.py
    ran: dict[str, str] = field(default_factory=dict)  # the implementation of each op that was used
    note: str = ""
    why: str = ""  # why there is no value


Part = Iterator["Figure | str"]


@dataclass(frozen=True)
class Sizes:
    """Shapes of all parts. B batch, T length, H heads, K and V widths of a head's keys and values."""

    gemm: int  # rows of a square matrix
    copied: int  # numbers of an array in float32
    wide: ModelConfig  # of the MoE layer
    layer_batch: tuple[int, int]  # B, T
    grouped: dict[str, tuple[ModelConfig, int]]  # name → model, tokens
    attention: tuple[int, int, int, int, int]  # B, T, H, K, V
    documents: int  # packed in a row of it
    loss: tuple[int, int, int]  # tokens, width, vocabulary
    eight_bits: tuple[int, int, int]  # tokens, and both widths of a weight
    step: ModelConfig
    step_batch: tuple[int, int]  # B, T
    decode: ModelConfig
    decode_batches: tuple[int, ...]
    decode_bar: int  # the batch whose bar is held
    context: int  # cached tokens of each sequence
    decode_steps: int
    drafts: ModelConfig
    draft_batches: tuple[int, ...]
    draft_prompt: int
    draft_tokens: int
    exact: ModelConfig
    exact_batch: tuple[int, int]  # B, T
    exact_tokens: int
    seconds: float  # that one timing may take, at least one call


def full() -> Sizes:
    """The sizes for a GPU or TPU with 80 GB or more; smaller ones skip what does not fit."""
    v3, lite, mini = preset("v3"), preset("v2_lite"), preset("mini")
    wide = replace(v3, num_layers=1, num_dense_layers=0, num_experts=32, mtp_depth=0)
    return Sizes(
        gemm=8192,
        copied=1 << 28,
        wide=wide,
        layer_batch=(4, 4096),
        grouped={"V3, 32 experts": (wide, 8192), "V2-Lite": (lite, 8192), "mini": (mini, 4096)},
        attention=(2, 4096, 128, 192, 128),
        documents=4,
        loss=(8192, v3.dim, v3.vocab_size),
        eight_bits=(8192, v3.dim, 2 * v3.expert_dim),
        step=replace(lite, num_layers=4),
        step_batch=(8, 4096),
        decode=lite,
        decode_batches=(1, 32, 64, 128),
        decode_bar=64,
        context=4096,
        decode_steps=32,
        drafts=replace(lite, mtp_depth=1),
        draft_batches=(1, 8, 32, 64),
        draft_prompt=1024,
        draft_tokens=64,
        exact=replace(mini, mtp_depth=1),
        exact_batch=(8, 512),
        exact_tokens=64,
        seconds=1.0,
    )


def toy() -> Sizes:
    """Sizes at which a CPU runs every part within a minute: they show that the parts work, and nothing else."""
    small = dict(num_layers=1, num_dense_layers=0, num_experts=8, experts_per_token=2, num_groups=2, groups_per_token=1)
    headed = replace(preset("tiny"), **small)  # its step is compiled once, for two parts
    plain = replace(headed, mtp_depth=0)
    return Sizes(
        gemm=128,
        copied=1 << 16,
        wide=plain,
        layer_batch=(2, 64),
        grouped={"tiny": (plain, 64)},
        attention=(1, 64, 2, 24, 16),
        documents=2,
        loss=(64, 32, 100),
        eight_bits=(128, 128, 128),
        step=headed,
        step_batch=(2, 32),
        decode=plain,
        decode_batches=(1, 2),
        decode_bar=2,
        context=32,
        decode_steps=4,
        drafts=headed,
        draft_batches=(3,),  # it has the programs of `exact`
        draft_prompt=30,
        draft_tokens=12,
        exact=headed,
        exact_batch=(2, 32),
        exact_tokens=12,
        seconds=0.02,
    )


# Tools


class Recorder(choose.Kernels):
    """Kernels that note in RAN which implementation of each op was picked."""

    def pick(self, op: str, *arrays: Any, **settings: Any) -> choose.Implementation:
        row = super().pick(op, *arrays, **settings)
        RAN[op] = row.name
        return row


RAN: dict[str, str] = {}


def kernels_for(dtype: str = "bfloat16", kernels: str = "auto", precision: Any = "none") -> Recorder:
    """The kernels of the default device. Raises: ConfigError where they cannot run."""
    found = choose.prepare(Execution(compute_dtype=dtype, kernels=kernels, precision=precision))
    return Recorder(**{item.name: getattr(found, item.name) for item in dataclasses.fields(found)})


def ran(*ops: str) -> dict[str, str]:
    """Return what was picked since the last call, of these ops or of all."""
    found = {op: name for op, name in RAN.items() if not ops or op in ops}
    RAN.clear()
    return found


def backends(op: str) -> Iterator[tuple[str, Recorder | str]]:
    """Each implementation of an op that this platform has: its kernels, or why it is not available."""
    here = choose.platform_of()
    for name in dict.fromkeys(row.name for row in choose.TABLE[op] if here in row.platforms):
        try:
            yield name, kernels_for(kernels=f"{op}={name}")
        except ConfigError as error:
            yield name, not_available(error)


def not_available(error: ConfigError) -> str:
    """Why there is no figure of kernels that the device does not have."""
    return f"not available here: {sentence(error).split('; use ')[0]}"


def by_backend(
    op: str, label: str, call: Callable[[Recorder], Any], measure: Callable[[Recorder, str, bool], Part]
) -> Part:
    """Measure each implementation of an op. One that fails says so, and the others go on.

    Args:
        call: calls the op; it is traced only, to see what "auto" chooses.
        measure: gets kernels, the label to use, and whether "auto" chooses these kernels.
    """
    RAN.clear()
    with contextlib.suppress(Exception):  # what was picked is noted; measuring it says what is wrong
        jax.eval_shape(partial(call, kernels_for()))
    chosen = ran(op).get(op)
    for name, kernels in backends(op):
        title = f"{label}, {name}{' (chosen)' if name == chosen else ''}"
        if isinstance(kernels, str):
            yield Figure(title, None, why=kernels)
            continue
        RAN.clear()
        try:
            for found in measure(kernels, title, name == chosen):
                if isinstance(found, Figure) and (other := found.ran.get(op, name)) != name:
                    why = f"not available here: it does not fit these shapes, and {other} ran instead"
                    found = Figure(found.name, None, why=why)
                yield found
        except Exception as error:  # of a compiler or a library: any type
            yield Figure(title, None, why=f"failed: {sentence(error)}")


def sentence(error: BaseException) -> str:
    """An error's message on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether the device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


@partial(jax.jit, static_argnames=("shape", "dtype", "std"))
def draw(key: Any, shape: tuple[int, ...], dtype: str = "bfloat16", std: float = 1.0) -> jax.Array:
    """Draw normal numbers. A large array is drawn in slices, so that it needs little more than its own memory."""
    axes = 0
    while math.prod(shape[axes:]) > 1 << 28:
        axes += 1
    keys = jax.random.split(key, math.prod(shape[:axes]))
    parts = jax.lax.map(lambda k: (std * jax.random.normal(k, shape[axes:], jnp.float32)).astype(dtype), keys)
    return parts.reshape(shape)


def keys(seed: int = 0) -> Iterator[Any]:
    """Yield random keys without end."""
    key = jax.random.key(seed)
    while True:
        key, one = jax.random.split(key)
        yield one


def filled(shapes: nnx.Module, std: float, dtype: str) -> tuple[Any, Any]:
    """(Graph, arrays) of a module, given as shapes, with random weights in `dtype`; as `hf.load` casts them."""
    graph, state = nnx.split(shapes)
    arrays, key = {}, keys()
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, RouterBias):
            value = jnp.zeros(variable.shape, jnp.float32)
        elif not variable.get_metadata().get("decay", True):  # a norm's scale
            value = jnp.ones(variable.shape, dtype)
        else:
            value = draw(next(key), tuple(variable.shape), "float32" if path[-1] == "w_router" else dtype, std)
        arrays[path] = variable.replace(value)
    return graph, nnx.from_flat_state(arrays)


def seconds_of(call: Callable[[], Any], seconds: float, samples: int = 5) -> float:
    """Time a call: the median of several samples, after a call to compile and one to warm up.

    The calls of a sample are queued and awaited together, so the time to start one counts only where the device waits
    for it.
    """
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - start
    count = max(1, min(200, round(seconds / samples / max(once, 1e-7))))
    if once > seconds:  # a slow one: no more than two samples
        samples = 2

    def sample() -> float:
        start = time.perf_counter()
        for _ in range(count):
            out = call()
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / count

    return statistics.median(sample() for _ in range(samples))


# Parts


def bounds(sizes: Sizes) -> Part:
    """The day's bounds: a large matrix product, and a copy."""
    n, key = sizes.gemm, keys()
    yield f"matrix product {n}³"
    a, b = draw(next(key), (n, n)), draw(next(key), (n, n), std=n**-0.5)
    repeats = 4  # each product reads the one before, whose numbers are as random and as large

    @jax.jit
    def products(a, b):
        return jax.lax.fori_loop(0, repeats, lambda _, a: a @ b, a)

    rate = repeats * 2 * n**3 / seconds_of(lambda: products(a, b), sizes.seconds)
    yield Figure(f"matrix product {n}³, bfloat16", rate, "FLOP/s", against="sheet flops", bound="product")
    yield f"copy of {4 * sizes.copied / 1e9:.2g} GB"
    x = draw(next(key), (sizes.copied,), "float32")
    add = jax.jit(lambda x: x + 1)
    rate = 8 * sizes.copied / seconds_of(lambda: add(x), sizes.seconds)
    yield Figure(
        f"copy of {4 * sizes.copied / 1e9:.2g} GB, read and written", rate, "B/s", against="sheet bytes", bound="copy"
    )


def layer(sizes: Sizes) -> Part:
    """A MoE layer as wide as V3's, with float32 weights, router and shared expert: forward, and with gradients."""
    cfg, (rows, length), key = sizes.wide, sizes.layer_batch, keys()
    execution, kernels = Execution(compute_dtype="bfloat16"), kernels_for()
    label = f"MoE layer, {cfg.num_experts} × {cfg.dim}×{cfg.expert_dim}, {rows}×{length} tokens"
    yield f"{label}: weights"
    shapes = nnx.eval_shape(lambda: MoE(cfg, execution, rngs=nnx.Rngs(0), kernels=kernels))
    graph, state = filled(shapes, cfg.init_std, "float32")
    params, rest = nnx.split_state(state, nnx.Param, ...)
    x, dy = draw(next(key), (rows, length, cfg.dim)), draw(next(key), (rows, length, cfg.dim))

    def apply(params, x):
        return nnx.merge(graph, params, rest)(x)[0]

    # Two products of the hidden width and one back, for the chosen and the shared experts; the router's.
    experts = cfg.experts_per_token + cfg.num_shared_experts
    flops = rows * length * (6 * experts * cfg.dim * cfg.expert_dim + 2 * cfg.dim * cfg.num_experts)
    yield f"{label}: forward"
    forward = jax.jit(apply)
    took = seconds_of(lambda: forward(params, x), sizes.seconds)
    yield Figure(f"{label}, forward", flops / took, "FLOP/s", against="product", ran=ran())
    yield f"{label}: forward and backward"
    both = jax.jit(lambda params, x, dy: jax.vjp(apply, params, x)[1](dy))
    took = seconds_of(lambda: both(params, x, dy), sizes.seconds)
    yield Figure(
        f"{label}, forward and backward", 3 * flops / took, "FLOP/s", against="product", bar="layer", ran=ran()
    )


def grouped(sizes: Sizes) -> Part:
    """Grouped products by implementation: tokens to their experts, SwiGLU and back, with bfloat16 weights.

    The dense one computes every expert for every token.
    """
    for name, (cfg, tokens) in sizes.grouped.items():
        key, (experts, dim, hidden) = keys(), (cfg.num_experts, cfg.dim, cfg.expert_dim)
        x, dy = draw(next(key), (tokens, dim)), draw(next(key), (tokens, dim))
        shapes = (dim, hidden), (dim, hidden), (hidden, dim)
        weights = [draw(next(key), (experts, *shape), std=0.02) for shape in shapes]
        gates, ids = jax.lax.top_k(jax.random.uniform(next(key), (tokens, experts)), cfg.experts_per_token)
        gates, ids = gates.astype(jnp.bfloat16), ids.astype(jnp.int32)
        flops = 6 * tokens * cfg.experts_per_token * dim * hidden

        def once(kernels: Recorder, x=x, ids=ids, gates=gates, weights=weights):
            return kernels("grouped_swiglu", x, ids, gates, *weights)

        def measure(
            kernels: Recorder, title: str, chosen: bool, x=x, dy=dy, ids=ids, gates=gates, weights=weights, flops=flops
        ) -> Part:
            def apply(x, gates, weights):
                return kernels("grouped_swiglu", x, ids, gates, *weights)

            yield f"{title}: forward"
            forward = jax.jit(lambda x, gates, w: kernels("grouped_swiglu", x, ids, gates, *w))
            took = seconds_of(lambda: forward(x, gates, weights), sizes.seconds)
            yield Figure(f"{title}, forward", flops / took, "FLOP/s", against="product", ran=ran("grouped_swiglu"))
            yield f"{title}: forward and backward"
            both = jax.jit(lambda x, gates, w, dy: jax.vjp(apply, x, gates, w)[1](dy))
            took = seconds_of(lambda: both(x, gates, weights, dy), sizes.seconds)
            yield Figure(
                f"{title}, forward and backward", 3 * flops / took, "FLOP/s", against="product",
                ran=ran("grouped_swiglu"),
            )  # fmt: skip

        yield from by_backend("grouped_swiglu", f"{name}, {tokens} tokens", once, measure)


def attention(sizes: Sizes) -> Part:
    """Causal attention by implementation, and packed documents with the chosen one.

    Counted as the field does: half of the square, two products forward and five backward (the scores once more).
    """
    batch, length, heads, k_dim, v_dim = sizes.attention
    key = keys()
    q, k = (draw(next(key), (batch, length, heads, k_dim)) for _ in range(2))
    v, dy = (draw(next(key), (batch, length, heads, v_dim)) for _ in range(2))
    each = length // sizes.documents
    segments = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) // each + 1, (batch, length))

    def measure(kernels: Recorder, title: str, chosen: bool) -> Part:
        def apply(q, k, v, segment_ids=None):
            return kernels("causal_attention", q, k, v, scale=k_dim**-0.5, segment_ids=segment_ids)

        def gradients(q, k, v, dy, segment_ids=None):
            return jax.vjp(partial(apply, segment_ids=segment_ids), q, k, v)[1](dy)

        forward, both = jax.jit(apply), jax.jit(gradients)
        pairs = batch * heads * length**2  # 2 FLOPs for each pair of the half square
        one_way, two_ways = pairs * (k_dim + v_dim), pairs * (4 * k_dim + 3 * v_dim)
        yield f"{title}: forward"
        took = seconds_of(lambda: forward(q, k, v), sizes.seconds)
        yield Figure(
            f"{title}, forward", one_way / took, "FLOP/s", against="sheet flops", ran=ran("causal_attention"),
            bar="attention forward" if chosen else "",
        )  # fmt: skip
        yield f"{title}: forward and backward"
        took = seconds_of(lambda: both(q, k, v, dy), sizes.seconds)
        yield Figure(
            f"{title}, forward and backward", two_ways / took, "FLOP/s", against="sheet flops",
            ran=ran("causal_attention"), bar="attention both" if chosen else "",
        )  # fmt: skip
        if chosen:
            yield f"{title}: {sizes.documents} documents a row"
            took = seconds_of(lambda: both(q, k, v, dy, segments), sizes.seconds)
            yield Figure(
                f"{title}, {sizes.documents} documents a row, forward and backward",
                two_ways / sizes.documents / took, "FLOP/s", against="sheet flops", ran=ran("causal_attention"),
            )  # fmt: skip

    def once(kernels: Recorder):
        return kernels("causal_attention", q, k, v, scale=k_dim**-0.5)

    yield from by_backend("causal_attention", f"{batch}×{length}, {heads} heads of {k_dim}/{v_dim}", once, measure)


def loss(sizes: Sizes) -> Part:
    """Cross-entropy over the vocabulary with its gradients, by implementation."""
    tokens, dim, vocab = sizes.loss
    key = keys()
    h, w = draw(next(key), (tokens, dim)), draw(next(key), (dim, vocab), std=dim**-0.5)
    targets = jax.random.randint(next(key), (tokens,), 0, vocab, jnp.int32)
    mask = jnp.ones((tokens,), bool)

    def once(kernels: Recorder):
        return kernels("cross_entropy", h, w, targets, mask)[0]

    def measure(kernels: Recorder, title: str, chosen: bool) -> Part:
        yield title
        both = jax.jit(jax.grad(lambda h, w: kernels("cross_entropy", h, w, targets, mask)[0], argnums=(0, 1)))
        took = seconds_of(lambda: both(h, w), sizes.seconds)
        rate = 6 * tokens * dim * vocab / took
        yield Figure(title, rate, "FLOP/s", against="product", ran=ran("cross_entropy"))

    yield from by_backend("cross_entropy", f"{tokens} tokens, {dim}×{vocab}, with gradients", once, measure)


def eight_bits(sizes: Sizes) -> Part:
    """A linear layer with its gradients in 8 bits, by recipe and implementation, and how far each is from float32's.

    The recipe's rounding is the same for all; sums differ. Hopper's matrix unit keeps about 14 bits of a sum of 128.
    """
    tokens, dim, width = sizes.eight_bits
    key = keys()
    x, dy = draw(next(key), (tokens, dim)), draw(next(key), (tokens, width))
    w = draw(next(key), (dim, width), "float32", dim**-0.5)

    def with_gradients(kernels: choose.Kernels, x, w, dy):
        y, pull_back = jax.vjp(lambda x, w: kernels("product", x, w), x, w)
        return y, *pull_back(dy)

    for precision in ("none", "fp8", "fp8_ue8m0", "mxfp8"):
        first: Any = None
        for names in ("auto", "product=hopper") if precision[:3] == "fp8" else ("auto",):
            title = f"{tokens} tokens, {dim}×{width}, with gradients, {precision}, {names}"
            yield title
            try:
                kernels = kernels_for(kernels=names, precision=precision)
                call = jax.jit(partial(with_gradients, kernels))
                took = seconds_of(lambda call=call: call(x, w, dy), sizes.seconds)
                found = call(x, w, dy)
            except ConfigError as error:
                yield Figure(title, None, why=not_available(error))
                continue
            except Exception as error:  # of a compiler
                yield Figure(title, None, why=f"failed: {sentence(error)}")
                continue
            rate, picked = 6 * tokens * dim * width / took, ran("product")
            first = found if first is None else first
            apart = max(float(_relative_distance(a, b)) for a, b in zip(found, first, strict=True))
            note = f"{apart:.1e} of the largest number away from auto" if names != "auto" else ""
            yield Figure(title, rate, "FLOP/s", against="product", ran=picked, note=note)


@jax.jit
def _relative_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.abs(a - b).max() / jnp.abs(b).max()


def train_run(cfg: ModelConfig, rows: int, length: int) -> RunConfig:
    """A run of a model, computed as V2-Lite's recipe says, in bfloat16."""
    execution = replace(recipe("v2_lite").execution, compute_dtype="bfloat16")
    return RunConfig(model=cfg, execution=execution, data=DataConfig(seq_len=length, batch_size=rows))


def random_batch(cfg: ModelConfig, rows: int, length: int) -> dict[str, jax.Array]:
    """A training batch of random tokens, one document a row."""
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, cfg.vocab_size, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
    return {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": positions}


def step(sizes: Sizes) -> Part:
    """A training step: time, MFU, and memory against what the compiler plans. Fewer rows where it does not fit."""
    rows, length = sizes.step_batch
    while True:
        try:
            yield from _step(sizes, rows, length, first=rows == sizes.step_batch[0])
            return
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error) or rows == 1:
                raise
        yield f"{rows} rows do not fit; {rows // 2} are tried"
        rows //= 2


def _step(sizes: Sizes, rows: int, length: int, first: bool) -> Part:
    """Args: first: nothing was tried before, so the device's count of the most memory is of this step."""
    cfg, kernels = sizes.step, kernels_for()
    run, batch = train_run(cfg, rows, length), random_batch(cfg, rows, length)
    label = f"{cfg.num_layers} layers, {rows}×{length} tokens"
    yield f"{label}: compile"
    state = jax.block_until_ready(init_state(Job(run)))
    held = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
    compiled = make_step(Job(run, kernels=kernels)).lower(state, batch).compile()
    chosen = ran()
    planned = held + compiled.memory_analysis().temp_size_in_bytes
    yield f"{label}: run"

    def steps(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, found = compiled(state, batch)
        if not bool(jax.block_until_ready(found)["finite"]):
            raise ValueError(f"the loss {float(found['loss'])} or a gradient is not finite")
        return (time.perf_counter() - start) / count

    steps(1)
    once = steps(1)
    took = statistics.median(steps(max(1, round(sizes.seconds / once / 2))) for _ in range(5))
    note = f"remat {run.execution.remat}"
    yield Figure(f"{label}, a step", took, "s", ran=chosen, note=note)
    yield Figure(f"{label}, speed", rows * length / took, "tokens/s")
    flops = train_flops_per_token(cfg) * rows * length
    yield Figure(
        f"{label}, useful work", flops / took, "FLOP/s", against="sheet flops", bar="mfu",
        note="MFU: 6 FLOPs a token and active parameter",
    )  # fmt: skip
    yield Figure(
        f"{label}, planned memory", planned, "B", bound="planned memory", note="state and the compiler's temporaries"
    )
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak and first:
        yield Figure(f"{label}, most memory used", peak, "B", against="planned memory")


def decode(sizes: Sizes) -> Part:
    """Plain decoding after a long text, by batch: seconds a step, and the bytes that a step must read a second.

    The cache is filled with random rows, because the prefill of the largest batch would need more memory than is there.
    Each step reads random tokens: random weights would soon repeat one token, and then few experts are read.
    """
    cfg, key, execution = sizes.decode, keys(), Execution(compute_dtype="bfloat16")
    yield "weights"
    graph, state = filled(abstract(cfg, execution, kernels_for()), cfg.init_std, "bfloat16")
    kind = pick_kind(cfg, None)
    held = bytes_per_token(cfg, kind, "bfloat16")
    weights = jax.jit(lambda state: nnx.merge(graph, state).prepare_decode())(state)

    @partial(jax.jit, donate_argnums=2)
    def run(state, weights, cache, drawn):
        model = nnx.merge(graph, state)

        def one(carry, tokens):
            cache, last = carry
            tokens = (tokens + last) % cfg.vocab_size  # each step needs the one before
            x, cache = model.run_layers(tokens[:, None], cache, weights)
            last = jnp.argmax(model.logits(model.norm(x))[:, 0], axis=-1).astype(jnp.int32)
            return (cache.at_lengths(cache.lengths + 1), last), None

        (cache, last), _ = jax.lax.scan(one, (cache, jnp.zeros(drawn.shape[1:], jnp.int32)), drawn)
        return cache, last

    for batch in sizes.decode_batches:
        label = f"{cfg.num_layers} layers, batch {batch}, {sizes.context} cached"
        yield label
        RAN.clear()
        slots = sizes.context + sizes.decode_steps
        model = nnx.merge(graph, state)
        shapes = jax.eval_shape(partial(model.empty_cache, batch, slots, kind, jnp.bfloat16))
        cache = jax.tree.map(lambda x: draw(next(key), x.shape) if x.ndim > 1 else jnp.zeros(x.shape, x.dtype), shapes)
        drawn = jax.random.randint(next(key), (sizes.decode_steps, batch), 0, cfg.vocab_size, jnp.int32)

        def at_context(cache, batch=batch):
            return cache.at_lengths(jnp.full((batch,), sizes.context, jnp.int32))

        current = [at_context(cache)]
        del cache

        def call(current=current, drawn=drawn, at_context=at_context):
            after, last = run(state, weights, current.pop(), drawn)
            current.append(at_context(after))
            return last

        try:
            took = seconds_of(call, sizes.seconds, samples=3) / sizes.decode_steps
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            yield Figure(label, None, why=f"does not fit in memory: {sentence(error)}")
            continue
        must = decode_bytes(cfg, batch, sizes.context + sizes.decode_steps // 2, held, weight_bytes=2)
        yield Figure(f"{label}, a step", took, "s", ran=ran(), note=f"{batch / took:,.0f} tokens/s")
        bar = "decode" if batch == sizes.decode_bar else ""
        yield Figure(f"{label}, weights and cache read", must / took, "B/s", against="copy", bar=bar)


def drafts(sizes: Sizes) -> Part:
    """Decoding with the model's own MTP head as the draft, and without, by batch.

    At temperature 1: untrained weights give nearly even distributions, of which a large share of drafts is accepted.
    Greedy text of random weights would accept none.
    """
    cfg, execution, rng = sizes.drafts, Execution(compute_dtype="bfloat16"), np.random.default_rng(0)
    yield "weights"
    model = nnx.merge(*filled(abstract(cfg, execution, kernels_for()), cfg.init_std, "bfloat16"))
    best, reason = 0.0, ""
    for batch in sizes.draft_batches:
        prompts = rng.integers(0, cfg.vocab_size, (batch, sizes.draft_prompt)).tolist()
        rates, steps, accepted = {}, {}, 0.0
        for draft in (None, "mtp"):
            label = f"batch {batch}, {'MTP drafts' if draft else 'no drafts'}"
            yield label
            RAN.clear()
            results = [generate(model, prompts, sizes.draft_tokens, temperature=1.0, draft=draft) for _ in range(4)][
                1:
            ]  # the first compiles
            rates[draft] = statistics.median(result.tokens_per_s for result in results)
            steps[draft] = statistics.median(result.decode_seconds / result.steps for result in results)
            accepted = results[0].acceptance[0] if draft else 0.0
            note = f"{accepted:.0%} of the drafts accepted" if draft else ""
            yield Figure(f"{cfg.num_layers} layers, {label}", rates[draft], "tokens/s", ran=ran(), note=note)
        gain = rates["mtp"] / rates[None]
        if gain > best:
            best = gain
            reason = (
                f"batch {batch}: a step with a draft takes {steps['mtp'] / steps[None]:.2f} times as long, and "
                f"{accepted:.0%} are accepted"
            )
    yield Figure("drafts over none, best batch", best, "times", bar="drafts", note=reason)


def exact(sizes: Sizes) -> Part:
    """Numbers that must be equal: greedy ids with and without drafts, and the bits of two runs with one seed."""
    cfg, rng = sizes.exact, np.random.default_rng(0)
    with jax.default_matmul_precision("highest"):  # with less, two tokens about as likely may change places
        yield "greedy ids: no drafts"
        model = Transformer(cfg, Execution(), rngs=nnx.Rngs(0), kernels=kernels_for("float32"))
        prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in (5, 17, 30)]
        plain = generate(model, prompts, sizes.exact_tokens).tokens
        # Its own head's drafts are mostly rejected, untrained as it is; the model's own are accepted.
        for name, draft in {"MTP drafts": "mtp", "the model's own drafts": model}.items():
            yield f"greedy ids: {name}"
            found = generate(model, prompts, sizes.exact_tokens, draft=draft, draft_length=2)
            differ = sum(a != b for x, y in zip(plain, found.tokens, strict=True) for a, b in zip(x, y, strict=True))
            note = f"{found.mean_accepted:.2f} tokens a step, float32"
            yield Figure(f"greedy ids that differ with {name}", differ, "ids", bar="equal", note=note)
    rows, length = sizes.exact_batch
    run, batch = train_run(cfg, rows, length), random_batch(cfg, rows, length)
    yield "the same bits twice: training"
    advance = make_step(Job(run, kernels=kernels_for()))

    def trained():
        state = init_state(Job(run))
        for _ in range(3):
            state, _ = advance(state, batch)
        return state

    differ = int(_different_numbers(trained(), trained()))
    yield Figure("numbers that differ after 3 steps, same seed", differ, "numbers", bar="equal", ran=ran())
    yield "the same bits twice: sampling"
    model = Transformer(cfg, Execution(compute_dtype="bfloat16"), rngs=nnx.Rngs(0), kernels=kernels_for())
    first, second = (generate(model, prompts, sizes.exact_tokens, temperature=1.0, seed=1).tokens for _ in range(2))
    differ = sum(a != b for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    yield Figure("sampled ids that differ, same seed", differ, "ids", bar="equal", ran=ran())


@jax.jit
def _different_numbers(left: Any, right: Any) -> jax.Array:
    """Count the numbers of two states whose bits differ; -0 is not 0, and NaN is NaN."""

    def bits(x):
        return jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])

    counts = jax.tree.map(lambda a, b: (bits(a) != bits(b)).sum(dtype=jnp.int32), left, right)
    return sum(jax.tree.leaves(counts), jnp.zeros((), jnp.int32))


PARTS: dict[str, Callable[[Sizes], Part]] = {
    "bounds": bounds, "exact": exact, "layer": layer, "attention": attention, "step": step, "decode": decode,
    "grouped": grouped, "drafts": drafts, "loss": loss, "eight_bits": eight_bits,
}  # fmt: skip


# The worker


def card() -> dict[str, Any]:
    """The device, its driver and the versions of the packages."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    drivers = [Path(name).read_text().split("\n")[0] for name in DRIVER_FILES if Path(name).exists()]
    return {
        "kind": device.device_kind,
        "platform": choose.platform_of(),
        "devices": jax.local_device_count(),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "runtime": " ".join(device.client.platform_version.split()),
        "driver": " ".join(drivers[0].split()) if drivers else None,
        "versions": versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="The worker of run.py, which measures the parts that its input names.")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    hopper_products.add()
    hopper_fp8.add()
    # Libraries print on descriptor 1 too: the replies get one of their own.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(**reply: Any) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        info = card()
    except Exception as error:  # no device, or a broken installation
        send(failed=sentence(error))
        return 1
    small = args.toy or info["platform"] == "cpu"
    sizes = toy() if small else full()
    send(card=info, toy=small)
    for line in sys.stdin:
        try:
            for found in PARTS[line.strip()](sizes):
                send(doing=found) if isinstance(found, str) else send(figure=asdict(found))
        except Exception as error:
            send(failed=f"{type(error).__name__}: {sentence(error)}")
        else:
            send(done=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
