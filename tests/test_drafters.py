"""Heads draft what their teacher-forced forward pass would: a test of the caches they keep."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, HEADS, LIGHT, random_model

from dsv3_jax.decoding.drafters import Prompt, Unread, make_drafter
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.model.decode import prepare_decode
from dsv3_jax.ops.sampling import GREEDY

pytestmark = pytest.mark.long


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
            out = np.asarray(
                last_head(graphdef, state, jnp.asarray(rows[:, depth:]), jnp.asarray(h))
            )
            drafts.append(out[batch, pos] @ head)
    return np.argmax(np.stack(drafts, axis=1), axis=-1)


@pytest.mark.parametrize("heads", HEADS)
def test_drafts_are_those_of_the_full_text(rng, heads):
    """Each step accepts a random number of tokens. Slots beyond them hold arbitrary numbers."""
    reads = "normed" if heads in ("eagle", "medusa") else "raw"
    cfg = replace(LIGHT, mtp_input=reads, **HEADS[heads])
    model, count = random_model(cfg, execution=DENSE), 3 if heads in ("meta", "medusa") else 5
    kind = "expanded" if heads in ("meta", "eagle") else "latent"
    lengths, batch = np.array([1, 1, 2, 3, 7, 4], np.int32), np.arange(6)
    text = rng.integers(cfg.vocab_size, size=(6, 128)).astype(np.int32)
    x, h = map(np.asarray, full_pass(*nnx.split(model), jnp.asarray(text))[:2])
    drafter, weights = partial(make_drafter, "mtp"), prepare_decode(model)

    @jax.jit
    def start(model, tokens, lengths, x):
        return drafter(model, weights).start(
            Prompt(tokens, lengths, x, 160, kind, jnp.dtype("float32"))
        )

    @jax.jit
    def draft(model, state, unread):
        keys = jax.random.split(jax.random.key(0), (count, 6))
        return drafter(model, weights).draft(state, unread, keys, GREEDY)

    def arbitrary_beyond(valid, y):
        noise = (
            rng.integers(cfg.vocab_size, size=y.shape)
            if y.dtype == np.int32
            else 3 * rng.standard_normal(y.shape)
        )
        return jnp.asarray(
            np.where(valid.reshape(*valid.shape, *[1] * (y.ndim - 2)), y, noise).astype(y.dtype)
        )

    def unread(begin, many, width):
        known = np.arange(width)[None] < many[:, None]
        at = np.minimum(begin[:, None] + np.arange(width), text.shape[1] - 1)
        so_far = arbitrary_beyond(np.arange(text.shape[1])[None] <= (begin + many)[:, None], text)
        return Unread(
            arbitrary_beyond(known, h[batch[:, None], at]),
            so_far,
            jnp.asarray(many),
            jnp.asarray(begin),
        )

    prompt = np.arange(32)[None] < lengths[:, None]
    state = start(
        model,
        arbitrary_beyond(prompt, text[:, :32]),
        jnp.asarray(lengths),
        arbitrary_beyond(prompt, x[:, :32]),
    )
    begin, many = lengths - 1, np.ones(6, np.int32)  # as prefill leaves them
    for _ in range(5):
        drafts, state = draft(model, state, unread(begin, many, count + 1))
        begin = begin + many
        rows = text.copy()
        for row, newest, drafted in zip(rows, begin, np.asarray(drafts.tokens), strict=True):
            row[newest + 1 : newest + 1 + count] = drafted
        np.testing.assert_array_equal(drafts.tokens, teacher_drafts(model, rows, begin, count))
        many = rng.integers(1, count + 2, size=6).astype(np.int32)
