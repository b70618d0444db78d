"""Milliseconds and bytes of a decoded token by context: dense MLA against sparse, in turns.

python -m experiments.26_sparse_attention.cost      # two idle minutes; writes cost.json

One layer with 16 heads of V3's widths and 8 index heads reads a float32 cache of random rows. It
has no head.
"""

import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import replace
from dsv3_jax.host.files import write_atomic
from dsv3_jax.model.blocks import ATTENTION
from dsv3_jax.model.cache import Cache
from dsv3_jax.model.decode import make_cache, prepare_decode, run_layers
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.presets import preset
from experiments.lab.running import machine

CONTEXTS = tuple(1024 * 2**i for i in range(7))
ROUNDS, STEPS = 5, 5
DENSE = replace(
    preset("v3"), vocab_size=260, dim=512, num_layers=1, num_dense_layers=1, dense_dim=512,
    num_heads=16, q_latent_dim=384, mtp_depth=0, max_positions=2 * CONTEXTS[-1],
)  # fmt: skip
KINDS = {"dense": DENSE, "sparse": replace(DENSE, attention="dsa", index_heads=8)}


def decoder(cfg, context):
    """Return a function: mean ms of some decoded tokens after `context` cached ones."""
    model, rng = Transformer(cfg, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    graphdef, state = nnx.split(model)
    empty = make_cache(model, 1, context + 1, "latent", jnp.float32)
    parts = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), empty.parts
    )
    caches, weights = [Cache(parts, jnp.array([context], jnp.int32))], prepare_decode(model)

    @partial(jax.jit, donate_argnums=2)
    def step(state, weights, cache, token):
        x, cache, _ = run_layers(nnx.merge(graphdef, state), token, cache, weights)
        return x, cache

    def timed(steps=STEPS):
        token, start = jnp.ones((1, 1), jnp.int32), time.perf_counter()
        for _ in range(steps):
            x, cache = step(state, weights, caches.pop(), token)
            caches.append(cache)
        x.block_until_ready()
        return round(1e3 * (time.perf_counter() - start) / steps, 3)

    timed(2)  # compiles, and again for a donated cache
    return timed


def bytes_read(cfg, context):
    """Return bytes of the cache that a new token needs: index keys of all, and k rows."""
    rows = ATTENTION[cfg.attention].cache_rows(cfg, "latent")
    widths = {name: width for name, (_, width) in rows.items()}
    index, slots = widths.pop("index_key", 0), context + 1
    k = min(cfg.index_topk, slots) if index else slots
    return 4 * (slots * (index if k < slots else 0) + k * sum(widths.values()))


def measured(context):
    decoders = {kind: decoder(cfg, context) for kind, cfg in KINDS.items()}
    rounds = [{kind: timed() for kind, timed in decoders.items()} for _ in range(ROUNDS)]
    return {
        "ms": {kind: [times[kind] for times in rounds] for kind in KINDS},
        "bytes": {kind: bytes_read(cfg, context) for kind, cfg in KINDS.items()},
    }


def main():
    weights = jax.tree.leaves(prepare_decode(Transformer(DENSE, rngs=nnx.Rngs(0))))
    mib = sum(x.nbytes for x in weights) / 2**20
    found = {
        "what": (
            f"One layer of 16 heads, 8 index heads, k {DENSE.index_topk:,}, a float32 cache, "
            f"batch 1. A step also reads the layer's weights, {mib:.0f} MiB of float32."
        ),
        "machine": machine(),
        "rounds": ROUNDS,
        "contexts": {str(context): measured(context) for context in CONTEXTS},
    }
    text = json.dumps(found, indent=1) + "\n"
    write_atomic(Path(__file__).parent / "cost.json", text.encode())


if __name__ == "__main__":
    main()
