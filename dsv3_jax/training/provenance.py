"""The origin of a run, kept in its run.json: the code's commit, the text, the tokenizer, versions."""

import importlib.metadata
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsv3_jax.data.batches import Source
from dsv3_jax.data.tokenizer import Tokenizer

PACKAGE = Path(__file__).resolve().parents[1]


def made_from(source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return commit, dirty flag, versions, and hashes of the training data and of the tokenizer.

    `commit` and `dirty` are None for a package that is not in a git repository. `dirty` says that tracked files of the
    package differ from the commit.

    Example:
        >>> from dsv3_jax.config import DataConfig
        >>> from dsv3_jax.data.source import open_source
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> made = made_from(open_source(DataConfig(max_documents=8), ByteTokenizer()), ByteTokenizer())
        >>> list(made)
        ['commit', 'dirty', 'version', 'jax', 'corpus', 'tokenizer']
    """
    commit, dirty = commit_of(PACKAGE)
    versions = {"version": importlib.metadata.version("dsv3-jax"), "jax": importlib.metadata.version("jax")}
    return {"commit": commit, "dirty": dirty} | versions | {
        "corpus": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }  # fmt: skip


@lru_cache
def commit_of(folder: Path) -> tuple[str | None, bool | None]:
    """Return (commit, whether tracked files in the folder differ from it), or (None, None) outside a repository.

    A folder that a repository contains but does not track, such as an installed package, has no commit.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--", "."):
        return None, None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return git("rev-parse", "HEAD"), None if changed is None else bool(changed)
