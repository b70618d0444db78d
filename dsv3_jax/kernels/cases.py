"""The arguments with which `check.py` compares implementations: a model's shapes, and odd ones.

Kernels go wrong where shapes end: experts without rows, one with all of them, counts and widths
that no tile divides, one token, many documents, rows of 8 bits, sequences of all lengths.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsv3_jax.ops.cached_attention import Stored
from dsv3_jax.ops.quantize import quantize_rows


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    label: str
    args: tuple[Any, ...]
    wrt: tuple[int, ...] = ()  # the arguments that take a gradient
    arrays: dict[str, Any] = field(default_factory=dict)  # arguments by name
    settings: tuple[tuple[str, Any], ...] = ()  # likewise, known when the call is compiled


PERIOD = 1_048_573  # of the random numbers, a prime: no two rows, heads or experts are the same


@cache
def _numbers() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(PERIOD, np.float32)


@dataclass(frozen=True)
class Draw:
    """Normal numbers of any shape and dtype. Arrays of a model's size take a second."""

    dtype: Any
    rng: np.random.Generator

    def __call__(self, *shape: int, std: float = 1.0, dtype: Any = None) -> np.ndarray:
        numbers = (_numbers() * np.float32(std)).astype(dtype or self.dtype)
        return np.resize(np.roll(numbers, self.rng.integers(PERIOD)), shape)


# The arrays' shapes for ops that take nothing else. The first one is for 8-bit recipes too.
PLAIN: dict[str, tuple[tuple[tuple[int, ...], ...], ...]] = {
    "product": (((256, 384), (384, 256)), ((1, 1024), (1024, 512)), ((3, 200), (200, 160))),
    "exact_product": (((1, 1024), (1024, 64)), ((3, 200), (200, 160)), ((256, 1024), (1024, 64))),
    "swiglu": tuple(
        ((n, 384), (384, f), (384, f), (f, 384)) for n, f in ((256, 256), (3, 160), (1, 160))
    ),
    "product_by_head": (((2, 8, 128), (8, 128, 512)), ((100, 8, 128), (8, 128, 64))),
    "expand": (((2, 64, 512), (2, 64, 64), (4, 128, 512), (4, 128, 512)),),
}


def plain(op: str, draw: Draw, large: bool) -> Iterator[Case]:
    """Factors are scaled so that results are about 1."""
    for first, *others in PLAIN[op]:
        x = draw(*first)
        factors = (draw(*shape, std=shape[-1] ** -0.5) for shape in others)
        label = " × ".join(map(str, (first, *others)))
        yield Case(label, (x, *factors), wrt=tuple(range(1 + len(others))))


def causal_attention(draw: Draw, large: bool) -> Iterator[Case]:
    """MLA's heads and GQA's; one document a row, or several, of which the last has one token."""
    long, odd = (2048, 1000) if large else (200, 129)
    for length, groups, key in ((long, 4, 192), (odd, 2, 128), (1, 4, 192)):
        q = draw(2, length, 4, key)
        k = draw(2, length, groups, key)
        v = draw(2, length, groups, 128)

        # Documents of all lengths, and a last one of one token.
        ids = np.sort(draw.rng.integers(1, 6, (2, length)), axis=1).astype(np.int32)
        ids[:, -1] = 9

        # The softmax of one score is 1, so queries and keys then take no gradient.
        wrt = (0, 1, 2) if length > 1 else (2,)
        label = f"{length} tokens, heads of {key}/128"
        settings = (("scale", key**-0.5),)
        yield Case(label, (q, k, v), wrt, settings=settings)
        yield Case(f"{label}, documents", (q, k, v), wrt, {"segment_ids": ids}, settings)


