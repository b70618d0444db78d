"""The parts that measure one op or layer. Defaults are the shapes for a device with 80 GB."""

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig, replace
from dsv3_jax.kernels import check_apart, choose
from dsv3_jax.kernels.cases import CASES, Draw
from dsv3_jax.model.context import How, from_zero, make_context
from dsv3_jax.model.moe import MoE
from dsv3_jax.presets import preset
from experiments.accel.measuring import (
    BFLOAT16,
    Figure,
    Part,
    both_ways,
    by_backend,
    kernels_for,
    or_why,
    timed,
)
from experiments.random_data import draw, filled, keys

V3 = preset("v3")
WIDE = replace(V3, num_layers=1, num_dense_layers=0, num_experts=32, mtp_depth=0)
OPS = ("grouped_swiglu", "decode_experts", "cached_attention", "cross_entropy")

# Of `right`: a process that checks, with the kernel of kernels/, which runs only if it is named.
CHECK = (sys.executable, str(Path(__file__).resolve().with_name("run.py")), "--check")
NAMES = ("latent",)  # of the kernel's row
PRECISIONS = ("none", "fp8")  # other recipes round otherwise, and multiply by the same kernels


def bounds(n: int = 8192, copied: int = 1 << 28) -> Part:
    """The day's bounds: a product of matrices of n rows, and a copy of float32 numbers."""
    key = keys()
    a, b = draw(next(key), (n, n)), draw(next(key), (n, n), std=n**-0.5)
    repeats = 4  # each product reads the one before, whose numbers are as random and as large

    @jax.jit
    def products(a, b):
        return jax.lax.fori_loop(0, repeats, lambda _, a: a @ b, a)

    name, limits = f"matrix product {n}³, bfloat16", dict(against="sheet flops", bound="product")
    yield from timed(name, lambda: products(a, b), repeats * 2 * n**3, **limits)

    x, add = draw(next(key), (copied,), "float32"), jax.jit(lambda x: x + 1)
    name = f"copy of {x.nbytes / 1e9:.2g} GB, read and written"
    limits = dict(unit="B/s", against="sheet bytes", bound="copy")
    yield from timed(name, lambda: add(x), 2 * x.nbytes, **limits)


def right() -> Part:
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


def layer(cfg: ModelConfig = WIDE, rows: int = 4, length: int = 4096) -> Part:
    """A MoE layer as wide as V3's, with router and shared expert, by implementation of its experts.

    Its weights are in bfloat16, to which a step casts them once.
    """
    label = f"MoE layer, {cfg.num_experts} × {cfg.dim}×{cfg.expert_dim}, {rows}×{length} tokens"
    yield f"{label}: weights"
    shapes = nnx.eval_shape(lambda: MoE(cfg, rngs=nnx.Rngs(0)))
    graph, state = filled(shapes, cfg.init_std, "bfloat16")
    params, rest = nnx.split_state(state, nnx.Param, ...)
    key = keys()
    x, dy = (draw(next(key), (rows, length, cfg.dim)) for _ in range(2))

    # Two products of the hidden width and one back, of chosen and shared experts; the router's.
    experts = cfg.experts_per_token + cfg.num_shared_experts
    flops = rows * length * (6 * experts * cfg.dim * cfg.expert_dim + 2 * cfg.dim * cfg.num_experts)
    # Bytes of the operand that each makes of every expert's share, where it is no kernel.
    dense = 2 * rows * length * cfg.num_experts * cfg.dim
    operands = {"ragged_dot": dense * cfg.experts_per_token, "dense": dense}

    def apply(kernels, params, x):
        ctx = make_context(cfg, from_zero(rows, length), how=How(kernels))
        layer = nnx.merge(graph, params, rest)
        routing, _ = layer.route(x, ctx)
        return layer.mix(x, routing, ctx)[0]

    def measure(title: str, run: Callable, chosen: bool) -> Part:
        bars = ("", "layer" if chosen else "")
        work = (flops, 3 * flops)
        yield from both_ways(title, run, (params, x), dy, work, bars, against="product")

    yield from by_backend("grouped_swiglu", label, apply, (params, x), measure, operands)


