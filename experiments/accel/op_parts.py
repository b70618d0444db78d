"""The parts that measure one op or layer."""

import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.kernels import check_apart
from dsv3_jax.model.context import How, from_zero, make_context
from dsv3_jax.model.moe import MoE
from experiments.accel.measuring import (
    BFLOAT16,
    Figure,
    Part,
    Recorder,
    Sizes,
    by_backend,
    kernels_for,
    or_why,
    rate,
)
from experiments.random_data import draw, filled, keys

# Of `right`: a process that checks, with the kernel of kernels/, which runs only if it is named.
CHECK = (sys.executable, str(Path(__file__).resolve().with_name("run.py")), "--check")
NAMES = ("latent",)  # of the kernel's row
PRECISIONS = ("none", "fp8")  # other recipes round otherwise, and multiply by the same kernels


def bounds(sizes: Sizes) -> Part:
    """The day's bounds: a large matrix product, and a copy."""
    n, key = sizes.gemm, keys()
    a, b = draw(next(key), (n, n)), draw(next(key), (n, n), std=n**-0.5)
    repeats = 4  # each product reads the one before, whose numbers are as random and as large

    @jax.jit
    def products(a, b):
        return jax.lax.fori_loop(0, repeats, lambda _, a: a @ b, a)

    name, limits = f"matrix product {n}³, bfloat16", dict(against="sheet flops", bound="product")
    yield from rate(name, repeats * 2 * n**3, lambda: products(a, b), sizes, **limits)

    x, add = draw(next(key), (sizes.copied,), "float32"), jax.jit(lambda x: x + 1)
    name = f"copy of {x.nbytes / 1e9:.2g} GB, read and written"
    limits = dict(unit="B/s", against="sheet bytes", bound="copy")
    yield from rate(name, 2 * x.nbytes, lambda: add(x), sizes, **limits)


def right(sizes: Sizes) -> Part:
    """Each implementation's largest error over its bound, forward and in all gradients.

    The package's check does the work, see `dsv3_jax/kernels/check_apart.py`. What is wrong is kept,
    and no later part takes it by "auto".
    """
    for verdict in check_apart.check_and_keep(
        BFLOAT16, precisions=PRECISIONS, also=NAMES, command=CHECK
    ):
        share = verdict.share if math.isfinite(verdict.share) else None
        why = "" if share is not None else f"WRONG: {verdict.wrong}"
        name = f"{verdict.name}, largest error over its bound"
        yield Figure(name, share, "times", bar="right", note=verdict.wrong, why=why)
        yield f"what comes after {verdict.name}"


def layer(sizes: Sizes) -> Part:
    """A MoE layer as wide as V3's, with router and shared expert: forward, and with gradients.

    Its weights are in bfloat16, to which a step casts them once.
    """
    cfg, (rows, length), key = sizes.wide, sizes.layer_batch, keys()
    label = f"MoE layer, {cfg.num_experts} × {cfg.dim}×{cfg.expert_dim}, {rows}×{length} tokens"
    yield f"{label}: weights"
    shapes = nnx.eval_shape(lambda: MoE(cfg, rngs=nnx.Rngs(0)))
    graph, state = filled(shapes, cfg.init_std, "bfloat16")
    params, rest = nnx.split_state(state, nnx.Param, ...)
    x, dy = (draw(next(key), (rows, length, cfg.dim)) for _ in range(2))

    def apply(params, x):
        ctx = make_context(cfg, from_zero(rows, length), how=How(kernels_for()))
        return nnx.merge(graph, params, rest).mix(x, ctx)[0]

    # Two products of the hidden width and one back, of chosen and shared experts; the router's.
    experts = cfg.experts_per_token + cfg.num_shared_experts
    flops = rows * length * (6 * experts * cfg.dim * cfg.expert_dim + 2 * cfg.dim * cfg.num_experts)
    forward, both = jax.jit(apply), jax.jit(lambda params, x, dy: jax.vjp(apply, params, x)[1](dy))
    timed = partial(rate, sizes=sizes, against="product")
    yield from timed(f"{label}, forward", flops, lambda: forward(params, x))
    name = f"{label}, forward and backward"
    yield from timed(name, 3 * flops, lambda: both(params, x, dy), bar="layer")


