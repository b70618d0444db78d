"""Our side of the decoding benchmark, as a worker process: it holds a model and answers one JSON object a line.

{"batch", "context", "new_tokens", "cache", "cache_dtype", "draft", "draft_length"}; all but the first three are
`generate`'s, and may be left out. A cell whose shapes are new is run once before it is timed, for it compiles.
"""

import argparse
import json
import sys
from collections.abc import Callable

import numpy as np
from peer_transformers import draw_tokens
from process import Worker, limit_memory, peak_rss, serve


class OursDecode(Worker):
    """A worker that decodes; the same interface as `PeerDecode`.

    Args:
        cfg: ModelConfig of random weights, or None.
        run: a folder that `dsv3 train` made; its checkpoint decodes its held-out text.
        draft_run: another, whose model drafts where a cell asks for draft "run".
    """

    def __init__(self, cfg=None, *, run=None, draft_run=None, seed=0):
        from dsv3_jax.config import to_dict

        command = [sys.executable, __file__, f"--seed={seed}"]
        command += ["--config", json.dumps(to_dict(cfg))] if cfg is not None else ["--run", str(run)]
        command += ["--draft-run", str(draft_run)] if draft_run is not None else []
        super().__init__("dsv3-jax", command)

    def decode(self, batch: int, context: int, new_tokens: int, **settings) -> dict:
        """Seconds of a prefill and of a step after it, bytes of the cache, peak memory of the process so far."""
        return self.ask(json.dumps({"batch": batch, "context": context, "new_tokens": new_tokens} | settings))


def random_model(cfg, seed: int):
    """A model of random weights, made one by one: the initialiser would leave its own temporary memory in the peak."""
    import jax.numpy as jnp
    from flax import nnx

    from dsv3_jax.model.layers import NormScale
    from dsv3_jax.model.moe import RouterBias
    from dsv3_jax.model.transformer import abstract

    rng = np.random.default_rng(seed)
    graphdef, state = nnx.split(abstract(cfg))
    filled = {}
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, NormScale | RouterBias):
            value = np.full(variable.shape, isinstance(variable, NormScale), np.float32)
        else:
            value = rng.standard_normal(variable.shape, np.float32)
            value *= cfg.init_std
        filled[path] = variable.replace(jnp.asarray(value))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="a ModelConfig as JSON: random weights")
    parser.add_argument("--run", help="a folder that `dsv3 train` made, in place of random weights")
    parser.add_argument("--draft-run", help='another: its model drafts where a cell asks for draft "run"')
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

    from dsv3_jax.cli.bench import held_out_prompts
    from dsv3_jax.config import ModelConfig, from_dict
    from dsv3_jax.decoding.generate import generate
    from dsv3_jax.training.checkpoint import load_draft, load_model

    run = None
    if args.run:
        model, _, run, _ = load_model(args.run)
    else:
        model = random_model(from_dict(ModelConfig, json.loads(args.config)), args.seed)
    drafts = {"run": load_draft(args.draft_run, run) if args.draft_run and run else None}
    ran: set[str] = set()

    def obey(line: str) -> dict:
        cell = json.loads(line)
        settings = {key: cell[key] for key in ("cache", "cache_dtype", "draft_length") if cell.get(key) is not None}
        draft = cell.get("draft")
        settings["draft"] = drafts.get(draft, draft)
        if run is not None:
            prompts = held_out_prompts(run, cell["batch"], cell["context"])
        else:
            prompts = draw_tokens(args.seed, cell["batch"], cell["context"], model.cfg.vocab_size).tolist()
        if line not in ran:
            generate(model, prompts, cell["new_tokens"], **settings)
            ran.add(line)
        made = generate(model, prompts, cell["new_tokens"], **settings)
        return {
            "prefill_seconds": made.prefill_seconds,
            "decode_seconds": made.decode_seconds,
            "step_seconds": made.decode_seconds / made.steps,
            "steps": made.steps,
            "tokens_per_s": made.tokens_per_s,
            "acceptance": made.acceptance,
            "tokens_per_step": made.mean_accepted,
            "cache_bytes": made.cache_bytes,
            "cache_bytes_per_token": made.cache_bytes_per_token,
            "peak_rss_bytes": peak_rss(),
        }

    info = {
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "jax": jax.__version__,
        "device": str(jax.devices()[0].device_kind),
    }
    return info, obey


if __name__ == "__main__":
    sys.exit(main())
