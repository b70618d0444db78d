"""`dsv3 serve MODEL`: OpenAI's interface, and a page that shows what happens inside."""

import math
import socket
from dataclasses import dataclass
from typing import Any

from dsv3_jax.cli.common import parse
from dsv3_jax.cli.generate import Decode, decode_config, load_with_draft, show_kernels


@dataclass
class Serve(Decode):
    """Serve a model: OpenAI's interface at /v1, and at / a page to talk with it and look inside.

    It listens on this machine alone and asks for no key. temperature, top_k and top_p are for
    requests that say nothing; the first request without a seed has --seed, and each later one the
    next. Ctrl-C stops it.
    """

    host: str = "127.0.0.1"
    """address to listen on; with another one, whoever reaches it may use the model"""
    port: int = 8000
    """port to listen on; 0 takes a free one"""
    rows: int = 16
    """texts that decode at once"""
    context: int | None = None
    """tokens of a prompt with its answer, at most; None means the model's, at most 4096"""
    queue: int = 256
    """texts that decode or wait for a row, at most"""
    timeout: float = 600.0
    """seconds that a request may take"""
    name: str | None = None
    """the model's name for clients; None means the folder's"""


def run(argv: list[str]) -> int:
    """Serve until a signal comes."""
    args = parse(Serve, argv, "serve")
    if not (math.isfinite(args.timeout) and args.timeout > 0):
        raise ValueError(f"timeout={args.timeout} is not a number of seconds above 0")
    if args.queue < 1:
        raise ValueError(f"queue={args.queue} is not an int of 1 or above")

    try:
        import uvicorn

        from dsv3_jax.serve.app import Service
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ValueError(
            f"dsv3 serve needs the package {error.name!r}, which is not installed: pip install "
            "starlette uvicorn"
        ) from error
    from dsv3_jax.runs.open_model import load_text
    from dsv3_jax.serve.engine import Engine
    from dsv3_jax.serve.requests import Settings

    # All that is cheap to refuse comes before the weights.
    text = load_text(args.model)
    listening = _listen(args.host, args.port)
    name = args.name or args.model.resolve().name
    model, draft = load_with_draft(args, text)
    config = decode_config(args, text, draft, 1)
    config.check(model.cfg, [[text.stop_ids[0]]])
    show_kernels(model)

    # A thread decodes for all requests; the service turns them into texts and back.
    engine = Engine(
        model,
        stop_tokens=text.stop_ids,
        rows=args.rows,
        context=args.context,
        draft=config.draft,
        draft_length=config.draft_length,
        cache=config.cache,
        cache_dtype=config.cache_dtype,
        queue=args.queue,
    )
    settings = Settings(text, model.cfg.vocab_size, engine.context, config.sampling)
    service = Service(
        engine, settings, name=name, host=args.host, timeout=args.timeout, seed=args.seed
    )

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: Any = None) -> None:
            service.stop()
            await super().shutdown(sockets)

    how = uvicorn.Config(
        service.app, http="h11", loop="asyncio", ws="none", lifespan="off", log_level="warning",
        access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=5,
    )  # fmt: skip

    # Where it listens; then until a signal ends it.
    place = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{place}:{listening.getsockname()[1]}"
    print(f"{name} at {address} (OpenAI's interface: {address}/v1); Ctrl-C stops", flush=True)
    try:
        Server(how).run([listening])  # it raises the signal again that ended it
    finally:
        engine.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """Open the socket. Raises: ValueError where nobody can listen, as on a port in use."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port={port} is not within [0, 65535]")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise ValueError(f"port={port} of host={host!r} is not free: {error.strerror}") from error
