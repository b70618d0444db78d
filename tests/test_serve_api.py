"""`dsv3 serve` over HTTP: OpenAI's client gets `ds.generate`'s texts; bad input is a sentence."""

import asyncio
import contextlib
import http.client
import itertools
import json
import re
import signal
import socket
import sys

import httpx2
import openai
import pytest
from models import LIGHT, random_model
from runs import by_command, start
from serving import TEXT, served, served_model, wait_for

import dsv3_jax as ds
from dsv3_jax.decoding.sampler import New
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.serve import answers, requests
from dsv3_jax.serve.engine import Busy, Engine

NEW = 20  # tokens of an answer
SPELLING = answers.Spelling(TEXT)
SEEDS = itertools.repeat(7)
WRONG = {b"!va": ValueError("expert=9 is beyond"), b"!bu": Busy("full"), b"!ke": KeyError("fault")}


class Fake(Engine):
    """An engine that repeats the prompt, three tokens a part. A prompt may name a case."""

    context = 64

    def __init__(self):
        self.open = 0  # texts that are being written
        self.seeds = []  # of all texts so far

    async def text(self, ask, changes=None):
        case = bytes(ask.prompt[:3])
        if case in WRONG:
            raise WRONG[case]
        self.open += 1
        self.seeds.append(ask.seed)
        try:
            tokens = [*itertools.islice(itertools.cycle(ask.prompt), ask.max_new_tokens)]
            for i, new in enumerate(news(tokens, itertools.repeat(3))):
                await asyncio.sleep(99 if case == b"!ne" or (case == b"!sl" and i) else 0)
                if case == b"!fi" and i:
                    raise Busy("full")
                yield new
        finally:
            self.open -= 1


def news(tokens, sizes):
    """Tokens as an engine gives them, in parts of some sizes."""
    left = [*tokens]
    for size in sizes:
        part, left = left[:size], left[size:]
        others = [[(token, -1.0)] for token in part]
        yield New(part, [-1.0] * len(part), others, [-1] * len(part), 0, None, not left)
        if not left:
            return


@pytest.fixture(scope="module")
def fake():
    with served(Fake()) as (address, _):
        yield address


def client_of(address):
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="-", max_retries=0)


