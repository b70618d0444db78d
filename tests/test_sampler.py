"""The open sampler: texts come and go, and each is that of `generate` alone."""

import itertools
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import forward, random_model, small

from dsv3_jax.decoding.generate import generate
from dsv3_jax.decoding.likelihood import read_tokens
from dsv3_jax.decoding.sampler import Ask, OpenSampler
from dsv3_jax.kernels import table
from dsv3_jax.ops.sampling import RowSampling, Sampling, processed_by_rows, processed_logits
from dsv3_jax.serve.engine import Changes, changed_model

CFG = small(mtp_depth=1)
CONTEXT = 64


@pytest.fixture(scope="module")
def model():
    return random_model(CFG, seed=2)


def prompts(count, seed=0):
    draw = random.Random(seed)
    return [
        tuple(draw.randrange(CFG.vocab_size) for _ in range(draw.randrange(1, 40)))
        for _ in range(count)
    ]


LAWS = [Sampling(), Sampling(0.7), Sampling(1.3, top_k=5), Sampling(1.0, None, 0.6)]


def alone(model, ask, **options):
    """The text by `generate`, with all that it tells; `sample` is the last of its prompt's."""
    return generate(
        model,
        [ask.prompt],
        ask.max_new_tokens,
        **ask.sampling._asdict(),
        seed=ask.seed,
        samples=ask.sample + 1,
        logprobs=True,
        return_routing=True,
        stop_tokens=(3,),
        **options,
    )


def finish(sampler, found=None):
    """Run until all texts have ended; `found` gathers what came of each."""
    found = {} if found is None else found
    while not sampler.is_idle:
        for number, new in sampler.step().items():
            found.setdefault(number, []).append(new)
    return found


def assert_alone(model, ask, news, **options):
    """A text of the sampler is that of `generate`: tokens, log p, experts, all of it."""
    want = alone(model, ask, **options)
    tokens = [token for new in news for token in new.tokens]
    assert tokens == want.tokens[-1]
    logprobs = [value for new in news for value in new.logprobs]
    np.testing.assert_allclose(logprobs, want.model_logprobs[-1], rtol=1e-4, atol=1e-4)

    # Experts of the prompt and of all new tokens but the last, each once and in order.
    assert news[0].experts_from == 0
    ids = np.concatenate([new.expert_ids for new in news])
    np.testing.assert_array_equal(ids, want.expert_ids[-1][:, :-1].swapaxes(0, 1))
    for before, after in itertools.pairwise(news):
        assert after.experts_from == before.experts_from + len(before.expert_ids)
    assert [new.ended for new in news] == [False] * (len(news) - 1) + [True]

    # The likeliest come first, and the token's own log p is theirs where it is one of them.
    for new in news:
        for token, value, five in zip(new.tokens, new.logprobs, new.alternatives, strict=True):
            assert [p for _, p in five] == sorted((p for _, p in five), reverse=True)
            assert dict(five).get(token, value) == pytest.approx(value, abs=1e-5)
    return tokens


@pytest.mark.parametrize("draft", [None, "lookup", pytest.param("mtp", marks=pytest.mark.long)])
def test_a_text_is_that_of_generate_whatever_shares_its_batch(model, draft):
    sampler = OpenSampler(model, rows=3, context=CONTEXT, stop_tokens=(3,), draft=draft)
    asks = [
        Ask(prompt, 3 + 4 * (i % 4), LAWS[i % 4], seed=i, sample=i % 2 if i % 4 else 0)
        for i, prompt in enumerate(prompts(8))
    ]
    # They come while others decode.
    found, numbers = {}, []
    for ask in asks:
        numbers.append(sampler.add(ask))
        for number, new in sampler.step(part=2).items():
            found.setdefault(number, []).append(new)
    finish(sampler, found)
    for number, ask in zip(numbers, asks, strict=True):
        assert_alone(model, ask, found[number], draft=draft)


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


