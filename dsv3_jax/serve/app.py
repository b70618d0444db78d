"""`dsv3 serve` over HTTP: OpenAI's routes, those of the page, server-sent events, and errors."""

import asyncio
import base64
import hashlib
import itertools
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dsv3_jax.decoding.decode_config import NotFinite
from dsv3_jax.report.units import printable
from dsv3_jax.serve import answers, requests
from dsv3_jax.serve.answers import Answer, Piece, Spelling
from dsv3_jax.serve.engine import Busy, Engine
from dsv3_jax.serve.requests import Request, Settings

PAGE = Path(__file__).parent / "page.html"
MAX_BODY = 4_000_000  # bytes
_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


@dataclass
class Service:
    """The routes of an engine, as the ASGI application `app`."""

    engine: Engine
    settings: Settings
    name: str  # of the model, as clients see it
    host: str = "127.0.0.1"  # that this server listens on
    # seconds that a request may take: then its text ends, or it gets an error if none has begun
    timeout: float = 600.0
    seed: int = 0  # of the first request that gives none; the next one has the next

    def __post_init__(self) -> None:
        self._seeds = itertools.count(self.seed)
        self._spelling = Spelling(self.settings.text)
        self._running: set[asyncio.Task[None]] = set()  # one for each request
        self._page = _page_of(PAGE.read_text(encoding="utf-8"))
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/health", self.health),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.model),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/glass/model", self.describe),
                Route("/glass/read", self.read, methods=["POST"]),
            ],
            middleware=[Middleware(_OwnHost, host=self.host)],
            exception_handlers=dict.fromkeys((*_EXPECTED, Exception), _failed),
        )

    def stop(self) -> None:
        """End the requests that run, for which a server that stops would wait."""
        for work in self._running:
            work.cancel()

    async def page(self, http: HTTPRequest) -> Response:
        return self._page

    async def health(self, http: HTTPRequest) -> Response:
        """Say that the server answers, as load balancers ask."""
        return JSONResponse({"status": "ok"})

    async def models(self, http: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: HTTPRequest) -> Response:
        if http.path_params["name"] != self.name:
            raise HTTPException(404)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "dsv3"}

    async def describe(self, http: HTTPRequest) -> Response:
        chat = self.settings.text.template is not None
        own = {"name": self.name, "chat": chat, "sampling": self.settings.sampling._asdict()}
        return JSONResponse(self.engine.describe() | own)

    async def read(self, http: HTTPRequest) -> Response:
        async with asyncio.timeout(self.timeout):
            data = await _body_of(http)
            with _refusals():
                asked = await run_in_threadpool(requests.read_reading, data, self.settings)
                found = await self.engine.read(asked.ids, asked.forced, asked.changes)
        tokens = self._spelling.read(asked.ids, found)
        experts = {
            "experts": answers.listed(found.expert_ids),
            "gates": answers.listed(found.gates),
        }
        return JSONResponse({"tokens": tokens} | experts)

    async def complete(self, http: HTTPRequest) -> Response:
        return await self._answer(requests.Completion, http)

    async def chat(self, http: HTTPRequest) -> Response:
        return await self._answer(requests.ChatCompletion, http)

    async def _answer(self, kind: type[Any], http: HTTPRequest) -> Response:
        deadline = asyncio.get_running_loop().time() + self.timeout
        async with asyncio.timeout_at(deadline):
            data = await _body_of(http)
            # A template or a long text takes a while: other requests go on.
            read = partial(requests.read_request, data, kind, self.settings, self._seeds)
            with _refusals():
                request = await run_in_threadpool(read)

        asked = request.asked
        pieces = self._pieces(request, http, deadline)
        head: dict[str, Any] = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if asked.chat else "text_completion",
            "created": int(time.time()),
            "model": self.name,
        }

        # As events, of which the first is waited for.
        if asked.stream:
            first = await anext(pieces)  # an error before it has its own status
            head["object"] += ".chunk" if asked.chat else ""
            events = self._events(request, head, first, pieces)
            return StreamingResponse(events, headers=_HEADERS, media_type="text/event-stream")

        # Or whole, once all choices have ended.
        found = [piece async for piece in pieces]
        choices = [
            answers.choice_of(piece, request, self._spelling) for piece in answers.joined(found)
        ]
        usage = _usage(request, sum(piece.new for piece in found))
        return JSONResponse(head | {"choices": choices, "usage": usage})

    async def _events(
        self,
        request: Request,
        head: dict[str, Any],
        first: Piece,
        pieces: AsyncGenerator[Piece, None],
    ) -> AsyncGenerator[str, None]:
        """Yield the server-sent events of a stream."""
        # The status is sent already: an error later is an event of its own.
        new = 0
        piece: Piece | None = first
        async with aclosing(pieces):
            try:
                while piece is not None:
                    new += piece.new
                    choice = answers.choice_of(piece, request, self._spelling)
                    glass = {"glass": piece.glass} if piece.glass else {}
                    yield _event(head | {"choices": [choice]} | glass)
                    piece = await anext(pieces, None)
            except Exception as error:
                yield _event(_problem(error)[1])
                if isinstance(error, _EXPECTED):
                    return
                raise

        if request.asked.stream_options.include_usage:
            yield _event(head | {"choices": [], "usage": _usage(request, new)})
        yield "data: [DONE]\n\n"

    async def _pieces(
        self, request: Request, http: HTTPRequest, deadline: float
    ) -> AsyncGenerator[Piece, None]:
        """Yield what the choices add, as it comes.

        All of them end when it is closed, when one of them fails, and when the client is gone.
        """
        queue: asyncio.Queue[Piece | None] = asyncio.Queue()

        async def run() -> None:
            async with asyncio.TaskGroup() as group:
                for choice in range(len(request.asks)):
                    group.create_task(self._choice(request, choice, deadline, queue.put_nowait))

        # The choices run beside this; a client that vanishes ends them.
        work = asyncio.create_task(run())
        self._running.add(work)
        work.add_done_callback(self._running.discard)
        work.add_done_callback(lambda _: queue.put_nowait(None))
        gone = asyncio.create_task(_disconnected(http))
        gone.add_done_callback(lambda _: work.cancel())

        # None says that all of them have ended, or that one of them failed.
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            if work.cancelled():
                raise ClientDisconnect if gone.done() else HTTPException(503, "the server stops")
            if isinstance(failed := work.exception(), ExceptionGroup):
                raise failed.exceptions[0]
        finally:
            gone.cancel()

    async def _choice(
        self, request: Request, choice: int, deadline: float, send: Callable[[Piece], None]
    ) -> None:
        """Send the pieces of a choice; the last one says why it ends."""
        ask = request.asks[choice]
        changes, forced = request.asked.glass.changes, request.asked.glass.forced
        answer = Answer(request, choice, self._spelling)
        try:
            async with asyncio.timeout_at(deadline):
                # The prompt comes first, if it is asked for.
                read = None
                if request.asked.echo:
                    if request.asked.alternatives is not None:
                        with _refusals():
                            read = await self.engine.read(ask.prompt, forced, changes)
                    send(answer.echo(read))

                # A score asks for one token more than it needs, which is known once it was read.
                if read and ask.max_new_tokens == 1 and ask.sampling.temperature == 0:
                    return send(answer.add(answers.likeliest_next(read)))
                if ask.max_new_tokens == 0:
                    return send(answer.end())

                # A pass of its own finds whose places the forced experts take.
                if forced:
                    with _refusals():
                        given = await self.engine.forced_ids(ask.prompt, forced, changes)
                    ask = ask._replace(given=given)

                # New tokens, until the model, a stop string or the length ends them.
                async with aclosing(self.engine.text(ask, changes)) as parts:
                    while True:
                        with _refusals():
                            new = await anext(parts)
                        piece = answer.add(new)
                        send(piece)
                        if piece.finish_reason:
                            return
        except TimeoutError:
            if not answer.count:
                raise
            send(answer.end())


