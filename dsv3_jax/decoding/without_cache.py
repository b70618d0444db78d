"""Decoding without a cache: each step runs the model over all tokens so far. Slow and obvious, to compare with."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.mesh import sharding
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import Sampling, sample


def decode_without_cache(
    model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig
) -> Iterator[list[list[int]]]:
    """Yield the new tokens of each prompt so far, after each step.

    Example:
        >>> import dsv3_jax as ds
        >>> from dsv3_jax.model.transformer import abstract
        >>> cfg = ds.replace(ds.preset("tiny"), num_layers=1, mtp_depth=0)
        >>> model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(cfg))  # all weights are 0
        >>> list(decode_without_cache(model, [[1, 2, 3], [4]], DecodeConfig(max_new_tokens=2)))[-1]
        [[0, 0], [0, 0]]
    """
    graphdef, state = nnx.split(model.in_compute_dtype())
    lengths = np.array([len(p) for p in prompts], np.int32)
    new: list[list[int]] = [[] for _ in prompts]
    # In steps of 32, so that requests of nearby lengths share one compilation. No token sees those after it.
    width = -(-max(int(lengths.max()) + config.max_new_tokens, config.pad_prompts_to) // 32) * 32
    tokens = np.zeros((len(prompts), min(width, model.cfg.max_positions)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    key, mesh = jax.random.key(config.seed), sharding.mesh_of(state)
    going = list(range(len(prompts)))
    while going:
        key, draw = jax.random.split(key)
        with sharding.use_mesh(mesh):
            drawn = np.asarray(_next_tokens(graphdef, state, tokens, lengths, draw, sampling=config.sampling))
        for i in going:
            tokens[i, lengths[i]] = drawn[i]
            lengths[i] += 1
            new[i].append(int(drawn[i]))
        going = [i for i in going if len(new[i]) < config.max_new_tokens and new[i][-1] not in config.stop_tokens]
        yield new


@partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _next_tokens(graphdef, state, tokens, lengths, key, *, sampling: Sampling):
    """The token after the first `lengths` of each row, int32 [B]."""
    model = nnx.merge(graphdef, state)
    x, _ = model.run_layers(sharding.constrain(tokens, "batch", None), None)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return sample(model.logits(model.norm(last)), key, **sampling._asdict())
