"""Heads draft what their teacher-forced forward would, whatever stood before: this holds the caches that they keep."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import HEADS, LIGHT, QUICK, random_model

from dsv3_jax.decoding.drafters import Fresh, make_drafter
from dsv3_jax.model.attention import from_zero, positions_of
from dsv3_jax.model.transformer import Trace
from dsv3_jax.ops.sampling import GREEDY

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("light_compiles")]


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def whole_trace(graphdef, state, tokens):
    """(the trunk's output, what heads read of it, each head's hidden states), of rows in full."""
    model = nnx.merge(graphdef, state)
    trace = model.trace(tokens)
    return trace.x, model.read_by_heads(trace.x), trace.mtp_h


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def last_head(graphdef, state, tokens, h):
    """The deepest chained head on inputs of its own, entry i of `tokens` being what position i reads."""
    model = nnx.merge(graphdef, state)
    at, everything = positions_of(model.cfg, from_zero(*tokens.shape), None), jnp.ones(tokens.shape, bool)
    return model.mtp[-1](model.embedding(tokens), h, at, everything)[0]


def teacher_drafts(model, rows, newest, count):
    """Drafts [B, count] of rows that hold the text up to `newest` and then the very drafts, from whole passes."""
    graphdef, state = nnx.split(model)
    _, read, mtp_h = whole_trace(graphdef, state, jnp.asarray(rows))
    head, batch, depth = np.asarray(model.head_matrix()), np.arange(len(rows)), model.cfg.mtp_depth
    drafts = [np.asarray(h)[batch, newest - 1] @ head for h in mtp_h[:count]]
    if count > depth:  # the last head goes on: its output at each position in place of what it reads at the next one
        h = np.array(read if depth == 1 else mtp_h[-2])[:, : rows.shape[1] - depth]
        out = np.asarray(mtp_h[-1])
        for place in range(count - depth):
            h[batch, newest + place] = out[batch, newest + place - 1]
            out = np.asarray(last_head(graphdef, state, jnp.asarray(rows[:, depth:]), jnp.asarray(h)))
            drafts.append(out[batch, newest + place] @ head)
    return np.argmax(np.stack(drafts, axis=1), axis=-1)


@pytest.mark.parametrize("heads", HEADS)
def test_drafts_are_those_of_the_whole_text(rng, heads):
    """Rows of text of which a random number of tokens come to stand at a time; what does not is rubbish."""
    reads = "normed" if heads in ("eagle", "medusa") else "raw"
    cfg = replace(LIGHT, mtp_input=reads, **HEADS[heads])
    model, count = random_model(cfg), 3 if heads in ("meta", "medusa") else 5
    kind = "expanded" if heads in ("meta", "eagle") else "latent"
    graphdef, state = nnx.split(model)
    lengths, batch = np.array([1, 1, 2, 3, 7, 4], np.int32), np.arange(6)
    text = rng.integers(cfg.vocab_size, size=(6, 48)).astype(np.int32)
    x, h = map(np.asarray, whole_trace(graphdef, state, jnp.asarray(text))[:2])

    @partial(jax.jit, compiler_options=QUICK)
    def start(state, tokens, lengths, x):
        trace = Trace(x, x, (), None, (), x)  # of which drafters read x alone
        drafter = make_drafter(nnx.merge(graphdef, state), None, None)
        return drafter.start(trace, tokens, lengths, 48, kind, jnp.dtype("float32"))

    @partial(jax.jit, compiler_options=QUICK)
    def draft(state, remembered, fresh):
        model = nnx.merge(graphdef, state)
        drafter = make_drafter(model, None, model.ready())
        return drafter.draft(remembered, fresh, count, jax.random.key(0), GREEDY)

    def rubbish_beyond(stands, y):
        free = rng.integers(cfg.vocab_size, size=y.shape) if y.dtype == np.int32 else 3 * rng.standard_normal(y.shape)
        return jnp.asarray(np.where(stands.reshape(*stands.shape, *[1] * (y.ndim - 2)), y, free).astype(y.dtype))

    prompt = np.arange(32)[None] < lengths[:, None]
    remembered = start(
        state, rubbish_beyond(prompt, text[:, :32]), jnp.asarray(lengths), rubbish_beyond(prompt, x[:, :32])
    )
    at, standing = lengths - 1, np.ones(6, np.int32)  # as prefill leaves it
    for _ in range(6):
        stands = np.arange(count + 1)[None] < standing[:, None]
        place = at[:, None] + np.arange(count + 1)
        fresh_h, fresh_tokens = (
            rubbish_beyond(stands, y) for y in (h[batch[:, None], place], text[batch[:, None], place + 1])
        )
        fresh = Fresh(fresh_h, fresh_tokens, *map(jnp.asarray, (standing, at, text[batch, at])))
        drafts, remembered = draft(state, remembered, fresh)
        at = at + standing
        rows = text.copy()
        for row, newest, drafted in zip(rows, at, np.asarray(drafts.tokens), strict=True):
            row[newest + 1 : newest + 1 + count] = drafted
        np.testing.assert_array_equal(drafts.tokens, teacher_drafts(model, rows, at, count))
        standing = rng.integers(1, count + 2, size=6).astype(np.int32)
