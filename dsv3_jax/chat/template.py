"""Chat templates: from messages to token ids, and which of these an assistant wrote.

A template is a Jinja program that comes with released weights. It runs in a sandbox: it sees
messages, names of special tokens and a few functions, and nothing else of the process. Templates
find the same names here as in transformers.
Source: transformers, `apply_chat_template` and `utils/chat_template_utils.py`.
"""

import itertools
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv3_jax.chat.messages import Message, check_messages, plain_data
from dsv3_jax.chat.sandbox import ask, limits
from dsv3_jax.config import did_you_mean
from dsv3_jax.data.byte_tokenizer import Tokenizer, pattern_of

Spans = list[tuple[int, int]]
_MAX_COMPARED = 500  # messages; their texts are compared in some seconds
# Private characters that enclose the name of a special token in a message.
_OPEN, _CLOSE = "\U000f0000", "\U000f0001"
# of transformers: a template that cuts spaces cuts its last one
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class Rendered(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    mask: list[bool]  # which ids an assistant wrote; all False where it was not asked for


class ChatTemplate:
    """A chat template with its tokenizer.

    Args:
        source: Jinja.
        tokenizer: of the ids.
        special_tokens: role → name, as bos_token, and other variables of the template.
    Attributes:
        variables: names of what the template reads beside messages and tools.
        reads_tools: whether it reads tools.
    Raises: ValueError when `source` is no template.

    Example:
        >>> from dsv3_jax.data.tokenizer import ByteTokenizer
        >>> turn = "{{ m.role[0] + ':' + m.content + eos_token }}"
        >>> source = "{% for m in messages %}" + turn + "{% endfor %}"
        >>> chat = ChatTemplate(source, ByteTokenizer(), {"eos_token": "<eos>"})
        >>> chat.text([{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}])
        'u:1+1<eos>a:2<eos>'
        >>> chat.render([{"role": "user", "content": "<eos>"}]).ids  # a message is plain text
        [117, 58, 60, 101, 111, 115, 62, 256]
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, special_tokens: dict[str, Any] | None = None
    ):
        self.source = source
        self.tokenizer = tokenizer
        self.special_tokens = dict(special_tokens or {})

        # The sandbox parses the source, and says what the template reads and writes.
        with limits():
            found = ask(source)
        self.variables = set(found["reads"]) - {"messages", "tools", "add_generation_prompt"}
        self.reads_tools = "tools" in found["reads"]
        self.writes_role = found["writes_role"]

        # Names that mean a token where the template writes them, and text inside a message.
        specials = tokenizer.specials
        written = found["written"]
        self._control_name = pattern_of(
            name
            for name in tokenizer.added
            if name in specials or (name in written and not name.isspace())
        )
        self.marks_assistant = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None

    def text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        any_order: bool = False,
        **variables: Any,
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: dicts with a `role` and a `content`, and what else the template reads.
            add_generation_prompt: end with what precedes an assistant's answer.
            continue_final_message: end where the content of the last message ends, so that the
                model continues it.
            tools: JSON schemas of functions. None means that there are none.
            any_order: leave the order of the messages to the template, as transformers does.
            variables: of the template, as `thinking=True`.
        Raises: ValueError as `messages.check_messages`, when the template does not read a variable,
            refuses the messages, fails, or tries to reach anything outside.
        """
        messages = self._checked(messages, any_order)
        values = self.values(variables, tools)
        with limits():
            return self._ended(messages, values, add_generation_prompt, continue_final_message)[0]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        any_order: bool = False,
        specials_in_messages: bool = False,
        assistant_mask: bool = False,
        **variables: Any,
    ) -> Rendered:
        """Return the ids of a conversation, and which of them an assistant wrote.

        The names of special tokens become their ids where the template or an assistant writes them,
        as in `<think>…</think>`. In other messages they stay text, so that nobody can end a turn or
        speak as the system from inside a message. By default transformers makes them ids there,
        too; `specials_in_messages=True` does the same. Messages without such a name have the same
        ids in both cases. Added tokens that are not called special count as special if the template
        writes them, as DeepSeek's `<｜User｜>`.

        An assistant's tokens are those that overlap the template's `{% generation %}` blocks. In a
        template without such blocks two texts are compared: the turns before with the generation
        prompt, and the turns up to the assistant's. The assistant's tokens follow their common
        beginning. An end-of-turn token is one of them if the template writes it in that turn.
        A turn whose `weight` is 0, as OpenAI's records have it, counts as none of the assistant's.

        Args:
            messages, add_generation_prompt, continue_final_message, tools, any_order, variables: as
                `text`.
            specials_in_messages: read the names of special tokens in messages as those tokens.
            assistant_mask: find the assistant's tokens.
        Raises: ValueError as `text`, or when the mask is asked for and the template, without
            `{% generation %}`, writes earlier turns in another way when later ones follow.
        """
        messages = self._checked(messages, any_order)
        values = self.values(variables, tools)
        if assistant_mask and continue_final_message:
            raise ValueError(
                "assistant_mask=True is for whole messages; leave out continue_final_message"
            )

        # Names of tokens are quoted where neither the template nor an assistant wrote them.
        if not specials_in_messages:
            messages = [m if m["role"] == "assistant" else self._quoted(m) for m in messages]
            values = self._quoted(values)

        with limits():
            text, spans = self._ended(
                messages, values, add_generation_prompt, continue_final_message
            )
            if assistant_mask and not self.marks_assistant:
                spans = self._spans_by_prefix(messages, text, values)
        if assistant_mask:
            spans = _with_weight(spans, messages)

        # Spans are in characters; a token is the assistant's if it has one of these.
        encode = self.tokenizer.encode_with_specials if specials_in_messages else self._encode
        ids, characters = encode(text)
        return Rendered(ids, _overlaps(characters, spans if assistant_mask else []))

    def _checked(self, messages: Sequence[Message], any_order: bool) -> list[Message]:
        """Check messages: roles that the template knows, in the order that chats have.

        A template that checks the order itself, with `raise_exception`, is left to do so.
        """
        if any_order:
            return check_messages(messages)
        return check_messages(
            messages,
            knows=lambda role: self.writes_role or self.names(role),
            ordered="raise_exception" not in self.source,
        )

    def values(self, variables: dict[str, Any], tools: Any = None) -> dict[str, Any]:
        """Return what the template reads beside messages, as plain data.

        Raises: ValueError for what it never reads.
        """
        for name in variables.keys() - self.variables:
            raise ValueError(
                f"{name}={variables[name]!r} is no variable of the chat "
                f"template{did_you_mean(name, self.variables)}; "
                f"it reads {', '.join(sorted(self.variables)) or 'none'}"
            )
        return plain_data({"documents": None, "tools": tools} | variables, "tools and variables")

    def _ended(
        self, messages: list[Message], values: Any, prompt: bool, open_end: bool
    ) -> tuple[str, Spans]:
        """Run the template.

        Args: prompt: add the generation prompt; open_end: as `continue_final_message`.
        Source: transformers, `render_jinja_template`.
        """
        if not open_end:
            return self._run(messages, prompt, values)
        if prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt are both given; choose one"
            )

        # A tag marks the end of the last content. The template may cut the space at its end.
        last, content = _tagged(messages[-1])
        text, _ = self._run([*messages[:-1], last], False, values)
        end = text.rfind(_TAG.rstrip())
        if end < 0 or content.strip() not in text:
            raise ValueError(
                "continue_final_message: the chat template does not write the whole of the last "
                "message"
            )
        if text.startswith(_TAG, end):
            return text[:end], []
        return text[:end].rstrip(), []

    def _run(
        self, messages: list[Message], add_generation_prompt: bool, values: dict[str, Any]
    ) -> tuple[str, Spans]:
        """Run the template. Returns: (text, the characters of its generation blocks)."""
        values = (
            self.special_tokens
            | values
            | {"messages": messages, "add_generation_prompt": add_generation_prompt}
        )
        found = ask(self.source, values)
        return found["text"], [(start, end) for start, end in found["spans"]]

    def names(self, role: str) -> bool:
        """Say whether the template has a text that is this role."""
        return re.search(rf"""(["']){re.escape(role)}\1""", self.source) is not None

    def _spans_by_prefix(self, messages: list[Message], text: str, values: Any) -> Spans:
        """Find the assistant's turns by comparing texts, which takes quadratic time."""
        if len(messages) > _MAX_COMPARED:
            raise ValueError(
                f"{len(messages):,} messages are more than the {_MAX_COMPARED} that a chat "
                "template without {% generation %} blocks may have in training"
            )
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # The turns before, these with the generation prompt, and these with the turn.
            before, prompt = (
                self._run(messages[:i], asked, values)[0] if i else "" for asked in (False, True)
            )
            after = self._run(messages[: i + 1], False, values)[0]
            if not (
                prompt.startswith(before) and after.startswith(before) and text.startswith(after)
            ):
                raise ValueError(
                    f"message {i}: the chat template writes the assistant's turn in another way "
                    "when later turns follow, and has no {% generation %} block that would mark it"
                )
            # A generation prompt may also open a thought, which the turn then does not have.
            spans.append((len(os.path.commonprefix([prompt, after])), len(after)))
        return spans

    def _quoted(self, value: Any) -> Any:
        """A copy with private characters around the names of tokens that the template writes."""
        if isinstance(value, str):
            parts = self._control_name.split(value.replace(_OPEN, "").replace(_CLOSE, ""))
            return "".join(
                f"{_OPEN}{part}{_CLOSE}" if i % 2 else part for i, part in enumerate(parts)
            )
        if isinstance(value, dict):
            # A template finds objects' parts by names; other keys are text, as in a tool's schema.
            return {
                key if key.isidentifier() else self._quoted(key): self._quoted(item)
                for key, item in value.items()
            }
        return [self._quoted(item) for item in value] if isinstance(value, list) else value

    def _encode(self, text: str) -> tuple[list[int], Spans]:
        """Encode a text.

        Names between private characters stay text; spans count the private characters, too.
        """
        if _OPEN not in text and _CLOSE not in text:
            return self.tokenizer.encode_with_specials(text)

        ids: list[int] = []
        spans: Spans = []
        start = 0  # of the part
        # A template that cuts strings may leave one private character of a pair alone. It is
        # dropped.
        for part in re.split(f"({_OPEN}[^{_OPEN}{_CLOSE}]*{_CLOSE}|[{_OPEN}{_CLOSE}])", text):
            name = part.removeprefix(_OPEN).removesuffix(_CLOSE)
            if name:
                new, characters = self._encode_part(name, part != name, first=not ids)
                ids += new
                spans += [(start + a, start + b) for a, b in characters]
            start += len(part)
        return ids, spans

    def _encode_part(self, text: str, quoted: bool, first: bool) -> tuple[list[int], Spans]:
        """Encode a part of a text; only before its first one may a tokenizer put a space."""
        # after a line's end a tokenizer puts no space
        head = "" if first or not self.tokenizer.puts_space_before else "\n"

        if quoted:
            skip = len(self.tokenizer.encode_plain(head))
            ids = self.tokenizer.encode_plain(head + text)
            if self.tokenizer.added.get(text) in ids:
                raise ValueError(
                    f"the tokenizer cannot write {text!r} as text; take it out of the message"
                )
            # The name's characters come after the first private one.
            return ids[skip:], [(1, 1 + len(text))] * len(ids[skip:])

        skip = len(self.tokenizer.encode_with_specials(head)[0])
        ids, spans = self.tokenizer.encode_with_specials(head + text)
        return ids[skip:], [(a - len(head), b - len(head)) for a, b in spans[skip:]]


