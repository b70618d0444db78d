"""From prompts to text: expanded prefill, then one compiled loop of { draft → a step over the drafts → accept by row }.

Plain decoding is that loop with no draft. Each sequence advances by its own count in the cache that it has; none waits.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import ModelConfig
from dsv3_jax.decoding.drafters import Drafter, Drafts, Fresh, kept_by_rows, make_drafter
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import Cache, bytes_per_token, empty_cache, fill, in_place, pick_dtype, pick_kind
from dsv3_jax.model.transformer import Ready, Transformer
from dsv3_jax.ops.sampling import GREEDY, Sampling
from dsv3_jax.ops.verify_drafts import accept


@dataclass
class Generated:
    """What `generate` returns."""

    tokens: list[list[int]]  # new tokens only; a stop token is the last of its row
    acceptance: list[float] = field(default_factory=list)  # share of steps in which the draft at each position stood
    steps: int = 0  # forward passes of the model after prefill
    prefill_seconds: float = 0.0  # with compilation, where these shapes were not run before
    decode_seconds: float = 0.0  # likewise
    cache_bytes: int = 0  # of the whole cache, free places too
    cache_bytes_per_token: int = 0

    @property
    def mean_accepted(self) -> float:
        """Tokens that a step brings to a sequence, before its end: 1 and the drafts that stand."""
        return 1.0 + sum(self.acceptance)

    @property
    def tokens_per_s(self) -> float:
        """New tokens after each row's first, a second of decoding."""
        return sum(len(row) - 1 for row in self.tokens) / max(self.decode_seconds, 1e-9)


class Loop(NamedTuple):
    """What the decoding loop carries. On a mesh, what is as wide as the model lies with its row; all else is whole."""

    cache: Cache
    drafter: Any  # the drafter's state
    fresh: Any  # Fresh: what the last step brought; None before the first
    done: Array  # bool [B]
    key: Array
    out: Array  # int32 [B, max_new_tokens], -1 where nothing stands yet
    written: Array  # int32 [B]: tokens in each row of `out`
    steps: Array  # int32 []
    stood: Array  # int32 [J]: drafts that stood, by position
    drafted: Array  # int32 []: steps of rows that were not done


class _Static(NamedTuple):
    """What the compiled programs are made for."""

    sampling: Sampling
    draft_length: int  # J; 0 without a draft
    draft: Any  # None, "mtp", or the graph of a draft model


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    cache: str | None = None,
    cache_dtype=None,
    draft: str | Transformer | None = None,
    draft_length: int = 1,
    seed: int = 0,
) -> Generated:
    """Continue prompts of any lengths.

    Where the model lies on a mesh (`load_model(folder, mesh)`, `hf.load(path, mesh=…)`), it decodes there: rows are cut
    over "data" and "expert" as far as their number divides, and each row's cache stays where its row is. The tokens are
    a single device's, but for the order of additions: in bfloat16 two tokens about as likely may change places.

    Args:
        model: the model.
        prompts: lists of token ids; they decode side by side, each at its own length.
        max_new_tokens: at most so many new tokens a prompt.
        temperature, top_k, top_p: see `ops.sampling`; temperature 0 takes the likeliest token.
        stop_tokens: a row ends with the first of them.
        cache: "latent", "expanded" or "none", see `cache.py`; None is the smallest that the model can use.
        cache_dtype: "float32", "bfloat16", "int8" or "float8_e4m3"; None is the model's compute dtype.
        draft: who drafts: None, "mtp" (the model's own multi-token heads, of whatever kind) or a smaller Transformer of
            the same vocabulary and on the same mesh. What comes out is distributed as without, and the same at
            temperature 0.
        draft_length: tokens drafted a step. DeepSeek's and EAGLE heads go on beyond their depth.
        seed: of the random draws.
    Raises: ValueError for an empty prompt or batch, a token outside the vocabulary, a prompt and continuation
        beyond max_positions, settings outside their range, a draft of another vocabulary or on another mesh, or heads
        that are not there.
    """
    sampling = Sampling(temperature, top_k, top_p)
    *_, last = generate_in_parts(
        model, prompts, max_new_tokens, sampling=sampling, stop_tokens=stop_tokens, cache=cache,
        cache_dtype=cache_dtype, draft=draft, draft_length=draft_length, seed=seed, part=None,
    )  # fmt: skip
    return last


def stream(model: Transformer, prompt: Sequence[int], max_new_tokens: int, **settings) -> Iterator[int]:
    """`generate_in_parts` for one prompt, token by token as they come."""
    seen = 0
    for made in generate_in_parts(model, [prompt], max_new_tokens, **settings):
        yield from made.tokens[0][seen:]
        seen = len(made.tokens[0])