def test_a_cancelled_text_frees_its_row_and_leaves_others_alone(model):
    sampler = OpenSampler(model, rows=2, context=CONTEXT, stop_tokens=(3,))
    first, second, third = (Ask(p, 20, seed=9) for p in prompts(3, seed=5))
    a, b, c = map(sampler.add, (first, second, third))
    found = {number: [new] for number, new in sampler.step().items()}
    assert set(found) == {a, b}
    sampler.cancel(a)
    sampler.step(part=1)
    for number, new in sampler.step().items():  # the third has begun in its place
        found.setdefault(number, []).append(new)
    assert c in found and len(sampler.rows) <= 2
    finish(sampler)
    sampler.cancel(a), sampler.cancel(99)  # nothing is left of it
    assert sampler.is_idle

    waits = [sampler.add(third) for _ in range(4)]
    sampler.cancel(waits[3])  # before it has a row
    assert set(finish(sampler)) == set(waits[:3])


@pytest.mark.long
def test_a_cache_that_grows_holds_long_prompts_and_rows_that_come_and_go(model, monkeypatch):
    """As on a GPU, which reads empty slots: 16 at first, then more."""
    monkeypatch.setitem(table.DEVICES, "cpu", replace(table.DEVICES["cpu"], reads_all_slots=True))
    monkeypatch.setattr("dsv3_jax.decoding.batch.FIRST_SLOTS", 16)
    monkeypatch.setattr("dsv3_jax.decoding.sampler.SHORT", 16)
    monkeypatch.setattr("dsv3_jax.decoding.batch.GROWTH", 2)
    sampler = OpenSampler(model, rows=4, context=CONTEXT, stop_tokens=(3,))
    assert sampler.batch.slots == 16
    # Texts end at the last slot of a cache, and their rows are free while others begin.
    asks = [Ask((5, 6), 15), Ask((7, 8, 9), 14), Ask((1,), 4), Ask(tuple(range(4, 37)), 9)]
    for together in (asks[:1], asks[1:3], asks[3:], asks):
        numbers = [sampler.add(ask) for ask in together]
        found = finish(sampler)
        for number, ask in zip(numbers, together, strict=True):
            assert_alone(model, ask, found[number])
    assert sampler.batch.slots == CONTEXT


def test_random_arrivals_and_cancellations_lose_nothing(model):
    draw = random.Random(1)
    sampler = OpenSampler(model, rows=4, context=CONTEXT, stop_tokens=(3,))
    asks = {}
    found, cancelled = {}, set()
    pool = [Ask(p, 1 + i % 9, LAWS[i % 4], seed=i) for i, p in enumerate(prompts(6, seed=2))]
    for i in range(60):
        asks[sampler.add(pool[i % 6])] = pool[i % 6]
        if draw.random() < 0.4:
            victim = draw.choice(list(asks))
            sampler.cancel(victim)
            cancelled.add(victim)
        for number, new in sampler.step(part=draw.randrange(1, 6)).items():
            assert number not in cancelled
            found.setdefault(number, []).append(new)
    finish(sampler, found)

    wants = {ask: alone(model, ask).tokens[0] for ask in pool}
    complete = {n for n, news in found.items() if news[-1].ended}
    assert complete >= set(asks) - cancelled
    for number in complete:
        assert [t for new in found[number] for t in new.tokens] == wants[asks[number]]
    assert not sampler.rows and not sampler.waiting


def test_settings_of_each_row_are_those_of_all_rows(model):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 2, 37)), jnp.float32)
    rows = RowSampling(
        jnp.array([0.0, 0.7, 1.3, 1.0]),
        jnp.array([37, 37, 5, 2**31 - 1]),
        jnp.array([1.0, 1.0, 1.0, 0.6]),
    )
    kept = np.asarray(processed_by_rows(logits, rows))
    for b, law in enumerate(LAWS):
        if law.is_greedy:
            assert (np.isfinite(kept[b]).sum(-1) == 1).all()
            assert kept[b].argmax(-1).tolist() == logits[b].argmax(-1).tolist()
        else:
            np.testing.assert_array_equal(kept[b], processed_logits(logits[b], **law._asdict()))


