"""From prompts to text: expanded prefill, then compiled parts of { draft → a step over the drafts → accept by row }.

Plain decoding is that loop without drafts. Each sequence advances by its own count in its own cache rows; none waits.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from dsv3_jax.config import CacheKind
from dsv3_jax.decoding import auto_length
from dsv3_jax.decoding.auto_length import Part
from dsv3_jax.decoding.decode_config import DecodeConfig, Generated
from dsv3_jax.decoding.drafters import Drafts, Prompt, StepResult, make_drafter, process_by_rows
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import keep_sharded, pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.transformer import DecodeWeights, Transformer
from dsv3_jax.ops.sampling import GREEDY, Sampling, keys_at, row_keys, sample
from dsv3_jax.ops.verify_drafts import accept

UNREAD = auto_length.LONGEST + 16  # draft_length="auto": positions that a drafter can leave unread in plain steps
MOST_READING = 0.02  # share of plain steps' time that a drafter may read where they go on; else drafts end


class Loop(NamedTuple):
    """The decoding loop's state. On a mesh, arrays as wide as the model are sharded by rows; others replicated."""

    cache: Any
    drafter: Any  # the drafter's state
    last: Any  # a StepResult: what the drafter has not read; None if nobody drafts
    keys: Array  # [B, 2]: of each row's draws, and of its drafts'
    done: Array  # bool [B]
    out: Array  # int32 [B, max_new_tokens], -1 beyond what is written
    written: Array  # int32 [B]: tokens in each row of `out`
    steps: Array  # int32 []
    rows: Array  # int32 []: steps of rows that were not done
    num_accepted: Array  # int32 [J]: accepted drafts, by position


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["state", "draft_state", "stops", "weights", "draft_weights"],
    meta_fields=["graphdef", "draft", "lengths", "sampling", "max_new_tokens", "capacity", "kind", "dtype"],
)
@dataclass(frozen=True)
class Job:
    """What the compiled programs of a request read, and the settings that they depend on."""

    state: Any
    draft_state: Any  # of a draft model
    stops: Any  # int32 [n]
    graphdef: Any
    draft: Any  # None, "mtp", "lookup", or the graph of a draft model
    lengths: tuple[int, ...]  # drafts a step: one length, or those of "auto"
    sampling: Sampling
    max_new_tokens: int
    capacity: int
    kind: CacheKind
    dtype: Any
    weights: Any = None  # DecodeWeights
    draft_weights: Any = None

    @property
    def unread(self) -> int:
        """Positions that a drafter can leave unread between parts."""
        return self.lengths[0] + 1 if len(self.lengths) == 1 else UNREAD

    def merge(self) -> tuple[Transformer, Any]:
        """(The model, its drafter or None.)"""
        model, draft, weights = nnx.merge(self.graphdef, self.state), self.draft, self.weights
        if self.draft_state is not None:
            draft, weights = nnx.merge(draft, self.draft_state), self.draft_weights
        return model, draft and make_drafter(model, draft, weights)


# Of each shape, from requests before: (its last parts; the seconds of a part without steps, by length).
_PAST: dict[Any, tuple[deque[Part], dict[int, float]]] = {}


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
        draft_length: tokens drafted a step. DeepSeek's and EAGLE heads draft beyond their depth. "auto" chooses
            between parts of the text by the tokens a second of the parts before, and falls back to plain steps. Heads'
            or a model's drafts then make sampled text depend on these times too; its distribution does not.
        seed: of the random draws. Each depends on the seed, the row and its place in the text, so without drafts and
            with "lookup" a seed's text is the same, whatever the draft_length.
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
    config.check(model.cfg, prompts)
    part = part or config.max_new_tokens
    if config.cache == "none":
        yield from _without_cache(model, prompts, config, part)
        return
    request = _Request(model, prompts, config)
    yield request.result()
    while request.behind < config.max_new_tokens:
        request.decode(part)
        yield request.result()


