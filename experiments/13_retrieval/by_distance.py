"""Which keys a model finds, and its loss on text, by how much of a row it reads."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from dsv3_jax.ops.cross_entropy import token_scores

BATCH_TOKENS = 16384

# Keys: lengths of rows in units of L, distances of the key in units of the row, and questions for
# each of both.
LENGTHS = (1, 2, 4, 8, 16)
DEPTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
ROWS = 64

# Text: tokens of a row that are read, in units of L. Its last L/2 are scored.
CONTEXTS = (3 / 4, 1, 3 / 2, 2, 3, 4)
LEAST_DOCUMENTS = 100


def retrieved(task, length, model):
    """Return the share of right answers by length of the row and depth of the key, as lists."""
    return [
        [
            share(model, task.questions(c * length, max(round(d * c * length), 2), ROWS).tokens)
            for d in DEPTHS
        ]
        for c in LENGTHS
    ]


def share(model, tokens):
    graphdef, state = nnx.split(model)
    size = max(BATCH_TOKENS // tokens.shape[1], 1)
    best = [last_choice(graphdef, state, tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return float((np.concatenate(best) == tokens[:, -1]).mean())


@partial(jax.jit, static_argnames="graphdef")
def last_choice(graphdef, state, tokens):
    """Return the likeliest last token of each row."""
    model = nnx.merge(graphdef, state)
    return (model.forward_hidden(tokens).h[:, -2] @ model.head_matrix()).argmax(-1)


def held_out_rows(documents, tokenizer, length):
    """Cut one row from each held-out document of at least `length` tokens: its last ones.

    Raises: ValueError for fewer than LEAST_DOCUMENTS rows: a loss by position is that of the
        documents that have it.
    """
    texts = (tokenizer.encode_array(document.text) for document in documents)
    rows = [tokens[-length:] for tokens in texts if len(tokens) >= length]
    if len(rows) < LEAST_DOCUMENTS:
        raise ValueError(
            f"rows={len(rows)} from held-out documents of at least {length} tokens are fewer than "
            f"{LEAST_DOCUMENTS}; use a smaller data.seq_len or a larger data.val_fraction"
        )
    return np.stack(rows)


def losses(model, rows, scored, length):
    """Return the mean nats of the same last tokens, which are scored, with more and more before."""
    graphdef, state = nnx.split(model)
    found = []
    for context in CONTEXTS:
        tokens = rows[:, -round(context * length) :]
        parts = [nats(graphdef, state, tokens[i : i + 16]) for i in range(0, len(tokens), 16)]
        last = np.concatenate(parts)[:, -scored.shape[1] :]
        found.append(float((last * scored).sum() / scored.sum()))
    return found


@partial(jax.jit, static_argnames="graphdef")
def nats(graphdef, state, tokens):
    """Return the nats of each next token, [rows, T − 1]."""
    model = nnx.merge(graphdef, state)
    h, targets = model.forward_hidden(tokens).h[:, :-1], tokens[:, 1:]
    scores = token_scores(h.reshape(-1, h.shape[-1]), model.head_matrix(), targets.reshape(-1))
    return scores[0].reshape(targets.shape)
