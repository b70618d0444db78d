"""Drafters: an independent small model, the model's own multi-token heads, or the text itself.

`start` makes a drafter's state after a prompt. `draft` first reads what the last step accepted
(`Unread`), then drafts a token with each of the keys [J, B]. The state is in caches like the
model's. Rows that were written for drafts are beyond the cache's lengths and will be overwritten,
so nothing is copied or undone.

Letters: B sequences, J drafts a step, F = J + 1, D width, W vocabulary, M heads. t_m is the newest
token; the trunk's hidden states are known up to position m − 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import CacheKind
from dsv3_jax.decoding.prompt_lookup import earlier_match
from dsv3_jax.mesh.logits import draw
from dsv3_jax.model.cache import Cache, pick_kind
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.model.decode import DecodeWeights, make_cache, prefill, run_layers
from dsv3_jax.model.mtp import unshard_head
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import RowSampling, Sampling
from dsv3_jax.ops.verify_drafts import Drafts


class Unread(NamedTuple):
    """The end of a text that a drafter has not read: from `start` to the newest token's."""

    # [B, F, D]: what heads read of the trunk at these positions; None if other drafters draft
    h: Any
    # int32 [B, S]: the complete text; beyond its newest token the numbers are arbitrary
    text: Array
    # int32 [B]: how many positions, at most F; the newest token is at start + num_valid
    num_valid: Array
    start: Array  # int32 [B]


class Prompt(NamedTuple):
    """A prompt as a drafter may read it, and the cache that the model itself uses."""

    tokens: Array  # int32 [B, T]
    lengths: Array  # int32 [B]
    x: Array  # [B, T, D]: the trunk's output before the final norm
    capacity: int
    kind: CacheKind
    dtype: Any


class Drafter:
    """The protocol of a drafter."""

    def __init__(self, model: Transformer, weights: DecodeWeights | None):
        self.model = model
        self.weights = weights
        self.heads = [unshard_head(head, model.unshard) for head in model.mtp]

    def start(self, prompt: Prompt) -> Any:
        """The state after a prompt; None if there is none."""

    def draft(
        self, state: Any, unread: Unread, keys: Array, sampling: Sampling | RowSampling
    ) -> tuple[Drafts, Any]:
        """Read, then draft. Returns: (drafts, the new state)."""
        raise NotImplementedError

    def _continue(self, head: int, tokens: Array, h: Array, cache: Cache) -> tuple[Array, Cache]:
        """Run a head over positions that follow what its cache holds."""
        count = tokens.shape[1]
        ctx = make_context(
            self.model.cfg,
            cache.positions(count),
            how=self.model.how("decode"),
            tokens=tokens,
            cache=cache,
        )
        h, ctx, _ = self.heads[head](h, ctx, self.model.embedding(tokens))
        return h, ctx.cache.at_lengths(cache.lengths + count)


class ModelDrafter(Drafter):
    """An independent model with the target's vocabulary."""

    def start(self, prompt: Prompt) -> Any:
        cfg = self.model.cfg
        batch = prompt.tokens.shape[0]
        cache = make_cache(self.model, batch, prompt.capacity, pick_kind(cfg, None), prompt.dtype)
        # The prompts fit, but the target may have padded them beyond what a shorter draft model can
        # read.
        tokens = prompt.tokens[:, : cfg.max_positions]
        return prefill(self.model, tokens, prompt.lengths, cache, self.weights).cache

    def draft(
        self, state: Cache, unread: Unread, keys: Array, sampling: Sampling | RowSampling
    ) -> tuple[Drafts, Cache]:
        # At most two tokens are not cached: the newest, and before it a draft that ended a step.
        first = unread.start + unread.num_valid - 1
        two = window(unread.text, first, 2)
        x, cache, _ = run_layers(self.model, two, state.at_lengths(first), self.weights)

        def drawn(h: Array, key: Array) -> Drafts:
            return draw(self.model.logits(self.model.norm(h)), key, sampling)

        def step(carry: tuple[Cache, Array], key: Array) -> tuple[tuple[Cache, Array], Drafts]:
            cache, token = carry
            x, cache, _ = run_layers(self.model, token[:, None], cache, self.weights)
            one = drawn(x[:, 0], key)
            return (cache.at_lengths(cache.lengths + 1), one.tokens), one

        # The pass over two tokens gives the first draft; each later one takes a pass of its own.
        one = drawn(x[:, 1], keys[0])
        (cache, _), drafts = _draw_more(
            [one], step, (cache.at_lengths(first + 2), one.tokens), keys[1:]
        )
        return drafts, cache


