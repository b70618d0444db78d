"""Which keys a model finds, and its loss on text, by how much of a row it reads."""

from functools import partial

import jax
import numpy as np
from flax import nnx

from dsv3_jax.ops.cross_entropy import token_scores

BATCH = 16  # rows

# Keys: lengths of rows in units of L, distances of the key in units of the row, and questions for
# each of both.
LENGTHS = (1, 2, 4, 8, 16)
DEPTHS = (1 / 8, 3 / 8, 5 / 8, 7 / 8)
QUESTIONS = 64

# Text: tokens of a row that are read, in units of L. Its last L/2 are scored.
CONTEXTS = np.array([3 / 4, 1, 3 / 2, 2, 3, 4])


def retrieved(model, task, length):
    """Return the share of right answers by length of the row and depth of the key, as lists."""

    def share(length, distance):
        tokens = task.questions(length, distance, QUESTIONS).tokens
        _, best = scores(model, tokens)
        return float((best[:, -1] == tokens[:, -1]).mean())

    return [[share(c * length, max(round(d * c * length), 2)) for d in DEPTHS] for c in LENGTHS]


def losses(model, rows, scored, length):
    """Return the mean nats of the same last tokens, which are scored, with more and more before."""
    found = []
    for context in CONTEXTS:
        nats, _ = scores(model, rows[:, -round(context * length) :])
        last = nats[:, -scored.shape[1] :]
        found.append(float((last * scored).sum() / scored.sum()))
    return found


def scores(model, tokens):
    """Return the nats of each next token, and the likeliest token there, both [rows, T − 1]."""
    graphdef, state = nnx.split(model)
    parts = [
        batch_scores(graphdef, state, tokens[i : i + BATCH]) for i in range(0, len(tokens), BATCH)
    ]
    return (np.concatenate(part) for part in zip(*parts, strict=True))


@partial(jax.jit, static_argnames="graphdef")
def batch_scores(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    h, targets = model.forward_hidden(tokens).h[:, :-1], tokens[:, 1:]
    found = token_scores(h.reshape(-1, h.shape[-1]), model.head_matrix(), targets.reshape(-1))
    return [x.reshape(targets.shape) for x in found]
