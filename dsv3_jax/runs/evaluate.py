"""Held-out measures: loss, bits a byte, in all and by domain, MaxVio of the set, MTP acceptance."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from dsv3_jax.data.batches import Batch, model_inputs
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.mesh import processes
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops import balance
from dsv3_jax.training.loss import Scores, score_tokens

MOST_DOMAINS = 32  # whose load is counted apart


@partial(jax.jit, static_argnames=("graphdef", "num_domains"))
def _scores(
    graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, Array], num_domains: int = 0
) -> Scores:
    return score_tokens(nnx.merge(graphdef, state), batch, num_domains)


def evaluate(
    model: Transformer,
    batches: Sequence[Batch],
    tokenizer: Tokenizer,
    domains: Sequence[str] = (),
    mesh: Mesh | None = None,
    mix: Mapping[str, float] | None = None,
) -> dict[str, object]:
    """Measure a model on held-out batches; on a mesh their rows are sharded over its devices.

    Held-out rows contain equal amounts of each domain; the training text does not. So MaxVio of all
    rows mixes uneven load with another mix of domains. `max_vio_training_mix` weights each domain's
    load by its share of the training tokens, and `max_vio_by_domain` is that of each domain alone.

    Args: mix: bytes of the training text by domain, see `Source.training_bytes`. None means
        unknown.
    Returns: val_loss (nats a token), val_bits_per_byte, mtp_acceptance (list, a share a depth),
        load ([L, E] float array: the trunk's sparse layers, then the heads with experts), and
        bits_per_byte_by_domain where `domains` names them. MaxVio, each the mean over layers:
        max_vio_global of all rows, max_vio_by_domain and max_vio_training_mix of the trunk's sparse
        layers, and max_vio_mtp of the heads. Bits a byte divide by the bytes of the target tokens;
        special tokens have none, but their cost counts.
    Raises: ValueError without batches.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.data.batches import one_row
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract(cfg))  # all 0
        >>> result = evaluate(model, [one_row(b"x = 1")], ds.tokenizer.load("bytes"))
        >>> round(result["val_bits_per_byte"], 2)  # even odds over 260 tokens: log2 260
        8.02
    """
    if not batches:
        raise ValueError("batches=[] holds no held-out rows to measure")
    graphdef, state = nnx.split(model)
    layers = model.cfg.num_sparse_layers
    apart = 1 < len(domains) <= MOST_DOMAINS and layers > 0  # whether load is counted by domain

    # All measures are ratios of sums over the batches, in float64 on the host.
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        inputs = model_inputs(batch)
        if apart:
            inputs |= {"domains": batch["domains"]}
        placed = processes.put(inputs, mesh, len(batch["tokens"]))
        scores = _scores(graphdef, state, placed, len(domains) if apart else 0)
        found = processes.fetch(scores, mesh)

        # A target is the next token: its bytes and its domain are that token's.
        nats_BT = np.where(found.mask, found.nll, 0).astype(np.float64)
        bytes_BT = np.where(found.mask, tokenizer.byte_lengths[batch["tokens"][:, 1:]], 0)
        domain_BT = batch["domains"][:, 1:]
        by_domain = [
            [x_BT[domain_BT == i].sum() for i in range(len(domains))]
            for x_BT in (nats_BT, bytes_BT)
        ]

        # The sums over batches: nats, bytes and tokens; drafts; assignments.
        new = {
            "all": np.array([nats_BT.sum(), bytes_BT.sum(), found.mask.sum()]),
            "by_domain": np.array(by_domain),
            "drafts": np.array([found.agree, found.drafted], np.float64),
            "load": found.load.astype(np.float64),
            "domain_load": found.domain_load.astype(np.float64),
        }
        sums = {name: x + sums.get(name, 0) for name, x in new.items()}

    # Of all rows.
    nats, size, tokens = sums["all"]
    load = sums["load"]
    result: dict[str, object] = {
        "val_loss": float(nats / max(tokens, 1)),
        "val_bits_per_byte": float(nats / np.log(2) / max(size, 1)),
        "mtp_acceptance": (sums["drafts"][0] / np.maximum(sums["drafts"][1], 1)).tolist(),
        "load": load,
    }
    if layers:
        result["max_vio_global"] = _max_vio(load[:layers])
    if len(load) > layers:
        result["max_vio_mtp"] = _max_vio(load[layers:])

    # By domain, and mixed as the training text is.
    domain_nats, domain_bytes = sums["by_domain"]
    if apart:
        by_name = dict(zip(domains, sums["domain_load"], strict=True))
        result["max_vio_by_domain"] = {
            name: _max_vio(load) for name, load in by_name.items() if load.any()
        }
        if mix is not None and all(load.any() for load in by_name.values()):
            tokens_a_byte = sums["domain_load"][:, 0].sum(-1) / np.maximum(domain_bytes, 1)
            training_bytes = [mix[name] for name in domains]
            result["max_vio_training_mix"] = training_mix(
                sums["domain_load"], tokens_a_byte, training_bytes
            )

    # Bits a byte of each domain that has bytes among the targets.
    if domains:
        bits = zip(domains, domain_nats / np.log(2), domain_bytes, strict=True)
        result["bits_per_byte_by_domain"] = {name: float(n / s) for name, n, s in bits if s}
    return result


def training_mix(load: np.ndarray, tokens_a_byte: np.ndarray, mix: Sequence[float]) -> float | None:
    """MaxVio, mean over layers, of domains mixed as in training; None if a domain has no load.

    Args:
        load: [N, L, E], of what was read of each domain.
        tokens_a_byte: [N], as it was read: the bytes of training become tokens by it. Any unit that
            all domains share.
        mix: [N] bytes of the training text.

    Example:
        >>> load = np.array([[[3.0, 1.0]], [[0.0, 4.0]]])  # two domains, one layer
        >>> training_mix(load, np.ones(2), [2.0, 1.0])  # 1.5 to 1.5
        0.0
    """
    sums = load[:, 0].sum(-1)
    if not sums.all():
        return None
    weights = np.asarray(mix) * tokens_a_byte / sums
    return _max_vio((weights[:, None, None] * load).sum(0))


def _max_vio(load: np.ndarray) -> float:
    """Mean over layers."""
    return float(balance.max_vio(jnp.asarray(load, jnp.float32)).mean())
