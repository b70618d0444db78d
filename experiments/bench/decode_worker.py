"""Our side of the decoding benchmark: a worker that answers one JSON object per line.

The object is {"batch", "context", "new_tokens", "cache", "cache_dtype", "draft", "draft_length"}.
The first three are required; the others are options of `generate`. Cells with new shapes run once
before they are timed, to compile. With "filled", no prompt is read: the cache is filled with random
rows, as a step's time does not depend on them.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from unittest import mock

import numpy as np
from peer_transformers import draw_tokens
from process import Worker, limit_memory, peak_rss, serve


class DecodeWorker(Worker):
    """A worker that decodes with dsv3-jax. It has the interface of `PeerDecodeWorker`.

    Args:
        cfg: ModelConfig for random weights; None means `run`.
        run: a run folder of `dsv3 train`; its checkpoint decodes its held-out text.
        draft_run: another run folder; its model drafts for cells with draft "run".
        tree: the work tree of another commit, whose package runs in place of this tree's.
    """

    def __init__(self, cfg=None, *, run=None, draft_run=None, seed=0, tree: Path | None = None):
        tree = tree or Path(__file__).parents[2]
        command = [sys.executable, __file__, f"--seed={seed}"]
        command += (
            ["--config", json.dumps(_changed(cfg))] if cfg is not None else ["--run", str(run)]
        )
        command += ["--draft-run", str(draft_run)] if draft_run is not None else []
        super().__init__("dsv3-jax", command, env={"PYTHONPATH": str(tree)})

    def decode(self, batch: int, context: int, new_tokens: int, **settings) -> dict:
        """Measure the seconds of a prefill and of a step, the cache's bytes, and peak memory."""
        return self.ask(
            json.dumps({"batch": batch, "context": context, "new_tokens": new_tokens} | settings)
        )


def _changed(cfg) -> dict:
    """The fields that differ from their defaults: commits from before a new field read them."""
    from dsv3_jax.config import to_dict

    values = to_dict(cfg)
    return {
        field.name: values[field.name]
        for field in fields(cfg)
        if getattr(cfg, field.name) != field.default
    }


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

    from dsv3_jax.decoding import programs
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

    def prefill(model, tokens, lengths, cache, weights=None):
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
        patched = mock.patch.object(programs, "prefill", prefill)
    with patched:
        yield


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="a ModelConfig as JSON, for random weights")
    parser.add_argument("--run", help="a run folder of `dsv3 train`, instead of random weights")
    parser.add_argument(
        "--draft-run", help='another run folder; its model drafts for cells with draft "run"'
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.config is None) == (args.run is None):
        parser.error("give either --config or --run")
    return serve(lambda: _decoder(args))


def _decoder(args) -> tuple[dict, Callable[[str], dict]]:
    limit_memory()
    from dsv3_jax.kernels.cpu.memory import keep_memory

    keep_memory()
    import jax
    from flax import nnx
    from prompts import held_out_prompts

    from dsv3_jax.config import ModelConfig, from_dict
    from dsv3_jax.decoding.generate import generate

    run, drafts = None, {}
    if args.run:
        from dsv3_jax.data import tokenizer
        from dsv3_jax.runs.checkpoint import load_run
        from dsv3_jax.runs.open_model import open_draft

        model, run, _ = load_run(args.run)
        if args.draft_run:
            drafts["run"] = open_draft(args.draft_run, tokenizer.load(run.data.tokenizer))
    else:
        model = random_model(from_dict(ModelConfig, json.loads(args.config)), args.seed)
    ran: set[str] = set()

    def handle(line: str) -> dict:
        cell = json.loads(line)
        settings = {
            key: cell[key]
            for key in ("cache", "cache_dtype", "draft_length")
            if cell.get(key) is not None
        }
        draft = cell.get("draft")
        settings["draft"] = drafts.get(draft, draft)
        if run is not None:
            prompts = held_out_prompts(run.data, cell["batch"], cell["context"])
        else:
            vocab = model.cfg.vocab_size
            prompts = draw_tokens(args.seed, cell["batch"], cell["context"], vocab).tolist()
        with filled_caches() if cell.get("filled") else contextlib.nullcontext():
            if line not in ran:
                generate(model, prompts, cell["new_tokens"], **settings)
                ran.add(line)
            output = generate(model, prompts, cell["new_tokens"], **settings)
        return {
            "prefill_seconds": output.prefill_seconds,
            "decode_seconds": output.decode_seconds,
            "step_seconds": output.decode_seconds / output.steps,
            "steps": output.steps,
            "tokens_per_s": output.tokens_per_s,
            "acceptance": output.acceptance,
            "tokens_per_step": output.mean_accepted,
            "cache_bytes": output.cache_bytes,
            "cache_bytes_per_token": output.cache_bytes_per_token,
            "peak_rss_bytes": peak_rss(),
        }

    info = {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "jax": jax.__version__,
        "device": str(jax.devices()[0].device_kind),
    }
    return info, handle


if __name__ == "__main__":
    sys.exit(main())
