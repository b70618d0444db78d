"""How a folder's model reads and ends text: tokenizer, special tokens, chat template, sampling.

A released folder says this in small files: `TEXT_FILES`, config.json, and further templates in
`TEMPLATES_FOLDER`. A run has its tokenizer, and the other files only if it was converted from a
released folder.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dsv3_jax.chat.template import ChatTemplate
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.data.byte_tokenizer import Tokenizer
from dsv3_jax.data.file_tokenizers import JSON_FILE, TIKTOKEN_FILE, FileTokenizer
from dsv3_jax.data.special_tokens import (
    CONFIG_FILE,
    SPECIALS_FILE,
    end_ids,
    named_specials,
    read_object,
)
from dsv3_jax.host.files import parse_json, read_bytes, read_text, write_atomic

TEMPLATE_FILE, TEMPLATES_FOLDER = "chat_template.jinja", "additional_chat_templates"
GENERATION_FILE = "generation_config.json"
# For models that come without a template: the role on a line of its own, the content, the end of a
# document.
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
_MAX_TEMPLATE = 300_000  # bytes; templates of released models have some thousands
# All that a copy of a folder needs, apart from the model, to read and end text as the folder does.
TEXT_FILES = (JSON_FILE, TIKTOKEN_FILE, CONFIG_FILE, SPECIALS_FILE, TEMPLATE_FILE, GENERATION_FILE)


@dataclass(frozen=True)
class TextSettings:
    """How a folder's model reads and ends text."""

    name: str  # of the folder, for errors
    tokenizer: Tokenizer
    special_tokens: dict[str, str]  # bos_token, eos_token, …: their names, which templates use
    stop_ids: tuple[int, ...]  # any of them ends an answer
    template: str | None  # the usual chat template
    # of generation_config.json: temperature, 0 where it says do_sample=false, top_p, top_k
    sampling: dict[str, Any]
    add_bos: bool  # tokenizer_config.json asks for a BOS that tokenizer.json does not add
    # False: a run that was trained here, on documents without BOS or names of special tokens
    released: bool
    # of the chat template, as a run was trained
    variables: dict[str, Any] = field(default_factory=dict)

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """Return the ids of a prompt.

        In a released folder this is transformers' `tokenizer(prompt)`: BOS (rarely EOS) is added as
        tokenizer.json's post-processor says, and the names of special tokens in the prompt become
        their ids. If the post-processor adds nothing and tokenizer_config.json has `add_bos_token:
        true`, BOS is added, too. Here transformers 5 differs: it ignores that key beside a
        tokenizer.json, which transformers 4 obeyed (the tokenizers of DeepSeek-V3 have it).

        In a run that was trained here, nothing is added, and the name of a special token stays
        text.

        Args: raw: add nothing, as `tokenizer(prompt, add_special_tokens=False)`.
        Raises: ValueError for a prompt that is not UTF-8.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # words of a command line may be any bytes
            raise ValueError(
                f"prompt={prompt!r:.80} is not UTF-8 at position {error.start}"
            ) from error
        if not self.released:
            return self.tokenizer.encode(prompt)
        if raw:
            return self.tokenizer.encode_with_specials(prompt)[0]
        ids = self.tokenizer.encode_prompt(prompt)
        if self.add_bos:
            return [self.tokenizer.specials[self.special_tokens["bos_token"]], *ids]
        return ids

    @cached_property
    def chat(self) -> ChatTemplate:
        """The usual chat template.

        Raises: ValueError when the folder has none, its text is no template, or it does not read a
            variable.
        """
        if self.template is None:
            raise ValueError(
                f"{self.name} has no chat template; train with one, --data.chat-template FILE "
                "or plain; `dsv3 generate` continues a text without one"
            )
        template = ChatTemplate(self.template, self.tokenizer, self.special_tokens | self.variables)
        template.values(self.variables)  # raises for one that it does not read
        return template


def plain_settings(spec: str = "bytes") -> TextSettings:
    """Return settings with the plain template for a tokenizer alone.

    Args: spec: as `DataConfig.tokenizer`.

    Example:
        >>> chat = plain_settings().chat
        >>> chat.text([{"role": "user", "content": "1+1"}], add_generation_prompt=True)
        'user\\n1+1<eos>\\nassistant\\n'
    """
    return with_template(
        _read(Path(spec).parent / "none", tokenizers.load(spec), released=False), "plain"
    )


def with_template(
    text: TextSettings, template: str | None, words: Sequence[str] = ()
) -> TextSettings:
    """Return the settings for training on chats: with a template, and a name for a text's end.

    Args: template: "plain", the path of a Jinja file, or None for the folder's own; words: as of
        `variables_of`.
    Raises: ValueError when there is no such file, it is no template or reads no such variable, or
        the folder has none.
    """
    # Templates end a turn with eos_token: a tokenizer alone has the id, and here gets the name.
    names = {i: name for name, i in text.tokenizer.specials.items()}
    special_tokens = text.special_tokens
    if "eos_token" not in special_tokens and text.tokenizer.eos_id in names:
        special_tokens = special_tokens | {"eos_token": names[text.tokenizer.eos_id]}

    source = PLAIN_TEMPLATE if template == "plain" else text.template
    if template not in (None, "plain"):
        try:
            source = read_text(template, _MAX_TEMPLATE)
        except (OSError, ValueError) as error:
            raise ValueError(f"chat_template={template!r} cannot be read: {error}") from error

    found = replace(
        text, special_tokens=special_tokens, template=source, variables=variables_of(words)
    )
    assert found.chat is not None  # raises without a template, and for a text that is none
    return found


def variables_of(words: Sequence[str]) -> dict[str, Any]:
    """Read variables of a chat template, as `DataConfig.template`.

    Raises: ValueError for a word that is none.

    Example:
        >>> variables_of(("thinking=true", "effort=high"))
        {'thinking': True, 'effort': 'high'}
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(
                f"template={word!r} is not NAME=VALUE, a variable of the chat template"
            )
        # JSON where it is JSON, else the text.
        found[name] = value
        with contextlib.suppress(ValueError):
            found[name] = parse_json(value)
    return found