def test_reading_gives_log_p_alternatives_experts_and_gates(model):
    tokens = list(prompts(1, seed=8)[0]) + [1, 2]
    read = read_tokens(model, tokens)
    out = forward(model, jnp.asarray([tokens]))
    logp = np.asarray(jnp.log(jnp.exp(out.logits[0]) / jnp.exp(out.logits[0]).sum(-1)[:, None]))
    np.testing.assert_allclose(
        read.logprobs, logp[np.arange(len(tokens) - 1), tokens[1:]], rtol=1e-4, atol=1e-4
    )
    for row, five in zip(logp, read.alternatives, strict=True):
        assert [token for token, _ in five] == np.argsort(-row)[:5].tolist()
    np.testing.assert_array_equal(read.expert_ids, out.routing.expert_ids[:, 0].swapaxes(0, 1))
    np.testing.assert_allclose(read.gates, out.routing.gates[:, 0].swapaxes(0, 1), rtol=1e-4)

    # Given experts take the choice's place, and the text begins otherwise.
    given = np.full((CFG.num_sparse_layers, len(tokens), CFG.experts_per_token), -1, np.int32)
    own = read.expert_ids[-1, 0]
    given[0, -1] = [e for e in range(CFG.num_experts) if e not in own][: len(own)]
    again = read_tokens(model, tokens, given=given)
    np.testing.assert_array_equal(again.expert_ids[-1, 0], given[0, -1])
    np.testing.assert_array_equal(again.expert_ids[:-1], read.expert_ids[:-1])

    sampler = OpenSampler(model, rows=2, context=CONTEXT)
    number = sampler.add(Ask(tuple(tokens), 3, given=given))
    news = finish(sampler)[number]
    assert news[0].tokens[0] == again.alternatives[-1][0][0]
    np.testing.assert_array_equal(
        np.concatenate([new.expert_ids for new in news])[len(tokens) - 1, 0], given[0, -1]
    )


@pytest.mark.parametrize(
    "ask, problem",
    [
        (Ask((), 3), "prompt 0 is empty"),
        (Ask((99,), 3), "prompt 0 holds token 99"),
        (Ask((1,) * 60, 9), "max_new_tokens=9 does not fit: the prompt has 60 tokens, and"),
        (Ask((1,), 0), "max_new_tokens=0"),
        (Ask((1,), 1, Sampling(-1.0)), "temperature=-1.0"),
        (Ask((1,), 1, seed=-1), "seed=-1"),
    ],
)
def test_what_cannot_be_answered_is_refused(model, ask, problem):
    with pytest.raises(ValueError, match="context=1 is not an int of 2 or above"):
        OpenSampler(model, context=1)
    sampler = OpenSampler(model, rows=2, context=CONTEXT)
    with pytest.raises(ValueError, match=problem):
        sampler.add(ask)
    assert sampler.is_idle


def test_a_changed_model_shares_all_other_arrays(model):
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(model))]
    changed = changed_model(model, Changes(off=((1, 2),), bias=False))
    after = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(changed))]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2  # w_down and the bias
    assert before == [x.unsafe_buffer_pointer() for x in jax.tree.leaves(nnx.state(model))]

    # An expert is off as by a gate of 0, in its layer and for all tokens.
    tokens = jnp.asarray([prompts(1, seed=8)[0]])
    first_sparse = CFG.num_dense_layers

    def mute(layer, ids, gates):
        return jnp.where((layer == first_sparse + 1) & (ids == 2), 0.0, gates)

    muted = model.forward_hidden(tokens, how=model.how(edit_gates=mute))
    off = changed_model(model, Changes(off=((1, 2),))).forward_hidden(tokens)
    assert (off.routing.expert_ids[1] == 2).any()
    np.testing.assert_allclose(off.h, muted.h, rtol=1e-5, atol=1e-6)
