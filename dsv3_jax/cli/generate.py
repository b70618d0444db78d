"""`dsv3 generate MODEL`: continue a prompt with a run's last checkpoint or a released folder."""

import codecs
import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsv3_jax.cli.common import mesh_of_option, parse
from dsv3_jax.config import CacheDtype, CacheKind
from dsv3_jax.host.mirror import fetched, with_urls

TEMPERATURE, TOP_P = 0.8, 0.95  # where the folder's generation_config.json says nothing


@dataclass
class Decode:
    """Options of the commands that generate text."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """a run, a released folder, or a hub id that is in the local cache"""
    step: int | None = None
    """step of a run's checkpoint; None means the last"""
    temperature: float | None = None
    """0 takes the most likely token; None means the folder's generation_config.json, else 0.8"""
    top_k: int | None = None
    """sample among so many of the likeliest tokens; None means generation_config.json, else all"""
    top_p: float | None = None
    """sample the likeliest up to this probability; None means generation_config.json, else 0.95"""
    cache: CacheKind | None = None
    """what is cached of each token; None means the least"""
    cache_dtype: CacheDtype | None = None
    """dtype of cached rows; None means the compute dtype"""
    draft: str | None = None
    """who drafts: mtp (its own heads), lookup (the text so far), or the folder of another model"""
    draft_length: int = 1
    """tokens drafted a step; the distribution stays"""
    seed: int = 0
    """seed of the sampling"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of a released model in memory; None means float32 on a CPU, else bfloat16"""
    mesh: str | None = None
    """devices to shard over, as data=N,expert=N,tensor=N"""
    kernels: str | None = None
    """kernels to compute with: see `dsv3 info PRESET --kernels`; None means the run's own"""


@dataclass
class Generate(Decode):
    """Continue a prompt and print the text, or many prompts into a file.

    All else is printed on stderr. A text is encoded without a chat template: see `dsv3 chat`.
    """

    prompt: str | None = None
    """text to continue; None means "def " """
    prompts: Path | None = None
    """a JSONL file; a line has a text "prompt", or "messages" for the chat template"""
    out: Path | None = None
    """with --prompts, the JSONL file to write or resume"""
    samples: int = 1
    """with --prompts, texts of each prompt"""
    batch_size: int = 32
    """with --prompts, texts at once"""
    raw: bool = False
    """add no BOS to the prompt"""
    max_new_tokens: int = 256
    """number of new tokens, at most"""


def run(argv: list[str]) -> int:
    """Print the prompt and its continuation."""
    args = parse(Generate, argv, "generate")
    if args.prompts is not None or args.out is not None:
        return write_texts(args)
    for name in ("samples", "batch_size"):
        if (value := getattr(args, name)) != getattr(Generate, name):
            raise ValueError(f"{name}={value} is for --prompts FILE.jsonl --out OUT.jsonl")
    from dsv3_jax.decoding.generate import generate_in_parts
    from dsv3_jax.report.progress import say
    from dsv3_jax.runs.open_model import load_text

    text = load_text(args.model)
    model, draft = load_with_draft(args, text)
    config = decode_config(args, text, draft, args.max_new_tokens)
    prompt = "def " if args.prompt is None else args.prompt
    parts = generate_in_parts(model, [text.encode(prompt, raw=args.raw)], config)
    first = next(parts)  # bad requests end here, before anything is printed
    show_kernels(model)
    say(prompt)
    print_parts(itertools.chain([first], parts), text, [])
    return 0


# What sampled texts depend on, beside the model and the prompts. Batches, meshes and kernels may
# differ after a stop.
PINNED = (
    "raw", "draft", "draft_length", "dtype", "cache", "cache_dtype", "seed", "samples",
    "max_new_tokens",
)  # fmt: skip


def write_texts(args: Generate) -> int:
    """Write the texts of a file of prompts."""
    from dsv3_jax.cli.sample import read_prompts, write_samples
    from dsv3_jax.data.corpus import fingerprint_of
    from dsv3_jax.hf.tensor_files import CONFIG
    from dsv3_jax.host.files import check_writable, file_hash
    from dsv3_jax.runs.folder import RUN_FILE
    from dsv3_jax.runs.open_model import find_released, load_text

    if args.prompts is None or args.out is None or args.prompt is not None:
        raise ValueError(
            "prompts and out go together, without prompt: --prompts prompts.jsonl --out "
            "samples.jsonl"
        )
    if os.path.lexists(args.out):
        raise ValueError(f"out={str(args.out)!r} exists; delete it, or name another file")
    check_writable(args.out)

    # All that may be refused comes before the first text.
    text = load_text(args.model)
    read = list(read_prompts(args.prompts, text, raw=args.raw))
    records = [record for record, _ in read]
    prompts = [ids for _, ids in read]
    model, draft = load_with_draft(args, text)
    config = decode_config(args, text, draft, args.max_new_tokens)
    config = replace(config, samples=args.samples, batch_size=args.batch_size, logprobs=True)
    config.check(model.cfg, prompts)

    # What the texts depend on: the options, the prompts, the model, and how it reads text.
    is_run = (args.model / RUN_FILE).is_file()
    place, file = (args.model, RUN_FILE) if is_run else (find_released(args.model), CONFIG)
    settings = {name: getattr(args, name) for name in PINNED} | {
        "sampling": list(config.sampling),
        "step": args.step,
        "model": with_urls(str(place.resolve())),
        file: file_hash(place / file),
        "prompts": file_hash(args.prompts),
        "tokenizer": text.tokenizer.fingerprint,
        "stop_ids": list(text.stop_ids),
        "add_bos": text.add_bos,
    }

    # Messages are read by a chat template, which may be a file of its own.
    if not all(isinstance(record.get("prompt"), str) for record in records):
        settings["template"] = fingerprint_of([text.chat.source.encode()])

    # Released weights by size and time, since a hash of them would take minutes.
    weights = [] if is_run else [one.stat() for one in place.glob("*.safetensors")]
    settings["weights"] = [
        sum(x.st_size for x in weights),
        max((x.st_mtime for x in weights), default=0),
    ]

    show_kernels(model)
    write_samples(model, text, records, prompts, config, args.out, settings)
    return 0


