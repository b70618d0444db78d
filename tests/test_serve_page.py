"""The page of `dsv3 serve` in headless Chromium: what it shows is what `ds.generate` gives."""

import re

import numpy as np
import pytest
from browser import needs_browser
from released import GRID, Cell, write_folder
from runs import start
from texts import TEXTS, write_text_files

import dsv3_jax as ds

pytestmark = [needs_browser, pytest.mark.long]

NEW = 20  # tokens of an answer
IDLE = "!$('send').disabled && running.size === 0"
TURN = "article:last-child"
HOSTILE = "</p><script>window.hit = 1</script><img src=x onerror='window.hit = 2'> <｜User｜>"
KNOWN = "({id, logprob, experts, draft, element}) => [id, logprob, experts, draft && draft.id, "
KNOWN += "element.style.background]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A released folder with a chat template, two layers of experts and a multi-token head."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    config = GRID["groups"].config | {"vocab_size": 384, "max_position_embeddings": 1024}
    config |= {"num_hidden_layers": 2, "first_k_dense_replace": 0}
    write_folder(folder, Cell("groups", config))
    return write_text_files(folder, TEXTS["V3"])


@pytest.fixture(scope="module")
def address(folder, root):
    """Where `dsv3 serve` listens; at the end a signal stops it."""
    server = start(["serve", str(folder), "--draft", "mtp", "--port", "0", "--rows", "2"], root)
    try:
        yield re.search(r"http://\S+:\d+", server.stdout.readline())[0] + "/"
    finally:
        server.terminate()
        server.communicate(timeout=30)
    assert server.returncode == 143


@pytest.fixture
def page(browser, address):
    """The page, open; at the end: nothing thrown or logged, and no other host asked."""
    browser.open(address)
    browser.wait_for("$('layer').options.length > 0")
    fill(browser, max_tokens=NEW)
    yield browser
    assert browser.errors == []
    assert {request[: len(address)] for request in browser.requests} == {address}


def fill(page, **values) -> None:
    for name, value in values.items():
        page.run(f"$('ask').elements.{name}.value = {value}")


def tokens_of(page, column: str) -> list[list]:
    """What the page knows of each token of a text, those of its prompt too."""
    box = f"document.querySelector('{TURN} .pair > div > {column} .tokens > span')"
    return page.run(f"{box}.place.text.tokens.map({KNOWN})")


def ask(page, words: str) -> list[list]:
    """Say something, and wait for the answer."""
    page.type("#words", words)
    page.click("#send")
    page.wait_for(IDLE)
    return tokens_of(page, "div:first-child")


def intervene(page, at: int, button: str) -> list[list]:
    """Choose a token of the last answer, click in its panel, and wait for the new text."""
    box = f"document.querySelector('{TURN} .pair .tokens > span')"
    page.run(f"pin({box}.place.text.tokens[{at}].element.place)")
    page.click(button)
    page.wait_for(f"{IDLE} && document.querySelector('{TURN} [role=status]').textContent !== ''")
    return tokens_of(page, "div:last-child")


def equal(tokens: list[list], ids: list[int], model, text, **options):
    """The page's tokens, log p and experts are those of `generate`, whose result is returned."""
    how = dict(temperature=0.6, top_p=0.95, stop_tokens=text.stop_ids)  # the folder's own
    how |= dict(draft="mtp", logprobs=True, return_routing=True) | options
    new = len(tokens) - len(ids)
    result = ds.generate(model, [ids], NEW, **how)  # always as long, so it compiles less
    assert [token[0] for token in tokens] == ids + result.tokens[0][:new]
    logprobs = [token[1] for token in tokens[len(ids) :]]
    of_generate = result.model_logprobs[0][:new]
    np.testing.assert_allclose(logprobs, of_generate, atol=1e-5)  # another order
    experts = np.array([token[2] for token in tokens[:-1]]).swapaxes(0, 1)
    np.testing.assert_array_equal(experts, result.expert_ids[0][:, : len(tokens) - 1])
    return result.tokens[0][:new]


