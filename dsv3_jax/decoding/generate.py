"""From prompts to text: expanded prefill, then one compiled loop of { draft → a step over the drafts → accept by row }.

Plain decoding is that loop without drafts. Each sequence advances by its own count in its own cache rows; none waits.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import CacheKind
from dsv3_jax.decoding import auto_length
from dsv3_jax.decoding.auto_length import Control, Costs, Options
from dsv3_jax.decoding.decode_config import OWN_DRAFTS, DecodeConfig
from dsv3_jax.decoding.drafters import Drafter, Drafts, Prompt, StepResult, make_drafter, process_by_rows
from dsv3_jax.decoding.without_cache import decode_without_cache
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import keep_sharded, pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.transformer import DecodeWeights, Transformer
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.ops.verify_drafts import accept


@dataclass
class Generated:
    """What `generate` returns.

    Example:
        >>> result = Generated([[1, 2, 3]], acceptance=[0.5, 0.25], decode_seconds=0.5)
        >>> result.mean_accepted, result.tokens_per_s
        (1.75, 4.0)
    """

    tokens: list[list[int]]  # new tokens only; a stop token is the last of its row
    acceptance: list[float] = field(default_factory=list)  # share of steps that accepted the draft at each position
    steps: int = 0  # forward passes of the model after prefill
    prefill_seconds: float = 0.0  # with compilation, and the costs of "auto", if these shapes were not run before
    decode_seconds: float = 0.0  # likewise
    cache_bytes: int = 0  # of all slots, free ones too
    cache_bytes_per_token: int = 0
    steps_by_length: dict[int, int] = field(default_factory=dict)  # draft_length="auto": steps by verified drafts

    @property
    def mean_accepted(self) -> float:
        """Tokens that a step adds to a sequence, before its end: 1 and the accepted drafts."""
        return 1.0 + sum(self.acceptance)

    @property
    def tokens_per_s(self) -> float:
        """New tokens after each row's first, a second of decoding."""
        return sum(len(row) - 1 for row in self.tokens) / max(self.decode_seconds, 1e-9)


class Loop(NamedTuple):
    """The decoding loop's state. On a mesh, arrays as wide as the model are sharded by rows; others replicated."""

    cache: Any
    drafter: Any  # the drafter's state
    last: Any  # StepResult; None before the first step
    done: Array  # bool [B]
    key: Array
    out: Array  # int32 [B, max_new_tokens], -1 beyond what is written
    written: Array  # int32 [B]: tokens in each row of `out`
    steps: Array  # int32 []
    num_accepted: Array  # int32 [J]: accepted drafts, by position
    drafted: Array  # int32 []: steps of rows that were not done
    tally: Any = None  # what `auto_length` knows


class _Static(NamedTuple):
    """The settings that the compiled programs depend on."""

    sampling: Sampling
    draft_length: int  # J, the largest of "auto"; 0 without a draft
    draft: Any  # None, "mtp", "lookup", or the graph of a draft model
    max_new_tokens: int
    capacity: int
    kind: CacheKind
    dtype: Any
    auto: Options | None = None  # None: each step has J drafts


_COSTS: dict[Any, Costs] = {}  # of the shapes that have run


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
    cache_dtype: Any = None,
    draft: "str | Transformer | None" = None,
    draft_length: int | str = 1,
    seed: int = 0,
) -> Generated:
    """Continue prompts of any lengths.

    A model on a mesh (`load_model(folder, mesh)`, `hf.load(path, mesh=…)`) decodes there. Rows are sharded over "data"
    and "expert" as far as their number divides, and each row's cache stays with its row. The tokens are a single
    device's up to the order of additions: in bfloat16 two tokens about as likely may change places. No token is ever
    dropped, whatever the model's capacity_factor.

    Args:
        model: the model.
        prompts: lists of token ids; they decode in one batch, each at its own length.
        max_new_tokens: at most so many new tokens a prompt.
        temperature, top_k, top_p: see `ops.sampling`; temperature 0 takes the likeliest token.
        stop_tokens: a row ends with the first of them.
        cache: "latent" or "expanded", see `model/cache.py`; "none" recomputes all tokens each step, without drafts.
            None means the smallest cache that the model can use.
        cache_dtype: "float32", "bfloat16", "int8" or "float8_e4m3". None means the model's compute dtype.
        draft: who drafts: None, "mtp" (the model's own multi-token heads, of any kind), "lookup" (the text so far: what
            followed the same tokens before) or a smaller Transformer with the same vocabulary, on the same mesh. Text
            has the same distribution as without, and is the same at temperature 0.
        draft_length: tokens drafted a step. DeepSeek's and EAGLE heads draft beyond their depth. "auto" chooses at each
            step by the cost of drafts and by how sure the drafter is, and falls back to plain steps. The first request
            of a shape measures the costs. Sampled text then depends on them, not on the seed alone; its law does not.
        seed: of the random draws.
    Raises: ValueError for an empty prompt or batch, a token outside the vocabulary, a prompt and continuation beyond
        max_positions, or settings outside their range. Also for a draft with another vocabulary or on another mesh, or
        heads that the model does not have.

    >>> from flax import nnx
    >>> import dsv3_jax as ds
    >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, num_dense_layers=1, mtp_depth=0)
    >>> model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
    >>> result = ds.generate(model, [[1, 2, 3], [4]], 5)
    >>> [len(tokens) for tokens in result.tokens]
    [5, 5]
    """
    config = DecodeConfig(
        max_new_tokens, Sampling(temperature, top_k, top_p), cache, cache_dtype, draft, draft_length,
        stop_tokens, seed,
    )  # fmt: skip
    *_, last = generate_in_parts(model, prompts, config, part=None)
    return last


