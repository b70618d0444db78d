"""Chat templates: BOS, specials, prompts and masks are transformers', by a golden file; they end.

`make parity` computes the golden file's numbers again.
"""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
from runs import refused
from texts import (
    ANSWER,
    CONVERSATIONS,
    GOLDEN,
    PROMPTS,
    TEMPLATES,
    TEXTS,
    TOOLS,
    USER,
    message,
    settings_of,
    write_text_files,
)

from dsv3_jax.chat import sandbox
from dsv3_jax.chat.template import ChatTemplate
from dsv3_jax.chat.text_settings import PLAIN_TEMPLATE, plain_settings, read_settings, with_template
from dsv3_jax.config import replace
from dsv3_jax.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("clock", "soon")

PLAIN = plain_settings()
EOS = {"eos_token": "<eos>"}
WITHOUT_MARKS = re.sub("{% (end)?generation %}", "", PLAIN_TEMPLATE)

THEIRS = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TEXTS)
def test_prompts_and_conversations_are_transformers(name):
    text = settings_of(name)
    assert [text.encode(prompt) for prompt in PROMPTS] == THEIRS[name]["prompts"]
    assert [text.encode(prompt, raw=True) for prompt in PROMPTS] == THEIRS[name]["raw"]
    assert text.special_tokens == THEIRS[name]["special_tokens"]
    template, same = text.chat, {"any_order": True, "specials_in_messages": True}
    source = template.source
    if name == "strict":
        source = TEXTS[name].config["chat_template"][1]["template"]
    with_tools = ChatTemplate(source, text.tokenizer, text.special_tokens)
    for conversation, messages in CONVERSATIONS.items():
        theirs = THEIRS[name]["conversations"][conversation]
        if theirs is None:
            with refused("the chat template"):
                template.render(messages, **same)
            continue
        assert template.text(messages, any_order=True) == theirs["text"]
        assert template.render(messages, **same).ids == theirs["ids"]
        assert template.render(messages, **same, add_generation_prompt=True).ids == theirs["prompt"]
        assert with_tools.render(messages, **same, tools=TOOLS).ids == theirs["tools"]
        assert template.render(messages, any_order=True).ids == theirs["quoted"]
        assert template.marks_assistant == ("mask" in theirs)
        if template.marks_assistant:
            mask = template.render(messages, **same, assistant_mask=True).mask
            assert mask == list(map(bool, theirs["mask"]))


def test_prefixes_mark_what_generation_blocks_do():
    """Without `{% generation %}`, an answer is what a turn adds, with what ends it."""

    def bare(template):
        source = re.sub(r"{%-? (end)?generation -?%}", "", template.source)
        return ChatTemplate(source, template.tokenizer, template.special_tokens)

    kimi, messages = settings_of("Kimi").chat, CONVERSATIONS["two turns"]
    rendered = bare(kimi).render(messages, assistant_mask=True)
    assert rendered == kimi.render(messages, assistant_mask=True)
    # GLM's leaves out the thoughts of earlier turns: no difference is an answer.
    messages = [USER, {**ANSWER, "reasoning_content": "why"}, USER, ANSWER]
    with refused("message 1: the chat template writes .* in another way"):
        bare(settings_of("GLM").chat).render(messages, assistant_mask=True)


def test_a_generation_prompt_may_open_a_thought():
    """Answers keep the names of a thought's ends as tokens; those of users are text."""
    text = with_template(settings_of("V3"), str(TEMPLATES / "r1.jinja"), ("thinking=true",))
    asked = text.chat.text([USER], add_generation_prompt=True)
    answered = text.chat.text([USER], add_generation_prompt=True, thinking=False)
    assert asked.endswith("<｜Assistant｜><think>")
    assert answered.endswith("<｜Assistant｜></think>")
    turns = [message("user", "<think>"), message("assistant", "<think>3</think>4")]
    ids, mask = text.chat.render(turns, assistant_mask=True)
    name = {i: n for n, i in text.tokenizer.added.items()}
    assert [name.get(i, chr(i)) for i in ids if i < 256 or i in name] == [
        "<｜begin▁of▁sentence｜>", "<｜User｜>", "<", ">", "<｜Assistant｜>",
        "<think>", "3", "</think>", "4", "<｜end▁of▁sentence｜>",
    ]  # fmt: skip
    # the prompt has opened the thought
    assert [i for i, ours in zip(ids, mask, strict=True) if ours] == ids[-4:]


def test_a_continued_message_and_wrong_options():
    text = with_template(settings_of("V3"), str(TEMPLATES / "r1.jinja"))
    begun, how = [USER, message("assistant", "<think>a</think>b")], {"continue_final_message": True}
    assert text.chat.text(begun, **how).endswith("<｜Assistant｜><think>a</think>b")
    with refused("thinkin=True is no variable of .* did you mean 'thinking'\\?; it reads "):
        text.chat.text(begun, thinkin=True)
    with refused("are both given; choose one"):
        text.chat.text(begun, **how, add_generation_prompt=True)
    with refused("does not write the whole of the last message"):
        settings_of("V3").chat.text(begun, **how)
    with refused("template='thinking' is not NAME=VALUE"):
        with_template(text, None, ("thinking",))


@pytest.mark.parametrize("name", TEXTS)
def test_no_message_can_end_a_turn(name):
    text = settings_of(name)
    specials, source = text.tokenizer.specials, text.chat.source
    added = text.tokenizer.added.items()
    control = {i for name, i in added if name in specials or name in source}

    def ids_of(content):
        tools = [{content: content}] if text.chat.reads_tools else None
        return text.chat.render([message("user", content)], tools=tools).ids

    evil = " ".join(text.tokenizer.added)
    assert [i for i in ids_of(evil) if i in control] == [i for i in ids_of("x") if i in control]
    assert evil in text.tokenizer.decode(ids_of(evil))
    assert ids_of("\U000f0001" + evil + "\U000f0000") == ids_of(evil)  # the marks of a message


