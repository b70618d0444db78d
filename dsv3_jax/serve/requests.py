"""Bodies of requests, checked: what is asked of the engine, in tokens.

Source: OpenAI's API reference, "Completions" and "Chat completions".
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.config import fields
from dsv3_jax.config.fields import Natural, NonNegative, Positive, Seed, require
from dsv3_jax.decoding.decode_config import check_tokens
from dsv3_jax.decoding.sampler import Ask
from dsv3_jax.host.files import parse_json
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.serve.engine import Changes

MAX_CHOICES = 128  # texts of a request
USUAL_TOKENS = 16  # of a completion without max_tokens, as OpenAI has it
# Fields that may hold any characters are read apart: `check_fields` is for texts of one line.
_FREE = ("model", "user", "stop", "logit_bias", "prompt", "messages")
_Few = Annotated[int, "[0, 5]"]


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


class Settings(NamedTuple):
    """What requests are read with."""

    text: TextSettings
    vocab_size: int
    context: int  # tokens of a prompt with its answer, at most
    sampling: Sampling  # where a request says nothing


@dataclass(frozen=True)
class _Fields:
    """An object of a body. Raises: ConfigError for a value of another type or out of bounds."""

    def __post_init__(self) -> None:
        fields.check_fields(self)


@dataclass(frozen=True)
class Glass(_Fields):
    """Changes of the model, which the page asks for."""

    off: tuple = ()  # of [layer, expert]
    bias: bool = True
    forced: tuple = ()  # of [position, layer, expert]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rows, what in (
            ("off", self.off, ["layer", "expert"]),
            ("forced", self.forced, ["position", "layer", "expert"]),
        ):
            right = all(
                isinstance(row, list) and len(row) == len(what) and all(map(_is_index, row))
                for row in rows
            )
            require(right, f"{name}={rows!r:.80} is not a list of [{', '.join(what)}]")

    @property
    def changes(self) -> Changes:
        """What is changed for a whole text."""
        return Changes(tuple(map(tuple, self.off)), self.bias)


@dataclass(frozen=True)
class Reading(Glass):
    """A request of /glass/read."""

    ids: tuple = ()


@dataclass(frozen=True)
class StreamOptions(_Fields):
    """Options of a stream."""

    include_usage: bool = False


NO_GLASS = Glass()


@dataclass(frozen=True)
class _Both(_Fields):
    """Fields of both kinds of requests."""

    model: None = None
    user: None = None
    stop: None = None
    logit_bias: None = None
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    n: Annotated[int, "[1, 128]"] = 1
    seed: Seed | None = None
    temperature: NonNegative | None = None
    top_p: Annotated[float, "(0, 1]"] | None = None
    top_k: Positive | None = None
    max_tokens: Natural | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    glass: Glass = NO_GLASS


@dataclass(frozen=True)
class Completion(_Both):
    """A body of /v1/completions."""

    chat: ClassVar = False
    prompt: None = None
    logprobs: _Few | None = None
    echo: bool = False

    @property
    def alternatives(self) -> int | None:
        """Number of likeliest tokens that are listed for each; None means no log p at all."""
        return self.logprobs


@dataclass(frozen=True)
class ChatCompletion(_Both):
    """A body of /v1/chat/completions."""

    chat: ClassVar = True
    echo: ClassVar = False
    messages: None = None
    max_completion_tokens: Natural | None = None
    logprobs: bool = False
    top_logprobs: _Few = 0
    # Clients send it beside no tools, too. Without `tools` no answer holds a call, let alone two.
    parallel_tool_calls: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        told = self.logprobs or self.top_logprobs == 0
        require(told, f"top_logprobs={self.top_logprobs} needs logprobs=true")

    @property
    def alternatives(self) -> int | None:
        """As of `Completion`."""
        return self.top_logprobs if self.logprobs else None


class Request(NamedTuple):
    """A request that can be asked of the engine."""

    asked: Completion | ChatCompletion
    stop: list[str]  # an answer ends before the first of them
    asks: list[Ask]  # a choice each: those of the first prompt, then those of the second


def read_request(data: bytes, kind: type[Any], settings: Settings, seeds: Iterator[int]) -> Request:
    """Read the body of a `Completion` or `ChatCompletion`.

    Args: seeds: a request that gives none takes the next one.
    Raises: ValueError, one sentence that begins with a field's name if one is at fault.
    """
    body = _object(data)
    free = {name: body[name] for name in _FREE if name in body}
    asked = fields.from_dict(kind, body | dict.fromkeys(free))
    require(not free.get("logit_bias"), f"logit_bias={free.get('logit_bias')!r:.80} is not empty")
    stop = free.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    right = isinstance(stops, list) and len(stops) <= 4
    right = right and all(isinstance(text, str) and 1 <= len(text) <= 256 for text in stops)
    require(right, f"stop={stop!r:.80} is not a text, or up to 4, of 1 to 256 characters")

    prompts = _prompts(free, asked.chat, settings)
    texts = asked.n * len(prompts)
    require(texts <= MAX_CHOICES, f"n={asked.n} makes {texts} texts, more than {MAX_CHOICES}")
    given = {name: getattr(asked, name) for name in Sampling._fields if name in body}
    sampling = settings.sampling._replace(**given)
    lengths = [_length(asked, len(ids), settings) for ids in prompts]

    # All that may be refused is checked: a request that is refused takes no seed.
    seed = next(seeds) % (1 << 32) if asked.seed is None else asked.seed
    # As in `generate`, a prompt that occurs again has the next samples.
    count = Counter[tuple[int, ...]]()
    asks = []
    for ids, most in zip(map(tuple, prompts), lengths, strict=True):
        asks += [Ask(ids, most, sampling, seed, count[ids] + i) for i in range(asked.n)]
        count[ids] += asked.n
    return Request(asked, stops, asks)


def read_reading(data: bytes, settings: Settings) -> Reading:
    """Read a request of /glass/read. Raises: ValueError as `read_request`."""
    reading = fields.from_dict(Reading, _object(data))
    check_tokens("ids", reading.ids, settings.vocab_size)
    return reading


def _object(data: bytes) -> dict[str, Any]:
    """The fields of a body. One that is null is left out."""
    try:
        body = parse_json(data)
    except ValueError as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    require(isinstance(body, dict), "the body is not a JSON object")
    return {name: value for name, value in body.items() if value is not None}


def _prompts(free: dict[str, Any], chat: bool, settings: Settings) -> list[list[int]]:
    """The ids of a conversation; or of a text, of several, of ids, or of several lists of ids."""
    text = settings.text
    if chat:
        messages = free.get("messages", [])
        if isinstance(messages, list):
            messages = [_with_one_text(message) for message in messages]
        return [text.chat.render(messages, add_generation_prompt=True).ids]
    prompt: Any = free.get("prompt")
    many = isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt)
    parts = prompt if many else [prompt]
    prompts = [text.encode(part) if isinstance(part, str) else part for part in parts]
    for i, ids in enumerate(prompts):
        check_tokens(f"prompt {i}", ids, settings.vocab_size)
    return prompts


def _with_one_text(message: Any) -> Any:
    """A message; a content that is a list of texts, as OpenAI's clients may send it, is joined.

    Few chat templates read such lists. The texts are lines, as in vLLM.
    """
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return message
    for part in parts:
        right = isinstance(part, dict) and part.get("type") == "text"
        right = right and isinstance(part.get("text"), str)
        require(right, f"content={part!r:.80} is not {{'type': 'text', 'text': …}}")
    return message | {"content": "\n".join(part["text"] for part in parts)}


def _length(asked: Any, prompt: int, settings: Settings) -> int:
    """Return the number of new tokens, at most, after a prompt of `prompt` tokens."""
    room = settings.context - prompt
    usual = max(1, room if asked.chat else min(room, USUAL_TOKENS))
    given = getattr(asked, "max_completion_tokens", None)
    given = asked.max_tokens if given is None else given
    most = usual if given is None else given
    require(
        most <= room,
        f"max_tokens={most} after a prompt of {prompt} tokens is beyond the context of "
        f"{settings.context}",
    )
    require(most > 0 or asked.echo, "max_tokens=0 asks for no text; with echo it scores a prompt")
    return most
