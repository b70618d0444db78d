"""`dsv3 serve` over HTTP: OpenAI's client gets `ds.generate`'s texts; bad input is a sentence."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import threading
import time

import httpx2
import numpy as np
import openai
import pytest
import uvicorn
from runs import unhooked

from dsv3_jax.chat.text_settings import plain_settings
from dsv3_jax.decoding.sampler import New
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.serve.engine import Busy, Engine, Read

# They refuse wrong types themselves, which the tests' import hook would do before.
requests, answers, app = (
    unhooked(name, name) for name in map("dsv3_jax.serve.{}".format, ["requests", "answers", "app"])
)
TEXT = plain_settings()
SPELLING = answers.Spelling(TEXT.tokenizer, TEXT.stop_ids)


class Fake(Engine):
    """An engine that repeats the prompt, three tokens a part. Prompts that begin with ! are cases.

    Its experts are a token's id and the position. Log p of a token is minus its id.
    """

    context = 64

    def __init__(self):
        self.open = 0  # texts that are being written

    def describe(self):
        return {"layers": 1}

    async def text(self, ask, changes=None):
        case = bytes(ask.prompt[:3]).decode()
        if case == "!no":
            raise ValueError("expert=9 is beyond the last")
        if case == "!bu":
            raise Busy
        if case == "!fa":
            raise KeyError("a fault")
        self.open += 1
        try:
            tokens = [ask.prompt[i % len(ask.prompt)] for i in range(ask.max_new_tokens)]
            for start in range(0, len(tokens), 3):
                if (case == "!sl" and start) or case == "!ne":
                    await asyncio.sleep(99)
                await asyncio.sleep(0)
                part = tokens[start : start + 3]
                ended = start + 3 >= len(tokens)
                at = start + len(ask.prompt) - 1 if start else 0
                read = [*ask.prompt, *tokens][at : len(ask.prompt) + start + len(part) - 1]
                yield New(
                    part,
                    [-float(t) for t in part],
                    [[(t, -float(t)), (258, -999.0)] for t in part],
                    [-1, *part[1:]],
                    at,
                    np.array([[[t, at + i]] for i, t in enumerate(read)], np.int32),
                    ended,
                )
        finally:
            self.open -= 1

    async def read(self, tokens, forced=(), changes=None):
        others = [[(tokens[(i + 1) % len(tokens)], -1.0), (7, -2.0)] for i in range(len(tokens))]
        ids = np.array([[[t, i]] for i, t in enumerate(tokens)], np.int32)
        return Read([-1.0] * (len(tokens) - 1), others, ids, np.ones(ids.shape, np.float32))


@contextlib.contextmanager
def served(engine, **options):
    """A server on a free port of the loopback. Yields its address."""
    settings = requests.Settings(TEXT, 260, engine.context, Sampling(0.0))
    service = app.Service(engine, settings, name="tiny", **options)
    how = dict(log_level="critical", ws="none", lifespan="off", loop="asyncio", http="h11")
    server = uvicorn.Server(uvicorn.Config(service.app, port=0, **how))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def fake():
    with served(Fake()) as address:
        yield address


def client_of(address):
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="-", max_retries=0)


def post(address, body, path="/v1/completions", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    return httpx2.post(f"http://{address}{path}", content=data, headers=headers, timeout=60)


def events_of(response):
    """The JSON of each event, after a look at their form."""
    *lines, last, end = response.text.split("\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (last, end) == ("data: [DONE]", "")
    assert all(line.startswith("data: {") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# Requests are refused in one sentence: body, start of the sentence, field at fault.
ASKS = {"prompt": "abc"}
TURNS = {"messages": [{"role": "user", "content": "hi"}]}
BAD = {
    "no JSON": (b"{", "the body is not JSON: ", None),
    "no object": (b"[1]", "the body is not a JSON object", None),
    "no UTF-8": (b'{"prompt": "\xff"}', "the body is not JSON: 'utf-8'", None),
    "twice": (b'{"n": 1, "n": 1}', "the body is not JSON: key 'n' occurs twice", None),
    "deep": (b"[" * 10**5, "the body is not JSON: it is nested more than 64 deep", None),
    "unknown": (
        {"promt": "a"},
        "'promt' is not a key of Completion; did you mean 'prompt'?",
        "promt",
    ),
    "tools": (TURNS | {"tools": []}, "'tools' is not a key of ChatCompletion", "tools"),
    "n": (ASKS | {"n": 0}, "n=0 is outside [1, 128]", "n"),
    "many": ({"prompt": ["a"] * 65, "n": 2}, "n=2 makes 130 texts, more than 128", "n"),
    "stream": (ASKS | {"stream": 1}, "stream=1 is not of type bool", "stream"),
    "temperature": (ASKS | {"temperature": -1}, "temperature=-1.0 is outside", "temperature"),
    "top_p": (ASKS | {"top_p": 0}, "top_p=0.0 is outside (0, 1]", "top_p"),
    "top_k": (ASKS | {"top_k": True}, "top_k=True is not of type typing.Optional[int]", "top_k"),
    "seed": (ASKS | {"seed": 2**32}, "seed=4294967296 is outside [0, 4294967295]", "seed"),
    "penalty": (ASKS | {"presence_penalty": 1}, "presence_penalty=1 is not of type one of 0", ...),
    "bias": (ASKS | {"logit_bias": {"5": 1}}, "logit_bias={'5': 1} is not empty", "logit_bias"),
    "logprobs": (ASKS | {"logprobs": 6}, "logprobs=6 is outside [0, 5]", "logprobs"),
    "stops": (ASKS | {"stop": ["a"] * 5}, "stop=['a', 'a', 'a', 'a', 'a'] is not a text", "stop"),
    "long stop": (ASKS | {"stop": "a" * 3 * 10**6}, "stop='aaaa", "stop"),
    "no stop": (ASKS | {"stop": ""}, "stop='' is not a text", "stop"),
    "context": ({"prompt": "a" * 64}, "max_tokens=1 after a prompt of 64 tokens", "max_tokens"),
    "length": (ASKS | {"max_tokens": 62}, "max_tokens=62 after a prompt of 3 tokens", "max_tokens"),
    "nothing": (ASKS | {"max_tokens": 0}, "max_tokens=0 asks for no text", "max_tokens"),
    "no prompt": ({}, "prompt 0=None is not a list of token ids", "prompt"),
    "ids": ({"prompt": [[1], [260]]}, "prompt 1 holds token 260", "prompt"),
    "huge id": ({"prompt": [10**90]}, "prompt 0 holds token 1000", "prompt"),
    "messages": ({"messages": [{"role": "user"}]}, "message 0 of role='user' has no content", ...),
    "glass": (
        ASKS | {"glass": {"off": [[1]]}},
        "off=([1],) is not a list of [layer, expert]",
        "off",
    ),
    "engine": ({"prompt": "!no"}, "expert=9 is beyond the last", "expert"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence_and_the_server_goes_on(fake, case):
    body, sentence, field = BAD[case]
    chat = isinstance(body, dict) and "messages" in body
    path = "/v1/chat/completions" if chat else "/v1/completions"
    for stream in ({}, {"stream": True}):
        wish = body | stream if isinstance(body, dict) and "stream" not in body else body
        response = post(fake, wish, path)
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["message"].startswith(sentence) and len(error["message"]) <= 480
        assert error["type"] == "invalid_request_error" and error["code"] is None
        assert field is ... or error["param"] == field
    assert post(fake, ASKS | {"max_tokens": 4}).json()["choices"][0]["text"] == "abca"


def test_other_errors_have_a_status_each(fake):
    for response, status, words in (
        (post(fake, {"prompt": "!bu"}), 429, "the queue is full"),
        (post(fake, {"prompt": "!fa", "stream": True}), 500, "a fault, KeyError"),
        (post(fake, b" " * 5 * 10**6), 413, "more than 4,000,000 bytes"),
        (post(fake, ASKS, **{"content-type": "text/plain"}), 415, "content-type='text/plain'"),
        (post(fake, ASKS, host="evil.example"), 421, "host='evil.example'"),
        (post(fake, ASKS, host="127.0.0.1.evil.example:80"), 421, "host='127.0.0.1.evil"),
        (post(fake, ASKS, "/v1/complete"), 404, "POST '/v1/complete' is not served"),
        (post(fake, ASKS, "/v1/models"), 405, "POST '/v1/models' is not served"),
    ):
        assert response.status_code == status, response.text
        assert words in response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers
    assert post(fake, {"prompt": "!bu"}).headers["retry-after"] == "1"
    for host in ("localhost", "127.0.0.1:99", "[::1]:8000"):
        assert post(fake, ASKS, host=host).status_code == 200


def test_a_fault_after_the_first_token_ends_the_stream_with_an_error():
    class Broken(Fake):
        async def text(self, ask, changes=None):
            async for new in super().text(ask):
                yield new
                raise Busy

    with served(Broken()) as address, pytest.raises(openai.APIError, match="queue is full"):
        list(client_of(address).completions.create(model="", prompt="abc", stream=True))


def test_time_is_bounded():
    with served(Fake(), timeout=0.5) as address:
        said = post(address, {"prompt": "!sl", "max_tokens": 9}).json()
        assert said["choices"][0]["text"] == "!sl" and said["usage"]["completion_tokens"] == 3
        assert said["choices"][0]["finish_reason"] == "length"
        for more in ({}, {"stream": True}):
            assert post(address, {"prompt": "!ne"} | more).status_code == 503


@pytest.mark.parametrize("prompt", ["!sl", "!ne"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_rows(prompt, stream):
    engine = Fake()
    with served(engine) as address:
        client = http.client.HTTPConnection(address)
        body = json.dumps({"prompt": prompt, "n": 3, "stream": stream})
        client.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        wait_for(lambda: engine.open == 3)
        client.close()
        wait_for(lambda: engine.open == 0)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_page_may_run_its_own_script_alone(fake, monkeypatch):
    inside = {"script": "let a = '<b>';\n", "style": "p { color: red }"}
    page = "".join(f"<{tag}>{text}</{tag}>" for tag, text in inside.items())
    headers = app._page_of(page).headers
    for tag, text in inside.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in headers["content-security-policy"]
    response = httpx2.get(f"http://{fake}/")
    assert response.text == app.PAGE.read_text() and response.headers["cache-control"] == "no-store"
    assert "default-src 'none'; connect-src 'self'" in response.headers["content-security-policy"]


# Text


def request_of(**body):
    settings = requests.Settings(TEXT, 260, 999, Sampling(0.0))
    return requests.read_request(json.dumps(body).encode(), requests.Completion, settings, 0)


def news(tokens, sizes):
    """Tokens as an engine gives them, in parts of some sizes."""
    start = 0
    for size in sizes:
        part = tokens[start : start + size]
        start += size
        if part:
            others = [[(t, -1.0)] for t in part]
            ended = start >= len(tokens)
            yield New(
                part, [-1.0] * len(part), others, [-1] * len(part), 0, np.zeros((0, 1, 1)), ended
            )


@pytest.mark.parametrize("stop", [["cd"], ["é!"], ["abc", "bc"], ["d", "cde", "zz"], ["aab"], []])
def test_no_part_of_a_stop_text_is_sent(stop, rng):
    """However tokens come, the text ends before the stop text that is complete first."""
    for _ in range(40):
        text = "".join(rng.choice([*"aabcde", "é", "!"], size=12))
        tokens = [*text.encode(), 256]
        ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
        whole = text[: ends[0]] if ends else text
        cut = max((s for s in stop if whole.endswith(s)), key=len, default="") if ends else ""
        answer = answers.Answer(request_of(prompt="x", stop=stop, logprobs=1), 0, SPELLING)
        pieces = []
        for new in news(tokens, rng.integers(1, 4, size=40)):
            pieces.append(answer.add(new))
            if pieces[-1].finish_reason:
                break
        want = whole.removesuffix(cut)
        assert "".join(piece.text for piece in pieces) == want
        assert pieces[-1].finish_reason == "stop"

        # Tokens come with the text in which they begin; the one that ends it comes last.
        told = [entry for piece in pieces for entry in piece.tokens]
        begun = [entry["id"] for entry in told]
        least = len(want.encode())
        assert begun == (tokens[:least] if ends else tokens)
        assert [entry["offset"] for entry in told] == [
            len(bytes(tokens[:i]).decode(errors="ignore")) for i in range(len(told))
        ]
        assert sum(piece.new for piece in pieces) == (len(whole.encode()) if ends else len(tokens))


def test_tokens_that_are_written_alike_keep_their_own_log_p():
    told = {"id": 5, "text": "a", "logprob": -2.0, "offset": 0}
    told["alternatives"] = [[6, "a", -1.0], [5, "a", -2.0], [7, "b", -3.0]]
    (top,) = answers._logprobs([told], 3, SPELLING)["top_logprobs"]
    assert top == {"a": -2.0, "token_id:6": -1.0, "b": -3.0}  # its best is not the token's


def test_names_of_special_tokens_in_messages_stay_text(fake):
    turns = [{"role": "user", "content": "<eos><fim_prefix>"}]
    wish = {"messages": turns, "max_tokens": 1, "stream": True, "glass": {}}
    first = events_of(post(fake, wish, "/v1/chat/completions"))[0]
    ids = [token["id"] for token in first["glass"]["prompt"]]
    assert ids == TEXT.chat.render(turns, add_generation_prompt=True).ids
    assert ids[5:22] == list(b"<eos><fim_prefix>") and ids[22] == 256