def test_messages_out_of_order_are_one_sentence():
    """A template allows roles that it names, or all if it writes them, and may check the order."""
    empty, called = message("assistant", None), CONVERSATIONS["tools"]
    for name, messages, sentence in (
        ("V3", [USER, empty], "message 1 of role='assistant' has no content"),
        ("V3", [ANSWER, USER], "message 0 is the assistant's"),
        ("strict", called, "message 2 has role='tool'"),
        ("strict", [USER, USER], ".* refuses the messages: roles must alternate: user, assistant"),
    ):
        with refused(f"^{sentence}[^\n]*$"):
            settings_of(name).chat.text(messages)
    assert "<|tool|>" in settings_of("GLM").chat.text(called)


def test_stop_tokens_and_sampling_come_from_the_files():
    v3, kimi, glm = (settings_of(name).tokenizer.added for name in ("V3", "Kimi", "GLM"))
    assert settings_of("V3").stop_ids == (v3["<｜end▁of▁sentence｜>"],)
    assert settings_of("V3").sampling == {"temperature": 0.6, "top_p": 0.95}
    assert settings_of("Kimi").stop_ids == (kimi["<|im_end|>"], kimi["[EOS]"])
    ends = ("<|endoftext|>", "<|user|>", "<|observation|>")
    assert settings_of("GLM").stop_ids == tuple(glm[name] for name in ends)
    assert settings_of("strict").sampling == {"temperature": 0.0}


def test_add_bos_token_adds_bos(tmp_path):
    """As transformers 4, and 5 if the switch is set by hand; see `TextSettings.encode`."""
    config = TEXTS["V3"].config | {"add_bos_token": True}
    text = read_settings(write_text_files(tmp_path / "v3", replace(TEXTS["V3"], config=config)))
    bos = text.tokenizer.specials["<｜begin▁of▁sentence｜>"]
    assert [text.encode(p) for p in PROMPTS] == [[bos, *ids] for ids in THEIRS["V3"]["prompts"]]


@pytest.mark.parametrize("source", [PLAIN_TEMPLATE, WITHOUT_MARKS])
def test_a_turn_of_weight_0_is_no_target(source):
    chat = ChatTemplate(source, PLAIN.tokenizer, PLAIN.chat.special_tokens)

    def targets(*weights):
        more = ({} if weight is None else {"weight": weight} for weight in weights)
        answers = [message("assistant", f"{i}.", **w) for i, w in enumerate(more)]
        messages = [m for answer in answers for m in (message("user", "a", weight=0), answer)]
        found = chat.render(messages, assistant_mask=True)
        assert found.ids == chat.render(messages).ids
        text = PLAIN.tokenizer.decode(i for i, m in zip(*found, strict=True) if m)
        return text.replace("\n", "")  # without blocks the line's end is the assistant's, too

    assert targets(0, None, 1) == "1.2." and targets(1.0, 0) == "0." and targets(0) == ""
    for weight in (0.5, "0"):
        with refused(f"weight=.*{weight}.* must be 0 or 1"):
            targets(1, weight)


LOOP = "{% for i in range(99999) %}"
TREES = "{% set n = namespace(s=[0], i=[0]) %}{% for i in range(40) %}"
TREES += "{% set n.s = [n.s, n.s] %}{% set n.i = [n.i, n.i] %}{% endfor %}"
REFUSED = {  # a template → the sentence that refuses it
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "fails with SecurityError",
    "{{ messages.append(1) }}": "fails with SecurityError",
    "{% include '/etc/passwd' %}": "fails with TypeError",
    "{% for m in messages %}": "fails with TemplateSyntaxError",
    "{% set s = 'a' * 10**6 %}" + LOOP + "{% if 'b' in s %}{% endif %}{% endfor %}": "runs for",
    # C code that no signal interrupts: it compares two trees of 2^40 leaves
    TREES + "{{ n.s == n.i }}": "runs for",
    "{% macro f(n) %}{{ f(n-1) }}{% endmacro %}{{ f(1) }}": "fails with RecursionError",
    "{{ 'a' * 10**9 }}": "takes more than",
    "{% set s %}" + LOOP + "literal " * 9999 + "{% endfor %}{% endset %}": "takes more than",
}


@pytest.mark.parametrize(("source", "sentence"), REFUSED.items(), ids=range(len(REFUSED)))
def test_a_template_ends_and_reaches_nothing(monkeypatch, source, sentence):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "MAX_BYTES", 2**25)
    with ThreadPoolExecutor(1) as pool, refused(f"^the chat template {sentence}[^\n]*$"):
        pool.submit(lambda: ChatTemplate(source, ByteTokenizer(), EOS).text([USER])).result()
    monkeypatch.undo()
    assert PLAIN.chat.text([USER])  # the next one has a process that lives


@pytest.mark.parametrize("source", [PLAIN_TEMPLATE, WITHOUT_MARKS])
def test_a_very_long_chat_needs_a_template_that_marks_turns(source):
    """Without `{% generation %}` each turn is compared after all turns before it."""
    marked = source == PLAIN_TEMPLATE
    turns = [message(("user", "assistant")[i % 2], f"turn {i}") for i in range(502)]
    with nullcontext() if marked else refused("502 messages are more than"):
        found = ChatTemplate(source, ByteTokenizer(), EOS).render(turns, assistant_mask=True)
        assert sum(found.mask) > 251 * len("turn 1")
