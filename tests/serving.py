"""A server of `dsv3 serve` in this process, for tests."""

import contextlib
import threading
import time

import uvicorn

from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.serve import app, requests
from dsv3_jax.serve.engine import Engine

TEXT = plain_settings()


@contextlib.contextmanager
def served(engine, **options):
    """The address of a server on a free port of the loopback, and its Service."""
    settings = requests.Settings(TEXT, 260, engine.context, Sampling())
    service = app.Service(engine, settings, name="tiny", **options)
    how = {"log_level": "critical", "ws": "none", "lifespan": "off", "loop": "asyncio"}
    how |= {"http": "h11", "timeout_graceful_shutdown": 5}
    server = uvicorn.Server(uvicorn.Config(service.app, port=0, **how))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def served_model(model, **options):
    """What `served` gives, of an engine of this model."""
    engine = Engine(model, stop_tokens=TEXT.stop_ids, **options)
    with contextlib.closing(engine), served(engine) as found:
        yield found


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
