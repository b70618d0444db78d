"""Our side of the decoding benchmark: a worker that reads random prompts and then decodes.

The package may be another commit's (`decode.py commits`), so this file takes what all of them have,
and imports its neighbour by a bare name.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
from process import draw_tokens, peak_rss, serve


def random_model(cfg, seed: int):
    """Return a model with random weights, drawn one by one.

    The initialiser would add its temporary memory to the measured peak.
    """
    import jax.numpy as jnp
    from flax import nnx

    from dsv3_jax.model.moe import RouterBias
    from dsv3_jax.model.transformer import abstract

    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(abstract(cfg))
    filled = {}
    for path, variable in nnx.to_flat_state(state):
        if not variable.get_metadata().get("decay", True):  # a norm's scale
            value = np.ones(variable.shape, np.float32)
        elif isinstance(variable, RouterBias):
            value = np.zeros(variable.shape, np.float32)
        else:
            value = rng.standard_normal(variable.shape, np.float32)
            value *= cfg.init_std
        filled[path] = variable.replace(jnp.asarray(value))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@contextlib.contextmanager
def filled_caches() -> Iterator[None]:
    """Fill caches with random rows where a model would read prompts."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.model.cache import Cache
    from dsv3_jax.model.transformer import Transformer

    def filled(cache, lengths):
        leaves, treedef = jax.tree.flatten(cache)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        drawn = [
            jax.random.normal(key, x.shape).astype(x.dtype) if x.ndim > 1 else x
            for key, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, drawn).at_lengths(lengths)

    def prefill(model, tokens, lengths, cache, weights=None, given=None):
        x = model.embedding(tokens)
        chosen = (model.cfg.num_sparse_layers, *tokens.shape, model.cfg.experts_per_token)
        return x, filled(cache, lengths), jnp.zeros(chosen, jnp.int32)

    def prefill_of_cache(cache, model, tokens, lengths):
        return model.embedding(tokens), filled(cache, lengths)

    # Commits before 0620e6a have it in the cache, later ones in the model, the newest beside it.
    if hasattr(Cache, "prefill"):
        patched = mock.patch.object(Cache, "prefill", prefill_of_cache)
    elif hasattr(Transformer, "prefill"):
        patched = mock.patch.object(Transformer, "prefill", prefill)
    else:
        patched = mock.patch("dsv3_jax.decoding.programs.prefill", prefill)
    with patched:
        yield


def prepare(config: dict) -> tuple[dict, Callable[..., dict]]:
    """Make the model. Args: config: a ModelConfig's fields; those left out have their defaults."""
    from dsv3_jax.kernels.cpu.memory import keep_memory

    keep_memory()
    import jax

    from dsv3_jax.config import ModelConfig, from_dict
    from dsv3_jax.decoding.generate import generate

    model, ran = random_model(from_dict(ModelConfig, config), seed=0), set()

    def handle(batch: int, context: int, new_tokens: int, filled: bool = False, **settings) -> dict:
        """Time a request; one of new shapes runs once before, to compile.

        Args:
            filled: no prompt is read, as a step's time does not depend on the cache's rows.
            settings: of `generate`.
        """
        prompts = draw_tokens(batch, context, model.cfg.vocab_size).tolist()
        request = (batch, context, new_tokens, filled, *settings.items())
        with filled_caches() if filled else contextlib.nullcontext():
            if request not in ran:
                generate(model, prompts, new_tokens, **settings)
                ran.add(request)
            output = generate(model, prompts, new_tokens, **settings)
        return {
            "prefill_seconds": output.prefill_seconds,
            "step_seconds": output.decode_seconds / output.steps,
            "cache_bytes": output.cache_bytes,
            "cache_bytes_per_token": output.cache_bytes_per_token,
            "peak_rss_bytes": peak_rss(),
        }

    return {"jax": jax.__version__}, handle


if __name__ == "__main__":
    sys.exit(serve(prepare))
