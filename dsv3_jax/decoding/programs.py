"""The compiled programs of a request: read prompts, begin rows, then { draft → step → accept }.

Plain decoding is that loop without drafts. Each sequence advances by its own count in its own cache
rows; none waits.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.decoding.drafters import Prompt, Unread, window
from dsv3_jax.decoding.loop import Begins, Decoder, Loop, Prefilled, Watched
from dsv3_jax.mesh.logits import likeliest, process_by_rows
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.cache import Cache, keep_sharded
from dsv3_jax.model.decode import make_cache, prefill, run_layers
from dsv3_jax.ops.sampling import GREEDY, RowSampling, Sampling, keys_at, log_probability, row_keys
from dsv3_jax.ops.verify_drafts import Drafts, accept

NO_TOKEN = -1  # the logits are not finite
BEYOND = 32  # slots at least for what a drafter writes beyond the text


class Programs:
    """The compiled programs of all requests of one form.

    They take a Decoder's leaves: to flatten it each time would take the host as long as a step of a
    small model.
    """

    def __init__(self, form: Any):
        self.prefill = jax.jit(partial(_prefill, form))
        self.admit = jax.jit(partial(_admit, form), static_argnames="in_order", donate_argnums=1)
        self.decode = jax.jit(partial(_decode, form), donate_argnums=1)


programs = lru_cache(maxsize=64)(Programs)


# prompts


def _prefill(
    form: Any, leaves: list, tokens: Array, lengths: Array, given: Any = None
) -> Prefilled:
    """Read prompts.

    Args: given: int32 [Lmoe, P, T, K], experts in place of the routers' choices; −1 chooses freely.
    """
    decoder = jax.tree.unflatten(form, leaves)
    model, weights = decoder.models[0]
    config = decoder.config
    tokens = constrain(tokens, "batch", None)
    batch, width = tokens.shape
    kind = (config.cache, config.cache_dtype)

    if config.cache == "none":
        x, _, ids = run_layers(model, tokens, None)
        cache = Cache([], lengths)
    else:
        empty = make_cache(model, batch, width, *kind)
        x, cache, ids = prefill(model, tokens, lengths, empty, weights, given)

    drafter = None
    if decoder.draft:
        drafter = decoder.drafter.start(Prompt(tokens, lengths, x, width, *kind))

    # Experts with the token's axes first, [P, T, Lmoe, K], as the loop keeps them.
    if ids is not None:
        kept = constrain(jnp.moveaxis(ids, 0, 2), "batch", None, None, None)
        ids = kept if config.return_routing else None
    return Prefilled(tokens, lengths, window(x, lengths - 1, 1), cache, drafter, ids)


def _admit(
    form: Any,
    leaves: list,
    loop: Loop | None,
    read: Prefilled,
    begins: Begins,
    *,
    in_order: bool,
) -> Loop:
    """Let rows begin, and draw first tokens as if a step had read their prompts' last. Others stay.

    Args:
        loop: None makes one.
        in_order: row b begins with prompt b, so nothing is gathered, or sent on a mesh.
    """
    decoder = jax.tree.unflatten(form, leaves)

    # Row b begins with prompt source[b]; the samples of a prompt share it.
    if not in_order:
        rows = jnp.maximum(begins.source, 0)
        read = _over_rows(lambda x: x.take(rows, axis=0), lambda cache: cache.take(rows), read)

    new = _fresh_rows(decoder, read, begins)

    # The first rows make the loop. Rows without a text are done; drafters write beyond the end.
    if loop is None:
        room = decoder.capacity + max(BEYOND, decoder.draft_length + 1)
        drafter = with_slots(new.drafter, room)
        new = new._replace(cache=new.cache.with_slots(decoder.slots), drafter=drafter)
        return new._replace(done=constrain(new.done | (begins.source < 0)))

    # Later rows take the place of done ones, whose steps and acceptance still count.
    is_new = begins.source >= 0

    def begin(old: Array, new: Array) -> Array:
        return jnp.where(is_new.reshape([-1, *[1] * (new.ndim - 1)]), new, old)

    both = _over_rows(begin, lambda old, new: old.begin(new, is_new), loop, new)
    return both._replace(steps=loop.steps, num_accepted=loop.num_accepted)


def _fresh_rows(decoder: Decoder, read: Prefilled, begins: Begins) -> Loop:
    """The loop's state where every row has read its prompt and drawn its first token."""
    config = decoder.config
    batch = read.lengths.size
    zero = jnp.zeros((batch,), jnp.int32)
    text = constrain(_longer(read.tokens, decoder.capacity), "batch", None)

    # What is kept of each token beside its id, where it is asked for.
    logprobs = None
    if config.logprobs:
        logprobs = (jnp.zeros(text.shape, jnp.float32),) * 2
    watched = None
    if n := config.alternatives:
        shape = (*text.shape, n)
        watched = Watched(
            jnp.full(text.shape, -1, jnp.int32),
            jnp.zeros(shape, jnp.int32),
            jnp.zeros(shape, jnp.float32),
        )
    ids = read.expert_ids
    if ids is not None:
        ids = constrain(_longer(ids, decoder.capacity), "batch", None, None, None)

    # No step was run: the newest token is the prompt's last, at position lengths − 1.
    loop = Loop(
        cache=Cache([], read.lengths - 1),
        drafter=None,
        h=None,
        unread=zero,
        keys=row_keys(begins.seeds, begins.texts, begins.samples),
        done=zero > 0,
        text=text,
        written=zero,
        limits=constrain(begins.limits),
        steps=zero,
        num_accepted=jnp.zeros((batch, decoder.draft_length), jnp.int32),
        logprobs=logprobs,
        expert_ids=ids,
        watched=watched,
        sampling=begins.sampling,
    )

    # The first token is drawn as in a step without drafts, from x at the prompt's last token.
    loop = _advance(decoder, loop, Drafts(read.tokens[:, :0], None), read.x)
    cache = read.cache.at_lengths(loop.cache.lengths)
    return loop._replace(steps=zero, drafter=read.drafter, cache=cache)


