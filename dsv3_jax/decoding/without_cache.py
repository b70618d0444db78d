"""Decoding without a cache: each step runs the model over all tokens so far. Slow and obvious, to compare with."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.decoding.decode_config import DecodeConfig, Generated
from dsv3_jax.mesh import sharding
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.ops.sampling import Sampling, keys_at, row_keys, sample


def decode_without_cache(
    model: Transformer, prompts: Sequence[Sequence[int]], config: DecodeConfig, part: int
) -> Iterator[Generated]:
    """Yield what `generate_in_parts` does."""
    start = first = time.perf_counter()
    graphdef, state = nnx.split(model.in_compute_dtype())
    lengths = np.array([len(p) for p in prompts], np.int32)
    keys, mesh = row_keys(config.seed, len(prompts))[:, 0], sharding.mesh_of(state)
    new: list[list[int]] = [[] for _ in prompts]
    # In steps of 32, so that requests of nearby lengths share one compilation. No token sees those after it.
    width = -(-max(int(lengths.max()) + config.max_new_tokens, config.pad_prompts_to) // 32) * 32
    tokens = np.zeros((len(prompts), min(width, model.cfg.max_positions)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    going, steps = list(range(len(prompts))), 0
    while going:
        written = np.array([len(row) for row in new], np.int32)
        with sharding.use_mesh(mesh):
            drawn = np.asarray(_next_tokens(graphdef, state, tokens, lengths, keys, written, sampling=config.sampling))
        for i in going:
            tokens[i, lengths[i]] = drawn[i]
            lengths[i] += 1
            new[i].append(int(drawn[i]))
        going = [i for i in going if len(new[i]) < config.max_new_tokens and new[i][-1] not in config.stop_tokens]
        now = time.perf_counter()
        first = first if steps else now
        if steps % part == 0 or not going:
            rows = [list(row) for row in new]
            yield Generated(rows, steps=steps, prefill_seconds=first - start, decode_seconds=now - first)
        steps += 1


@partial(jax.jit, static_argnames=("graphdef", "sampling"))
def _next_tokens(graphdef, state, tokens, lengths, keys, written, *, sampling: Sampling):
    """The token after the first `lengths` of each row, int32 [B]."""
    model = nnx.merge(graphdef, state)
    x, _ = model.run_layers(sharding.constrain(tokens, "batch", None), None)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    draw = keys_at(keys, written[:, None])[:, 0]
    return sample(model.logits(model.norm(last)), draw, **sampling._asdict())
