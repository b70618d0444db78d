"""Places of models: a folder, a snapshot of the hub's cache, or a hub id that it holds.

Nothing is downloaded.
"""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def find(place: str | Path) -> Path:
    """Return the folder of a model.

    Args: place: a folder, or a hub id, organisation/name, possibly with @revision.
    Raises: ValueError when there is no such folder, or no such id in the cache.

    Example:
        >>> find(".")
        PosixPath('.')
    """
    folder = Path(place)
    if folder.exists() or not _ID.fullmatch(str(place)):
        return folder
    name, _, revision = str(place).partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision or None, local_files_only=True
            )
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        if folder.parent.is_dir():  # a path: the caller says what it lacks
            return folder
        cache = huggingface_hub.constants.HF_HUB_CACHE
        raise ValueError(
            f"model={str(place)!r} is no folder, and the hub's cache {cache} does not hold it; "
            f"download it with: hf download {name}{revision and f' --revision {revision}'}"
        ) from error
