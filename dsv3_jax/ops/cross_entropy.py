"""Cross-entropy over a large vocabulary, in chunks of tokens: the logits [n, W] never exist."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.ops.dtypes import sum_dtype
from dsv3_jax.ops.varying import as_varying, varying

# of each row of logits: (the log-sum of exponentials, the maximum)
LogSums = Callable[[Array], tuple[Array, Array]]


def chunked_cross_entropy(
    h: Float[Array, "n D"],
    w: Float[Array, "D W"],
    targets: Int[Array, " n"],
    mask: Bool[Array, " n"],
    *,
    chunk: int = 1024,
    log_sums: LogSums | None = None,
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
        log_sums: computes `log_sums_in_two_passes`. None means that function.
    Returns: (sum of nats, number of correct predictions), float32, or float64 if h is.

    Example:
        >>> h, w = jnp.zeros((3, 2)), jnp.zeros((2, 4))  # even odds over 4 tokens: ln 4 nats each
        >>> targets, mask = jnp.array([0, 1, 2]), jnp.array([True, True, False])
        >>> nats, _ = chunked_cross_entropy(h, w, targets, mask)
        >>> round(float(nats), 4)
        2.7726
    """
    weight = mask.astype(sum_dtype(h.dtype))
    total, correct = _summed(h, w, targets, weight, chunk, log_sums or log_sums_in_two_passes)
    return total, jax.lax.stop_gradient(correct)


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

    def body(_: None, xs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        h_cD, targets_c = xs
        logits_cW = _logits(h_cD, w) / temperature
        wanted_c = jnp.take_along_axis(logits_cW, targets_c[:, None], axis=-1)[:, 0]
        nll_c = jax.nn.logsumexp(logits_cW, axis=-1) - wanted_c
        return None, (nll_c, jnp.argmax(logits_cW, axis=-1).astype(jnp.int32))

    n = h.shape[0]
    chunks = (_split(h, chunk), _split(targets, chunk))
    _, (nll, best) = jax.lax.scan(jax.checkpoint(body), None, chunks)
    return nll.T.reshape(-1)[:n], best.T.reshape(-1)[:n]


def log_sums_in_two_passes(
    logits: Float[Array, "n W"],
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Compute (the log-sum of exponentials, the maximum) of each row, in two passes.

    Example:
        >>> log_sums_in_two_passes(jnp.zeros((1, 4)))  # ln 4, and 0
        (Array([1.3862944], dtype=float32), Array([0.], dtype=float32))
    """
    return jax.nn.logsumexp(logits, axis=-1), logits.max(-1)


def _logits(h: Array, w: Array) -> Array:
    return jnp.dot(h, w, preferred_element_type=sum_dtype(h.dtype))


def _split(x: Array, chunk: int) -> Array:
    """Cut [n, …] into [chunks, rows, …], as sharded as n: chunk j has rows j, j + chunks, …."""
    chunks = -(-x.shape[0] // chunk)
    pad = -x.shape[0] % chunks
    x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1)


# Chunks of c tokens: one loop computes the loss, and its gradient if there is one.


def _forward(
    h: Array,
    w: Array,
    targets: Array,
    weight: Array,
    chunk: int,
    log_sums: LogSums,
    with_grad: bool,
) -> tuple[tuple[Array, Array], tuple[Any, Array]]:
    """Return ((sum of nats, number correct), (dh in chunks, dw)), the latter by `with_grad`."""

    def body(
        carry: tuple[Array, ...], xs: tuple[Array, ...]
    ) -> tuple[tuple[Array, ...], Array | None]:
        total, correct, dw = carry
        h_cD, targets_c, weight_c = xs

        # The loss of each target is the log-sum of all logits less its own logit.
        logits_cW = _logits(h_cD, w)
        lse_c, top_c = log_sums(logits_cW)
        picked_c = jnp.take_along_axis(logits_cW, targets_c[:, None], axis=-1)[:, 0]
        total = total + ((lse_c - picked_c) * weight_c).sum()
        correct = correct + jnp.where(picked_c >= top_c, weight_c, 0).sum()
        if not with_grad:
            return (total, correct, dw), None

        # Its gradient in the logits is their softmax, less one at the target.
        hot_cW = jax.nn.one_hot(targets_c, w.shape[1], dtype=logits_cW.dtype)
        softmax_cW = jnp.exp(logits_cW - lse_c[:, None])
        dlogits_cW = ((softmax_cW - hot_cW) * weight_c[:, None]).astype(w.dtype)
        dw = dw + jnp.dot(h_cD.T, dlogits_cW, preferred_element_type=dw.dtype)
        return (total, correct, dw), jnp.dot(dlogits_cW, w.T).astype(h.dtype)

    wide = sum_dtype(h.dtype)
    zero = jnp.zeros((), wide)
    start = (zero, zero, jnp.zeros(w.shape, wide) if with_grad else zero)
    start = tuple(as_varying(x, h, w) for x in start)

    xs = (_split(h, chunk), _split(targets, chunk), _split(weight, chunk))
    (total, correct, dw), dh = jax.lax.scan(body, start, xs)
    return (total, correct), (dh, dw)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(
    h: Array, w: Array, targets: Array, weight: Array, chunk: int, log_sums: LogSums
) -> tuple[Array, Array]:
    return _forward(h, w, targets, weight, chunk, log_sums, with_grad=False)[0]


def _summed_fwd(
    h: Array, w: Array, targets: Array, weight: Array, chunk: int, log_sums: LogSums
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, (dh, dw) = _forward(h, w, targets, weight, chunk, log_sums, with_grad=True)
    dh = dh.swapaxes(0, 1).reshape(-1, h.shape[1])[: h.shape[0]]
    return out, (dh, dw.astype(w.dtype), w[:0])


def _summed_bwd(
    chunk: int, log_sums: LogSums, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    dh, dw, like_w = saved
    scale = cotangents[0]  # the number of right predictions takes no gradient
    dw = dw * scale.astype(dw.dtype)

    # Each device has the part of dw from its own rows.
    apart = varying(dw) - varying(like_w)
    if apart:
        dw = jax.lax.psum(dw.astype(sum_dtype(dw.dtype)), tuple(apart)).astype(dw.dtype)
    return dh * scale.astype(dh.dtype), dw, None, None


_summed.defvjp(_summed_fwd, _summed_bwd)
