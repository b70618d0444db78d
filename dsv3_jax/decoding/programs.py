"""The compiled programs of a request: read prompts, begin rows, then { draft → step → accept }.

Plain decoding is that loop without drafts. Each sequence advances by its own count in its own cache
rows; none waits.
"""

from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.decoding.auto_length import LengthChoice
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.drafters import READ, Prompt, Unread, make_drafter, window
from dsv3_jax.mesh.logits import process_by_rows
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import ROW_AXES, Cache, keep_sharded
from dsv3_jax.model.transformer import DecodeWeights, Transformer
from dsv3_jax.ops.sampling import GREEDY, keys_at, log_probability, row_keys
from dsv3_jax.ops.verify_drafts import Drafts, accept


class Loop(NamedTuple):
    """The decoding loop's state.

    On a mesh, `h`, `text` and caches are sharded by rows; others replicated.
    """

    cache: Any  # of the tokens before the newest
    drafter: Any  # the drafter's state
    h: Any  # [B, N, D]: what heads read of the trunk at unread positions; None if no head drafts
    unread: Array  # int32 [B]: positions before the newest that the drafter has not read
    keys: Array  # [B, 2]: of each row's draws, and of its drafts'
    done: Array  # bool [B]
    text: Array  # int32 [B, S]: each prompt and its new tokens
    written: Array  # int32 [B]: new tokens of each row
    steps: Array  # int32 [B]: of each row while it was not done, for all its texts
    num_accepted: Array  # int32 [B, J]: accepted drafts, by position; likewise
    # two of float32 [B, S], of each new token, see `Generated`; None if nobody asked
    logprobs: Any = None
    expert_ids: Any = None  # int32 [B, S, Lmoe, K] of each token that was read; likewise


class Prefilled(NamedTuple):
    """What reading P prompts leaves.

    Rows of the loop begin with it, for one prompt as many as it has samples.
    """

    tokens: Array  # int32 [P, T]
    lengths: Array  # int32 [P]
    x: Array  # [P, 1, D]: the trunk's output at each prompt's last token
    cache: Cache  # of T slots
    drafter: Any  # the drafter's state
    expert_ids: Any  # int32 [P, T, Lmoe, K]; None if nobody asked


STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Job:
    """The arrays and the settings that the compiled programs of a request read."""

    models: tuple[tuple[Transformer, DecodeWeights | None], ...]  # the model, and one that drafts
    stops: Any  # int32 [n]
    draft: str | None = field(metadata=STATIC)  # None, "mtp", "lookup" or "model"
    # drafts a step: one length, or those of "auto"
    lengths: tuple[int, ...] = field(metadata=STATIC)
    # with the cache that is used, without what no program depends on
    config: DecodeConfig = field(metadata=STATIC)
    capacity: int = field(metadata=STATIC)
    slots: int = field(metadata=STATIC)  # of the cache after the prompts; it grows to `capacity`

    @property
    def drafter(self) -> Any:
        return make_drafter(self.draft, *self.models[-1]) if self.draft else None


class Programs:
    """The compiled programs of all requests of one form, and what "auto" has learnt from them.

    They take a Job's leaves: to flatten it each time would take the host as long as a step of a
    small model.
    """

    def __init__(self, form: Any, lengths: tuple[int, ...], *times_depend_on: Any):
        self.prefill = jax.jit(partial(_prefill, form))
        self.admit = jax.jit(partial(_admit, form), static_argnames="in_order", donate_argnums=1)
        self.decode = jax.jit(partial(_decode, form), static_argnames="length", donate_argnums=1)
        self.read = jax.jit(partial(_read, form), donate_argnums=1)
        self.choice = LengthChoice(lengths) if len(lengths) > 1 else None


programs = lru_cache(maxsize=64)(Programs)


def _prefill(form: Any, leaves: list, tokens: Array, lengths: Array) -> Prefilled:
    """Read prompts."""
    job = jax.tree.unflatten(form, leaves)
    (model, weights), config = job.models[0], job.config
    tokens = constrain(tokens, "batch", None)
    batch, width = tokens.shape
    kind = (config.cache, config.cache_dtype)
    if config.cache == "none":
        (x, _, ids), cache = model.run_layers(tokens, None), Cache([], lengths)
    else:
        x, cache, ids = model.prefill(
            tokens, lengths, model.empty_cache(batch, width, *kind), weights
        )
    drafter = job.drafter and job.drafter.start(Prompt(tokens, lengths, x, width, *kind))
    ids = (
        constrain(jnp.moveaxis(ids, 0, 2), "batch", None, None, None)
        if config.return_routing
        else None
    )
    return Prefilled(tokens, lengths, window(x, lengths - 1, 1), cache, drafter, ids)


