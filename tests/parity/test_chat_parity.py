"""Text settings beside transformers: the golden file of tests/test_chat.py holds what transformers gives today."""

import json

import pytest
from texts import CONVERSATIONS, GOLDEN, PROMPTS, TEXTS, tiktoken_lines, write_text_files

from dsv3_jax.chat import sandbox
from dsv3_jax.chat.text_settings import read_settings

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # torch and transformers warn


@pytest.mark.parametrize("name", TEXTS)
def test_the_golden_file_is_transformers(name, tmp_path, card, monkeypatch):
    from chat_reference import Clock, theirs

    monkeypatch.setattr(sandbox, "datetime", Clock)
    folder = write_text_files(tmp_path, TEXTS[name])
    results = json.loads(json.dumps(theirs(folder, TEXTS[name])))
    assert results == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    ours = read_settings(folder)
    assert ours.chat
    pairs = [(ours.encode(prompt), ids) for prompt, ids in zip(PROMPTS, results["prompts"], strict=True)]
    for conversation, found in results["conversations"].items():
        if found is not None:  # what transformers refuses, `make test` refuses here
            pairs.append((ours.chat.render(CONVERSATIONS[conversation], any_order=True).ids, found["quoted"]))
    differing = sum(a != b for a, b in pairs)
    assert differing == 0
    card(
        f"{'DeepSeek-' * (name == 'V3')}{name}, chat template",
        "text",
        {f"of {len(pairs)} prompts and conversations": differing},
    )


def test_a_tiktoken_model_is_transformers_conversion(tmp_path):
    """transformers converts the ranks to merges, with OpenAI's pattern; the texts here are split alike by both."""
    pytest.importorskip("tiktoken")
    import transformers

    folder = write_text_files(tmp_path, TEXTS["Kimi"])
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_bytes(tiktoken_lines())
    base = len(tiktoken_lines().splitlines())
    names = TEXTS["Kimi"].specials.split()
    added = {str(base + i): {"content": name, "special": True} for i, name in enumerate(names)}
    config = TEXTS["Kimi"].config | {"added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(folder), read_settings(folder)
    assert [ours.encode(p) for p in PROMPTS] == [tokenizer(p)["input_ids"] for p in PROMPTS]