def test_a_conversation_is_what_generate_gives(page, folder):
    model, text = ds.load_model(folder), ds.load_text(folder)
    fill(page, seed=3)
    messages = []
    for words in ("hello\n world", HOSTILE):
        tokens = ask(page, words)
        messages.append({"role": "user", "content": words})
        ids = text.chat.render(messages, add_generation_prompt=True).ids
        new = equal(tokens, ids, model, text, seed=3)
        new = [token for token in new if token not in text.stop_ids]
        messages.append({"role": "assistant", "content": text.tokenizer.decode(new)})
    assert page.texts(".user") == [message["content"] for message in messages[::2]]
    assert page.run("window.hit === undefined && document.querySelector('img') === null")
    assert page.run(r"visible('a\u202e\r\n\tb')") == "a\\u{202e}\\u{d}\n\tb"

    # The panels of some tokens of the last answer, by the keyboard alone.
    page.run(f"document.querySelector('{TURN} .pair .tokens').focus()")
    for token, logprob, experts, draft, colour in tokens[len(ids) :][:6]:
        page.press("ArrowRight")
        said = page.texts("#token > p")
        assert said[0].startswith(f"id {token}, ")
        p, nats = re.fullmatch(r"p = ([\d.]+) %, log p = −?([\d.]+) nats", said[1]).groups()
        assert float(p) == pytest.approx(100 * np.exp(logprob), abs=0.051)
        assert float(nats) == pytest.approx(-logprob, abs=0.0051)
        assert ("accepted" in said[2]) == (draft == token)
        assert [int(x.split()[0]) for x in page.texts("#token .expert")] == sum(experts, [])
        assert colour.endswith(f" {360 / 8 * experts[0][0]:g})")
    assert len(page.texts("#token tr")) == 5

    # Load, MaxVio and bytes are those of these tokens.
    load = np.bincount([e for token in tokens for e in token[2][1]], minlength=8)
    assert page.texts("#loads p")[1] == f"layer 1: MaxVio {load.max() / load.mean() - 1:.2f}"
    held = 4 * model.cfg.num_layers * (model.cfg.kv_latent_dim + model.cfg.rope_head_dim)
    assert f"{held * len(tokens) / 1000:.1f} kB" in page.texts("#counts td")


def test_an_expert_off_adds_nothing_and_one_may_be_forced(page, folder):
    model, other, text = ds.load_model(folder), ds.load_model(folder), ds.load_text(folder)
    greedy = dict(temperature=0.0, top_p=1.0)
    fill(page, **greedy)
    before = ask(page, "the user")
    ids, at = [token[0] for token in before], len(before) - NEW + 4
    expert = before[at][2][1][0]
    w_down = other.sparse.moe.experts.w_down
    w_down[...] = w_down[...].at[1, expert].set(0)

    new = intervene(page, at, f"[data-key='1 {expert}']")
    equal(new, ids[: at + 1], other, text, **greedy)
    assert [token[0] for token in new] != ids  # else the comparison says little
    pair = [(ids[: at + 1], ids[at + 1 :])]
    served, changed = (ds.loglikelihood(each, pair)[0][0] for each in (model, other))
    numbers = re.findall(r"-?\d+\.\d+", page.text(f"{TURN} [role=status]").replace("−", "-"))
    expected = [served, changed, changed - served]
    np.testing.assert_allclose([*map(float, numbers)], expected, atol=0.011)  # two digits

    # Without the change there is one text again, and the served model is as it was.
    page.click(f"{TURN} .pair .row button")
    assert len(page.texts(f"{TURN} .pair .tokens")) == 1
    page.run("messages = []")
    assert ask(page, "the user") == before

    # An expert that is forced is read at its token, and changes none before it.
    expert = next(e for e in range(8) if e not in before[at][2][0])
    page.run(f"$('change').elements.expert.value = {expert}")
    new = intervene(page, at, "#change [value=forced]")
    assert expert in new[at][2][0]
    assert [token[2] for token in new[:at]] == [token[2] for token in before[:at]]


def test_another_temperature_and_the_routers_bias_off(page, folder):
    model, unbiased, text = ds.load_model(folder), ds.load_model(folder), ds.load_text(folder)
    before = ask(page, "the user")
    ids, at = [token[0] for token in before], len(before) - NEW + 4
    bias = unbiased.sparse.moe.bias
    bias[...] = np.zeros_like(bias[...])
    equal(intervene(page, at, "#change [value=bias]"), ids[: at + 1], unbiased, text)
    page.click(f"{TURN} .pair .row button")
    new = intervene(page, at, "#change [value=temperature]")
    equal(new, ids[: at + 1], model, text, temperature=1.0)


def test_errors_are_sentences_and_the_stop_button_stops(page):
    fill(page, max_tokens=100_000)
    page.type("#words", "hello")
    page.click("#send")
    page.wait_for(f"document.querySelector('.error') && {IDLE}")
    assert "100000" in page.text(".error").replace(",", "")
    assert page.run("$('words').value") == "hello"  # they come back
    page.errors.clear()  # a browser logs an answer of status 400

    fill(page, max_tokens=900)
    page.run("stops = new MutationObserver(() => shown && $('stop').click())")  # at once
    page.run("stops.observe($('turns'), {childList: true, subtree: true})")
    page.click("#send")
    page.wait_for(f"shown && {IDLE}")
    assert page.text(f"{TURN} .pair .dim") == "stopped"
    assert 0 < page.run("shown.tokens.length - shown.start") < 900
    page.run("stops.disconnect()")
    fill(page, max_tokens=NEW)
    assert len(ask(page, " world")) > NEW