class _Request:
    """A request on its devices: what the compiled programs read and made so far, and the host's clock."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig):
        cfg, draft, draft_state, lengths = model.cfg, config.draft, None, (config.num_drafts,)
        kind, dtype = pick_kind(cfg, config.cache), pick_dtype(model.compute_dtype, config.cache_dtype)
        graphdef, state = nnx.split(model.in_compute_dtype())
        self.mesh = sharding.mesh_of(state)
        if draft and config.draft_length == "auto":
            lengths = auto_length.draft_lengths(draft, cfg)
        if isinstance(draft, Transformer):
            draft, draft_state = nnx.split(draft.in_compute_dtype())
            if sharding.mesh_of(draft_state) != self.mesh:
                raise ValueError("draft is not on the mesh of the model; load both with the same mesh")
        # Shapes in steps of 32, so that prompts of nearby lengths share one compilation.
        longest = max(*map(len, prompts), config.pad_prompts_to)
        capacity = _round_up(longest + config.max_new_tokens + config.num_drafts)
        stops, how = np.asarray(config.stop_tokens, np.int32), (config.sampling, config.max_new_tokens)
        job = Job(state, draft_state, stops, graphdef, draft, lengths, *how, capacity, kind, dtype)
        start, (tokens, lengths) = time.perf_counter(), _pad(prompts, min(_round_up(longest), cfg.max_positions))
        with sharding.use_mesh(self.mesh):  # never while a generator waits: the mesh in use is the caller's, too
            weights = _decode_weights(graphdef, state), draft_state and _decode_weights(draft, draft_state)
            self.job = replace(job, weights=weights[0], draft_weights=weights[1])
            self.loop = jax.block_until_ready(_prefill(self.job, tokens, lengths, np.uint32(config.seed)))
        self.prefill_seconds, self.decode_seconds = time.perf_counter() - start, 0.0
        self.bytes_per_token, self.steps = bytes_per_token(cfg, kind, dtype), dict.fromkeys(job.lengths, 0)
        self.past, self.start_seconds = _PAST.setdefault(
            (jax.tree.structure(job), len(prompts), self.mesh), (deque(maxlen=256), {})
        )

    @property
    def behind(self) -> int:
        """Tokens of the shortest row that continues; all if none does, for a row that has ended grows no more."""
        return int(np.where(self.loop.done, self.job.max_new_tokens, self.loop.written).min())

    def decode(self, tokens: int) -> None:
        """Run until every row has so many more tokens than the shortest, or is done."""
        until, lengths = min(self.behind + tokens, self.job.max_new_tokens), self.job.lengths
        while (behind := self.behind) < until:
            if len(lengths) == 1:
                self._run(_decode, until, length=lengths[0])
                continue
            length, more = auto_length.choose(self.past, lengths)
            unread = int(self.loop.last.num_valid.max())
            if unread > UNREAD:  # the drafter has missed some
                length, more = 0, auto_length.LONGEST
            elif unread > (length + 1 if length else UNREAD - more):
                self._run_part(0, behind + 1)  # every row that continues then has two positions to read
                plain = [part.seconds / part.steps for part in self.past if not part.length]
                if length or self.start_seconds.get(-1, 0.0) < MOST_READING * UNREAD * (plain or [0.0])[-1]:
                    seconds = self._run(_read)
                    self.start_seconds[-1] = seconds if -1 in self.start_seconds else 0.0  # the first one compiles
            self._run_part(length, min(self.behind + more, until))

    def _run_part(self, length: int, until: int) -> None:
        """Run a part for "auto", and remember it; not the first of a length, which compiles and finds caches cold."""

        def counts() -> list:
            return jax.device_get([self.loop.steps, self.loop.rows, self.loop.num_accepted])

        before = counts()
        seconds = self._run(_decode, until, length=length)
        steps, rows, accepted = (after - old for after, old in zip(counts(), before, strict=True))
        self.steps[length] += int(steps)
        if length not in self.start_seconds:
            self.start_seconds[length] = min(self._run(_decode, 0, length=length) for _ in range(3))
        elif steps:
            own = seconds - 1.5 * self.start_seconds[length]  # a short part's first step is slow
            self.past.append(Part(length, int(steps), int(rows), accepted.tolist(), max(own, seconds / 10)))

    def _run(self, program: Any, *args: int, **static: int) -> float:
        """Run a program on the loop. Returns: its seconds."""
        start = time.perf_counter()
        with sharding.use_mesh(self.mesh):
            self.loop = jax.block_until_ready(program(self.job, self.loop, *args, **static))
        seconds = time.perf_counter() - start
        self.decode_seconds += seconds
        return seconds

    def result(self) -> Generated:
        """The result so far."""
        loop, size = jax.device_get(self.loop._replace(cache=None, drafter=None, last=None)), self.loop.cache.nbytes
        rows = [row[:n].tolist() for row, n in zip(loop.out, loop.written, strict=True)]
        acceptance = (loop.num_accepted / max(int(loop.rows), 1)).tolist()
        times, steps = (self.prefill_seconds, self.decode_seconds), self.steps if len(self.steps) > 1 else {}
        return Generated(rows, acceptance, int(loop.steps), *times, size, self.bytes_per_token, dict(steps))


def _without_cache(
    model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig, part: int
) -> Iterator[Generated]:
    """As `generate_in_parts`, with the model over all tokens so far at each step: slow and obvious, to compare with."""
    start, (graphdef, state) = time.perf_counter(), nnx.split(model.in_compute_dtype())
    longest = max(*map(len, prompts), config.pad_prompts_to) + config.max_new_tokens
    tokens, lengths = _pad(prompts, min(_round_up(longest), model.cfg.max_positions))
    first, steps, prompt, going = start, 0, lengths.copy(), lengths > 0
    while going.any():
        with sharding.use_mesh(sharding.mesh_of(state)):
            now = tokens, lengths, lengths - prompt, np.uint32(config.seed)
            drawn = np.asarray(_next_tokens(graphdef, state, *now, sampling=config.sampling))
        tokens[going, lengths[going]] = drawn[going]
        lengths[going] += 1
        going &= (lengths - prompt < config.max_new_tokens) & ~np.isin(drawn, config.stop_tokens)
        end = time.perf_counter()
        first = first if steps else end
        if steps % part == 0 or not going.any():
            rows = [row[a:b].tolist() for row, a, b in zip(tokens, prompt, lengths, strict=True)]
            yield Generated(rows, steps=steps, prefill_seconds=first - start, decode_seconds=end - first)
        steps += 1


@partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _next_tokens(graphdef, state, tokens, lengths, written, seed, *, sampling: Sampling):
    """The token after the first `lengths` of each row, int32 [B]. No token sees those after it."""
    model = nnx.merge(graphdef, state)
    x, _ = model.run_layers(constrain(tokens, "batch", None), None)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    keys = keys_at(row_keys(seed, lengths.size)[:, 0], written[:, None])[:, 0]
    return sample(model.logits(model.norm(last)), keys, **sampling._asdict())


def _pad(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens [B, width], lengths [B].)"""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32)