def cached_attention(draw: Draw, large: bool) -> Iterator[Case]:
    """Latents in all dtypes of a cache; sequences of all lengths, from one token to a full one."""
    batch, heads, even = (32, 16, 4096) if large else (3, 4, 128)
    sizes = ((1, draw.dtype, even), (3, np.int8, even + 1), (1, jnp.float8_e4m3fn, even))
    for tokens, dtype, slots in sizes:
        keys = [Stored(jnp.asarray(draw(batch, 1, slots, width)), None) for width in (512, 64)]
        if dtype != draw.dtype:
            keys = [Stored(*quantize_rows(x.rows, dtype)) for x in keys]

        # Each new token sees the rows before it and its own.
        first = np.append([0, slots - tokens], draw.rng.integers(0, slots - tokens, batch - 2))
        last = np.repeat(first[:, None] + np.arange(tokens), heads, axis=1).astype(np.int32)

        queries = [draw(batch, 1, tokens * heads, width) for width in (512, 64)]
        label = f"{jnp.dtype(dtype).name}, {batch} × {slots} slots, {tokens} new tokens"
        yield Case(label, (queries, keys, keys[0], last), settings=(("scale", 192**-0.5),))


def write_rows(draw: Draw, large: bool) -> Iterator[Case]:
    """One layer or two."""
    for layers, dtype in ((1, draw.dtype), (1, np.int8), (2, np.int8)):
        old = draw(layers, 3, 1, 97, 64, std=20.0, dtype=dtype)
        new = draw(3, 1, 2, 64, std=20.0, dtype=dtype)
        first = np.array([0, 95, 33], np.int32)
        yield Case(f"{layers} layers", (old, new, np.int32(layers - 1), first))


def index_choose(draw: Draw, large: bool) -> Iterator[Case]:
    """One token and several; whole numbers, so that no rounding changes a choice, and many ties."""
    slots, k = (8192, 2048) if large else (300, 64)
    for tokens, dtype in ((1, draw.dtype), (37, draw.dtype), (2, jnp.int8)):
        shapes = ((2, tokens, 16, 16), (2, tokens, 16), (2, 1, slots, 16))
        q, w, rows = (np.round(draw(*shape)).astype(draw.dtype) for shape in shapes)

        scales = jnp.ones((2, 1, slots, 1)) if dtype == jnp.int8 else None
        keys = Stored(jnp.asarray(rows, dtype), scales)

        # The last slot that each new token sees.
        last = np.sort(draw.rng.integers(0, slots, (2, tokens))).astype(np.int32)
        yield Case(f"{tokens} tokens", (q, w, keys, last), settings=(("k", k),))


