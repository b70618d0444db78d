"""Answers: text up to a stop string, log p of tokens in OpenAI's forms, and what the page shows."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.chat.text_settings import TextSettings
from dsv3_jax.decoding.likelihood import Read
from dsv3_jax.decoding.sampler import New
from dsv3_jax.serve.requests import NO_GLASS, Request

LEAST = -9999.0  # OpenAI's log p of what is all but impossible; JSON has no infinity
Others = Sequence[tuple[int, float]]  # the likeliest tokens with log p, best first


class Piece(NamedTuple):
    """What new tokens add to a choice."""

    choice: int
    begins: bool  # it is the first of its choice
    text: str
    tokens: list[dict[str, Any]]  # of `Spelling.told`: those that begin in the text
    new: int = 0  # number of new tokens
    finish_reason: str | None = None
    glass: dict[str, Any] | None = None


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Join the pieces of each choice, in the order of the choices."""
    choice = attrgetter("choice")
    for _, group in groupby(sorted(pieces, key=choice), choice):
        own = list(group)
        tokens = [told for piece in own for told in piece.tokens]
        text = "".join(piece.text for piece in own)
        yield own[-1]._replace(begins=True, text=text, tokens=tokens)


class Spelling:
    """How single tokens are written."""

    def __init__(self, text: TextSettings):
        self.bytes_of = text.tokenizer.bytes_of
        self.stop_ids = frozenset(text.stop_ids)
        self._names = {token: name for name, token in text.tokenizer.specials.items()}

    def alone(self, token: int) -> str:
        r"""Write a token: a special one by its name, and bytes that are no UTF-8 alone as \xHH.

        Example:
            >>> from dsv3_jax.chat.text_settings import plain_settings
            >>> [Spelling(plain_settings()).alone(token) for token in (104, 195, 256)]
            ['h', '\\xc3', '<eos>']
        """
        name = self._names.get(token)
        return name or self.bytes_of([token]).decode("utf-8", "backslashreplace")

    def told(self, token: int, logprob: float | None, others: Others) -> dict[str, Any]:
        """A token with its log p, None for the first of a text, and the likeliest ones.

        A token among the likeliest has the log p that it has there, so that the two are equal.
        """
        logprob = dict(others).get(token, logprob)
        return {
            "id": token,
            "text": self.alone(token),
            "logprob": None if logprob is None else max(LEAST, logprob),
            "alternatives": [[i, self.alone(i), max(LEAST, nats)] for i, nats in others],
        }

    def read(self, ids: Sequence[int], read: Read) -> list[dict[str, Any]]:
        """Each token of a text that was read."""
        rows = zip(ids, [None, *read.logprobs], [[], *read.alternatives[:-1]], strict=True)
        return [self.told(*row) for row in rows]