def attention(
    batch: int = 2,
    length: int = 4096,
    heads: int = 128,
    k_dim: int = 192,
    v_dim: int = 128,
    documents: int = 4,
) -> Part:
    """Causal attention by implementation, and packed documents with the chosen one.

    Counted as usual: half of the square, two products forward, five backward (scores once more).
    """
    key = keys()
    q, k = (draw(next(key), (batch, length, heads, k_dim)) for _ in range(2))
    v, dy = (draw(next(key), (batch, length, heads, v_dim)) for _ in range(2))
    each = length // documents
    segments = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) // each + 1, (batch, length))
    pairs = batch * heads * length**2  # 2 FLOPs for each pair of the half square
    one_way, two_ways = pairs * (k_dim + v_dim), pairs * (4 * k_dim + 3 * v_dim)

    def apply(kernels, q, k, v, segment_ids=None):
        return kernels("causal_attention", q, k, v, scale=k_dim**-0.5, segment_ids=segment_ids)

    def measure(title: str, run: Callable, chosen: bool) -> Part:
        def packed(q, k, v):
            return run(q, k, v, segments)

        bars = ("attention forward", "attention both") if chosen else ("", "")
        limits = dict(against="sheet flops")
        yield from both_ways(title, run, (q, k, v), dy, (one_way, two_ways), bars, **limits)
        if chosen:
            title = f"{title}, {documents} documents a row"
            flops = (one_way / documents, two_ways / documents)
            yield from both_ways(title, packed, (q, k, v), dy, flops, **limits)

    label = f"{batch}×{length}, {heads} heads of {k_dim}/{v_dim}"
    yield from by_backend("causal_attention", label, apply, (q, k, v), measure)


def ops(names: Sequence[str] = OPS) -> Part:
    """Other ops by implementation, at the first of the shapes at which `right` checks each."""
    for op in names:
        draw = Draw(jnp.dtype("bfloat16"), np.random.default_rng(0))
        case = next(CASES[op](draw, choose.platform_of() != "cpu"))
        args, settings = jax.device_put(case.args), dict(case.settings)

        def apply(kernels, *args, op=op, settings=settings):
            return kernels(op, *args, **settings)

        def measure(title: str, run: Callable, chosen: bool, case=case, args=args) -> Part:
            if not case.wrt:
                yield from both_ways(title, run, args)
                return

            def of(*moving):
                by_place = dict(zip(case.wrt, moving, strict=True))
                return run(*(by_place.get(i, x) for i, x in enumerate(args)))

            moving = [args[i] for i in case.wrt]
            dy = jax.tree.map(jnp.ones_like, jax.eval_shape(of, *moving))
            yield from both_ways(title, of, moving, dy)

        yield from by_backend(op, f"{op}, {case.label}", apply, args, measure)


def eight_bits(tokens: int = 8192, dim: int = V3.dim, width: int = 2 * V3.expert_dim) -> Part:
    """A linear layer with its gradients, by recipe of 8-bit training."""
    key = keys()
    x, dy = draw(next(key), (tokens, dim)), draw(next(key), (tokens, width))
    w = draw(next(key), (dim, width), "float32", dim**-0.5)
    for precision in ("none", "fp8", "fp8_ue8m0", "mxfp8"):
        title = f"{tokens} tokens, {dim}×{width}, {precision}"

        def measure(title: str = title, precision: str = precision) -> Part:
            kernels = kernels_for(precision=precision)
            work = (2 * tokens * dim * width, 6 * tokens * dim * width)
            run = partial(kernels, "product")
            yield from both_ways(title, run, (x, w), dy, work, against="product")

        yield from or_why(title, measure)