def read_settings(
    folder: str | Path,
    tokenizer: str | None = None,
    words: Sequence[str] = (),
    *,
    documents: bool = False,
) -> TextSettings:
    """Read the text settings of a released folder or a run.

    Args: tokenizer: of a run, as `DataConfig.tokenizer`. None means a released folder, which has
        its own; words: as of `variables_of`; documents: it is a run that was trained on documents.
    Raises: ValueError when the tokenizer is absent or cannot be read, or another file is damaged.
    """
    folder = Path(folder)
    # Kimi's tokenizer has that file beside it in a run on documents, too.
    released = tokenizer is None or ((folder / CONFIG_FILE).is_file() and not documents)
    text = _read(folder, tokenizers.load(tokenizer or str(folder)), released=released)
    return replace(text, variables=variables_of(words))


def template_files(folder: Path) -> list[Path]:
    """The chat templates in a folder's `TEMPLATES_FOLDER`, each named as its template."""
    place = folder / TEMPLATES_FOLDER
    if not place.exists():
        return []
    return sorted(path for path in place.iterdir() if path.suffix == ".jinja")


def copy_to_run(folder: str | Path, run: str | Path, text: TextSettings | None = None) -> None:
    """Copy a released folder's text files into a run made of it, which has its tokenizer already.

    Args: text: what chats are trained with: its template and its names of special tokens are
        written, too. The template comes last: where it is, the rest is complete.
    Raises: ValueError when a file is damaged.
    """
    folder, run = Path(folder), Path(run)

    # The files as they are, apart from the tokenizer and the usual template.
    for template in template_files(folder):
        write_atomic(run / TEMPLATES_FOLDER / template.name, read_bytes(template))
    for name in TEXT_FILES:
        if (folder / name).is_file() and name not in (JSON_FILE, TIKTOKEN_FILE, TEMPLATE_FILE):
            write_atomic(run / name, read_bytes(folder / name))

    # A run that has this file reads text as the released folder does.
    if not (run / CONFIG_FILE).exists():
        names = {} if text is None else text.special_tokens
        write_atomic(run / CONFIG_FILE, json.dumps(names) + "\n")

    # A run has no config.json, so the ids that it names go to the other file.
    stops = end_ids(folder, GENERATION_FILE) or end_ids(folder, "config.json")
    if stops:
        generation = read_object(folder / GENERATION_FILE) | {"eos_token_id": stops}
        write_atomic(run / GENERATION_FILE, json.dumps(generation, indent=2) + "\n")

    if text is not None:
        write_atomic(run / TEMPLATE_FILE, text.chat.source)
    elif (folder / TEMPLATE_FILE).is_file():
        write_atomic(run / TEMPLATE_FILE, read_bytes(folder / TEMPLATE_FILE))


def _read(folder: Path, tokenizer: Tokenizer, *, released: bool) -> TextSettings:
    config = read_object(folder / CONFIG_FILE)
    names = named_specials(folder)

    # A tokenizer that adds specials by itself adds BOS, too, if the model wants it.
    adds_specials = isinstance(tokenizer, FileTokenizer) and tokenizer.encode_prompt("") != []
    add_bos = released and config.get("add_bos_token") is True and not adds_specials
    bos = names.get("bos_token")
    if add_bos and bos not in tokenizer.specials:
        raise ValueError(
            f"{folder / CONFIG_FILE} has add_bos_token=true, and bos_token={bos!r} is no special "
            "token"
        )

    # An answer ends at any id that the model's files name, and where a document ends.
    stops = end_ids(folder, GENERATION_FILE) or end_ids(folder, "config.json")
    return TextSettings(
        name=str(folder),
        tokenizer=tokenizer,
        special_tokens=names,
        stop_ids=tuple(dict.fromkeys([*stops, tokenizer.eos_id])),
        template=_template(folder, config),
        sampling=_sampling(folder),
        add_bos=add_bos,
        released=released,
    )


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """Find the usual chat template, of several the one named "default".

    Files come before the config's.

    Source: transformers, `PreTrainedTokenizerBase._from_pretrained`.
    """
    if os.path.lexists(folder / TEMPLATE_FILE):
        return read_text(folder / TEMPLATE_FILE, _MAX_TEMPLATE)

    # One text; or several, in one of two forms, of which "default" is the usual one.
    value = None if template_files(folder) else config.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict):
        value = value.get("default")
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"{folder / CONFIG_FILE} has a chat_template that is neither text nor a list of named "
            "texts"
        )
    return value


def _sampling(folder: Path) -> dict[str, Any]:
    said = read_object(folder / GENERATION_FILE)
    values = {
        key: said[key] for key in ("temperature", "top_p", "top_k") if said.get(key) is not None
    }
    for key, value in values.items():
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or (key == "top_k" and value != int(value)):
            raise ValueError(
                f"{folder / GENERATION_FILE} has {key}={json.dumps(value)}, which is not a number"
            )

    # Greedy, whatever else the file says.
    if said.get("do_sample") is False:
        return {"temperature": 0.0}
    kinds = {"temperature": float, "top_p": float, "top_k": int}
    # a top_k of 0 means all
    return {key: kinds[key](value) for key, value in values.items() if key != "top_k" or value}