def generate_in_parts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    cache: str | None = None,
    cache_dtype=None,
    draft: str | Transformer | None = None,
    draft_length: int = 1,
    seed: int = 0,
    part: int | None = 8,
) -> Iterator[Generated]:
    """`generate` as it grows: after the first token, then after every `part` more (None: all)."""
    cfg = model.cfg
    check_request(cfg, prompts, max_new_tokens, sampling, stop_tokens)
    length = check_draft(cfg, prompts, max_new_tokens, draft, draft_length)
    kind, dtype = pick_kind(cfg, cache), pick_dtype(cfg, cache_dtype)
    lengths = np.array([len(p) for p in prompts], np.int32)
    # Shapes in steps of 32, so that prompts of nearby lengths share one compilation.
    width = min(_round_up(int(lengths.max()), 32), cfg.max_positions)
    capacity = _round_up(int(lengths.max()) + max_new_tokens + length, 32)
    if kind == "none":
        capacity = min(capacity, cfg.max_positions)  # every step runs the model over all of it
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    graphdef, state = nnx.split(model)
    drafts: tuple[Any, Any] = nnx.split(draft) if isinstance(draft, Transformer) else (draft, None)
    static = _Static(sampling, length, drafts[0])
    stops = jnp.asarray(tuple(stop_tokens), jnp.int32)
    mesh = sharding.mesh_of(state)
    if drafts[1] is not None and sharding.mesh_of(drafts[1]) != mesh:
        raise ValueError("the draft model does not lie on the mesh that the model lies on")
    start = time.perf_counter()
    with sharding.in_force(mesh):  # and never where this generator waits: what is in force is the caller's, too
        loop = _prefill(
            graphdef, state, drafts[1], jnp.asarray(tokens), jnp.asarray(lengths), jax.random.key(seed), stops,
            static=static, capacity=capacity, max_new_tokens=max_new_tokens, kind=kind, dtype=dtype,
        )  # fmt: skip
        jax.block_until_ready(loop)
    prefill_seconds, decode_seconds = time.perf_counter() - start, 0.0
    with sharding.in_force(mesh):
        ready = _ready(graphdef, state), None if drafts[1] is None else _ready(*drafts)
    per_token, size = bytes_per_token(cfg, kind, dtype), loop.cache.nbytes

    def seen(loop: Loop) -> Generated:
        acceptance = [float(x) for x in np.asarray(loop.stood) / max(int(loop.drafted), 1)]
        rows = [
            [int(t) for t in row[:n]] for row, n in zip(np.asarray(loop.out), np.asarray(loop.written), strict=True)
        ]
        return Generated(rows, acceptance, int(loop.steps), prefill_seconds, decode_seconds, size, per_token)

    yield seen(loop)
    while not bool(loop.done.all()):
        # From the shortest row that goes on: one that has ended grows no more.
        behind = int(jnp.where(loop.done, max_new_tokens, loop.written).min())
        until = max_new_tokens if part is None else min(behind + part, max_new_tokens)
        start = time.perf_counter()
        with sharding.in_force(mesh):
            loop = _decode(graphdef, state, drafts[1], ready, loop, stops, jnp.asarray(until, jnp.int32), static=static)
            jax.block_until_ready(loop)
        decode_seconds += time.perf_counter() - start
        yield seen(loop)


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


def check_draft(
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    draft: str | Transformer | None,
    length: int,
) -> int:
    """The draft length of a request that `check_request` lets pass; 0 where nobody drafts.

    Raises: ValueError, one sentence with the offending value.
    """
    if draft is None:
        return 0
    if length < 1:
        raise ValueError(f"draft_length={length} is below 1")
    reach = cfg.max_positions
    if isinstance(draft, Transformer):
        if draft.cfg.vocab_size != cfg.vocab_size:
            raise ValueError(
                f"the draft model's vocabulary of {draft.cfg.vocab_size} is not the model's of {cfg.vocab_size}"
            )
        reach = min(reach, draft.cfg.max_positions)
    elif draft != "mtp":
        raise ValueError(f"draft={draft!r} is not None, 'mtp' or a Transformer")
    elif not cfg.mtp_depth:
        raise ValueError("draft='mtp' needs multi-token heads, and the model's mtp_depth is 0")
    elif not cfg.chained_heads and length > cfg.mtp_depth:
        raise ValueError(
            f"draft_length={length} is more than mtp_depth={cfg.mtp_depth}: each {cfg.mtp_kind} head drafts one token"
        )
    longest = max(map(len, prompts)) + max_new_tokens
    if longest + length > reach:
        raise ValueError(
            f"draft_length={length} does not fit in the cache: {longest} tokens of prompt and continuation leave "
            f"{reach - longest} of max_positions={reach}"
        )
    return length


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _drafter(model: Transformer, static: _Static, draft_state: Any, ready: Any = (None, None)) -> Drafter | None:
    if static.draft is None:
        return None
    if static.draft == "mtp":
        return make_drafter(model, None, ready[0])
    return make_drafter(model, nnx.merge(static.draft, draft_state), ready[1])


@partial(jax.jit, static_argnames="graphdef")
def _ready(graphdef, state) -> Ready | None:
    return nnx.merge(graphdef, state).ready()


