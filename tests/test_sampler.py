"""The open sampler: texts come and go, and each is that of `generate` alone."""

import itertools
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, forward, random_model, small
from runs import refused

from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.likelihood import read_tokens
from dsv3_jax.decoding.sampler import Ask, OpenSampler
from dsv3_jax.kernels import table
from dsv3_jax.ops.sampling import Sampling
from dsv3_jax.serve.engine import Changes, changed_model

CFG = small(num_layers=1, num_dense_layers=0, mtp_depth=1)
CONTEXT = 64
LONGEST = 15  # tokens of a text
LAWS = [Sampling(), Sampling(1.3, top_k=5), Sampling(0.7, None, 0.6)]


@pytest.fixture(scope="module")
def model():
    return random_model(CFG, seed=2, execution=DENSE)


@pytest.fixture(scope="module")
def two_layers():
    return random_model(small(num_layers=2, num_dense_layers=0), seed=2)


def prompt(i):
    """The first four are of any length, and others of over one step of 32."""
    draw = random.Random(i)
    length = draw.randrange(33 if i > 3 else 1, 40)
    return tuple(draw.randrange(CFG.vocab_size) for _ in range(length))


# of two prompts for each law; the second one's text is a second sample
ASKS = [
    Ask(prompt(i), 3 + 6 * (i // 2), LAWS[i % 3], seed=i % 3, sample=i // 3 if i % 3 else 0)
    for i in range(6)
]


def alone(model, asks, **options):
    """(Tokens, log p, experts of all tokens but the last) of each text, by `generate`."""
    found = {}
    for law in {ask.sampling for ask in asks}:
        those = [ask for ask in asks if ask.sampling == law]
        samples = 1 if law.is_greedy else 2
        how = dict(samples=samples, logprobs=True, return_routing=True, stop_tokens=(3,))
        how |= law._asdict() | {"seed": those[0].seed} | options
        texts = generate(model, [ask.prompt for ask in those], LONGEST, **how)
        for i, ask in enumerate(those):
            row = i * samples + ask.sample
            tokens = texts.tokens[row][: ask.max_new_tokens]
            experts = texts.expert_ids[row][:, : len(ask.prompt) + len(tokens) - 1]
            found[ask] = tokens, texts.model_logprobs[row][: len(tokens)], experts
    return found


@pytest.fixture(scope="module")
def wants(model):
    return alone(model, ASKS)


def finish(sampler, found=None):
    """Run until all texts have ended; `found` gathers what came of each."""
    found = {} if found is None else found
    while not sampler.is_idle:
        for number, new in sampler.step().items():
            found.setdefault(number, []).append(new)
    return found


def assert_same(news, want):
    """A text of the sampler is that of `generate`: tokens, log p, experts, all of it."""
    tokens, logprobs, experts = want
    assert [token for new in news for token in new.tokens] == tokens
    found = [value for new in news for value in new.logprobs]
    np.testing.assert_allclose(found, logprobs, rtol=1e-4, atol=1e-4)

    # Experts of the prompt and of all new tokens but the last, each once and in order.
    assert news[0].experts_from == 0
    ids = np.concatenate([new.expert_ids for new in news])
    np.testing.assert_array_equal(ids, experts.swapaxes(0, 1))
    for before, after in itertools.pairwise(news):
        assert after.experts_from == before.experts_from + len(before.expert_ids)
    assert [new.ended for new in news] == [False] * (len(news) - 1) + [True]

    # The likeliest come first, and the token's own log p is theirs where it is one of them.
    for new in news:
        for token, value, five in zip(new.tokens, new.logprobs, new.alternatives, strict=True):
            assert [p for _, p in five] == sorted((p for _, p in five), reverse=True)
            assert dict(five).get(token, value) == pytest.approx(value, abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("draft", [None, "lookup", "mtp"])
def test_a_text_is_that_of_generate_whatever_shares_its_batch(model, wants, draft):
    if draft == "mtp":  # certain drafts change no text, and no draft changes a greedy one
        drawn = [ask for ask in ASKS if ask.sampling == LAWS[1]]
        wants = {ASKS[0]: wants[ASKS[0]]} | alone(model, drawn, draft=draft)
    sampler = OpenSampler(model, rows=4, context=CONTEXT, stop_tokens=(3,), draft=draft)
    runs, gone = sampler.add(ASKS[4]), sampler.add(ASKS[5])
    while len(sampler.rows) < 2:
        sampler.step(part=1)
    waits, also_gone = sampler.add(ASKS[3]), sampler.add(ASKS[3])
    for number in (gone, also_gone, 99):
        sampler.cancel(number)
    left = [text.number for text in (*sampler.rows.values(), *sampler.waiting)]
    assert left == [runs, waits]

    # They come while others decode.
    found, numbers = {}, {}
    for ask in ASKS:
        numbers[ask] = sampler.add(ask)
        for number, new in sampler.step(part=2).items():
            found.setdefault(number, []).append(new)
    finish(sampler, found)
    assert not {gone, also_gone} & found.keys()
    for ask, want in wants.items():
        assert_same(found[numbers[ask]], want)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["meta", "model"])
def test_a_row_without_a_text_reads_no_token_before_the_first(kind):
    """A third row waits while two texts decode, also for drafters that read the token before."""
    cfg = small(num_layers=1, num_dense_layers=1, mtp_depth=int(kind == "meta"), mtp_kind="meta")
    model = random_model(cfg, seed=2)
    draft = model if kind == "model" else "mtp"
    sampler = OpenSampler(model, rows=3, context=CONTEXT, draft=draft)
    asks = [Ask((5, 6, 7), 6), Ask((9, 8), 4)]
    news = {}
    for ask in asks:  # the first one decodes alone, in a batch of one row
        sampler.add(ask)
        for _ in range(2):
            for number, new in sampler.step(part=1).items():
                news.setdefault(number, []).append(new)
    texts = [[t for new in of for t in new.tokens] for of in finish(sampler, news).values()]
    assert texts == [generate(model, [ask.prompt], ask.max_new_tokens).tokens[0] for ask in asks]


@pytest.mark.long
def test_drafts_are_told_with_their_fate(model):
    sampler = OpenSampler(model, rows=1, context=CONTEXT, draft="lookup", draft_length=2)
    ask = Ask((5, 6, 7, 5, 6, 7, 5, 6), 12)
    number = sampler.add(ask)
    news = finish(sampler)[number]
    want = generate(model, [ask.prompt], 12, draft="lookup", draft_length=2)

    tokens = np.array([token for new in news for token in new.tokens])
    drafted = np.array([token for new in news for token in new.drafted])
    assert tokens.tolist() == want.tokens[0]
    # A step's tokens are its accepted drafts and one more, which the end may cut.
    accepted = tokens == drafted
    assert (~accepted[1:]).sum() + accepted[-1] == want.steps
    assert accepted.sum() <= round(sum(want.acceptance) * want.steps)  # the end may cut some
    assert (drafted >= 0).any() and drafted[0] == -1


@pytest.mark.long
def test_a_cache_that_grows_holds_long_prompts_and_rows_that_come_and_go(model, monkeypatch):
    """As on a GPU, which reads empty slots: 16 at first, then more."""
    monkeypatch.setitem(table.DEVICES, "cpu", replace(table.DEVICES["cpu"], reads_all_slots=True))
    monkeypatch.setattr("dsv3_jax.decoding.batch.FIRST_SLOTS", 16)
    monkeypatch.setattr("dsv3_jax.decoding.sampler.SHORT", 16)
    monkeypatch.setattr("dsv3_jax.decoding.batch.GROWTH", 2)
    how = dict(stop_tokens=(3,), draft="lookup", draft_length=2)
    sampler = OpenSampler(model, rows=4, context=CONTEXT, **how)
    assert sampler.batch.slots == 16
    # Texts end at the last slot of a cache, and their rows are free while others begin.
    asks = [Ask((5, 6), 15), Ask((7, 8, 9), 14), Ask((1,), 4), Ask(tuple(range(4, 37)), 9)]
    wants = alone(model, asks)
    for together in (asks[:1], asks[1:3], asks[3:], asks):
        numbers = [sampler.add(ask) for ask in together]
        found = finish(sampler)
        for number, ask in zip(numbers, together, strict=True):
            assert_same(found[number], wants[ask])
    assert sampler.batch.slots == CONTEXT


@pytest.mark.long
def test_reading_gives_log_p_alternatives_experts_and_gates(two_layers):
    model = two_layers
    tokens = [*prompt(8), 1, 2]
    read = read_tokens(model, tokens)
    out = forward(model, jnp.asarray([tokens]))
    logp = np.asarray(jnp.log(jnp.exp(out.logits[0]) / jnp.exp(out.logits[0]).sum(-1)[:, None]))
    own = logp[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(read.logprobs, own, rtol=1e-4, atol=1e-4)
    for row, five in zip(logp, read.alternatives, strict=True):
        assert [token for token, _ in five] == np.argsort(-row)[:5].tolist()
    np.testing.assert_array_equal(read.expert_ids, out.routing.expert_ids[:, 0].swapaxes(0, 1))
    np.testing.assert_allclose(read.gates, out.routing.gates[:, 0].swapaxes(0, 1), rtol=1e-4)

    # Given experts take the choice's place.
    given = np.full((model.cfg.num_sparse_layers, len(tokens), CFG.experts_per_token), -1, np.int32)
    own = read.expert_ids[-1, 0]
    given[0, -1] = [e for e in range(CFG.num_experts) if e not in own][: len(own)]
    again = read_tokens(model, tokens, given=given)
    np.testing.assert_array_equal(again.expert_ids[-1, 0], given[0, -1])
    np.testing.assert_array_equal(again.expert_ids[:-1], read.expert_ids[:-1])


def test_what_cannot_be_answered_is_refused(model):
    with refused("context=1 is not an int of 2 or above"):
        OpenSampler(model, context=1)
    with refused("context=5000 is above .*, the model's max_positions less 1 drafts"):
        OpenSampler(model, context=5000, draft="lookup")
    sampler = OpenSampler(model, rows=1, context=CONTEXT)
    for ask, problem in (
        (Ask((), 3), "prompt 0 is empty"),
        (Ask((1,) * 60, 9), "max_new_tokens=9 does not fit: the prompt has 60 tokens, and"),
        (Ask((1,), 1, Sampling(-1.0)), "temperature=-1.0"),
        (Ask((1,), 1, seed=-1), "seed=-1"),
    ):
        with refused(problem):
            sampler.add(ask)
    assert sampler.is_idle


@pytest.mark.long
def test_a_changed_model_shares_all_other_arrays(two_layers):
    model = two_layers
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(model))]
    changed = changed_model(model, Changes(off=((1, 2),), bias=False))
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(changed))]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2  # w_down and the bias
    assert before == [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(model))]

    # An expert is off as by a gate of 0, in its layer and for all tokens.
    tokens = jnp.asarray([prompt(8)])

    def mute(layer, ids, gates):
        return jnp.where((layer == 1) & (ids == 2), 0.0, gates)

    muted = model.forward_hidden(tokens, how=model.how(edit_gates=mute))
    off = changed_model(model, Changes(off=((1, 2),))).forward_hidden(tokens)
    assert (off.routing.expert_ids[1] == 2).any()
    np.testing.assert_allclose(off.h, muted.h, rtol=1e-5, atol=1e-6)
