"""Eighty requests at once, and clients that go away: answers are right, and all ends."""

import asyncio
import gc
import json
import random
import threading
import tracemalloc
from contextlib import closing
from dataclasses import replace

import httpx2
import jax.numpy as jnp
import pytest
from flax import nnx
from models import LIGHT, random_model
from serving import TEXT, served_model, wait_for

from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.sampler import Ask
from dsv3_jax.model.counting import bytes_per_token
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.serve.engine import UNCHANGED, Engine

STOP = TEXT.stop_ids
REQUESTS_CODE = [
    tracemalloc.Filter(True, pattern)
    for pattern in ("*/dsv3_jax/*", "*/uvicorn/*", "*/starlette/*", "*/asyncio/*", "*/json/*")
]
LAWS = [Sampling(), Sampling(0.8), Sampling(1.0, top_k=9), Sampling(1.2, None, 0.7)]


@pytest.fixture(scope="module")
def model():
    return random_model(replace(LIGHT, vocab_size=260), seed=4)


async def ask(address, body, parts=None):
    """The ids of a streamed text; `parts` events are read, then the client is gone."""
    url, body = f"http://{address}/v1/completions", body | {"stream": True, "glass": {}}
    client, events = httpx2.AsyncClient(timeout=90, verify=False), []
    async with client, client.stream("POST", url, json=body) as response:
        lines = response.aiter_lines()
        while len(events) != parts and (line := await anext(lines, None)) is not None:
            if line.startswith("data: "):
                events.append(line[6:])
    told = [json.loads(event)["glass"] for event in events if event != "[DONE]"]
    ids = [token["id"] for glass in told for token in glass.get("tokens", ())]
    return response.status_code, ids, "[DONE]" in events


def pool_of(model):
    """(Body, text) of 12 requests; the texts are by `generate`, of each distribution together."""
    draw = random.Random(0)
    for seed, law in enumerate(LAWS):
        settings = {k: v for k, v in law._asdict().items() if v is not None}
        prompts = [[draw.randrange(256) for _ in range(draw.randrange(1, 20))] for _ in range(3)]
        texts = generate(model, prompts, 13, seed=seed, stop_tokens=STOP, **settings).tokens
        for prompt, text, most in zip(prompts, texts, (1, 6, 13), strict=True):
            body = {"prompt": prompt, "max_tokens": most, "seed": seed, **settings}
            yield body, text[:most]


def kept_bytes():
    """What requests' own code holds. A table of JAX's programs that grows is left out."""
    gc.collect()
    traces = tracemalloc.take_snapshot().filter_traces(REQUESTS_CODE).traces
    return sum(trace.size for trace in traces)


@pytest.mark.long
def test_eighty_requests_with_clients_that_vanish(model):
    pool = list(pool_of(model))

    async def storm(address, leaves):
        asked = [ask(address, pool[i % 12][0], parts) for i, parts in enumerate(leaves)]
        return await asyncio.gather(*asked)

    with served_model(model, rows=4) as (address, service):

        def is_empty():
            engine = service.engine
            idle = all(sampler.is_idle for sampler in engine.samplers.values())
            return idle and not (engine.asked or engine.listeners or service._running)

        kept = []
        for round_ in range(3):  # the first ones compile
            # A third of the clients leave after a few events, some before any.
            draw = random.Random(round_)
            leaves = [draw.randrange(4) if draw.random() < 0.33 else None for _ in range(80)]
            answers = asyncio.run(storm(address, leaves))
            for i, ((status, ids, done), parts) in enumerate(zip(answers, leaves, strict=True)):
                want = pool[i % 12][1]
                assert status == 200 and ids == want[: len(ids)]
                assert parts is not None or (ids, done) == (want, True)

            wait_for(is_empty)  # rows of those who left are free, and nothing of a request is kept
            if not tracemalloc.is_tracing():
                tracemalloc.start()
            kept.append(kept_bytes())
        tracemalloc.stop()  # it slows all tests after this one, and their peaks would hold its own
        assert kept[2] - kept[1] < 80_000  # a kilobyte a request


