"""From prompts to text: expanded prefill, then compiled parts of { draft → a step over the drafts → accept by row }.

Plain decoding is that loop without drafts. Each sequence advances by its own count in its own cache rows; none waits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_jax.decoding.auto_length import LengthChoice, draft_lengths
from dsv3_jax.decoding.decode_config import DecodeConfig, Generated
from dsv3_jax.decoding.drafters import READ, Prompt, Unread, make_drafter, window
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.logits import process_by_rows
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import ROW_AXES, Cache, keep_sharded, pick_dtype, pick_kind
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.model.transformer import DecodeWeights, Transformer
from dsv3_jax.ops.sampling import GREEDY, Sampling, keys_at, log_probability, row_keys
from dsv3_jax.ops.verify_drafts import Drafts, accept


class Loop(NamedTuple):
    """The decoding loop's state. On a mesh, `h`, `text` and caches are sharded by rows; others replicated."""

    cache: Any  # of the tokens before the newest
    drafter: Any  # the drafter's state
    h: Any  # [B, N, D]: what heads read of the trunk at unread positions; None if no head drafts
    unread: Array  # int32 [B]: positions before the newest that the drafter has not read
    keys: Array  # [B, 2]: of each row's draws, and of its drafts'
    done: Array  # bool [B]
    text: Array  # int32 [B, S]: each prompt and its new tokens
    written: Array  # int32 [B]: new tokens of each row
    steps: Array  # int32 [B]: of each row until it was done
    num_accepted: Array  # int32 [B, J]: accepted drafts, by position
    logprobs: Any = None  # two of float32 [B, S], of each new token, see `Generated`; None if nobody asked
    expert_ids: Any = None  # int32 [B, S, Lmoe, K] of each token that was read; likewise


STATIC = {"static": True}
FIRST_SLOTS = 1024  # of a cache whose empty slots are read too: it begins small
GROWTH = 4  # slots after growing over those before; each number of slots is a compilation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Job:
    """The arrays and the settings that the compiled programs of a request read."""

    models: tuple[tuple[Transformer, DecodeWeights | None], ...]  # the model, and one that drafts
    stops: Any  # int32 [n]
    draft: str | None = field(metadata=STATIC)  # None, "mtp", "lookup" or "model"
    lengths: tuple[int, ...] = field(metadata=STATIC)  # drafts a step: one length, or those of "auto"
    config: DecodeConfig = field(metadata=STATIC)  # with the cache that is used, without what no program depends on
    capacity: int = field(metadata=STATIC)
    slots: int = field(metadata=STATIC)  # of the cache after the prompts; it grows to `capacity`

    @property
    def drafter(self) -> Any:
        return make_drafter(self.draft, *self.models[-1]) if self.draft else None


class Programs:
    """The compiled programs of all requests of one form, and what "auto" has learnt from them.

    They take a Job's leaves: to flatten it each time would take the host as long as a step of a small model.
    """

    def __init__(self, form: Any, lengths: tuple[int, ...], *times_depend_on: Any):
        self.prefill = jax.jit(partial(_prefill, form))
        self.decode = jax.jit(partial(_decode, form), static_argnames="length", donate_argnums=1)
        self.read = jax.jit(partial(_read, form), donate_argnums=1)
        self.choice = LengthChoice(lengths) if len(lengths) > 1 else None


programs = lru_cache(maxsize=64)(Programs)


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
    logprobs: bool = False,
    return_routing: bool = False,
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
        logprobs: return each new token's log-probability, of the distribution it was drawn from and at temperature 1.
        return_routing: return the experts that each token went to, as `Transformer` replays them.
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
        stop_tokens, seed, logprobs=logprobs, return_routing=return_routing,
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
    request = _Request(model, prompts, config)
    yield request.result()
    while request.behind < config.max_new_tokens:
        request.decode(min(request.behind + part, config.max_new_tokens))
        yield request.result()


