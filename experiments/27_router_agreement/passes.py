"""Ways to compute the log-probabilities of one text: forward, or a token at a time from a cache."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import Execution
from dsv3_jax.kernels.choose import prepare
from dsv3_jax.model.cache import pick_dtype
from dsv3_jax.model.context import make_context
from dsv3_jax.model.decode import make_cache, prepare_decode
from dsv3_jax.model.transformer import abstract

BATCH = 32  # rows that a pass reads at once


class Pass(NamedTuple):
    """One way to compute the log-probabilities of a text."""

    compute_dtype: str = "float32"
    precision: str = "none"
    decodes: bool = False  # a token at a time through a cache
    cache_dtype: str | None = None
    batch: int = BATCH


class Read(NamedTuple):
    """The result of a pass over n rows of T tokens."""

    log_p: np.ndarray  # [n, T - 1]: of each next token
    log_all: np.ndarray  # [n, T - 1, V]: of all tokens
    expert_ids: np.ndarray  # [L, n, T, K]
    scores: np.ndarray | None  # [L, n, T, E]: of all experts, of a forward pass


def read(model, how, tokens, given):
    """Do a pass. Experts `given` [L, n, T, K] are replayed; −1 lets the routers choose."""
    execution = Execution(how.compute_dtype, precision=how.precision)
    graphdef = nnx.graphdef(abstract(model.cfg, execution, prepare(execution)))
    count, length = tokens.shape
    batch = min(how.batch, count)
    parts = (
        tokens.reshape(-1, batch, length),
        given.reshape(len(given), -1, batch, *given.shape[2:]).swapaxes(0, 1),
    )
    log_p, log_all, *found = _read(graphdef, nnx.state(model), *parts, how=how)
    found = [
        x if x is None else np.moveaxis(x, 0, 1).reshape(len(given), count, length, -1)
        for x in found
    ]
    return Read(
        np.asarray(log_p).reshape(count, -1),
        np.asarray(log_all).reshape(count, length - 1, -1),
        *found,
    )


@partial(jax.jit, static_argnames=("graphdef", "how"))
def _read(graphdef, state, tokens, given, *, how):
    """Read batches one after the other: tokens [n, B, T], given [n, L, B, T, K]."""
    model = nnx.merge(graphdef, state)
    through = partial(decode, how=how) if how.decodes else forward

    def one(part):
        h, expert_ids, scores = through(model, *part)
        log_all = jax.nn.log_softmax(model.logits(h[:, :-1]))
        log_p = jnp.take_along_axis(log_all, part[0][:, 1:, None], axis=-1)[..., 0]
        return log_p, log_all, expert_ids, scores

    return jax.lax.map(one, (tokens, given))


def forward(model, tokens, given):
    how = model.how(watch=frozenset({"scores"}))
    out = model.forward_hidden(tokens, how=how, expert_ids=(given,))
    return out.h, out.routing.expert_ids, out.routing.scores


def decode(model, tokens, given, *, how):
    """Read a token at a time through a cache."""
    batch, length = tokens.shape
    weights, dtype = prepare_decode(model), pick_dtype(model.compute_dtype, how.cache_dtype)

    def step(cache, part):
        tokens, given = part[0][:, None], part[1][:, :, None]
        call = model.how("decode")
        ctx = make_context(model.cfg, cache.positions(1), how=call, tokens=tokens, cache=cache)
        trunk = model.run_trunk(tokens, ctx._replace(given=given), weights)
        ids = trunk.metrics["sparse"]["expert_ids"]
        return trunk.cache.at_lengths(cache.lengths + 1), (model.norm(trunk.x)[:, 0], ids)

    start = make_cache(model, batch, length, "latent", dtype)
    _, (h, expert_ids) = jax.lax.scan(step, start, (tokens.T, jnp.moveaxis(given, 2, 0)))
    return jnp.moveaxis(h, 0, 1), jnp.moveaxis(expert_ids, 0, 2).reshape(given.shape), None