class _ChainState(NamedTuple):
    """A chained head's state: its cache, and its output at the text's last position."""

    cache: Cache  # of one layer; `Unread` says where it continues, not its lengths
    last: Array  # [B, D]


class ChainDrafter(Drafter):
    """Heads that read the token before: DeepSeek's modules, one a draft, then the last one again.

    Head k at position i reads its predecessor's output at i and token i + k, and drafts token i + k
    + 1. All tokens up to m are in the text, so what head k reads up to position m − k is kept. To
    draft token m + k it continues to position m − 1 in the same pass, over the drafts before. An
    EAGLE head is a chain of one.
    """

    def start(self, prompt: Prompt) -> tuple[_ChainState, ...]:
        cfg = self.model.cfg
        h = self.model.read_by_heads(prompt.x)
        states = []
        batch, length = prompt.tokens.shape
        for k, head in enumerate(self.heads, start=1):
            tokens = prompt.tokens[:, k:]
            positions = from_zero(batch, length - k)
            ctx = make_context(cfg, positions, how=self.model.how("decode"), tokens=tokens)
            h, ctx, _ = head(h[:, : length - k], ctx, self.model.embedding(tokens))
            read = jnp.maximum(prompt.lengths - k, 0)
            states.append(
                _ChainState(_head_cache(self.model, prompt, ctx.rows, read), _pick(h, read - 1))
            )
        return tuple(states)

    def draft(
        self, state: Any, unread: Unread, keys: Array, sampling: Sampling | RowSampling
    ) -> tuple[Drafts, Any]:
        h, text, num_valid, start = unread
        trained = min(keys.shape[0], len(self.heads))
        rows = jnp.arange(start.size, dtype=jnp.int32)
        states = list(state)
        drawn = list[Drafts]()
        # Entry j is position start − k + 1 + j of head k. Each draft is put behind the tokens that
        # are in the text.
        tokens = window(text, start + 1, h.shape[1] + trained)
        for k, head in enumerate(state[:trained], start=1):
            # Positions before 0, if the text is shorter than the chain, are skipped.
            skipped = jnp.maximum(k - 1 - start, 0)
            cache = head.cache.at_lengths(start - k + 1 + skipped)
            read = window(tokens, skipped, h.shape[1])
            width = h.shape[1]
            out, cache = self._continue(k - 1, read, window(h, skipped, width), cache)
            out = window(out, -skipped, width)
            end = _pick(out, num_valid + k - 2)  # at position m − 1
            drawn.append(draw(self.model.logits(end), keys[k - 1], sampling))
            states[k - 1] = _ChainState(
                cache, jnp.where(num_valid[:, None] > 0, _pick(out, num_valid - 1), head.last)
            )
            h = jnp.concatenate([head.last[:, None], out], axis=1)
            tokens = tokens.at[rows, num_valid + k - 1].set(drawn[-1].tokens)

        def beyond(
            carry: tuple[Cache, Array, Array], key: Array
        ) -> tuple[tuple[Cache, Array, Array], Drafts]:
            # The last head reads its own output instead of a predecessor's, one position on.
            cache, h, token = carry
            h, cache = self._continue(-1, token[:, None], h, cache)
            one = draw(self.model.logits(h[:, 0]), key, sampling)
            return (cache, h, one.tokens), one

        carry = (
            states[trained - 1].cache.at_lengths(start + num_valid),
            end[:, None],
            drawn[-1].tokens,
        )
        (cache, *_), drafts = _draw_more(drawn, beyond, carry, keys[trained:])
        states[trained - 1] = states[trained - 1]._replace(cache=cache)
        return drafts, tuple(states)


