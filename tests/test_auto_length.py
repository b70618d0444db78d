"""draft_length="auto": the rule on simulated drafters, and that text is plain decoding's, whatever the rule chooses."""

import math
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import DENSE, HEADS, LIGHT, random_model, small, tokens_of

from dsv3_jax.decoding import auto_length
from dsv3_jax.decoding.auto_length import BINS, SHARE, Control, Costs, Options
from dsv3_jax.decoding.decode_config import DecodeConfig
from dsv3_jax.decoding.generate import _COSTS, _decode, _prefill, _Static, generate, generate_in_parts
from dsv3_jax.mesh import sharding
from dsv3_jax.model.transformer import abstract
from dsv3_jax.ops.sampling import GREEDY, Sampling
from dsv3_jax.ops.verify_drafts import accept

pytestmark = pytest.mark.usefixtures("light_compiles")

OPTIONS = Options((0, 1, 2, 4), (0, 1, 2, 4, 1), budget=SHARE * 400, joint=False)


TWO = Options((0, 1, 2), (0, 1, 2, 1), budget=1.0, joint=False)


def costs_of(draft, verify, start=0.0):
    return Costs(*(jnp.asarray(x, jnp.float32) for x in (draft, verify, start)))


# The rule


@partial(jax.jit, static_argnames=("steps", "options"))
def simulate(costs, true_rates, likely, key, steps=400, options=OPTIONS):
    """(plain steps spent, tokens) of one sequence whose drafter is right as often as `true_rates` says, by class."""
    lengths, top = jnp.asarray(options.lengths, jnp.int32), options.lengths[-1]

    def step(carry, key):
        tally, tokens, asleep = carry
        classes, passes = jax.random.split(key)
        choice, trial, over = auto_length.choose_draft(tally, costs, options, tokens, jnp.asarray(False))
        kind = jax.random.categorical(classes, jnp.log(likely), shape=(1, top))
        sure = (kind.astype(jnp.float32) + 0.5) / BINS
        count, active = jnp.asarray(options.counts, jnp.int32)[choice], jnp.ones((1,), bool)
        index = auto_length.choose_verify(tally, costs, options, sure, count, active)
        index = jnp.where(trial, jnp.argmax(lengths == count).astype(jnp.int32), index)
        passed = (jax.random.uniform(passes, (top,)) < true_rates[kind[0]]) & (jnp.arange(top) < lengths[index])
        new = 1 + jnp.cumprod(passed.astype(jnp.int32)).sum(dtype=jnp.int32)
        after = auto_length.observe(
            tally, options, costs, choice, index, trial, sure, new[None], active, jnp.zeros((1,), bool)
        )
        plain = tally._replace(spent=tally.spent + 1, gained=tally.gained + 1)  # asleep: the plain program
        tally = jax.tree.map(lambda a, b: jnp.where(asleep, a, b), plain, after)
        tokens = tokens + jnp.where(asleep, 1, new)
        spent = costs.start + tally.spent
        asleep |= over | (choice == 0) & (spent > (1 + SHARE) * tokens.astype(jnp.float32) + options.budget)
        return (tally, tokens, asleep), None

    start = auto_length.new_tally(options), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    (tally, tokens, _), _ = jax.lax.scan(step, start, jax.random.split(key, steps))
    return tally.spent, tokens, tally.by_length


def settings(rng, count):
    """Random costs and drafters: some pay, some never do, some only where they are sure."""
    draft = np.sort(rng.uniform(0, 0.6, (count, 3)), axis=1) * rng.choice([0.05, 1, 3], (count, 1))
    verify = 1 + np.sort(rng.uniform(0, 1, (count, 3)), axis=1) * rng.choice([0.1, 1, 3], (count, 1))
    costs = costs_of(
        np.concatenate([np.zeros((count, 1)), draft, draft[:, :1] + 0.2], axis=1),
        np.concatenate([rng.uniform(1, 1.02, (count, 1)), verify], axis=1),
        rng.uniform(0, 2, count),
    )
    true = np.sort(rng.uniform(0, 1, (count, BINS)), axis=1) * rng.choice([0.0, 0.5, 1], (count, 1))
    return costs, jnp.asarray(true, jnp.float32), jnp.asarray(rng.dirichlet(np.ones(BINS), count), jnp.float32)


