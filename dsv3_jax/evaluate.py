"""Held-out measures: loss, bits a byte (in all and by domain), MaxVio over the whole set, MTP acceptance."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.data import Batch
from dsv3_jax.modules.transformer import Transformer
from dsv3_jax.objective import scores
from dsv3_jax.ops import balance
from dsv3_jax.tokenizer import Tokenizer


@partial(jax.jit, static_argnames="graphdef")
def _scores(graphdef, state, batch):
    return scores(nnx.merge(graphdef, state), batch)


def evaluate(
    model: Transformer, batches: Sequence[Batch], tokenizer: Tokenizer, domains: Sequence[str] = ()
) -> dict[str, object]:
    """Measure a model on held-out batches.

    Returns: val_loss (nats a token), val_bits_per_byte, max_vio_global (mean over layers), mtp_acceptance (list, a
    share a depth), load ([L, E] float array: the trunk's sparse layers, then the heads with experts), and
    bits_per_byte_by_domain where `domains` names them. Bits a byte divide by the bytes of the target tokens; special
    tokens have none, but their cost counts.
    """
    graphdef, state = nnx.split(model)
    nats, tokens, size = 0.0, 0.0, 0.0
    agree, drafted, load = 0.0, 0.0, 0.0
    by_domain = {name: np.zeros(2) for name in domains}
    for batch in batches:
        out = jax.device_get(_scores(graphdef, state, {k: batch[k] for k in ("tokens", "segment_ids", "positions")}))
        nll = np.where(out.mask, out.nll, 0).astype(np.float64)
        bytes_ = np.where(out.mask, tokenizer.byte_lengths[batch["tokens"][:, 1:]], 0)
        nats, tokens, size = nats + nll.sum(), tokens + out.mask.sum(), size + bytes_.sum()
        agree, drafted, load = agree + out.agree, drafted + out.drafted, load + out.load
        for i, name in enumerate(domains):
            here = batch["domains"][:, 1:] == i
            by_domain[name] += nll[here].sum(), bytes_[here].sum()
    to_bits = 1 / np.log(2)
    result: dict[str, object] = {
        "val_loss": float(nats / max(tokens, 1)),
        "val_bits_per_byte": float(nats * to_bits / max(size, 1)),
        "mtp_acceptance": [float(a) for a in np.atleast_1d(agree / np.maximum(drafted, 1))],
        "load": load,
    }
    if np.size(load):
        result["max_vio_global"] = float(balance.max_vio(jnp.asarray(load)).mean())
    if domains:
        result["bits_per_byte_by_domain"] = {name: float(n * to_bits / s) for name, (n, s) in by_domain.items() if s}
    return result
