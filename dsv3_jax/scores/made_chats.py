"""Small chats to fine-tune on, and tasks for GRPO: facts to remember, and a skill to learn."""

import json
import random
from pathlib import Path
from typing import Any

from dsv3_jax.host.files import write_atomic

CHATS_FILE, TASKS_FILE = "chats.jsonl", "tasks.jsonl"
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Egypt": "Cairo", "Peru": "Lima",
    "Cuba": "Havana", "Kenya": "Nairobi", "Spain": "Madrid", "Norway": "Oslo", "Nepal": "Kathmandu",
    "Austria": "Vienna", "Ghana": "Accra", "Iran": "Tehran", "Chile": "Santiago",
    "Greece": "Athens",
}  # fmt: skip


def chats() -> list[dict[str, Any]]:
    """Return fifty chats: capitals of countries, and which numbers of two digits are even.

    Each capital is asked in two ways, so that a chat which is held out can be known, too.

    Example:
        >>> len(chats())
        50
        >>> [turn["content"] for turn in chats()[-1]["messages"]]
        ['Is 89 odd or even?', 'odd']
    """
    pairs = [
        (f"{words} the capital of {land}?", f"{city}.")
        for words in ("What is", "Do you know")
        for land, city in CAPITALS.items()
    ]
    pairs += [_parity(number) for number in sorted(random.Random(0).sample(range(10, 100), 20))]
    return [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in pairs
    ]


def tasks() -> list[dict[str, Any]]:
    """Return two hundred tasks: the same question of numbers of three digits.

    Example:
        >>> tasks()[0]
        {'prompt': 'Is 964 odd or even?', 'answer': 'even'}
    """
    pairs = [_parity(number) for number in random.Random(0).sample(range(100, 1000), 200)]
    return [{"prompt": question, "answer": answer} for question, answer in pairs]


def _parity(number: int) -> tuple[str, str]:
    return f"Is {number} odd or even?", "odd" if number % 2 else "even"


def write_chats(folder: str | Path) -> list[Path]:
    """Write the chats and the tasks as JSONL into a folder.

    Returns: the two files.
    Raises: ValueError for a file that is there and holds something else; then nothing is written.
    """
    files = {Path(folder, CHATS_FILE): chats(), Path(folder, TASKS_FILE): tasks()}
    texts = {
        file: "".join(json.dumps(r) + "\n" for r in records) for file, records in files.items()
    }
    for file, text in texts.items():
        if file.exists() and file.read_bytes() != text.encode():
            raise ValueError(f"file={str(file)!r} exists and holds something else; move it away")
    for file, text in texts.items():
        write_atomic(file, text)
    return list(files)