def _round_up(n: int) -> int:
    return -(-n // 32) * 32


def _decode_weights(graphdef, state) -> DecodeWeights | None:
    return nnx.merge(graphdef, state).prepare_decode()


@jax.jit
def _prefill(job: Job, tokens: Array, lengths: Array, seed: Array) -> Loop:
    """Read the prompts, and draw each row's first token, as if a step had just run over the prompt's last."""
    (model, drafter), tokens, batch = job.merge(), constrain(tokens, "batch", None), tokens.shape[0]
    cache = model.empty_cache(batch, job.capacity, job.kind, job.dtype)
    x, cache = model.prefill(tokens, lengths, cache, job.weights)
    # With room for all that a drafter writes when it reads what it can leave unread.
    prompt = Prompt(tokens, lengths, x, job.capacity + job.unread, job.kind, job.dtype)
    rows, zero = jnp.zeros((batch,), jnp.int32), jnp.zeros((), jnp.int32)
    loop = Loop(
        cache.at_lengths(lengths - 1), drafter and drafter.start(prompt), None, row_keys(seed, batch), rows > 0,
        jnp.full((batch, job.max_new_tokens), -1, jnp.int32), rows, zero, zero,
        jnp.zeros((job.lengths[-1],), jnp.int32),
    )  # fmt: skip
    newest, x = (jnp.take_along_axis(y, (lengths - 1).reshape(-1, *[1] * (y.ndim - 1)), axis=1) for y in (tokens, x))
    loop, last = _advance(job, model, loop, Drafts(newest[:, 1:], None), newest, x)
    return loop._replace(last=drafter and last.resize(job.unread), rows=zero, steps=zero)


@partial(jax.jit, static_argnames="length", donate_argnames="loop")
def _decode(job: Job, loop: Loop, until: Array, *, length: int) -> Loop:
    """Run steps of `length` drafts until every row has `until` tokens, or is done."""
    model, drafter = job.merge()

    def step(loop: Loop) -> Loop:
        newest = jnp.take_along_axis(loop.out, loop.written[:, None] - 1, axis=1)
        drafts, state = Drafts(newest[:, 1:], None), loop.drafter
        if length:
            keys = keys_at(loop.keys[:, 1], loop.written[:, None] + jnp.arange(length, dtype=jnp.int32)[None])
            drafts, state = drafter.draft(state, loop.last, keys.swapaxes(0, 1), job.sampling)
        x, cache = model.run_layers(jnp.concatenate([newest, drafts.tokens], axis=1), loop.cache, job.weights)
        after, last = _advance(job, model, loop._replace(cache=cache), drafts, newest, x)
        return after._replace(drafter=state, last=last if length else drafter and loop.last.append(last))

    if length:
        loop = loop._replace(last=loop.last.resize(length + 1))
    loop = jax.lax.while_loop(lambda loop: ((loop.written < until) & ~loop.done).any(), step, loop)
    return loop._replace(last=drafter and loop.last.resize(job.unread))


@partial(jax.jit, donate_argnames="loop")
def _read(job: Job, loop: Loop) -> Loop:
    """Let the drafter read all that plain steps have left but the newest position, which its next drafts follow."""
    last, drafter = loop.last, job.merge()[1]
    keys = jax.random.split(jax.random.key(0), (job.lengths[1], last.start.size))  # its drafts are for nothing
    earlier = last._replace(num_valid=jnp.maximum(last.num_valid - 1, 1))
    return loop._replace(drafter=drafter.draft(loop.drafter, earlier, keys, GREEDY)[1], last=last.newest())


def _advance(
    job: Job, model: Transformer, loop: Loop, drafts: Drafts, newest: Array, x: Array
) -> tuple[Loop, StepResult]:
    """Accept or reject drafts, write the tokens, and move each row on by its own count.

    Args: newest [B, 1], the last token before the drafts; x [B, F, D], the trunk's output at it and at each draft.
    """
    start, index = loop.cache.lengths, jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    logits, left = process_by_rows(model.logits(model.norm(x)), job.sampling)
    keys = keys_at(loop.keys[:, 0], loop.written[:, None] + index)
    num_accepted, tokens = map(constrain, accept(drafts.tokens, drafts.q, logits, keys, left))
    count = jnp.minimum(num_accepted + 1, job.max_new_tokens - loop.written)
    ends = (tokens[..., None] == job.stops[None, None]).any(-1) & (index < count[:, None])
    ended = ends.any(axis=1)
    count = jnp.where(ended, jnp.argmax(ends, axis=1).astype(jnp.int32) + 1, count)
    count = jnp.where(loop.done, 0, count)  # such a row does not move; its numbers are computed and ignored
    column = jnp.where(index < count[:, None], loop.written[:, None] + index, job.max_new_tokens)  # past it: dropped
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    written = loop.written + count
    accepted = (index[:, :-1] < num_accepted[:, None]) & ~loop.done[:, None]
    h = constrain(model.read_by_heads(x), "batch", None, None)
    last = StepResult(h, jnp.concatenate([newest, tokens], axis=1), jnp.maximum(count, 1), start)
    return loop._replace(
        cache=keep_sharded(loop.cache.at_lengths(start + count)),
        done=constrain(loop.done | ended | (written == job.max_new_tokens)),
        out=constrain(loop.out.at[rows, column].set(tokens, mode="drop")),
        written=constrain(written),
        steps=loop.steps + 1,
        rows=loop.rows + (~loop.done).sum(dtype=jnp.int32),
        num_accepted=loop.num_accepted.at[: accepted.shape[1]].add(accepted.sum(axis=0, dtype=jnp.int32)),
    ), last
