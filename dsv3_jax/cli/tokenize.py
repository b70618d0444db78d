"""`dsv3 data tokenize PATHS --out FOLDER`: write shards of token ids, see `data.tokenizing`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dsv3_jax.config import DataConfig
from dsv3_jax.data.manifest import Manifest
from dsv3_jax.data.tokenizer import load as load_tokenizer
from dsv3_jax.data.tokenizing import Encoder, ShardJob, text_encoder, write_shards


@dataclass(frozen=True)
class Tokenize:
    """Write shards of token ids for --data.format shards; the same command resumes after a stop."""

    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="PATHS", help_behavior_hint="(required)"),
    ]
    """files or folders of text, code, JSONL or Parquet; or hf:NAME[:CONFIG][@SPLIT], a dataset"""
    out: Path
    """the folder to write"""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json"""
    format: Literal["text", "chat"] = "text"
    """text, all of whose tokens are targets; or chat examples, whose assistant's tokens are"""
    start: str | None = None
    """for chat: the run or released model whose tokenizer and template encode the examples"""
    chat_template: str | None = None
    """for chat: the file of a Jinja template, or plain; None means the template of --start"""
    template: tuple[str, ...] = ()
    """for chat: variables of the template, as in --template.thinking true"""
    prompts: Literal["turn", "text"] = "turn"
    """for chat: what a task's prompt is if it is a text: a user's turn, or text to continue"""
    row_tokens: int = ShardJob.row_tokens
    """tokens of a record; the sequence length of training must divide it"""
    val_fraction: float = ShardJob.val_fraction
    """share of documents that are held out, by a hash of the text or of what a chat teaches"""
    text_column: str = ShardJob.text_column
    """key of JSONL and column of Parquet or a dataset with the text; for chat, the messages"""
    shard_mb: float = ShardJob.shard_mb
    """megabytes of text of a shard, which memory holds"""


def tokenize(args: Tokenize) -> Manifest:
    """Write the shards. Raises: ValueError as `encoder_of` and `write_shards`."""
    job = ShardJob(**{field.name: getattr(args, field.name) for field in fields(ShardJob)})
    job.check()  # before a tokenizer is read
    return write_shards(job, encoder_of(args))


def encoder_of(args: Tokenize) -> Encoder:
    """Return the encoder of documents or chat examples.

    Raises: ValueError for options of the other format, or chats without a template.
    """
    if args.format == "chat":
        return _chat_encoder(args)
    for name in ("start", "chat_template", "template", "prompts"):
        if (value := getattr(args, name)) != getattr(Tokenize, name):
            raise ValueError(f"{name}={value!r} is for format='chat'")
    return text_encoder(load_tokenizer(args.tokenizer))


def _chat_encoder(args: Tokenize) -> Encoder:
    from dsv3_jax.chat.encoder import chat_encoder
    from dsv3_jax.chat.text_settings import plain_settings, with_template
    from dsv3_jax.report.unread_keys import unread_line
    from dsv3_jax.runs.open_model import load_text

    if args.start is None and args.chat_template is None:
        raise ValueError(
            "format='chat' needs a template; name a model by --start, or give --chat-template plain"
        )
    if args.start is not None and args.tokenizer != "bytes":
        raise ValueError(
            f"tokenizer={args.tokenizer!r} and start={args.start!r} bring one each; choose one"
        )
    text = plain_settings(args.tokenizer) if args.start is None else load_text(args.start)
    text = with_template(text, args.chat_template, args.template)

    # What the template drops is said, as in training.
    cfg = DataConfig(
        paths=args.paths, format="chat", text_column=args.text_column, prompts=args.prompts
    )
    if line := unread_line(cfg, text):
        print(line, flush=True)
    return chat_encoder(text, args.template, args.prompts)
