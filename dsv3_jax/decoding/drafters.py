"""Who drafts: a small model of its own, or the model's own multi-token heads.

A drafter has two methods. `start` gives its state after a prompt; `draft` first reads the tokens that came to stand in
the last step (`Fresh`), then drafts. What it remembers is in caches like the model's: what it wrote there for drafts
lies beyond its lengths and is written over, so nothing is copied or undone.

Letters: B sequences, J drafts a step, F = J + 1, D width, W vocabulary, M heads. t_m is the newest token; the trunk's
hidden states are known up to position m − 1.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh.sharding import by_rows, constrain
from dsv3_jax.model.attention import from_zero, places, positions_of
from dsv3_jax.model.cache import Cache, Kind, empty_cache, fill, pick_kind
from dsv3_jax.model.mtp import MetaHead, gathered
from dsv3_jax.model.transformer import Ready, Trace, Transformer
from dsv3_jax.ops.products import few_rows_product
from dsv3_jax.ops.sampling import Sampling, processed_logits, sample
from dsv3_jax.ops.verify_drafts import probabilities


class Fresh(NamedTuple):
    """What the last step of the model brought."""

    h: Array  # [B, F, D]: what heads read of the trunk, from position `start` on
    tokens: Array  # int32 [B, F]: those after, so that tokens[:, j] follows h[:, j]
    standing: Array  # int32 [B]: how many of them stand, at least 1
    start: Array  # int32 [B]
    previous: Array  # int32 [B]: the token at `start`


class Drafts(NamedTuple):
    """J drafts a sequence, and what they were drawn from (None at temperature 0)."""

    tokens: Int[Array, "B J"]
    q: Float[Array, "B J W"] | None


class ModelDrafter:
    """An independent model with the target's vocabulary."""

    def __init__(self, model: Transformer, ready: Ready | None):
        self.model, self.ready = model, ready

    def start(self, trace: Trace, tokens: Array, lengths: Array, capacity: int, kind: Kind, dtype) -> Cache:
        kind = pick_kind(self.model.cfg, None)
        # The prompts fit, but the target may have padded them beyond what a shorter draft model can read.
        rows = self.model.trace(tokens[:, : self.model.cfg.max_positions], kind=kind).cache_rows
        return fill(empty_cache(self.model.cfg, rows.shape[0], tokens.shape[0], capacity, kind, dtype), rows, lengths)

    def draft(self, state: Cache, fresh: Fresh, count: int, key: Array, sampling: Sampling) -> tuple[Drafts, Cache]:
        # Of the last two tokens one may be in the cache already: where every draft stood, the last of them is not.
        both = jnp.concatenate([fresh.previous[:, None], fresh.tokens], axis=1)
        place = fresh.standing[:, None] - 1 + jnp.arange(2, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(both, place, axis=1)
        newest = fresh.start + fresh.standing

        def step(carry: tuple[Cache, Array], key: Array) -> tuple[tuple[Cache, Array], tuple[Array, Array | None]]:
            cache, tokens = carry
            x, cache = self.model.decode(tokens, cache, self.ready)
            token, q = _draw(self.model.next_logits(self.model.norm(x[:, -1])), key, sampling)
            return (replace(cache, lengths=cache.lengths + tokens.shape[1]), token[:, None]), (token, q)

        keys = jax.random.split(key, count)
        carry, first = step((replace(state, lengths=newest - 1), tokens), keys[0])
        carry, rest = _repeat(step, carry, keys[1:])
        return _together([first], rest), carry[0]


class _Reading(NamedTuple):
    """A chained head's state: its cache, and its output at the last position that stands."""

    cache: Cache  # one layer; `Fresh` says where it goes on, not its lengths
    last: Array  # [B, D]


class ChainDrafter:
    """Heads that read the token before: DeepSeek's modules, one a draft, and then the last of them again and again.

    Head k at position i reads its predecessor's output at i and token i + k, and drafts token i + k + 1. All tokens up
    to m stand, so what head k reads up to position m − k is kept. To draft token m + k it goes on to position m − 1 in
    the same pass, over the drafts before. An EAGLE head is a chain of one.
    """

    def __init__(self, model: Transformer, ready: Ready | None):
        self.model = model
        self.heads: list[Any] = [
            gathered(head, fsdp=model.cfg.layout.fsdp, dtype=model.compute_dtype) for head in model.mtp
        ]
        self.experts = [None] * len(self.heads) if ready is None else ready.heads

    def start(
        self, trace: Trace, tokens: Array, lengths: Array, capacity: int, kind: Kind, dtype
    ) -> tuple[_Reading, ...]:
        cfg, h, made = self.model.cfg, self.model.read_by_heads(trace.x), []
        kind = _kind_of_heads(cfg, kind)
        for k, head in enumerate(self.heads, start=1):
            short = tokens.shape[1] - k
            at = positions_of(cfg, from_zero(tokens.shape[0], short), None)
            h, rows = head.prefill(self.model.embedding(tokens[:, k:]), h[:, :short], at, kind)
            read = jnp.maximum(lengths - k, 0)
            cache = fill(empty_cache(cfg, 1, tokens.shape[0], capacity, kind, dtype), rows[None], read)
            made.append(_Reading(cache, _pick(h, read - 1)))
        return tuple(made)

    def draft(
        self, state: tuple[_Reading, ...], fresh: Fresh, count: int, key: Array, sampling: Sampling
    ) -> tuple[Drafts, tuple[_Reading, ...]]:
        start, standing, trained = fresh.start, fresh.standing, min(count, len(self.heads))
        newest, rows = start + standing, jnp.arange(start.size, dtype=jnp.int32)
        keys, made = jax.random.split(key, count), list(state)
        drawn: list[tuple[Array, Array | None]] = []
        # Entry j is position start − k + 1 + j of head k. Drafts are put behind the tokens that stand, as they come.
        h, tokens = fresh.h, jnp.pad(fresh.tokens, ((0, 0), (0, trained)))
        for k, reading in enumerate(state[:trained], start=1):
            # Positions before 0, where the text is shorter than the chain, are left out.
            skipped = jnp.maximum(k - 1 - start, 0)
            cache = replace(reading.cache, lengths=start - k + 1 + skipped)
            read = _from(tokens[:, : h.shape[1]], skipped)
            out, cache = self._go_on(k - 1, read, _from(h, skipped), cache)
            out = _from(out, -skipped)
            end = _pick(out, standing + k - 2)  # at position m − 1
            drawn.append(_draw(self.model.next_logits(end), keys[k - 1], sampling))
            made[k - 1] = _Reading(cache, _pick(out, standing - 1))
            h, tokens = (
                jnp.concatenate([reading.last[:, None], out], axis=1),
                tokens.at[rows, standing + k - 1].set(drawn[-1][0]),
            )

        def beyond(carry: tuple[Cache, Array, Array], key: Array):
            # The last head's own output in place of a predecessor's, one position on.
            cache, h, token = carry
            h, cache = self._go_on(-1, token[:, None], h, cache)
            token, q = _draw(self.model.next_logits(h[:, 0]), key, sampling)
            return (cache, h, token), (token, q)

        carry = replace(made[trained - 1].cache, lengths=newest), end[:, None], drawn[-1][0]
        carry, rest = _repeat(beyond, carry, keys[trained:])
        made[trained - 1] = made[trained - 1]._replace(cache=carry[0])
        return _together(drawn, rest), tuple(made)

    def _go_on(self, head: int, tokens: Array, h: Array, cache: Cache) -> tuple[Array, Cache]:
        at = positions_of(self.model.cfg, places(cache, tokens.shape[1]), None)
        h, cache = self.heads[head].decode(self.model.embedding(tokens), h, at, cache, self.experts[head])
        return h, replace(cache, lengths=cache.lengths + tokens.shape[1])


class ParallelDrafter:
    """Heads that read the trunk's output alone, one draft each: Meta's, whose blocks remember, and Medusa's."""

    def __init__(self, model: Transformer, ready: Ready | None):
        self.model = model
        self.heads: list[Any] = [
            gathered(head, fsdp=model.cfg.layout.fsdp, dtype=model.compute_dtype) for head in model.mtp
        ]
        self.experts = [None] * len(self.heads) if ready is None else ready.heads

    def start(self, trace: Trace, tokens: Array, lengths: Array, capacity: int, kind: Kind, dtype) -> tuple[Cache, ...]:
        cfg, h, made = self.model.cfg, self.model.read_by_heads(trace.x), []
        kind = _kind_of_heads(cfg, kind)
        at = positions_of(cfg, from_zero(*tokens.shape), None)
        for head in self.heads:
            if isinstance(head, MetaHead):
                # All but the prompt's last position, which is fresh in the first step.
                cache = empty_cache(cfg, 1, tokens.shape[0], capacity, kind, dtype)
                made.append(fill(cache, head.prefill(h, at, kind)[1][None], lengths - 1))
        return tuple(made)

    def draft(
        self, state: tuple[Cache, ...], fresh: Fresh, count: int, key: Array, sampling: Sampling
    ) -> tuple[Drafts, tuple[Cache, ...]]:
        made, keys = list(state), jax.random.split(key, count)
        drawn: list[tuple[Array, Array | None]] = []
        for k, head in enumerate(self.heads[:count]):
            if isinstance(head, MetaHead):
                cache = replace(state[k], lengths=fresh.start)
                at = positions_of(self.model.cfg, places(cache, fresh.h.shape[1]), None)
                h, made[k] = head.decode(fresh.h, at, cache, self.experts[k])
            else:
                h = head.residual(fresh.h, few_rows_product)
            drawn.append(_draw(self.model.next_logits(_pick(h, fresh.standing - 1)), keys[k], sampling))
        return _together(drawn), tuple(made)


Drafter = ModelDrafter | ChainDrafter | ParallelDrafter


def make_drafter(model: Transformer, draft: Transformer | None, ready: Ready | None) -> Drafter:
    """The independent model where there is one, else the model's own heads; `ready`: that model's weights."""
    if draft is not None:
        return ModelDrafter(draft, ready)
    kind = ChainDrafter if model.cfg.chained_heads else ParallelDrafter
    return kind(model, ready)


def _draw(logits: Float[Array, "B W"], key: Array, sampling: Sampling) -> tuple[Array, Array | None]:
    """(token int32 [B], the distribution it was drawn from)."""
    logits, left = kept_by_rows(logits, sampling)
    token = constrain(sample(logits, key, **left._asdict()))
    return token, None if sampling.temperature == 0.0 else probabilities(logits, left)


def kept_by_rows(logits: Float[Array, "B *F W"], sampling: Sampling) -> tuple[Float[Array, "B *F W"], Sampling]:
    """(What `sampling` keeps of logits, which lie with their rows, each with the whole vocabulary; what is left to do).

    On a mesh each device looks at its own rows: the compiler would gather all of them for a `top_k`.
    """
    middle = (None,) * (logits.ndim - 2)
    # Cut as the unembedding at first: otherwise the compiler gathers its matrix, not the logits.
    logits = constrain(constrain(logits, "batch", *middle, "vocab"), "batch", *middle, None)
    if sampling.temperature == 0.0:
        return logits, sampling
    _, kept = by_rows(lambda x: ((), processed_logits(x, **sampling._asdict())), (), logits)
    return kept, Sampling(temperature=1.0)


def _repeat(step, carry, keys: Array):
    """`jax.lax.scan` of a step that gives (token, q), so that a long draft compiles as fast as a short one."""
    return jax.lax.scan(step, carry, keys) if keys.shape[0] else (carry, None)


def _together(drawn: list[tuple[Array, Array | None]], rest: tuple[Array, Array | None] | None = None) -> Drafts:
    """Drafts drawn one by one, and the rest stacked along a leading axis."""
    tokens = [jnp.stack([token for token, _ in drawn], axis=1)]
    qs = [q[:, None] for _, q in drawn if q is not None]
    if rest is not None:
        tokens.append(rest[0].swapaxes(0, 1))
        qs += [] if rest[1] is None else [rest[1].swapaxes(0, 1)]
    return Drafts(jnp.concatenate(tokens, axis=1), jnp.concatenate(qs, axis=1) if qs else None)


def _kind_of_heads(cfg: ModelConfig, kind: Kind) -> Kind:
    """The cache of heads whose trunk has a cache of that kind: they remember even where it does not."""
    return pick_kind(cfg, None) if kind == "none" else kind


def _pick(h: Float[Array, "B F D"], index: Int[Array, " B"]) -> Float[Array, "B D"]:
    """One position a sequence; the first where the index is below 0."""
    return jnp.take_along_axis(h, jnp.maximum(index, 0)[:, None, None], axis=1)[:, 0]


def _from(x: Array, first: Int[Array, " B"]) -> Array:
    """Each row of [B, F, …] from its own place on; what would lie outside means nothing."""
    place = first[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    place = jnp.clip(place, 0, x.shape[1] - 1).reshape(*place.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, place, axis=1)
