"""Text settings beside transformers: test_chat.py's golden file is what transformers gives."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
from texts import (
    CALL,
    CONVERSATIONS,
    GOLDEN,
    PROMPTS,
    TEMPLATES,
    TEXTS,
    TOOLS,
    WORDS,
    tiktoken_lines,
    write_text_files,
)

from dsv3_jax.chat import sandbox
from dsv3_jax.chat.text_settings import read_settings

# torch and transformers warn
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", TEXTS)
def test_the_golden_file_is_transformers(name, tmp_path, card, monkeypatch):
    from chat_reference import Clock, theirs

    monkeypatch.setattr(sandbox, "datetime", Clock)
    folder = write_text_files(tmp_path, TEXTS[name])
    results = json.loads(json.dumps(theirs(folder, TEXTS[name])))
    assert results == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    ours = read_settings(folder)
    assert ours.chat
    pairs = [
        (ours.encode(prompt), ids) for prompt, ids in zip(PROMPTS, results["prompts"], strict=True)
    ]
    for conversation, found in results["conversations"].items():
        if found is not None:  # what transformers refuses, `make test` refuses here
            pairs.append(
                (ours.chat.render(CONVERSATIONS[conversation], any_order=True).ids, found["quoted"])
            )
    differing = sum(a != b for a, b in pairs)
    assert differing == 0
    card(
        f"{'DeepSeek-' * (name == 'V3')}{name}, chat template",
        "text",
        {f"of {len(pairs)} prompts and conversations": differing},
    )


def test_a_tiktoken_model_is_transformers_conversion(tmp_path):
    """transformers converts ranks to merges, by OpenAI's pattern; both split these texts alike."""
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


def conversations(count=60):
    """Turns of random words, some with system messages, thoughts of both forms, calls of tools."""
    rng = random.Random(0)

    def words():
        return "".join(
            rng.choices([*WORDS, " ", "\n", "日本語 🚀", "<b>", "\t ", "."], k=rng.randint(1, 9))
        )

    for i in range(count):
        messages = [{"role": "system", "content": words()}] if i % 3 == 0 else []
        for _ in range(1 + i % 4):
            messages.append({"role": "user", "content": words()})
            if i % 5 == 1:
                messages += [CALL, {"role": "tool", "content": words()}]
            thought = f"<think>{words()}</think>" if rng.random() < 0.5 else ""
            messages.append({"role": "assistant", "content": thought + words()})
            if i % 5 == 2:
                messages[-1]["reasoning_content"] = words()
        yield messages


R1 = (TEMPLATES / "r1.jinja").read_text(encoding="utf-8")
FOUR = {
    "marks": (TEXTS["Kimi"], {}),
    "tools": (TEXTS["V3"], {}),
    "any role": (TEXTS["GLM"], {}),
    "thinking": (
        replace(TEXTS["V3"], config=TEXTS["V3"].config | {"chat_template": R1}),
        {"thinking": True},
    ),
}


@pytest.mark.parametrize("name", FOUR)
def test_sixty_conversations_are_transformers(name, tmp_path, card, monkeypatch):
    """Ids, prompts, tools, variables, continued messages and masks; users' names stay text."""
    import transformers
    from chat_reference import Clock, quoted_ids

    monkeypatch.setattr(sandbox, "datetime", Clock)
    given, variables = FOUR[name]
    folder = write_text_files(tmp_path, given)
    tokenizer, chat = transformers.AutoTokenizer.from_pretrained(folder), read_settings(folder).chat
    compared = 0
    for messages in conversations():
        for options in (
            {},
            {"add_generation_prompt": True},
            {"tools": TOOLS},
            {"continue_final_message": True},
        ):
            some = messages[:-1] if "add_generation_prompt" in options else messages
            try:
                read = partial(tokenizer.apply_chat_template, some, return_dict=True)
                theirs = read(**options, **variables)["input_ids"]
            except ValueError:  # the template leaves out a part of the last message
                with pytest.raises(
                    ValueError, match="does not write the whole of the last message"
                ):
                    chat.render(some, **options, **variables)
                continue
            assert chat.render(some, **options, **variables).ids == theirs, (some, options)
            compared += 1
        if chat.marks_assistant:
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
            theirs = tokenizer.apply_chat_template(messages, **options)
            ours = chat.render(messages, assistant_mask=True)
            assert ours.mask == list(map(bool, theirs["assistant_masks"])) and any(ours.mask)
        names = " ".join(tokenizer.get_added_vocab())
        forged = [
            m if m["role"] == "assistant" else {**m, "content": m["content"] + names}
            for m in messages
        ]
        assert chat.render(forged, **variables).ids == quoted_ids(tokenizer, forged, **variables)
    assert compared >= 180
    card(f"sixty conversations, {name}", "text", {f"of {compared} texts": 0})