# steps


def _decode(form: Any, leaves: list, loop: Loop, until: Array) -> Loop:
    """Run steps until every row has its `until` [B] tokens, or is done."""
    decoder = jax.tree.unflatten(form, leaves)

    def goes_on(loop: Loop) -> Array:
        behind = ((loop.written < until) & ~loop.done).any()

        # A step writes J + 1 slots from each length on. Without room the host grows the cache.
        slots = loop.cache.capacity if loop.cache.parts else decoder.capacity
        if slots == decoder.capacity:
            return behind
        return behind & (loop.cache.lengths.max() + decoder.draft_length < slots)

    return jax.lax.while_loop(goes_on, partial(_step, decoder), loop)


def _step(decoder: Decoder, loop: Loop) -> Loop:
    """Draft, run the trunk over the newest token and the drafts, and accept some of them."""
    model, weights = decoder.models[0]
    newest = window(loop.text, loop.cache.lengths, 1)
    if decoder.draft:
        loop, drafts = _draft(decoder, loop)
    else:
        drafts = Drafts(newest[:, 1:], None)

    if decoder.config.cache == "none":  # all tokens again, slow and obvious: to compare with
        x, _, ids = run_layers(model, loop.text, None)
        loop = _record(loop, ids, jnp.zeros_like(loop.written))
        return _advance(decoder, loop, drafts, window(x, loop.cache.lengths, 1))

    # One pass over F = J + 1 tokens: the output before each draft is the target's p for it.
    tokens = jnp.concatenate([newest, drafts.tokens], axis=1)
    x, cache, ids = run_layers(model, tokens, loop.cache, weights)
    loop = _record(loop, ids, loop.cache.lengths)
    return _advance(decoder, loop._replace(cache=cache), drafts, x)


def _draft(decoder: Decoder, loop: Loop) -> tuple[Loop, Drafts]:
    """Let the drafter read what the last step wrote, then draft."""
    # A draft's key is of its row and its place in the text, whatever the batch holds.
    position = jnp.arange(decoder.draft_length, dtype=jnp.int32)[None]
    keys = keys_at(loop.keys[:, 1], loop.written[:, None] + position)

    # The drafter has read the positions before `start`; `unread` further on is the newest token.
    start = loop.cache.lengths - loop.unread
    unread = Unread(loop.h, loop.text, loop.unread, start)
    sampling = loop.sampling or decoder.config.sampling
    drafts, state = decoder.drafter.draft(loop.drafter, unread, keys.swapaxes(0, 1), sampling)
    return loop._replace(drafter=state), drafts


def _record(loop: Loop, expert_ids: Any, first: Array) -> Loop:
    """Keep the experts [Lmoe, B, F, K] of tokens from `first` on; new ones replace rejected."""
    if loop.expert_ids is None:
        return loop
    rows, index = (jnp.arange(n, dtype=jnp.int32) for n in expert_ids.shape[1:3])
    put = loop.expert_ids.at[rows[:, None], first[:, None] + index[None]]
    kept = put.set(jnp.moveaxis(expert_ids, 0, 2), mode="drop")
    return loop._replace(expert_ids=constrain(kept, "batch", None, None, None))