def test_never_slower_than_plain_by_more_than_its_share_and_faster_where_drafts_pay(rng):
    """Against the best fixed length, known in hindsight from the equations."""
    count = 96
    costs, true, likely = settings(rng, count)
    keys = jax.random.split(jax.random.key(0), count)
    spent, tokens, by_length = map(np.asarray, jax.vmap(simulate)(costs, true, likely, keys))
    longest = (1 + SHARE) * tokens + OPTIONS.budget + 1.1  # and a step's own cost, when it falls asleep
    assert (np.asarray(costs.start) + spent <= longest).all()
    mean = (np.asarray(true) * np.asarray(likely)).sum(1)
    best = np.ones(count)
    for i, k in enumerate(OPTIONS.lengths[1:], start=1):
        gain = sum(mean**j for j in range(k + 1))
        best = np.maximum(best, gain / (np.asarray(costs.draft)[:, i] + np.asarray(costs.verify)[:, i]))
    speed = tokens / spent
    pays = best > 1.2
    assert 10 < pays.sum() < count - 10
    assert np.median(speed[pays] / best[pays]) > 0.95 and (speed[pays] / best[pays]).min() > 0.7
    assert (by_length.sum(0) > 0).all()  # every length is used by someone


def test_which_drafts_are_verified_depends_on_no_draft_itself(rng):
    """The confidence of draft j + 1 is known before it is drawn; those after it depend on it, and are not read."""
    costs = costs_of([0, 0, 0, 0, 0], [1, 1.3, 1.5, 2.2])
    tally = auto_length.new_tally(OPTIONS)
    choose = jax.jit(
        lambda sure: auto_length.choose_verify(tally, costs, OPTIONS, sure, jnp.int32(4), jnp.ones(1, bool))
    )
    found = set()
    for _ in range(60):
        sure = jnp.asarray(rng.uniform(size=(1, 4)) ** 0.5, jnp.float32)
        index = int(choose(sure))
        found.add(index)
        read = (1, 2, 3, 4)[index]  # after k drafts that of k + 1 decides
        assert int(choose(sure.at[0, read:].set(1.0))) >= index
        if index == 0:
            assert int(choose(sure.at[0, 1:].set(1.0))) == 0
    assert {0, 3} <= found and len(found) > 2


def test_it_ends_when_no_trial_fits_any_more():
    """A step with one draft costs 0.9 plain steps more than a plain one: beyond 2 × SHARE of 40 tokens, not of 60."""
    unsure = auto_length.new_tally(TWO)._replace(first=jnp.eye(BINS)[0])  # its drafts are rarely right
    for tokens, start, tally, ends in (
        (40, 0.0, unsure, True),
        (60, 0.0, unsure, False),
        (60, 0.5, unsure, True),  # the program took so long to start
        (60, 0.0, unsure._replace(lost=jnp.float32(0.5)), True),  # an earlier trial
        (40, 0.0, unsure._replace(first=jnp.eye(BINS)[-1]), False),  # drafts seem to pay
    ):
        options, costs = TWO._replace(budget=SHARE * tokens), costs_of([0, 0.5, 0.6, 0.6], [1, 1.4, 1.6], start)
        choice, trial, over = auto_length.choose_draft(tally, costs, options, jnp.int32(0), jnp.asarray(False))
        assert bool(over) == ends and not (bool(over) and (int(choice) or bool(trial)))


