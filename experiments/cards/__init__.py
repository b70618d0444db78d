"""Verification cards, a JSON file each: what one model gave at one task on one device.

The site renders them. A card is written by the program that measured it, in the run that it
describes. Without a card nothing has run.
"""

import json
import math
import platform
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dsv3_jax.host.files import write_atomic

FOLDER = Path(__file__).parent
# task → what it asks, in the order of the site's table
TASKS = {
    "logits": (
        "Logits equal transformers'. "
        "The figure is the largest difference over the logits' standard deviation."
    ),
    "ids": (
        "Routed experts and greedy tokens equal transformers'. The figure counts those that differ."
    ),
    "trained step": (
        "Loss and gradients equal transformers'. A gradient is compared with its root mean square."
    ),
    "sparse attention": "Logits equal transformers' in texts of up to 25 times `index_topk`.",
    "stored format": (
        "A folder of 4-, 8- or 16-bit weights is read. Its logits equal transformers'."
    ),
    "written back": (
        "transformers runs the folder that is saved here, with the same logits, ids and gradients."
    ),
    "text": (
        "Token ids of prompts and chats equal transformers'. The figure counts those that differ."
    ),
    "conformance": "The device computes what the page of equations says.",
    "speed": "How near the device is to its bounds.",
}
DEVICES = ("CPU", "H100", "TPU")  # the site has a column for each, run or not


def write_card(
    folder: Path,
    model: str,
    task: str,
    device: str,
    command: str,
    figures: Mapping[str, float | int | str],
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write a card, over an older one of the same model, task and device.

    Args:
        model: A family, a preset or a folder of the grid.
        task: One of TASKS.
        device: "CPU", or JAX's name of the accelerator, as "NVIDIA H100 80GB HBM3".
        command: What somebody types to get this card.
        figures: By name with its unit, as measured; the site shows the first one in its table.
        versions: By package. None means those of this process.
    Returns: The file.
    Raises: ValueError for another task, for no figure, and for a figure that is not finite.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is not one of {', '.join(TASKS)}")
    bad = {
        name: value
        for name, value in figures.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if bad or not figures:
        raise ValueError(
            f"figures={bad} are not finite: a card holds what was measured, and at least one figure"
        )
    card = {
        "model": model,
        "task": task,
        "device": device,
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": dict(versions or _versions()),
        "figures": dict(figures),
    }
    name = "__".join(
        re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-") for part in (model, task, device)
    )
    write_atomic(folder / f"{name}.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return folder / f"{name}.json"


def read_cards(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Return all cards of a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _versions() -> dict[str, str]:
    """The versions of what computes here, and of what it is compared with if that is loaded."""
    names = [
        "dsv3-jax",
        "jax",
        "jaxlib",
        "flax",
        *(name for name in ("torch", "transformers") if name in sys.modules),
    ]
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
