"""What makes two runs the same run: their whole configuration, their text, their tokenizer and the recipe's version."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from dsv3_jax.config import DataConfig, RunConfig, replace, to_dict
from experiments.lab.tasks import Task

# Raised when results change although no setting does: other code of training or of measuring. 1: results without
# hashes of their text and tokenizer, and MaxVio of equal shares of the domains alone.
RECIPE = 2


@dataclass(frozen=True)
class Identity:
    """A run's identity. `corpus` and `tokenizer` are None while the file that they hash is not made yet."""

    config: str
    corpus: str | None
    tokenizer: str | None
    recipe: int = RECIPE

    @property
    def mark(self) -> str:
        """Twelve hex digits of all four: the name of the run's folder."""
        return _hash(asdict(self))

    def matches(self, record: Mapping) -> bool:
        """Return whether a stored record is of this run; what is not made yet is not compared."""
        wanted = {key: value for key, value in asdict(self).items() if value is not None}
        return all(record.get(key) == value for key, value in wanted.items())


def identify(run: RunConfig, root: Path, task: Task | None = None, needed: Mapping[str, str] | None = None) -> Identity:
    """Return the identity of a run.

    Args:
        root: the folder that relative paths refer to.
        task: data in place of the run's text.
        needed: run folders that the run starts from → `config` of their identity.
    """
    data = run.data
    tokenizer = None if data.tokenizer != "bytes" and not (root / data.tokenizer).exists() else _tokenizer(root, data)
    return Identity(config_hash(run, task, needed), _corpus(root, data, task), tokenizer)


def config_hash(run: RunConfig, task: Task | None = None, needed: Mapping[str, str] | None = None) -> str:
    """Return twelve hex digits of every setting, defaults too, except kernels and the layout on devices.

    >>> from dsv3_jax.presets import recipe
    >>> config_hash(recipe("lab")) == config_hash(replace(recipe("lab"), seed=1))
    False
    """
    values = to_dict(run)
    values["execution"] = {name: getattr(run.execution, name) for name in ("compute_dtype", "remat", "precision")}
    values["data"]["tokenizer"] = Path(run.data.tokenizer).name
    for name in ("trunk", "start"):
        values[name] = (needed or {}).get(values[name], values[name])
    return _hash(values | {"task": task and task.to_dict()})


def _corpus(root: Path, data: DataConfig, task: Task | None) -> str | None:
    if task is not None:
        return task.fingerprint
    paths = tuple(str(root / path) for path in data.paths)
    if not all(Path(path).exists() for path in paths):
        return None
    return _corpus_hash(replace(data, paths=paths, tokenizer="bytes", seed=0, seq_len=2, batch_size=1))


@lru_cache
def _corpus_hash(data: DataConfig) -> str:
    """Return a hash of the training texts and of the held-out texts."""
    from dsv3_jax.data.corpus import load_corpus

    corpus = load_corpus(data)
    digest = hashlib.blake2b(corpus.fingerprint.encode(), digest_size=8)
    for text, domain in corpus.val:
        digest.update(f"{domain}\0{len(text)}\0{text}".encode())
    return digest.hexdigest()


def _tokenizer(root: Path, data: DataConfig) -> str:
    path = root / data.tokenizer
    return (
        _tokenizer_hash("bytes", 0)
        if data.tokenizer == "bytes"
        else _tokenizer_hash(str(path), path.stat().st_mtime_ns)
    )


@lru_cache
def _tokenizer_hash(name: str, _changed: int) -> str:
    from dsv3_jax.data import tokenizer

    return tokenizer.load(name).fingerprint


def _hash(values: Mapping) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=6).hexdigest()