@pytest.mark.long
@pytest.mark.parametrize("reads_the_draft", [False, True])
def test_sampled_text_keeps_its_law(reads_the_draft):
    """Two tokens, drafted, verified as far as the rule says, and else drawn plainly; against the target's joint law.

    A rule that reads the drawn drafts' own probabilities biases them, and this sees it. The bound is that of
    test_verify_drafts: chance exceeds it with probability under 1e-9.
    """
    vocab, draws = 5, 40_000
    rng = np.random.default_rng(4)
    p1, p2, q1, q2 = (
        jax.nn.softmax(jnp.asarray(rng.normal(0, 1.5, shape), jnp.float32))
        for shape in ((vocab,), (vocab, vocab), (vocab,), (vocab, vocab))
    )  # the second token's law depends on the first
    tally = auto_length.new_tally(TWO)
    costs = costs_of([0, 0, 0, 0], [1, 1.2, 1.53])

    def one(key):
        first, second, verdict, later = jax.random.split(key, 4)
        a = jax.random.categorical(first, jnp.log(q1)).astype(jnp.int32)
        b = jax.random.categorical(second, jnp.log(q2[a])).astype(jnp.int32)
        q = jnp.stack([q1, q2[a]])
        sure = jnp.stack([q1[a], q2[a, b]]) if reads_the_draft else q.max(axis=1)
        index = auto_length.choose_verify(tally, costs, TWO, sure[None], jnp.int32(2), jnp.ones(1, bool))
        laws = jnp.log(jnp.stack([p1, p2[a], jnp.ones(vocab) / vocab]))
        drafts = jnp.stack([a, b])
        counts, texts = [], []
        for k in (0, 1, 2):
            count, tokens = accept(drafts[None, :k], q[None, :k], laws[None, : k + 1], verdict, Sampling(1.0))
            counts.append(count[0])
            texts.append(jnp.pad(tokens[0], (0, 2 - k))[:2])
        text, count = jnp.stack(texts)[index], jnp.stack(counts)[index]
        plain = jax.random.categorical(later, jnp.log(p2[text[0]])).astype(jnp.int32)
        return vocab * text[0] + jnp.where(count > 0, text[1], plain), index

    pairs, index = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), draws))
    assert np.sort(np.bincount(index, minlength=3))[-2] > draws / 10  # not one length alone
    law = np.asarray(p1[:, None] * p2).ravel()
    shares = np.bincount(pairs, minlength=vocab * vocab) / draws
    bound = np.sqrt(law * (1 - law) / draws).sum() / 2 + math.sqrt(math.log(1e9) / (2 * draws))
    assert (np.abs(shares - law).sum() / 2 < bound) != reads_the_draft


def test_costs_that_cannot_pay_end_drafting_at_once():
    assert not auto_length.may_pay(costs_of([0, 1.2, 2, 3.5, 3], [1, 1.2, 1.4, 1.6]), OPTIONS)
    assert auto_length.may_pay(costs_of([0, 1.2, 2, 3.2, 3], [1, 1.2, 1.4, 1.6]), OPTIONS)
    # A request may take 8 plain steps longer, and the cheapest trial 0.3.
    for start, pays in ((7.6, True), (7.8, False)):
        assert auto_length.may_pay(costs_of([0, 0.1, 0.2, 0.4, 0.3], [1, 1.2, 1.4, 1.8], start), OPTIONS) == pays


@pytest.mark.parametrize("longer_s", [0.0, 2e-4])  # as two plain steps
@pytest.mark.parametrize("start_s", [0.0, 3e-3])  # as long as 30 plain steps
def test_costs_are_those_of_steps_not_of_starting_a_program(start_s, longer_s):
    """On a clock of our own: a plain step takes 0.1 ms, one of the rule's loop 0.17. Its program may start later."""
    plain, draft, verify = 1e-4, [0.0, 4e-5, 5e-5, 8e-5, 6e-5], [1.7e-4, 1.8e-4, 2e-4, 2.5e-4]

    def run(control, steps):
        if control is None:
            return start_s + plain * steps, steps
        a_step = draft[int(control.draft)] + verify[int(control.verify)]
        return start_s + longer_s + a_step * int(control.limit), steps

    costs = auto_length.measure_costs(run, OPTIONS, most=159)
    np.testing.assert_allclose(costs.draft, np.array(draft) / plain, rtol=1e-4)
    np.testing.assert_allclose(costs.verify, np.array(verify) / plain, rtol=1e-4)
    np.testing.assert_allclose(costs.start, longer_s / plain, rtol=0, atol=1e-3)