def print_parts(parts: Iterable[Any], text: Any, tokens: list[int]) -> None:
    """Print the text of a request as it comes, then its speed and accepted drafts on stderr.

    The speed is that after the first part, which compiles the program; a text of one part has none.

    Args: parts: of `generate_in_parts`, with one prompt; text: its `TextSettings`; tokens: new
        tokens are added to it.
    """
    from dsv3_jax.report.progress import say

    characters = codecs.getincrementaldecoder("utf-8")("replace")
    result = None
    times: list[tuple[int, float]] = []
    try:
        for result in parts:
            new = result.tokens[0][len(tokens) :]
            tokens += new
            times.append((len(tokens), result.decode_seconds))
            shown = text.tokenizer.bytes_of(token for token in new if token not in text.stop_ids)
            say(characters.decode(shown))  # a character of several bytes, once it is complete
    finally:
        say(characters.decode(b"", final=True) + "\n")

    # The speed is for people, drafts for everyone who asked for some.
    if result is not None and (result.acceptance or sys.stdout.isatty()):
        said = []
        if result.acceptance:
            shares = " ".join(f"{share:.0%}" for share in result.acceptance)
            said = [f"drafts accepted: {shares}; {result.mean_accepted:.2f} tokens a step"]

        first, start = times[min(1, len(times) - 1)]
        last, end = times[-1]
        if last > first:
            said.append(f"{(last - first) / (end - start):,.0f} tokens/s")
        if said:
            print(", ".join(said), file=sys.stderr)


def load_with_draft(args: Decode, text: Any) -> tuple[Any, Any]:
    """Load the model and its draft, on the mesh that is asked for.

    A run's `args.step` becomes the one that is loaded.

    Args: text: the model's `TextSettings`.
    Returns: (model; None, "mtp", "lookup" or a model that drafts).
    Raises: ValueError as `load_model`, for the dtype of a run, or if the draft's tokenizer gives
        ids another meaning.
    """
    from dsv3_jax.decoding.decode_config import OWN_DRAFTS
    from dsv3_jax.runs.checkpoint import load_run
    from dsv3_jax.runs.folder import RUN_FILE
    from dsv3_jax.runs.open_model import load_model, open_draft

    mesh = mesh_of_option(args.mesh)
    args.model = fetched(args.model)
    other = None if args.draft in (None, *OWN_DRAFTS) else args.draft
    if (args.model / RUN_FILE).is_file():
        if args.dtype is not None and other is None:  # it may be that of a folder that drafts
            raise ValueError(
                f"dtype={args.dtype!r} is for released models, and {args.model} is a run, which "
                "computes in its own; leave it out"
            )
        model, _, args.step = load_run(args.model, mesh, step=args.step, kernels=args.kernels)
    else:
        model = load_model(
            args.model,
            mesh,
            step=args.step,
            dtype=args.dtype,
            kernels=args.kernels,
            mtp=args.draft == "mtp",
        )

    # "mtp" and "lookup" draft from the model and its text; anything else is a folder.
    if other is None:
        return model, args.draft
    drafter = open_draft(other, text.tokenizer, mesh, kernels=args.kernels, dtype=args.dtype)
    return model, drafter


def decode_config(args: Decode, text: Any, draft: Any, max_new_tokens: int) -> Any:
    """Make the `DecodeConfig` of the options, with generation_config.json for what is left out."""
    from dsv3_jax.decoding.decode_config import DecodeConfig
    from dsv3_jax.decoding.generate import Sampling

    if draft is None and args.draft_length > 1:
        raise ValueError(f"draft_length={args.draft_length} is for --draft mtp, lookup or a folder")
    if args.cache == "none" and args.cache_dtype is not None:
        raise ValueError(f"cache_dtype={args.cache_dtype!r} is for a cache, not for --cache none")

    # An option comes before the folder's file, and that before the defaults here.
    usual = text.sampling or {"temperature": TEMPERATURE, "top_p": TOP_P}
    given = {
        name: getattr(args, name) for name in Sampling._fields if getattr(args, name) is not None
    }
    return DecodeConfig(
        max_new_tokens,
        Sampling(1.0)._replace(**usual | given),
        cache=args.cache,
        cache_dtype=args.cache_dtype,
        draft=draft,
        draft_length=args.draft_length,
        stop_tokens=text.stop_ids,
        seed=args.seed,
    )


def show_kernels(model: Any) -> None:
    """Print which kernels compute, on stderr."""
    from flax import nnx

    from dsv3_jax.mesh import sharding

    mesh = sharding.mesh_of(nnx.state(model))
    line = model.kernels.describe(model.compute_dtype, 1 if mesh is None else mesh.size)
    print(line, file=sys.stderr, flush=True)