@pytest.mark.long
def test_a_full_queue_is_said_and_the_next_request_is_answered(model):
    body = {"prompt": [1, 2, 3], "max_tokens": 40, "temperature": 0}

    async def three(address):
        return await asyncio.gather(*(ask(address, body) for _ in range(3)))

    with served_model(model, rows=4, queue=2) as (address, service):  # programs of the test above
        refused, *answered = sorted(asyncio.run(three(address)), key=lambda found: found[2])
        assert refused[0] == 429 and answered[0] == answered[1] and answered[0][2]
        assert asyncio.run(ask(address, body)) == answered[0] and service.engine.asked == 0
    assert answered[0][1] == generate(model, [[1, 2, 3]], 40, stop_tokens=STOP).tokens[0]


@pytest.mark.long
def test_a_text_that_is_lost_takes_no_other_with_it(model, monkeypatch):
    """Both are a sampler's first text: the other one comes while the lost one's step fails.

    Where memory has no room for another sampler, the next text has the error, and tries again.
    """
    engine = Engine(model, rows=1, context=32)
    go = threading.Event()

    def fails(part):
        go.wait(60)
        raise RuntimeError("lost")

    async def text():
        return [token async for new in engine.text(Ask((5, 6), 4)) for token in new.tokens]

    async def lose(others):
        wait_for(lambda: engine.samplers[UNCHANGED].is_idle and not engine._cold)
        go.clear()
        engine.samplers[UNCHANGED].step = fails
        lost = asyncio.create_task(text())
        await asyncio.sleep(0.2)
        tasks = [asyncio.create_task(text()) for _ in range(others)]
        await asyncio.sleep(0)  # they wait for the engine
        go.set()
        with pytest.raises(RuntimeError, match="lost"):
            await lost
        return await asyncio.wait_for(asyncio.gather(*tasks), 30)

    with closing(engine):
        assert asyncio.run(lose(0)) == []
        assert asyncio.run(lose(1)) == generate(model, [[5, 6]], 4).tokens
        with monkeypatch.context() as full:
            full.setattr("dsv3_jax.serve.engine.OpenSampler", fails)
            assert asyncio.run(lose(0)) == []
            wait_for(lambda: engine.samplers[UNCHANGED].is_idle)  # no other one took its place
        with pytest.raises(RuntimeError, match="lost"):
            asyncio.run(asyncio.wait_for(text(), 30))
        assert asyncio.run(text()) == generate(model, [[5, 6]], 4).tokens[0]


def test_the_page_is_told_what_a_cache_would_hold_where_there_is_none(model):
    with closing(Engine(model, rows=1, context=32, cache="none")) as engine:
        told = engine.describe()["cache"]
        with pytest.raises(ValueError, match="cache='none' reads the prompt again for each token"):
            engine.samplers[UNCHANGED].check(Ask((1, 2), 1, given=[[[0], [1]]]))
    assert told["dtype"] == "float32"
    assert told["expanded_bytes_per_token"] == bytes_per_token(model.cfg, "expanded", "float32")


def test_a_text_of_logits_that_are_nan_is_an_error_of_the_server(model):
    """JSON has no NaN: log p would be told as that of an all but impossible token."""
    broken = nnx.merge(*nnx.split(model), copy=True)
    broken.head[...] *= jnp.nan
    body = {"prompt": "ab", "max_tokens": 3, "logprobs": 2}
    with served_model(broken, rows=1) as (address, _):
        for more in ({}, {"stream": True}, {"echo": True}):
            url = f"http://{address}/v1/completions"
            answer = httpx2.post(url, json=body | more, timeout=90)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (500, "server_error")
            assert error["message"].startswith("the text: the model's logits are NaN or infinite")
