"""The identity of a run: its configuration, its text, its tokenizer and the recipe's version."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsv3_jax.config import DataConfig, ModelConfig, RunConfig, replace, to_dict
from experiments.lab.tasks import Task

# Raise one when results change although no setting does, as by other code. Results of recipe 1 have
# no hashes of their text and tokenizer, and only MaxVio of equal shares of the domains. In recipe 3
# rows of text are shuffled over all documents: losses are 0.02 to 0.16 nats lower. Tasks have no
# such rows.
RECIPE_OF_TASKS, RECIPE_OF_TEXT = 2, 3


@dataclass(frozen=True)
class Identity:
    """A run's identity. `corpus` and `tokenizer` are None while the hashed file is not made yet.

    Attributes:
        config: a hash of `settings`.
        keys: a hash of their names. A later version may have more settings, whose defaults mean
            what was so before.
        settings: every setting, defaults too, by its dotted name.
    """

    config: str
    keys: str
    corpus: str | None
    tokenizer: str | None
    recipe: int
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def mark(self) -> str:
        """Twelve hex digits of all four: the name of the run's folder."""
        return _hash(self.stored())

    def stored(self) -> dict[str, Any]:
        """Return what a record keeps of the identity."""
        return {
            name: getattr(self, name)
            for name in ("config", "keys", "corpus", "tokenizer", "recipe")
        }

    def matches(self, record: Mapping, names: Mapping[str, Sequence[str]] | None = None) -> bool:
        """Return whether a stored record is of this run; what is not made yet is not compared.

        Args: names: the settings' names behind each hash `keys`. A record of an older version has
            fewer settings than this run. It matches if they are equal, and each newer one is at its
            default.
        """
        wanted = {key: value for key, value in self.stored().items() if value is not None}
        known = (names or {}).get(record.get("keys", ""))
        if (
            record.get("keys") != self.keys
            and known is not None
            and set(known) < set(self.settings)
        ):
            newer = {key: value for key, value in self.settings.items() if key not in known}
            defaults = _defaults()
            if any(key not in defaults or defaults[key] != value for key, value in newer.items()):
                return False
            wanted |= {
                "config": _hash({key: self.settings[key] for key in known}),
                "keys": record["keys"],
            }
        return all(record.get(key) == value for key, value in wanted.items())


def identify(
    run: RunConfig, root: Path, task: Task | None = None, needed: Mapping[str, str] | None = None
) -> Identity:
    """Return the identity of a run.

    Args:
        root: the folder that relative paths refer to.
        task: data in place of the run's text.
        needed: run folders that the run starts from → a hash of what they are. A start may also
            be a folder inside one of them, which `Study.make_start` makes.
    """
    data = run.data
    is_made = data.tokenizer == "bytes" or (root / data.tokenizer).exists()
    tokenizer = _tokenizer(root, data) if is_made else None
    settings = settings_of(run, task, needed)
    keys = _hash({"keys": sorted(settings)})
    corpus = _corpus(root, data, task)
    recipe = RECIPE_OF_TEXT if task is None else RECIPE_OF_TASKS
    return Identity(_hash(settings), keys, corpus, tokenizer, recipe, settings)


def settings_of(
    run: RunConfig, task: Task | None = None, needed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return all settings by dotted name, defaults too; except kernels and the layout on devices.

    >>> from dsv3_jax.presets import recipe
    >>> settings_of(recipe("lab"))["model.num_experts"]
    32
    """
    values = to_dict(run)
    values["execution"] = {
        name: getattr(run.execution, name) for name in ("compute_dtype", "remat", "precision")
    }
    values["data"]["tokenizer"] = Path(run.data.tokenizer).name
    for name in ("trunk", "start"):
        values[name] = of_needed(values[name], needed or {})
    return _flat(json.loads(json.dumps(values))) | {"task": task and task.to_dict()}


def of_needed(place: str | None, needed: Mapping[str, str]) -> str | None:
    """Return a start with another name of the needed run, as a hash in place of its folder.

    >>> of_needed("runs/lab/1/copies", {"runs/lab/1": "ab"}), of_needed("runs/demo", {})
    ('ab/copies', 'runs/demo')
    """
    for folder, name in needed.items():
        if place is not None and f"{place}/".startswith(f"{folder}/"):
            return name + place.removeprefix(folder)
    return place


def changed(run: RunConfig, needed: Mapping[str, str]) -> str:
    """Return a hash of the changed settings: a name for a run that another one starts from."""
    settings = settings_of(run, needed=needed)
    return _hash(
        {
            key: value
            for key, value in settings.items()
            if _defaults().get(key, value) != value or key not in _defaults()
        }
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@lru_cache
def _defaults() -> Mapping[str, Any]:
    """Return the defaults of all settings that have one, by dotted name."""
    found: dict[str, Any] = {}
    for cls, prefix in ((RunConfig, ""), (ModelConfig, "model.")):
        for key in dataclasses.fields(cls):
            made = key.default
            if key.default_factory is not dataclasses.MISSING:
                made = key.default_factory()
            if made is dataclasses.MISSING:
                continue
            value = to_dict(made) if dataclasses.is_dataclass(made) else made
            found |= _flat({f"{prefix}{key.name}": json.loads(json.dumps(value))})
    return found


def _corpus(root: Path, data: DataConfig, task: Task | None) -> str | None:
    if task is not None:
        return task.fingerprint
    paths = tuple(str(root / path) for path in data.paths)
    if not all(Path(path).exists() for path in paths):
        return None
    return _corpus_hash(
        replace(data, paths=paths, tokenizer="bytes", seed=0, seq_len=2, batch_size=1)
    )


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
    if data.tokenizer == "bytes":
        return _tokenizer_hash("bytes", 0)
    path = root / data.tokenizer
    return _tokenizer_hash(str(path), path.stat().st_mtime_ns)


@lru_cache
def _tokenizer_hash(name: str, _changed: int) -> str:
    from dsv3_jax.data import tokenizer

    return tokenizer.load(name).fingerprint


def _hash(values: Mapping) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=6).hexdigest()