def stream(model: Transformer, prompt: Sequence[int], config: DecodeConfig) -> Iterator[int]:
    """Yield the tokens of `generate_in_parts` for one prompt as they come.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all weights are 0
        >>> list(stream(model, [1, 2, 3], DecodeConfig(max_new_tokens=4)))
        [0, 0, 0, 0]
    """
    seen = 0
    for result in generate_in_parts(model, [prompt], config):
        yield from result.tokens[0][seen:]
        seen = len(result.tokens[0])


def generate_in_parts(
    model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig, *, part: int | None = 8
) -> Iterator[Generated]:
    """Yield the result of `generate` as it grows: after the first token, then every `part` tokens (None: at the end).

    Raises: ValueError as `generate`.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all weights are 0
        >>> [result.tokens for result in generate_in_parts(model, [[1, 2, 3]], DecodeConfig(max_new_tokens=4), part=2)]
        [[[0]], [[0, 0, 0]], [[0, 0, 0, 0]]]
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"model={model!r} is not a Transformer")
    cfg = model.cfg
    config.check(cfg, prompts)
    if config.cache == "none":
        yield from _uncached_in_parts(model, prompts, config, part)
        return
    kind, dtype = pick_kind(cfg, config.cache), pick_dtype(model.compute_dtype, config.cache_dtype)
    lengths = np.array([len(p) for p in prompts], np.int32)
    # Shapes in steps of 32, so that prompts of nearby lengths share one compilation.
    longest = max(int(lengths.max()), config.pad_prompts_to)
    width = min(_round_up(longest, 32), cfg.max_positions)
    capacity = _round_up(longest + config.max_new_tokens + config.num_drafts, 32)
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    graphdef, state = nnx.split(model.in_compute_dtype())
    auto, draft_length = None, config.num_drafts
    if config.draft is not None and config.draft_length == "auto":
        auto = auto_length.make_options(config.draft, cfg, len(prompts), config.max_new_tokens)
        draft_length = auto.lengths[-1]
    draft: tuple[Any, Any] = config.draft, None
    if isinstance(config.draft, Transformer):
        draft = nnx.split(config.draft.in_compute_dtype())
    static = _Static(config.sampling, draft_length, draft[0], config.max_new_tokens, capacity, kind, dtype, auto)
    stops = jnp.asarray(config.stop_tokens, jnp.int32)
    mesh = sharding.mesh_of(state)
    if draft[1] is not None and sharding.mesh_of(draft[1]) != mesh:
        raise ValueError("draft is not on the mesh of the model; load both with the same mesh")
    start = time.perf_counter()
    with sharding.use_mesh(mesh):  # and never while this generator waits: the mesh in use is the caller's, too
        key = jax.random.key(config.seed)
        loop = _prefill(graphdef, state, draft[1], jnp.asarray(tokens), jnp.asarray(lengths), key, stops, static=static)
        jax.block_until_ready(loop)
    with sharding.use_mesh(mesh):
        weights = _decode_weights(graphdef, state), None if draft[1] is None else _decode_weights(*draft)
        programs = [(graphdef, state, draft[1], weights, static)]
        control = None
        if auto is not None and not bool(loop.done.all()):
            programs.append((graphdef, state, None, (weights[0], None), _plain(static)))

            def run(control: Control | None, steps: int) -> tuple[float, int]:
                copy = jax.tree.map(lambda x: x.copy(), loop)  # buffers are donated
                copy = jax.block_until_ready(auto_length.to_plain(copy) if control is None else copy)
                begin = time.perf_counter()
                until = jnp.asarray(1 + steps, jnp.int32)
                made = int(_run(programs[control is None], copy, stops, until, control).steps)
                return time.perf_counter() - begin, made

            if (shape := (graphdef, static, len(prompts), mesh)) not in _COSTS:
                _COSTS[shape] = auto_length.measure_costs(run, auto, most=config.max_new_tokens - 1)
            minus = jnp.asarray(-1, jnp.int32)
            control = Control(_COSTS[shape], minus, minus, minus)
            if not auto_length.may_pay(control.costs, auto):
                loop, control = auto_length.to_plain(loop), None
    prefill_seconds, decode_seconds = time.perf_counter() - start, 0.0
    per_token, size = bytes_per_token(cfg, kind, dtype), loop.cache.nbytes

    def result(loop: Loop) -> Generated:
        accepted, by_length = loop.num_accepted, loop.tally and loop.tally.by_length
        if auto is not None and loop.tally is None:  # of the plain program
            accepted = np.zeros(draft_length)
            by_length = [int(loop.steps), *[0] * (len(auto.lengths) - 1)]
        acceptance = [float(x) for x in np.asarray(accepted) / max(int(loop.drafted), 1)]
        rows = [
            [int(t) for t in row[:n]] for row, n in zip(np.asarray(loop.out), np.asarray(loop.written), strict=True)
        ]
        steps = {} if auto is None else dict(zip(auto.lengths, np.asarray(by_length).tolist(), strict=True))
        return Generated(rows, acceptance, int(loop.steps), prefill_seconds, decode_seconds, size, per_token, steps)

    yield result(loop)
    while not bool(loop.done.all()):
        # From the shortest row that continues: one that has ended grows no more.
        behind = int(jnp.where(loop.done, config.max_new_tokens, loop.written).min())
        until = config.max_new_tokens if part is None else min(behind + part, config.max_new_tokens)
        start = time.perf_counter()
        with sharding.use_mesh(mesh):
            program = programs[-1 if loop.tally is None else 0]
            loop = _run(program, loop, stops, jnp.asarray(until, jnp.int32), control)
            jax.block_until_ready(loop)
        decode_seconds += time.perf_counter() - start
        yield result(loop)


def _uncached_in_parts(
    model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig, part: int | None
) -> Iterator[Generated]:
    start = first = time.perf_counter()
    for steps, rows in enumerate(decode_without_cache(model, prompts, config)):
        now = time.perf_counter()
        first = first if steps else now
        result = Generated(
            [list(row) for row in rows], steps=steps, prefill_seconds=first - start, decode_seconds=now - first
        )
        if steps % (part or config.max_new_tokens) == 0:
            yield result
    if steps % (part or config.max_new_tokens):
        yield result


def _run(program: tuple, loop: Loop, stops: Array, until: Array, control: Control | None) -> Loop:
    *args, static = program
    return _decode(*args, loop, stops, until, control, static=static)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _drafter(model: Transformer, static: _Static, draft_state: Any, weights: Any = (None, None)) -> Drafter | None:
    if static.draft is None:
        return None
    if static.draft in OWN_DRAFTS:
        return make_drafter(model, static.draft, weights[0])
    gaps = static.auto is not None
    return make_drafter(model, nnx.merge(static.draft, draft_state), weights[1], gaps=gaps)


def _plain(static: _Static) -> _Static:
    return static._replace(draft_length=0, draft=None, auto=None)


@partial(jax.jit, static_argnames="graphdef")
def _decode_weights(graphdef, state) -> DecodeWeights | None:
    return nnx.merge(graphdef, state).prepare_decode()


@partial(jax.jit, static_argnames=("graphdef", "static"))
def _prefill(graphdef, state, draft_state, tokens, lengths, key, stops, *, static: _Static) -> Loop:
    model, tokens = nnx.merge(graphdef, state), constrain(tokens, "batch", None)
    batch = tokens.shape[0]
    cache = model.empty_cache(batch, static.capacity, static.kind, static.dtype)
    x, cache = model.prefill(tokens, lengths, cache)
    drafter = _drafter(model, static, draft_state)
    prompt = Prompt(tokens, lengths, x, static.capacity, static.kind, static.dtype)
    drafter_state = None if drafter is None else drafter.start(prompt)
    rows = jnp.zeros((batch,), jnp.int32)
    loop = Loop(
        cache, drafter_state, None, rows > 0, key, jnp.full((batch, static.max_new_tokens), -1, jnp.int32), rows,
        jnp.zeros((), jnp.int32), jnp.zeros((static.draft_length,), jnp.int32), jnp.zeros((), jnp.int32),
    )  # fmt: skip
    # As if a step had just run over the prompt's last token.
    start = lengths - 1
    last, x = (jnp.take_along_axis(y, start.reshape(-1, *[1] * (y.ndim - 1)), axis=1) for y in (tokens, x))
    loop = _advance(model, loop, Drafts(last[:, 1:], None), x, start, last[:, 0], stops, static)
    if static.auto is None:
        return loop
    return loop._replace(last=auto_length.widen(loop.last), tally=auto_length.new_tally(static.auto))


@partial(jax.jit, static_argnames=("graphdef", "static"), donate_argnames=("loop",))
def _decode(graphdef, state, draft_state, weights, loop: Loop, stops, until, control=None, *, static: _Static) -> Loop:
    model = nnx.merge(graphdef, state)
    drafter = _drafter(model, static, draft_state, weights)

    def verify(loop: Loop, drafts: Drafts, newest: Array, static: _Static = static) -> Loop:
        start = loop.cache.lengths
        x, cache = model.run_layers(jnp.concatenate([newest, drafts.tokens], axis=1), loop.cache, weights[0])
        loop = loop._replace(cache=cache, steps=loop.steps + 1)
        return _advance(model, loop, drafts, x, start, newest[:, 0], stops, static)

    def draft(state: Any, last: StepResult, count: int, key: Array) -> tuple[Drafts, Any]:
        assert drafter is not None
        return drafter.draft(state, last, count, key, static.sampling)

    def step(loop: Loop) -> Loop:
        newest = jnp.take_along_axis(loop.last.tokens, loop.last.num_valid[:, None] - 1, axis=1)
        drafts = Drafts(newest[:, 1:], None)
        if drafter is not None:
            key, draw = jax.random.split(loop.key)
            drafts, after = draft(loop.drafter, loop.last, static.draft_length, draw)
            loop = loop._replace(drafter=after, key=key, drafted=loop.drafted + (~loop.done).sum(dtype=jnp.int32))
        return verify(loop, drafts, newest)

    def goes_on(loop: Loop) -> Array:
        return ((loop.written < until) & ~loop.done).any()

    options = static.auto
    if options is None:
        return jax.lax.while_loop(goes_on, step, loop)
    has_q = static.sampling.temperature > 0 and static.draft != "lookup"
    loop = jax.lax.while_loop(
        lambda loop: jnp.where(control.draft >= 0, loop.steps < control.limit, goes_on(loop) & ~loop.tally.asleep),
        lambda loop: auto_length.auto_step(loop, control, options, draft, verify, model.cfg.vocab_size, has_q),
        loop,
    )
    # In the same program: to start another one takes as long as some steps of a small model.
    asleep = loop.tally.asleep & (control.draft < 0)
    plain = jax.lax.while_loop(
        lambda plain: goes_on(plain) & asleep,
        lambda plain: verify(plain, Drafts(plain.last.tokens[:, 1:], None), plain.last.tokens, _plain(static)),
        auto_length.to_plain(loop),
    )
    return auto_length.from_plain(plain, loop)


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
    """Accept or reject drafts, write the tokens, and move each row on by its own count.

    Args: x [B, F, D], the trunk's output at token `previous`, whose position is `start`, and at each draft.
    """
    key, draw = jax.random.split(loop.key)
    logits, left = process_by_rows(model.logits(model.norm(x)), static.sampling)
    num_accepted, tokens = map(constrain, accept(drafts.tokens, drafts.q, logits, draw, left))
    index = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    count = jnp.minimum(num_accepted + 1, loop.out.shape[1] - loop.written)
    ends = (tokens[..., None] == stops[None, None]).any(-1) & (index < count[:, None])
    ended = ends.any(axis=1)
    count = jnp.where(ended, jnp.argmax(ends, axis=1).astype(jnp.int32) + 1, count)
    count = jnp.where(loop.done, 0, count)
    column = jnp.where(
        index < count[:, None], loop.written[:, None] + index, loop.out.shape[1]
    )  # past the end: dropped
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    written = loop.written + count
    # A row that is done does not move; its numbers are computed and ignored.
    lengths = jnp.where(loop.done, loop.cache.lengths, start + count)
    pad = static.draft_length + 1 - x.shape[1]
    h = jnp.pad(model.read_by_heads(x), ((0, 0), (0, pad), (0, 0)))
    accepted = (index[:, : drafts.tokens.shape[1]] < num_accepted[:, None]) & ~loop.done[:, None]
    return loop._replace(
        cache=keep_sharded(loop.cache.at_lengths(lengths)),
        last=StepResult(
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
        num_accepted=loop.num_accepted + jnp.pad(accepted.sum(axis=0, dtype=jnp.int32), (0, pad)),
    )