def _with_weight(spans: Spans, messages: list[Message]) -> Spans:
    """The spans of assistant's turns, but for those of weight 0.

    Source: OpenAI's guide to fine-tuning, "multi-turn chat examples".
    """
    weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
    if all(weight == 1 for weight in weights):
        return spans
    if len(spans) != len(weights) or any(weight not in (0, 1) for weight in weights):
        raise ValueError(
            f"weight={weights!r:.60} of the assistant's messages must be 0 or 1 for each of the "
            f"{len(spans)} that the chat template marks"
        )
    return list(itertools.compress(spans, weights))


def _tagged(message: Message) -> tuple[Message, str]:
    """Put _TAG after the last text of a message. Returns: (a copy of the message, that text)."""
    value = message.get("content")
    parts = value if isinstance(value, list) else [{"text": value}]
    last = next(
        (p for p in reversed(parts) if isinstance(p, dict) and isinstance(p.get("text"), str)), None
    )
    if last is None:
        raise ValueError("continue_final_message: the last message has no content that is text")

    # The content keeps its form: a text, or a list with one part in place of another.
    tagged = {**last, "text": last["text"] + _TAG}
    open_end = (
        tagged["text"] if isinstance(value, str) else [tagged if p is last else p for p in parts]
    )
    return message | {"content": open_end}, last["text"]


def _overlaps(characters: Spans, spans: Spans) -> list[bool]:
    """Say which tokens overlap one of `spans`. Both are in order, so that one pass is enough."""
    mask = [False] * len(characters)
    at = 0
    for i, (start, end) in enumerate(characters):
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        mask[i] = at < len(spans) and end > spans[at][0]
    return mask
