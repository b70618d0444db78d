"""transformers' token ids of prompts and conversations, its assistant masks and rendered texts.

`python tests/parity/chat_reference.py` writes the golden file that `make test` compares our results
with.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
from texts import CONVERSATIONS, GOLDEN, PROMPTS, TEXTS, TOOLS, Clock, Text, write_text_files
from transformers.utils import chat_template_utils

transformers.logging.set_verbosity_error()
chat_template_utils.datetime = Clock


def theirs(folder: Path, text: Text) -> dict[str, Any]:
    """Compute transformers' results on a folder of `write_text_files`."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    source = json.dumps(text.config.get("chat_template")) + (text.jinja or "")
    marked = "generation" in source.replace("add_generation_prompt", "")
    return {
        "prompts": [tokenizer(prompt)["input_ids"] for prompt in PROMPTS],
        "raw": [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS],
        "special_tokens": tokenizer.special_tokens_map,
        "conversations": {
            name: _conversation(tokenizer, messages, marked)
            for name, messages in CONVERSATIONS.items()
        },
    }


def _conversation(tokenizer: Any, messages: list[dict], marked: bool) -> dict[str, Any] | None:
    """Return text, ids, ids with the generation prompt and with tools, `quoted_ids`, the mask."""

    def ids(**options: Any) -> list[int]:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]

    try:
        found = {
            "text": tokenizer.apply_chat_template(messages, tokenize=False),
            "ids": ids(),
            "prompt": ids(add_generation_prompt=True),
            "tools": ids(tools=TOOLS),
            "quoted": quoted_ids(tokenizer, messages),
        }
    except Exception:  # jinja2's, of many kinds
        return None
    if marked:
        both = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        found["mask"] = both["assistant_masks"]
    return found


def quoted_ids(tokenizer: Any, messages: list[dict], **options: Any) -> list[int]:
    """The ids with `sanitize_control_tokens` for all but the assistant's messages."""
    control = tokenizer._get_control_tokens(tokenizer.get_chat_template())
    pattern, _ = chat_template_utils._get_control_token_patterns(control)
    messages = [
        m if m["role"] == "assistant" else chat_template_utils.mark_control_tokens(m, pattern)
        for m in messages
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return chat_template_utils.encode_marked_chat(tokenizer, text)


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as root:
        for name, text in TEXTS.items():
            results[name] = theirs(write_text_files(Path(root) / name, text), text)
    # A line for each conversation.
    text = json.dumps(results, ensure_ascii=False, separators=(",", ":")).replace('},"', '},\n"')
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
