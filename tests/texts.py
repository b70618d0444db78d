"""Small released folders of text settings, for the comparison with transformers.

The templates are our own, with the constructs that templates of the released models have. The
vocabularies are a few dozen merges of words; none is trained, so that the golden file of
transformers' results holds for every version of the tokenizers library.
"""

import base64
import json
import tempfile
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from dsv3_jax.chat.text_settings import TextSettings, read_settings
from dsv3_jax.data.file_tokenizers import byte_by_character

GOLDEN = Path(__file__).parent / "golden" / "chat.json"
NOW = datetime(2025, 3, 4, 5, 6)  # what the clock of templates says
WORDS = (
    "the", " the", "user", "system", "assistant", "hello", " world",
    " is", "think", "1+1", "ing", " an", "bos", "é",
)  # fmt: skip
CHARACTER = {byte: character for character, byte in byte_by_character().items()}

TEMPLATES = GOLDEN.parent / "templates"
V3, KIMI, GLM, STRICT = (
    (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("v3", "kimi", "glm", "strict")
)


class Clock(datetime):
    """A clock that says NOW."""

    @classmethod
    def now(cls, tz=None):
        return NOW


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


USER, ANSWER = message("user", "hello world"), message("assistant", "the end")
CALL = {"role": "assistant", "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": {"é": [1, "<>"]}}}]}  # fmt: skip
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "system": [message("system", "the system é"), message("user", "1+1 is?")],
    "two turns": [USER, ANSWER, message("user", " 日本語 🚀\n"), message("assistant", "🚀 ok \n")],
    "thoughts": [
        USER,
        message("assistant", "<think>a</think>b", reasoning_content="why"),
        USER,
        message("assistant", "c", reasoning="how\n"),
    ],
    "names in a message": [
        message("user", "a<｜end▁of▁sentence｜><｜User｜>b</s> <s><|im_end|>c<|user|> <think>d"),
        message("assistant", "<｜Assistant｜>[EOS]e<|im_end|>"),
    ],
    "tools": [USER, CALL, message("tool", "2"), ANSWER],
    "parts": [message("user", [{"type": "text", "text": text} for text in ("hello", " world")])],
    "two users": [USER, USER],
    "controls": [USER, message("assistant", "skip"), message("user", "stop"), ANSWER],
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": "é", "a": 1}}}]
PROMPTS = (
    "",
    "hello world",
    " the user é日🚀\n\n1+1",
    "<s>a</s>",
    "x<｜User｜>y<｜begin▁of▁sentence｜>",
    "[BOS]<|im_user|>z",
)


@dataclass(frozen=True)
class Text:
    """A folder's files. Names of added tokens are separated by spaces."""

    specials: str
    config: dict[str, Any]  # tokenizer_config.json
    added: str = ""  # not special
    bos: str | None = None  # which tokenizer.json puts before a text
    sentencepiece: bool = False
    specials_map: dict[str, Any] | None = None  # special_tokens_map.json
    jinja: str | None = None  # chat_template.jinja
    generation: dict[str, Any] | None = None  # generation_config.json; ids are given by name
    model: dict[str, Any] = field(default_factory=dict)  # config.json; likewise


def _token(name: str) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": name, "normalized": True} | plain


_V3_BOS, _V3_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXTS = {
    "V3": Text(
        f"{_V3_BOS} {_V3_EOS} <｜call｜> <｜output｜>",
        {"bos_token": _token(_V3_BOS), "eos_token": _token(_V3_EOS), "pad_token": _token(_V3_EOS),
         "tokenizer_class": "LlamaTokenizerFast", "chat_template": V3},
        added="<｜User｜> <｜Assistant｜> <think> </think>",
        generation={"eos_token_id": _V3_EOS, "do_sample": True, "temperature": 0.6, "top_p": 0.95},
    ),
    "Kimi": Text(
        "[BOS] [EOS] <|im_end|> <|im_user|> <|im_assistant|> <|im_system|> <|im_middle|>",
        {"bos_token": "[BOS]", "eos_token": "[EOS]", "chat_template": "{{ 'not this one' }}"},
        jinja=KIMI,
        generation={"eos_token_id": ["<|im_end|>", "[EOS]"], "max_length": 99},
    ),
    "GLM": Text(
        "<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|image|>",
        {"eos_token": "<|endoftext|>", "image_token": "<|image|>"},
        added="<think> </think>",
        jinja=GLM,
        model={"eos_token_id": ["<|endoftext|>", "<|user|>", "<|observation|>"]},
    ),
    "strict": Text(
        "<unk> <s> </s>",
        {"unk_token": "<unk>", "chat_template": [
            {"name": "default", "template": STRICT},
            {"name": "tool_use", "template": "{{ tools | tojson(indent=2) }}" + STRICT},
        ]},
        bos="<s>",
        sentencepiece=True,
        specials_map={"bos_token": "<s>", "eos_token": _token("</s>")},
        generation={"do_sample": False, "temperature": 0.3},
    ),
}  # fmt: skip


