"""What serving costs: requests over the loopback beside `ds.generate`, in one process."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import median

import uvicorn
from flax import nnx

import dsv3_jax as ds
from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.ops.sampling import GREEDY
from dsv3_jax.serve.app import Service
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.requests import Settings
from experiments.bench.harness import Rows, in_turns, ratio
from experiments.bench.worker import draw_tokens


def serving(
    name: str = "mini", prompt: int = 24, new: int = 256, rows: int = 16, rounds: int = 7
) -> Rows:
    """What does a server add to generate, and what do 16 texts at once gain?"""
    cfg = ds.recipe(name).model
    model = ds.Transformer(cfg, rngs=nnx.Rngs(0))
    prompts = [ids.tolist() for ids in draw_tokens(rows, prompt, cfg.vocab_size)]

    def generate(count: int) -> float:
        start = time.perf_counter()
        ds.generate(model, prompts[:1], count)
        return time.perf_counter() - start

    with served(model, rows, prompt + new) as ask:
        sides: dict[str, Callable[[], float]] = {
            "generate": partial(generate, new),
            "generate, one token": partial(generate, 1),
            "served": lambda: ask(prompts[:1], new)[1],
            "served, first token": lambda: ask(prompts[:1], new)[0],
            f"served, {rows} at once": lambda: ask(prompts, new)[1],
        }
        times = in_turns(sides, rounds)

    base = times["generate"]
    for side, found in times.items():
        row = {"ms": 1e3 * median(found), "over_generate": ratio(found, base)}
        if "token" not in side:
            tokens = new * (rows if "at once" in side else 1)
            row |= {"tokens_per_s": tokens / median(found)}
        yield side, row


@contextmanager
def served(model: ds.Transformer, rows: int, context: int):
    """Serve a model on a free port.

    Gives a function: (prompts, new) → seconds to the first token of any, and to the last.
    """
    engine = Engine(model, stop_tokens=(), rows=rows, context=context)
    settings = Settings(plain_settings(), model.cfg.vocab_size, engine.context, GREEDY)
    service = Service(engine, settings, name="bench")
    server = uvicorn.Server(
        uvicorn.Config(service.app, port=0, log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    def one(prompt: list[int], new: int) -> tuple[float, float]:
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0.0, "stream": True}
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.readline()
        first = time.perf_counter() - start
        response.read()
        connection.close()
        return first, time.perf_counter() - start

    def ask(prompts: list[list[int]], new: int) -> tuple[float, float]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            times = list(pool.map(lambda prompt: one(prompt, new), prompts))
        return min(first for first, _ in times), max(last for _, last in times)

    try:
        yield ask
    finally:
        server.should_exit = True
        thread.join()
        engine.close()