class _Request:
    """A request on its devices: what the compiled programs read and made so far, and the host's clock."""

    def __init__(self, model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig):
        cfg, draft, lengths, models = model.cfg, config.draft, (config.num_drafts,), [model.in_compute_dtype()]
        kind = "none" if config.cache == "none" else pick_kind(cfg, config.cache)
        dtype = pick_dtype(model.compute_dtype, config.cache_dtype)
        self.mesh = sharding.mesh_of(models)
        if draft and config.draft_length == "auto":
            lengths = draft_lengths(draft, cfg)
        if isinstance(draft, Transformer):
            models.append(draft.in_compute_dtype())
            if sharding.mesh_of(models[1]) != self.mesh:
                raise ValueError("draft is not on the mesh of the model; load both with the same mesh")
            draft = "model"
        # Shapes in steps of 32, so that prompts of nearby lengths share one compilation.
        longest = max(*map(len, prompts), config.pad_prompts_to)
        capacity = _round_up(longest + config.max_new_tokens + config.num_drafts)
        start = time.perf_counter()
        tokens, self.prompt_lengths = _pad(prompts, min(_round_up(longest), cfg.max_positions))
        with sharding.use_mesh(self.mesh):  # never while a generator waits: the mesh in use is the caller's, too
            form = DecodeConfig(
                config.max_new_tokens, config.sampling, kind, dtype,
                logprobs=config.logprobs, return_routing=config.return_routing,
            )  # fmt: skip
            stops = np.asarray(config.stop_tokens, np.int32)
            with_weights = tuple((model, model.prepare_decode()) for model in models)
            grows = kind != "none" and model.kernels.reads_all_slots
            self.capacity, self.slots = capacity, min(FIRST_SLOTS, capacity) if grows else capacity
            self._raise_slots(tokens.shape[1])
            job = Job(with_weights, stops, draft, lengths, form, capacity, self.slots)
            self.leaves, tree = jax.tree.flatten(job)
            self.programs = programs(tree, lengths, len(prompts), self.mesh)
            self.loop = self.programs.prefill(self.leaves, tokens, self.prompt_lengths, np.uint32(config.seed))
        self.seen = self._look()
        self.prefill_seconds, self.decode_seconds = time.perf_counter() - start, 0.0
        self.max_new_tokens, self.steps = config.max_new_tokens, dict.fromkeys(lengths, 0)
        self.bytes_per_token = 0 if kind == "none" else bytes_per_token(cfg, kind, dtype)

    def _raise_slots(self, needed: int) -> None:
        while self.slots < min(needed, self.capacity):
            self.slots = min(GROWTH * self.slots, self.capacity)

    def _make_room(self, length: int) -> None:
        """Let the cache grow if a step of so many drafts would pass its end."""
        before = self.slots
        self._raise_slots(int((self.prompt_lengths + self.seen.written).max()) + length)
        if before < self.slots:
            parts = self.loop.cache.parts
            with sharding.use_mesh(self.mesh):
                for i, part in enumerate(parts):  # in the list: the smaller one is freed
                    parts[i] = _grown(part, slots=self.slots)
            if self.programs.choice:
                self.programs.choice.start.clear()  # the next parts compile again

    def _look(self) -> Any:
        """Wait for the last program, and fetch the loop's small arrays, as NumPy's."""
        large = dict.fromkeys(("cache", "drafter", "h", "keys", "text", "logprobs", "expert_ids"))
        return jax.device_get(self.loop._replace(**large))

    @property
    def behind(self) -> int:
        """Tokens of the shortest row that continues; all if none does, for a row that has ended grows no more."""
        return int(np.where(self.seen.done, self.max_new_tokens, self.seen.written).min())

    def decode(self, until: int) -> None:
        """Run until every row has so many tokens, or is done."""
        choice = self.programs.choice
        while (behind := self.behind) < until:
            self._make_room(max(self.steps))
            if choice is None:
                self._part(next(iter(self.steps)), until)
                continue
            length, more = choice.next()
            if length and (self.seen.unread > length + 1).any():
                self._run(self.programs.read)
            if length not in choice.start:
                self._run(self.programs.decode, 0, length=length)  # it compiles
                choice.start[length] = self._run(self.programs.decode, 0, length=length)
            choice.add(length, *self._part(length, min(behind + more, until)))

    def _part(self, length: int, until: int) -> tuple[int, int, np.ndarray, float]:
        """Run a part.

        Returns: (steps; steps, and accepted drafts by position, of the rows that were furthest behind before it: they
            decide how long the request takes; seconds).
        """
        before, rows = self.seen, ~self.seen.done & (self.seen.written == self.behind)
        seconds = self._run(self.programs.decode, until, length=length)
        steps = self.seen.steps - before.steps
        self.steps[length] += (most := int(steps.max()))
        return most, int(steps[rows].sum()), (self.seen.num_accepted - before.num_accepted)[rows].sum(0), seconds

    def _run(self, program: Callable, *args: int, **static: int) -> float:
        """Run a program on the loop. Returns: its seconds."""
        start = time.perf_counter()
        with sharding.use_mesh(self.mesh):
            self.loop = program(self.leaves, self.loop, *args, **static)
        self.seen = self._look()
        seconds = time.perf_counter() - start
        self.decode_seconds += seconds
        return seconds

    def result(self) -> Generated:
        """The result so far."""
        with sharding.use_mesh(self.mesh):
            found = jax.device_get(_gathered((self.loop.text, self.loop.logprobs, self.loop.expert_ids)))  # everywhere
        text, logprobs, expert_ids = found
        seen, ends = self.seen, self.prompt_lengths + self.seen.written

        def new(of: np.ndarray) -> list[list]:
            return [row[a:b].tolist() for row, a, b in zip(of, self.prompt_lengths, ends, strict=True)]

        acceptance = (seen.num_accepted.sum(0) / max(seen.steps.sum(), 1)).tolist()
        return Generated(
            new(text), acceptance, int(seen.steps.max()), self.prefill_seconds, self.decode_seconds,
            self.loop.cache.nbytes, self.bytes_per_token, dict(self.steps),
            logprobs and new(logprobs[0]), logprobs and new(logprobs[1]),
            None if expert_ids is None else list(map(_up_to, expert_ids, ends)),
        )  # fmt: skip