class _OwnHost:
    """Refuse requests for another host.

    A page elsewhere could give its own name this machine's address, and then ask as if it came from
    here.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app = app
        self.names = {"127.0.0.1", "localhost", "::1", host.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Headers(scope=scope).get("host", "").lower()
        name = re.sub(r":\d*$", "", asked).removeprefix("[").removesuffix("]")
        own = scope.get("server") or ("",)  # the address at which the connection came in
        if name in self.names or name == own[0]:
            await self.app(scope, receive, send)
        else:
            refusal = HTTPException(421, f"host={asked!r:.80} is not the name of this server")
            await _failed(None, refusal)(scope, receive, send)


# Errors

_MEANING = {
    Busy: (429, ""),  # it says itself of what there is too much
    NotFinite: (500, ""),
    ClientDisconnect: (499, "the client is gone"),
    TimeoutError: (503, "the time of a request was over before its first token; see --timeout"),
}
_EXPECTED = (HTTPException, Busy, NotFinite, ClientDisconnect, TimeoutError)


@contextmanager
def _refusals() -> Iterator[None]:
    """Answer a ValueError as a bad request: elsewhere it is a fault of ours."""
    try:
        yield
    except NotFinite:
        raise
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _failed(http: HTTPRequest | None, error: Exception) -> Response:
    status, body = _problem(error)
    if http and status in (404, 405):
        body["error"]["message"] = f"{http.method} {http.url.path!r:.80} is not served"
    return JSONResponse(body, status, {"retry-after": "1"} if status == 429 else None)


def _problem(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status of an error, and OpenAI's form of it."""
    fault = (500, f"the server has a fault, {type(error).__name__}; see its output")
    status, said = _MEANING.get(type(error), fault)
    if isinstance(error, HTTPException):
        status, said = error.status_code, error.detail
    said = printable(" ".join((said or str(error)).split()))[:480]
    # A sentence about a field begins with its name.
    field = re.match(r"'?(\w+)(?=[=']| \d)", said) if status == 400 else None
    found = {
        "message": said,
        "type": "invalid_request_error" if status < 500 else "server_error",
        "param": field and field[1],
        "code": None,
    }
    return status, {"error": found}


