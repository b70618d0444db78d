"""Heads draft what their teacher-forced forward pass would, whatever came before: a test of the caches they keep."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, HEADS, LIGHT, QUICK, random_model

from dsv3_jax.decoding.drafters import Prompt, StepResult, make_drafter
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.ops.sampling import GREEDY

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("light_compiles")]


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def full_pass(graphdef, state, tokens):
    """(the trunk's output, what heads read of it, each head's hidden states) of complete rows."""
    model = nnx.merge(graphdef, state)
    out = model.forward_hidden(tokens)
    return out.x, model.read_by_heads(out.x), out.mtp_h


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def last_head(graphdef, state, tokens, h):
    """The deepest chained head on given inputs: position i reads entry i of `tokens`."""
    model = nnx.merge(graphdef, state)
    return model.mtp[-1](h, make_context(model.cfg, from_zero(*tokens.shape)), model.embedding(tokens))[0]


def teacher_drafts(model, rows, newest, count):
    """Drafts [B, count] by full passes over rows that have the text up to `newest` and then the same drafts."""
    graphdef, state = nnx.split(model)
    _, read, mtp_h = full_pass(graphdef, state, jnp.asarray(rows))
    head, batch, depth = np.asarray(model.head_matrix()), np.arange(len(rows)), model.cfg.mtp_depth
    drafts = [np.asarray(h)[batch, newest - 1] @ head for h in mtp_h[:count]]
    if count > depth:  # the last head continues: it reads its own output of the position before
        h = np.array(read if depth == 1 else mtp_h[-2])[:, : rows.shape[1] - depth]
        out = np.asarray(mtp_h[-1])
        for pos in newest + np.arange(count - depth)[:, None]:
            h[batch, pos] = out[batch, pos - 1]
            out = np.asarray(last_head(graphdef, state, jnp.asarray(rows[:, depth:]), jnp.asarray(h)))
            drafts.append(out[batch, pos] @ head)
    return np.argmax(np.stack(drafts, axis=1), axis=-1)


@pytest.mark.parametrize("heads", HEADS)
def test_drafts_are_those_of_the_full_text(rng, heads):
    """Each step accepts a random number of the text's tokens. Slots beyond them hold arbitrary numbers."""
    reads = "normed" if heads in ("eagle", "medusa") else "raw"
    cfg = replace(LIGHT, mtp_input=reads, **HEADS[heads])
    model, count = random_model(cfg, execution=DENSE), 3 if heads in ("meta", "medusa") else 5
    kind = "expanded" if heads in ("meta", "eagle") else "latent"
    graphdef, state = nnx.split(model)
    lengths, batch = np.array([1, 1, 2, 3, 7, 4], np.int32), np.arange(6)
    text = rng.integers(cfg.vocab_size, size=(6, 80)).astype(np.int32)
    x, h = map(np.asarray, full_pass(graphdef, state, jnp.asarray(text))[:2])

    @partial(jax.jit, compiler_options=QUICK)
    def start(state, tokens, lengths, x):
        drafter = make_drafter(nnx.merge(graphdef, state), "mtp", None)
        return drafter.start(Prompt(tokens, lengths, x, 96, kind, jnp.dtype("float32")))

    @partial(jax.jit, compiler_options=QUICK)
    def draft(state, remembered, last):
        model = nnx.merge(graphdef, state)
        drafter = make_drafter(model, "mtp", model.prepare_decode())
        return drafter.draft(remembered, last, jax.random.split(jax.random.key(0), (count, 6)), GREEDY)

    def arbitrary_beyond(valid, y):
        noise = rng.integers(cfg.vocab_size, size=y.shape) if y.dtype == np.int32 else 3 * rng.standard_normal(y.shape)
        return jnp.asarray(np.where(valid.reshape(*valid.shape, *[1] * (y.ndim - 2)), y, noise).astype(y.dtype))

    prompt = np.arange(32)[None] < lengths[:, None]
    remembered = start(
        state, arbitrary_beyond(prompt, text[:, :32]), jnp.asarray(lengths), arbitrary_beyond(prompt, x[:, :32])
    )
    begin, num_valid = lengths - 1, np.ones(6, np.int32)  # as prefill leaves them
    for plain_steps in (0, 0, 9, 0, 1, 0, 0):  # after which the drafter reads all but the newest position first
        num_valid, width = num_valid + plain_steps, count + 1 + plain_steps
        pos = begin[:, None] + np.arange(width + 1)
        known = np.arange(width + 1)[None] <= num_valid[:, None]
        last_h = arbitrary_beyond(known[:, 1:], h[batch[:, None], pos[:, :-1]])
        last_text = arbitrary_beyond(known, text[batch[:, None], pos])
        last = StepResult(last_h, last_text, *map(jnp.asarray, (num_valid.astype(np.int32), begin)))
        if plain_steps:
            _, remembered = draft(state, remembered, last._replace(num_valid=last.num_valid - 1))
            last, begin, num_valid = last.newest().resize(count + 1), begin + num_valid - 1, np.ones(6, np.int32)
        drafts, remembered = draft(state, remembered, last)
        begin = begin + num_valid
        rows = text.copy()
        for row, newest, drafted in zip(rows, begin, np.asarray(drafts.tokens), strict=True):
            row[newest + 1 : newest + 1 + count] = drafted
        np.testing.assert_array_equal(drafts.tokens, teacher_drafts(model, rows, begin, count))
        num_valid = rng.integers(1, count + 2, size=6).astype(np.int32)
