"""Cross-entropy over a large vocabulary, in chunks of tokens: the logits [n, W] never exist."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.ops.varying import as_varying, varying


def chunked_cross_entropy(
    h: Float[Array, "n D"],
    w: Float[Array, "D W"],
    targets: Int[Array, " n"],
    mask: Bool[Array, " n"],
    *,
    chunk: int = 1024,
    one_pass: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute the summed nats of `targets` under softmax(h w), and how many are the argmax.

    The gradients of h and w are computed in the forward pass, while a chunk's logits are in memory.
    So the logits are computed once. The second result takes no gradient.

    Args:
        h: hidden states, of any floating dtype.
        w: the head's matrix, in the dtype of h.
        targets: token ids in 0 … W - 1.
        mask: positions where it is False do not count.
        chunk: about how many tokens are computed at a time.
        one_pass: read the logits once for their maximum and their sum. A CPU is faster in two
            passes.
    Returns: (sum of nats, number of correct predictions), float32, or float64 if h is.

    Example:
        >>> h, w = jnp.zeros((3, 2)), jnp.zeros((2, 4))  # even odds over 4 tokens: ln 4 nats each
        >>> targets, mask = jnp.array([0, 1, 2]), jnp.array([True, True, False])
        >>> nats, _ = chunked_cross_entropy(h, w, targets, mask)
        >>> round(float(nats), 4)
        2.7726
    """
    total, correct = _summed(h, w, targets, mask.astype(_wide(h.dtype)), chunk, one_pass)
    return total, jax.lax.stop_gradient(correct)


LOGITS_BYTES = 1 << 32  # of a chunk in `cross_entropy_by_memory`


def cross_entropy_by_memory(
    h: Float[Array, "n D"],
    w: Float[Array, "D W"],
    targets: Int[Array, " n"],
    mask: Bool[Array, " n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Compute `chunked_cross_entropy` in chunks as large as LOGITS_BYTES of logits allow.

    Each chunk reads and writes the head's complete gradient in float32. An accelerator has memory
    for few, large chunks; with a single one there is no loop.
    """
    chunk = max(1, LOGITS_BYTES // (_wide(h.dtype).itemsize * w.shape[1]))
    return chunked_cross_entropy(h, w, targets, mask, chunk=chunk, one_pass=True)


def token_scores(
    h: Float[Array, "n D"],
    w: Float[Array, "D W"],
    targets: Int[Array, " n"],
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
    """Compute each target's negative log-likelihood, and the most likely token at its position.

    A backward pass computes each chunk's logits again.

    Args:
        h, w, targets, chunk: as in `chunked_cross_entropy`.
        temperature: divides the logits, in their wide dtype, as `ops.sampling` does.
    Returns: (nats of each target, int32 argmax tokens).

    Example:
        >>> nats, best = token_scores(jnp.eye(2), 3 * jnp.eye(2), targets=jnp.array([0, 0]))
        >>> nats.round(2), best  # ln(1 + e⁻³) = 0.05 where 0 has the larger logit, else 3 more
        (Array([0.05, 3.05], dtype=float32), Array([0, 1], dtype=int32))
    """

    def body(_, xs):
        h_c, t_c = xs
        logits = _logits(h_c, w) / temperature
        wanted = jnp.take_along_axis(logits, t_c[:, None], axis=-1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=-1) - wanted
        return None, (nll, jnp.argmax(logits, axis=-1).astype(jnp.int32))

    n = h.shape[0]
    _, (nll, best) = jax.lax.scan(
        jax.checkpoint(body), None, (_split(h, chunk), _split(targets, chunk))
    )
    return nll.T.reshape(-1)[:n], best.T.reshape(-1)[:n]


def _wide(dtype):
    return np.promote_types(dtype, np.float32)


def _logits(h, w):
    return jnp.dot(h, w, preferred_element_type=_wide(h.dtype))


def _split(x: Array, chunk: int) -> Array:
    """Cut [n, …] into [chunks, rows, …], as sharded as n: chunk j has rows j, j + chunks, …."""
    chunks = -(-x.shape[0] // chunk)
    pad = -x.shape[0] % chunks
    x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1)


def _in_one_pass(logits):
    """(Log-sum of exponentials, maximum) of each row: a part's sum counts from its maximum."""

    def join(a, b):
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

    nothing = (jnp.array(x, logits.dtype) for x in (np.finfo(logits.dtype).min, 0))
    top, total = jax.lax.reduce((logits, jnp.ones_like(logits)), tuple(nothing), join, (1,))
    return top + jnp.log(total), top


def _forward(h, w, targets, weight, chunk, one_pass, with_grad):
    """Return ((sum of nats, number correct), (dh in chunks, dw)), the latter by `with_grad`."""

    def body(carry, xs):
        total, correct, dw = carry
        h_c, t_c, m_c = xs
        logits = _logits(h_c, w)
        lse, top = (
            _in_one_pass(logits)
            if one_pass
            else (jax.nn.logsumexp(logits, axis=-1), logits.max(-1))
        )
        picked = jnp.take_along_axis(logits, t_c[:, None], axis=-1)[:, 0]
        total = total + ((lse - picked) * m_c).sum()
        correct = correct + jnp.where(picked >= top, m_c, 0).sum()
        if not with_grad:
            return (total, correct, dw), None
        hot = jax.nn.one_hot(t_c, w.shape[1], dtype=logits.dtype)
        dlogits = ((jnp.exp(logits - lse[:, None]) - hot) * m_c[:, None]).astype(w.dtype)
        dw = dw + jnp.dot(h_c.T, dlogits, preferred_element_type=dw.dtype)
        return (total, correct, dw), jnp.dot(dlogits, w.T).astype(h.dtype)

    wide = _wide(h.dtype)
    zero = jnp.zeros((), wide)
    start = (zero, zero, jnp.zeros(w.shape, wide) if with_grad else zero)
    start = tuple(as_varying(x, h, w) for x in start)
    xs = (_split(h, chunk), _split(targets, chunk), _split(weight, chunk))
    (total, correct, dw), dh = jax.lax.scan(body, start, xs)
    return (total, correct), (dh, dw)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(h, w, targets, weight, chunk, one_pass):
    return _forward(h, w, targets, weight, chunk, one_pass, with_grad=False)[0]


def _summed_fwd(h, w, targets, weight, chunk, one_pass):
    out, (dh, dw) = _forward(h, w, targets, weight, chunk, one_pass, with_grad=True)
    dh = dh.swapaxes(0, 1).reshape(-1, h.shape[1])[: h.shape[0]]
    return out, (dh, dw.astype(w.dtype), w[:0])


def _summed_bwd(chunk, one_pass, saved, cotangents):
    dh, dw, like_w = saved
    scale = cotangents[0]
    dw = dw * scale.astype(dw.dtype)
    if apart := varying(dw) - varying(like_w):  # each device has the part from its own rows
        dw = jax.lax.psum(dw.astype(_wide(dw.dtype)), tuple(apart)).astype(dw.dtype)
    return dh * scale.astype(dh.dtype), dw, None, None


_summed.defvjp(_summed_fwd, _summed_bwd)
