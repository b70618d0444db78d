"""Heads draft what their teacher-forced pass would, from caches; look-up, what a search finds."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, LIGHT, random_model

from dsv3_jax.decoding.drafters import Prompt, Unread, make_drafter
from dsv3_jax.decoding.prompt_lookup import LONGEST_MATCH
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.model.decode import prepare_decode
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops.sampling import GREEDY


@partial(jax.jit, static_argnums=0)
def full_pass(graphdef, state, tokens):
    """(the trunk's output, what heads read of it, each head's hidden states) of complete rows."""
    model = nnx.merge(graphdef, state)
    out = model.forward_hidden(tokens)
    return out.x, model.read_by_heads(out.x), out.mtp_h


@partial(jax.jit, static_argnums=0)
def last_head(graphdef, state, tokens, h):
    """The deepest chained head on given inputs: position i reads entry i of `tokens`."""
    model = nnx.merge(graphdef, state)
    ctx = make_context(model.cfg, from_zero(*tokens.shape))
    return model.mtp[-1](h, ctx, model.embedding(tokens))[0]


def teacher_drafts(model, rows, newest, count):
    """Drafts [B, count] by full passes over rows with the text up to `newest`, then the drafts."""
    graphdef, state = nnx.split(model)
    _, read, mtp_h = full_pass(graphdef, state, jnp.asarray(rows))
    head, batch, depth = np.asarray(model.head_matrix()), np.arange(len(rows)), model.cfg.mtp_depth
    drafts = [np.asarray(h)[batch, newest - 1] @ head for h in mtp_h[:count]]
    if count > depth:  # the last head continues: it reads its own output of the position before
        h = np.array(read if depth == 1 else mtp_h[-2])[:, : rows.shape[1] - depth]
        out = np.asarray(mtp_h[-1])
        for pos in newest + np.arange(count - depth)[:, None]:
            h[batch, pos] = out[batch, pos - 1]
            tokens = jnp.asarray(rows[:, depth:])
            out = np.asarray(last_head(graphdef, state, tokens, jnp.asarray(h)))
            drafts.append(out[batch, pos] @ head)
    return np.argmax(np.stack(drafts, axis=1), axis=-1)


HEADS = [  # kind, depth, what they read, tokens drafted a step, the cache
    ("deepseek", 2, "raw", 4, "latent"),
    ("eagle", 1, "normed", 3, "expanded"),
    ("meta", 2, "raw", 2, "expanded"),
    ("medusa", 3, "normed", 2, "latent"),
]


@pytest.mark.long
@pytest.mark.parametrize("heads, depth, reads, count, kind", HEADS)
def test_drafts_are_those_of_the_full_text(rng, heads, depth, reads, count, kind):
    """Each step accepts a random number of tokens. Slots beyond them hold arbitrary numbers."""
    cfg = replace(LIGHT, mtp_kind=heads, mtp_depth=depth, mtp_input=reads)
    model = random_model(cfg, execution=DENSE)
    lengths, batch = np.array([1, 1, 2, 3, 7, 4], np.int32), np.arange(6)
    text = rng.integers(cfg.vocab_size, size=(6, 128)).astype(np.int32)
    x, h = map(np.asarray, full_pass(*nnx.split(model), jnp.asarray(text))[:2])
    drafter, weights = partial(make_drafter, "mtp"), prepare_decode(model)

    @jax.jit
    def start(model, tokens, lengths, x):
        prompt = Prompt(tokens, lengths, x, 160, kind, jnp.dtype("float32"))
        return drafter(model, weights).start(prompt)

    @jax.jit
    def draft(model, state, unread):
        keys = jax.random.split(jax.random.key(0), (count, 6))
        return drafter(model, weights).draft(state, unread, keys, GREEDY)

    def arbitrary_beyond(valid, y):
        is_id = y.dtype == np.int32
        noise = rng.integers(37, size=y.shape) if is_id else 3 * rng.standard_normal(y.shape)
        valid = np.expand_dims(valid, tuple(range(2, y.ndim)))
        return jnp.asarray(np.where(valid, y, noise).astype(y.dtype))

    def unread(begin, many, width):
        known = np.arange(width)[None] < many[:, None]
        at = np.minimum(begin[:, None] + np.arange(width), text.shape[1] - 1)
        so_far = arbitrary_beyond(np.arange(text.shape[1])[None] <= (begin + many)[:, None], text)
        read = arbitrary_beyond(known, h[batch[:, None], at])
        return Unread(read, so_far, jnp.asarray(many), jnp.asarray(begin))

    given = np.arange(32)[None] < lengths[:, None]
    prompt, of_prompt = (arbitrary_beyond(given, y[:, :32]) for y in (text, x))
    state = start(model, prompt, jnp.asarray(lengths), of_prompt)
    begin, many = lengths - 1, np.ones(6, np.int32)  # as prefill leaves them
    for _ in range(5):
        drafts, state = draft(model, state, unread(begin, many, count + 1))
        begin = begin + many
        rows = text.copy()
        for row, newest, drafted in zip(rows, begin, np.asarray(drafts.tokens), strict=True):
            row[newest + 1 : newest + 1 + count] = drafted
        np.testing.assert_array_equal(drafts.tokens, teacher_drafts(model, rows, begin, count))
        many = rng.integers(1, count + 2, size=6).astype(np.int32)


# prompt look-up


def drafts_by_hand(text, count):
    """The tokens after the longest earlier run of the last tokens, the latest one; then drafts."""
    best, place = -1, None
    for end in range(len(text) - 1):
        run = 0
        while run < min(LONGEST_MATCH, end + 1) and text[end - run] == text[len(text) - 1 - run]:
            run += 1
        if run >= best:
            best, place = run, end
    longer = list(text)
    for _ in range(count):
        place += 1
        longer.append(longer[place])
    return longer[len(text) :]


def test_drafts_are_those_of_a_search_by_hand(rng):
    count, slots = 5, 64
    # three tokens: long runs occur, and ties
    text = rng.integers(3, size=(9, slots)).astype(np.int32)
    text[0] = np.arange(slots)  # nothing occurs twice
    text[1] = np.tile([4, 5, 6, 7], slots // 4)  # a period
    text[2] = np.tile(np.arange(LONGEST_MATCH + 3), 9)[:slots]  # runs beyond the longest match
    keys = jax.random.split(jax.random.key(0), (count, 9))
    drafter = make_drafter("lookup", abstract(LIGHT), None)
    draft = jax.jit(lambda unread: drafter.draft(None, unread, keys, GREEDY)[0])
    newest = np.array([1, 2, 16, 5, 1, 9, 16, 3, 12], np.int32)
    while newest.max() < slots - 2 * count:
        known = np.arange(slots)[None] <= newest[:, None]
        so_far = np.where(known, text, rng.integers(3, size=text.shape))
        one, begin = jnp.ones(9, jnp.int32), jnp.asarray(newest - 1)
        drafts = draft(Unread(None, jnp.asarray(so_far, jnp.int32), one, begin))
        texts = [row[: n + 1].tolist() for row, n in zip(text, newest, strict=True)]
        want = [drafts_by_hand(row, count) for row in texts]
        assert drafts.tokens.tolist() == want and drafts.q is None
        newest += rng.integers(1, count + 2, size=9).astype(np.int32)