def _advance(decoder: Decoder, loop: Loop, drafts: Drafts, x: Array) -> Loop:
    """Accept or reject drafts, write the tokens, and move each row on by its own count.

    Args: x: [B, F, D], the trunk's output at the newest token and at each draft.
    """
    model, _ = decoder.models[0]
    sampling = loop.sampling or decoder.config.sampling
    rows, index = (jnp.arange(n, dtype=jnp.int32)[None] for n in x.shape[:2])

    with jax.named_scope("accept"):
        raw = model.logits(model.norm(x))
        logits, left = process_by_rows(raw, sampling)
        keys = keys_at(loop.keys[:, 0], loop.written[:, None] + index)
        num_accepted, tokens = map(constrain, accept(drafts.tokens, drafts.q, logits, keys, left))

        # The largest of logits with a NaN is a NaN: then the token drawn would mean nothing.
        plain, _ = process_by_rows(raw, GREEDY)
        drawn = jnp.take_along_axis(plain, tokens[..., None], axis=-1)[..., 0]
        tokens = jnp.where(jnp.isfinite(drawn), tokens, NO_TOKEN)

    with jax.named_scope("stop"):
        # Tokens count up to the first rejected draft, the first stop token, and the text's end. A
        # row that is done does not move.
        is_stop = (tokens[..., None] == decoder.stops[None, None]).any(-1) | (tokens == NO_TOKEN)
        stops = is_stop.astype(jnp.int32)
        room = jnp.where(loop.done, 0, loop.limits - loop.written)
        is_accepted = index <= num_accepted[:, None]
        before_stop = jnp.cumsum(stops, axis=1) == stops
        added = is_accepted & (index < room[:, None]) & before_stop
        count = added.sum(axis=1, dtype=jnp.int32)
        written = loop.written + count
        ended = (added & (stops == 1)).any(axis=1) | (written == loop.limits)

    with jax.named_scope("write"):
        start = loop.cache.lengths
        column = jnp.where(added, start[:, None] + 1 + index, decoder.capacity)  # past it: dropped

        def put(kept: Array, new: Array) -> Array:
            kept = kept.at[rows.T, column].set(new, mode="drop")
            return constrain(kept, "batch", *(None,) * (kept.ndim - 1))

        text = put(loop.text, tokens)
        logprobs = loop.logprobs
        if logprobs is not None:
            of_tokens = _log_probabilities(sampling, raw, logits, tokens)
            logprobs = tuple(map(put, logprobs, of_tokens))
        watched = loop.watched
        if watched is not None:
            watched = jax.tree.map(put, watched, _watch(decoder.config.alternatives, raw, drafts))

        # Heads read J + 1 positions each step; after a prompt, one and padding.
        h = None
        if decoder.draft == "mtp":
            read = constrain(model.read_by_heads(x), "batch", None, None)
            h = _longer(read, decoder.draft_length + 1)

    with jax.named_scope("count"):
        moved = ~loop.done
        accepted = (index[:, :-1] < num_accepted[:, None]) & moved[:, None]
        by_position = loop.num_accepted.at[:, : accepted.shape[1]].add(accepted.astype(jnp.int32))

    # The cache keeps accepted tokens alone: slots beyond its lengths will be overwritten.
    return loop._replace(
        cache=keep_sharded(loop.cache.at_lengths(start + count)),
        h=h,
        unread=constrain(count),
        done=constrain(loop.done | ended),
        text=text,
        written=constrain(written),
        steps=constrain(loop.steps + moved.astype(jnp.int32)),
        num_accepted=constrain(by_position),
        logprobs=logprobs,
        watched=watched,
    )


def _log_probabilities(
    sampling: Sampling | RowSampling, raw: Array, logits: Array, tokens: Array
) -> tuple[Array, Array]:
    """Of tokens [B, F], under the distribution that they were drawn from and at temperature 1."""
    plain, _ = process_by_rows(raw, GREEDY)
    drawn = log_probability(logits, tokens)
    if sampling.is_greedy:  # what is certain
        drawn = jnp.zeros_like(drawn)
    return drawn, log_probability(plain, tokens)


def _watch(count: int, raw: Array, drafts: Drafts) -> Watched:
    """What to keep of the tokens at each place [B, F] of a step, if they count."""
    plain, _ = process_by_rows(raw, GREEDY)
    logprobs, alternatives = likeliest(plain, count)

    # After the last draft comes a token that nobody drafted.
    drafted = jnp.pad(drafts.tokens, ((0, 0), (0, 1)), constant_values=-1)
    return Watched(constrain(drafted, "batch", None), alternatives, logprobs)


# arrays of rows, and caches


def _over_rows(of_array: Callable, of_cache: Callable, *trees: Any) -> Any:
    """Map over trees of caches and of arrays whose first axis is the rows."""

    def one(*leaves: Any) -> Any:
        return of_cache(*leaves) if _is_cache(leaves[0]) else of_array(*leaves)

    return jax.tree.map(one, *trees, is_leaf=_is_cache)


@jax.jit
def take_rows(loop: Loop, rows: Array) -> Loop:
    """A loop of these rows [n], in this order; −1 is a row without a text."""
    index = jnp.maximum(rows, 0)
    taken = _over_rows(lambda x: x[index], lambda cache: cache.take(index), loop)

    # A row without a text is as short as a text can be: the longest row says when the cache must
    # grow, and a drafter reads the token before the newest.
    is_free = rows < 0
    lengths, unread = (jnp.where(is_free, 1, x) for x in (taken.cache.lengths, taken.unread))
    cache = keep_sharded(taken.cache.at_lengths(lengths))
    done = constrain(taken.done | is_free)
    return taken._replace(cache=cache, unread=constrain(unread), done=done)


def with_slots(tree: Any, slots: int) -> Any:
    """A tree whose caches have so many slots; the new ones are empty."""
    return _over_rows(lambda x: x, lambda cache: cache.with_slots(slots), tree)


def _is_cache(x: Any) -> bool:
    return isinstance(x, Cache)


def _longer(x: Array, size: int) -> Array:
    """An array [B, n, …] with so many entries a row; the new ones are 0."""
    more = [(0, size - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, more)
