"""`dsv3 tokenizer OUT`: train a byte-level BPE tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dsv3_jax.cli.common import parse
from dsv3_jax.config import DataConfig
from dsv3_jax.host.files import check_writable


@dataclass
class TokenizerArgs:
    """Train a byte-level BPE tokenizer, and write it as a tokenizer.json."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """the file to write"""
    vocab_size: int = 8192
    """number of tokens"""
    paths: tuple[str, ...] = ()
    """files or folders of text; empty means the text that this Python carries"""
    force: bool = False
    """overwrite an existing file"""


def run(argv: list[str]) -> int:
    """Write the tokenizer, and print how many bytes a token of held-out text has."""
    args = parse(TokenizerArgs, argv, "tokenizer")
    if args.out.exists() and not args.force:
        raise ValueError(f"out={str(args.out)!r} exists already; --force overwrites it")
    check_writable(args.out)
    from dsv3_jax.data import tokenizer
    from dsv3_jax.data.corpus import load_corpus
    from dsv3_jax.report.progress import text_console

    corpus = load_corpus(DataConfig(paths=args.paths))
    trained = tokenizer.train_bpe((d.text for d in corpus.train), args.vocab_size, str(args.out))
    sample = "".join(d.text for d in corpus.val)[:200_000]
    ratio = len(sample.encode()) / max(len(trained.encode(sample)), 1)
    text_console().print(
        f"{args.out}: {trained.vocab_size} tokens, {ratio:.2f} bytes a token on held-out text"
    )
    return 0