def test_a_text_that_ends_at_once_has_costs():
    """The cost is that of its only step, with the program's start."""
    costs = auto_length.measure_costs(lambda control, steps: (2e-3 if control is None else 3e-3, 1), OPTIONS, most=9)
    assert costs.draft.tolist() == [0] * 5 and costs.verify.tolist() == [1.5] * 4 and costs.start == 0


# Text


def set_costs(monkeypatch, *, share: float, draft: float, step: float, verify: float) -> None:
    """In plain steps: of a draft, of a step of the rule's loop, and of each draft that it verifies."""

    def fixed(run, options, *, most):
        counts, lengths = (jnp.asarray(n, jnp.float32) for n in (options.counts, options.lengths))
        return Costs(draft * counts, step + verify * lengths)

    monkeypatch.setattr(auto_length, "measure_costs", fixed)
    monkeypatch.setattr(auto_length, "SHARE", share)


@pytest.fixture
def costs(monkeypatch):
    """Every length pays sometimes, and much may be tried; no clock is read."""
    set_costs(monkeypatch, share=0.2, draft=0.05, step=1.0, verify=0.08)
    _COSTS.clear()
    yield
    _COSTS.clear()


PROMPTS = [tokens_of(LIGHT, 1, n, seed=n)[0].tolist() for n in (1, 2, 21)] + [[5, 9, 2, 7] * 6]


@lru_cache
def pair(scheme):
    """(a model, what drafts for it); the drafts are right now and then."""
    from test_speculative import drafting, leaning

    if scheme == "lookup":
        return random_model(LIGHT, execution=DENSE), "lookup"
    if scheme == "model":
        return drafting("model")["partly"]
    cfg = replace(LIGHT, **HEADS[scheme])
    return leaning(cfg, 0.1 if cfg.head_kind.reads_tokens else 0.3), "mtp"


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["lookup", "deepseek of 3", "meta", "model"])
def test_greedy_text_is_that_of_plain_decoding(costs, scheme):
    model, draft = pair(scheme)
    plain = generate(model, PROMPTS, 60, stop_tokens=[7])
    config = DecodeConfig(60, draft=draft, draft_length="auto", stop_tokens=[7])
    *_, drafted = generate_in_parts(model, PROMPTS, config, part=17)
    assert drafted.tokens == plain.tokens
    assert drafted.steps == sum(drafted.steps_by_length.values()) < plain.steps
    assert sum(n > 0 for n in drafted.steps_by_length.values()) >= 2  # several lengths
    assert 0 < drafted.acceptance[0] < 1


@pytest.mark.long
def test_a_mesh_chooses_what_one_device_chooses(costs):
    """Rows on devices of their own decide together: lengths, trials and text are those of one device."""
    alone, draft = pair("lookup")
    graphdef, state = nnx.split(alone)
    placed = jax.device_put(state, sharding.state_sharding(state, sharding.make_mesh(2, 2, 2)))
    settings = dict(draft=draft, draft_length="auto", stop_tokens=[7])
    expected = generate(alone, PROMPTS, 40, **settings)
    got = generate(nnx.merge(graphdef, placed), PROMPTS, 40, **settings)
    assert got.tokens == expected.tokens and got.steps_by_length == expected.steps_by_length
    assert sum(n > 0 for n in got.steps_by_length.values()) >= 2 and got.acceptance == expected.acceptance