def post(address, body, path="/v1/completions", **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | headers
    return httpx2.post(f"http://{address}{path}", content=data, headers=headers, timeout=90)


def events_of(response):
    """The JSON of each event. OpenAI's client reads their form."""
    *lines, last, _ = response.text.split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


CHAT = '{"messages": [{"role": "user", "content": "hi"}]'
BAD = {  # a body, and how the sentence begins about it
    "{": "the body is not JSON: ",
    "[1]": "the body is not a JSON object",
    '{"promt": "a"}': "'promt' is not a key of Completion; did you mean 'prompt'?",
    CHAT.replace('"hi"', '[{"type": "image_url"}]') + "}": "content={'type': 'image_url'} is not {",
    CHAT + ', "top_logprobs": 3}': "top_logprobs=3 needs logprobs=true",
    '{"prompt": "a", "n": 0}': "n=0 is outside [1, 128]",
    json.dumps({"prompt": ["a"] * 65, "n": 2}): "n=2 makes 130 texts, more than 128",
    '{"prompt": "a", "presence_penalty": 1}': "presence_penalty=1 is not 0",
    '{"prompt": "a", "logit_bias": {"5": 1}}': "logit_bias={'5': 1} is not empty",
    json.dumps({"prompt": "a", "stop": "a" * 3 * 10**6}): "stop='aaaa",
    json.dumps({"prompt": "a" * 64}): "max_tokens=1 after a prompt of 64 tokens is beyond",
    '{"prompt": "a", "max_tokens": 0}': "max_tokens=0 asks for no text",
    '{"prompt": [[1], [260]]}': "prompt 1 holds token 260, which is no id",
    '{"prompt": "a", "glass": {"off": [[1]]}}': "off=([1],) is not a list of [layer, expert]",
    '{"prompt": "!va"}': "expert=9 is beyond",
}


@pytest.mark.parametrize("body", BAD, ids=range(len(BAD)))
def test_bad_input_is_a_sentence_and_the_server_goes_on(fake, body):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    for data in (body, re.sub("(?<=[^{])}$", ', "stream": true}', body)):
        response = post(fake, data.encode(), path)
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (400, "invalid_request_error")
        assert error["message"].startswith(BAD[body]) and len(error["message"]) <= 480
        assert error["param"] in (None, re.match(r"\W*(\w+)", BAD[body])[1])
    assert post(fake, {"prompt": "abc", "max_tokens": 4}).json()["choices"][0]["text"] == "abca"


def test_other_errors_have_a_status_each(fake):
    ask = {"prompt": "abc"}
    for response, status, words in (
        (post(fake, {"prompt": "!bu"}), 429, "full"),
        (post(fake, {"prompt": "!ke", "stream": True}), 500, "a fault, KeyError"),
        (post(fake, b" " * 5 * 10**6), 413, "more than 4,000,000 bytes"),
        (post(fake, ask, **{"content-type": "text/plain"}), 415, "content-type='text/plain'"),
        (post(fake, ask, host="127.0.0.1.evil.example:80"), 421, "host='127.0.0.1.evil"),
        (post(fake, ask, "/v1/complete"), 404, "POST '/v1/complete' is not served"),
        (httpx2.get(f"http://{fake}/v1/models/x"), 404, "GET '/v1/models/x' is not served"),
        (post(fake, ask, "/v1/models"), 405, "POST '/v1/models' is not served"),
    ):
        assert response.status_code == status, response.text
        assert words in response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers
        assert ("retry-after" in response.headers) == (status == 429)
    assert post(fake, ask, host="[::1]:8000").status_code == 200
    with client_of(fake) as client:
        (only,) = client.models.list()
        assert client.models.retrieve(only.id) == only
        with pytest.raises(openai.APIError, match="full"):  # after the first token
            list(client.completions.create(model="", prompt="!fi", stream=True))
    health = httpx2.get(f"http://{fake}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})


def test_time_is_bounded():
    with served(Fake(), timeout=0.5) as (address, _):
        said = post(address, {"prompt": "!sl", "max_tokens": 9}).json()
        assert said["choices"][0]["text"] == "!sl" and said["usage"]["completion_tokens"] == 3
        assert said["choices"][0]["finish_reason"] == "length"
        for more in ({}, {"stream": True}):
            assert post(address, {"prompt": "!ne"} | more).status_code == 503


@pytest.mark.parametrize("prompt", ["!sl", "!ne"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_rows(prompt, stream):
    with served(engine := Fake()) as (address, _):
        client = http.client.HTTPConnection(address)
        body = json.dumps({"prompt": prompt, "n": 3, "stream": stream})
        client.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        wait_for(lambda: engine.open == 3)
        client.close()
        wait_for(lambda: engine.open == 0)


def test_the_page_may_run_its_own_script_alone(fake):
    policy = httpx2.get(f"http://{fake}/").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; connect-src 'self'; ")
    assert "; script-src 'sha256-" in policy and "unsafe" not in policy


def request_of(kind=requests.Completion, **body):
    settings = requests.Settings(TEXT, 260, 99, Sampling(1.0))
    return requests.read_request(json.dumps(body).encode(), kind, settings, SEEDS)


@pytest.mark.parametrize("stop", [["é!"], ["abc", "bc"], ["d", "cde", "zz"], []])
def test_no_part_of_a_stop_text_is_sent(stop, rng):
    """However tokens come, the text ends before the stop text that is complete first."""
    request = request_of(prompt="x", stop=stop, logprobs=1)
    for _ in range(40):
        text = "".join(rng.choice([*"aabcde!", "é"], size=12))
        tokens = [*text.encode(), 256]
        ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
        whole = text[: ends[0]] if ends else text
        want = whole.removesuffix(max(filter(whole.endswith, stop), key=len)) if ends else whole

        answer, pieces = answers.Answer(request, 0, SPELLING), []
        for new in news(tokens, rng.integers(1, 4, size=40)):
            pieces.append(answer.add(new))
            if pieces[-1].finish_reason:
                break
        assert "".join(piece.text for piece in pieces) == want
        assert pieces[-1].finish_reason == "stop"

        # Tokens come with the text in which they begin. Those of the stop text count, too.
        told = [entry for piece in pieces for entry in piece.tokens]
        assert [entry["id"] for entry in told] == (tokens[: len(want.encode())] if ends else tokens)
        before = [bytes(tokens[:i]).decode(errors="ignore") for i in range(len(told))]
        assert [entry["offset"] for entry in told] == [*map(len, before)]
        used = len(whole.encode()) if ends else len(tokens)
        assert sum(piece.new for piece in pieces) == used


@pytest.fixture(scope="module")
def model():
    return random_model(ds.replace(LIGHT, vocab_size=260))


@pytest.fixture(scope="module")
def real(model):
    with served_model(model, rows=2) as (address, _):
        yield address


def text_of(tokens):
    return TEXT.tokenizer.decode(t for t in tokens if t not in TEXT.stop_ids)


def generated(model, *prompts, **options):
    """What `generate` gives; of one length and with all that it tells, so that it compiles less."""
    how = dict(stop_tokens=TEXT.stop_ids, logprobs=True, return_routing=True)
    return ds.generate(model, prompts, NEW, **how | options)


@pytest.mark.parametrize(
    "drawn",
    [{}, pytest.param({"temperature": 0.9, "top_k": 40, "seed": 5}, marks=pytest.mark.long)],
)
def test_completions_are_those_of_generate(model, real, drawn):
    n, prompts = (3 if drawn else 1), ["abc", "one more"]
    ids = [TEXT.encode(prompt) for prompt in prompts]
    want = generated(model, *ids, samples=n, **drawn)
    wish = dict(model="any", prompt=prompts, n=n, max_tokens=NEW, logprobs=2, extra_body=drawn)
    create = client_of(real).completions.create
    whole = create(**wish)
    assert [choice.text for choice in whole.choices] == [*map(text_of, want.tokens)]
    for choice, tokens, nats in zip(whole.choices, want.tokens, want.model_logprobs, strict=True):
        assert choice.finish_reason == ("stop" if tokens[-1] in TEXT.stop_ids else "length")
        assert choice.logprobs.tokens == [*map(SPELLING.alone, tokens)]
        assert choice.logprobs.token_logprobs == pytest.approx(nats, abs=1e-5)
        for top, token in zip(choice.logprobs.top_logprobs, choice.logprobs.tokens, strict=True):
            assert token in top and len(top) in (2, 3)
    counts = sum(map(len, ids)), sum(map(len, want.tokens))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == counts

    chunks = list(create(**wish, stream=True, stream_options={"include_usage": True}))
    texts = [""] * len(whole.choices)
    for chunk in chunks[:-1]:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert [chunk.usage for chunk in chunks] == [None] * (len(chunks) - 1) + [whole.usage]


def test_a_prompt_that_occurs_again_has_the_next_samples():
    asks = request_of(prompt=["ab", "c", "ab"], n=2).asks
    assert [ask.sample for ask in asks] == [0, 1, 0, 1, 2, 3]


def test_requests_that_give_no_seed_have_the_next_ones():
    """Those that give one, and those that are refused, take none."""
    with served(engine := Fake(), seed=7) as (address, _):
        for more in ({"seed": 3}, {"max_tokens": 99}, {}, {"seed": 9}, {"n": 0}, {}):
            post(address, {"prompt": "ab"} | more)
    assert engine.seeds == [3, 7, 9, 8]


def test_forms_in_which_clients_ask_the_same():
    """A content may be several texts, whatever the template reads; no answer has a call."""

    def asks_of(content, **more):
        turns = [{"role": "user", "content": content}]
        return request_of(requests.ChatCompletion, messages=turns, **more).asks

    parts = [{"type": "text", "text": words} for words in ("a", "b")]
    for several in (True, False):
        assert asks_of(parts, parallel_tool_calls=several) == asks_of("a\nb")


def test_chats_are_those_of_generate(model, real):
    """Names of special tokens in a message stay text, as `chat.render` has them."""
    turns = [{"role": "user", "content": "hé<eos>"}]
    ids = TEXT.chat.render(turns, add_generation_prompt=True).ids
    assert ids.count(256) == 1
    (want,) = generated(model, ids).tokens
    create = client_of(real).chat.completions.create
    wish = dict(model="", messages=turns, max_completion_tokens=NEW, logprobs=True)
    choice = create(**wish, top_logprobs=5).choices[0]
    assert (choice.message.content, choice.message.role) == (text_of(want), "assistant")
    told = choice.logprobs.content
    assert b"".join(bytes(e.bytes) for e in told) == TEXT.tokenizer.bytes_of(want)
    assert all(len(entry.top_logprobs) == 5 for entry in told)
    chunks = list(create(**wish, stream=True, extra_body={"glass": {}}))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == text_of(want)
    roles = [chunk.choices[0].delta.role for chunk in chunks]
    assert roles == ["assistant"] + [None] * (len(chunks) - 1)
    assert [token["id"] for token in chunks[0].glass["prompt"]] == ids

    stop = text_of(want)[8:11]  # begins in one token and ends in another
    choice = create(**wish, stop=[stop, "never"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text_of(want).split(stop)[0], "stop")


@pytest.mark.long
@pytest.mark.parametrize("most", [0, 1, 3])
def test_an_echo_scores_its_prompt(model, real, most):
    """As lm_eval asks: log p of the continuation, and whether it is the likeliest, are ours."""
    likely = generated(model, [*b"abc"], stop_tokens=()).tokens[0][:4]
    for more in (likely, [*b"xyz"]):
        ids = [*b"abc", *more]
        wish = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": most}
        choice = post(real, wish).json()["choices"][0]
        nats, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
        greedy = all(nats[i] == max(tops[i].values()) for i in range(3, len(ids)))
        [(want, is_likeliest)] = ds.loglikelihood(model, [([*b"abc"], more)])
        assert (sum(nats[3 : len(ids)]), greedy) == (pytest.approx(want, abs=1e-4), is_likeliest)
        assert (len(nats), nats[0], tops[0]) == (len(ids) + most, None, None)
        new = generated(model, ids).tokens[0][:most]
        assert choice["text"] == text_of([*ids, *new])


def test_what_the_page_gets_is_what_generate_returns(model, real):
    wish = {"prompt": "abcd", "max_tokens": NEW, "stream": True, "glass": {}}
    want = generated(model, [*b"abcd"])
    parts = [event["glass"] for event in events_of(post(real, wish))]
    tokens = [token["id"] for part in parts for token in part["tokens"]]
    experts = [row for part in parts for row in part["experts"]["ids"]]
    assert tokens == want.tokens[0] and parts[0]["first"] == 4
    assert experts == want.expert_ids[0].swapaxes(0, 1)[:-1].tolist()

    forced = next(expert for expert in range(8) if expert not in experts[2][0])
    changes = {"forced": [[2, 0, forced]]}
    ids = events_of(post(real, wish | {"glass": changes}))[0]["glass"]["experts"]["ids"]
    assert forced in ids[2][0] and ids[:2] == experts[:2]
    found = post(real, changes | {"ids": [*b"abcd", *tokens]}, "/glass/read").json()
    assert forced in found["experts"][2][0] and len(found["gates"]) == 4 + len(tokens)
    assert found["tokens"][0]["logprob"] is None and found["tokens"][4]["id"] == tokens[0]

    for wrong, said in (
        ({"forced": [[9, 0, 0]]}, "position 9 of a forced expert is none of the 4 tokens"),
        ({"off": [[0, 8]]}, "layer 0, expert 8 is none of the model's 1 sparse layers"),
    ):
        read = post(real, wrong | {"ids": [1] * 4}, "/glass/read")
        for response in (read, post(real, wish | {"glass": wrong})):
            assert response.status_code == 400 and said in response.json()["error"]["message"]
    about = httpx2.get(f"http://{real}/glass/model").json()
    assert (about["name"], about["chat"], about["rows"], about["experts"]) == ("tiny", True, 2, 8)


@pytest.mark.long
def test_a_signal_ends_the_command_and_its_streams(whole, root):
    process = start(["serve", str(whole.folder), "--port", "0", "--rows", "2"], root)
    address = re.search(r"http://(\S+) ", process.stdout.readline())[1]
    wish = dict(model="", prompt="a", max_tokens=40, temperature=0, stream=True)
    with client_of(address) as client, client.completions.create(**wish) as stream:
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in err, err


def test_the_command_refuses_in_a_sentence(whole, monkeypatch):
    def said(*options):
        code, out, err = by_command("serve", whole.folder, *options)
        assert (code, out) == (2, "")
        return err

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        assert f"port={port} of host='127.0.0.1' is not free" in said("--port", port)
    assert "port=65536 is not within" in said("--port", 65536)
    assert "queue=0 is not an int of 1 or above" in said("--queue", 0)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install starlette uvicorn" in said()


def test_tokens_that_are_written_alike_keep_their_own_log_p():
    told = {"id": 5, "text": "a", "logprob": -2.0, "offset": 0}
    told["alternatives"] = [[6, "a", -1.0], [5, "a", -2.0], [7, "b", -3.0]]
    (top,) = answers._logprobs([told], 3, SPELLING)["top_logprobs"]
    assert top == {"a": -2.0, "token_id:6": -1.0, "b": -3.0}