def sparse_attention(draw: Draw, large: bool) -> Iterator[Case]:
    """Absorbed and expanded; some queries see fewer tokens than others."""
    slots, k = (8192, 2048) if large else (300, 64)
    for tokens, groups, each in ((1, 1, 16), (19, 1, 16), (5, 3, 1)):
        keys = [Stored(jnp.asarray(draw(2, groups, slots, width)), None) for width in (128, 64)]
        queries = [draw(2, tokens, groups, each, width) for width in (128, 64)]

        # A choice of tokens without repetition; the first query sees half as many.
        order = np.argsort(draw.rng.random((2, tokens, slots)))
        ids = order[..., :k].astype(np.int32)
        ids[:, 0, k // 2 :] = -1

        label = f"{tokens} tokens, {groups} × {each} heads"
        args = (queries, keys, keys[0], jnp.asarray(ids))
        yield Case(label, args, settings=(("scale", 192**-0.5),))


# (at a model's shapes alone? None: always; tokens, choices of each, experts, D, F, weights' dtype
# or the tokens')
MANY_ROWS = (
    (True, 2048, 6, 64, 2048, 1408, "f4"),
    (True, 1024, 2, 6, 7168, 2048, None),
    (None, 150, 2, 8, 192, 320, "f4"),
    (None, 70, 3, 8, 128, 160, None),
    (False, 1, 2, 4, 128, 128, None),  # a model decodes so few
)
FEW_ROWS = (
    (True, 64, 4, 64, 2048, 1408, None),
    (False, 8, 4, 8, 128, 192, None),
    (None, 1, 4, 8, 128, 192, None),
)


def experts(
    sizes: tuple, wrt: tuple[int, ...], settings: tuple, draw: Draw, large: bool
) -> Iterator[Case]:
    """Each pattern of choices at each size."""
    for at, tokens, each, count, dim, hidden, dtype in sizes:
        if at not in (None, large):
            continue
        shapes = (dim, hidden), (dim, hidden), (hidden, dim)
        weights = [draw(count, *shape, std=shape[0] ** -0.5, dtype=dtype) for shape in shapes]

        patterns = ("holes", "one full", "elsewhere")[: 2 if draw.dtype == np.float32 else 3]
        for pattern in patterns:
            # Four experts have no rows, but for the second, which has a single one.
            scores = draw.rng.random((tokens, count))
            gates = draw.rng.uniform(0.1, 1, (tokens, each))
            scores[:, [0, 1, count // 2, count - 1]] -= 1
            scores[-1, 1] = 2
            ids = np.argsort(-scores, axis=1)[:, :each].astype(np.int32)

            if pattern == "one full":
                ids[:] = 2
            if pattern == "elsewhere":  # as on a mesh: choices of no expert that is here
                ids[::2, 0] = count
                gates[::2, 0] = 0

            label = f"{pattern}, {tokens} tokens, {count} experts of {dim}×{hidden}"
            args = (draw(tokens, dim), ids, gates.astype(draw.dtype), *weights)
            yield Case(label, args, wrt, settings=settings)


def cross_entropy(draw: Draw, large: bool) -> Iterator[Case]:
    tokens, dim, vocab = (4096, 2048, 102_400) if large else (70, 64, 1000)
    targets = draw.rng.integers(0, vocab, tokens, np.int32)
    mask = draw.rng.random(tokens) < 0.8
    args = (draw(tokens, dim), draw(dim, vocab, std=0.1), targets, mask)
    yield Case(f"{tokens} tokens, {vocab} words", args, (0, 1))


def embedding(draw: Draw, large: bool) -> Iterator[Case]:
    """Some words occur often, some never."""
    words = np.minimum(draw.rng.zipf(1.3, (2, 1000)), 900).astype(np.int32)
    yield Case("1000 words", (draw(1000, 96), words), (0,))


def rotate_last(draw: Draw, large: bool) -> Iterator[Case]:
    """Both orders of a pair's numbers."""
    angles = draw.rng.uniform(0, 6, (2, 70, 1, 32)).astype(np.float32)
    for interleaved in (True, False):
        args = (draw(2, 70, 4, 192), np.cos(angles), np.sin(angles))
        settings = (("interleaved", interleaved),)
        yield Case(f"interleaved={interleaved}", args, (0,), settings=settings)


def optimizer(draw: Draw, large: bool) -> Iterator[Case]:
    p, mu, g = (draw(300, 256, std=0.01) for _ in range(3))
    numbers = np.array([0.7, 3.0, 9.0, 1e-3, 1.0], np.float32)
    settings = (("betas", (0.9, 0.95)), ("eps", 1e-8), ("decay", 0.1))
    yield Case("300 × 256", (p, mu, np.square(mu), g, numbers), settings=settings)


GRADIENTS = (0, 2, 3, 4, 5)  # of tokens, gates and the experts' weights
ALONE = (
    causal_attention, cached_attention, index_choose, sparse_attention, write_rows, cross_entropy,
    embedding, optimizer, rotate_last,
)  # fmt: skip
CASES: dict[str, Callable[[Draw, bool], Iterator[Case]]] = {
    **{op: partial(plain, op) for op in PLAIN},
    **{of_op.__name__: of_op for of_op in ALONE},
    "grouped_swiglu": partial(experts, MANY_ROWS, GRADIENTS, ()),
    "decode_experts": partial(experts, FEW_ROWS, (), ()),
    "capacity_swiglu": partial(
        experts, ((None, 8, 4, 8, 128, 192, None),), GRADIENTS, (("factor", 1.0),)
    ),
}