def _admit(
    form: Any,
    leaves: list,
    loop: Loop | None,
    read: Prefilled,
    begins: Array,
    seed: Array,
    *,
    in_order: bool,
) -> Loop:
    """Let rows begin, and draw first tokens as if a step had read their prompts' last. Others stay.

    Args:
        loop: None makes one.
        begins: int32 [3, B], for each row its prompt among those that were read, or -1 if it stays;
            then the prompt's hash and the sample, see `row_keys`.
        in_order: row b begins with prompt b, so nothing is gathered, or sent on a mesh.
    """
    job = jax.tree.unflatten(form, leaves)
    config = job.config
    longest = job.lengths[-1]
    batch = begins.shape[1]
    source, texts, samples = begins
    if not in_order:
        read = jax.tree.map(lambda x: x.take(jnp.maximum(source, 0), axis=_rows_axis(x)), read)
    zero = jnp.zeros((batch,), jnp.int32)
    h = None
    ids = read.expert_ids
    if job.draft == "mtp":  # plain steps may leave all their positions unread
        unread = longest + 1 + (config.max_new_tokens if len(job.lengths) > 1 else 0)
        h = constrain(
            jnp.zeros((batch, unread, read.x.shape[2]), read.x.dtype), "batch", None, None
        )
    text = constrain(longer(read.tokens, 1, job.capacity), "batch", None)
    new = Loop(
        Cache([], read.lengths - 1), None, h, zero, row_keys(seed, texts, samples), zero > 0, text,
        zero, zero, jnp.zeros((batch, longest), jnp.int32),
        (jnp.zeros(text.shape, jnp.float32),) * 2 if config.logprobs else None,
        None if ids is None else constrain(longer(ids, 1, job.capacity), "batch", None, None, None),
    )  # fmt: skip
    new = _advance(job, new, Drafts(read.tokens[:, :0], None), read.x)._replace(
        steps=zero, drafter=read.drafter
    )
    new = new._replace(cache=read.cache.at_lengths(new.cache.lengths))
    if loop is None:
        # With room for what a drafter writes beyond the text.
        drafter = with_slots(new.drafter, job.capacity + max(READ, longest + 1))
        new = new._replace(cache=with_slots(new.cache, job.slots), drafter=drafter)
        return new._replace(done=constrain(new.done | (source < 0)))

    def begin(old: Array, new: Array) -> Array:
        axis = _rows_axis(new)
        begins = (source >= 0).reshape([batch if i == axis else 1 for i in range(new.ndim)])
        if not axis:
            return jnp.where(begins, new, old)
        # slots beyond will be overwritten
        first = jnp.where(begins, new, old[:, :, :, : new.shape[3]])
        return constrain(old.at[:, :, :, : new.shape[3]].set(first), *ROW_AXES)

    return jax.tree.map(begin, loop, new)._replace(steps=loop.steps, num_accepted=loop.num_accepted)


def _rows_axis(x: Array) -> int:
    """The axis of rows: the second of a cache's arrays [L, B, G, S, X], which alone have five."""
    return int(x.ndim == 5)