def grouped(sizes: Sizes, models: slice) -> Part:
    """Grouped products by implementation: tokens to experts, SwiGLU and back, bfloat16 weights.

    The dense one computes every expert for every token.

    Args: models: of `sizes.grouped`.
    """
    for name, (cfg, tokens) in list(sizes.grouped.items())[models]:
        yield from _grouped(sizes, name, cfg, tokens)


def _grouped(sizes: Sizes, name: str, cfg: ModelConfig, tokens: int) -> Part:
    key = keys()
    x, dy = (draw(next(key), (tokens, cfg.dim)) for _ in range(2))
    weights = _expert_weights(cfg, key)
    gates, ids = _choices(next(key), tokens, cfg)
    flops = 6 * tokens * cfg.experts_per_token * cfg.dim * cfg.expert_dim
    # Bytes of the operand that each makes of every expert's share, where it is no kernel.
    dense = 2 * tokens * cfg.num_experts * cfg.dim
    operands = {"ragged_dot": dense * cfg.experts_per_token, "dense": dense}

    def apply(kernels: Recorder, x, gates, weights):
        return kernels("grouped_swiglu", x, ids, gates, *weights)

    def measure(kernels: Recorder, title: str, chosen: bool) -> Part:
        run, timed = partial(apply, kernels), partial(rate, sizes=sizes, against="product")
        forward, both = jax.jit(run), jax.jit(lambda dy, *args: jax.vjp(run, *args)[1](dy))
        yield from timed(f"{title}, forward", flops, lambda: forward(x, gates, weights))
        name = f"{title}, forward and backward"
        yield from timed(name, 3 * flops, lambda: both(dy, x, gates, weights))

    label, call = f"{name}, {tokens} tokens", partial(apply, x=x, gates=gates, weights=weights)
    yield from by_backend("grouped_swiglu", label, call, measure, operands)


def few_rows(sizes: Sizes) -> Part:
    """A decoding step's experts by implementation and batch: bytes of those that tokens chose."""
    cfg, key = sizes.decode, keys()
    weights = _expert_weights(cfg, key)
    for tokens in sizes.few_rows:
        x = draw(next(key), (tokens, cfg.dim))
        gates, ids = _choices(next(key), tokens, cfg)
        # The number of experts that some token chose, in the mean.
        reached = cfg.num_experts * (1 - (1 - cfg.experts_per_token / cfg.num_experts) ** tokens)
        label = f"{tokens} tokens, {reached:.0f} of {cfg.num_experts} experts"
        nbytes = reached * 3 * cfg.dim * cfg.expert_dim * 2

        def apply(kernels: Recorder, x=x, ids=ids, gates=gates):
            return kernels("decode_experts", x, ids, gates, *weights)

        def measure(kernels: Recorder, title: str, chosen: bool, apply=apply, x=x, work=nbytes):
            run = jax.jit(partial(apply, kernels))
            yield from rate(title, work, lambda: run(x), sizes, unit="B/s", against="copy")

        yield from by_backend("decode_experts", label, apply, measure)


def _expert_weights(cfg: ModelConfig, key: Iterator[Any]) -> list[jax.Array]:
    shapes = (cfg.dim, cfg.expert_dim), (cfg.dim, cfg.expert_dim), (cfg.expert_dim, cfg.dim)
    return [draw(next(key), (cfg.num_experts, *shape), std=0.02) for shape in shapes]


def _choices(key: Any, tokens: int, cfg: ModelConfig) -> tuple[jax.Array, jax.Array]:
    scores = jax.random.uniform(key, (tokens, cfg.num_experts))
    gates, ids = jax.lax.top_k(scores, cfg.experts_per_token)
    return gates.astype(jnp.bfloat16), ids.astype(jnp.int32)