def _up_to(expert_ids: np.ndarray, end: np.integer) -> np.ndarray:
    """Of a row's expert_ids [S, Lmoe, K], those of its tokens, int32 [Lmoe, tokens, K]: no pass has read the last."""
    ids = expert_ids[:end].copy()
    ids[end - 1 :] = -1
    return np.moveaxis(ids, 1, 0)


@jax.jit
def _gathered(tree: Any) -> Any:
    return jax.tree.map(constrain, tree)


@partial(jax.jit, static_argnames="slots")
def _grown(part: Any, slots: int) -> Any:
    """A cache's part with so many slots; the new ones are empty."""

    def longer(x: Array) -> Array:
        room = [(0, 0)] * 3 + [(0, slots - x.shape[3]), (0, 0)]
        return constrain(jnp.pad(x, room), *ROW_AXES)

    return jax.tree.map(longer, part)


def _pad(prompts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens [B, width], lengths [B].)"""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32)


def _round_up(n: int) -> int:
    return -(-n // 32) * 32


def _prefill(form: Any, leaves: list, tokens: Array, lengths: Array, seed: Array) -> Loop:
    """Read the prompts, and draw each row's first token, as if a step had just run over the prompt's last."""
    job = jax.tree.unflatten(form, leaves)
    (model, weights), drafter, longest, config = job.models[0], job.drafter, job.lengths[-1], job.config
    tokens, batch, kind = constrain(tokens, "batch", None), tokens.shape[0], (config.cache, config.cache_dtype)
    if config.cache == "none":
        (x, _, ids), cache = model.run_layers(tokens, None), Cache([], lengths)
    else:
        x, cache, ids = model.prefill(tokens, lengths, model.empty_cache(batch, job.slots, *kind), weights)
    # With room for what a drafter writes beyond the text.
    prompt = Prompt(tokens, lengths, x, job.capacity + max(READ, longest + 1), *kind)
    zero, h = jnp.zeros((batch,), jnp.int32), None
    if job.draft == "mtp":  # plain steps may leave all their positions unread
        unread = longest + 1 + (config.max_new_tokens if len(job.lengths) > 1 else 0)
        h = constrain(jnp.zeros((batch, unread, x.shape[2]), x.dtype), "batch", None, None)
    text = jnp.zeros((batch, job.capacity), jnp.int32).at[:, : tokens.shape[1]].set(tokens)
    loop = Loop(
        cache.at_lengths(lengths - 1), drafter and drafter.start(prompt), h, zero, row_keys(seed, batch), zero > 0,
        constrain(text, "batch", None), zero, zero, jnp.zeros((batch, longest), jnp.int32),
        (jnp.zeros(text.shape, jnp.float32),) * 2 if config.logprobs else None,
        jnp.zeros((*text.shape, len(ids), ids.shape[-1]), jnp.int32) if config.return_routing else None,
    )  # fmt: skip
    loop = _record(loop, ids, zero)
    return _advance(job, loop, Drafts(tokens[:, :0], None), window(x, lengths - 1, 1))._replace(steps=zero)


def _decode(form: Any, leaves: list, loop: Loop, until: Array, *, length: int) -> Loop:
    """Run steps of `length` drafts until every row has `until` tokens, or is done."""
    job = jax.tree.unflatten(form, leaves)
    (model, weights), drafter = job.models[0], job.drafter

    def step(loop: Loop) -> Loop:
        newest = window(loop.text, loop.cache.lengths, 1)
        drafts = Drafts(newest[:, 1:], None)
        if length:
            keys = keys_at(loop.keys[:, 1], loop.written[:, None] + jnp.arange(length, dtype=jnp.int32)[None])
            unread = _unread(loop, length + 1, loop.unread)
            drafts, state = drafter.draft(loop.drafter, unread, keys.swapaxes(0, 1), job.config.sampling)
            loop = loop._replace(drafter=state, unread=jnp.zeros_like(loop.unread))
        if job.config.cache == "none":  # all tokens again, slow and obvious: to compare with
            x, _, ids = model.run_layers(loop.text, None)
            loop = _record(loop, ids, jnp.zeros_like(loop.written))
            return _advance(job, loop, drafts, window(x, loop.cache.lengths, 1))
        x, cache, ids = model.run_layers(jnp.concatenate([newest, drafts.tokens], axis=1), loop.cache, weights)
        return _advance(job, _record(loop, ids, loop.cache.lengths)._replace(cache=cache), drafts, x)

    def goes_on(loop: Loop) -> Array:
        behind = ((loop.written < until) & ~loop.done).any()
        slots = loop.cache.capacity if loop.cache.parts else job.capacity
        return behind if slots == job.capacity else behind & (loop.cache.lengths.max() + length < slots)

    return jax.lax.while_loop(goes_on, step, loop)


def _read(form: Any, leaves: list, loop: Loop) -> Loop:
    """Let the drafter read all that plain steps have left but one position, which its next drafts follow."""
    drafter = jax.tree.unflatten(form, leaves).drafter

    def some(loop: Loop) -> Loop:
        count = jnp.clip(loop.unread - 1, 0, READ)
        state = drafter.read(loop.drafter, _unread(loop, READ, count))
        h = jax.tree.map(lambda h: constrain(window(h, count, h.shape[1]), "batch", None, None), loop.h)
        return loop._replace(drafter=state, h=h, unread=loop.unread - count)

    return jax.lax.while_loop(lambda loop: (loop.unread > 1).any(), some, loop)


def _unread(loop: Loop, width: int, count: Array) -> Unread:
    h = jax.tree.map(lambda h: h[:, :width], loop.h)
    return Unread(h, loop.text, count, loop.cache.lengths - loop.unread)


def _record(loop: Loop, expert_ids: Any, first: Array) -> Loop:
    """Keep the experts [Lmoe, B, F, K] of tokens from position `first` on; a rejected draft's are overwritten later."""
    if loop.expert_ids is None:
        return loop
    rows, index = (jnp.arange(n, dtype=jnp.int32) for n in expert_ids.shape[1:3])
    put = loop.expert_ids.at[rows[:, None], first[:, None] + index[None]]
    kept = put.set(jnp.moveaxis(expert_ids, 0, 2), mode="drop")
    return loop._replace(expert_ids=constrain(kept, "batch", None, None, None))