def longer(x: Array, axis: int, size: int) -> Array:
    """An array with so many entries along an axis; the new ones are 0."""
    return jnp.pad(x, [(0, size - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def with_slots(tree: Any, slots: int) -> Any:
    """Caches, in any structure, with so many slots; the new ones are empty."""
    return jax.tree.map(
        lambda x: constrain(longer(x, 3, slots), *ROW_AXES) if _rows_axis(x) else x, tree
    )


def _decode(form: Any, leaves: list, loop: Loop, until: Array, *, length: int) -> Loop:
    """Run steps of `length` drafts until every row has its `until` [B] tokens, or is done."""
    job = jax.tree.unflatten(form, leaves)
    (model, weights), drafter = job.models[0], job.drafter

    def step(loop: Loop) -> Loop:
        newest = window(loop.text, loop.cache.lengths, 1)
        drafts = Drafts(newest[:, 1:], None)
        if length:
            keys = keys_at(
                loop.keys[:, 1], loop.written[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
            )
            unread = _unread(loop, length + 1, loop.unread)
            drafts, state = drafter.draft(
                loop.drafter, unread, keys.swapaxes(0, 1), job.config.sampling
            )
            loop = loop._replace(drafter=state, unread=jnp.zeros_like(loop.unread))
        if job.config.cache == "none":  # all tokens again, slow and obvious: to compare with
            x, _, ids = model.run_layers(loop.text, None)
            loop = _record(loop, ids, jnp.zeros_like(loop.written))
            return _advance(job, loop, drafts, window(x, loop.cache.lengths, 1))
        x, cache, ids = model.run_layers(
            jnp.concatenate([newest, drafts.tokens], axis=1), loop.cache, weights
        )
        return _advance(
            job, _record(loop, ids, loop.cache.lengths)._replace(cache=cache), drafts, x
        )

    def goes_on(loop: Loop) -> Array:
        behind = ((loop.written < until) & ~loop.done).any()
        slots = loop.cache.capacity if loop.cache.parts else job.capacity
        if slots == job.capacity:
            return behind
        return behind & (loop.cache.lengths.max() + length < slots)

    return jax.lax.while_loop(goes_on, step, loop)


def _read(form: Any, leaves: list, loop: Loop) -> Loop:
    """Let the drafter read what plain steps have left, but one position for its next drafts."""
    drafter = jax.tree.unflatten(form, leaves).drafter

    def some(loop: Loop) -> Loop:
        count = jnp.clip(loop.unread - 1, 0, READ)
        state = drafter.read(loop.drafter, _unread(loop, READ, count))
        h = jax.tree.map(
            lambda h: constrain(window(h, count, h.shape[1]), "batch", None, None), loop.h
        )
        return loop._replace(drafter=state, h=h, unread=loop.unread - count)

    return jax.lax.while_loop(lambda loop: (loop.unread > 1).any(), some, loop)


def _unread(loop: Loop, width: int, count: Array) -> Unread:
    h = jax.tree.map(lambda h: h[:, :width], loop.h)
    return Unread(h, loop.text, count, loop.cache.lengths - loop.unread)


def _record(loop: Loop, expert_ids: Any, first: Array) -> Loop:
    """Keep the experts [Lmoe, B, F, K] of tokens from `first` on; rejected ones are overwritten."""
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
    model = job.models[0][0]
    config = job.config
    rows, index = (jnp.arange(n, dtype=jnp.int32)[None] for n in x.shape[:2])
    raw = model.logits(model.norm(x))
    logits, left = process_by_rows(raw, config.sampling)
    keys = keys_at(loop.keys[:, 0], loop.written[:, None] + index)
    num_accepted, tokens = map(constrain, accept(drafts.tokens, drafts.q, logits, keys, left))
    stops = (tokens[..., None] == job.stops[None, None]).any(-1).astype(jnp.int32)
    # a row that is done does not move
    room = jnp.where(loop.done, 0, config.max_new_tokens - loop.written)
    added = (
        (index <= num_accepted[:, None])
        & (index < room[:, None])
        & (jnp.cumsum(stops, axis=1) == stops)
    )
    count = added.sum(axis=1, dtype=jnp.int32)
    start = loop.cache.lengths
    written = loop.written + count
    h = loop.h
    column = jnp.where(added, start[:, None] + 1 + index, job.capacity)  # past it: dropped
    if h is not None:
        new = constrain(model.read_by_heads(x), "batch", None, None)
        layer = jnp.zeros((), jnp.int32)
        h = model.kernels("write_rows", h[None, :, None], new[:, None], layer, loop.unread)[0, :, 0]
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
        done=constrain(
            loop.done | (added & (stops == 1)).any(axis=1) | (written == config.max_new_tokens)
        ),
        text=constrain(loop.text.at[rows.T, column].set(tokens, mode="drop"), "batch", None),
        written=constrain(written),
        steps=constrain(loop.steps + 1 - loop.done.astype(jnp.int32)),
        logprobs=logprobs,
        num_accepted=constrain(
            loop.num_accepted.at[:, : accepted.shape[1]].add(accepted.astype(jnp.int32))
        ),
    )