@partial(jax.jit, static_argnames=("graphdef", "static", "capacity", "max_new_tokens", "kind", "dtype"))
def _prefill(
    graphdef, state, draft_state, tokens, lengths, key, stops, *, static, capacity, max_new_tokens, kind, dtype
) -> Loop:
    model, tokens = nnx.merge(graphdef, state), constrain(tokens, "batch", None)
    trace = model.trace(tokens, kind=kind)
    batch, drafts = tokens.shape[0], static.draft_length
    cache = empty_cache(model.cfg, model.cfg.num_layers, batch, capacity, kind, dtype)
    if kind == "none":
        at = (slice(None), slice(0, tokens.shape[1]))
        cache = replace(cache, tokens=cache.tokens.at[at].set(tokens), lengths=lengths)
    else:
        cache = fill(cache, trace.cache_rows, lengths)
    drafter = _drafter(model, static, draft_state)
    started = None if drafter is None else drafter.start(trace, tokens, lengths, capacity, kind, dtype)
    rows = jnp.zeros((batch,), jnp.int32)
    loop = Loop(
        cache, started, None, rows > 0, key, jnp.full((batch, max_new_tokens), -1, jnp.int32), rows,
        jnp.zeros((), jnp.int32), jnp.zeros((drafts,), jnp.int32), jnp.zeros((), jnp.int32),
    )  # fmt: skip
    # As if a step had just run over the prompt's last token.
    start = lengths - 1
    last, x = (jnp.take_along_axis(y, start.reshape(-1, *[1] * (y.ndim - 1)), axis=1) for y in (tokens, trace.x))
    return _advance(model, loop, Drafts(last[:, 1:], None), x, start, last[:, 0], stops, static)


@partial(jax.jit, static_argnames=("graphdef", "static"), donate_argnames=("loop",))
def _decode(graphdef, state, draft_state, ready, loop: Loop, stops, until, *, static) -> Loop:
    model = nnx.merge(graphdef, state)
    drafter = _drafter(model, static, draft_state, ready)

    def step(loop: Loop) -> Loop:
        newest = jnp.take_along_axis(loop.fresh.tokens, loop.fresh.standing[:, None] - 1, axis=1)
        drafts = Drafts(newest[:, 1:], None)
        if drafter is not None:
            key, draw = jax.random.split(loop.key)
            drafts, started = drafter.draft(loop.drafter, loop.fresh, static.draft_length, draw, static.sampling)
            loop = loop._replace(drafter=started, key=key, drafted=loop.drafted + (~loop.done).sum(dtype=jnp.int32))
        start = loop.cache.lengths
        x, cache = model.decode(jnp.concatenate([newest, drafts.tokens], axis=1), loop.cache, ready[0])
        loop = loop._replace(cache=cache, steps=loop.steps + 1)
        return _advance(model, loop, drafts, x, start, newest[:, 0], stops, static)

    return jax.lax.while_loop(lambda s: ((s.written < until) & ~s.done).any(), step, loop)


def _advance(
    model: Transformer,
    loop: Loop,
    drafts: Drafts,
    x: Array,
    start: Array,
    previous: Array,
    stops: Array,
    static: _Static,
) -> Loop:
    """Let drafts stand or fall, note the tokens, and move each row on by its own count.

    Args: x [B, F, D], the trunk's output at token `previous`, which stands at `start`, and at each draft.
    """
    key, draw = jax.random.split(loop.key)
    logits, left = kept_by_rows(model.next_logits(model.norm(x)), static.sampling)
    stood, tokens = map(constrain, accept(drafts.tokens, drafts.q, logits, draw, left))
    place = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    count = jnp.minimum(stood + 1, loop.out.shape[1] - loop.written)
    ends = (tokens[..., None] == stops[None, None]).any(-1) & (place < count[:, None])
    ended = ends.any(axis=1)
    count = jnp.where(ended, jnp.argmax(ends, axis=1).astype(jnp.int32) + 1, count)
    count = jnp.where(loop.done, 0, count)
    column = jnp.where(
        place < count[:, None], loop.written[:, None] + place, loop.out.shape[1]
    )  # past the end: dropped
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    written = loop.written + count
    # A row that is done stays where it is; its numbers are computed and never looked at.
    lengths = jnp.where(loop.done, loop.cache.lengths, start + count)
    pad = static.draft_length + 1 - x.shape[1]
    h = jnp.pad(model.read_by_heads(x), ((0, 0), (0, pad), (0, 0)))
    stands = (place[:, : drafts.tokens.shape[1]] < stood[:, None]) & ~loop.done[:, None]
    return loop._replace(
        cache=in_place(replace(loop.cache, lengths=lengths)),
        fresh=Fresh(
            constrain(h, "batch", None, None),
            jnp.pad(tokens, ((0, 0), (0, pad))),
            jnp.maximum(count, 1),
            start,
            previous,
        ),
        key=key,
        out=constrain(loop.out.at[rows, column].set(tokens, mode="drop")),
        written=constrain(written),
        done=constrain(loop.done | ended | (written == loop.out.shape[1])),
        stood=loop.stood + jnp.pad(stands.sum(axis=0, dtype=jnp.int32), (0, pad)),
    )
