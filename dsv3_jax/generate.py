"""From prompts to text: expanded prefill, then a compiled loop of absorbed steps over the latent cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dsv3_jax.cache import LatentCache, fill, latent_cache
from dsv3_jax.config import ModelConfig
from dsv3_jax.modules.transformer import Transformer
from dsv3_jax.ops.sampling import sample


@dataclass
class Generated:
    """What `generate` returns."""

    tokens: list[list[int]]  # new tokens only; a stop token is the last of its row
    acceptance: list[float] = field(default_factory=list)  # of drafts, by position; empty without a draft
    steps: int = 0  # forward passes of the model after prefill


class Sampling(NamedTuple):
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


GREEDY = Sampling()


class Loop(NamedTuple):
    """What the decoding loop carries."""

    cache: LatentCache
    last: Array  # int32 [B]: the newest token, not yet in the cache
    done: Array  # bool [B]
    key: Array
    out: Array  # int32 [B, max_new_tokens], -1 where nothing stands yet
    written: Array  # int32 []: columns of `out` written


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    cache_dtype=None,
    seed: int = 0,
) -> Generated:
    """Continue prompts of any lengths.

    Args:
        model: the model.
        prompts: lists of token ids; they decode side by side, each at its own length.
        max_new_tokens: at most so many new tokens a prompt.
        temperature, top_k, top_p: see `ops.sampling`; temperature 0 takes the likeliest token.
        stop_tokens: a row ends with the first of them.
        cache_dtype: float32 or bfloat16 rows; None is the model's compute dtype.
        seed: of the random draws.
    Raises: ValueError for an empty prompt or batch, a token outside the vocabulary, a prompt and continuation
        beyond max_positions, and sampling settings outside their range.
    """
    sampling = Sampling(temperature, top_k, top_p)
    *_, last = _chunks(model, prompts, max_new_tokens, sampling, stop_tokens, cache_dtype, seed, None)
    out = np.asarray(last.out)
    return Generated(_trim(out, stop_tokens), steps=max(int(last.written) - 1, 0))


def stream(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    cache_dtype=None,
    seed: int = 0,
    chunk: int = 8,
) -> Iterator[int]:
    """`generate` for one prompt, token by token as they come, `chunk` of them computed at a time."""
    seen = 0
    for loop in _chunks(model, [prompt], max_new_tokens, sampling, stop_tokens, cache_dtype, seed, chunk):
        row = _trim(np.asarray(loop.out), stop_tokens)[0]
        yield from row[seen:]
        seen = len(row)


def _trim(out: np.ndarray, stop_tokens: Sequence[int]) -> list[list[int]]:
    rows = []
    for row in out:
        row = row[row >= 0]
        stops = np.flatnonzero(np.isin(row, stop_tokens))
        rows.append([int(t) for t in (row[: stops[0] + 1] if stops.size else row)])
    return rows


def check_request(
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[int] = (),
) -> None:
    """Refuse what cannot be generated. Raises: ValueError, one sentence with the offending value."""
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} is below 1")
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: give at least one token")
        for token in prompt:
            if not 0 <= token < cfg.vocab_size:
                raise ValueError(f"prompt {i} holds token {token}, outside the vocabulary of {cfg.vocab_size}")
        if len(prompt) + max_new_tokens > cfg.max_positions:
            raise ValueError(
                f"prompt {i} of {len(prompt)} tokens and {max_new_tokens} new ones do not fit in the cache: "
                f"the model's max_positions is {cfg.max_positions}"
            )
    for token in stop_tokens:
        if not 0 <= token < cfg.vocab_size:
            raise ValueError(f"stop token {token} is outside the vocabulary of {cfg.vocab_size}")
    if not sampling.temperature >= 0:
        raise ValueError(f"temperature={sampling.temperature} is not 0 or above")
    if sampling.top_k is not None and sampling.top_k < 1:
        raise ValueError(f"top_k={sampling.top_k} is below 1")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p={sampling.top_p} is outside (0, 1]")


def _chunks(model, prompts, max_new_tokens, sampling, stop_tokens, cache_dtype, seed, chunk) -> Iterator[Loop]:
    """The loop's state after each `chunk` tokens; `None` runs to the end."""
    cfg = model.cfg
    check_request(cfg, prompts, max_new_tokens, sampling, stop_tokens)
    if cache_dtype is not None and cache_dtype not in (jnp.float32, jnp.bfloat16, "float32", "bfloat16"):
        raise ValueError(f"cache_dtype={cache_dtype!r} is not float32 or bfloat16")
    lengths = np.array([len(p) for p in prompts], np.int32)
    # Shapes in steps of 32, so that prompts of nearby lengths share one compilation.
    width = min(_round_up(int(lengths.max()), 32), cfg.max_positions)
    capacity = min(_round_up(int(lengths.max()) + max_new_tokens, 32), cfg.max_positions)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    graphdef, state = nnx.split(model)
    dtype = jnp.dtype(cfg.compute_dtype if cache_dtype is None else cache_dtype)
    stops = jnp.asarray(tuple(stop_tokens), jnp.int32)
    loop = _prefill(
        graphdef, state, jnp.asarray(tokens), jnp.asarray(lengths), jax.random.key(seed), stops,
        sampling=sampling, capacity=capacity, max_new_tokens=max_new_tokens, dtype=dtype,
    )  # fmt: skip
    yield loop
    while int(loop.written) < max_new_tokens and not bool(loop.done.all()):
        until = max_new_tokens if chunk is None else min(int(loop.written) + chunk, max_new_tokens)
        loop = _decode(graphdef, state, loop, stops, jnp.asarray(until, jnp.int32), sampling=sampling)
        yield loop


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


@partial(jax.jit, static_argnames=("graphdef", "sampling", "capacity", "max_new_tokens", "dtype"))
def _prefill(graphdef, state, tokens, lengths, key, stops, *, sampling, capacity, max_new_tokens, dtype) -> Loop:
    model = nnx.merge(graphdef, state)
    trace = model.trace(tokens)
    batch = tokens.shape[0]
    cache = fill(latent_cache(model.cfg, batch, capacity, dtype), trace.cache_rows, lengths)
    h = jnp.take_along_axis(trace.h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    out = jnp.full((batch, max_new_tokens), -1, jnp.int32)
    start = Loop(cache, lengths, jnp.zeros((batch,), jnp.bool_), key, out, jnp.zeros((), jnp.int32))
    return _choose(model, h, start, stops, sampling)


@partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames=("loop",))
def _decode(graphdef, state, loop: Loop, stops, until, *, sampling) -> Loop:
    model = nnx.merge(graphdef, state)

    def step(loop: Loop) -> Loop:
        h, cache = model.decode(loop.last[:, None], loop.cache)
        return _choose(model, h[:, 0], loop._replace(cache=cache), stops, sampling)

    return jax.lax.while_loop(lambda s: (s.written < until) & ~s.done.all(), step, loop)


def _choose(model, h, loop: Loop, stops, sampling: Sampling) -> Loop:
    """Pick the token that follows hidden state h [B, D], and note it."""
    key, draw = jax.random.split(loop.key)
    token = sample(model.logits(h), draw, **sampling._asdict())
    token = jnp.where(loop.done, -1, token)
    out = jax.lax.dynamic_update_slice_in_dim(loop.out, token[:, None], loop.written, 1)
    done = loop.done | (token[:, None] == stops[None]).any(-1)
    return Loop(loop.cache, jnp.maximum(token, 0), done, key, out, loop.written + 1)