def attention(sizes: Sizes) -> Part:
    """Causal attention by implementation, and packed documents with the chosen one.

    Counted as usual: half of the square, two products forward, five backward (scores once more).
    """
    (batch, length, heads, k_dim, v_dim), key = sizes.attention, keys()
    q, k = (draw(next(key), (batch, length, heads, k_dim)) for _ in range(2))
    v, dy = (draw(next(key), (batch, length, heads, v_dim)) for _ in range(2))
    each = length // sizes.documents
    segments = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) // each + 1, (batch, length))
    pairs = batch * heads * length**2  # 2 FLOPs for each pair of the half square
    one_way, two_ways = pairs * (k_dim + v_dim), pairs * (4 * k_dim + 3 * v_dim)
    timed = partial(rate, sizes=sizes, against="sheet flops")

    def apply(kernels: Recorder, q, k, v, segment_ids=None):
        return kernels("causal_attention", q, k, v, scale=k_dim**-0.5, segment_ids=segment_ids)

    def measure(kernels: Recorder, title: str, chosen: bool) -> Part:
        def gradients(q, k, v, dy, segment_ids=None):
            return jax.vjp(partial(apply, kernels, segment_ids=segment_ids), q, k, v)[1](dy)

        forward, both = jax.jit(partial(apply, kernels)), jax.jit(gradients)
        bars = ("attention forward", "attention both") if chosen else ("", "")
        yield from timed(f"{title}, forward", one_way, lambda: forward(q, k, v), bar=bars[0])
        name = f"{title}, forward and backward"
        yield from timed(name, two_ways, lambda: both(q, k, v, dy), bar=bars[1])
        if chosen:
            name = f"{title}, {sizes.documents} documents a row, forward and backward"
            yield from timed(name, two_ways / sizes.documents, lambda: both(q, k, v, dy, segments))

    label = f"{batch}×{length}, {heads} heads of {k_dim}/{v_dim}"
    yield from by_backend("causal_attention", label, partial(apply, q=q, k=k, v=v), measure)


def loss(sizes: Sizes) -> Part:
    """Cross-entropy over the vocabulary with its gradients, by implementation."""
    (tokens, dim, vocab), key = sizes.loss, keys()
    h, w = draw(next(key), (tokens, dim)), draw(next(key), (dim, vocab), std=dim**-0.5)
    targets = jax.random.randint(next(key), (tokens,), 0, vocab, jnp.int32)
    mask, flops = jnp.ones((tokens,), bool), 6 * tokens * dim * vocab

    def apply(kernels: Recorder, h, w):
        return kernels("cross_entropy", h, w, targets, mask)[0]

    def measure(kernels: Recorder, title: str, chosen: bool) -> Part:
        both = jax.jit(jax.grad(partial(apply, kernels), argnums=(0, 1)))
        yield from rate(title, flops, lambda: both(h, w), sizes, against="product")

    label = f"{tokens} tokens, {dim}×{vocab}, with gradients"
    yield from by_backend("cross_entropy", label, partial(apply, h=h, w=w), measure)


def eight_bits(sizes: Sizes) -> Part:
    """A linear layer with its gradients, by recipe of 8-bit training."""
    (tokens, dim, width), key = sizes.eight_bits, keys()
    x, dy = draw(next(key), (tokens, dim)), draw(next(key), (tokens, width))
    w = draw(next(key), (dim, width), "float32", dim**-0.5)

    def measure(title: str, precision: str) -> Part:
        product = partial(kernels_for(precision=precision), "product")

        @jax.jit
        def with_gradients(x, w, dy):
            y, pull_back = jax.vjp(product, x, w)
            return y, *pull_back(dy)

        flops, call = 6 * tokens * dim * width, lambda: with_gradients(x, w, dy)
        yield from rate(title, flops, call, sizes, against="product")

    for precision in ("none", "fp8", "fp8_ue8m0", "mxfp8"):
        title = f"{tokens} tokens, {dim}×{width}, with gradients, {precision}"
        yield from or_why(title, partial(measure, title, precision))
