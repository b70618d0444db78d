"""`dsv3 generate RUN`: continue a prompt with a run's last checkpoint."""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dsv3_jax.cli.common import make_mesh, parse, prepare_process
from dsv3_jax.config import CacheDtype, CacheKind


@dataclass
class Generate:
    """Continue a prompt, and print the text as it comes. Everything else is printed on stderr."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """a run's folder, a released folder, or a hub id that is in the local cache"""
    prompt: str = "def "
    """text to continue"""
    max_new_tokens: int = 256
    """number of new tokens, at most"""
    temperature: float = 0.8
    """temperature of the sampling; 0 takes the most likely token each time"""
    top_k: int | None = None
    """sample among so many of the most likely tokens; None means all"""
    top_p: float | None = 0.95
    """sample among the most likely tokens whose probabilities reach this sum; None means all"""
    cache: CacheKind | None = None
    """what is cached of each token: latent rows, expanded keys and values, or none; without it, the model's smallest"""
    cache_dtype: CacheDtype | None = None
    """dtype of cached rows; None means the compute dtype"""
    draft: str | None = None
    """who drafts: mtp (the model's own heads), or the folder of a run with the same tokenizer; None means nobody"""
    draft_length: int = 1
    """number of tokens drafted a step; it does not change the distribution of the text"""
    seed: int = 0
    """seed of the sampling"""
    mesh: str | None = None
    """devices to shard the model over, as data=N,expert=N,tensor=N; None means one device. The text is the same"""
    kernels: str | None = None
    """kernels to compute with: auto, xla, or a name from `dsv3 info PRESET --kernels`; None means the run's own"""


def run(argv: list[str]) -> int:
    """Print the prompt and its continuation."""
    args = parse(Generate, argv, "generate")
    prepare_process()
    from dsv3_jax.data import tokenizer
    from dsv3_jax.decoding.decode_config import DecodeConfig
    from dsv3_jax.decoding.generate import Sampling, generate_in_parts
    from dsv3_jax.hf.open_model import open_draft, open_model
    from dsv3_jax.report.progress import LiveText

    mesh = make_mesh(args.mesh)
    model, run, _ = open_model(args.run, mesh, kernels=args.kernels)
    text = tokenizer.load(run.data.tokenizer)
    draft: Any = args.draft
    if draft not in (None, "mtp"):
        draft = open_draft(draft, run, mesh, kernels=args.kernels)
    config = DecodeConfig(
        args.max_new_tokens,
        Sampling(args.temperature, args.top_k, args.top_p),
        cache=args.cache,
        cache_dtype=args.cache_dtype,
        draft=draft,
        draft_length=args.draft_length,
        stop_tokens=(text.eos_id,),
        seed=args.seed,
    )
    parts = generate_in_parts(model, [text.encode(args.prompt)], config)
    first = next(parts)  # bad requests end here, before anything is printed
    print(model.kernels.describe(model.compute_dtype, 1 if mesh is None else mesh.size), file=sys.stderr, flush=True)
    pieces, seen = text.stream(), 0
    with LiveText(args.prompt) as live:
        for result in itertools.chain([first], parts):
            live.append(pieces.push(result.tokens[0][seen:]))
            live.show_speed(result.acceptance, result.mean_accepted, result.tokens_per_s, result.steps)
            seen = len(result.tokens[0])
        live.append(pieces.finish())
    return 0