def watch_sleep(monkeypatch) -> list[int]:
    """The plain steps of each program after it fell asleep."""
    slept, from_plain = [], auto_length.from_plain

    def watched(plain, loop):
        jax.debug.callback(lambda n: slept.append(int(n)), plain.steps - loop.steps)
        return from_plain(plain, loop)

    monkeypatch.setattr(auto_length, "from_plain", watched)
    _decode.clear_cache()  # programs that another list watches
    return slept


@pytest.mark.long
def test_it_does_not_begin_where_no_trial_fits(costs, monkeypatch):
    from test_speculative import drafting

    # A trial costs 0.9 plain steps more than one, and 60 tokens have room for 0.6.
    set_costs(monkeypatch, share=0.005, draft=0.4, step=1.0, verify=0.5)
    slept = watch_sleep(monkeypatch)
    model, draft = drafting("model")["wrong"]
    plain = generate(model, PROMPTS[:1], 60)
    drafted = generate(model, PROMPTS[:1], 60, draft=draft, draft_length="auto")
    jax.effects_barrier()
    assert drafted.tokens == plain.tokens and drafted.steps == plain.steps == drafted.steps_by_length[0]
    assert slept == []  # plain decoding's own program made it


@pytest.mark.long
def test_an_unlucky_drafter_sleeps_and_plain_steps_go_on(costs, monkeypatch):
    """Drafts that are never right end; the text is the same, and all steps are counted."""
    from test_speculative import drafting

    set_costs(monkeypatch, share=0.02, draft=0.05, step=1.3, verify=0.08)  # the rule's loop costs more than plain steps
    slept = watch_sleep(monkeypatch)
    model, draft = drafting("model")["wrong"]
    prompts = PROMPTS[:2]
    plain = generate(model, prompts, 70, stop_tokens=[7])
    config = DecodeConfig(70, draft=draft, draft_length="auto", stop_tokens=[7])
    *_, drafted = generate_in_parts(model, prompts, config, part=7)
    assert drafted.tokens == plain.tokens and drafted.steps == plain.steps
    assert drafted.acceptance == [0.0] * 4 and drafted.steps_by_length[0] > 40
    assert sum(drafted.steps_by_length.values()) == drafted.steps > drafted.steps_by_length[0]
    jax.effects_barrier()
    assert sum(slept) > 30


@pytest.mark.long
def test_no_cache_is_copied(whole_compiles):
    """Neither by the choice among lengths, nor by that among drafts."""
    cfg = small(num_layers=1, num_dense_layers=1, mtp_depth=1)
    graphdef, state = nnx.split(abstract(cfg))
    batch, capacity = 2, 1 << 15
    options = auto_length.make_options("mtp", cfg, batch, 16)
    static = _Static(GREEDY, options.lengths[-1], "mtp", 16, capacity, "latent", jnp.dtype("float32"), options)
    none, stops = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, 32), jnp.int32)
    loop = jax.eval_shape(
        lambda *args: _prefill(graphdef, *args, static=static), state, None, tokens, none, jax.random.key(0), stops
    )
    one = jax.ShapeDtypeStruct((), jnp.int32)
    costs = Costs(*(jax.ShapeDtypeStruct((n,), jnp.float32) for n in map(len, (options.counts, options.lengths))))
    control = Control(costs, one, one, one)
    lowered = _decode.lower(graphdef, state, None, (None, None), loop, stops, one, control, static=static)
    memory = lowered.compile().memory_analysis()
    a_layer = batch * capacity * (cfg.kv_latent_dim + cfg.rope_head_dim) * 4
    assert memory.alias_size_in_bytes >= 2 * a_layer
    assert memory.temp_size_in_bytes < a_layer


def test_it_must_fit():
    config = DecodeConfig(70, draft="lookup", draft_length="auto")
    config.check(LIGHT, [[1] * 26])
    with pytest.raises(ValueError, match=r"^draft_length='auto' does not fit: .* and it needs 32$"):
        config.check(LIGHT, [[1] * 27])
    with pytest.raises(ValueError, match=r"^draft_length='most' is not an int or 'auto'"):
        DecodeConfig(70, draft="lookup", draft_length="most")
