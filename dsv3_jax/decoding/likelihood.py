"""How likely a model takes given texts to be: what task scores are made of."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsv3_jax.decoding.decode_config import NotFinite, check_tokens
from dsv3_jax.mesh import sharding
from dsv3_jax.mesh.logits import likeliest, score_by_rows
from dsv3_jax.mesh.sharding import constrain
from dsv3_jax.model.context import from_zero, make_context
from dsv3_jax.model.decode import run_layers
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import log_probability

BLOCK = 128  # tokens whose logits are in memory at once


def loglikelihood(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 32,
) -> list[tuple[float, bool]]:
    """Score continuations of contexts.

    Pairs of about one length are read together; no token is ever dropped.

    Args:
        model: the model; on a mesh it reads there.
        pairs: (context, continuation), lists of token ids. A context has at least one token, as a
            tokenizer's bos.
        batch_size: pairs that are read at once.
    Returns: for each pair (log p(continuation | context) in nats, whether each of its tokens is the
        likeliest one).
    Raises: ValueError for an empty context or continuation, a token outside the vocabulary, a
        pair beyond max_positions, or logits that are NaN or infinite.

    Example:
        >>> import jax.numpy as jnp, dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all 0
        >>> [(score, greedy)] = loglikelihood(model, [([1, 2], [0, 0])])
        >>> round(score, 2), greedy  # even odds over 260 tokens, twice: -2 ln 260
        (-11.12, True)
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"model={model!r} is not a Transformer")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} is not an int of 1 or above")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"pair {i} is {pair!r}, not (context, continuation)")
        for name, tokens in zip(("context", "continuation"), pair, strict=True):
            check_tokens(f"the {name} of pair {i}", tokens, model.cfg.vocab_size)
        if sum(map(len, pair)) > model.cfg.max_positions:
            raise ValueError(
                f"pair {i} has {sum(map(len, pair))} tokens, over "
                f"max_positions={model.cfg.max_positions}"
            )

    # Sorted by length, longest first, so that a batch has little padding.
    (graphdef, state), mesh = nnx.split(model), sharding.mesh_of(model)
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))

    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        # few widths: each is compiled once
        width = 1 << (sum(map(len, pairs[chosen[0]])) - 1).bit_length()
        tokens = np.zeros(
            (min(batch_size, len(order)), min(max(width, 32), model.cfg.max_positions)), np.int32
        )
        for row, i in zip(tokens, chosen, strict=False):
            row[: sum(map(len, pairs[i]))] = [*pairs[i][0], *pairs[i][1]]
        with sharding.use_mesh(mesh):
            nats, best = jax.device_get(next_token_scores(graphdef, state, tokens))

        # Entry t is about token t + 1, so a continuation begins at the context's last token.
        for row, i in enumerate(chosen):
            start = len(pairs[i][0]) - 1
            stop = sum(map(len, pairs[i])) - 1
            likeliest = best[row, start:stop] == tokens[row, start + 1 : stop + 1]
            scores[i] = -float(nats[row, start:stop].sum(dtype=np.float64)), bool(likeliest.all())
            if not math.isfinite(scores[i][0]):
                raise NotFinite(f"pair {i}")
    return scores


@partial(jax.jit, static_argnums=(0, 3))
def next_token_scores(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "B T"], temperature: float = 1.0
) -> tuple[Array, Array]:
    """(Nats of each next token, the likeliest one), [B, T-1].

    Padding comes last, so no token that counts sees it.
    """
    model = nnx.merge(graphdef, state)
    x, *_ = run_layers(model, constrain(tokens, "batch", None), None)
    nats, best = score_by_rows(
        model.norm(x)[:, :-1], model.head_matrix(), tokens[:, 1:], temperature
    )
    return constrain(nats), constrain(best)


class Read(NamedTuple):
    """A text of n tokens, as a model reads it."""

    logprobs: list[float]  # [n − 1]: of each token but the first, given those before, in nats
    # [n]: the likeliest next tokens at each, and their log p, best first
    alternatives: list[list[tuple[int, float]]]
    expert_ids: np.ndarray | None  # int32 [n, Lmoe, K]; None without experts
    gates: np.ndarray | None  # float32 [n, Lmoe, K]


def read_tokens(
    model: Transformer, tokens: Sequence[int], *, given: Any = None, alternatives: int = 5
) -> Read:
    """Read one text in a single pass.

    Args:
        tokens: ids, at least one.
        given: int32 [Lmoe, n, K], experts in place of the routers' choices, see
            `ops.routing.replay`.
        alternatives: likeliest next tokens to return.
    Raises: ValueError as `loglikelihood`, and for logits that are NaN or infinite.
    """
    check_tokens("the text", tokens, model.cfg.vocab_size)
    count = len(tokens)
    if count > model.cfg.max_positions:
        raise ValueError(
            f"the text has {count} tokens, over max_positions={model.cfg.max_positions}"
        )

    # few widths, whole blocks: each is compiled once
    width = max(BLOCK, 1 << (count - 1).bit_length())
    padding = (0, width - count)
    row = np.pad(np.asarray(tokens, np.int32), padding)[None]
    if given is not None:
        given = np.pad(given, [(0, 0), padding, (0, 0)], constant_values=-1)[:, None]

    graphdef, state = nnx.split(model)
    most = min(alternatives, model.cfg.vocab_size)
    with sharding.use_mesh(sharding.mesh_of(model)):
        found = jax.device_get(_read(graphdef, state, row, given, most))
    logprobs, (best_logprobs, best_ids), routing = found
    if np.isnan(best_logprobs[:count]).any():
        raise NotFinite("the text")
    pairs = zip(best_ids[:count].tolist(), best_logprobs[:count].tolist(), strict=True)
    routed = {name: x[:, 0, :count].swapaxes(0, 1) for name, x in routing.items()}
    return Read(
        logprobs[: count - 1].tolist(),
        [[*zip(*two, strict=True)] for two in pairs],
        routed.get("expert_ids"),
        routed.get("gates"),
    )


@partial(jax.jit, static_argnums=(0, 4))
def _read(
    graphdef: nnx.GraphDef, state: nnx.State, tokens: Array, given: Any, most: int
) -> tuple[Array, tuple[Array, Array], dict[str, Array]]:
    """(log p of each next token [T], the likeliest, experts and gates [Lmoe, 1, T, K])."""
    model = nnx.merge(graphdef, state)
    how = model.how("decode", watch=frozenset({"gates"}))
    ctx = make_context(model.cfg, from_zero(*tokens.shape), how=how, tokens=tokens)
    trunk = model.run_trunk(tokens, ctx._replace(given=given))
    routing = trunk.metrics.get("sparse", {})

    # Logits of all tokens at once would need much memory.
    def scores(block: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        h, wanted = block
        logits = model.logits(h[None])
        best_logprobs, best_ids = likeliest(logits, most)
        return log_probability(logits[0], wanted), (best_logprobs[0], best_ids[0])

    h = model.norm(trunk.x)[0]
    h_by_block = h.reshape(-1, BLOCK, h.shape[-1])
    next_by_block = jnp.roll(tokens[0], -1).reshape(-1, BLOCK)
    by_block = jax.lax.map(scores, (h_by_block, next_by_block))

    logprobs, best = jax.tree.map(lambda x: constrain(x.reshape(-1, *x.shape[2:])), by_block)
    return logprobs, best, jax.tree.map(constrain, routing)
