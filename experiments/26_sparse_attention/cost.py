"""Milliseconds and bytes of a decoded token by context: dense MLA against sparse, in turns.

python experiments/26_sparse_attention/cost.py              # two idle minutes; writes cost.json
python experiments/26_sparse_attention/cost.py 1024 2048    # only these; the file keeps the others

One layer with 16 heads of V3's widths and 8 index heads reads a float32 cache of random rows. It
has no head.
"""

import json
import os
import platform
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository

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

CONTEXTS = tuple(1024 * 2**i for i in range(7))
ROUNDS, STEPS = 5, 5
DENSE = replace(
    preset("v3"), vocab_size=260, dim=512, num_layers=1, num_dense_layers=1, dense_dim=512,
    num_heads=16, q_latent_dim=384, mtp_depth=0, max_positions=2 * CONTEXTS[-1],
)  # fmt: skip
KINDS = {"dense": DENSE, "sparse": replace(DENSE, attention="dsa", index_heads=8)}


def decoder(cfg, context):
    """A function without arguments: mean ms of STEPS decoded tokens after `context` cached ones."""
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
        return 1e3 * (time.perf_counter() - start) / steps

    timed(2)  # compiles, and again for a donated cache
    return timed


def bytes_read(cfg, context):
    """Bytes of the cache that a new token's attention needs: index keys of all, and k rows."""
    widths = {
        name: width
        for name, (_, width) in ATTENTION[cfg.attention].cache_rows(cfg, "latent").items()
    }
    index, slots = widths.pop("index_key", 0), context + 1
    k = min(cfg.index_topk, slots) if index else slots
    return 4 * (slots * (index if k < slots else 0) + k * sum(widths.values()))


def main():
    path, asked = Path(__file__).parent / "cost.json", [int(word) for word in sys.argv[1:]]
    found = json.loads(path.read_text())["contexts"] if asked else {}
    for context in asked or CONTEXTS:
        decoders = {kind: decoder(cfg, context) for kind, cfg in KINDS.items()}
        times = {kind: [] for kind in KINDS}
        for _ in range(ROUNDS):
            for kind, timed in decoders.items():
                times[kind].append(round(timed(), 3))
        found[str(context)] = {
            "ms": times,
            "bytes": {kind: bytes_read(cfg, context) for kind, cfg in KINDS.items()},
        }
        print(context, found[str(context)], flush=True)
    weights = sum(
        x.nbytes for x in jax.tree.leaves(prepare_decode(Transformer(DENSE, rngs=nnx.Rngs(0))))
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = (
        f"{cores} × {platform.machine()}, Python {platform.python_version()}, JAX {version('jax')}"
    )
    what = (
        f"One layer of 16 heads, 8 index heads, k {KINDS['sparse'].index_topk:,}, "
        "a float32 cache, batch 1. "
        f"A step also reads the layer's weights, {weights / 2**20:.0f} MiB of float32."
    )
    about = {"what": what, "machine": machine, "rounds": ROUNDS, "contexts": found}
    write_atomic(path, (json.dumps(about, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
