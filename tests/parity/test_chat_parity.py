"""Text settings beside transformers: test_template.py's golden file is what transformers gives."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest
from runs import refused
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

from dsv3_jax.chat.text_settings import read_settings

# torch and transformers warn
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
pytestmark += [pytest.mark.usefixtures("clock")]


@pytest.mark.parametrize("name", TEXTS)
def test_the_golden_file_is_transformers(name, tmp_path, card):
    from chat_reference import theirs

    folder = write_text_files(tmp_path, TEXTS[name])
    results = json.loads(json.dumps(theirs(folder, TEXTS[name])))
    assert results == json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    ours = read_settings(folder)
    assert [ours.encode(prompt) for prompt in PROMPTS] == results["prompts"]
    # What transformers refuses, `make test` refuses here.
    read = {key: found for key, found in results["conversations"].items() if found is not None}
    for conversation, found in read.items():
        ids = ours.chat.render(CONVERSATIONS[conversation], any_order=True).ids
        assert ids == found["quoted"], conversation
    model = f"{'DeepSeek-' * (name == 'V3')}{name}, chat template"
    card(model, "text", {f"of {len(PROMPTS) + len(read)} prompts and conversations": 0})


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
    rng, choices = random.Random(0), [*WORDS, " ", "\n", "日本語 🚀", "<b>", "\t ", "."]

    def words():
        return "".join(rng.choices(choices, k=rng.randint(1, 9)))

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


R1 = TEXTS["V3"].config | {"chat_template": (TEMPLATES / "r1.jinja").read_text(encoding="utf-8")}
FOUR = {
    "marks": (TEXTS["Kimi"], {}),
    "tools": (TEXTS["V3"], {}),
    "any role": (TEXTS["GLM"], {}),
    "thinking": (replace(TEXTS["V3"], config=R1), {"thinking": True}),
}


@pytest.mark.parametrize("name", FOUR)
def test_sixty_conversations_are_transformers(name, tmp_path, card):
    """Ids, prompts, tools, variables, continued messages and masks; users' names stay text."""
    import transformers
    from chat_reference import quoted_ids

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
                with refused("does not write the whole of the last message"):
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
            m | {"content": m["content"] + names} if m["role"] != "assistant" else m
            for m in messages
        ]
        assert chat.render(forged, **variables).ids == quoted_ids(tokenizer, forged, **variables)
    assert compared >= 180
    card(f"sixty conversations, {name}", "text", {f"of {compared} texts": 0})