def _advance(job: Job, loop: Loop, drafts: Drafts, x: Array) -> Loop:
    """Accept or reject drafts, write the tokens, and move each row on by its own count.

    Args: x [B, F, D], the trunk's output at the newest token and at each draft.
    """
    model, config = job.models[0][0], job.config
    rows, index = (jnp.arange(n, dtype=jnp.int32)[None] for n in x.shape[:2])
    raw = model.logits(model.norm(x))
    logits, left = process_by_rows(raw, config.sampling)
    keys = keys_at(loop.keys[:, 0], loop.written[:, None] + index)
    num_accepted, tokens = map(constrain, accept(drafts.tokens, drafts.q, logits, keys, left))
    stops = (tokens[..., None] == job.stops[None, None]).any(-1).astype(jnp.int32)
    room = jnp.where(loop.done, 0, config.max_new_tokens - loop.written)  # a row that is done does not move
    added = (index <= num_accepted[:, None]) & (index < room[:, None]) & (jnp.cumsum(stops, axis=1) == stops)
    count = added.sum(axis=1, dtype=jnp.int32)
    start, written, h = loop.cache.lengths, loop.written + count, loop.h
    column = jnp.where(added, start[:, None] + 1 + index, job.capacity)  # past it: dropped
    if h is not None:
        new = constrain(model.read_by_heads(x), "batch", None, None)
        h = model.kernels("write_rows", h[None, :, None], new[:, None], jnp.zeros((), jnp.int32), loop.unread)[0, :, 0]
    logprobs = loop.logprobs
    if logprobs is not None:  # of what is certain, at temperature 0, it is 0
        raw, _ = process_by_rows(raw, GREEDY)
        of = [log_probability(x, tokens) for x in (logits, raw)]
        if config.sampling.temperature == 0:
            of[0] = jnp.zeros_like(of[0])
        logprobs = tuple(
            constrain(kept.at[rows.T, column].set(new, mode="drop"), "batch", None)
            for kept, new in zip(logprobs, of, strict=True)
        )
    accepted = (index[:, :-1] < num_accepted[:, None]) & ~loop.done[:, None]
    return loop._replace(
        cache=keep_sharded(loop.cache.at_lengths(start + count)),
        h=h,
        unread=constrain(loop.unread + count),
        done=constrain(loop.done | (added & (stops == 1)).any(axis=1) | (written == config.max_new_tokens)),
        text=constrain(loop.text.at[rows.T, column].set(tokens, mode="drop"), "batch", None),
        written=constrain(written),
        steps=constrain(loop.steps + 1 - loop.done.astype(jnp.int32)),
        logprobs=logprobs,
        num_accepted=constrain(loop.num_accepted.at[:, : accepted.shape[1]].add(accepted.astype(jnp.int32))),
    )