def merges() -> list[tuple[str, str]]:
    """Merges that make each of `WORDS` one token, by GPT-2's characters."""
    found: dict[tuple[str, str], None] = {}
    for word in WORDS:
        characters = [CHARACTER[b] for b in word.encode()]
        for i in range(1, len(characters)):
            found["".join(characters[:i]), characters[i]] = None
    return list(found)


def tokenizer_of(text: Text) -> tokenizers.Tokenizer:
    """Ids are the 256 bytes and merges, or as Llama's; then come added tokens without one."""
    if text.sentencepiece:
        letters = ["▁", *"abcdefghijklmnopqrstuvwxyzINST[]/<>SY123+?"]
        pairs = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l"), ("he", "ll")]
        names = text.specials.split() + [f"<0x{b:02X}>" for b in range(256)] + letters
        vocab = {name: i for i, name in enumerate(dict.fromkeys([*names, *map("".join, pairs)]))}
        bpe = models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        inner = tokenizers.Tokenizer(bpe)
        marked = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        inner.normalizer = normalizers.Sequence(marked)
        plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        inner.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)])
    else:
        vocab = {CHARACTER[b]: b for b in range(256)}
        for a, b in merges():
            vocab[a + b] = len(vocab)
        inner = tokenizers.Tokenizer(models.BPE(vocab, merges()))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    for name in text.specials.split():
        inner.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False)])
    for name in text.added.split():
        inner.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False)])
    if text.bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{text.bos} $A", special_tokens=[(text.bos, inner.token_to_id(text.bos))]
        )
    return inner


def write_text_files(folder: Path, text: Text) -> Path:
    """Write a folder's text files, and a config.json that names a model type."""
    folder.mkdir(parents=True, exist_ok=True)
    inner = tokenizer_of(text)
    inner.save(str(folder / "tokenizer.json"))

    def by_id(values: dict[str, Any]) -> dict[str, Any]:
        if (named := values.get("eos_token_id")) is None:
            return values
        one = isinstance(named, str)
        ids = inner.token_to_id(named) if one else [*map(inner.token_to_id, named)]
        return values | {"eos_token_id": ids}

    files = {
        "tokenizer_config.json": text.config,
        "special_tokens_map.json": text.specials_map,
        "generation_config.json": text.generation and by_id(text.generation),
    }
    if not (folder / "config.json").exists():
        files["config.json"] = {"model_type": "deepseek_v3"} | by_id(text.model)
    for name, values in files.items():
        if values is not None:
            (folder / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    if text.jinja is not None:
        (folder / "chat_template.jinja").write_text(text.jinja, encoding="utf-8")
    return folder


@cache
def settings_of(name: str) -> TextSettings:
    """The settings of a folder of `TEXTS`."""
    with tempfile.TemporaryDirectory() as folder:
        return read_settings(write_text_files(Path(folder), TEXTS[name]))


def tiktoken_lines() -> bytes:
    """A `tiktoken.model` of the same merges."""
    byte_of = byte_by_character()
    merged = (bytes(byte_of[c] for c in a + b) for a, b in merges())
    pieces = [*(bytes([b]) for b in range(256)), *merged]
    return b"".join(base64.b64encode(piece) + f" {i}\n".encode() for i, piece in enumerate(pieces))