class Answer:
    """The text of a choice while it grows; what may begin a stop string is held back."""

    def __init__(self, request: Request, choice: int, spelling: Spelling):
        self.choice = choice
        self.prompt = request.asks[choice].prompt
        self.stop = request.stop
        self.shows_glass = request.asked.glass is not NO_GLASS
        self.tells = self.shows_glass or request.asked.alternatives is not None
        self.spelling = spelling
        self.count = 0  # new tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._sent = 0  # characters
        self._held = ""
        self._tokens: list[dict[str, Any]] = []  # not sent
        self._begins = True

    def echo(self, read: Read | None) -> Piece:
        """Begin with the prompt. Args: read: log p of its tokens, if they are told."""
        told = self.spelling.read(self.prompt, read) if read else [{} for _ in self.prompt]
        for token, entry in zip(self.prompt, told, strict=True):
            self._take(entry, self.spelling.bytes_of([token]))
        return self._send()

    def add(self, new: New) -> Piece:
        """Add new tokens, up to the one that completes a stop string."""
        before = self.count
        told: list[dict[str, Any]] = []
        ends = cut = False

        # The token that ends a text is sent like the others, and adds no character.
        for token, logprob, others in zip(new.tokens, new.logprobs, new.alternatives, strict=True):
            self.count += 1
            told.append(self.spelling.told(token, logprob, others) if self.tells else {})
            ends = token in self.spelling.stop_ids
            self._take(told[-1], b"" if ends else self.spelling.bytes_of([token]))
            if cut := self._cut():
                break

        glass = self._glass(new, before, told) if self.shows_glass else None

        # Until the text ends, characters that may begin a stop string are not sent.
        if not cut and not new.ended:
            return self._send(self._kept())._replace(new=len(told), glass=glass)

        # The text ends: a stop string or token is there, or it is long enough.
        piece = self._send() if cut else self.end()
        reason = "stop" if cut or ends else "length"
        return piece._replace(new=len(told), glass=glass, finish_reason=reason)

    def end(self) -> Piece:
        """End the text where it is: it is long enough, or its time is over."""
        self._held += self._decoder.decode(b"", final=True)
        return self._send()._replace(finish_reason="length")

    def _take(self, told: dict[str, Any], data: bytes) -> None:
        self._tokens.append(told | {"offset": self._sent + len(self._held)})
        self._held += self._decoder.decode(data)

    def _cut(self) -> bool:
        """Cut the text before the stop string that is complete first, if there is one."""
        starts = [(self._held.find(stop), len(stop)) for stop in self.stop]
        found = [(start + length, start) for start, length in starts if start >= 0]

        # Tokens that begin in what is cut off go with it.
        if found:
            self._held = self._held[: min(found)[1]]
            end = self._sent + len(self._held)
            self._tokens = [told for told in self._tokens if told["offset"] < end]
        return bool(found)

    def _kept(self) -> int:
        """Return how many of the last characters may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stop):
                return length
        return 0

    def _send(self, kept: int | None = None) -> Piece:
        """Send all but the last `kept` characters, and the tokens that begin in them.

        None means everything, tokens without a character too.
        """
        text = self._held[: len(self._held) - (kept or 0)]
        self._held = self._held[len(text) :]
        self._sent += len(text)
        ready = [told for told in self._tokens if kept is None or told["offset"] < self._sent]
        self._tokens = self._tokens[len(ready) :]
        begins, self._begins = self._begins, False
        return Piece(self.choice, begins, text, ready)

    def _glass(self, new: New, before: int, told: list[dict[str, Any]]) -> dict[str, Any]:
        """What the page shows: probabilities, drafts, and experts by position."""
        first = len(self.prompt) + before
        alone = self.spelling.alone

        # Each new token, and what had been drafted in its place.
        tokens = [
            entry | {"draft": {"id": draft, "text": alone(draft)} if draft >= 0 else None}
            for entry, draft in zip(told, new.drafted[: len(told)], strict=True)
        ]

        # Experts of what was read so far; a stop string may end before the last of them.
        read = max(0, first + len(told) - new.experts_from)
        ids = listed(new.expert_ids)[:read]
        experts = {"first": new.experts_from, "ids": ids}
        shown = {"first": first, "tokens": tokens, "experts": experts}

        if before == 0:
            shown["prompt"] = [{"id": token, "text": alone(token)} for token in self.prompt]
        return shown


def likeliest_next(read: Read) -> New:
    """What a sampler at temperature 0 adds to a text that was read, if one token is asked for."""
    token, logprob = read.alternatives[-1][0]
    return New([token], [logprob], read.alternatives[-1:], [-1], 0, read.expert_ids, ended=True)


def listed(array: np.ndarray | None) -> list[Any]:
    """An array of experts or gates as lists; without experts there is none."""
    return [] if array is None else array.tolist()


# OpenAI's objects


def choice_of(piece: Piece, request: Request, spelling: Spelling) -> dict[str, Any]:
    """A choice, complete or of a chunk."""
    asked = request.asked
    logprobs = None
    if asked.alternatives is not None:
        form = _chat_logprobs if asked.chat else _logprobs
        logprobs = form(piece.tokens, asked.alternatives, spelling)
    found = {"index": piece.choice, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    # A chat has messages, whose role comes with the first part; a completion has plain text.
    if not asked.chat:
        return found | {"text": piece.text}
    role = {"role": "assistant"} if piece.begins else {}
    return found | {"delta" if asked.stream else "message": role | {"content": piece.text}}


def _logprobs(tokens: list[dict[str, Any]], count: int, spelling: Spelling) -> dict[str, Any]:
    def by_text(told: dict[str, Any]) -> dict[str, float]:
        # Of two tokens with one text, the chosen one or else the likelier has it as its key.
        found = {told["text"]: told["logprob"]}
        for token, text, logprob in told["alternatives"][:count]:
            if token != told["id"]:
                found[f"token_id:{token}" if text in found else text] = logprob
        return found

    return {
        "tokens": [told["text"] for told in tokens],
        "token_logprobs": [told["logprob"] for told in tokens],
        "top_logprobs": [None if told["logprob"] is None else by_text(told) for told in tokens],
        "text_offset": [told["offset"] for told in tokens],
    }


def _chat_logprobs(tokens: list[dict[str, Any]], count: int, spelling: Spelling) -> dict[str, Any]:
    def entry(token: int, text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(spelling.bytes_of([token]))}

    content = [
        entry(told["id"], told["text"], told["logprob"])
        | {"top_logprobs": [entry(*other) for other in told["alternatives"][:count]]}
        for told in tokens
    ]
    return {"content": content, "refusal": None}