async def _body_of(http: HTTPRequest) -> bytes:
    """Read a body. What is too long is read and dropped, else its sender misses the answer."""
    data = bytearray()
    async for part in http.stream():
        data += part[: MAX_BODY + 1 - len(data)]
    if len(data) > MAX_BODY:
        raise HTTPException(413, f"the body has more than {MAX_BODY:,} bytes")

    # A page elsewhere may post forms and texts without being allowed to, but no JSON.
    kind = http.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        problem = f"content-type={kind!r:.80} is not application/json; send that header"
        raise HTTPException(415, problem)
    return bytes(data)


async def _disconnected(http: HTTPRequest) -> None:
    """Return when the client has closed the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"


def _usage(request: Request, count: int) -> dict[str, int]:
    """Count tokens. A prompt counts once, however many samples it has."""
    prompts = sum(len(ask.prompt) for ask in request.asks[:: request.asked.n])
    return {"prompt_tokens": prompts, "completion_tokens": count, "total_tokens": prompts + count}


def _page_of(html: str) -> Response:
    """The page. Its policy allows its own script and style, by their hashes, and nothing else."""
    policy = "default-src 'none'; connect-src 'self'; img-src data:; frame-ancestors 'none'"
    for tag in ("script", "style"):
        for part in re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
            policy += f"; {tag}-src 'sha256-{digest}'"
    return HTMLResponse(html, headers=_HEADERS | {"content-security-policy": policy})