class ParallelDrafter(Drafter):
    """Heads that read the trunk's output alone, one draft each."""

    def start(self, prompt: Prompt) -> tuple[Cache, ...]:
        positions = from_zero(*prompt.tokens.shape)
        how = self.model.how("decode")
        ctx = make_context(self.model.cfg, positions, how=how, tokens=prompt.tokens)
        h = self.model.read_by_heads(prompt.x)
        read = prompt.lengths - 1  # the first step reads the last position
        return tuple(
            _head_cache(self.model, prompt, head(h, ctx)[1].rows, read) for head in self.heads
        )

    def draft(
        self, state: Any, unread: Unread, keys: Array, sampling: Sampling | RowSampling
    ) -> tuple[Drafts, Any]:
        caches = list(state)
        drawn = list[Drafts]()
        tokens = window(unread.text, unread.start, unread.h.shape[1])

        # All heads read the trunk at position m − 1. There head k = 1 … J drafts token m + k.
        for k in range(keys.shape[0]):
            h, caches[k] = self._continue(k, tokens, unread.h, state[k].at_lengths(unread.start))
            drawn.append(draw(self.model.logits(_pick(h, unread.num_valid - 1)), keys[k], sampling))
        return jax.tree.map(lambda *columns: jnp.stack(columns, axis=1), *drawn), tuple(caches)


class LookupDrafter(Drafter):
    """Prompt look-up: what followed the last tokens where they occurred before in the text.

    The occurrence of the longest run of last tokens is taken, up to LONGEST_MATCH of them; of
    several, the latest. The drafts are the tokens after it. Beyond the end of the text come the
    drafts themselves, so a period repeats. Without any occurrence the newest token is repeated.
    Each draft is certain: q is 1 at it.

    Source: prompt look-up decoding, as transformers' `prompt_lookup_num_tokens`; LLMA, arXiv
        2304.04487.
    Departs from transformers, which takes the first occurrence, and whose drafts end with the text.
    """

    def draft(
        self, state: None, unread: Unread, keys: Array, sampling: Sampling | RowSampling
    ) -> tuple[Drafts, None]:
        newest = unread.start + unread.num_valid
        found = earlier_match(unread.text, newest)
        ahead = jnp.arange(keys.shape[0], dtype=jnp.int32)[None] % (newest - found)[:, None]
        tokens = jnp.take_along_axis(unread.text, found[:, None] + 1 + ahead, axis=1)
        return Drafts(tokens, None), None


def make_drafter(draft: str, model: Transformer, weights: DecodeWeights | None) -> Drafter:
    """Make the drafter of a request.

    Args: draft: "mtp", "lookup", or "model". model, weights: the model that drafts.

    Example:
        >>> from dsv3_jax.model.transformer import abstract
        >>> from dsv3_jax.presets import preset
        >>> type(make_drafter("mtp", abstract(preset("tiny")), None)).__name__
        'ChainDrafter'
    """
    heads = ChainDrafter if model.cfg.head_kind.reads_tokens else ParallelDrafter
    return {"model": ModelDrafter, "lookup": LookupDrafter, "mtp": heads}[draft](model, weights)


def _draw_more(drawn: list[Drafts], step: Callable, carry: Any, keys: Array) -> tuple[Any, Drafts]:
    """Stack drafts, and those that a step of `jax.lax.scan` draws: long ones compile fast."""
    parts = [jax.tree.map(lambda x: x[None], one) for one in drawn]
    if keys.shape[0]:
        carry, rest = jax.lax.scan(step, carry, keys)
        parts.append(rest)
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x).swapaxes(0, 1), *parts)


def _head_cache(
    model: Transformer, prompt: Prompt, rows: dict[str, Array] | None, lengths: Array
) -> Cache:
    """A head's cache, of the trunk's kind, with its rows of the prompt, if it has attention."""
    if rows is None:
        return Cache([], lengths)
    cache = make_cache(
        model, prompt.tokens.shape[0], prompt.capacity, prompt.kind, prompt.dtype, layers=1
    )
    return cache.fill({name: x[None] for name, x in rows.items()}, lengths)


def _pick(h: Float[Array, "B F D"], index: Int[Array, " B"]) -> Float[Array, "B D"]:
    """One position a sequence; the first if the index is below 0."""
    return window(h, index, 1)[:, 0]


def window(x: Array, first: Int[Array, " B"], width: int) -> Array:
    """Entries of each row of [B, S, …] from its own index on; those from outside are arbitrary."""
    index = jnp.clip(first[:, None] + jnp.arange(width, dtype=jnp.int32)[None], 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)
