"""`dsv3 data tokenize PATHS --out FOLDER`: write shards of token ids; `dsv3 data check FOLDER`: compare hashes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dsv3_jax.cli.common import parse
from dsv3_jax.config import did_you_mean


@dataclass
class TokenizeArgs:
    """Write shards of token ids for --data.format shards; the same command resumes after an interruption."""

    paths: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATHS", help_behavior_hint="(required)")
    ]
    """files or folders: text, source trees, JSONL, Parquet; or hf:NAME[:CONFIG][@SPLIT], a dataset of Hugging Face"""
    out: Path
    """the folder to write"""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json"""
    format: Literal["text", "chat"] = "text"
    """text, every token of which is a target; or chat examples, of which the assistant's tokens are"""
    start: str | None = None
    """for chat: the run or released model whose tokenizer and template encode the examples"""
    chat_template: str | None = None
    """for chat: the file of a Jinja template, or plain; None means the template of --start"""
    row_tokens: int = 4096
    """tokens of a record; the sequence length of training must divide it"""
    val_fraction: float = 0.01
    """share of documents that are held out for validation, chosen by their hash"""
    text_column: str = "text"
    """key of JSONL and column of Parquet or a dataset that holds the text; for chat, the messages"""
    workers: int = os.cpu_count() or 1
    """number of processes that encode"""
    shard_mb: float = 64.0
    """megabytes of text of a shard; a process holds a few of them in memory"""


def tokenize(argv: list[str]) -> int:
    """Write the shards, with a line every few seconds.

    Raises: ValueError as `tokenize.tokenize`.
    """
    args = parse(TokenizeArgs, argv, "data tokenize")
    if not args.paths:
        raise ValueError("argument PATHS is missing: name files or folders of documents")
    from dsv3_jax.data import tokenize as data

    def say(done: data.Done) -> None:
        speed = done.tokens / max(done.seconds, 1e-9)
        print(
            f"{done.shards:,} shards, {done.documents:,} documents, {done.tokens:,} tokens, {speed:,.0f} tokens/s",
            flush=True,
        )

    make_encoder: Callable[[], data.Encoder] = partial(data.text_encoder, args.tokenizer)
    template, read = None, data.texts
    if args.format == "chat":
        from dsv3_jax.chat.examples import contents

        make_encoder = partial(_chat_encoder, args.tokenizer, args.start, args.chat_template)
        template, read = _chat_text(args.tokenizer, args.start, args.chat_template).chat.source, contents
    elif args.start is not None or args.chat_template is not None:
        raise ValueError(f"start={args.start!r} and chat_template={args.chat_template!r} are for format='chat'")
    job = data.Tokenize(
        args.paths, args.out, args.row_tokens, args.val_fraction, args.format, args.text_column,
        int(args.shard_mb * 1e6), args.workers, template,
    )  # fmt: skip
    manifest = data.tokenize(job, make_encoder, say, read)
    print(f"{args.out}: {', '.join(manifest.domains)}; train on it by --data.format shards --data.paths {args.out}")
    return 0


def _chat_text(tokenizer: str, start: str | None, template: str | None) -> Any:
    """How chats are read: by a model to start with, or by a tokenizer and a template."""
    from dsv3_jax.chat.text_settings import plain_settings, with_template
    from dsv3_jax.hf.open_model import load_text

    if start is None and template is None:
        raise ValueError("format='chat' needs a template; name a model by --start, or give --chat-template plain")
    return with_template(plain_settings(tokenizer) if start is None else load_text(start), template)


def _chat_encoder(*how: Any) -> Any:
    """The encoder of chats, made in each worker."""
    from dsv3_jax.chat.examples import chat_encoder

    return chat_encoder(_chat_text(*how))


@dataclass
class CheckArgs:
    """Compare every shard of a folder with the hashes in its manifest; the exit code is 2 after damage."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """a folder that `dsv3 data tokenize` wrote"""


def check(argv: list[str]) -> int:
    """Read every byte of the shards.

    Raises: ValueError for a folder without a manifest, or with a shard that is missing or damaged.
    """
    args = parse(CheckArgs, argv, "data check")
    from dsv3_jax.data.shards import check_files, read_manifest

    manifest = read_manifest(args.folder)
    damages = list(check_files(manifest, hashes=True))
    for damage in damages:
        print(damage)
    if damages:
        raise ValueError(f"shards={str(args.folder)!r} has {len(damages)} damaged shards; tokenize again")
    print(f"{args.folder}: {len(manifest.files):,} shards are whole")
    return 0


# Subcommand: its function of the arguments, and its line in the help text.
SUBCOMMANDS = {
    "tokenize": (tokenize, "PATHS --out FOLDER", "write shards of token ids"),
    "check": (check, "FOLDER", "compare every shard with its hash"),
}


def run(argv: list[str]) -> int:
    """Run the subcommand that the first argument names."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {f'{name} {arguments}':<28} {what}" for name, (_, arguments, what) in SUBCOMMANDS.items()]
        print("\n".join(["usage: dsv3 data SUBCOMMAND …", "", *lines]))
        return 0
    if argv[0] not in SUBCOMMANDS:
        near = did_you_mean(argv[0], SUBCOMMANDS)
        raise ValueError(f"subcommand {argv[0]!r} is not one of {', '.join(SUBCOMMANDS)}{near}")
    return SUBCOMMANDS[argv[0]][0](argv[1:])
